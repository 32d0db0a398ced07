"""How many bytes a forward pass keeps for the backward pass, counted part by part.

These are the tensors that torch's autograd saves for this model on a CPU (a test compares every byte, in float32 and
bfloat16). What they are, for N = batch · length tokens:

    linear layers   their input; in bfloat16 also a bfloat16 copy of the weights
    norms           their input, and one or two numbers a row; RMSNorm also its result before the weight, in float32
    attention       queries, keys, values, its result; by products in sight (bfloat16 up to 1024 positions, capped
                    scores, masks) also the square of weights for every head
    feed-forward    up, activation and product (with a gate), or before and after the activation
    head            gradients of the last hidden states and of the output matrix: logits are never kept

Rows that hold several documents and texts with positions of their own keep their masks as well, which is not counted.
A GPU's kernels keep less: RMSNorm neither float32 copies nor its result, attention never a square.
"""

from __future__ import annotations

from typing import Literal

from groundup.model.attention import PLAIN_UP_TO
from groundup.model.config import ModelConfig
from groundup.model.cost import gradient_bytes, optimizer_bytes, weight_bytes
from groundup.model.masks import AttentionRule


def activation_bytes(
    config: ModelConfig, batch: int, length: int, dtype: Literal["float32", "bfloat16"] = "float32"
) -> dict[str, int]:
    """Bytes that a training step's forward pass keeps for the backward pass, by part of the model.

    Args:
        config: the model.
        batch: rows in one forward pass (a micro-batch).
        length: tokens in a row.
        dtype: of the arithmetic.

    Returns:
        Bytes of positions (and ids), norms, attention, feedforward, dropout and head.
    """
    size = 4 if dtype == "float32" else 2
    n_tokens, d = batch * length, config.d_model
    attention = sum(_attention(config, layer, batch, length, size) for layer in range(config.n_layers))
    n_norms = 2 * config.n_layers + (config.norm_placement == "pre")
    norms = n_norms * _norm(config, d, n_tokens, size)
    if config.qk_norm:
        norms += config.n_layers * _rmsnorm(config, config.head_dim, n_tokens * config.n_heads, size)
        norms += config.n_layers * _rmsnorm(config, config.head_dim, n_tokens * config.n_kv_heads, size)
    feedforward = _experts(config, n_tokens, size) if config.n_experts else _feedforward(config, n_tokens, size)
    return {
        "positions": n_tokens * 8 + _positions(config, length, size),
        "norms": norms,
        "attention": attention,
        "feedforward": config.n_layers * feedforward,
        "dropout": (1 + 2 * config.n_layers) * n_tokens * d * size if config.dropout else 0,
        "head": n_tokens * d * size + config.padded_vocab_size * d * 4,
    }


def training_bytes(
    config: ModelConfig, batch: int, length: int, optimizer: Literal["muon", "adamw"], dtype: str = "float32"
) -> int:
    """Bytes of weights, gradients, optimizer state and activations together, on one device.

    What kernels need for a moment comes on top, and whatever the process held before.
    """
    kept = activation_bytes(config, batch, length, "bfloat16" if dtype == "bfloat16" else "float32")
    return weight_bytes(config) + gradient_bytes(config) + optimizer_bytes(config, optimizer) + sum(kept.values())


def _positions(config: ModelConfig, length: int, size: int) -> int:
    if config.position == "learned":
        return 8 * length
    return 2 * length * config.rotated // 2 * size


def _norm(config: ModelConfig, width: int, rows: int, size: int) -> int:
    if config.norm == "rmsnorm":
        return _rmsnorm(config, width, rows, size)
    copies = width * 2 * (config.norm_weight + config.has_bias("norm")) if size == 2 else 0
    return rows * width * size + 2 * rows * size + copies


def _rmsnorm(config: ModelConfig, width: int, rows: int, size: int) -> int:
    kept = rows * width * 4 + rows * 4
    if config.norm_weight:
        kept += rows * width * 4 + (width * 2 if size == 2 else 0)
    return kept


def _attention(config: ModelConfig, layer: int, batch: int, length: int, size: int) -> int:
    n_tokens, d = batch * length, config.d_model
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    kept = n_tokens * d * size + _weight_copies(d * (q + 2 * kv) + q * d, size)
    has_mask = not AttentionRule.of_layer(config, layer).is_causal_only(length)
    squares = batch * config.n_heads * length * length
    if config.attention_softcap is not None or has_mask or (size == 2 and length <= PLAIN_UP_TO):
        # queries, keys and values of every head, the weights (and the tanh of a cap), the result for o_proj
        return kept + 4 * n_tokens * q * size + squares * size * (1 + (config.attention_softcap is not None))
    # torch's fused kernel: queries, keys, values, result, and one float32 a row of scores
    kept += n_tokens * (2 * q + 2 * kv) * size + n_tokens * config.n_heads * 4
    # its result has the layout of the queries: of rotated ones (contiguous) o_proj needs a copy
    return kept + (n_tokens * q * size if config.position == "rope" else 0)


def _feedforward(config: ModelConfig, rows: int, size: int) -> int:
    kept = rows * config.d_model * size + (4 if config.is_gated else 2) * rows * config.d_ff * size
    return kept + _weight_copies((3 if config.is_gated else 2) * config.d_model * config.d_ff, size)


def _experts(config: ModelConfig, n_tokens: int, size: int) -> int:
    d, n, k = config.d_model, config.n_experts, config.experts_per_token
    router = n_tokens * d * size + _weight_copies(d * n, size)
    # probabilities, chosen experts, their probabilities and the sum of those; each expert's share of the tokens
    router += n_tokens * (4 * n + 8 * k + 4 * k + 4) + 4 * n
    rows = n_tokens * k
    inner = (4 if config.is_gated else 2) * config.d_ff
    # where each choice comes from, its input, inside, its output before and after the weight, the weight
    return router + rows * (16 + (3 * d + inner + 1) * size) + n * _weight_copies(
        (3 if config.is_gated else 2) * d * config.d_ff, size
    )  # fmt: skip


def _weight_copies(n_weights: int, size: int) -> int:
    """Of weights that are cast to bfloat16, the copies stay until the backward pass."""
    return n_weights * 2 if size == 2 else 0
