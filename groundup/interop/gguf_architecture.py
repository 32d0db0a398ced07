"""Which of llama.cpp's architectures computes the same as a model, and the keys that describe it there.

llama.cpp has a function for each family, with fixed parts. A model can be exported if one of them fits:

    llama      RMSNorm, RoPE (rows of queries and keys interleaved), SwiGLU, any biases, or experts (Mixtral)
    qwen2      the same with RoPE half-split and biases of queries, keys and values only
    qwen3      the same with QK-norm and without biases; qwen3moe: with experts
    gpt2       LayerNorm, learned positions, GELU in its tanh form

What an architecture demands and the model lacks is written as its neutral element: a bias of zeros, a norm's weight of
ones. Another scale of attention goes into the queries' weights. A window that no architecture here knows limits the
context: within the window it masks nothing.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groundup.errors import ArtifactError
from groundup.model import ModelConfig
from groundup.model.masks import AttentionRule

if TYPE_CHECKING:
    from gguf import GGUFWriter


_NEEDS: dict[str, dict[str, Any]] = {
    "llama": {"position": "rope", "activation": "swiglu", "partial_rotary_factor": 1.0},
    "gpt2": {"norm": "layernorm", "position": "learned", "activation": "gelu_tanh", "qk_norm": False, "n_experts": 0},
}
_NEEDS["qwen2"] = {**_NEEDS["llama"], "rope_scaling": "linear, ntk or yarn"}
_NEEDS["qwen3"] = {**_NEEDS["qwen2"], "qkv_bias": False, "o_bias": False, "ff_bias": False}
_NEEDS["qwen3moe"] = _NEEDS["qwen3"]
"""What a model must have for each architecture."""
_ALWAYS = {"norm_placement": "pre", "attention_softcap": None, "logit_softcap": None}


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp describes a model.

    Attributes:
        name: `general.architecture`.
        context_length: up to which llama.cpp computes the same.
    """

    name: str
    context_length: int


def architecture_of(config: ModelConfig, out: Path) -> Architecture:
    """The architecture for a model.

    Args:
        config: the model's.
        out: the file to be, for the error message.

    Raises:
        ArtifactError: none computes the same; every field that prevents it is named.
    """
    name = _nearest(config)
    rules = {AttentionRule.of_layer(config, layer) for layer in range(config.n_layers)}
    spans = [rule.window + rule.sink_tokens for rule in rules if rule.pattern == "window"]
    context_length = min([config.context_length, *spans])  # the longest text in which no pattern masks anything
    values, needs = config.to_dict(), {**_ALWAYS, **_NEEDS[name]}
    values |= {f"{part}_bias": config.has_bias(part) for part in ("qkv", "o", "ff")}
    if name == "gpt2":
        needs["head_dim"] = config.d_model / config.n_heads
    elif config.n_experts:
        needs["ff_bias"] = False
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "llama3":
        needs.pop("rope_scaling", None)
    if scaling is not None and scaling.kind == "yarn":
        values |= {"rope_scaling.beta_fast": scaling.beta_fast, "rope_scaling.beta_slow": scaling.beta_slow}
        needs |= {"rope_scaling.beta_fast": 32.0, "rope_scaling.beta_slow": 1.0}
    odd = {rule.pattern for rule in rules if not (config.position == "alibi" or rule.is_causal_only(context_length))}
    found = [f"attention = {json.dumps(pattern)}: has no such pattern." for pattern in sorted(odd)]
    found += [
        f"{field} = {json.dumps(values[field])}: is {'none' if need is None else json.dumps(need)} there."
        for field, need in needs.items()
        if values[field] != need
    ]
    if found:
        raise ArtifactError(
            f"{out}: llama.cpp has no architecture for this model; the nearest is {name}, but\n  " + "\n  ".join(found),
            "A GGUF file can hold the shapes of Llama, Mistral, Mixtral, Qwen2, Qwen3 and GPT-2; safetensors hold all.",
        )
    return Architecture(name, context_length)


def _nearest(config: ModelConfig) -> str:
    if config.position == "learned" or config.norm == "layernorm":
        return "gpt2"
    if config.qk_norm:
        return "qwen3moe" if config.n_experts else "qwen3"
    only_qkv = config.has_bias("qkv") and not config.has_bias("o") and not config.has_bias("ff")
    is_square = config.n_heads * config.head_dim == config.d_model
    has_factors = config.rope_scaling is not None and config.rope_scaling.kind == "llama3"
    return "qwen2" if only_qkv and is_square and not config.n_experts and not has_factors else "llama"


def describe_architecture(writer: GGUFWriter, config: ModelConfig, architecture: Architecture) -> None:
    """Write the keys that llama.cpp builds the model from."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(architecture.context_length)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    if architecture.name == "gpt2":
        writer.add_layer_norm_eps(config.norm_eps)
        return
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    _describe_rope(writer, config)
    if config.n_experts:
        writer.add_expert_count(config.n_experts)
        writer.add_expert_used_count(config.experts_per_token)
        writer.add_expert_feed_forward_length(config.d_ff)


def _describe_rope(writer: GGUFWriter, config: ModelConfig) -> None:
    from gguf import RopeScalingType

    scaling, base, dim = config.rope_scaling, config.rope_theta, config.head_dim
    if scaling is not None and scaling.kind == "ntk" and dim > 2:
        base *= scaling.factor ** (dim / (dim - 2))  # which is all that this scaling does
    writer.add_rope_dimension_count(dim)
    writer.add_rope_freq_base(base)
    if scaling is None or scaling.kind in ("ntk", "llama3"):  # llama3's is a tensor: `rope_freqs`
        return
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        return
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    assert scaling.original_context is not None
    writer.add_rope_scaling_orig_ctx_len(scaling.original_context)
    if scaling.attention_factor is not None:
        # llama.cpp multiplies by 0.1 · ln(factor) + 1 in any case, and then by this.
        writer.add_rope_scaling_attn_factors(scaling.attention_factor / (0.1 * math.log(scaling.factor) + 1))
