"""Near-duplicates: documents that share a band of their MinHash signatures and, verified, most of the rest.

In: the units' keys and who takes part. Out: which are removed, which are kept instead, and how large the clusters are.

1. Bands. Each band of a signature becomes a 64-bit key; (key, document) records go to files by band and key range.
2. Buckets. Each band and range is sorted; documents with equal keys are a bucket. Only buckets of two and more go on.
3. Components. Documents joined by buckets are one component (union-find on arrays): what happens in one concerns no
   other, so components are shared out among tasks.
4. Decisions (`decide`). The documents of a component are taken in the order of survival: the longest text first, then
   the smallest id. A document that no kept one has removed is kept, and removes those documents of its buckets whose
   signature agrees with its own in at least `min_agreement` of the places.

So a document goes only if it is similar to one that stays. The usual rule, one survivor for a connected component
of similar pairs, lets chains (A like B, B like C, C unlike A) take away documents that are like nothing that stays.
The outcome is the one of taking all documents one after the other: it depends on texts and ids only. A bucket
costs its size for every document in it that stays, not the square of its size; a bucket in which
`MAX_LEADERS` documents stay is given up and counted: what is shared there is boilerplate.

Source: Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, section 3.4; the order of decisions is that of the
lexicographically first maximal independent set, in rounds (Blelloch, Fineman, Shun 2012).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from groundup.corpus.dedup.files import (
    KeyStore,
    RangeFile,
    Removed,
    UnitKeys,
    first_places,
    is_new,
    key_store,
    load,
    n_ranges,
    range_of,
    read_range,
    save,
    write_ranges,
)  # fmt: skip
from groundup.corpus.dedup.minhash import NO_SHINGLES
from groundup.corpus.engine import Engine
from groundup.errors import ArtifactError
from groundup.recipe import MinHashSettings

MAX_LEADERS = 256
"""A bucket is given up when so many of its documents have been kept: they share it, but not their text."""

_KEY = np.dtype([("key", "<u8"), ("number", "<i8")])
_MEMBER = np.dtype([("bucket", "<i8"), ("number", "<i8")])
_MEMBER_BYTES = 8 * _MEMBER.itemsize  # with what deciding keeps beside it
_MIN_TASK_MEMBERS = 50_000
"""Fewer than this are not worth another task."""
_PAIRS_AT_ONCE = 1 << 14

Similar = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(m,) ranks and (m,) ranks to (m,) bool: are they near-duplicates?"""


def near_duplicates(
    units: Sequence[UnitKeys],
    kept: Sequence[np.ndarray],
    settings: MinHashSettings,
    folder: Path,
    engine: Engine,
    memory_bytes: int,
) -> tuple[list[Removed], dict[str, Any]]:
    """Find documents that are similar to one that stays; arguments as in `repeats.exact_duplicates`.

    Beside `memory_bytes` this process holds 24 bytes for every document that shares a band with another, and one for
    every other. Exact duplicates should not take part.

    Returns:
        For every unit its rows that go, each with the id of the document that stays; and the report, JSON-able:
        documents (that took part), candidates (of them, those that share a band), removed, clusters (a survivor
        and those that go for it: `size` "2", "3-4", "5-8" ..., `clusters`, `documents`), largest_cluster,
        buckets_given_up. A text without words is never near another.

    Raises:
        ArtifactError: the signatures were made with other settings.
    """
    with key_store(folder, units, kept) as store:
        n_documents, n_bands = int(store.kept.sum()), settings.bands
        ranges = n_ranges(n_documents, _KEY.itemsize, memory_bytes)
        per_document = n_bands * _KEY.itemsize + 2 * 4 * n_bands * settings.rows
        slices = store.slices(per_document, memory_bytes, engine.n_workers)
        files = list(engine.map(partial(_split_bands, folder, ranges, settings), slices))
        found = engine.map(partial(_buckets, folder, files), range(n_bands * ranges if files else 0))
        members, n_tasks = _share_out([path for path, n in found if n], store, memory_bytes, engine.n_workers)
        decided = list(engine.map(partial(_decide, folder, members, settings), range(n_tasks)))
        removed = store.removed([load(record["path"]) for record in decided])
        return removed, _report(n_documents, decided)


