"""A model on one page: its parts in words, the shapes of its parameters, what it costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from groundup.model import cost
from groundup.model.activations import activation_bytes
from groundup.model.config import ModelConfig

_NORMS = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}
_ACTIVATIONS = {"swiglu": "SwiGLU", "geglu": "GeGLU", "gelu": "GELU", "gelu_tanh": "GELU (tanh form)", "relu2": "ReLU²"}
_PATTERNS = {"full": "all before", "window": "window of {window}", "strided": "strided by {stride}",
             "fixed": "fixed blocks of {stride}, {summary} summary columns"}  # fmt: skip


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters of one name and shape."""

    name: str  # with `N` for the number of the layer
    shape: tuple[int, ...]  # of each
    count: int  # how many there are

    @property
    def n_parameters(self) -> int:
        """Of all of them together."""
        return self.count * math.prod(self.shape)


def parts_in_words(config: ModelConfig) -> dict[str, str]:
    """What each part of the model is, for people."""
    return {
        "normalization": _norms(config),
        "positions": _positions(config),
        "attention": _attention(config),
        "feed-forward": _feedforward(config),
        "embedding": _embedding(config),
        "biases": _biases(config),
        "initialization": config.initialization,
        "context": f"{config.context_length:,} tokens",
    }


def parameter_groups(config: ModelConfig) -> list[ParameterGroup]:
    """Parameters by name, those of all layers together."""
    counts: dict[tuple[str, tuple[int, ...]], int] = {}
    for name, shape in cost.parameter_shapes(config).items():
        parts = name.split(".")
        general = ".".join("N" if part.isdigit() else part for part in parts)
        counts[general, shape] = counts.get((general, shape), 0) + 1
    return [ParameterGroup(name, shape, count) for (name, shape), count in counts.items()]


def costs(config: ModelConfig, batch: int = 1, length: int | None = None) -> dict[str, dict[str, int]]:
    """What the model costs: parameters, FLOPs and bytes, each by what it is of.

    Args:
        config: the model.
        batch: rows in a training step's forward pass, and in the cache.
        length: tokens in a row (default: the context).
    """
    length = length or config.context_length
    forward = batch * cost.forward_flops(config, length)
    return {
        "parameters": {
            "all": cost.count_parameters(config),
            "embeddings and output layer": cost.vocabulary_parameters(config),
            "of one token": cost.active_parameters(config),
            "in matrix products": cost.matmul_parameters(config),
        },
        "flops": {
            "forward": forward,
            "backward": 2 * forward,
            "forward, masked scores computed too": batch * cost.forward_flops(config, length, whole_square=True),
            "one more token with a full cache": cost.decoding_flops(config, length - 1),
        },
        "bytes": {
            "weights, float32": cost.weight_bytes(config),
            "weights, bfloat16": cost.weight_bytes(config, 2),
            "gradients": cost.weight_bytes(config),
            "optimizer, Muon and AdamW": cost.optimizer_bytes(config, "muon"),
            "optimizer, AdamW": cost.optimizer_bytes(config, "adamw"),
            "activations, float32": sum(activation_bytes(config, batch, length).values()),
            "activations, bfloat16": sum(activation_bytes(config, batch, length, "bfloat16").values()),
            "key/value cache, bfloat16": cost.kv_cache_bytes(config, length, batch),
        },
    }


def to_json(config: ModelConfig, batch: int, length: int | None) -> dict[str, Any]:
    """All of it as plain values."""
    return {
        "config": config.to_dict(),
        "parts": parts_in_words(config),
        "shapes": [
            {"name": group.name, "shape": list(group.shape), "count": group.count, "parameters": group.n_parameters}
            for group in parameter_groups(config)
        ],
        "batch": batch,
        "length": length or config.context_length,
        **costs(config, batch, length),
    }


def _norms(config: ModelConfig) -> str:
    where = "before each sub-layer and at the end" if config.norm_placement == "pre" else "behind each sum"
    more = ("" if config.norm_weight else ", without weight") + (", and of queries and keys" if config.qk_norm else "")
    return f"{_NORMS[config.norm]} {where}{more}"


def _positions(config: ModelConfig) -> str:
    if config.position != "rope":
        return {"learned": "learned, one vector a position", "alibi": "ALiBi"}.get(config.position, config.position)
    share = "" if config.rotated == config.head_dim else f", {config.rotated} of {config.head_dim} features"
    scaling = config.rope_scaling
    return f"RoPE, base {config.rope_theta:,.0f}{share}" + (
        f", {scaling.kind} scaling by {scaling.factor:g}" if scaling is not None else ""
    )


def _attention(config: ModelConfig) -> str:
    kinds = {config.n_heads: "multi-head", 1: "multi-query"}
    heads = f"{kinds.get(config.n_kv_heads, 'grouped-query')}, {config.n_heads} heads of {config.head_dim}"
    heads += f", {config.n_kv_heads} of keys and values" if config.n_kv_heads != config.n_heads else ""
    seen = " / ".join(
        _PATTERNS[one].format(window=config.window, stride=config.stride, summary=config.summary)
        for one in config.attention
    )
    sinks = f", {config.sink_tokens} sinks" if config.sink_tokens else ""
    cap = f", capped at ±{config.attention_softcap:g}" if config.attention_softcap is not None else ""
    return f"{heads}; sees {seen}{sinks}{cap}"


def _feedforward(config: ModelConfig) -> str:
    one = f"{_ACTIVATIONS[config.activation]}, {config.d_ff:,} wide"
    return f"{config.experts_per_token} of {config.n_experts} experts, each {one}" if config.n_experts else one


def _embedding(config: ModelConfig) -> str:
    filled = f", filled up to {config.padded_vocab_size:,} rows" if config.padded_vocab_size > config.vocab_size else ""
    return f"{config.vocab_size:,} tokens, {'tied' if config.tied_embeddings else 'untied'}{filled}"


def _biases(config: ModelConfig) -> str:
    names = {"qkv": "queries, keys, values", "o": "attention's output", "ff": "feed-forward"}
    found = [told for part, told in names.items() if config.has_bias(part)]  # type: ignore[arg-type]
    if config.norm == "layernorm" and config.has_bias("norm"):
        found.append("norms")
    return "; ".join(found) or "none"
