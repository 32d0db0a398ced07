"""The corpus's books: what came in, what was left out at which step and why, what stayed."""

from __future__ import annotations

from collections import Counter
from typing import Any

from groundup.corpus.document import Document, Reason, SetAside
from groundup.errors import DataError

EXAMPLES_PER_REASON = 5
PASSED_OVER_SHOWN = 50
FILTERS = (Reason.SHORT, Reason.LANGUAGE, Reason.DUPLICATE)
"""The steps after reading, in their order; each removes for one reason."""


class Funnel:
    """Counts, with a few examples of everything left out."""

    def __init__(self) -> None:
        self.documents_in = 0
        self.documents_kept = 0
        self.bytes_in = 0
        self.bytes_kept = 0
        self.characters_kept = 0
        self.parts: Counter[str] = Counter()
        self.languages: Counter[str] = Counter()
        self._removed: Counter[Reason] = Counter()
        self._examples: dict[Reason, list[SetAside]] = {}

    def came_in(self, size_bytes: int) -> None:
        """A record, readable or not, came out of the files."""
        self.documents_in += 1
        self.bytes_in += size_bytes

    def set_aside(self, record: SetAside) -> None:
        """A record that came in was left out."""
        self._removed[record.reason] += 1
        examples = self._examples.setdefault(record.reason, [])
        if len(examples) < EXAMPLES_PER_REASON:
            examples.append(record)

    def keep(self, document: Document) -> None:
        """A document passed every filter."""
        self.documents_kept += 1
        self.bytes_kept += len(document.text.encode())
        self.characters_kept += len(document.text)

    @property
    def removed(self) -> dict[str, int]:
        """How many were left out, by reason, in the order of the steps."""
        return {reason.value: self._removed[reason] for reason in Reason if self._removed[reason]}

    @property
    def in_words(self) -> str:
        """`420 docs → 405 kept (9 language, 6 duplicate)`."""
        line = f"{self.documents_in:,} docs → {self.documents_kept:,} kept"
        removed = ", ".join(f"{count:,} {reason}" for reason, count in self.removed.items())
        return f"{line} ({removed})" if removed else line

    @property
    def faults(self) -> tuple[int, SetAside | None]:
        """How many records were broken (not merely unwanted), and the first of them."""
        reasons = [reason for reason in Reason if reason.is_fault and self._removed[reason]]
        return sum(self._removed[reason] for reason in reasons), self._examples[reasons[0]][0] if reasons else None

    def summary(self, validation_by: str) -> dict[str, Any]:
        """The stage's figures."""
        assert self.documents_in == self.documents_kept + self._removed.total(), "a document went missing"
        return {
            "documents_in": self.documents_in,
            "documents_kept": self.documents_kept,
            "documents_train": self.parts["train"],
            "documents_validation": self.parts["validation"],
            "bytes_in": self.bytes_in,
            "bytes_kept": self.bytes_kept,
            "characters_kept": self.characters_kept,
            "removed": self.removed,
            "validation_by": validation_by,
        }

    def as_json(self, n_files: int, passed_over: list[str]) -> dict[str, Any]:
        """What `funnel.json` holds: the steps with what went in and out, languages, files, examples."""
        at_reading = {reason.value: n for reason, n in self._removed.items() if reason not in FILTERS}
        left = self.documents_in - sum(at_reading.values())
        in_order = {reason.value: at_reading[reason.value] for reason in Reason if reason.value in at_reading}
        steps = [{"step": "read", "in": self.documents_in, "out": left, "removed": in_order}]
        for reason in FILTERS:
            count = self._removed[reason]
            removed = {reason.value: count} if count else {}
            steps.append({"step": reason.value, "in": left, "out": left - count, "removed": removed})
            left -= count
        return {
            "steps": steps,
            "languages": dict(sorted(self.languages.items(), key=lambda item: (-item[1], item[0]))),
            "files": {"read": n_files, "passed_over": len(passed_over), "names": passed_over[:PASSED_OVER_SHOWN]},
            "examples": {
                reason.value: [set_aside_record(record) for record in self._examples[reason]]
                for reason in Reason
                if reason in self._examples
            },
        }

    def nothing_left(self) -> DataError:
        """The error for a corpus in which no document remained: what removed how many, and the way out."""
        reason = max(Reason, key=lambda reason: self._removed[reason])
        fix = f"For example {self._examples[reason][0]}."
        if reason is Reason.LANGUAGE:
            most = self.languages.most_common(1)[0][0]
            fix = f'Most look like {most!r}: set [corpus] languages = ["{most}"], or [] to keep every language.'
        elif reason is Reason.SHORT:
            fix = f"Lower [corpus] min_characters. {fix}"
        elif reason is Reason.NO_TEXT:
            fix = f"Set [corpus] text_field to the field that holds the text. {fix}"
        elif reason is Reason.TOO_LONG:
            fix = f"Raise [corpus] max_document_mib. {fix}"
        counts = ", ".join(f"{count:,} {name}" for name, count in self.removed.items())
        return DataError(f"corpus: nothing is left of {self.documents_in:,} documents ({counts}).", fix)


def set_aside_record(record: SetAside) -> dict[str, Any]:
    """A line of `set_aside.jsonl`."""
    return {
        "source": record.source,
        "record": record.record,
        "reason": record.reason.value,
        "detail": record.detail,
        "bytes": record.size_bytes,
        "excerpt": record.excerpt,
    }
