"""Filter statistics: how many documents came in, how many each step removed and why, how many were kept.

Every document is counted under (reason, source, language) with its bytes. At every step the documents that came in
are those kept plus those removed; a step that breaks this stops the stage.
"""

from __future__ import annotations

import bisect
import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from groundup.corpus.document import Reason, SetAside, is_fault
from groundup.errors import DataError, GroundupError

EXAMPLES_PER_REASON = 20
SOURCES_SHOWN = 200
PASSED_OVER_SHOWN = 50
KEPT = "kept"
QUALITY = "quality"
FILTER_STEPS = (
    Reason.SHORT, Reason.LANGUAGE, QUALITY, Reason.PREDICATE, Reason.CLASSIFIER, Reason.TOXIC, Reason.DUPLICATE,
    Reason.NEAR_DUPLICATE, Reason.REPEATED_PARTS, Reason.CONTAMINATED, Reason.MIX,
)  # fmt: skip
"""The steps after reading, in their order; `quality` stands for all rules."""

Entry = tuple[str, str, str, int, int]
"""(reason or "kept", source, language, documents, bytes)."""


class FilterStatistics:
    """Counts, with examples of everything that was removed."""

    def __init__(self) -> None:
        self.documents_in = 0
        self.bytes_in = 0
        self.changed: Counter[str] = Counter()
        self.findings: dict[str, list[str]] = {}
        self.documents_written: Counter[str] = Counter()
        self.characters_kept = 0
        self._documents: Counter[tuple[str, str, str]] = Counter()
        self._bytes: Counter[tuple[str, str, str]] = Counter()
        self._examples: dict[str, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
        self._first_fault: SetAside | None = None

    def add_input(self, documents: int, size_bytes: int) -> None:
        """Count records of the files, readable or not."""
        self.documents_in += documents
        self.bytes_in += size_bytes

    def add(self, entries: Iterable[Entry]) -> None:
        """Count documents that were kept ("kept") or removed, by reason."""
        for reason, source, language, documents, size_bytes in entries:
            self._documents[reason, source, language] += documents
            self._bytes[reason, source, language] += size_bytes

    def clear_kept(self) -> None:
        """Forget the documents kept so far: the last pass counts them again, after the steps that read their texts."""
        for counts in (self._documents, self._bytes):
            for key in [key for key in counts if key[0] == KEPT]:
                del counts[key]

    def remove_kept(self, entries: Iterable[Entry]) -> None:
        """Count documents as removed that were counted as kept."""
        for reason, source, language, documents, size_bytes in entries:
            for key, sign in (((KEPT, source, language), -1), ((reason, source, language), 1)):
                self._documents[key] += sign * documents
                self._bytes[key] += sign * size_bytes

    @property
    def bytes_by_source(self) -> dict[str, int]:
        """UTF-8 bytes of the documents kept, by source."""
        return dict(sorted(_sums({key: size for key, size in self._bytes.items() if key[0] == KEPT}, 1).items()))

    def add_example(self, key: str, record: SetAside) -> None:
        """Take note of a removed document, with a random key: those with the smallest keys are shown. The first broken
        one is named in the warning."""
        examples = self._examples[record.reason]
        if len(examples) < EXAMPLES_PER_REASON or key < examples[-1][0]:
            bisect.insort(examples, (key, set_aside_record(record)), key=itemgetter(0))
            del examples[EXAMPLES_PER_REASON:]
        if self._first_fault is None and is_fault(record.reason):
            self._first_fault = record

    def merge(self, other: FilterStatistics) -> None:
        """Add what was counted of other documents."""
        self.characters_kept += other.characters_kept
        self.changed.update(other.changed)
        self._documents.update(other._documents)
        self._bytes.update(other._bytes)
        for reason, examples in other._examples.items():
            both = [*self._examples[reason], *examples]
            self._examples[reason] = heapq.nsmallest(EXAMPLES_PER_REASON, both, key=itemgetter(0))
        self._first_fault = self._first_fault or other._first_fault

    def check(self, step: str) -> None:
        """Check after a step that the documents kept and removed are those that came in, or raise GroundupError."""
        counted = sum(self._documents.values())
        if counted != self.documents_in:
            raise GroundupError(
                f"corpus: after the step {step!r} {counted:,} documents are counted as kept or removed, and "
                f"{self.documents_in:,} came in.",
                "This is an error in groundup: nothing was written. Please report it with the recipe.",
            )

    @property
    def documents_kept(self) -> int:
        """How many."""
        return _sums(self._documents, 0)[KEPT]

    @property
    def bytes_kept(self) -> int:
        """UTF-8 bytes of the documents kept."""
        return _sums(self._bytes, 0)[KEPT]

    @property
    def removed(self) -> dict[str, int]:
        """How many were removed, by reason, in the order of the steps."""
        counts = _sums(self._documents, 0)
        return {reason: counts[reason] for reason in sorted(counts.keys() - {KEPT}, key=_place) if counts[reason]}

    @property
    def languages(self) -> dict[str, int]:
        """Documents by language, most first; those that could not be read have none."""
        counts = _sums(self._documents, 2)
        return dict(sorted(((code, n) for code, n in counts.items() if code), key=lambda item: (-item[1], item[0])))

    @property
    def in_words(self) -> str:
        """`420 docs → 405 kept (9 language, 6 duplicate)`; rules are summed up as `quality`."""
        line = f"{self.documents_in:,} docs → {self.documents_kept:,} kept"
        summed: Counter[str] = Counter()
        for reason, count in self.removed.items():
            summed[_step(reason) if _step(reason) == QUALITY else reason] += count
        removed = ", ".join(f"{count:,} {reason}" for reason, count in summed.items())
        return f"{line} ({removed})" if removed else line

    @property
    def faults(self) -> tuple[int, SetAside | None]:
        """How many records were broken (not merely unwanted), and the first of them."""
        return sum(count for reason, count in self.removed.items() if is_fault(reason)), self._first_fault

    def summary(self, validation_by: str) -> dict[str, Any]:
        """The stage's figures."""
        return {
            "documents_in": self.documents_in, "documents_kept": self.documents_kept,
            "documents_train": self.documents_written["train"],
            "documents_validation": self.documents_written["validation"],
            "bytes_in": self.bytes_in, "bytes_kept": self.bytes_kept, "characters_kept": self.characters_kept,
            "removed": self.removed, "validation_by": validation_by,
        }  # fmt: skip

    def as_json(self, files: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
        """What `filter_statistics.json` holds: steps with documents in and out, sources, languages, files, examples."""
        return {
            "steps": self._steps(), "languages": self.languages, "by_language": self._table(2),
            "by_source": self._table(1), "changed": dict(sorted(self.changed.items())), "private": self.findings,
            "files": dict(files), **more,
            "examples": {
                reason: [record for _, record in self._examples[reason]]
                for reason in sorted(self._examples, key=_place)
                if self._examples[reason]
            },
        }  # fmt: skip

    def nothing_left(self) -> DataError:
        """The error for a corpus in which no document remained: what removed most of those in a wanted language."""
        removed = self.removed
        # Documents that got past reading and the language filter count first.
        of_wanted = {key: n for key, n in self._documents.items() if key[2] and key[0] != Reason.LANGUAGE}
        counted = +_sums(of_wanted, 0) or removed
        reason = max(counted, key=lambda name: (counted[name], -list(removed).index(name)))
        example = self._examples[reason][0][1] if self._examples[reason] else None
        fix = f"For example {_in_words(example)}." if example else ""
        if reason == Reason.LANGUAGE:
            most = next(iter(self.languages))
            fix = f'Most look like {most!r}: set [corpus] languages = ["{most}"], or [] to keep every language.'
        elif _step(reason) == QUALITY:
            fix = f'Set "{reason}" in [corpus.thresholds], or [corpus] quality = "none". {fix}'
        elif reason in _FIXES:
            fix = f"{_FIXES[reason]}. {fix}"
        counts = ", ".join(f"{count:,} {name}" for name, count in removed.items())
        return DataError(f"corpus: nothing is left of {self.documents_in:,} documents ({counts}).", fix or None)

    def _steps(self) -> list[dict[str, Any]]:
        documents, sizes = _sums(self._documents, 0), _sums(self._bytes, 0)
        by_step: dict[str, list[str]] = defaultdict(list)
        for reason in sorted(documents, key=_place):
            if reason != KEPT and documents[reason]:
                by_step[_step(reason)].append(reason)
        left, bytes_left = self.documents_in, sum(sizes.values())
        steps = []
        for step in ("read", *map(str, FILTER_STEPS)):
            removed = {reason: documents[reason] for reason in by_step[step]}
            n_out, bytes_out = sum(removed.values()), sum(sizes[reason] for reason in by_step[step])
            row = {"step": step, "in": left, "out": left - n_out, "removed": removed, "bytes_in": bytes_left}
            left, bytes_left = left - n_out, bytes_left - bytes_out
            steps.append({**row, "bytes_out": bytes_left})
        if left != self.documents_kept:
            raise GroundupError(f"corpus: the steps leave {left:,} documents, {self.documents_kept:,} were kept.")
        return steps

    def _table(self, column: int) -> dict[str, dict[str, Any]]:
        """For each source or language: documents in and kept, bytes kept, removed by reason; the largest ones."""
        rows: dict[str, dict[str, Any]] = {}
        for key, count in self._documents.items():
            if not key[column]:
                continue
            row = rows.setdefault(key[column], {"in": 0, "kept": 0, "bytes_kept": 0, "removed": Counter()})
            row["in"] += count
            if key[0] == KEPT:
                row["kept"] += count
                row["bytes_kept"] += self._bytes[key]
            else:
                row["removed"][key[0]] += count
        order = sorted(rows, key=lambda name: (-rows[name]["in"], name))[:SOURCES_SHOWN]
        for row in rows.values():
            row["removed"] = {reason: row["removed"][reason] for reason in sorted(row["removed"], key=_place)}
        return {name: rows[name] for name in order}


def set_aside_record(record: SetAside) -> dict[str, Any]:
    """A line of `set_aside.jsonl`."""
    return {
        "source": record.source, "record": record.record, "reason": str(record.reason), "detail": record.detail,
        "bytes": record.size_bytes, "excerpt": record.excerpt,
    }  # fmt: skip


def _sums(counts: Mapping[tuple[str, str, str], int], column: int) -> Counter[str]:
    """Counts added up by reason (column 0), source (1) or language (2)."""
    sums: Counter[str] = Counter()
    for key, count in counts.items():
        sums[key[column]] += count
    return sums


_REASONS: Sequence[str] = [str(reason) for reason in Reason]
_FIXES: dict[str, str] = {
    Reason.SHORT: "Lower [corpus] min_characters",
    Reason.NO_TEXT: "Set [corpus] text_field to the field that holds the text",
    Reason.TOO_LONG: "Raise [corpus] max_document_mib",
}


def _step(reason: str) -> str:
    """The step that removes for this reason: reading's faults belong to "read", rules' names to "quality"."""
    if reason in FILTER_STEPS:
        return reason
    return "read" if reason in _REASONS else QUALITY


def _place(reason: str) -> tuple[int, int, str]:
    step = _step(reason)
    if step == "read":
        return 0, _REASONS.index(reason), ""
    return 1 + FILTER_STEPS.index(step), 0, reason


def _in_words(example: Mapping[str, Any]) -> str:
    where = f"{example['source']}, {example['record']}" if example["record"] else example["source"]
    return f"{where}: {example['reason']}" + (f": {example['detail']}" if example["detail"] else "")
