"""One token for each of some slots on a GPU, as CUDA graphs.

A step of a small batch is hundreds of short kernels, and starting them from Python takes longer than they do. A graph
starts them all at once, but computes on the same tensors of the same shapes each time. So there is one for each batch
size (a power of two; rows are repeated to fill it) and each visible length (a multiple of `BUCKET`), whose inputs are
copied into its own tensors. How many entries of a bucket a row attends to follows from its position, as ever.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from groundup.generation.cache import Entries, KVCache, NewEntries
from groundup.model import Transformer

BUCKET = 256
"""Entries; the shortest visible length."""


class StaticRows:
    """The cache as a call of fixed shape sees it: one new token in each of some slots.

    Args:
        cache: whose slots they are.
        batch: rows.
        length: entries that are visible, at least the furthest position + 1.

    Attributes:
        ids: of the rows' tokens, (batch, 1) int64.
        positions: of them, (batch, 1) int64.
        blocks: of the rows' slots, (batch, n) int64.
    """

    def __init__(self, cache: KVCache, batch: int, length: int) -> None:
        self._cache, self._length = cache, length
        size = cache.page_size or cache.length
        self.ids = torch.zeros((batch, 1), dtype=torch.int64, device=cache.device)
        self.positions = torch.zeros_like(self.ids)
        self.blocks = torch.zeros((batch, -(-length // size)), dtype=torch.int64, device=cache.device)

    def fill(self, ids: Sequence[int], slots: Sequence[int], positions: Sequence[int]) -> None:
        """The next call's rows."""
        both = torch.tensor([list(ids), list(positions)]).to(self._cache.device)
        self.ids[:, 0], self.positions[:, 0] = both[0], both[1]
        self.blocks.copy_(self._cache.table[list(slots), : self.blocks.shape[1]])

    def update(
        self, layer: int, keys: NewEntries, values: NewEntries, positions: Int[Tensor, "batch seq"]
    ) -> tuple[Entries, Entries, Int[Tensor, "batch length"] | None]:
        """As `Rows.update`, without asking the device anything."""
        store = self._cache.layers[layer]
        index = store.index(self.positions)
        blocks = self.blocks.gather(1, index // store.block_size)[:, 0]
        store.write(blocks, index[:, 0] % store.block_size, keys[:, :, 0], values[:, :, 0])
        length = min(self._length, store.ring or self._length)
        found = store.read(self.blocks[:, : -(-length // store.block_size)], length, keys.dtype)
        if not store.ring:
            return found[0], found[1], None
        entries = torch.arange(length, device=self.positions.device)[None]
        newest = self.positions - (self.positions - entries) % (store.ring - store.sinks)
        kept = (entries < store.sinks) | (entries > self.positions)
        return found[0], found[1], torch.where(kept, entries, newest)


class GraphStep:
    """Steps of one token a slot, each shape captured when it is first met.

    Args:
        model: as `inference_copy` gives it, on a GPU.
        cache: of the model.
    """

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        self._captured: dict[tuple[int, int], tuple[StaticRows, torch.cuda.CUDAGraph, Tensor]] = {}

    @torch.inference_mode()
    def __call__(
        self, ids: Sequence[int], slots: Sequence[int], positions: Sequence[int]
    ) -> Float[Tensor, "batch vocab"]:
        """Store the tokens; the logits behind each."""
        n = len(ids)
        batch = 1 << (n - 1).bit_length()
        length = min(self._cache.length, -(-(max(positions) + 1) // BUCKET) * BUCKET)
        if (batch, length) not in self._captured:
            self._captured[batch, length] = self._capture(batch, length)
        rows, graph, logits = self._captured[batch, length]
        rows.fill(*(_filled(part, batch) for part in (ids, slots, positions)))
        graph.replay()
        return logits[:n].clone()

    def _capture(self, batch: int, length: int) -> tuple[StaticRows, torch.cuda.CUDAGraph, Tensor]:
        rows, graph = StaticRows(self._cache, batch, length), torch.cuda.CUDAGraph()
        first = [part[:1, :, :1] for layer in self._cache.layers for part in (layer.keys, layer.values)]
        kept = [part.clone() for part in first]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries set themselves up before the capture
            for _ in range(2):
                logits = one_token(self._model, rows)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            logits = one_token(self._model, rows)
        for part, before in zip(first, kept, strict=True):  # the trial runs have written position 0 of block 0
            part.copy_(before)
        return rows, graph, logits


def one_token(model: Transformer, rows: StaticRows) -> Float[Tensor, "batch vocab"]:
    """A step of the rows' tokens."""
    return model(rows.ids, positions=rows.positions, cache=rows)[:, -1]


def _filled(values: Sequence[int], n: int) -> list[int]:
    """The last one repeated: it writes the same entry again."""
    return [*values, *[values[-1]] * (n - len(values))]
