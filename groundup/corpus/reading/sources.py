"""Which files an input means: a file, a folder (with all below it), a glob, an address, or a text that ships along.

In: what the user wrote. Out: `InputFile`s by name, no file twice, the same whatever the order of the inputs. Files of a
folder whose names do not end in one of `SUFFIXES` are passed over, and so is all that runs of groundup wrote.
"""

from __future__ import annotations

import difflib
import fnmatch
import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import IO, Literal

import xxhash

from groundup.corpus.reading.compressed import BLOCK_BYTES, PACKINGS, open_uncompressed
from groundup.corpus.reading.remote import RemoteFile, find_remote
from groundup.errors import DataError
from groundup.files import value_digest
from groundup.run import MANIFEST

Kind = Literal["text", "page", "lines", "table", "archive"]
SUFFIXES: dict[str, Kind] = {
    ".txt": "text", ".md": "text", ".html": "page", ".htm": "page", ".jsonl": "lines", ".ndjson": "lines",
    ".parquet": "table", ".warc": "archive", ".wet": "archive", ".arc": "archive",
}  # fmt: skip
"""What a file's name says of it; all but tables may be packed too (`PACKINGS`)."""
SHIPPED = {"groundup:classics": "classics.jsonl", "groundup:shakespeare": "shakespeare.txt"}
STARTED = "started.json"
SET_ASIDE = "set_aside.jsonl"
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
        """What is in it: a text, an HTML page, JSON lines, a Parquet table or a web archive."""
        kind = kind_of(self.entry.name)
        assert kind is not None, f"{self.label} is no source"
        return kind

    @property
    def packing(self) -> str:
        """How it is compressed: one of `PACKINGS`, or ""."""
        return _packing(self.entry.name)

    @property
    def can_seek(self) -> bool:
        """Whether its content can be read from the middle."""
        return not self.packing and (isinstance(self.entry, Path) or self.entry.can_seek)

    def open(self) -> IO[bytes]:
        """The content, uncompressed.

        Raises:
            OSError: it cannot be opened, or (while reading) read.
            DamagedStreamError: (while reading) it is cut off or damaged.
        """
        stored = self.open_stored()
        return open_uncompressed(stored, self.packing) if self.packing else stored

    def open_stored(self) -> IO[bytes]:
        """The bytes as they are stored.

        Raises:
            OSError: it cannot be opened, or (while reading) read.
        """
        return self.entry.open("rb")

    def size_bytes(self) -> int:
        """Bytes of the file as stored; 0 where that is unknown."""
        if isinstance(self.entry, RemoteFile):
            return self.entry.size or 0
        try:
            return self.entry.stat().st_size
        except OSError:
            return 0

    def digest(self) -> str:
        """128-bit xxh3 of the bytes as stored; "unreadable" where they cannot be read.

        Of a file on the net: of what its server says of its version, if it does; else of the bytes.
        """
        if isinstance(self.entry, RemoteFile) and self.entry.version:
            return value_digest([self.entry.size, self.entry.version])
        digest = xxhash.xxh3_128()
        try:
            with self.open_stored() as handle:
                while block := handle.read(BLOCK_BYTES):
                    digest.update(block)
        except OSError:
            return "unreadable"
        return digest.hexdigest()


@dataclass
class InputFiles:
    """What the inputs came to.

    Attributes:
        files: the files to read, by label.
        passed_over: files in folders and globs whose names say that they are not text.
        unreadable: folders that could not be listed, as (name, reason).
    """

    files: list[InputFile] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def size_bytes(self) -> int:
        """Bytes of all files as stored, as far as known."""
        return sum(source.size_bytes() for source in self.files)


def find_sources(inputs: Sequence[str | Path]) -> InputFiles:
    """Turn inputs into files.

    Raises:
        DataError: a path that is not there, a glob without a match, a folder without a readable file, an unknown
            file type or `groundup:` name, an address whose library is not installed or whose server says no.
    """
    every = InputFiles()
    places: dict[str, InputFile] = {}
    for item in inputs:
        found = _expand(str(item))
        if not found.files:
            raise DataError(
                f"{item}: no file here that can be read as text ({_what_is_there(found)}).",
                f"groundup reads {suffix_list()}: rename the files, or name others in [corpus] inputs.",
            )
        every.passed_over += found.passed_over
        every.unreadable += found.unreadable
        for source in found.files:
            place = os.path.realpath(source.entry) if isinstance(source.entry, Path) else source.entry.url
            # Of two names of one file the first by the alphabet, whichever was written first.
            places[place] = min(places.get(place, source), source, key=_by_label)
    every.files = sorted(places.values(), key=_by_label)
    every.passed_over = sorted(set(every.passed_over))
    every.unreadable = sorted(set(every.unreadable))
    return every


def kind_of(name: str) -> Kind | None:
    """What a file's name says of its content, or None if groundup does not read such files."""
    packing = _packing(name)
    kind = SUFFIXES.get(os.path.splitext(name.lower().removesuffix(packing))[1])
    return None if packing and kind == "table" else kind


def suffix_list() -> str:
    """The file types, for messages."""
    return f"{', '.join(SUFFIXES)} (all but .parquet also with {', '.join(PACKINGS)})"


