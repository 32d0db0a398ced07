"""How many bytes a forward pass keeps for the backward pass, counted part by part.

These are the tensors that torch's autograd saves for this model on a CPU (a test compares every byte, in float32 and
bfloat16). What they are, for N = batch · length tokens:

    linear layers   their input; in bfloat16 also a bfloat16 copy of the weights
    norms           their input, and one or two numbers a row; RMSNorm also its result before the weight, in float32
    attention       queries, keys, values, its result; by plain products (bfloat16 up to 1024 positions, capped
                    scores, masks) also the square of weights for every head
    feed-forward    up, activation and product (with a gate), or before and after the activation
    head            gradients of the last hidden states and of the output matrix: logits are never kept

Activation checkpointing keeps less (`training/activation.py`): "full" the input of each block, "selective" also the
results of its products. On a GPU RMSNorm keeps its input and a number a row, attention never a square. Rows that hold
several documents and texts with positions of their own keep their masks as well, which is not counted.
"""

from __future__ import annotations

from typing import Literal

from groundup.model.attention import KEPT_UP_TO, PRODUCTS_UP_TO
from groundup.model.config import ModelConfig
from groundup.model.masks import AttentionRule

Arithmetic = Literal["float32", "bfloat16", "float16"]
Checkpointing = Literal["none", "selective", "full"]
Device = Literal["cpu", "cuda"]


def activation_bytes(
    config: ModelConfig, batch: int, length: int, dtype: Arithmetic = "float32",
    checkpointing: Checkpointing = "none", device: Device = "cpu",
) -> dict[str, int]:  # fmt: skip
    """Bytes that a training step's forward pass keeps for the backward pass, by part of the model.

    Args:
        config: the model.
        batch: rows in one forward pass (a micro-batch).
        length: tokens in a row.
        dtype: of the arithmetic.
        checkpointing: what is computed again instead of kept.
        device: whose kernels.

    Returns:
        Bytes of positions (and ids), norms, attention, feedforward, dropout and head; with checkpointing also of the
        blocks' inputs, and of the parts what is left.
    """
    size = _size(dtype)
    n_tokens, d = batch * length, config.d_model
    kept = {"positions": n_tokens * 8 + _positions(config, length, size)}
    if checkpointing != "none":
        kept["inputs"] = config.n_layers * n_tokens * d * size
    blocks = [
        block_bytes(config, layer, batch, length, dtype, checkpointing, device) for layer in range(config.n_layers)
    ]
    kept |= {name: sum(block[name] for block in blocks) for name in blocks[0]}
    kept["norms"] += last_norm_bytes(config, n_tokens, dtype, device)
    if config.dropout:  # that of the embedding
        kept["dropout"] += _dropout(config, n_tokens, size, device)
    return {**kept, "head": n_tokens * d * size + config.padded_vocab_size * d * 4}


def block_bytes(
    config: ModelConfig, layer: int, batch: int, length: int, dtype: Arithmetic = "float32",
    checkpointing: Checkpointing = "none", device: Device = "cpu",
) -> dict[str, int]:  # fmt: skip
    """What one block keeps: bytes of norms, attention, feedforward and dropout; arguments as in `activation_bytes`."""
    size = _size(dtype)
    n_tokens, d = batch * length, config.d_model
    if checkpointing == "full":
        return {"norms": 0, "attention": 0, "feedforward": 0, "dropout": 0}
    if checkpointing == "selective":
        attention = _attention_products(config, layer, batch, length, dtype, device)
        return {"norms": 0, "attention": attention, "feedforward": _feedforward_products(config, n_tokens, size),
                "dropout": 0}  # fmt: skip
    norms = 2 * _norm(config, d, n_tokens, size, device)
    if config.qk_norm:
        norms += _rmsnorm(config, config.head_dim, n_tokens * config.n_heads, size, device)
        norms += _rmsnorm(config, config.head_dim, n_tokens * config.n_kv_heads, size, device)
    return {
        "norms": norms,
        "attention": _attention(config, layer, batch, length, dtype, device),
        "feedforward": (_experts if config.n_experts else _feedforward)(config, n_tokens, size),
        "dropout": 2 * _dropout(config, n_tokens, size, device) if config.dropout else 0,
    }


def last_norm_bytes(config: ModelConfig, n_tokens: int, dtype: Arithmetic = "float32", device: Device = "cpu") -> int:
    """What the norm behind the last block keeps, where there is one."""
    return _norm(config, config.d_model, n_tokens, _size(dtype), device) if config.norm_placement == "pre" else 0


def attention_squares(
    config: ModelConfig, layer: int, batch: int, length: int, dtype: Arithmetic = "float32", device: Device = "cpu"
) -> int:
    """Bytes of one value for each pair of positions of every head, where a layer holds them; 0 where none does."""
    if not _has_squares(config, layer, length, dtype, device):
        return 0
    return batch * config.n_heads * length * length * _score_size(config, length, dtype)


def score_bytes(
    config: ModelConfig, layer: int, batch: int, length: int, dtype: Arithmetic = "float32", device: Device = "cpu"
) -> int:
    """Bytes of the scores that a layer's products give, of those pairs that they are taken for; 0 by a fused kernel."""
    if not score_block_bytes(config, layer, batch, length, dtype, device):
        return attention_squares(config, layer, batch, length, dtype, device)
    ends = [*range(KEPT_UP_TO, length, KEPT_UP_TO), length]  # blocks of queries, each over the keys up to its end
    pairs = sum((end - start) * end for start, end in zip([0, *ends], ends, strict=False))
    return batch * config.n_heads * pairs * _size(dtype)


