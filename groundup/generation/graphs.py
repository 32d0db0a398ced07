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

from groundup.generation.cache import KVCache, Rows
from groundup.model import Transformer

BUCKET = 256
"""Entries; the shortest visible length."""


class GraphStep:
    """Steps of one token a slot of a model on a GPU, each shape captured when it is first met."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        self._captured: dict[tuple[int, int], tuple[Tensor, Rows, torch.cuda.CUDAGraph, Tensor]] = {}

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
        static_ids, rows, graph, logits = self._captured[batch, length]
        # The last row is repeated to fill the batch: it writes the same entry again.
        values = [[*part, *[part[-1]] * (batch - n)] for part in (ids, positions, slots)]
        both = torch.tensor(values[:2]).to(self._cache.device)[..., None]
        static_ids.copy_(both[0]), rows.positions.copy_(both[1])
        rows.blocks.copy_(self._cache.table[values[2], : rows.blocks.shape[1]])
        graph.replay()
        return logits[:n].clone()

    def _capture(self, batch: int, length: int) -> tuple[Tensor, Rows, torch.cuda.CUDAGraph, Tensor]:
        rows, graph = fixed_rows(self._cache, batch, length), torch.cuda.CUDAGraph()
        ids = torch.zeros_like(rows.positions)
        first = [part[:1, :, :1] for layer in self._cache.layers for part in layer.parts]
        kept = [part.clone() for part in first]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries set themselves up before the capture
            for _ in range(2):
                logits = one_token(self._model, ids, rows)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            logits = one_token(self._model, ids, rows)
        for part, before in zip(first, kept, strict=True):  # the trial runs have written position 0 of block 0
            part.copy_(before)
        return ids, rows, graph, logits


def fixed_rows(cache: KVCache, batch: int, length: int) -> Rows:
    """Rows of one token each, whose positions and blocks are filled in before each call."""
    rows = Rows(cache, [0] * batch, [0] * batch, [1] * batch, length)
    rows.blocks.zero_()
    return rows


def one_token(model: Transformer, ids: Int[Tensor, "batch 1"], rows: Rows) -> Float[Tensor, "batch vocab"]:
    """A step of the rows' tokens."""
    return model(ids, positions=rows.positions, cache=rows)[:, -1]
