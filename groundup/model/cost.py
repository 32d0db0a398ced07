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
    norm = config.d_model * (config.norm_weight + (config.norm == "layernorm" and config.has_bias("norm")))
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    block = config.d_model * (q + 2 * kv) + q * config.d_model + 2 * norm
    block += (q + 2 * kv) * config.has_bias("qkv") + config.d_model * config.has_bias("o")
    block += 2 * config.head_dim * (config.qk_norm and config.norm_weight)
    n_ff = 3 if config.is_gated else 2
    feedforward = n_ff * config.d_model * config.d_ff
    feedforward += ((n_ff - 1) * config.d_ff + config.d_model) * config.has_bias("ff")
    block += config.n_experts * (feedforward + config.d_model) if config.n_experts else feedforward
    head = 0 if config.tied_embeddings else embedding
    last_norm = norm if config.norm_placement == "pre" else 0
    return embedding + positions + config.n_layers * block + last_norm + head


def matmul_parameters(config: ModelConfig) -> int:
    """Parameters that take part in a matrix product for every token (the output layer included)."""
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    feedforward = (3 if config.is_gated else 2) * config.d_model * config.d_ff
    if config.n_experts:
        feedforward = config.experts_per_token * feedforward + config.n_experts * config.d_model
    block = config.d_model * (q + 2 * kv) + q * config.d_model + feedforward
    return config.n_layers * block + config.vocab_size * config.d_model


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """FLOPs of forward and backward for one token in a row of `sequence_length`."""
    attention = config.n_layers * config.n_heads * config.head_dim * sequence_length // 2
    return 6 * matmul_parameters(config) + 12 * attention
