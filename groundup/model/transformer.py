"""A decoder-only, pre-norm Transformer, GPT-2-shaped or Llama-shaped from the same parts.

In: token ids. Out: logits. Plain single-device code: devices, precision and compilation are applied from
outside. Names follow Hugging Face's Llama, so that a checkpoint's weights need no renaming.
Sources: arXiv:1706.03762 (Transformer), GPT-2's report, arXiv:2302.13971 (Llama).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, overload

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from groundup.model.attention import Attention, KeyValueStore
from groundup.model.config import ModelConfig
from groundup.model.feedforward import make_feedforward
from groundup.model.initialization import initialize
from groundup.model.linear import Linear
from groundup.model.normalization import make_norm
from groundup.model.positions import Rotation, rotation_table

Result = TypeVar("Result")


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = make_norm(config, config.d_model)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = make_norm(config, config.d_model)
        self.mlp = make_feedforward(config)
        self.dropout = config.dropout

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        rotation: Rotation | None,
        positions: Int[Tensor, "batch seq"] | None = None,
        cache: KeyValueStore | None = None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """Apply both sub-layers."""
        x = x + self._drop(self.self_attn(self.input_layernorm(x), rotation, positions, cache))
        return x + self._drop(self.mlp(self.post_attention_layernorm(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout else x


class Transformer(nn.Module):
    """The model.

    Args:
        config: its shape.
        seed: seed of the initial weights, which depend on it and on the parameters' names only.
        device: where to build it; "meta" allocates nothing and leaves the weights to `initialize`.

    Attributes:
        compute_dtype: dtype of the arithmetic; the weights stay float32.
    """

    def __init__(self, config: ModelConfig, *, seed: int = 1, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        with torch.device(device):
            self.embed_tokens = _Embedding(config.vocab_size, config.d_model)
            self.embed_positions = (
                _Embedding(config.context_length, config.d_model) if config.position == "learned" else None
            )
            self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
            self.norm = make_norm(config, config.d_model)
            self.lm_head = None if config.tied_embeddings else Linear(config.d_model, config.vocab_size, bias=False)
        if torch.device(device).type != "meta":
            initialize(self, config, seed)

    @property
    def n_parameters(self) -> int:
        """Number of parameters, a tied embedding counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @overload
    def forward(
        self,
        ids: Int[Tensor, "batch seq"],
        *,
        positions: Int[Tensor, "batch seq"] | None = None,
        cache: KeyValueStore | None = None,
        head: None = None,
    ) -> Float[Tensor, "batch seq vocab"]: ...

    @overload
    def forward(
        self,
        ids: Int[Tensor, "batch seq"],
        *,
        positions: Int[Tensor, "batch seq"] | None = None,
        cache: KeyValueStore | None = None,
        head: Callable[[Tensor, Tensor], Result],
    ) -> Result: ...

    def forward(
        self,
        ids: Int[Tensor, "batch seq"],
        *,
        positions: Int[Tensor, "batch seq"] | None = None,
        cache: KeyValueStore | None = None,
        head: Callable[[Tensor, Tensor], Any] | None = None,
    ) -> Any:
        """Logits of the next token at every position, in float32.

        Args:
            ids: token ids, int64.
            positions: each token's position in its row (default 0, 1, 2, …). With a cache, rows may differ.
            cache: keys and values of earlier calls; then each query sees the cached positions up to its own.
            head: what to make of the last hidden states (batch, seq, d_model) and the output matrix
                (vocab, d_model) instead of logits: a loss that never holds all logits, for instance.
        """
        hidden = self._hidden(ids, positions, cache)
        weight = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        if head is not None:
            return head(hidden, weight)
        return F.linear(hidden, weight.to(hidden.dtype)).float()

    def _hidden(
        self, ids: Int[Tensor, "batch seq"], positions: Int[Tensor, "batch seq"] | None, cache: KeyValueStore | None
    ) -> Float[Tensor, "batch seq d_model"]:
        batch, seq = ids.shape
        if cache is not None and positions is None:
            positions = torch.arange(seq, device=ids.device).expand(batch, seq)
        # Rows that all start at 0 share one table of (seq, ...) positions.
        where = torch.arange(seq, device=ids.device) if positions is None else positions
        x = self.embed_tokens(ids).to(self.compute_dtype)
        rotation: Rotation | None = None
        if self.embed_positions is not None:
            x = x + self.embed_positions(where).to(self.compute_dtype)
        else:
            rotation = rotation_table(where, self.config.head_dim, self.config.rope_base, self.compute_dtype)
        if self.training and self.config.dropout:
            x = F.dropout(x, self.config.dropout)
        for block in self.layers:
            x = block(x, rotation, positions, cache)
        return self.norm(x)


class _Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Do nothing: see `model/initialization.py`."""
