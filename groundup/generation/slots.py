"""Who gets which part of the cache, and what of a prompt stands there already.

Texts that begin alike have equal keys and values there. So each run of 16 tokens from a text's beginning has a name, a
digest of its tokens and of the name before it (and of a salt, so that nobody can time what another has asked), and an
index says which blocks hold such a run. Slots copy what they find in another slot, which is far cheaper than to compute
it; pages are shared. A freed block keeps its content until the space is needed, the longest free first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from groundup.generation.cache import KVCache

RUN = 16
"""Tokens of a run; also the size of a page."""


@dataclass
class Lease:
    """A text's part of the cache.

    Attributes:
        slot: which it is.
        n_stored: tokens from the text's beginning whose entries stand there already.
        names: of the runs that the index knows to stand there.
        blocks: of the slot, in order.
        is_overwritten: a ring holds other tokens where the text's beginning stood.
    """

    slot: int
    n_stored: int
    names: list[bytes]
    blocks: list[int]
    is_overwritten: bool = False


def run_names(ids: Sequence[int], salt: str = "", after: Sequence[bytes] = ()) -> Iterator[bytes]:
    """Names of the whole runs of a text, beyond those that are known."""
    name = after[-1] if after else hashlib.blake2b(salt.encode(), digest_size=16).digest()
    for start in range(len(after) * RUN, len(ids) - RUN + 1, RUN):
        name = hashlib.blake2b(name + array("q", ids[start : start + RUN]).tobytes(), digest_size=16).digest()
        yield name


class Pool:
    """The slots of a cache, and its blocks: one for a slot, or pages of `RUN` tokens.

    A text's pages are reserved when it begins, so that none has to be thrown out later.
    """

    def __init__(self, cache: KVCache) -> None:
        assert cache.page_size in (None, RUN)
        self._cache = cache
        self._slots = list(range(cache.n_slots))[::-1]  # free ones; where a slot is a block, `_free` says it
        self._free = OrderedDict.fromkeys(range(cache.n_blocks))  # empty ones, and then the longest free first
        self._n_users = [0] * cache.n_blocks
        self._names: list[list[bytes]] = [[] for _ in range(cache.n_blocks)]
        self._blocks_with: dict[bytes, set[int]] = {}

    @property
    def n_used(self) -> int:
        """Blocks in use."""
        return self._cache.n_blocks - len(self._free)

    def lease(self, prompt: Sequence[int], length: int, salt: str = "", *, reuse: bool = True) -> Lease | None:
        """A part for a prompt and what follows it, `length` tokens in all; None: not enough is free."""
        names: list[bytes] = []
        for name in run_names(prompt[:-1], salt) if reuse else ():  # one token is left, for its logits
            if name not in self._blocks_with:
                break
            names.append(name)
        return self._lease_slot(names) if self._cache.page_size is None else self._lease_pages(names, length)

    def record(self, lease: Lease, ids: Sequence[int], salt: str = "") -> None:
        """These tokens, from the text's beginning, stand in its part now."""
        if lease.is_overwritten:
            return
        for name in run_names(ids, salt, lease.names):
            self._add(lease.blocks[0 if self._cache.page_size is None else len(lease.names)], name)
            lease.names.append(name)

    def will_write(self, lease: Lease, end: int) -> None:
        """Positions up to this one are about to be stored, guesses that may prove wrong among them."""
        ring = self._cache.shortest_ring
        if ring is not None and end > ring and not lease.is_overwritten:
            lease.is_overwritten = True
            self._forget(lease.slot)

    def free(self, lease: Lease) -> None:
        """Give it back; its content can be found until the space is needed."""
        if self._cache.page_size is not None:
            self._slots.append(lease.slot)
        for block in lease.blocks[::-1]:  # the end of a text is of less use than its beginning
            self._n_users[block] -= 1
            if not self._n_users[block]:
                self._free[block] = None
                self._free.move_to_end(block, last=bool(self._names[block]))

    def clear(self) -> None:
        """Forget what is stored: the weights have changed."""
        for block in range(self._cache.n_blocks):
            self._forget(block)

    def _lease_slot(self, names: list[bytes]) -> Lease | None:
        if not self._free:
            return None
        holders = self._blocks_with[names[-1]] if names else set[int]()
        slot = next((slot for slot in self._free if slot in holders), None)
        if slot is not None:
            self._forget(slot, keep=len(names))
        else:
            slot = next(iter(self._free))
            self._forget(slot)
            if names:
                self._cache.copy(next(iter(holders)), slot, len(names) * RUN)
            for name in names:
                self._add(slot, name)
        self._take(slot)
        return Lease(slot, len(names) * RUN, names, [slot])

    def _lease_pages(self, names: list[bytes], length: int) -> Lease | None:
        pages = [next(iter(self._blocks_with[name])) for name in names]
        n_new = -(-length // RUN) - len(pages)
        if not self._slots or n_new > len(self._free) - sum(page in self._free for page in pages):
            return None
        for page in pages:
            self._take(page)
        for _ in range(n_new):
            page = next(iter(self._free))
            self._forget(page)
            self._take(page)
            pages.append(page)
        slot = self._slots.pop()
        self._cache.table[slot, : len(pages)] = self._cache.table.new_tensor(pages)
        return Lease(slot, len(names) * RUN, names, pages)

    def _take(self, block: int) -> None:
        self._n_users[block] += 1
        self._free.pop(block, None)

    def _add(self, block: int, name: bytes) -> None:
        self._blocks_with.setdefault(name, set()).add(block)
        self._names[block].append(name)

    def _forget(self, block: int, keep: int = 0) -> None:
        for name in self._names[block][keep:]:
            self._blocks_with[name].discard(block)
            if not self._blocks_with[name]:
                del self._blocks_with[name]
        del self._names[block][keep:]
