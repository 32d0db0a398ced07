"""Covering arrays: few rows in which every two values of any two parameters meet at least once.

A greedy one-row-at-a-time construction (Cohen, Dalal, Fredman and Patton 1997, the AETG system): a row begins with a
pair not met yet, and every other parameter takes the value that meets most new pairs with what the row has.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from lengths import IS_LONG

Pair = frozenset[tuple[str, int]]


def pairwise_rows(parameters: Mapping[str, Sequence[object]]) -> list[dict[str, int]]:
    """Rows of value numbers by parameter, the same for the same parameters.

    Args:
        parameters: at least two, each with its values.
    """
    missing = all_pairs(parameters)
    rows = []
    while missing:
        # The parameters with the most values first: they decide how many rows there must be.
        row = dict(min(missing, key=lambda pair: sorted(pair)))
        for name in sorted(set(parameters) - set(row), key=lambda name: (-len(parameters[name]), name)):
            row[name] = max(
                range(len(parameters[name])),
                key=lambda value: (
                    sum(frozenset({(name, value), one}) in missing for one in row.items()),
                    sum((name, value) in pair for pair in missing),
                ),
            )
        missing -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
        rows.append(row)
    return rows


def all_pairs(parameters: Mapping[str, Sequence[object]]) -> set[Pair]:
    """Every two values of every two parameters."""
    return {
        frozenset({(one, a), (other, b)})
        for one, other in itertools.combinations(parameters, 2)
        for a in range(len(parameters[one]))
        for b in range(len(parameters[other]))
    }


def pairwise(*parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows of values in which every two meet; in `make test-long` every row there is."""
    if IS_LONG:
        return list(itertools.product(*parameters))
    named = {f"{place:03}": values for place, values in enumerate(parameters)}
    return [tuple(named[name][row[name]] for name in named) for row in pairwise_rows(named)]
