"""`config.json` of Llama, Mistral, Qwen2, Qwen3 and Mixtral: one architecture with options, of which each family has
some.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from groundup.interop.fields import Fields
from groundup.interop.rope import read_rope, write_rope
from groundup.model import ModelConfig
from groundup.model.config import Activation, Pattern

ACTIVATIONS: dict[str, Activation] = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}
_OUTSIDE = {inside: outside for outside, inside in reversed(ACTIVATIONS.items())}
_LAYER_TYPES: dict[str, Pattern] = {"full_attention": "full", "sliding_attention": "window"}
SIZES = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
}
"""Counts, by our names and by theirs."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class LlamaLike:
    """A family.

    Attributes:
        fields: those that not all families have, or not with one default; with the defaults of transformers' class,
            which a file need not repeat.
        qk_norm: queries and keys are normalized.
        qkv_bias: queries, keys and values have a bias, and attention's output has none.
        is_divided: transformers takes a width only if the heads divide it, whatever head_dim says.
    """

    fields: Mapping[str, Any]
    qk_norm: bool = False
    qkv_bias: bool = False
    is_divided: bool = False


def read_llama_like(fields: Fields, family: LlamaLike) -> dict[str, Any]:
    """The arguments of `ModelConfig`."""
    d_model, n_heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    if family.is_divided and d_model % n_heads:
        fields.refuse("hidden_size", f"is not a multiple of num_attention_heads = {n_heads}.")
    by_heads = {"num_key_value_heads": n_heads, "head_dim": max(1, d_model // n_heads)}
    defaults = {**by_heads, **family.fields}
    sizes = {ours: fields.count(theirs, defaults.get(theirs), by_heads.get(theirs)) for ours, theirs in SIZES.items()}
    biases = {name: name in family.fields and fields.flag(name, False) for name in ("attention_bias", "mlp_bias")}
    values: dict[str, Any] = {
        **sizes,
        "norm_eps": fields.number("rms_norm_eps", defaults.get("rms_norm_eps", 1e-6)),
        "qk_norm": family.qk_norm,
        "activation": fields.choice("hidden_act", ACTIVATIONS, "silu"),
        "qkv_bias": biases["attention_bias"] or family.qkv_bias,
        "o_bias": biases["attention_bias"],
        "ff_bias": biases["mlp_bias"],
        "tied_embeddings": fields.flag("tie_word_embeddings", False),
        **read_rope(fields, defaults.get("rope_theta", 10_000.0), sizes["context_length"]),
        **_read_windows(fields, family, sizes["n_layers"]),
    }
    if "num_local_experts" in family.fields:
        values["n_experts"] = fields.count("num_local_experts", 8)
        values["experts_per_token"] = fields.count("num_experts_per_tok", 2)
        values["router_aux_loss_coef"] = fields.number("router_aux_loss_coef", 0.001, or_zero=True)
    return values


def write_llama_like(config: ModelConfig, family: LlamaLike) -> dict[str, Any]:
    """The fields of a `config.json`; what the family cannot say is left out."""
    special = {
        **_write_windows(config, family),
        "attention_bias": config.has_bias("o"),
        "mlp_bias": config.has_bias("ff"),
        "num_local_experts": max(1, config.n_experts),
        "num_experts_per_tok": config.experts_per_token,
        "router_aux_loss_coef": config.router_aux_loss_coef,
    }
    return {
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        "hidden_act": _OUTSIDE.get(config.activation, "silu"),
        "rms_norm_eps": config.norm_eps,
        **write_rope(config),
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tied_embeddings,
        **{name: value for name, value in special.items() if name in family.fields},
    }


def _read_windows(fields: Fields, family: LlamaLike, n_layers: int) -> dict[str, Any]:
    """`attention` and `window`: none, one for all layers (a window alone), or layer by layer."""
    names = family.fields.keys() & {"sliding_window", "layer_types"}
    window = None
    if "sliding_window" in names and fields.get("sliding_window", family.fields["sliding_window"]) is not None:
        window = fields.count("sliding_window", family.fields["sliding_window"])
    if names == {"sliding_window"}:
        return {} if window is None else {"attention": ("window",), "window": window}
    if names and not fields.flag("use_sliding_window", False):
        window = None
    first = fields.get("max_window_layers", 28) if names else 0
    types = fields.get("layer_types")
    if types is None:
        slides_from = first if window is not None and type(first) is int else n_layers
        types = ["sliding_attention" if layer >= slides_from else "full_attention" for layer in range(n_layers)]
    patterns = [_LAYER_TYPES.get(str(one)) for one in types] if isinstance(types, list) else []
    known = [pattern for pattern in patterns if pattern is not None]
    if len(known) != n_layers or len(patterns) != n_layers:
        fields.refuse("layer_types", f"must name {n_layers} layers, each of {', '.join(_LAYER_TYPES)}.")
    elif "window" in known and window is None:
        fields.refuse("layer_types", "has sliding layers, and neither use_sliding_window nor sliding_window says so.")
    elif "window" in known:
        return {"attention": cycle(known), "window": window}
    return {}


def _write_windows(config: ModelConfig, family: LlamaLike) -> dict[str, Any]:
    patterns = [config.pattern(layer) for layer in range(config.n_layers)]
    first = patterns.index("window") if "window" in patterns else len(patterns)
    return {
        "use_sliding_window": "window" in patterns,
        "sliding_window": config.window if "window" in patterns else None,
        # What programs that know no layer_types go by, where it can say the same.
        "max_window_layers": first if set(patterns[first:]) == {"window"} else len(patterns),
        "layer_types": ["sliding_attention" if pattern == "window" else "full_attention" for pattern in patterns],
    }


def cycle(patterns: list[T]) -> tuple[T, ...]:
    """The shortest beginning that, repeated, gives all layers' patterns."""
    for n in range(1, len(patterns)):
        if all(pattern == patterns[layer % n] for layer, pattern in enumerate(patterns)):
            return tuple(patterns[:n])
    return tuple(patterns)
