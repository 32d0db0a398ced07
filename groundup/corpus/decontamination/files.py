"""Evaluation data as decontamination sees it: every string of every record, whatever the fields are called.

In: JSONL, JSON, Parquet, CSV, TSV or text files (also .gz .zst .bz2), folders of them, globs. Out: tasks, a file each,
and for each the strings of its records. A record of a text file is a paragraph.
"""

from __future__ import annotations

import csv
import glob
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import orjson

from groundup.corpus.reading.compressed import PACKINGS, DamagedStreamError, open_uncompressed
from groundup.errors import DataError

_SPLIT_NAMES = re.compile(r"(?:test|train|dev|val|valid|validation|data|eval)(?:[-_.]|$)", re.IGNORECASE)
_CSV_FIELD_BYTES = 1 << 28


@dataclass(frozen=True)
class EvaluationTask:
    """One file of evaluation data.

    Attributes:
        name: the file's name without its endings; with its folder's, where that says more ("gsm8k/test").
        path: the file.
    """

    name: str
    path: str

    def records(self) -> Iterator[tuple[int, list[str]]]:
        """Number (from 1 on: a line, row or paragraph) and strings of each record.

        Raises:
            DataError: the file cannot be read, or not as what its name says.
        """
        stem, packing = _unpacked(Path(self.path))
        read = _READERS[Path(stem).suffix.lower()]
        try:
            with _opened(Path(self.path), packing) as stream:
                for number, value in read(stream):
                    yield number, list(_strings(value))
        except (OSError, ValueError, csv.Error, DamagedStreamError) as error:
            what = error.strerror or error if isinstance(error, OSError) else error
            raise DataError(
                f"[corpus.decontaminate] files: {self.path} cannot be read as {Path(stem).suffix[1:]} ({what}).",
                "Repair the file, or take it off the list: the part that cannot be read would stay in the corpus.",
            ) from error


def find_tasks(files: Sequence[str | Path]) -> list[EvaluationTask]:
    """The evaluation files that paths, folders and globs name, each once, by name.

    Text files in a folder count only if the folder holds no other data: beside tables they are notes and licences.

    Raises:
        DataError: something that is not there, or of a kind that is not read.
    """
    paths: dict[Path, None] = {}
    for name in map(str, files):
        found = (
            [Path(name)] if Path(name).exists() else [Path(match) for match in sorted(glob.glob(name, recursive=True))]
        )
        readable = [
            file for path in found for file in (_in_folder(path) if path.is_dir() else [path]) if _is_readable(file)
        ]
        if not readable:
            raise DataError(
                f"[corpus.decontaminate] files: {name!r}: " + ("no evaluation data there." if found else "not found."),
                f"Name files that end in {', '.join(_READERS)} (also {', '.join(PACKINGS)}), folders or globs.",
            )
        paths.update(dict.fromkeys(file.resolve() for file in readable))
    stems = Counter(_stem(path) for path in paths)
    tasks: dict[str, str] = {}
    for path in sorted(paths):
        name = _stem(path)
        if stems[name] > 1 or _SPLIT_NAMES.match(name):
            name = f"{path.parent.name}/{name}"
        tasks[str(path)] = name if name not in tasks.values() else str(path)
    return [EvaluationTask(name, path) for path, name in tasks.items()]


def _in_folder(folder: Path) -> list[Path]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and _is_readable(path)]
    tables = [path for path in files if Path(_unpacked(path)[0]).suffix.lower() not in _TEXT]
    return tables or files


def _is_readable(path: Path) -> bool:
    return Path(_unpacked(path)[0]).suffix.lower() in _READERS and not path.name.startswith(".")


def _unpacked(path: Path) -> tuple[str, str]:
    """A file's name without the ending of a packing, and that ending."""
    packing = path.suffix.lower()
    return (path.name[: -len(packing)], packing) if packing in PACKINGS else (path.name, "")


def _stem(path: Path) -> str:
    return Path(_unpacked(path)[0]).stem


def _opened(path: Path, packing: str) -> IO[bytes]:
    stored = path.open("rb")
    return open_uncompressed(stored, packing) if packing else stored


def _strings(value: Any) -> Iterator[str]:
    """Every string in a value, however deep in lists and fields; without recursion, so that no depth is too much."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            waiting += reversed(list(item.values()))
        elif isinstance(item, list | tuple):
            waiting += reversed(item)


def _jsonl(stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            yield number, _parsed(number, line)


def _parsed(number: int, line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        try:  # slower, but it takes NaN and lone surrogates, which Python's own writer makes
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number}: {error}") from error


def _json(stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
    try:
        value = json.loads(stream.read())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if isinstance(value, dict):
        # A table within a frame, such as {"version": 1, "data": [...]}.
        lists = [item for item in value.values() if isinstance(item, list)]
        value = lists[0] if len(lists) == 1 else [value]
    yield from enumerate(value if isinstance(value, list) else [value], start=1)


def _parquet(stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet as pq

    number = 0
    source = stream if stream.seekable() else io.BytesIO(stream.read())
    for batch in pq.ParquetFile(source).iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _csv(stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
    yield from _separated(stream, ",")


def _tsv(stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
    yield from _separated(stream, "\t")


def _separated(stream: IO[bytes], delimiter: str) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(_CSV_FIELD_BYTES)
    with io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
        yield from enumerate(csv.reader(text, delimiter=delimiter), start=1)


def _text(stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
    number, lines = 0, list[str]()
    with io.TextIOWrapper(stream, "utf-8") as text:
        for line in itertools.chain(text, [""]):
            if line.strip():
                lines.append(line)
            elif lines:
                number += 1
                yield number, "".join(lines)
                lines = []


_TEXT = (".txt", ".md")
_READERS: dict[str, Callable[[IO[bytes]], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
    ".tsv": _tsv,
    ".txt": _text,
    ".md": _text,
}
