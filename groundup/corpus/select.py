"""The second pass: which annotated documents are kept, decided by their signals alone, without reading a text.

In: the units' annotations and the recipe. Out: for every unit a code per document (0: kept, else the place of its
reason in `reasons`), and for every duplicate the id of the document that is kept instead. A document is removed by
the first step that refuses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from groundup.corpus.annotate import PREDICATE, SCORE, SIGNALS_TABLE, TOXIC
from groundup.corpus.document import Reason
from groundup.corpus.filter_statistics import KEPT, Entry
from groundup.corpus.quality.rules import Rule, first_failed, rules_for
from groundup.recipe import CorpusSettings

HISTOGRAM_BINS = 24


@dataclass
class Annotated:
    """One unit with its annotation, and what was decided about its documents.

    Attributes:
        folder: the annotation.
        record: what `unit.json` says.
        first_number: records of the same file in the units before it.
        codes: (n,) int16, 0 for documents that stay, else the place of the reason.
        survivors: for duplicates, (row, id of the document kept).
    """

    folder: Path
    record: dict[str, Any]
    first_number: int = 0
    codes: np.ndarray = field(default_factory=lambda: np.empty(0, np.int16))
    survivors: dict[int, str] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Documents."""
        return int(self.record["documents"])

    @property
    def stays(self) -> np.ndarray:
        """(n,) bool: which documents have not been removed yet."""
        return self.codes == 0

    def columns(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Columns of the signals' table: (n,) by name."""
        import pyarrow.parquet as pq

        if not self.n:
            return {name: np.empty(0) for name in names}
        table = pq.read_table(self.folder / SIGNALS_TABLE, columns=list(names))
        return {name: table[name].to_numpy() for name in names}

    def remove(self, rows: np.ndarray, code: int) -> None:
        """Mark documents that still stay as removed."""
        assert (self.codes[rows] == 0).all(), "a document was removed twice"
        self.codes[rows] = code


class Selection:
    """The decisions of a recipe's `[corpus]`."""

    def __init__(self, settings: CorpusSettings) -> None:
        self.settings = settings
        self.rules: list[Rule] = rules_for(settings.quality, settings.thresholds, settings.languages)
        rule_names = [rule.name for rule in self.rules]
        self.reasons: list[str] = [
            KEPT, Reason.SHORT, Reason.LANGUAGE, *rule_names, Reason.PREDICATE, Reason.CLASSIFIER, Reason.TOXIC,
            Reason.DUPLICATE, Reason.NEAR_DUPLICATE, Reason.REPEATED_PARTS, Reason.CONTAMINATED,
        ]  # fmt: skip
        self._histograms: dict[str, np.ndarray] = {}

    def judge(self, unit: Annotated) -> None:
        """Apply every rule that looks at one document alone."""
        settings, reasons = self.settings, self.reasons
        unit.codes = np.zeros(unit.n, dtype=np.int16)
        unit.survivors = {}
        columns = unit.columns(["language", "language_score", "characters", *self._extra, *self._rule_signals])
        refusals: list[tuple[str, np.ndarray]] = [(Reason.SHORT, columns["characters"] < settings.min_characters)]
        languages = columns["language"].astype(str)
        if settings.languages:
            is_other = ~np.isin(languages, settings.languages)
            refusals.append((Reason.LANGUAGE, is_other | (columns["language_score"] < settings.language_floor)))
        failed = first_failed(columns, self.rules, languages) if self.rules else np.full(unit.n, -1)
        refusals += [(rule.name, failed == place) for place, rule in enumerate(self.rules)]
        if PREDICATE in columns:
            refusals.append((Reason.PREDICATE, ~columns[PREDICATE].astype(bool)))
        if SCORE in columns and settings.classifier is not None:
            refusals.append((Reason.CLASSIFIER, columns[SCORE] < settings.classifier.min_score))
        if TOXIC in columns:
            refusals.append((Reason.TOXIC, columns[TOXIC] > settings.max_toxic_share))
        for reason, refused in refusals:
            unit.remove(np.flatnonzero(refused & unit.stays), reasons.index(reason))
        for name in ("language_score", "characters", *self._rule_signals, *(x for x in self._extra if x != PREDICATE)):
            self._count(name, columns[name])

    def entries(self, unit: Annotated) -> list[Entry]:
        """The unit's documents by (reason, source, language), with their bytes."""
        import pyarrow.parquet as pq

        if not unit.n:
            return []
        table = pq.read_table(unit.folder / SIGNALS_TABLE, columns=["source", "language", "bytes"])
        groups = table.append_column("code", [unit.codes]).group_by(["code", "source", "language"], use_threads=False)
        found = groups.aggregate([("bytes", "count"), ("bytes", "sum")]).to_pydict()
        reasons = [str(self.reasons[code]) for code in found["code"]]
        columns = (found[name] for name in ("source", "language", "bytes_count", "bytes_sum"))
        return list(zip(reasons, *columns, strict=True))

    @property
    def histograms(self) -> dict[str, Any]:
        """How every signal is distributed over all documents, with the threshold that cuts it."""
        limits = {rule.signal: {"rule": rule.name, "least": rule.least, "most": rule.most} for rule in self.rules}
        return {
            name: {"edges": [float(edge) for edge in _edges(name)], "counts": counts.tolist(), **limits.get(name, {})}
            for name, counts in sorted(self._histograms.items())
        }

    @cached_property
    def _rule_signals(self) -> list[str]:
        return sorted({rule.signal for rule in self.rules})

    @cached_property
    def _extra(self) -> list[str]:
        settings = self.settings
        asked = ((PREDICATE, settings.predicate), (SCORE, settings.classifier), (TOXIC, settings.toxic_words))
        return [name for name, is_asked in asked if is_asked]

    def _count(self, name: str, values: np.ndarray) -> None:
        edges = _edges(name)
        values = values[~np.isnan(values)]
        counts = np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges)[0]
        self._histograms[name] = self._histograms.get(name, 0) + counts


def _edges(name: str) -> np.ndarray:
    """Bins: equal ones for shares and scores, equal ratios for counts."""
    if name in ("characters", "words", "sentences"):
        return np.concatenate([[0.0], np.geomspace(1, 1e7, HISTOGRAM_BINS)])
    if name == "mean_word_length":
        return np.linspace(0, 24, HISTOGRAM_BINS + 1)
    if name == "stop_words":
        return np.arange(10.0)
    return np.linspace(0, 1, HISTOGRAM_BINS + 1)
