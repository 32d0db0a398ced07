"""`config.json` of GPT-2 and GPT-Neo: LayerNorm, learned positions, a feed-forward layer without a gate."""

from __future__ import annotations

from collections.abc import Mapping
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
_OUTSIDE = {inside: outside for outside, inside in reversed(ACTIVATIONS.items())}
_TYPES: dict[str, Pattern] = {"global": "full", "local": "window"}
GPT2 = {
    "vocab_size": "vocab_size",
    "context_length": "n_positions",
    "n_layers": "n_layer",
    "d_model": "n_embd",
    "n_heads": "n_head",
    "d_ff": "n_inner",
}
GPT_NEO = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "n_layers": "num_layers",
    "d_model": "hidden_size",
    "n_heads": "num_heads",
    "d_ff": "intermediate_size",
}


def read_gpt2(fields: Fields) -> dict[str, Any]:
    """The arguments of `ModelConfig` for GPT-2."""
    if fields.flag("scale_attn_by_inverse_layer_idx", False):
        fields.refuse("scale_attn_by_inverse_layer_idx", "is not computed by groundup; only false is.")
    return {
        **_read_shared(fields, GPT2, context=1024),
        "attention_scale": None if fields.flag("scale_attn_weights", True) else 1.0,
    }


def write_gpt2(config: ModelConfig) -> dict[str, Any]:
    """The fields of a GPT-2's `config.json`; what it cannot say is left out."""
    return {
        **{theirs: getattr(config, ours) for ours, theirs in GPT2.items()},
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
    values = _read_shared(fields, GPT_NEO, context=2048)
    patterns = _attention(fields, values["n_layers"])
    window = fields.count("window_size", 256)
    return {
        **values,
        "attention_scale": 1.0,  # it never divides by sqrt(head_dim)
        "attention": cycle(patterns),
        "qkv_bias": False,
        **({"window": window} if "window" in patterns else {}),
    }


def write_gpt_neo(config: ModelConfig) -> dict[str, Any]:
    """The fields of a GPT-Neo's `config.json`; what it cannot say is left out."""
    names = ["local" if config.pattern(layer) == "window" else "global" for layer in range(config.n_layers)]
    short = cycle(names)
    times, rest = divmod(config.n_layers, len(short))
    return {
        **{theirs: getattr(config, ours) for ours, theirs in GPT_NEO.items()},
        "attention_types": [[names, 1]] if rest else [[list(short), times]],
        "attention_layers": names,
        "window_size": config.window or 256,
        "activation_function": _OUTSIDE.get(config.activation, "gelu_new"),
        "layer_norm_epsilon": config.norm_eps,
        "resid_dropout": config.dropout,
        "embed_dropout": config.dropout,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tied_embeddings,
    }


def _read_shared(fields: Fields, names: Mapping[str, str], context: int) -> dict[str, Any]:
    d_model, n_heads = fields.count(names["d_model"]), fields.count(names["n_heads"])
    if d_model % n_heads:
        fields.refuse(names["d_model"], f"is not a multiple of {names['n_heads']} = {n_heads}.")
    defaults = {"context_length": context, "d_model": d_model, "n_heads": n_heads, "d_ff": 4 * d_model}
    return {
        **{ours: fields.count(theirs, defaults.get(ours)) for ours, theirs in names.items()},
        "n_kv_heads": n_heads,
        "head_dim": max(1, d_model // n_heads),
        "norm": "layernorm",
        "norm_eps": fields.number("layer_norm_epsilon", 1e-5),
        "qk_norm": False,
        "position": "learned",
        "activation": fields.choice("activation_function", ACTIVATIONS, "gelu_new"),
        "bias": True,
        "tied_embeddings": fields.flag("tie_word_embeddings", True),
        "initialization": "gpt2",
    }


def _attention(fields: Fields, n_layers: int) -> list[Pattern]:
    """Each layer's pattern from `attention_types`: [[["global", "local"], 12]] is these two, twelve times."""
    types = fields.get("attention_types", [[["global", "local"], 12]])
    names: list[Any] = []
    for entry in types if isinstance(types, list) else []:
        match entry:
            case [list(some), int(times)] if 0 <= len(some) * times <= MOST_LAYERS:
                names += some * times
            case _:
                names.append(entry)
    if len(names) != n_layers or any(str(name) not in _TYPES for name in names):
        fields.refuse("attention_types", f"does not give {n_layers} layers, each of {', '.join(_TYPES)}.")
        return ["full"]
    if fields.get("attention_layers", names) != names:
        fields.refuse("attention_layers", "and attention_types disagree.")
    return [_TYPES[name] for name in names]
