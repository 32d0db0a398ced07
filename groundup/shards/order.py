"""A shuffled order that needs no list: a keyed permutation of 0 … n−1, computed one index at a time.

A Feistel network (Luby and Rackoff 1988) mixes the two halves of an index's bits for some rounds; each round is undone
by itself, so the whole is a bijection of 0 … 4ᵏ−1 whatever the round function is. Where the result is not below n it
is mixed again until it is (cycle walking: Black and Rogaway 2002): a bijection of 0 … n−1, with 4ᵏ < 4n and so fewer
than four turns on average. Memory O(1); any index at once.
"""

from __future__ import annotations

import numpy as np
import xxhash

N_ROUNDS = 8


class Permutation:
    """A bijection of 0 … n−1.

    Args:
        n: how many indices, 1 … 2⁶².
        key: integers that decide the order, such as (seed, epoch).
    """

    def __init__(self, n: int, key: tuple[int, ...]) -> None:
        if not 1 <= n <= 1 << 62:
            raise ValueError(f"n = {n}: must be 1 to 2^62")
        self.n = n
        half = max(1, ((n - 1).bit_length() + 1) // 2)
        self._half = np.uint64(half)
        self._mask = np.uint64((1 << half) - 1)
        words = [" ".join(str(int(part)) for part in (*key, number)) for number in range(N_ROUNDS)]
        self._keys = [np.uint64(xxhash.xxh3_64_intdigest(word.encode())) for word in words]

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Where each index goes.

        Args:
            indices: integers below n, of any shape.

        Returns:
            Their images, the same shape, int64.
        """
        given = np.asarray(indices)
        out = self._mix(given.astype(np.uint64).ravel())
        outside = np.flatnonzero(out >= np.uint64(self.n))
        while len(outside):
            mixed = self._mix(out[outside])
            out[outside] = mixed
            outside = outside[mixed >= np.uint64(self.n)]
        return out.astype(np.int64).reshape(given.shape)

    def _mix(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_scramble(right ^ key) & self._mask)
        return (left << self._half) | right


def shuffled_epochs(numbers: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Which of n things stand at these places of their endless order, another one in each epoch."""
    epochs, places = np.divmod(numbers, n)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        places[here] = Permutation(n, (seed, int(epoch)))(places[here])
    return places


def _scramble(values: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele et al. 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
