"""Which files an input means: a file, a folder (with all below it), a glob, an address, or a text that ships along.

In: what the user wrote. Out: `InputFile`s by name, no file twice, the same whatever the order of the inputs. A file
that is named is read whatever its name; of a folder those whose names end in one of `SUFFIXES`. The others are listed,
and so is what cannot be opened: links that lead out of the folder, pipes, folders without permission. Folders that runs
of groundup wrote are passed over.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import glob
import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from operator import attrgetter
from pathlib import Path
from typing import IO, Literal

import xxhash

from groundup.corpus.document import Reason, SetAside
from groundup.corpus.reading.compressed import PACKINGS, open_uncompressed
from groundup.corpus.reading.remote import RemoteFile, find_remote
from groundup.errors import DataError
from groundup.files import value_digest
from groundup.run import MANIFEST, STARTED
from groundup.untrusted import reading

Kind = Literal["text", "page", "lines", "json", "separated", "table", "archive"]
SUFFIXES: dict[str, Kind] = {
    ".txt": "text", ".text": "text", ".md": "text", ".markdown": "text", ".rst": "text", ".log": "text",
    ".html": "page", ".htm": "page", ".jsonl": "lines", ".ndjson": "lines", ".json": "json",
    ".csv": "separated", ".tsv": "separated", ".parquet": "table",
    ".warc": "archive", ".wet": "archive", ".arc": "archive",
}  # fmt: skip
"""What a file's name says of it; all but tables may be packed too (`PACKINGS`)."""
SHIPPED = {"groundup:classics": "classics.jsonl", "groundup:shakespeare": "shakespeare.txt"}
SET_ASIDE = "set_aside.jsonl"
CRAWLED = "crawl.json"
"""What a crawl says of itself, beside its pages."""
CURATED = ("filter_statistics.json", "unit.json")
"""Beside `SET_ASIDE` in a folder of documents, and in one of measurements."""


@dataclass(frozen=True)
class InputFile:
    """One input file.

    Attributes:
        label: how messages and documents name it.
        entry: where it is.
    """

    label: str
    entry: Path | RemoteFile

    @property
    def kind(self) -> Kind:
        """What is in it, by its name; a text, where that says nothing."""
        return kind_of(self.entry.name) or "text"

    @property
    def ending(self) -> str:
        """The end of its name, in lower case, without that of a packing."""
        return _ending(self.entry.name)

    @property
    def packing(self) -> str:
        """How it is compressed: one of `PACKINGS`, or ""."""
        return _packing(self.entry.name)

    @property
    def can_seek(self) -> bool:
        """Whether its content can be read from the middle."""
        return not self.packing and (isinstance(self.entry, Path) or self.entry.can_seek)

    def open(self) -> IO[bytes]:
        """The content, uncompressed. Opening raises OSError, reading `READ_ERRORS`."""
        stored = self.open_stored()
        return open_uncompressed(stored, self.packing) if self.packing else stored

    def open_stored(self) -> IO[bytes]:
        """The bytes as they are stored. Opening and reading raise OSError."""
        return self.entry.open("rb")

    def size_bytes(self) -> int:
        """Bytes of the file as stored; 0 where that is unknown."""
        if isinstance(self.entry, RemoteFile):
            return self.entry.size or 0
        with contextlib.suppress(OSError):
            return self.entry.stat().st_size
        return 0

    def digest(self) -> str:
        """128-bit xxh3 of the bytes as stored; "unreadable" where they cannot be read.

        Of a file on the net: of what its server says of its version, if it does; else of the bytes.
        """
        if isinstance(self.entry, RemoteFile) and self.entry.version:
            return value_digest([self.entry.size, self.entry.version])
        try:
            with self.open_stored() as handle:
                return hashlib.file_digest(handle, xxhash.xxh3_128).hexdigest()  # type: ignore[arg-type]
        except OSError:
            return "unreadable"


@dataclass
class InputFiles:
    """What the inputs came to.

    Attributes:
        files: the files to read, by label.
        passed_over: files in folders and globs whose names say that they are not text.
        unknown: files that were named, whose endings say nothing: they are read as text.
        aside: what a folder holds and nobody may read, each with the reason.
    """

    files: list[InputFile] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    aside: list[SetAside] = field(default_factory=list)

    def size_bytes(self) -> int:
        """Bytes of all files as stored, as far as known."""
        return sum(source.size_bytes() for source in self.files)

    def in_words(self) -> str:
        """What is not read as a reader of such files would expect, for the console; "" if all is."""
        notes = []
        if self.unknown:
            listed = ", ".join(self.unknown[:3]) + (", …" if len(self.unknown) > 3 else "")
            notes.append(f"read as text, whatever the ending: {listed}")
        if self.passed_over:
            endings = Counter(os.path.splitext(name)[1].lower() or "without an ending" for name in self.passed_over)
            listed = ", ".join(f"{count:,} {ending}" for ending, count in endings.most_common(12))
            notes.append(f"passed over, since their endings are not those of text: {listed}")
        return "; ".join(notes)


