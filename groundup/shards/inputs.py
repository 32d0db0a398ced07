"""Which files hold another program's ids, in which format, and for which split."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from groundup.errors import ArtifactError, GroundupError
from groundup.shards.external_formats import (
    COMPLETE,
    LLMC_KINDS,
    MEGATRON_MAGIC,
    RAW_DTYPES,
    IdBlock,
    megatron_paths,
    read_llmc,
    read_megatron,
    read_numpy,
    read_raw,
    read_table,
)
from groundup.shards.format import FORMAT, MANIFEST, SPLITS
from groundup.untrusted import ordinary_file, read_bytes, reading

SUFFIXES = {
    **dict.fromkeys(RAW_DTYPES, ".bin"), "npy": ".npy", "llmc": ".bin", "megatron": ".idx", "parquet": ".parquet",
    "arrow": ".arrow",
}  # fmt: skip
FORMATS = tuple(SUFFIXES)
_VALIDATION = re.compile(r"(?<![a-z])(val|valid|validation|dev|eval|test)(?![a-z])")


@dataclass(frozen=True)
class Inputs:
    """Files to import.

    Attributes:
        format: one of `FORMATS`.
        files: of each split, in the order of the stream.
    """

    format: str
    files: dict[str, list[Path]]


def find_inputs(source: Path, validation: Path | None = None, format: str | None = None) -> Inputs:
    """Find the files.

    Args:
        source: a file or folder. In a folder, files with val, valid, validation, dev, eval or test as a word in
            their name, or their folder's, are the validation split, unless `validation` names another.
        validation: a file or folder of the validation split.
        format: one of `FORMATS` (default: told from the files).

    Raises:
        ArtifactError: nothing there, or groundup's own shards.
        GroundupError: an unknown format.
    """
    if format is not None and format not in FORMATS:
        raise GroundupError(f"--format {format}: unknown.", f"Formats to read: {', '.join(FORMATS)}.")
    with reading(str(source)):
        format = format or _tell(source)
        files: dict[str, list[Path]] = {name: [] for name in SPLITS}
        for path in _candidates(source, format):
            inside = path.relative_to(source).as_posix().lower() if source.is_dir() else ""
            files["validation" if validation is None and _VALIDATION.search(inside) else "train"].append(path)
        if validation is not None:
            files["validation"] = _candidates(validation, format)
    return Inputs(format, files)


def reader(format: str, path: Path, column: str | None, join_rows: bool) -> Callable[[], Iterator[IdBlock]]:
    """What reads a file; it can be called again.

    Args:
        format: one of `FORMATS`.
        path: the file.
        column: of a table, with the ids.
        join_rows: rows are pieces of one stream, not documents.
    """

    def pieces() -> Iterator[IdBlock]:
        if format in ("parquet", "arrow"):
            return read_table(path, column)
        if format in RAW_DTYPES:
            return read_raw(path, format)
        return {"npy": read_numpy, "llmc": read_llmc, "megatron": read_megatron}[format](path)

    def read() -> Iterator[IdBlock]:
        with reading(str(path), fix=COMPLETE):
            ordinary_file(path)
            yield from (replace(piece, ends=None) if join_rows else piece for piece in pieces())

    return read


def _candidates(source: Path, format: str) -> list[Path]:
    if not source.is_dir():
        path = megatron_paths(source)[0] if format == "megatron" else source
        if not path.is_file():
            raise ArtifactError(f"{path}: not found.", "Name a file, or a folder of files.")
        return [path]
    manifest = source / MANIFEST
    if manifest.is_file() and FORMAT.encode() in read_bytes(manifest):
        raise ArtifactError(f"{source}: these are groundup's shards already.", "Use them as they are.")
    found = _files_below(source, f"*{SUFFIXES[format]}")
    if SUFFIXES[format] == ".bin":
        found = [path for path in found if not _is_megatron(path)]
    if not found:
        raise ArtifactError(f"{source}: there is no *{SUFFIXES[format]} in it.", "Name another folder or --format.")
    return found


def _tell(source: Path) -> str:
    """The format of a file, or of the first file of a known kind in a folder."""
    if not source.exists():
        if megatron_paths(source)[0].is_file():
            return "megatron"
        raise ArtifactError(f"{source}: not found.", "Name a file, or a folder of files.")
    for path in _files_below(source, "*") if source.is_dir() else [ordinary_file(source)]:
        if path.suffix in (".parquet", ".arrow", ".npy"):
            return path.suffix[1:]
        if path.suffix in (".bin", ".idx"):
            return "megatron" if _is_megatron(path) else "llmc" if _is_llmc(path) else "nanogpt"
    raise ArtifactError(
        f"{source}: no file of ids that groundup knows (.bin, .idx, .npy, .parquet, .arrow).",
        "Name the format: --format.",
    )


def _files_below(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder that may hold ids, in order; a link may lead to another file of it, or of the Hub's cache.

    Raises:
        ArtifactError: a link leads out of it.
    """
    home = folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    found = [path for path in sorted(folder.rglob(pattern)) if path.suffix in SUFFIXES.values() and path.is_file()]
    for path in found:
        if not any(path.resolve().is_relative_to(place) for place in (home, blobs)):
            raise ArtifactError(f"{path}: is a link that leads out of {folder}.", "Name what it leads to instead.")
    return found


def _is_megatron(path: Path) -> bool:
    index_path, _ = megatron_paths(path)
    if not index_path.is_file():
        return False
    with index_path.open("rb") as handle:
        return handle.read(len(MEGATRON_MAGIC)) == MEGATRON_MAGIC


def _is_llmc(path: Path) -> bool:
    with path.open("rb") as handle:
        magic, version = struct.unpack("<2i", handle.read(8).ljust(8, b"\0"))
    return magic in LLMC_KINDS and LLMC_KINDS[magic][0] == version


def largest_id(pieces: Iterator[IdBlock]) -> int:
    """The largest id, −1 if there is none."""
    return max((int(np.max(piece.tokens)) for piece in pieces if len(piece.tokens)), default=-1)
