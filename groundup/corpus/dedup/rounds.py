"""Which documents are kept among those that share buckets, decided in order of rank, many at a time.

In: buckets of documents that are named by their rank, 0 the first to stay. Out: for each the kept document that
removed it. One after the other, it would read:

    for document in order of rank:
        if it is not removed:
            keep it; remove every later document of its buckets that is similar to it

All documents that are the first undecided ones of every bucket they are in can be kept at once: no document that is
still undecided can remove them. A round keeps them all; random orders need about log n rounds.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

MAX_LEADERS = 256
"""A bucket is given up when so many of its documents have been kept: they share it, but not their text."""

_PAIRS_AT_ONCE = 1 << 14

Similar = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(m,) ranks and (m,) ranks to (m,) bool: are they near-duplicates?"""


def decide(bucket: np.ndarray, rank: np.ndarray, n: int, similar: Similar) -> tuple[np.ndarray, int]:
    """Decide all documents.

    Args:
        bucket: (n_members,) int64: a bucket ...
        rank: (n_members,) int64: ... and a document that is in it; no pair twice.
        n: documents; ranks are below it.
        similar: compares documents; asked only about pairs of a document that stays and a later one of its bucket.

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
        firsts = np.flatnonzero(np.concatenate([[True], bucket[1:] != bucket[:-1]]))
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