def _packing(name: str) -> str:
    suffix = os.path.splitext(name.lower())[1]
    return suffix if suffix in PACKINGS else ""


def _by_label(source: InputFile) -> str:
    return source.label


def _expand(item: str) -> InputFiles:
    if item.startswith("groundup:"):
        return InputFiles([InputFile(item, _shipped(item))])
    if item.startswith("file://"):
        item = item.removeprefix("file://")
    elif "://" in item:
        return _expand_remote(item)
    path = Path(item).expanduser()
    found = InputFiles()
    if path.is_dir():
        _files_below(path, found)
    elif path.is_file():
        if kind_of(path.name) is None:
            raise _unknown_kind(item)
        found.files.append(InputFile(_label(path), path))
    elif glob.has_magic(item):
        matches = sorted(set(_matches(path)))
        if not matches:
            raise DataError(f"{item}: nothing matches this pattern (seen from {Path.cwd()}).", "Check [corpus] inputs.")
        for match in matches:
            if match.is_dir():
                _files_below(match, found)
            else:
                _add_if_text(match, found)
    elif os.path.lexists(path):
        raise DataError(f"{item}: neither a file nor a folder.", "Name a regular file in [corpus] inputs.")
    else:
        raise DataError(f"{item}: no such file or folder (seen from {Path.cwd()}).", "Check [corpus] inputs.")
    return found


def _expand_remote(item: str) -> InputFiles:
    files, is_listing = find_remote(item)
    if not is_listing and kind_of(files[0].name) is None:
        raise _unknown_kind(item)
    ours = {os.path.dirname(file.url) for file in files if file.name in (MANIFEST, STARTED)}
    found = InputFiles()
    for file in files:
        folders = list(_parents_of(file.url))
        hidden = any(part.startswith(".") for part in file.below.split("/"))
        if is_listing and (hidden or ours.intersection(folders)):
            continue
        if kind_of(file.name) is None:
            found.passed_over.append(file.label)
        else:
            found.files.append(InputFile(file.label, file))
    return found


def _parents_of(url: str) -> Iterator[str]:
    while (parent := os.path.dirname(url)) not in ("", url):
        yield parent
        url = parent


def _files_below(folder: Path, found: InputFiles) -> None:
    """All files below a folder, hidden ones and runs left out; links to folders are not followed."""

    if _is_stage_folder(folder):
        found.passed_over.append(_label(folder))
        return

    def note_unreadable(error: OSError) -> None:
        found.unreadable.append((_label(Path(error.filename)), error.strerror or str(error)))

    for parent, folders, files in os.walk(folder, onerror=note_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".") and not _is_stage_folder(Path(parent, name))]
        for name in files:
            if not name.startswith("."):
                _add_if_text(Path(parent, name), found)


def _matches(pattern: Path) -> Iterator[Path]:
    """What a glob matches, as `glob.glob(recursive=True)` has it, but for links: `**` does not follow them.

    (Two links that lead upwards would have it visit 2^40 folders.)
    """
    parts = pattern.parts
    if pattern.is_absolute():
        yield from _matches_below(Path(parts[0]), parts[1:])
    else:
        yield from _matches_below(Path(), parts)


def _matches_below(folder: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    if not parts:
        if os.path.lexists(folder):
            yield folder
        return
    head, rest = parts[0], parts[1:]
    if not glob.has_magic(head):
        yield from _matches_below(folder / head, rest)
        return
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    if head == "**":
        while rest[:1] == ("**",):
            rest = rest[1:]
        yield from _matches_below(folder, rest or ("*",))
        for entry in entries:
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                place = folder / entry.name
                if not _is_stage_folder(place):
                    yield from _matches_below(place, parts)
        return
    for entry in entries:
        hidden = entry.name.startswith(".") and not head.startswith(".")
        if not hidden and fnmatch.fnmatchcase(entry.name, head):
            yield from _matches_below(folder / entry.name, rest)


def _add_if_text(path: Path, found: InputFiles) -> None:
    # A link that leads nowhere counts as a file, to be set aside when it cannot be opened; a pipe would block.
    is_text = kind_of(path.name) is not None and (path.is_file() or not path.exists())
    if is_text and not _is_stage_folder(path.parent):
        found.files.append(InputFile(_label(path), path))
    else:
        found.passed_over.append(_label(path))


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


def _unknown_kind(item: str) -> DataError:
    return DataError(f"{item}: not a file type that groundup reads.", f"It reads {suffix_list()}.")


def _label(path: Path) -> str:
    """The path in words; bytes that are not UTF-8 are shown escaped, since labels go into UTF-8 files."""
    return os.fsencode(path.as_posix()).decode("utf-8", errors="backslashreplace")


def _what_is_there(found: InputFiles) -> str:
    if found.unreadable:
        return f"could not be listed: {found.unreadable[0][1]}"
    if not found.passed_over:
        return "there is none"
    shown = ", ".join(Path(name).name for name in found.passed_over[:3])
    return f"passed over: {shown}" + (", …" if len(found.passed_over) > 3 else "")
