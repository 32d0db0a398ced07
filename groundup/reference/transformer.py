"""A whole Transformer from the textbook forms: one text, one token's row after the other, nothing clever.

It reads the same weights, by the same names, as the fast one. `config` has `ModelConfig`'s fields.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from groundup.reference.attention import sparse_attention
from groundup.reference.experts import mixture
from groundup.reference.feedforward import gelu, gelu_tanh, relu2, swish
from groundup.reference.masks import alibi_slopes, fixed, full, strided, window
from groundup.reference.normalization import layernorm, rmsnorm
from groundup.reference.positions import (
    linear_scaling,
    llama3_scaling,
    ntk_scaling,
    rope,
    rope_frequencies,
    sinusoids,
    yarn_attention_factor,
    yarn_scaling,
)

ACTIVATIONS = {"swiglu": swish, "geglu": gelu, "gelu": gelu, "gelu_tanh": gelu_tanh, "relu2": relu2}


def transformer(ids: Sequence[int], weights: Mapping[str, Tensor], config: Any) -> Float[Tensor, "seq vocab"]:
    """Logits of the token after each of `ids`."""
    embedding = weights["embed_tokens.weight"]
    positions = torch.arange(len(ids))
    x = embedding[list(ids)]  # (seq, d_model)
    if config.position == "learned":
        x = x + weights["embed_positions.weight"][positions]
    if config.position == "sinusoidal":
        x = x * config.d_model**0.5 + sinusoids(positions, config.d_model).to(x)
    for layer in range(config.n_layers):
        mine = f"layers.{layer}."
        part = {name.removeprefix(mine): weight for name, weight in weights.items() if name.startswith(mine)}
        if config.norm_placement == "pre":
            x = x + attention(norm(x, part, "input_layernorm", config), part, config, layer)
            x = x + feedforward(norm(x, part, "post_attention_layernorm", config), part, config)
        else:
            x = norm(x + attention(x, part, config, layer), part, "input_layernorm", config)
            x = norm(x + feedforward(x, part, config), part, "post_attention_layernorm", config)
    if config.norm_placement == "pre":
        x = norm(x, weights, "norm", config)
    logits = x @ (embedding if config.tied_embeddings else weights["lm_head.weight"])[: config.vocab_size].T
    return logits if config.logit_softcap is None else config.logit_softcap * (logits / config.logit_softcap).tanh()


def attention(x: Tensor, part: Mapping[str, Tensor], config: Any, layer: int) -> Float[Tensor, "seq d_model"]:
    """One attention sub-layer: project, normalize, turn, attend, project back."""
    seq, positions = len(x), torch.arange(len(x))
    q, k, v = (
        linear(x, part, f"self_attn.{name}_proj").view(seq, -1, config.head_dim).transpose(0, 1)
        for name in ("q", "k", "v")
    )  # (heads, seq, head_dim)
    if config.qk_norm:
        q = rmsnorm(q, part.get("self_attn.q_norm.weight", 1.0), config.norm_eps)
        k = rmsnorm(k, part.get("self_attn.k_norm.weight", 1.0), config.norm_eps)
    if config.position == "rope":
        frequencies, factor = scaled_frequencies(config)
        turning = 2 * len(frequencies)
        q, k = (torch.stack([rope(head, positions, frequencies) for head in both]) for both in (q, k))
        q, k = (torch.cat((both[..., :turning] * factor, both[..., turning:]), dim=-1) for both in (q, k))
    mixed = sparse_attention(
        q,
        k,
        v,
        [visible(i, config, layer) for i in range(seq)],
        scale=config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale,
        softcap=config.attention_softcap,
        slopes=alibi_slopes(config.n_heads) if config.position == "alibi" else None,
    )
    return linear(mixed.transpose(0, 1).reshape(seq, -1), part, "self_attn.o_proj")


def feedforward(x: Tensor, part: Mapping[str, Tensor], config: Any) -> Float[Tensor, "seq d_model"]:
    """One feed-forward sub-layer, or a mixture of them."""
    activation = ACTIVATIONS[config.activation]

    def expert(index: int | None) -> Callable[[Tensor], Tensor]:
        def compute(x: Tensor) -> Tensor:
            up = linear(x, part, "mlp.up_proj", index)
            if config.activation in ("swiglu", "geglu"):
                return linear(activation(linear(x, part, "mlp.gate_proj", index)) * up, part, "mlp.down_proj", index)
            return linear(activation(up), part, "mlp.down_proj", index)

        return compute

    if not config.n_experts:
        return expert(None)(x)
    experts = [expert(index) for index in range(config.n_experts)]
    return mixture(x, part["mlp.router.weight"], experts, config.experts_per_token)


def scaled_frequencies(config: Any) -> tuple[list[float], float]:
    """Frequencies of the features that turn, and what these features are multiplied by."""
    d, base, scaling = (
        int(config.head_dim * config.partial_rotary_factor) // 2 * 2,
        config.rope_theta,
        config.rope_scaling,
    )
    if scaling is None:
        return rope_frequencies(d, base), 1.0
    if scaling.kind == "linear":
        return linear_scaling(rope_frequencies(d, base), scaling.factor), 1.0
    if scaling.kind == "ntk":
        return ntk_scaling(d, base, scaling.factor), 1.0
    context = scaling.original_context
    if scaling.kind == "llama3":
        borders = scaling.low_frequency_factor, scaling.high_frequency_factor
        return llama3_scaling(rope_frequencies(d, base), scaling.factor, context, *borders), 1.0
    given, factor = scaling.attention_factor, yarn_attention_factor(scaling.factor)
    frequencies = yarn_scaling(d, base, scaling.factor, context, scaling.beta_fast, scaling.beta_slow)
    return frequencies, factor if given is None else given


def visible(i: int, config: Any, layer: int) -> set[int]:
    """Positions that position i of a layer sees."""
    pattern = config.attention[layer % len(config.attention)]
    if pattern == "window":
        return window(i, config.window, config.sink_tokens)
    if pattern == "strided":
        return strided(i, config.stride)
    return fixed(i, config.stride, config.summary) if pattern == "fixed" else full(i)


def norm(x: Tensor, part: Mapping[str, Tensor], name: str, config: Any) -> Tensor:
    """The configured normalization with the weights of that name."""
    weight, bias = part.get(f"{name}.weight", 1.0), part.get(f"{name}.bias", 0.0)
    if config.norm == "layernorm":
        return layernorm(x, weight, bias, config.norm_eps)
    return rmsnorm(x, weight, config.norm_eps)


def linear(x: Tensor, part: Mapping[str, Tensor], name: str, index: int | None = None) -> Tensor:
    """x Wᵀ + b with the weights of that name; of an expert, where they are stacked."""
    weight, bias = part[f"{name}.weight"], part.get(f"{name}.bias")
    if index is not None:
        weight, bias = weight[index], None if bias is None else bias[index]
    return x @ weight.T if bias is None else x @ weight.T + bias