def find_sources(
    inputs: Sequence[str | Path], *, follow_links: bool = False, setting: str = "[corpus] inputs"
) -> InputFiles:
    """The files that `inputs` mean: files, folders, globs, addresses or `groundup:` names.

    Args:
        inputs: as the user wrote them.
        follow_links: read what links of a folder lead to outside it.
        setting: where the user wrote them, for messages.

    Raises:
        DataError: a path that is not there, a glob without a match, a folder without a readable file, an unknown
            `groundup:` name, an address whose library is not installed or whose server says no.
    """
    every, by_label = InputFiles(), attrgetter("label")
    places: dict[str, InputFile] = {}
    for item in map(str, inputs):
        with reading(item, DataError, f"Check {setting}."):
            found = _Search(item, follow_links, setting).found
        if not found.files:
            names = [Path(name).name for name in found.passed_over]
            shown = ", ".join(names[:3] + ["…"] * (len(names) > 3))
            what = found.aside[0].detail if found.aside else f"passed over: {shown}" if names else "there is none"
            kinds = f"{', '.join(SUFFIXES)} (all but .parquet also with {', '.join(PACKINGS)})"
            raise DataError(
                f"{item}: no file here that can be read as text ({what}).",
                f"groundup reads {kinds}: rename the files, or name others in {setting}.",
            )
        every.passed_over += found.passed_over
        every.unknown += found.unknown
        every.aside += found.aside
        for source in found.files:
            place = os.path.realpath(source.entry) if isinstance(source.entry, Path) else source.entry.url
            # Of two names of one file the first by the alphabet, whichever was written first.
            places[place] = min(places.get(place, source), source, key=by_label)
    every.files = sorted(places.values(), key=by_label)
    every.passed_over = sorted({*every.passed_over} - {*every.unknown})
    every.unknown = sorted(set(every.unknown))
    every.aside = sorted(set(every.aside), key=lambda item: (item.source, item.detail))
    return every


def kind_of(name: str) -> Kind | None:
    """What a file's name says of its content, or None if groundup does not read such files."""
    kind = SUFFIXES.get(_ending(name))
    return None if kind == "table" and _packing(name) else kind


def _packing(name: str) -> str:
    suffix = os.path.splitext(name.lower())[1]
    return suffix if suffix in PACKINGS else ""


def _ending(name: str) -> str:
    return os.path.splitext(name.lower().removesuffix(_packing(name)))[1]


