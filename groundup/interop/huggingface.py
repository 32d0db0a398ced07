"""Our configuration as a Hugging Face `config.json`, where the architecture has a name there.

RMSNorm + RoPE + SwiGLU is `LlamaForCausalLM`; with QK-norm it is `Qwen3ForCausalLM`. Our parameter names are
theirs, under the prefix `model.`, so weights need no change at all.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from groundup.model import ModelConfig

_PLAIN = ModelConfig(vocab_size=1, context_length=1, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=2, d_model=1, d_ff=1)
_TOLD = {
    "vocab_size", "context_length", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_model", "d_ff", "norm_eps",
    "qk_norm", "rope_base", "bias", "tied_embeddings", "dropout", "initialization", "experts_per_token", "router_loss",
}  # fmt: skip
"""Fields that `huggingface_config` tells, or that change nothing in what the model computes."""


def architecture_name(config: ModelConfig) -> str | None:
    """The transformers class that computes the same function, or None."""
    if config.norm != "rmsnorm" or config.position != "rope" or config.activation != "swiglu":
        return None
    shared = {field.name for field in dataclasses.fields(config)} - _TOLD
    if any(getattr(config, name) != getattr(_PLAIN, name) for name in shared):
        return None
    if config.qk_norm:
        return None if config.bias else "Qwen3ForCausalLM"
    return "LlamaForCausalLM"


def huggingface_config(config: ModelConfig) -> dict[str, Any]:
    """What transformers needs to know; empty where it has no such architecture."""
    name = architecture_name(config)
    if name is None:
        return {}
    return {
        "architectures": [name],
        "model_type": "qwen3" if config.qk_norm else "llama",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "tie_word_embeddings": config.tied_embeddings,
        "use_sliding_window": False,
        "dtype": "float32",
    }


def outside_name(name: str) -> str:
    """A parameter's name in the file, from its name in our model."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def inside_name(name: str) -> str:
    """A parameter's name in our model, from its name in the file."""
    return name.removeprefix("model.")