def _split_bands(folder: Path, n: int, settings: MinHashSettings, piece: tuple[int, int]) -> RangeFile:
    store = KeyStore(folder)
    numbers, bands, rows = store.numbers(*piece), settings.bands, settings.rows
    found = store.take("signatures", numbers)
    if found.shape[1] != bands * rows:
        raise ArtifactError(
            f"{store.folders[0]}: signatures of {found.shape[1]} hashes where the recipe asks for {bands * rows}.",
            "Make them again with --from corpus.",
        )
    has_words = (found != NO_SHINGLES).any(axis=1)
    numbers, found = numbers[has_words], found[has_words]
    records = np.empty((bands, len(numbers)), dtype=_KEY)
    records["number"] = numbers
    parts = np.empty((bands, len(numbers)), dtype=np.int64)
    for band in range(bands):
        records["key"][band] = keys = band_keys(found[:, band * rows : (band + 1) * rows])
        parts[band] = band * n + range_of(keys, n)
    return write_ranges(folder / f"bands-{piece[0]}.npy", records.reshape(-1), parts.reshape(-1), bands * n)


def band_keys(band: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each row: (n, rows) uint32 to (n,) uint64."""
    keys = np.zeros(len(band), dtype=np.uint64)
    for column in range(band.shape[1]):
        keys = (keys ^ band[:, column]) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(32)
    keys *= np.uint64(0xD6E8FEB86659FD93)
    return keys ^ (keys >> np.uint64(32))


def _buckets(folder: Path, files: Sequence[RangeFile], number: int) -> tuple[Path, int]:
    """The members of buckets of two and more, bucket by bucket, in a file, and how many they are."""
    records = read_range(files, number)
    records = records[np.lexsort((records["number"], records["key"]))]
    bucket = np.cumsum(is_new(records["key"])) - 1
    shared = np.bincount(bucket, minlength=1)[bucket] > 1
    members = np.empty(int(shared.sum()), dtype=_MEMBER)
    members["bucket"], members["number"] = bucket[shared], records["number"][shared]
    return save(folder / f"buckets-{number}.npy", members), len(members)


def _share_out(
    buckets: Sequence[Path], store: KeyStore, memory_bytes: int, n_workers: int
) -> tuple[list[RangeFile], int]:
    """Find the components, and write every bucket to the file range of its component's task."""
    if not buckets:
        return [], 0
    is_involved = np.zeros(len(store.kept), dtype=bool)
    for members in map(load, buckets):
        is_involved[members["number"]] = True
    involved = np.flatnonzero(is_involved)
    component = np.arange(len(involved))
    sizes = np.zeros(len(involved), dtype=np.int64)  # memberships of each document, later of each component
    for members in map(load, buckets):
        places = np.searchsorted(involved, members["number"])
        sizes += np.bincount(places, minlength=len(involved))
        join(component, places[first_places(members["bucket"])], places)
    sizes = np.bincount(component, weights=sizes, minlength=len(involved)).astype(np.int64)
    most = max(1, min(memory_bytes // _MEMBER_BYTES, max(_MIN_TASK_MEMBERS, int(sizes.sum()) // n_workers)))
    task_of = (np.cumsum(sizes) - 1) // most
    n_tasks = int(task_of[-1]) + 1
    files, n_before = [], 0
    for number, members in enumerate(map(load, buckets)):
        records = np.array(members)
        tasks = task_of[component[np.searchsorted(involved, records["number"])]]
        records["bucket"] += n_before
        n_before = int(records["bucket"][-1]) + 1
        files.append(write_ranges(store.folder / f"members-{number}.npy", records, tasks, n_tasks))
    return files, n_tasks


def join(component: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Unite the sets of left[i] and right[i], for every i, in place: union-find without a loop over elements.

    `component`, (n,) int64, is each element's set, named by its smallest element. Begin with `arange(n)`.
    """
    while True:
        one, other = component[left], component[right]
        apart = one != other
        if not apart.any():
            return
        left, right = left[apart], right[apart]
        # Every set's name is hung below the smallest name it is to be united with; names only fall, so no circle.
        low, high = np.minimum(one[apart], other[apart]), np.maximum(one[apart], other[apart])
        np.minimum.at(component, high, low)
        while True:
            above = component[component]
            if (above == component).all():
                break
            component[:] = above


def _decide(folder: Path, files: Sequence[RangeFile], settings: MinHashSettings, number: int) -> dict[str, Any]:
    """Path of the (m, 2) int64 pairs (removed, kept instead), documents, cluster sizes, buckets given up."""
    store = KeyStore(folder)
    members = read_range(files, number)
    numbers, which = np.unique(members["number"], return_inverse=True)
    ids = store.take("ids", numbers)
    order = np.lexsort((ids[:, 1], ids[:, 0], -store.take("lengths", numbers)))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    numbers = numbers[order]
    width = settings.bands * settings.rows

    def similar(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        wanted, places = np.unique(numbers[np.concatenate([left, right])], return_inverse=True)
        found = store.take("signatures", wanted)
        equal = found[places[: len(left)]] == found[places[len(left) :]]
        # Keys of bands may be equal by chance, once in 2⁶⁴: the band itself is looked at too.
        shares_band = equal.reshape(-1, settings.bands, settings.rows).all(axis=2).any(axis=1)
        return shares_band & (equal.sum(axis=1) >= settings.min_agreement * width)

    survivor, given_up = decide(members["bucket"], rank[which], len(numbers), similar)
    gone = np.flatnonzero(survivor >= 0)
    path = save(folder / f"near-{number}.npy", np.stack([numbers[gone], numbers[survivor[gone]]], axis=1))
    sizes = Counter((np.unique(survivor[gone], return_counts=True)[1] + 1).tolist())
    return {"path": path, "documents": len(numbers), "sizes": sizes, "given_up": given_up}


def decide(bucket: np.ndarray, rank: np.ndarray, n: int, similar: Similar) -> tuple[np.ndarray, int]:
    """Which of n documents are kept among those that share buckets, named by their rank: 0 is the first to stay.

    Member i says that document `rank[i]` is in `bucket[i]`, no pair twice. One after the other, it would read:

        for document in order of rank:
            if it is not removed:
                keep it; remove every later document of its buckets that is similar to it

    All documents that are the first undecided ones of every bucket they are in can be kept at once: no document that
    is still undecided can remove them. A round keeps them all; random orders need about log n rounds.

    Returns:
        (n,) int64: the rank of the kept document that removed each, -1 for those that stay; how many buckets
        were given up.
    """
    order = np.lexsort((rank, bucket))
    bucket, rank = np.unique(bucket[order], return_inverse=True)[1], rank[order]
    survivor = np.full(n, -1, dtype=np.int64)
    n_kept_in = np.zeros(int(bucket[-1]) + 1 if len(bucket) else 0, dtype=np.int64)
    given_up = 0
    while len(bucket):
        firsts = np.flatnonzero(is_new(bucket))
        leads, belongs = np.bincount(rank[firsts], minlength=n), np.bincount(rank, minlength=n)
        is_kept = (leads == belongs) & (belongs > 0)
        leader = np.repeat(rank[firsts], np.diff(np.append(firsts, len(rank))))
        _remove_similar(leader, rank, is_kept, survivor, similar)
        n_kept_in[bucket[firsts[is_kept[rank[firsts]]]]] += 1
        is_open = n_kept_in[bucket] < MAX_LEADERS
        undecided = (survivor[rank] < 0) & ~is_kept[rank]
        given_up += len(np.unique(bucket[undecided & ~is_open]))
        stays = undecided & is_open
        # A document that is alone in its bucket cannot be removed there.
        stays &= np.bincount(bucket[stays], minlength=len(n_kept_in))[bucket] > 1
        bucket, rank = bucket[stays], rank[stays]
    return survivor, given_up


def _remove_similar(
    leader: np.ndarray, rank: np.ndarray, is_kept: np.ndarray, survivor: np.ndarray, similar: Similar
) -> None:
    """Compare each kept leader with the others of its bucket, in place; of several similar ones the first counts."""
    asked = is_kept[leader] & (leader != rank)
    n = len(survivor)
    pairs = np.unique(leader[asked] * n + rank[asked])
    for begin in range(0, len(pairs), _PAIRS_AT_ONCE):
        left, right = np.divmod(pairs[begin : begin + _PAIRS_AT_ONCE], n)
        new = survivor[right] < 0  # pairs are sorted by leader, so the first leader counts
        left, right = left[new], right[new]
        found = similar(left, right) if len(left) else np.zeros(0, dtype=bool)
        gone, first = np.unique(right[found], return_index=True)
        survivor[gone] = left[found][first]


def _report(n_documents: int, decided: Sequence[dict[str, Any]]) -> dict[str, Any]:
    sizes: Counter[int] = sum((record["sizes"] for record in decided), Counter())
    return {
        "documents": n_documents,
        "candidates": sum(record["documents"] for record in decided),
        "removed": sum((size - 1) * count for size, count in sizes.items()),
        "clusters": list(_bins(sizes)),
        "largest_cluster": max(sizes, default=0),
        "buckets_given_up": sum(record["given_up"] for record in decided),
        "most_kept_in_a_bucket": MAX_LEADERS,
    }


def _bins(sizes: dict[int, int]) -> Iterator[dict[str, Any]]:
    """Clusters of 2, of 3 to 4, of 5 to 8 ... documents."""
    least, most = 2, 2
    while least <= max(sizes, default=0):
        inside = {size: count for size, count in sizes.items() if least <= size <= most}
        yield {
            "size": str(least) if least == most else f"{least}-{most}",
            "clusters": sum(inside.values()),
            "documents": sum(size * count for size, count in inside.items()),
        }
        least, most = most + 1, 2 * most
