"""Several token shards mixed by weight: each row comes whole from one of them, in exact proportion at every moment.

Which component gives row i is a pure function of (seed, i), and so is the row's number within the component. For two
components with integer weights a + b = w, the first gives ⌊(i·a + phase) / w⌋ of the first i rows: a Sturmian word,
the most even way to mix two things (Morse and Hedlund 1940). More components are halved, and halved again: a tree
whose every node shares the rows that reach it out between its two sides. After i rows a component that stands at
depth d has given its share to within d rows, and of every `WEIGHT_SUM` rows exactly its weight. Each component goes
through its own epochs in its own shuffled order, without replacement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from groundup.errors import ArtifactError, DataError
from groundup.files import value_digest
from groundup.shards.load import Batch, StepLoader, WindowLoader
from groundup.shards.read import TokenShards

WEIGHT_SUM = 1 << 22
"""Weights are rounded to parts of this: i · weight then fits in 63 bits for more than 10¹² rows."""


class MixtureLoader(StepLoader[Batch]):
    """Training batches mixed from several shards.

    Args:
        components: shards with their weights: shares of the rows, of any positive sum.
        sequence_length: tokens in a row.
        batch_size: rows in a batch.
        seed: of the mixture and of every component's order.

    Attributes:
        weights: as they are used: integers that sum to `WEIGHT_SUM`.
        loaders: of the components.

    Raises:
        DataError: no component, a weight that is not positive, or a component with fewer tokens than a row.
        ArtifactError: the components are of different tokenizers.
    """

    def __init__(
        self, components: Sequence[tuple[TokenShards, float]], sequence_length: int, batch_size: int, seed: int
    ) -> None:
        shards = [component for component, _ in components]
        _check(shards, sequence_length)
        super().__init__(sequence_length, batch_size, seed, shards[0].end_of_text_id)
        self.weights = integer_weights([weight for _, weight in components])
        # Two components of equal size must not be shuffled alike.
        seeds = [xxhash.xxh3_64_intdigest(f"component {seed} {number}".encode()) >> 1 for number in range(len(shards))]
        self.loaders = [
            WindowLoader(component, sequence_length, batch_size, own_seed)
            for component, own_seed in zip(shards, seeds, strict=True)
        ]
        self._shares = Shares(self.weights, seed)
        self._components = value_digest(
            [[component.fingerprint, weight] for component, weight in zip(shards, self.weights, strict=True)]
        )

    def rows(self, places: np.ndarray) -> Batch:
        """The rows at any places (n,) of the endless order of rows."""
        components, numbers = self._shares(places)
        ids, targets = np.empty((2, len(places), self.sequence_length), dtype=np.int64)
        for component in np.unique(components):
            here = components == component
            part = self.loaders[component].rows(numbers[here])
            ids[here], targets[here] = part.ids, part.targets
        return Batch(ids, targets)

    def epochs(self, step: int) -> list[float]:
        """How often each component has been gone through before batch `step`."""
        counts = self._shares.counts(step * self.batch_size)
        return [count / loader.n_windows for count, loader in zip(counts, self.loaders, strict=True)]

    def source(self) -> dict[str, str]:
        """All components with their weights."""
        return {"components": self._components}


class Shares:
    """Row i of a mixture: its component, and its number there.

    Args:
        weights: integers.
        seed: where each node of the tree begins.
    """

    def __init__(self, weights: Sequence[int], seed: int) -> None:
        self.n_components = len(weights)
        self._tree = _node(list(enumerate(weights)), seed)

    def __call__(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Components and numbers within them, (n,) int64 each, of rows `places` (n,)."""
        components, numbers = np.empty((2, len(places)), dtype=np.int64)
        waiting = [(self._tree, np.arange(len(places)), np.asarray(places, dtype=np.int64))]
        while waiting:
            node, rows, inner = waiting.pop()
            if isinstance(node, int):
                components[rows], numbers[rows] = node, inner
                continue
            before = node.count(inner)
            is_left = node.count(inner + 1) > before
            waiting.append((node.left, rows[is_left], before[is_left]))
            waiting.append((node.right, rows[~is_left], (inner - before)[~is_left]))
        return components, numbers

    def counts(self, n_rows: int) -> list[int]:
        """How many of the first `n_rows` rows each component gives."""
        counts = [0] * self.n_components
        waiting = [(self._tree, n_rows)]
        while waiting:
            node, n = waiting.pop()
            if isinstance(node, int):
                counts[node] = n
            else:
                left = int(node.count(np.array(n)))
                waiting += [(node.left, left), (node.right, n - left)]
        return counts


@dataclass(frozen=True)
class _Node:
    """Shares rows out between two sides."""

    left: _Node | int
    right: _Node | int
    weight: int
    total: int
    phase: int

    def count(self, n: np.ndarray) -> np.ndarray:
        """How many of the first n rows go to the left."""
        return (n * self.weight + self.phase) // self.total


def _node(components: list[tuple[int, int]], seed: int) -> _Node | int:
    if len(components) == 1:
        return components[0][0]
    half = len(components) // 2
    left, right = components[:half], components[half:]
    weight = sum(share for _, share in left)
    total = weight + sum(share for _, share in right)
    phase = xxhash.xxh3_64_intdigest(f"mixture {seed} {[number for number, _ in components]}".encode()) % total
    return _Node(_node(left, seed), _node(right, seed), weight, total, phase)


def integer_weights(weights: Sequence[float]) -> list[int]:
    """Weights as integers ≥ 1 that sum to `WEIGHT_SUM`, each as near to its share as can be (largest remainders).

    Raises:
        DataError: a weight is not a positive number, or too small beside the others.
    """
    total = sum(weights)
    for weight in weights:
        if not 0 < weight < float("inf") or weight < total / WEIGHT_SUM:
            raise DataError(
                f"mixture weight {weight}: must be positive, and at least 1/{WEIGHT_SUM:,} of the sum ({total}).",
                "Leave a component out that is not wanted.",
            )
    exact = [weight / total * WEIGHT_SUM for weight in weights]
    floors = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda number: (floors[number] - exact[number], number))
    for number in by_remainder[: WEIGHT_SUM - sum(floors)]:
        floors[number] += 1
    return floors


def _check(shards: Sequence[TokenShards], sequence_length: int) -> None:
    if not shards:
        raise DataError("a mixture of no shards.", "Name at least one folder of shards.")
    for component in shards:
        if component.tokenizer_fingerprint != shards[0].tokenizer_fingerprint:
            raise ArtifactError(
                f"{component.folder}: made with another tokenizer ({component.tokenizer_fingerprint[:12]}…) than "
                f"{shards[0].folder} ({shards[0].tokenizer_fingerprint[:12]}…); the same id would mean two texts.",
                "Make the shards of both with one tokenizer.",
            )
        if component.n_tokens < sequence_length:
            raise DataError(
                f"{component.folder}: {component.n_tokens} tokens, fewer than a row of {sequence_length}.",
                "Leave it out, put its text with another component's, or lower sequence_length.",
            )
