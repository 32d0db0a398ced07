"""`config.json` of Llama, Mistral, Qwen2, Qwen3 and Mixtral: one architecture with options, of which each family has
some.

Defaults are those of transformers' classes, which a file need not repeat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from groundup.interop.fields import MOST_LAYERS, Fields
from groundup.interop.rope import read_rope, write_rope
from groundup.model import ModelConfig
from groundup.model.config import Activation, Pattern

ACTIVATIONS: dict[str, Activation] = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}
_OUTSIDE = {inside: outside for outside, inside in reversed(ACTIVATIONS.items())}
_LAYER_TYPES: dict[str, Pattern] = {"full_attention": "full", "sliding_attention": "window"}


@dataclass(frozen=True, kw_only=True)
class LlamaLike:
    """The options of a family.

    Attributes:
        context: default of max_position_embeddings.
        n_kv_heads: default of num_key_value_heads; None: as many as there are heads.
        head_dim: default of head_dim; None: hidden_size / num_attention_heads.
        norm_eps: default of rms_norm_eps.
        rope_theta: default of the field of that name.
        windows: no sliding window, one for all layers, or layer by layer.
        window: default of sliding_window.
        qk_norm: queries and keys are normalized.
        qkv_bias: queries, keys and values have a bias, and attention's output has none.
        has_attention_bias: attention_bias says whether attention has biases.
        has_bias_fields: attention_bias and mlp_bias say whether attention and the feed-forward layers have biases.
        has_experts: a router and experts in place of each feed-forward layer.
        is_divided: transformers takes a width only if the heads divide it, whatever head_dim says.
    """

    context: int
    n_kv_heads: int | None = None
    head_dim: int | None = None
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    windows: Literal["none", "all", "layers"] = "none"
    window: int | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
    has_attention_bias: bool = False
    has_bias_fields: bool = False
    has_experts: bool = False
    is_divided: bool = False


def read_llama_like(fields: Fields, shape: LlamaLike) -> dict[str, Any]:
    """The arguments of `ModelConfig`."""
    d_model, n_heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    n_layers = fields.count("num_hidden_layers", most=MOST_LAYERS)
    context = fields.count("max_position_embeddings", shape.context)
    has_head_dim = fields.get("head_dim", shape.head_dim) is not None
    head_dim = fields.count("head_dim", shape.head_dim or 1) if has_head_dim else max(1, d_model // n_heads)
    if shape.is_divided and d_model % n_heads:
        fields.refuse("hidden_size", f"is not a multiple of num_attention_heads = {n_heads}.")
    attention_bias = shape.has_attention_bias or shape.has_bias_fields
    has_bias = fields.flag("attention_bias", False) if attention_bias else False
    values: dict[str, Any] = {
        "vocab_size": fields.count("vocab_size"),
        "context_length": context,
        "n_layers": n_layers,
        "n_heads": n_heads,
        # null stands for multi-head attention in every family, a missing field for the family's default
        "n_kv_heads": n_heads
        if fields.get("num_key_value_heads", shape.n_kv_heads) is None
        else fields.count("num_key_value_heads", shape.n_kv_heads or n_heads),
        "head_dim": head_dim,
        "d_model": d_model,
        "d_ff": fields.count("intermediate_size"),
        "norm_eps": fields.number("rms_norm_eps", shape.norm_eps),
        "qk_norm": shape.qk_norm,
        "activation": fields.choice("hidden_act", ACTIVATIONS, "silu"),
        "qkv_bias": has_bias or shape.qkv_bias,
        "o_bias": has_bias,
        "ff_bias": fields.flag("mlp_bias", False) if shape.has_bias_fields else False,
        "tied_embeddings": fields.flag("tie_word_embeddings", False),
        **read_rope(fields, shape.rope_theta, context),
        **_read_windows(fields, shape, n_layers),
    }
    if shape.has_experts:
        values["n_experts"] = fields.count("num_local_experts", 8)
        values["experts_per_token"] = fields.count("num_experts_per_tok", 2)
        coefficient = fields.get("router_aux_loss_coef", 0.001)
        is_zero = type(coefficient) in (int, float) and coefficient == 0
        values["router_aux_loss_coef"] = 0.0 if is_zero else fields.number("router_aux_loss_coef", 0.001)
    return values


def write_llama_like(config: ModelConfig, shape: LlamaLike) -> dict[str, Any]:
    """The fields of a `config.json`; what the family cannot say is left out."""
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "hidden_act": _OUTSIDE.get(config.activation, "silu"),
        "rms_norm_eps": config.norm_eps,
        **write_rope(config),
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tied_embeddings,
        **_write_windows(config, shape),
    }
    if shape.has_attention_bias or shape.has_bias_fields:
        values["attention_bias"] = config.has_bias("o")
    if shape.has_bias_fields:
        values["mlp_bias"] = config.has_bias("ff")
    if shape.has_experts:
        values["num_local_experts"] = max(1, config.n_experts)
        values["num_experts_per_tok"] = config.experts_per_token
        values["router_aux_loss_coef"] = config.router_aux_loss_coef
    return values


def _read_windows(fields: Fields, shape: LlamaLike, n_layers: int) -> dict[str, Any]:
    """`attention` and `window`, from the names that the family has for them."""
    if shape.windows == "none":
        types = fields.get("layer_types")
        if types is not None and types != ["full_attention"] * n_layers:
            fields.refuse("layer_types", "this family's layers have full attention.")
        return {}
    if shape.windows == "all":
        has_window = fields.get("sliding_window", shape.window) is not None
        if not has_window:
            return {}
        return {"attention": ("window",), "window": fields.count("sliding_window", shape.window or 1)}
    slides = fields.flag("use_sliding_window", False)
    first = fields.get("max_window_layers", 28)
    types = fields.get("layer_types")
    window = fields.get("sliding_window", 4096)
    if types is None and slides and window is not None and type(first) is int:
        types = ["sliding_attention" if layer >= first else "full_attention" for layer in range(n_layers)]
    elif types is None:
        types = ["full_attention"] * n_layers
    if not isinstance(types, list) or len(types) != n_layers or any(str(one) not in _LAYER_TYPES for one in types):
        fields.refuse("layer_types", f"must name {n_layers} layers, each of {', '.join(_LAYER_TYPES)}.")
        return {}
    patterns = [_LAYER_TYPES[one] for one in types]
    if "window" not in patterns:
        return {}
    if not slides or window is None:
        fields.refuse("layer_types", "has sliding layers, which use_sliding_window and sliding_window forbid.")
        return {}
    return {"attention": cycle(patterns), "window": fields.count("sliding_window", 4096)}


def _write_windows(config: ModelConfig, shape: LlamaLike) -> dict[str, Any]:
    if shape.windows == "none":
        return {}
    patterns = [config.pattern(layer) for layer in range(config.n_layers)]
    slides = "window" in patterns
    window = config.window if slides else None
    if shape.windows == "all":
        return {"sliding_window": window}
    types = ["sliding_attention" if pattern == "window" else "full_attention" for pattern in patterns]
    # What programs that know no layer_types go by, where it can say the same.
    first = (
        patterns.index("window") if slides and len(set(patterns[patterns.index("window") :])) == 1 else len(patterns)
    )
    return {
        "use_sliding_window": slides,
        "sliding_window": window,
        "max_window_layers": first,
        "layer_types": types,
    }


def cycle(patterns: list[Pattern]) -> tuple[Pattern, ...]:
    """The shortest beginning that, repeated, gives all layers' patterns."""
    for length in range(1, len(patterns) + 1):
        if all(patterns[layer] == patterns[layer % length] for layer in range(len(patterns))):
            return tuple(patterns[:length])
    return tuple(patterns)
