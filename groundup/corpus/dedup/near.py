"""Near-duplicates: documents that share a band of their MinHash signatures and, verified, most of the rest.

In: the units' keys and who takes part. Out: which are removed, which are kept instead, and how large the clusters are.

1. Bands. Each band of a signature becomes a 64-bit key; (key, document) records go to files by band and key range.
2. Buckets. Each band and range is sorted; documents with equal keys are a bucket. Only buckets of two and more go on.
3. Components. Documents joined by buckets are one component (union-find on arrays): what happens in one concerns no
   other, so components are shared out among tasks.
4. Decisions. The documents of a component are taken in the order of survival: the longest text first, then the
   smallest id. A document that no kept one has removed is kept, and removes those documents of its buckets whose
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

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from groundup.corpus.dedup.files import (
    COPIES,
    KeyStore,
    RangeFile,
    Removed,
    UnitKeys,
    check_count,
    first_places,
    is_new,
    key_store,
    load,
    n_ranges,
    range_of,
    read_range,
    save,
    write_ranges,
)
from groundup.corpus.dedup.minhash import NO_SHINGLES
from groundup.corpus.dedup.rounds import MAX_LEADERS, decide
from groundup.corpus.engine import Engine
from groundup.errors import ArtifactError
from groundup.recipe import MinHashSettings

_KEY = np.dtype([("key", "<u8"), ("number", "<i8")])
_MEMBER = np.dtype([("bucket", "<i8"), ("number", "<i8")])
_MEMBER_BYTES = 8 * _MEMBER.itemsize  # with what deciding keeps beside it
_BUCKETS_AT_ONCE = 1 << 22
_MIN_TASK_KEYS, _MIN_TASK_MEMBERS = 500_000, 50_000
"""Fewer than this are not worth another task."""


def near_duplicates(
    units: Sequence[UnitKeys],
    kept: Sequence[np.ndarray],
    settings: MinHashSettings,
    folder: Path,
    engine: Engine,
    memory_bytes: int,
) -> tuple[list[Removed], dict[str, Any]]:
    """Find documents that are similar to one that stays.

    Args:
        units: the documents' keys, in an order that does not depend on how the input was cut.
        kept: (n,) bool for each unit: who takes part (exact duplicates should not).
        settings: bands, rows, least agreement.
        folder: for files in between; it is emptied first and removed in the end.
        engine: who does the work. The result does not depend on it, on `memory_bytes` or on where units begin.
        memory_bytes: what a task may use. Beside it this process holds 24 bytes for every document that shares a
            band with another.

    Returns:
        For every unit its rows that go, each with the id of the document that stays; and the report, JSON-able:
        documents (that took part), candidates (of them, those that share a band), removed, clusters (a survivor
        and those that go for it: `size` "2", "3-4", "5-8" ..., `clusters`, `documents`), largest_cluster,
        buckets_given_up. A text without words is never near another.

    Raises:
        ArtifactError: the signatures were made with other settings.
    """
    with key_store(folder, units, kept) as store:
        if not store.n:
            return store.removed(np.empty((0, 2), dtype=np.int64)), _report(0, 0, [])
        n_bands = settings.bands
        n_keys = int(store.kept.sum()) * n_bands
        ranges = n_ranges(n_keys // n_bands, _KEY.itemsize, memory_bytes)
        per_document = n_bands * _KEY.itemsize + 2 * 4 * n_bands * settings.rows
        slices = store.slices(per_document, memory_bytes, engine.n_workers)
        keyed = list(engine.map(partial(_split_bands, store.folder, ranges, settings), slices))
        files = [file for file, _ in keyed]
        check_count("bands", n_keys - sum(n_wordless for _, n_wordless in keyed) * n_bands, files)
        parts = _parts(files, memory_bytes, engine.n_workers)
        buckets = [path for path, n in engine.map(partial(_buckets, store.folder, files), parts) if n]
        if not buckets:
            return store.removed(np.empty((0, 2), dtype=np.int64)), _report(int(store.kept.sum()), 0, [])
        members, n_tasks = _share_out(buckets, store.folder, memory_bytes, engine.n_workers)
        decided = list(engine.map(partial(_decide, store.folder, members, settings), range(n_tasks)))
        found = store.removed(np.concatenate([np.load(record["path"]) for record in decided]))
        return found, _report(int(store.kept.sum()), sum(record["documents"] for record in decided), decided)


def _split_bands(folder: Path, n: int, settings: MinHashSettings, piece: tuple[int, int]) -> tuple[RangeFile, int]:
    """The file, and how many documents have no words."""
    store = KeyStore(folder)
    numbers, bands, rows = store.numbers(*piece), settings.bands, settings.rows
    found = _signatures(store, numbers, bands * rows)
    has_words = (found != NO_SHINGLES).any(axis=1)
    numbers, found = numbers[has_words], found[has_words]
    records = np.empty((bands, len(numbers)), dtype=_KEY)
    records["number"] = numbers
    parts = np.empty((bands, len(numbers)), dtype=np.int64)
    for band in range(bands):
        keys = band_keys(found[:, band * rows : (band + 1) * rows])
        records["key"][band] = keys
        parts[band] = band * n + range_of(keys, n)
    file = write_ranges(folder / f"bands-{piece[0]}.npy", records.reshape(-1), parts.reshape(-1), bands * n)
    return file, int((~has_words).sum())


def band_keys(band: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each row: (n, rows) uint32 to (n,) uint64."""
    keys = np.zeros(len(band), dtype=np.uint64)
    for column in range(band.shape[1]):
        keys = (keys ^ band[:, column]) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(32)
    keys *= np.uint64(0xD6E8FEB86659FD93)
    return keys ^ (keys >> np.uint64(32))


