"""Evaluation data as decontamination sees it: every string of every record, whatever the fields are called.

In: what the corpus room reads, but for pages and archives. Out: tasks, a file each, and for each the strings of its
records. A record of a text file is a paragraph. A file that cannot be read to its end is refused: what it holds would
stay in the corpus.
"""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from groundup.corpus.document import Reason, SetAside
from groundup.corpus.reading.intake import limit_bytes
from groundup.corpus.reading.sources import InputFile, find_sources
from groundup.corpus.reading.values import read_values, strings_of
from groundup.errors import DataError
from groundup.recipe import CorpusSettings
from groundup.untrusted import reading

_FILES = "[corpus.decontaminate] files"
_SPLIT_NAMES = re.compile(r"(?:test|train|dev|val|valid|validation|data|eval)(?:[-_.]|$)", re.IGNORECASE)
_PLAIN = CorpusSettings(text_field="")
_FIX = "Repair the file, or take it off the list: the part that cannot be read would stay in the corpus."


@dataclass(frozen=True)
class EvaluationTask:
    """One file of evaluation data.

    Attributes:
        name: the file's name without its endings; with its folder's, where that says more ("gsm8k/test").
        source: the file.
    """

    name: str
    source: InputFile

    def records(self) -> Iterator[tuple[int, list[str]]]:
        """Number (from 1 on: a line, row or paragraph) and strings of each record.

        Raises:
            DataError: the file cannot be read, or not as what its name says.
        """
        if self.source.kind == "text":
            yield from self._paragraphs()
            return
        for value in read_values(self.source, _PLAIN, _refuse):
            yield value.number, list(strings_of(value.data))

    def _paragraphs(self) -> Iterator[tuple[int, list[str]]]:
        with reading(f"{_FILES}: {self.source.label}", DataError, _FIX), self.source.open() as handle:
            lines = (line.decode() for line in iter(lambda: handle.readline(limit_bytes(_PLAIN)), b""))
            solid = (group for is_solid, group in itertools.groupby(lines, lambda line: bool(line.strip())) if is_solid)
            for number, group in enumerate(solid, start=1):
                yield number, ["".join(group)]


def find_tasks(files: Sequence[str | Path]) -> list[EvaluationTask]:
    """The evaluation files that paths, folders and globs name, each once, by name.

    A text file that was found, not named, counts only if no other data lies beside or below it: beside tables texts are
    notes and licences.

    Raises:
        DataError: something that is not there, or of a kind that is not read.
    """
    found = [source for name in files for source in find_sources([name], setting=_FILES).files]
    named = {str(Path(name).expanduser()) for name in files}
    tables = {str(source.entry) for source in found if source.kind in ("lines", "json", "separated", "table")}

    def counts(source: InputFile) -> bool:
        path = str(source.entry)
        folder = os.path.join(os.path.dirname(path), "")
        is_text = source.kind == "text"
        return path in tables or (is_text and (path in named or not any(one.startswith(folder) for one in tables)))

    kept = {str(source.entry): source for source in found if counts(source)}
    if not kept:
        listed = ", ".join(map(str, files))
        raise DataError(f"{_FILES}: no evaluation data in {listed}.", "Name JSON, Parquet, CSV or text files.")
    stems = Counter(_stem(one) for one in kept.values())
    tasks: dict[str, EvaluationTask] = {}
    for path, one in sorted(kept.items()):
        name = _stem(one)
        if stems[name] > 1 or _SPLIT_NAMES.match(name):
            name = f"{os.path.basename(os.path.dirname(os.path.abspath(path)))}/{name}"
        name = path if name in tasks else name
        tasks[name] = EvaluationTask(name, one)
    return list(tasks.values())


def _stem(source: InputFile) -> str:
    name = source.entry.name
    name = name[: -len(source.packing)] if source.packing else name
    return os.path.splitext(name)[0]


def _refuse(record: SetAside) -> None:
    if record.reason != Reason.EMPTY:
        raise DataError(f"{_FILES}: {record} (it is read as its ending says).", _FIX)
