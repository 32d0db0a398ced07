"""Models of Hugging Face's families, made by transformers: tiny and random, every weight large enough to matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

LLAMA = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
NEO = {"vocab_size": 96, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "max_position_embeddings": 64}
_NEO_TYPES = [[["global", "local"], 1], [["local"], 1]]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("gpt2", GPT2),
    "GPT-2, untied, wide": ("gpt2", {**GPT2, "tie_word_embeddings": False, "n_inner": 80}),
    "GPT-2, exact GELU": ("gpt2", {**GPT2, "activation_function": "gelu"}),
    "GPT-2, squared ReLU": ("gpt2", {**GPT2, "activation_function": "relu2"}),
    "GPT-2, tanh by torch": ("gpt2", {**GPT2, "activation_function": "gelu_pytorch_tanh"}),
    "GPT-2, scores not scaled": ("gpt2", {**GPT2, "scale_attn_weights": False}),
    "GPT-2, upcast": ("gpt2", {**GPT2, "reorder_and_upcast_attn": True, "layer_norm_epsilon": 1e-3}),
    "GPT-Neo, window short": ("gpt_neo", {**NEO, "attention_types": _NEO_TYPES, "window_size": 5}),
    "GPT-Neo, window long": ("gpt_neo", {**NEO, "attention_types": _NEO_TYPES, "window_size": 60}),
    "GPT-Neo, untied, global": (
        "gpt_neo",
        {**NEO, "attention_types": [[["global"], 3]], "tie_word_embeddings": False, "intermediate_size": 40},
    ),
    "Llama 1, multi-head": ("llama", {**LLAMA, "num_key_value_heads": None}),
    "Llama 2, grouped": ("llama", LLAMA),
    "Llama, tied, one key head": ("llama", {**LLAMA, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "Llama, biases": ("llama", {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    "Llama, attention biases": ("llama", {**LLAMA, "attention_bias": True}),
    "Llama, wide heads": ("llama", {**LLAMA, "head_dim": 12, "rms_norm_eps": 1e-3}),
    "Llama, GeGLU": ("llama", {**LLAMA, "hidden_act": "gelu"}),
    "Llama 3": ("llama", {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}),
    "Llama 3.1": ("llama", {**LLAMA, "rope_parameters": LLAMA3_ROPE}),
    "Llama, linear": (
        "llama",
        {**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10_000.0}},
    ),
    "Llama, YaRN": ("llama", {**LLAMA, "rope_parameters": YARN}),
    "Llama, YaRN, all said": (
        "llama",
        {**LLAMA, "rope_parameters": {**YARN, "beta_fast": 8, "beta_slow": 2, "attention_factor": 1.7}},
    ),
    "Mistral, window short": ("mistral", {**LLAMA, "sliding_window": 5}),
    "Mistral, window long": ("mistral", {**LLAMA, "sliding_window": 50}),
    "Mistral, no window, tied": ("mistral", {**LLAMA, "sliding_window": None, "tie_word_embeddings": True}),
    "Qwen2": ("qwen2", LLAMA),
    "Qwen2, tied, last layers slide": (
        "qwen2",
        {
            **LLAMA,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
        },
    ),
    "Qwen3": ("qwen3", {**LLAMA, "head_dim": 16}),
    "Qwen3, tied, YaRN": ("qwen3", {**LLAMA, "head_dim": 8, "tie_word_embeddings": True, "rope_parameters": YARN}),
    "Qwen3, biases, every other layer slides": (
        "qwen3",
        {
            **LLAMA,
            "head_dim": 8,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "Mixtral": ("mixtral", {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Mixtral, tied, window, one expert a token": (
        "mixtral",
        {
            **LLAMA,
            "num_local_experts": 5,
            "num_experts_per_tok": 1,
            "tie_word_embeddings": True,
            "sliding_window": 6,
        },
    ),
}

ONE_OF_EACH = ["GPT-2", "GPT-Neo, window short", "Llama 3.1", "Mistral, window short", "Qwen2", "Qwen3", "Mixtral"]


def make(name: str) -> Any:
    """A model of transformers."""
    import transformers

    kind, values = VARIANTS[name]
    # Its own ids of tokens lie beyond a tiny vocabulary.
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    config = transformers.AutoConfig.for_model(kind, **{**values, **ids})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model


def save(name: str, folder: Path, **options: Any) -> Any:
    """A model of transformers, and its folder."""
    model = make(name)
    model.save_pretrained(folder, **options)
    return model


def some_ids(batch: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 96, (batch, length), generator=torch.Generator().manual_seed(2))
