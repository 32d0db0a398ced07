"""How many bytes a forward pass keeps for the backward pass, counted part by part.

These are the tensors that torch's autograd saves for this model on a CPU (a test compares every byte, in float32 and
bfloat16). What they are, for N = batch · length tokens:

    linear layers   their input; in bfloat16 also a bfloat16 copy of the weights
    norms           their input, and one or two numbers a row; RMSNorm also its result before the weight, in float32
    attention       queries, keys, values, its result; by plain products (bfloat16 up to 1024 positions, capped
                    scores, masks) also the square of weights for every head
    feed-forward    up, activation and product (with a gate), or before and after the activation
    head            gradients of the last hidden states and of the output matrix: logits are never kept

Activation checkpointing keeps less (`training/compilation.py`): "full" the input of each block, "selective" also the
results of its products. On a GPU RMSNorm keeps its input and a number a row, attention never a square. Rows that hold
several documents and texts with positions of their own keep their masks as well, on a CPU padded documents with their
squares of weights, which is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    """Bytes that a training step's forward pass keeps for the backward pass, by part of the model; see `Pass`.

    Returns:
        Bytes of positions (and ids), norms, attention, feedforward, dropout and head; with checkpointing also of the
        blocks' inputs, and of the parts what is left.
    """
    one = Pass(config, batch, length, dtype, device)
    stream = one.n_tokens * config.d_model * one.size  # one value for each feature of the residual stream
    positions = 8 * length if config.position == "learned" else 2 * length * config.rotated // 2 * one.size
    kept = {"positions": one.n_tokens * 8 + positions}
    if checkpointing != "none":
        kept["inputs"] = config.n_layers * stream
    blocks = [one.block(layer, checkpointing) for layer in range(config.n_layers)]
    kept |= {name: sum(block[name] for block in blocks) for name in blocks[0]}
    kept["norms"] += one.last_norm
    kept["dropout"] += one.dropout  # that of the embedding
    return {**kept, "head": stream + config.padded_vocab_size * config.d_model * 4}


@dataclass(frozen=True)
class Pass:
    """One forward pass in training. Everything that it counts is in bytes."""

    config: ModelConfig
    batch: int  # rows (a micro-batch)
    length: int  # tokens in a row
    dtype: Arithmetic = "float32"  # of the arithmetic
    device: Device = "cpu"  # whose kernels

    @property
    def n_tokens(self) -> int:
        """Of all rows."""
        return self.batch * self.length

    @property
    def size(self) -> int:
        """Of one value."""
        return 4 if self.dtype == "float32" else 2

    def block(self, layer: int, checkpointing: Checkpointing = "none") -> dict[str, int]:
        """What one block keeps: of norms, attention, feedforward and dropout."""
        config, n_tokens = self.config, self.n_tokens
        if checkpointing == "full":
            return {"norms": 0, "attention": 0, "feedforward": 0, "dropout": 0}
        if checkpointing == "selective":
            attention, feedforward = self._attention_products(layer), self._feedforward_products()
            return {"norms": 0, "attention": attention, "feedforward": feedforward, "dropout": 0}
        norms = 2 * self._norm()
        if config.qk_norm:
            norms += self._rmsnorm(config.head_dim, n_tokens * config.n_heads)
            norms += self._rmsnorm(config.head_dim, n_tokens * config.n_kv_heads)
        return {
            "norms": norms,
            "attention": self._attention(layer),
            "feedforward": self._experts() if config.n_experts else self._feedforward(),
            "dropout": 2 * self.dropout,
        }

    @property
    def last_norm(self) -> int:
        """What the norm behind the last block keeps, where there is one."""
        return self._norm() if self.config.norm_placement == "pre" else 0

    @property
    def dropout(self) -> int:
        """What dropping of the stream keeps: a factor, or on a GPU a flag, for each value."""
        each = self.size if self.device == "cpu" else 1
        return self.n_tokens * self.config.d_model * each if self.config.dropout else 0

    def attention_squares(self, layer: int) -> int:
        """One value for each pair of positions of every head, where a layer holds them; 0 where none does."""
        if not self._has_squares(layer):
            return 0
        return self.batch * self.config.n_heads * self.length * self.length * self._score_size

    def score_block(self, layer: int) -> int:
        """Where a layer computes its attention's weights again, their largest block; 0 where it does not."""
        if self._has_squares(layer) or not self._is_products(layer):
            return 0
        return self.batch * self.config.n_heads * min(KEPT_UP_TO, self.length) * self.length * self.size

    def _scores(self, layer: int) -> int:
        """The scores that a layer's products give, of those pairs that they are taken for; 0 by a fused kernel."""
        if not self.score_block(layer):
            return self.attention_squares(layer)
        # blocks of queries, each over the keys up to its end
        ends = [*range(KEPT_UP_TO, self.length, KEPT_UP_TO), self.length]
        pairs = sum((end - start) * end for start, end in zip([0, *ends], ends, strict=False))
        return self.batch * self.config.n_heads * pairs * self.size

    def _norm(self) -> int:
        width, rows = self.config.d_model, self.n_tokens
        if self.config.norm == "rmsnorm":
            return self._rmsnorm(width, rows)
        copies = self._weight_copies(width * (self.config.norm_weight + self.config.has_bias("norm")))
        return rows * width * self.size + 2 * rows * (self.size if self.device == "cpu" else 4) + copies

    def _rmsnorm(self, width: int, rows: int) -> int:
        copy = self._weight_copies(width * self.config.norm_weight)
        if self.device == "cuda":  # one kernel: the input, and one float32 a row
            return rows * width * self.size + rows * 4 + copy
        return rows * width * 4 * (1 + self.config.norm_weight) + rows * 4 + copy

    def _has_squares(self, layer: int) -> bool:
        """Whether a layer's attention keeps its weights for the backward pass."""
        if self.device == "cuda":
            return False
        has_mask = not AttentionRule.of_layer(self.config, layer).is_causal_only(self.length)
        is_short = self.length <= (PRODUCTS_UP_TO if has_mask else KEPT_UP_TO)
        return self.config.attention_softcap is not None or has_mask or (self.dtype == "bfloat16" and is_short)

    def _is_products(self, layer: int) -> bool:
        """Whether a layer's attention is plain products, not torch's fused kernel."""
        is_short = self.device == "cpu" and self.dtype == "bfloat16" and self.length <= PRODUCTS_UP_TO
        return is_short or self._has_squares(layer)

    @property
    def _score_size(self) -> int:
        """Of a kept weight: torch's own form of attention under a mask takes long rows in float32."""
        is_ours = self.config.attention_softcap is not None or self.length <= PRODUCTS_UP_TO
        return self.size if is_ours else 4

    def _attention(self, layer: int) -> int:
        config, n_tokens, d, size = self.config, self.n_tokens, self.config.d_model, self.size
        q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        kept = n_tokens * d * size + self._weight_copies(2 * d * (q + kv))
        if self._is_products(layer):
            # queries, keys and values of every head, the result for o_proj; of short rows the weights (and a cap's
            # tanh)
            squares = self.attention_squares(layer)
            heads = 3 * q * (self._score_size if squares else size) + q * size
            return kept + n_tokens * heads + squares * (1 + (config.attention_softcap is not None))
        # torch's fused kernel: queries, keys, values, result, and one float32 a row of scores
        kept += n_tokens * (2 * q + 2 * kv) * size + n_tokens * config.n_heads * 4
        # On a CPU its result has the layout of the queries: of rotated ones (contiguous) o_proj needs a copy.
        return kept + (n_tokens * q * size if config.position == "rope" and self.device == "cpu" else 0)

    def _attention_products(self, layer: int) -> int:
        """Results of products: queries, keys, values, scores (or a float32 for each row), attention's, o_proj's."""
        config, n_tokens = self.config, self.n_tokens
        q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        scores = self._scores(layer) or n_tokens * config.n_heads * 4
        return n_tokens * (2 * q + 2 * kv + config.d_model) * self.size + scores

    def _feedforward(self) -> int:
        config, n_tokens = self.config, self.n_tokens
        kept = n_tokens * (config.d_model + (4 if config.is_gated else 2) * config.d_ff) * self.size
        return kept + self._weight_copies((3 if config.is_gated else 2) * config.d_model * config.d_ff)

    def _feedforward_products(self) -> int:
        """Results of the products: of the router, into each feed-forward layer that a token takes, and out of it."""
        config, n_tokens = self.config, self.n_tokens
        rows = n_tokens * (config.experts_per_token if config.n_experts else 1)
        inner = (2 if config.is_gated else 1) * config.d_ff
        return (n_tokens * config.n_experts + rows * (inner + config.d_model)) * self.size

    def _experts(self) -> int:
        config, n_tokens, size = self.config, self.n_tokens, self.size
        d, n, k = config.d_model, config.n_experts, config.experts_per_token
        router = n_tokens * d * size + self._weight_copies(d * n)
        # probabilities, chosen experts, their probabilities and the sum of those; each expert's share of the tokens
        router += n_tokens * (4 * n + 8 * k + 4 * k + 4) + 4 * n
        inner = (4 if config.is_gated else 2) * config.d_ff
        # where each choice comes from, its input, inside, its output before and after the weight, the weight
        choices = n_tokens * k * (16 + (3 * d + inner + 1) * size)
        return router + choices + n * self._weight_copies((3 if config.is_gated else 2) * d * config.d_ff)

    def _weight_copies(self, n_weights: int) -> int:
        """Of weights that are cast to two bytes, the copies stay until the backward pass."""
        return n_weights * 2 if self.size == 2 else 0
