"""Keys and values of earlier tokens, so that each step computes one token only.

Slot-contiguous: row r of the batch owns row r of one preallocated tensor, and each row has its own positions, so
prompts of several lengths share a batch. A query at position p is answered with keys 0 … p of its row, all of
which are written by then: what stands beyond (padding, an earlier text) is never attended to.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from groundup.model import ModelConfig

NewEntries = Float[Tensor, "batch kv_heads seq head_dim"]
Entries = Float[Tensor, "batch kv_heads length head_dim"]


class KVCache:
    """A cache for one batch; the model's `KeyValueStore`.

    Args:
        config: of the model.
        batch: rows.
        length: most tokens in a row, prompt included.
        dtype: of the model's arithmetic.
        device: where the model computes.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.n_layers, batch, config.n_kv_heads, length, config.head_dim)
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)
        self._rows = torch.arange(batch, device=device)[:, None]
        self._visible = 0

    def update(
        self, layer: int, keys: NewEntries, values: NewEntries, positions: Int[Tensor, "batch seq"]
    ) -> tuple[Entries, Entries]:
        """Store keys and values at each row's positions; return all up to the furthest of these positions."""
        if layer == 0:
            self._visible = int(positions.max()) + 1  # read once a step: on a GPU it waits for the device
        # (batch, seq, kv_heads, head_dim) on both sides of the assignment
        self._keys[layer].transpose(1, 2)[self._rows, positions] = keys.transpose(1, 2)
        self._values[layer].transpose(1, 2)[self._rows, positions] = values.transpose(1, 2)
        return self._keys[layer, :, :, : self._visible], self._values[layer, :, :, : self._visible]

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Drop all rows but these, in this order."""
        self._keys, self._values = self._keys[:, rows], self._values[:, rows]
        self._rows = torch.arange(len(rows), device=self._rows.device)[:, None]

    def overwrite(self, rows: Int[Tensor, " replaced"], other: KVCache) -> None:
        """Put the rows of another, shorter cache over the beginnings of these rows."""
        length = other._keys.shape[3]
        self._keys[:, rows, :, :length] = other._keys
        self._values[:, rows, :, :length] = other._values
