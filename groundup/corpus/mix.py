"""How much of every source the corpus takes: shares or tokens asked for by name, turned into a factor for each source.

In: the bytes of every source and what is asked for. Out: a factor for each source: below 1 that share of its
documents is kept, above 1 they are repeated. Which documents those are is decided by their ids alone.

With shares the total follows a rule. It is the largest that repeats nothing, so the source that is scarcest for its
share stays whole and the others are thinned. If that would keep less than half of the text, the total is half of the
text and scarce sources are repeated, at most four times: up to there repeated text is worth nearly as much as new text
(Muennighoff et al. 2023, "Scaling Data-Constrained Language Models", section 6).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import PurePath
from typing import Literal

import xxhash

from groundup.errors import DataError

MOST_REPEATS = 4.0
LEAST_KEPT_SHARE = 0.5
MIX_SEED = 21  # another than that of the hold-out, so that thinning says nothing about the split
_SHOWN_NAMES = 5


def plan_mix(bytes_by_source: Mapping[str, int], weights: Mapping[str, float]) -> dict[str, float]:
    """The factor by which every source is thinned or repeated, in the order of `bytes_by_source`.

    Args:
        bytes_by_source: bytes of text of each.
        weights: shares of the result, by a pattern (as in a shell: `*`, `?`, `[a-z]`) of the whole name of a source
            or of its last part (the file's name). The first pattern that fits counts. Sources that share a pattern
            keep their proportions. Shares are taken relative to their sum; 0 drops a source.

    Raises:
        DataError: a source that no pattern fits, a pattern that fits no text, a share that is not a number of at
            least 0, or no share above 0.
    """
    _check(weights)
    pattern_of, available = _available("mix", bytes_by_source, weights)
    whole = math.fsum(weights.values())
    share = {pattern: weight / whole for pattern, weight in weights.items()}
    wanted = [pattern for pattern in share if share[pattern] > 0]
    without_repeats = min(available[pattern] / share[pattern] for pattern in wanted)
    half = LEAST_KEPT_SHARE * sum(available[pattern] for pattern in wanted)
    total = min(max(without_repeats, half), MOST_REPEATS * without_repeats)
    factors = {
        pattern: share[pattern] * total / available[pattern] if available[pattern] else 0.0 for pattern in weights
    }
    return {source: factors[pattern] for source, pattern in pattern_of.items()}


def plan_tokens(
    bytes_by_source: Mapping[str, int], tokens: Mapping[str, float | Literal["all"]], bytes_per_token: float
) -> dict[str, float]:
    """The factor by which every source is thinned or repeated, so that it comes to so many tokens, by pattern as in
    `plan_mix`; "all": what there is, once.

    Raises:
        DataError: as `plan_mix`; or a source would have to be repeated more than four times.
    """
    amounts = {pattern: math.inf if wanted == "all" else wanted for pattern, wanted in tokens.items()}
    _check(amounts, "mix_tokens", may_be_infinite=True)
    pattern_of, available = _available("mix_tokens", bytes_by_source, amounts)
    factors = {}
    for pattern, wanted in amounts.items():
        has = available[pattern] / bytes_per_token
        factors[pattern] = 1.0 if math.isinf(wanted) else wanted / has if has else 0.0
        if factors[pattern] > MOST_REPEATS:
            raise DataError(
                f"[corpus] mix_tokens: {pattern!r} = {wanted:,.0f}, but its text has about {has:,.0f} tokens, and more "
                f"than {MOST_REPEATS:.0f} times the same text teaches nothing.",
                f"Ask for at most {has * MOST_REPEATS:,.0f}, or add text.",
            )
    return {source: factors[pattern] for source, pattern in pattern_of.items()}


def copies_of(document_id: str, factor: float) -> int:
    """How often a document is in the mix: 0 or more times.

    The whole part of `factor`, and once more where the id's hash falls below its fraction: the same for the same
    id whatever the order, and a document kept at a factor is kept at every larger one.
    """
    whole = math.floor(factor)
    value = xxhash.xxh3_64_intdigest(document_id.encode(), seed=MIX_SEED)
    return whole + (value < int((factor - whole) * 2**64))


def _available(
    setting: str, bytes_by_source: Mapping[str, int], wanted: Mapping[str, float]
) -> tuple[dict[str, str], dict[str, int]]:
    """Each source's pattern, and the bytes that each pattern has."""
    pattern_of = {source: _pattern_for(source, wanted) for source in bytes_by_source}
    unmatched = [source for source, pattern in pattern_of.items() if pattern is None]
    if unmatched:
        raise DataError(
            f"[corpus] {setting}: no share is given for {_listed(unmatched)}.",
            'Name it, or give the rest a share with "*" (0 drops it).',
        )
    available = dict.fromkeys(wanted, 0)
    for source, n_bytes in bytes_by_source.items():
        available[str(pattern_of[source])] += n_bytes
    empty = [pattern for pattern, amount in wanted.items() if amount > 0 and not available[pattern]]
    if empty:
        raise DataError(
            f"[corpus] {setting}: no text comes from {_listed(empty)}.",
            f"Sources are: {_listed(sorted(bytes_by_source))}. The first pattern that fits a source counts.",
        )
    return {source: str(pattern) for source, pattern in pattern_of.items()}, available


def _check(wanted: Mapping[str, float], setting: str = "mix", may_be_infinite: bool = False) -> None:
    for pattern, amount in wanted.items():
        if not (amount >= 0 and (may_be_infinite or math.isfinite(amount))):
            what = "a share" if setting == "mix" else "a count of tokens"
            raise DataError(f"[corpus] {setting}: {pattern!r} = {amount}: {what} is a number of at least 0.")
    if not any(wanted.values()):
        what = "share" if setting == "mix" else "count of tokens"
        raise DataError(
            f"[corpus] {setting}: no {what} is above 0.", f'Give at least one, such as {setting} = {{ "*" = 1.0 }}.'
        )


def _pattern_for(source: str, weights: Mapping[str, float]) -> str | None:
    names = (source, PurePath(source).name)
    return next((pattern for pattern in weights if any(fnmatchcase(name, pattern) for name in names)), None)


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_SHOWN_NAMES])
    return shown if len(names) <= _SHOWN_NAMES else f"{shown} and {len(names) - _SHOWN_NAMES} more"