class _Search:
    """What one input means, in `found`."""

    def __init__(self, item: str, follow_links: bool, setting: str) -> None:
        self.found, self._follow_links, self._check = InputFiles(), follow_links, f"Check {setting}."
        if item.startswith("groundup:"):
            self.found.files.append(InputFile(item, _shipped(item)))
        elif "://" in item and not item.startswith(("file://", "local://")):
            self._expand_remote(item)
        else:
            self._expand(item.removeprefix("file://").removeprefix("local://"))

    def _expand(self, item: str) -> None:
        path = Path(item).expanduser()
        if path.is_dir():
            self._files_below(path, os.path.realpath(path))
        elif path.is_file():
            self._name(item, InputFile(_label(path), path))
        elif glob.has_magic(item):
            base = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
            matches = sorted(set(_matches(base, path.relative_to(base).parts)))
            if not matches:
                raise DataError(f"{item}: nothing matches this pattern (seen from {Path.cwd()}).", self._check)
            home = os.path.realpath(base)
            for match in matches:
                if not match.is_dir():
                    self._add(match, home)
                elif not self._leads_out(match, home):
                    self._files_below(match, home)
        elif os.path.lexists(path):
            raise DataError(f"{item}: neither a file nor a folder.", f"Name a regular file. {self._check}")
        else:
            raise DataError(f"{item}: no such file or folder (seen from {Path.cwd()}).", self._check)

    def _name(self, item: str, source: InputFile) -> None:
        """A file that was named, not found in a folder."""
        name = source.entry.name
        if kind_of(name) is None:
            if source.ending in SUFFIXES:
                raise DataError(f"{item}: a Parquet file that was packed again.", "Unpack it.")
            self.found.unknown.append(source.label)
        self.found.files.append(source)

    def _expand_remote(self, item: str) -> None:
        files, is_listing = find_remote(item)
        if not is_listing:
            self._name(item, InputFile(files[0].label, files[0]))
            return
        ours = tuple(f"{os.path.dirname(file.url)}/" for file in files if file.name in (MANIFEST, STARTED))
        for file in files:
            if file.url.startswith(ours) or any(part.startswith(".") for part in file.below.split("/")):
                continue
            if kind_of(file.name) is None or file.name == CRAWLED:
                self.found.passed_over.append(file.label)
            else:
                self.found.files.append(InputFile(file.label, file))

    def _files_below(self, folder: Path, home: str) -> None:
        """All files below a folder, hidden ones and those of runs left out."""

        def note_unreadable(error: OSError) -> None:
            self._set_aside(Path(error.filename), f"the folder cannot be listed ({error.strerror or error})")

        if _is_stage_folder(folder):
            self.found.passed_over.append(_label(folder))
            return
        visited = set()
        for parent, folders, files in os.walk(folder, onerror=note_unreadable, followlinks=True):
            visited.add(os.path.realpath(parent))
            for name in folders.copy():
                path = Path(parent, name)
                if name.startswith(".") or _is_stage_folder(path):
                    folders.remove(name)
                elif path.is_symlink() and (
                    self._leads_out(path, home) or not self._follow_links or os.path.realpath(path) in visited
                ):
                    folders.remove(name)  # what lies inside the folder is found there
            for name in files:
                if not name.startswith("."):
                    self._add(Path(parent, name), home)

    def _leads_out(self, path: Path, home: str) -> bool:
        """Whether a link leads out of the folder and is not to be followed; then it is set aside."""
        real = os.path.realpath(path)
        cache, is_snapshot, _ = home.partition("/snapshots/")  # the Hub's cache: links to `blobs` beside it
        within = (os.path.join(home, ""), *([f"{cache}/blobs/"] if is_snapshot else []))
        if self._follow_links or real == home or real.startswith(within):
            return False
        why = "a link that leads out of the folder: name the file itself, or set [corpus] follow_links = true"
        self._set_aside(path, why, Reason.LINK)
        return True

    def _add(self, path: Path, home: str) -> None:
        if kind_of(path.name) is None or path.name == CRAWLED or _is_stage_folder(path.parent):
            self.found.passed_over.append(_label(path))
        elif self._leads_out(path, home):
            pass
        elif path.is_file() or not path.exists():  # a link that leads nowhere is set aside when it is opened
            self.found.files.append(InputFile(_label(path), path))
        else:
            self._set_aside(path, "not an ordinary file")

    def _set_aside(self, path: Path, why: str, reason: Reason = Reason.UNREADABLE) -> None:
        self.found.aside.append(SetAside(_label(path), "", 0, reason, why))


def _matches(base: Path, pattern: Sequence[str]) -> Iterator[Path]:
    """What a glob matches below a folder: no hidden file that it does not ask for, nothing of runs.

    `**` does not follow links: two that lead upwards would have it visit 2^40 folders.
    """
    asks_hidden = [part for part in pattern if part.startswith(".")]
    is_ours = cache(_is_stage_folder)
    for match in base.glob("/".join(pattern)):
        parts = match.relative_to(base).parts
        hidden = [part for part in parts if part.startswith(".")]
        folders = itertools.accumulate(parts[:-1], Path.joinpath, initial=base)
        is_asked = all(any(fnmatch.fnmatchcase(part, asked) for asked in asks_hidden) for part in hidden)
        if is_asked and not any(map(is_ours, folders)):
            yield match


def _is_stage_folder(folder: Path) -> bool:
    """Whether groundup itself wrote this folder: runs often lie below the folder the texts are in."""
    if os.path.exists(folder / MANIFEST) or os.path.exists(folder / STARTED):
        return True
    # `curate` called from Python writes no manifest; what it left out must not come back as an input.
    return os.path.exists(folder / SET_ASIDE) and any(os.path.exists(folder / name) for name in CURATED)


def _shipped(name: str) -> Path:
    if name not in SHIPPED:
        near = difflib.get_close_matches(name, SHIPPED, n=1, cutoff=0.5)
        fix = f"Did you mean {near[0]!r}?" if near else f"These do: {', '.join(SHIPPED)}."
        raise DataError(f"{name}: no text of that name ships with groundup.", fix)
    return Path(str(resources.files("groundup").joinpath("data", SHIPPED[name])))


def _label(path: Path) -> str:
    """The path in words; bytes that are not UTF-8 are shown escaped, since labels go into UTF-8 files."""
    return os.fsencode(path.as_posix()).decode("utf-8", errors="backslashreplace")
