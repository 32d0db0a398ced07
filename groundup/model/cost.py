"""What a model costs, counted from its configuration: parameters, FLOPs.

FLOPs of training per token = 6 · parameters in matrix products + 12 · layers · heads · head_dim · sequence / 2
(forward 2, backward 4 per multiply-add; causal attention touches half the square; PaLM, arXiv:2204.02311, app. B).
"""

from __future__ import annotations

from groundup.model.config import ModelConfig


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters, exact; a tied embedding counts once."""
    embedding = config.vocab_size * config.d_model
    positions = config.context_length * config.d_model if config.position == "learned" else 0
    norm = config.d_model * (2 if config.norm == "layernorm" and config.bias else 1)
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    attention = config.d_model * (q + 2 * kv) + q * config.d_model
    n_ff = 3 if config.activation == "swiglu" else 2
    block = attention + n_ff * config.d_model * config.d_ff + 2 * norm
    if config.bias:
        block += q + 2 * kv + config.d_model + (n_ff - 1) * config.d_ff + config.d_model
    if config.qk_norm:
        block += 2 * config.head_dim
    head = 0 if config.tied_embeddings else embedding
    return embedding + positions + config.n_layers * block + norm + head


def matmul_parameters(config: ModelConfig) -> int:
    """Parameters that take part in a matrix product for every token (the output layer included)."""
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    n_ff = 3 if config.activation == "swiglu" else 2
    block = config.d_model * (q + 2 * kv) + q * config.d_model + n_ff * config.d_model * config.d_ff
    return config.n_layers * block + config.vocab_size * config.d_model


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """FLOPs of forward and backward for one token in a row of `sequence_length`."""
    attention = config.n_layers * config.n_heads * config.head_dim * sequence_length // 2
    return 6 * matmul_parameters(config) + 12 * attention
