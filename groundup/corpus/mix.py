"""How much of every source the corpus takes: shares asked for by name, turned into a factor for each source.

In: the bytes of every source and the shares asked for. Out: a factor for each source: below 1 that share of its
documents is kept, above 1 they are repeated. Which documents those are is decided by their ids alone.

The total follows a rule. It is the largest that repeats nothing, so the source that is scarcest for its share
stays whole and the others are thinned. If that would keep less than half of the text, the total is half of the
text and scarce sources are repeated, at most four times: up to there repeated text is worth nearly as much as
new text (Muennighoff et al. 2023, "Scaling Data-Constrained Language Models", section 6).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import PurePath

import xxhash

from groundup.errors import DataError

MOST_REPEATS = 4.0
LEAST_KEPT_SHARE = 0.5
MIX_SEED = 21  # another than that of the hold-out, so that thinning says nothing about the split
_SHOWN_NAMES = 5


def plan_mix(bytes_by_source: Mapping[str, int], weights: Mapping[str, float]) -> dict[str, float]:
    """The factor by which every source is thinned or repeated.

    Args:
        bytes_by_source: bytes of text that each source has.
        weights: shares of the result, by a pattern (as in a shell: `*`, `?`, `[a-z]`) of the whole name of a source
            or of its last part (the file's name). The first pattern that fits counts. Sources that share a pattern
            keep their proportions. Shares are taken relative to their sum; 0 drops a source.

    Returns:
        A factor for each source, in the order of `bytes_by_source`.

    Raises:
        DataError: a source that no pattern fits, a pattern that fits no text, a share that is not a number of at
            least 0, or no share above 0.
    """
    _check(weights)
    pattern_of = {source: _pattern_for(source, weights) for source in bytes_by_source}
    unmatched = [source for source, pattern in pattern_of.items() if pattern is None]
    if unmatched:
        raise DataError(
            f"[corpus] mix: no share is given for {_listed(unmatched)}.",
            'Name it, or give the rest a share with "*" (0 drops it).',
        )
    available = dict.fromkeys(weights, 0)
    for source, n_bytes in bytes_by_source.items():
        available[str(pattern_of[source])] += n_bytes
    empty = [pattern for pattern, weight in weights.items() if weight > 0 and not available[pattern]]
    if empty:
        raise DataError(
            f"[corpus] mix: no text comes from {_listed(empty)}.",
            f"Sources are: {_listed(sorted(bytes_by_source))}. The first pattern that fits a source counts.",
        )
    whole = math.fsum(weights.values())
    share = {pattern: weight / whole for pattern, weight in weights.items()}
    total = _total(available, share)
    factors = {
        pattern: share[pattern] * total / available[pattern] if available[pattern] else 0.0 for pattern in weights
    }
    return {source: factors[str(pattern)] for source, pattern in pattern_of.items()}


def copies_of(document_id: str, factor: float) -> int:
    """How often a document is in the mix: 0 or more times.

    The whole part of `factor`, and once more where the id's hash falls below its fraction: the same for the same
    id whatever the order, and a document kept at a factor is kept at every larger one.
    """
    whole = math.floor(factor)
    value = xxhash.xxh3_64_intdigest(document_id.encode(), seed=MIX_SEED)
    return whole + (value < int((factor - whole) * 2**64))


def _total(available: Mapping[str, int], share: Mapping[str, float]) -> float:
    """Bytes of the result: see the rule at the top of the file."""
    wanted = [pattern for pattern in share if share[pattern] > 0]
    without_repeats = min(available[pattern] / share[pattern] for pattern in wanted)
    half = LEAST_KEPT_SHARE * sum(available[pattern] for pattern in wanted)
    return min(max(without_repeats, half), MOST_REPEATS * without_repeats)


def _check(weights: Mapping[str, float]) -> None:
    for pattern, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise DataError(f"[corpus] mix: {pattern!r} = {weight}: a share is a number of at least 0.")
    if not any(weights.values()):
        raise DataError("[corpus] mix: no share is above 0.", 'Give at least one, such as mix = { "*" = 1.0 }.')


def _pattern_for(source: str, weights: Mapping[str, float]) -> str | None:
    last = PurePath(source).name
    fitting = (pattern for pattern in weights if fnmatchcase(source, pattern) or fnmatchcase(last, pattern))
    return next(fitting, None)


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_SHOWN_NAMES])
    return shown if len(names) <= _SHOWN_NAMES else f"{shown} and {len(names) - _SHOWN_NAMES} more"
