"""`config.json` of GPT-2 and GPT-Neo: LayerNorm, learned positions, a feed-forward layer without a gate."""

from __future__ import annotations

from typing import Any

from groundup.interop.fields import MOST_LAYERS, Fields
from groundup.interop.llama_configs import cycle
from groundup.model import ModelConfig
from groundup.model.config import Activation, Pattern

ACTIVATIONS: dict[str, Activation] = {
    # four spellings of one formula
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu2": "relu2",
}
_OUTSIDE: dict[str, str] = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu2": "relu2"}
_TYPES: dict[str, Pattern] = {"global": "full", "local": "window"}


def read_gpt2(fields: Fields) -> dict[str, Any]:
    """The arguments of `ModelConfig` for GPT-2."""
    d_model, n_heads = fields.count("n_embd"), fields.count("n_head")
    if fields.flag("scale_attn_by_inverse_layer_idx", False):
        fields.refuse("scale_attn_by_inverse_layer_idx", "is not computed by groundup; only false is.")
    return {
        "vocab_size": fields.count("vocab_size"),
        "context_length": fields.count("n_positions", 1024),
        "n_layers": fields.count("n_layer", most=MOST_LAYERS),
        "d_ff": fields.count("n_inner", 4 * d_model, or_null=True),
        "attention_scale": None if fields.flag("scale_attn_weights", True) else 1.0,
        "bias": True,
        **_shared(fields, d_model, n_heads, "n_embd", "n_head"),
    }


def write_gpt2(config: ModelConfig) -> dict[str, Any]:
    """The fields of a GPT-2's `config.json`; what it cannot say is left out."""
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_layer": config.n_layers,
        "n_embd": config.d_model,
        "n_head": config.n_heads,
        "n_inner": config.d_ff,
        "activation_function": _OUTSIDE.get(config.activation, "gelu_new"),
        "layer_norm_epsilon": config.norm_eps,
        "scale_attn_weights": config.attention_scale != 1.0,
        "scale_attn_by_inverse_layer_idx": False,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": config.tied_embeddings,
    }


def read_gpt_neo(fields: Fields) -> dict[str, Any]:
    """The arguments of `ModelConfig` for GPT-Neo."""
    d_model, n_heads = fields.count("hidden_size"), fields.count("num_heads")
    n_layers = fields.count("num_layers", most=MOST_LAYERS)
    patterns = _attention(fields, n_layers)
    window = fields.count("window_size", 256)
    values = {
        "vocab_size": fields.count("vocab_size"),
        "context_length": fields.count("max_position_embeddings", 2048),
        "n_layers": n_layers,
        "d_ff": fields.count("intermediate_size", 4 * d_model, or_null=True),
        "attention_scale": 1.0,  # it never divides by sqrt(head_dim)
        "attention": cycle(patterns),
        "bias": True,
        "qkv_bias": False,
        **_shared(fields, d_model, n_heads, "hidden_size", "num_heads"),
    }
    return {**values, "window": window} if "window" in patterns else values


def write_gpt_neo(config: ModelConfig) -> dict[str, Any]:
    """The fields of a GPT-Neo's `config.json`; what it cannot say is left out."""
    names = ["local" if config.pattern(layer) == "window" else "global" for layer in range(config.n_layers)]
    short = list(cycle([_TYPES[name] for name in names]))
    times, rest = divmod(config.n_layers, len(short))
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "num_layers": config.n_layers,
        "hidden_size": config.d_model,
        "num_heads": config.n_heads,
        "intermediate_size": config.d_ff,
        "attention_types": [[names, 1]] if rest else [[names[: len(short)], times]],
        "attention_layers": names,
        "window_size": config.window or 256,
        "activation_function": _OUTSIDE.get(config.activation, "gelu_new"),
        "layer_norm_epsilon": config.norm_eps,
        "resid_dropout": config.dropout,
        "embed_dropout": config.dropout,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tied_embeddings,
    }


def _shared(fields: Fields, d_model: int, n_heads: int, width_name: str, heads_name: str) -> dict[str, Any]:
    """What both say in the same words."""
    if d_model % n_heads:
        fields.refuse(width_name, f"is not a multiple of {heads_name} = {n_heads}.")
    return {
        "n_heads": n_heads,
        "n_kv_heads": n_heads,
        "head_dim": max(1, d_model // n_heads),
        "d_model": d_model,
        "norm": "layernorm",
        "norm_eps": fields.number("layer_norm_epsilon", 1e-5),
        "qk_norm": False,
        "position": "learned",
        "activation": fields.choice("activation_function", ACTIVATIONS, "gelu_new"),
        "tied_embeddings": fields.flag("tie_word_embeddings", True),
        "initialization": "gpt2",
    }


def _attention(fields: Fields, n_layers: int) -> list[Pattern]:
    """Each layer's pattern from `attention_types`: [[["global", "local"], 12]] is these two, twelve times."""
    types = fields.get("attention_types", [[["global", "local"], 12]])
    names: list[Any] = []
    is_table = isinstance(types, list)
    for entry in types if is_table else []:
        is_table = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], list)
        if not is_table or type(entry[1]) is not int or not 0 <= len(entry[0]) * entry[1] <= MOST_LAYERS:
            is_table = False
            break
        names += entry[0] * entry[1]
    if not is_table or len(names) != n_layers or any(str(name) not in _TYPES for name in names):
        fields.refuse("attention_types", f"does not give {n_layers} layers, each of {', '.join(_TYPES)}.")
        return ["full"]
    if fields.get("attention_layers", names) != names:
        fields.refuse("attention_layers", "and attention_types disagree.")
    return [_TYPES[name] for name in names]
