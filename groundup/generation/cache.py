"""Keys and values of earlier tokens, so that each step computes its new tokens only.

A slot holds one text. Its entries stand in blocks, and a table says in which: with one block to a slot a text is
contiguous, which is what a CPU reads fastest; with many small ones (pages, arXiv:2309.06180) memory is handed out as
texts grow, and texts that begin alike share it. Layers with a window can keep a ring of it instead of the whole text.
A query at position p is answered with entries of positions 0 … p of its slot: what stands beyond, padding or an
earlier text, is never attended to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from groundup.model import ModelConfig

NewEntries = Float[Tensor, "batch kv_heads seq head_dim"]
Entries = Float[Tensor, "batch kv_heads length head_dim"]


@dataclass
class LayerCache:
    """One layer's entries.

    Attributes:
        keys: (n_blocks, kv_heads, block_size, head_dim): float32, bfloat16, or int8 with a scale for each entry.
        values: the same.
        key_scales: int8 only: (n_blocks, kv_heads, block_size), float32; a key is its int8 times its scale.
        value_scales: the same.
        ring: 0: position p stands at index p of its slot. Else at p if p < sinks, and otherwise at
            sinks + (p − sinks) mod (ring − sinks).
        sinks: first positions, which a ring never overwrites.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
    ring: int = 0
    sinks: int = 0

    @property
    def block_size(self) -> int:
        """Entries of a block."""
        return self.keys.shape[2]

    @property
    def parts(self) -> list[Tensor]:
        """All that is stored."""
        return [part for part in (self.keys, self.values, self.key_scales, self.value_scales) if part is not None]

    def index(self, positions: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Where in a slot positions stand."""
        if not self.ring:
            return positions
        turned = self.sinks + (positions - self.sinks) % (self.ring - self.sinks)
        return torch.where(positions < self.sinks, positions, turned)

    def write(self, blocks: Tensor, offsets: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store entries, (n, kv_heads, head_dim) each, at n places."""
        for stored, scales, new in ((self.keys, self.key_scales, keys), (self.values, self.value_scales, values)):
            if scales is not None:
                scale = new.abs().amax(dim=-1).float().clamp(min=1e-12) / 127
                scales[blocks, :, offsets] = scale
                new = (new.float() / scale[..., None]).round()
            stored[blocks, :, offsets] = new.to(stored.dtype)

    def read(self, blocks: Int[Tensor, "batch n_blocks"] | slice, length: int, dtype: torch.dtype) -> list[Tensor]:
        """Keys and values of slots with these blocks, up to an index: (batch, kv_heads, length, head_dim) each."""
        found = []
        for stored, scales in ((self.keys, self.key_scales), (self.values, self.value_scales)):
            entries = _gather(stored, blocks)[:, :, :length]
            if scales is not None:
                entries = entries.to(dtype) * _gather(scales[..., None], blocks)[:, :, :length].to(dtype)
            found.append(entries)
        return found


class KVCache:
    """A cache; as the model's `KeyValueStore`, row r of a batch is slot r.

    Args:
        config: of the model.
        batch: slots.
        length: most tokens in a slot, prompt included.
        dtype: of the model's arithmetic.
        device: where the model computes.
        block_size: entries of a page; None: one block for a slot.
        n_blocks: pages in all (default: enough for every slot's whole length).
        chunk: most new tokens of a slot in one call. With it, layers with a window keep a ring of the window and a
            chunk instead of the whole length; not with pages. None: no rings.
        is_int8: entries are kept in 8 bits with a scale for each head of each token: half of bfloat16's memory.

    Attributes:
        shortest_ring: tokens up to which no layer has overwritten one of a slot; None: none ever does.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        block_size: int | None = None,
        n_blocks: int | None = None,
        chunk: int | None = None,
        is_int8: bool = False,
    ) -> None:
        self.config, self.n_slots, self.length, self.dtype = config, batch, length, dtype
        self.device, self.page_size, self.chunk = torch.device(device), block_size, chunk
        per_slot = 1 if block_size is None else -(-length // block_size)
        self.n_blocks = batch if block_size is None else n_blocks or batch * per_slot
        self.table = torch.zeros((batch, per_slot), dtype=torch.int32)
        if block_size is None:
            self.table[:, 0] = torch.arange(batch)
        elif self.n_blocks >= batch * per_slot:  # until a pool hands them out
            self.table[:] = torch.arange(batch * per_slot).view(batch, per_slot)
        self.layers = [self._layer(layer, is_int8) for layer in range(config.n_layers)]
        self.shortest_ring = min((layer.ring for layer in self.layers if layer.ring), default=None)
        self._rows: Rows | None = None

    def _layer(self, layer: int, is_int8: bool) -> LayerCache:
        config, ring, sinks = self.config, 0, 0
        if self.page_size is None and self.chunk is not None and config.pattern(layer) == "window":
            sinks = config.sink_tokens
            ring = sinks + (config.window or 0) + self.chunk
            ring = ring if ring < self.length else 0
        size = self.page_size or ring or self.length
        shape = (self.n_blocks, config.n_kv_heads, size, config.head_dim)
        dtype = torch.int8 if is_int8 else self.dtype
        keys, values = (torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(2))
        found = LayerCache(keys, values, ring=ring, sinks=sinks if ring else 0)
        if is_int8:
            found.key_scales, found.value_scales = (torch.zeros(shape[:3], device=self.device) for _ in range(2))
        return found

    @property
    def n_bytes(self) -> int:
        """Memory of all entries."""
        return sum(part.nbytes for layer in self.layers for part in layer.parts)

    def copy(self, source: int, target: int, n_tokens: int) -> None:
        """Put the first tokens of one slot over the beginning of another; not with pages."""
        assert self.page_size is None
        for layer in self.layers:
            n = min(n_tokens, layer.block_size)
            for part in layer.parts:
                part[target, :, :n] = part[source, :, :n]

    def update(
        self, layer: int, keys: NewEntries, values: NewEntries, positions: Int[Tensor, "batch seq"]
    ) -> tuple[Entries, Entries, Int[Tensor, "batch length"] | None]:
        """Store the entries of each slot's next tokens; return all up to the furthest of them. See `Rows.update`."""
        if layer == 0:
            batch, seq = positions.shape
            self._rows = Rows(self, range(batch), positions[:, 0].tolist(), [seq] * batch)
        assert self._rows is not None
        return self._rows.update(layer, keys, values, positions)


class Rows:
    """The cache as one call of the model sees it: a slot for each row of its batch.

    Args:
        cache: whose slots they are.
        slots: of each row.
        starts: position of each row's first token.
        counts: tokens of each row; shorter rows are padded at their end, and padding is not stored.
        length: entries that are visible, at least the furthest position + 1 (default: that).

    Attributes:
        positions: of the rows' tokens, (batch, seq); padding repeats a row's last.
        blocks: of the rows' slots, (batch, n).
    """

    def __init__(
        self,
        cache: KVCache,
        slots: Sequence[int],
        starts: Sequence[int],
        counts: Sequence[int],
        length: int | None = None,
    ) -> None:
        self._cache, device = cache, cache.device
        offsets, n = torch.arange(max(counts)), torch.tensor(counts)[:, None]
        positions = torch.tensor(starts)[:, None] + torch.minimum(offsets, n - 1)
        self._length = length or int(positions.max()) + 1
        n_blocks = -(-self._length // (cache.page_size or cache.length))
        self.positions = positions.to(device)
        self.blocks = cache.table[list(slots), :n_blocks].long().to(device)
        # A slice copies nothing, where slots are blocks that follow each other.
        is_slice = length is None and cache.page_size is None and list(slots) == list(range(slots[0], slots[-1] + 1))
        self._slice = slice(slots[0], slots[-1] + 1) if is_slice else None
        self._real = (offsets < n).flatten().nonzero()[:, 0].to(device)
        self._row_of_real = torch.arange(len(slots)).repeat_interleave(n[:, 0]).to(device)
        self._places: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor | None]] = {}

    def update(
        self, layer: int, keys: NewEntries, values: NewEntries, positions: Int[Tensor, "batch seq"]
    ) -> tuple[Entries, Entries, Int[Tensor, "batch length"] | None]:
        """Store keys and values; return those of the rows' slots and where they stand (None: 0, 1, 2, …)."""
        store = self._cache.layers[layer]
        length, kind = min(self._length, store.ring or self._length), (store.block_size, store.ring)
        if layer == 0:
            self._places.clear()
        if kind not in self._places:
            index = store.index(self.positions.flatten()[self._real])
            blocks = self.blocks[self._row_of_real, index // store.block_size]
            self._places[kind] = blocks, index % store.block_size, self._where(store, length)
        blocks, offsets, where = self._places[kind]
        store.write(blocks, offsets, *(part.transpose(1, 2).flatten(0, 1)[self._real] for part in (keys, values)))
        visible = self.blocks[:, : -(-length // store.block_size)] if self._slice is None else self._slice
        found = store.read(visible, length, keys.dtype)
        return found[0], found[1], where

    def _where(self, store: LayerCache, length: int) -> Tensor | None:
        if not store.ring or self._length <= store.ring:
            return None
        last, index = self.positions[:, -1:], torch.arange(length, device=self.positions.device)[None]
        newest = last - (last - index) % (store.ring - store.sinks)
        # What lies beyond a row's last token was never written: its own index is beyond every query.
        return torch.where((index < store.sinks) | (index > last), index, newest)


def _gather(stored: Tensor, blocks: Tensor | slice) -> Tensor:
    """(n_blocks, kv_heads, block_size, width) to (batch, kv_heads, length, width)."""
    if isinstance(blocks, slice):
        return stored[blocks]
    found = stored[blocks]  # (batch, n, kv_heads, block_size, width)
    return found.transpose(1, 2).flatten(2, 3) if blocks.shape[1] > 1 else found[:, 0]
