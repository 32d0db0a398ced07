"""A source of random rows with uneven masks, for tests of the loop."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from groundup.training import IGNORED, Batch


class RandomRows:
    """Rows that are a pure function of (seed, step, row); each with its own number of targets."""

    def __init__(
        self, vocab_size: int = 64, length: int = 12, batch_size: int = 4, seed: int = 0, learnable: bool = False
    ) -> None:
        self.learnable = learnable  # the next token follows from the last
        self.vocab_size, self.length, self.batch_size, self.seed = vocab_size, length, batch_size, seed
        self.fingerprint = f"random rows {vocab_size} {length} {batch_size} {seed}"

    def _row(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + index)
        ids = torch.randint(0, self.vocab_size, (self.length + 1,), generator=generator)
        if self.learnable:
            for place in range(self.length):
                ids[place + 1] = (3 * ids[place] + 1) % self.vocab_size
        targets = ids[1:].clone()
        targets[: int(torch.randint(0, self.length, (1,), generator=generator))] = IGNORED
        return ids[:-1], targets

    def _batch(self, first: int, last: int) -> Batch:
        chosen = [self._row(row) for row in range(first, last)]
        return {
            name: torch.stack(part) for name, part in zip(("ids", "targets"), zip(*chosen, strict=True), strict=True)
        }

    def rows(self, first: int, last: int) -> Batch:
        return self._batch(first, last)

    def validation(self, batch_size: int, limit_tokens: int | None) -> Iterator[Batch]:
        yield self._batch(10_000_000, 10_000_000 + batch_size)