def _signatures(store: KeyStore, numbers: np.ndarray, width: int) -> np.ndarray:
    found = store.take("signatures", numbers)
    if len(found) and found.shape[1] != width:
        raise ArtifactError(
            f"{store.folders[0]}: signatures of {found.shape[1]} hashes where the recipe asks for {width}.",
            "Make them again with --from corpus.",
        )
    return found if len(found) else np.empty((0, width), dtype=np.uint32)


def _parts(files: Sequence[RangeFile], memory_bytes: int, n_workers: int) -> list[tuple[int, int]]:
    """Ranges in a row for one task each: small ones are not worth a task of their own."""
    sizes = np.diff(np.array([file.offsets for file in files]), axis=1).sum(axis=0)
    most = max(1, min(memory_bytes // (COPIES * _KEY.itemsize), max(_MIN_TASK_KEYS, int(sizes.sum()) // n_workers)))
    task = (np.cumsum(sizes) - 1) // most
    begins = np.flatnonzero(is_new(task)).tolist()
    return list(zip(begins, [*begins[1:], len(sizes)], strict=True))


def _buckets(folder: Path, files: Sequence[RangeFile], parts: tuple[int, int]) -> tuple[Path, int]:
    """The members of buckets of two and more, in a file, and how many they are."""
    found, n_before = [], 0
    for number in range(*parts):
        members = _shared(read_range(files, number))
        members["bucket"] += n_before
        n_before = int(members["bucket"][-1]) + 1 if len(members) else n_before
        found.append(members)
    members = np.concatenate(found)
    return save(folder / f"buckets-{parts[0]}.npy", members), len(members)


def _shared(records: np.ndarray) -> np.ndarray:
    """Those whose key others have too, bucket by bucket."""
    keys = records["key"]
    order = np.lexsort((records["number"], keys))
    keys, numbers = keys[order], records["number"][order]
    bucket = np.cumsum(is_new(keys)) - 1
    shared = np.bincount(bucket, minlength=1)[bucket] > 1
    members = np.empty(int(shared.sum()), dtype=_MEMBER)
    members["bucket"], members["number"] = bucket[shared], numbers[shared]
    return members


def _share_out(buckets: Sequence[Path], folder: Path, memory_bytes: int, n_workers: int) -> tuple[list[RangeFile], int]:
    """Find the components, and write every bucket to the file range of its component's task."""
    involved = _involved(buckets)
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
        files.append(write_ranges(folder / f"members-{number}.npy", records, tasks, n_tasks))
    check_count("components", int(sizes.sum()), files)
    return files, n_tasks


def _involved(buckets: Sequence[Path]) -> np.ndarray:
    """The numbers of all documents that share a bucket with another: (n_involved,) int64, rising."""
    known, waiting, n_waiting = np.empty(0, dtype=np.int64), [], 0
    for members in map(load, buckets):
        waiting.append(np.unique(members["number"]))
        n_waiting += len(waiting[-1])
        if n_waiting > max(len(known), _BUCKETS_AT_ONCE):
            known = np.unique(np.concatenate([known, *waiting]))
            waiting, n_waiting = [], 0
    return np.unique(np.concatenate([known, *waiting]))


def join(component: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Unite the sets of left[i] and right[i], for every i, in place: union-find without a loop over elements.

    Args:
        component: (n,) int64: each element's set, named by its smallest element. Begin with `arange(n)`.
        left: (m,) elements.
        right: (m,) elements.
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
    order = survival_order(store.take("lengths", numbers), store.take("ids", numbers))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    numbers = numbers[order]
    width = settings.bands * settings.rows

    def similar(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        wanted, places = np.unique(numbers[np.concatenate([left, right])], return_inverse=True)
        found = _signatures(store, wanted, width)
        equal = found[places[: len(left)]] == found[places[len(left) :]]
        # Keys of bands may be equal by chance, once in 2⁶⁴: the band itself is looked at too.
        shares_band = equal.reshape(-1, settings.bands, settings.rows).all(axis=2).any(axis=1)
        return shares_band & (equal.sum(axis=1) >= settings.min_agreement * width)

    survivor, given_up = decide(members["bucket"], rank[which], len(numbers), similar)
    gone = np.flatnonzero(survivor >= 0)
    path = save(folder / f"near-{number}.npy", np.stack([numbers[gone], numbers[survivor[gone]]], axis=1))
    sizes, counts = np.unique(np.unique(survivor[gone], return_counts=True)[1] + 1, return_counts=True)
    return {
        "path": path,
        "documents": len(numbers),
        "sizes": dict(zip(sizes.tolist(), counts.tolist(), strict=True)),
        "given_up": given_up,
    }


def survival_order(lengths: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The order in which documents are kept: the longest text, then the smallest id, then the first in order.

    Args:
        lengths: (n,) characters.
        ids: (n, 2) uint64, high half first.

    Returns:
        (n,) int64: places, the first to stay first.
    """
    return np.lexsort((ids[:, 1], ids[:, 0], -lengths))


def _report(n_documents: int, n_candidates: int, decided: Sequence[dict[str, Any]]) -> dict[str, Any]:
    sizes: dict[int, int] = {}
    for record in decided:
        for size, count in record["sizes"].items():
            sizes[size] = sizes.get(size, 0) + count
    return {
        "documents": n_documents,
        "candidates": n_candidates,
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