def score_block_bytes(
    config: ModelConfig, layer: int, batch: int, length: int, dtype: Arithmetic = "float32", device: Device = "cpu"
) -> int:
    """Where a layer computes its attention's weights again, the bytes of their largest block; 0 where it does not."""
    recomputes = _is_products(config, layer, length, dtype, device) and not _has_squares(
        config, layer, length, dtype, device
    )
    return batch * config.n_heads * min(KEPT_UP_TO, length) * length * _size(dtype) if recomputes else 0


def _positions(config: ModelConfig, length: int, size: int) -> int:
    if config.position == "learned":
        return 8 * length
    return 2 * length * config.rotated // 2 * size


def _norm(config: ModelConfig, width: int, rows: int, size: int, device: Device) -> int:
    if config.norm == "rmsnorm":
        return _rmsnorm(config, width, rows, size, device)
    copies = width * 2 * (config.norm_weight + config.has_bias("norm")) if size == 2 else 0
    return rows * width * size + 2 * rows * (size if device == "cpu" else 4) + copies


def _rmsnorm(config: ModelConfig, width: int, rows: int, size: int, device: Device) -> int:
    copy = width * 2 if size == 2 and config.norm_weight else 0
    if device == "cuda":  # one kernel: the input, and one float32 a row
        return rows * width * size + rows * 4 + copy
    return rows * width * 4 * (1 + config.norm_weight) + rows * 4 + copy


def _dropout(config: ModelConfig, n_tokens: int, size: int, device: Device) -> int:
    return n_tokens * config.d_model * (size if device == "cpu" else 1)  # a factor, or a flag, for each value


def _has_squares(config: ModelConfig, layer: int, length: int, dtype: Arithmetic, device: Device) -> bool:
    """Whether a layer's attention keeps its weights for the backward pass."""
    if device == "cuda":
        return False
    has_mask = not AttentionRule.of_layer(config, layer).is_causal_only(length)
    is_short = length <= (PRODUCTS_UP_TO if has_mask else KEPT_UP_TO)
    return config.attention_softcap is not None or has_mask or (dtype == "bfloat16" and is_short)


def _is_products(config: ModelConfig, layer: int, length: int, dtype: Arithmetic, device: Device) -> bool:
    """Whether a layer's attention is plain products, not torch's fused kernel."""
    is_short = device == "cpu" and dtype == "bfloat16" and length <= PRODUCTS_UP_TO
    return is_short or _has_squares(config, layer, length, dtype, device)


def _score_size(config: ModelConfig, length: int, dtype: Arithmetic) -> int:
    """Bytes of a kept weight: torch's own form of attention under a mask takes long rows in float32."""
    is_ours = config.attention_softcap is not None or length <= PRODUCTS_UP_TO
    return _size(dtype) if is_ours else 4


def _attention(
    config: ModelConfig, layer: int, batch: int, length: int, dtype: Arithmetic, device: Device
) -> int:  # fmt: skip
    n_tokens, d, size = batch * length, config.d_model, _size(dtype)
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    kept = n_tokens * d * size + _weight_copies(d * (q + 2 * kv) + q * d, size)
    if _is_products(config, layer, length, dtype, device):
        # queries, keys and values of every head, the result for o_proj; of short rows the weights (and a cap's tanh)
        squares = attention_squares(config, layer, batch, length, dtype, device)
        heads = 3 * q * (_score_size(config, length, dtype) if squares else size) + q * size
        return kept + n_tokens * heads + squares * (1 + (config.attention_softcap is not None))
    # torch's fused kernel: queries, keys, values, result, and one float32 a row of scores
    kept += n_tokens * (2 * q + 2 * kv) * size + n_tokens * config.n_heads * 4
    # On a CPU its result has the layout of the queries: of rotated ones (contiguous) o_proj needs a copy.
    return kept + (n_tokens * q * size if config.position == "rope" and device == "cpu" else 0)


def _attention_products(
    config: ModelConfig, layer: int, batch: int, length: int, dtype: Arithmetic, device: Device
) -> int:  # fmt: skip
    """Results of products: queries, keys, values, scores (or a float32 for each row of them), attention's, o_proj's."""
    n_tokens, size = batch * length, _size(dtype)
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    scores = score_bytes(config, layer, batch, length, dtype, device) or n_tokens * config.n_heads * 4
    return n_tokens * (2 * q + 2 * kv + config.d_model) * size + scores


def _feedforward(config: ModelConfig, rows: int, size: int) -> int:
    kept = rows * config.d_model * size + (4 if config.is_gated else 2) * rows * config.d_ff * size
    return kept + _weight_copies((3 if config.is_gated else 2) * config.d_model * config.d_ff, size)


def _feedforward_products(config: ModelConfig, n_tokens: int, size: int) -> int:
    """Results of the products: of the router, into each feed-forward layer that a token takes, and out of it."""
    rows = n_tokens * (config.experts_per_token if config.n_experts else 1)
    return (n_tokens * config.n_experts + rows * ((2 if config.is_gated else 1) * config.d_ff + config.d_model)) * size


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


def _size(dtype: Arithmetic) -> int:
    return 4 if dtype == "float32" else 2


def _weight_copies(n_weights: int, size: int) -> int:
    """Of weights that are cast to two bytes, the copies stay until the backward pass."""
    return n_weights * 2 if size == 2 else 0
