"""Who gets which part of the cache, and what of a prompt stands there already.

Texts that begin alike have equal keys and values there. So each run of 16 tokens from a text's beginning has a name, a
digest of its tokens and of the name before it (and of a salt, so that nobody can time what another has asked), and an
index says where such a run is stored. Slots copy what they find in another slot, which is far cheaper than to compute
it; pages are shared, and freed pages keep their content until the space is needed, the oldest first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

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
        pages: of the slot, in order; none where a slot is one block.
        is_overwritten: a ring holds other tokens where the text's beginning stood.
    """

    slot: int
    n_stored: int = 0
    names: list[bytes] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    is_overwritten: bool = False


def run_names(ids: Sequence[int], salt: str = "", after: Sequence[bytes] = ()) -> Iterator[bytes]:
    """Names of the whole runs of a text, beyond those that are known."""
    name = after[-1] if after else hashlib.blake2b(salt.encode(), digest_size=16).digest()
    for start in range(len(after) * RUN, len(ids) - RUN + 1, RUN):
        name = hashlib.blake2b(name + array("q", ids[start : start + RUN]).tobytes(), digest_size=16).digest()
        yield name


class SlotPool:
    """Slots of one block each.

    Args:
        cache: whose slots they are.
    """

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(cache.n_slots))  # longest free first
        self._names: list[list[bytes]] = [[] for _ in range(cache.n_slots)]
        self._slots_with: dict[bytes, set[int]] = {}
        self._ring = cache.shortest_ring

    @property
    def n_used(self) -> int:
        """Slots in use."""
        return self._cache.n_slots - len(self._free)

    def lease(self, prompt: Sequence[int], length: int, salt: str = "", *, reuse: bool = True) -> Lease | None:
        """A slot for a prompt and what follows it, `length` tokens in all; None: all are in use."""
        if not self._free:
            return None
        names, holders = self._stored(prompt, salt) if reuse else ([], set[int]())
        here = next((slot for slot in self._free if slot in holders), None)
        slot = here if here is not None else self._emptiest()
        del self._free[slot]
        if here is None and names:
            self._cache.copy(next(iter(holders)), slot, len(names) * RUN)
        self._forget(slot, keep=len(names) if here is not None else 0)
        if here is None:
            self._add(slot, names)
        return Lease(slot, len(names) * RUN, self._names[slot])

    def record(self, lease: Lease, ids: Sequence[int], salt: str = "") -> None:
        """These tokens, from the text's beginning, stand in its slot now."""
        if not lease.is_overwritten:
            self._add(lease.slot, list(run_names(ids, salt, lease.names)))

    def will_write(self, lease: Lease, end: int) -> None:
        """Positions up to this one are about to be stored, guesses that may prove wrong among them."""
        if self._ring is not None and end > self._ring and not lease.is_overwritten:
            lease.is_overwritten = True
            self._forget(lease.slot, keep=0)

    def free(self, lease: Lease) -> None:
        """Give the slot back; its content can be found until another takes it."""
        self._free[lease.slot] = None

    def clear(self) -> None:
        """Forget what is stored: the weights have changed."""
        for slot in range(self._cache.n_slots):
            self._forget(slot, keep=0)

    def _stored(self, prompt: Sequence[int], salt: str) -> tuple[list[bytes], set[int]]:
        """The longest beginning of a prompt that a slot holds; one token is left, for its logits."""
        found: list[bytes] = []
        holders: set[int] = set()
        for name in run_names(prompt[:-1], salt):
            if name not in self._slots_with:
                break
            found, holders = [*found, name], self._slots_with[name]
        return found, holders

    def _emptiest(self) -> int:
        return next((slot for slot in self._free if not self._names[slot]), next(iter(self._free)))

    def _add(self, slot: int, names: Sequence[bytes]) -> None:
        for name in names:
            self._slots_with.setdefault(name, set()).add(slot)
        self._names[slot].extend(names)

    def _forget(self, slot: int, keep: int) -> None:
        for name in self._names[slot][keep:]:
            self._slots_with[name].discard(slot)
            if not self._slots_with[name]:
                del self._slots_with[name]
        del self._names[slot][keep:]


class PagePool:
    """Slots whose entries stand in pages of `RUN` tokens, which texts that begin alike share.

    A text's pages are reserved when it begins, so that none has to be thrown out later.

    Args:
        cache: with pages of `RUN` entries.
    """

    def __init__(self, cache: KVCache) -> None:
        assert cache.page_size == RUN
        self._cache = cache
        self._slots = list(range(cache.n_slots))[::-1]
        self._empty = list(range(cache.n_blocks))[::-1]
        self._n_users = [0] * cache.n_blocks
        self._page_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # named pages without a user, longest unused first

    @property
    def n_used(self) -> int:
        """Pages in use."""
        return self._cache.n_blocks - len(self._empty) - len(self._unused)

    def lease(self, prompt: Sequence[int], length: int, salt: str = "", *, reuse: bool = True) -> Lease | None:
        """A slot and pages for `length` tokens; None: not enough are free."""
        names: list[bytes] = []
        for name in run_names(prompt[:-1], salt) if reuse else ():
            if name not in self._page_of:
                break
            names.append(name)
        pages = [self._page_of[name] for name in names]
        n_new = -(-length // RUN) - len(pages)
        n_free = len(self._empty) + len(self._unused) - sum(page in self._unused for page in pages)
        if not self._slots or n_new > n_free:
            return None
        for page in pages:
            self._n_users[page] += 1
            self._unused.pop(page, None)
        for _ in range(n_new):
            page = self._empty.pop() if self._empty else self._evict()
            self._n_users[page] = 1
            pages.append(page)
        slot = self._slots.pop()
        self._cache.table[slot, : len(pages)] = self._cache.table.new_tensor(pages)
        return Lease(slot, len(names) * RUN, names, pages)

    def record(self, lease: Lease, ids: Sequence[int], salt: str = "") -> None:
        """These tokens, from the text's beginning, stand in its pages now."""
        for name in run_names(ids, salt, lease.names):
            page = lease.pages[len(lease.names)]
            lease.names.append(name)
            if name not in self._page_of and page not in self._name_of:
                self._page_of[name], self._name_of[page] = page, name

    def will_write(self, lease: Lease, end: int) -> None:
        """Pages hold all positions: nothing is overwritten."""

    def free(self, lease: Lease) -> None:
        """Give slot and pages back; named pages can be found until their space is needed."""
        self._slots.append(lease.slot)
        for page in lease.pages[::-1]:  # the end of a text is of less use than its beginning
            self._n_users[page] -= 1
            if self._n_users[page]:
                continue
            if page in self._name_of:
                self._unused[page] = None
            else:
                self._empty.append(page)

    def clear(self) -> None:
        """Forget what is stored: the weights have changed."""
        self._page_of.clear()
        self._name_of.clear()
        self._empty.extend(self._unused)
        self._unused.clear()

    def _evict(self) -> int:
        page, _ = self._unused.popitem(last=False)
        del self._page_of[self._name_of.pop(page)]
        return page
