"""Which files an input means: a file, a folder (with all below it), a glob, or a text that ships with groundup.

In: what the user wrote. Out: `Source`s in a stable order (inputs as written, files within one by name), no
file twice. Names ending in .txt, .md or .jsonl, each also with .gz, are read; others in a folder
are passed over, and so are the artifacts of runs.
"""

from __future__ import annotations

import difflib
import glob
import gzip
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import IO, cast

import xxhash

from groundup.errors import DataError
from groundup.files import value_digest
from groundup.recipe import CorpusSettings
from groundup.run import MANIFEST

SUFFIXES = (".txt", ".md", ".jsonl")
SHIPPED = {"groundup:classics": "classics.jsonl", "groundup:shakespeare": "shakespeare.txt"}
BLOCK_BYTES = 1 << 20
STARTED = "started.json"


@dataclass(frozen=True)
class Source:
    """One input file.

    Attributes:
        label: how messages and documents name it.
        entry: where it is.
    """

    label: str
    entry: Traversable

    @property
    def is_gzip(self) -> bool:
        """Whether the name ends in .gz."""
        return self.entry.name.lower().endswith(".gz")

    @property
    def is_jsonl(self) -> bool:
        """Whether there is one JSON record a line in it."""
        return _suffix(self.entry.name) == ".jsonl"

    def open(self) -> IO[bytes]:
        """The bytes, uncompressed.

        Raises:
            OSError: it cannot be opened.
        """
        raw = self.entry.open("rb")
        return cast(IO[bytes], _UncompressedStream(raw)) if self.is_gzip else raw

    def size_bytes(self) -> int:
        """Bytes of the file as stored; 0 where that is unknown."""
        try:
            return self.entry.stat().st_size if isinstance(self.entry, Path) else 0
        except OSError:
            return 0

    def digest(self) -> str:
        """128-bit xxh3 of the file's bytes as stored; "unreadable" where it cannot be read."""
        digest = xxhash.xxh3_128()
        try:
            with self.entry.open("rb") as handle:
                while block := handle.read(BLOCK_BYTES):
                    digest.update(block)
        except OSError:
            return "unreadable"
        return digest.hexdigest()


@dataclass
class Sources:
    """What the inputs came to.

    Attributes:
        files: the files to read, in order.
        passed_over: files in folders and globs whose names say that they are not text.
        unreadable: folders that could not be listed, as (name, reason).
    """

    files: list[Source] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)


def find_sources(inputs: Sequence[str | Path]) -> Sources:
    """Turn inputs into files.

    Raises:
        DataError: a path that is not there, a glob without a match, a folder without a readable file, an
            unknown file type or `groundup:` name.
    """
    every = Sources()
    seen: set[str] = set()
    for item in inputs:
        found = _expand(str(item))
        if not found.files:
            raise DataError(
                f"{item}: no file here that can be read as text ({_what_is_there(found)}).",
                f"groundup reads {_suffix_list()}: rename the files, or name others in [corpus] inputs.",
            )
        every.passed_over += found.passed_over
        every.unreadable += found.unreadable
        for source in found.files:
            place = os.path.realpath(source.entry) if isinstance(source.entry, Path) else source.label
            if place not in seen:
                seen.add(place)
                every.files.append(source)
    return every


def input_fingerprint(settings: CorpusSettings) -> str:
    """Digest of all input files' names and contents; times of change do not count.

    Raises:
        DataError: as `find_sources`.
    """
    return value_digest([[source.label, source.digest()] for source in find_sources(settings.inputs).files])


def _expand(item: str) -> Sources:
    if item.startswith("groundup:"):
        return Sources([Source(item, _shipped(item))])
    path = Path(item).expanduser()
    found = Sources()
    if path.is_dir():
        _walk(path, found)
    elif path.is_file():
        if _suffix(path.name) not in SUFFIXES:
            raise DataError(f"{item}: not a file type that groundup reads.", f"It reads {_suffix_list()}.")
        found.files.append(Source(_label(path), path))
    elif glob.has_magic(item):
        matches = sorted(glob.glob(str(path), recursive=True))
        if not matches:
            raise DataError(f"{item}: nothing matches this pattern (seen from {Path.cwd()}).", "Check [corpus] inputs.")
        for match in map(Path, matches):
            if match.is_dir():
                _walk(match, found)
            else:
                _add_if_text(match, found)
    elif os.path.lexists(path):
        raise DataError(f"{item}: neither a file nor a folder.", "Name a regular file in [corpus] inputs.")
    else:
        raise DataError(f"{item}: no such file or folder (seen from {Path.cwd()}).", "Check [corpus] inputs.")
    return found


def _walk(folder: Path, found: Sources) -> None:
    """All files below a folder, hidden ones left out, by name; links to folders are not followed."""

    def note_unreadable(error: OSError) -> None:
        found.unreadable.append((_label(Path(error.filename)), error.strerror or str(error)))

    for parent, folders, files in os.walk(folder, onerror=note_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                _add_if_text(Path(parent, name), found)


def _add_if_text(path: Path, found: Sources) -> None:
    # A link that leads nowhere counts as a file, to be set aside when it cannot be opened; a pipe would block.
    is_text = _suffix(path.name) in SUFFIXES and (path.is_file() or not path.exists())
    if is_text and not _is_stage_folder(path.parent):
        found.files.append(Source(_label(path), path))
    else:
        found.passed_over.append(_label(path))


def _is_stage_folder(folder: Path) -> bool:
    """Whether groundup itself wrote this folder: runs often lie below the folder the texts are in."""
    return (folder / MANIFEST).exists() or (folder / STARTED).exists()


def _shipped(name: str) -> Traversable:
    if name not in SHIPPED:
        near = difflib.get_close_matches(name, SHIPPED, n=1, cutoff=0.5)
        fix = f"Did you mean {near[0]!r}?" if near else f"These do: {', '.join(SHIPPED)}."
        raise DataError(f"{name}: no text of that name ships with groundup.", fix)
    return resources.files("groundup").joinpath("data", SHIPPED[name])


def _suffix(name: str) -> str:
    return os.path.splitext(name.lower().removesuffix(".gz"))[1]


def _suffix_list() -> str:
    return ", ".join(SUFFIXES) + " (each also with .gz)"


def _label(path: Path) -> str:
    """The path in words; bytes that are not UTF-8 are shown escaped, since labels go into UTF-8 files."""
    return os.fsencode(path.as_posix()).decode("utf-8", errors="backslashreplace")


def _what_is_there(found: Sources) -> str:
    if found.unreadable:
        return f"could not be listed: {found.unreadable[0][1]}"
    if not found.passed_over:
        return "there is none"
    shown = ", ".join(Path(name).name for name in found.passed_over[:3])
    return f"passed over: {shown}" + (", …" if len(found.passed_over) > 3 else "")


class _UncompressedStream(gzip.GzipFile):
    """A gzip reader that closes the file below it too."""

    def __init__(self, raw: IO[bytes]) -> None:
        super().__init__(fileobj=raw, mode="rb")
        self._raw = raw

    def close(self) -> None:
        super().close()
        self._raw.close()
