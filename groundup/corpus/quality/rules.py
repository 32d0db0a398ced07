"""Which texts are good enough: published rules, each a named threshold on one signal, in presets.

In: a recipe's `quality` and `thresholds`, and the columns of `signals`. Out: for each text the first rule that it
fails. The rules, their thresholds and where they were published are data: `groundup/data/rules.toml`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundup.errors import Problem, RecipeError
from groundup.files import read_shipped

NONE = "none"


@dataclass(frozen=True)
class Rule:
    """One threshold; a text is kept whose signal is at least `least` and at most `most`.

    Attributes:
        name: as in a recipe, such as "gopher.min_words".
        signal: a name out of `signals.SIGNALS`.
        source: where it was published.
        least: the least value that is kept, or None.
        most: the greatest value that is kept, or None.
        languages: the only languages whose documents it judges; none: any.
        not_languages: languages whose documents it does not judge.
        why: why it means nothing in other languages.
    """

    name: str
    signal: str
    source: str
    least: float | None = None
    most: float | None = None
    languages: Sequence[str] = ()
    not_languages: Sequence[str] = ()
    why: str = ""

    @property
    def threshold(self) -> float:
        """The one of `least` and `most` that it has."""
        return self.most if self.least is None else self.least  # type: ignore[return-value]

    def with_threshold(self, threshold: float) -> Rule:
        """The same rule with another threshold."""
        return replace(self, most=threshold) if self.least is None else replace(self, least=threshold)

    def keeps(self, values: NDArray[Any]) -> NDArray[np.bool_]:
        """(n,) which values pass."""
        limit = np.float32(self.threshold)  # as the columns: 0.1 must not differ from 0.1
        return np.asarray(values <= limit if self.least is None else values >= limit, dtype=np.bool_)

    def judges(self, language: str) -> bool:
        """Whether it means anything in this language."""
        return language not in self.not_languages and (not self.languages or language in self.languages)

    def __str__(self) -> str:
        return f"{self.name}: {self.signal} {'<=' if self.least is None else '>='} {self.threshold:g}"


def all_rules() -> dict[str, Rule]:
    """Every rule by name, in the order in which they are tried."""
    return {record["name"]: Rule(**record) for record in read_shipped("rules")["rules"]}


def rules_for(
    quality: Collection[str], thresholds: Mapping[str, float | bool], languages: Collection[str] = ()
) -> list[Rule]:
    """The rules that a recipe asks for, in the order in which they are tried.

    Args:
        quality: presets; "none" stands for none.
        thresholds: by rule: another threshold, False (off) or True (on, as published). A number or True also
            switches on a rule that is in none of the presets.
        languages: those of the documents that are kept; none: any. Rules of the presets that judge none of them are
            left out (`left_out`).

    Raises:
        RecipeError: with all the presets and thresholds that do not exist or make no sense.
    """
    rules = all_rules()
    if problems := list(_problems(quality, thresholds, rules, languages)):
        raise RecipeError("[corpus]", problems)
    chosen = []
    for name, rule in rules.items():
        threshold = thresholds.get(name, _in_presets(name, quality) and _means_something(rule, languages))
        if threshold is True:
            chosen.append(rule)
        elif threshold is not False:
            chosen.append(rule.with_threshold(float(threshold)))
    return chosen


def left_out(
    quality: Collection[str], thresholds: Mapping[str, float | bool], languages: Collection[str]
) -> list[Rule]:
    """The rules of the presets that mean nothing in any of the languages: each says `why`."""
    return [
        rule
        for name, rule in all_rules().items()
        if name not in thresholds and _in_presets(name, quality) and not _means_something(rule, languages)
    ]


def first_failed(
    signals: Mapping[str, NDArray[Any]], rules: Sequence[Rule], languages: Sequence[str] | NDArray[Any] | None = None
) -> NDArray[np.int16]:
    """(n,) the index of the first rule that each text fails, -1 for those that pass them all.

    With `languages`, one of each text, rules do not judge the languages in which they mean nothing.
    """
    n = max((len(column) for column in signals.values()), default=0)
    failed = np.full(n, -1, dtype=np.int16)
    codes, which = np.unique([] if languages is None else languages, return_inverse=True)
    for index in reversed(range(len(rules))):
        fails = ~rules[index].keeps(signals[rules[index].signal])
        if languages is not None:
            fails &= np.array([rules[index].judges(str(code)) for code in codes], dtype=np.bool_)[which]
        failed[fails] = index
    return failed


def _in_presets(name: str, quality: Collection[str]) -> bool:
    return name.startswith(
        tuple(start for one in quality if one != NONE for start in read_shipped("rules")["presets"][one])
    )


def _means_something(rule: Rule, languages: Collection[str]) -> bool:
    return not languages or any(map(rule.judges, languages))


def _problems(
    quality: Collection[str],
    thresholds: Mapping[str, float | bool],
    rules: Mapping[str, Rule],
    languages: Collection[str],
) -> Iterator[Problem]:
    known = [NONE, *read_shipped("rules")["presets"]]
    for name in quality:
        if name not in known:
            yield Problem(f"quality = {name!r}", "no such preset.", _nearest(name, known))
    if NONE in quality and len(quality) > 1:
        yield Problem(f"quality = {list(quality)}", '"none" stands alone.', "Leave it out, or the others.")
    for name, threshold in thresholds.items():
        where = f'thresholds."{name}" = {str(threshold).lower() if isinstance(threshold, bool) else threshold}'
        if name not in rules:
            yield Problem(where, "no such rule.", _nearest(name, list(rules)))
        elif not isinstance(threshold, bool) and not (math.isfinite(threshold) and threshold >= 0):
            yield Problem(where, "not a number from 0 on.", f"As published: {rules[name].threshold:g}.")
        elif threshold is not False and not _means_something(rules[name], languages):
            what = f"{rules[name].why}, and languages = {list(languages)}."
            yield Problem(where, what, "Leave it out, or write false.")


def _nearest(name: str, known: Sequence[str]) -> str:
    """The nearest spelling, else a rule whose last part is alike, else all there is (if it is little)."""
    near = difflib.get_close_matches(name, known, n=1) or [one for one in known if one.split(".")[-1] == name][:1]
    if near:
        return f"Did you mean {near[0]!r}?"
    return f"There are: {', '.join(known)}." if len(known) < 10 else "groundup/data/rules.toml lists them."
