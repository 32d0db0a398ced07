"""Other programs' token ids to shards.

Where a format does not say where documents end, they are cut at the end-of-text id; where none is given, each file is
one document, and a note says so. A document without a closing end-of-text gets one, counted in a note: no id is ever
left out. llm.c has end-of-text before each document: its stream is turned by one place, so that it comes after.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from groundup.errors import ArtifactError, DataError, GroundupError
from groundup.files import file_digest
from groundup.recipe import ShardsSettings
from groundup.shards.external_formats import LLMC_KINDS, MEGATRON_MAGIC, SUFFIXES, IdBlock, megatron_paths, read_ids
from groundup.shards.format import FORMAT, LARGEST_VOCABULARY, MANIFEST, SPLITS, ShardsManifest, Split, token_dtype
from groundup.shards.stream import StreamWriter, begin_shards
from groundup.untrusted import ordinary_file, read_bytes, reading

if TYPE_CHECKING:
    from groundup.tokenizer import Tokenizer

_VALIDATION = re.compile(r"(?<![a-z])(val|valid|validation|dev|eval|test)(?![a-z])")


@dataclass
class Imported:
    """What an import did.

    Attributes:
        format: that was read.
        manifest: of the shards that were made.
        notes: what the user should know.
    """

    format: str
    manifest: ShardsManifest
    notes: list[str]


def import_ids(
    source: str | Path,
    out: str | Path,
    *,
    validation: str | Path | None = None,
    format: str | None = None,
    tokenizer: Tokenizer | None = None,
    end_of_text_id: int | None = None,
    vocab_size: int | None = None,
    column: str | None = None,
    join_rows: bool = False,
    settings: ShardsSettings | None = None,
) -> Imported:
    """Make shards of ids that another program wrote.

    Args:
        source: a file or folder. In a folder, files with val, valid, validation, dev, eval or test as a word in
            their name, or their folder's, are the validation split, unless `validation` names another.
        out: the folder for the shards; those of an earlier call are replaced.
        validation: a file or folder with the validation split.
        format: a key of `external_formats.SUFFIXES` (default: told from the files).
        tokenizer: that made the ids: gives the end-of-text id, the vocabulary and the bytes of the text.
        end_of_text_id: that closes documents.
        vocab_size: entries of the vocabulary (default: the largest id + 1).
        column: with the ids, of Parquet and Arrow.
        join_rows: rows of a table or of an array are pieces of one stream, not documents.
        settings: tokens in a shard.

    Raises:
        ArtifactError: a file is missing, damaged, or has an id that is not in the vocabulary.
        DataError: there are no ids for training.
        GroundupError: the options contradict each other.
    """
    settings, source, out = settings or ShardsSettings(), Path(source), Path(out)
    if format is not None and format not in SUFFIXES:
        raise GroundupError(f"--format {format}: unknown.", f"Formats to read: {', '.join(SUFFIXES)}.")
    with reading(str(source)):
        format = format or _format_of(source)
        files = _find_files(source, None if validation is None else Path(validation), format)
    if tokenizer is not None:
        own_ids = {"end-of-text id": tokenizer.end_of_text_id, "vocabulary": tokenizer.vocab_size}
        for (what, own), given in zip(own_ids.items(), (end_of_text_id, vocab_size), strict=True):
            if given not in (None, own):
                raise GroundupError(f"{what} {given}: the tokenizer's is {own}.", "Give one of the two.")
        end_of_text_id, vocab_size = tokenizer.end_of_text_id, tokenizer.vocab_size
    elif join_rows and end_of_text_id is None:
        raise GroundupError("--join-rows: nothing says where documents end.", "Give --end-of-text-id.")
    if vocab_size is None:
        blocks = (block for paths in files.values() for path in paths for block in read_ids(path, format, column))
        vocab_size = 1 + max(end_of_text_id or 0, *(int(block.tokens.max(initial=0)) for block in blocks), 0)
    if vocab_size > LARGEST_VOCABULARY:
        raise ArtifactError(
            f"{source}: ids up to {vocab_size - 1:,}, more than any vocabulary has.", "Name the right --format."
        )
    if end_of_text_id is not None and not 0 <= end_of_text_id < vocab_size:
        raise GroundupError(f"end-of-text id {end_of_text_id}: the vocabulary has ids 0 to {vocab_size - 1}.")
    if any(path.resolve().parent == out.resolve() for paths in files.values() for path in paths):
        raise GroundupError(f"{out}: the ids to import lie in it.", "Name another folder for the shards.")
    begin_shards(out)
    dtype = token_dtype(vocab_size)
    borders = _Borders(end_of_text_id, begins_documents=format == "llmc", dtype=dtype)
    # The UTF-8 bytes that each id stands for, (vocab,).
    n_bytes = np.array([len(tokenizer.token_bytes(i)) for i in range(vocab_size)]) if tokenizer is not None else None
    splits = {}
    for name in SPLITS:
        text_bytes = 0
        with StreamWriter(out, name, dtype, settings.shard_tokens) as writer:
            pieces = (
                replace(block, ends=None) if join_rows else block
                for path in files[name]
                for block in _checked(path, read_ids(path, format, column), vocab_size)
            )
            for tokens, ends in borders.documents(pieces):
                writer.append(tokens, ends)
                text_bytes += 0 if n_bytes is None else int(n_bytes[tokens].sum())
            written = writer.finish()
            n_tokens, n_documents = (sum(getattr(file, what) for file in written) for what in ("tokens", "documents"))
            splits[name] = Split(n_tokens, n_documents, text_bytes, written)
    if not splits["train"].tokens:
        raise DataError(f"{source}: there are no ids for training.", "Name files that have some.")
    made_from = {
        name: [{"name": path.name, "bytes": path.stat().st_size, "checksum": file_digest(path)} for path in paths]
        for name, paths in files.items()
    }
    provenance = {
        "corpus": None,
        "format": format,
        "files": made_from,
        "settings": {"shard_tokens": settings.shard_tokens},
    }
    fingerprint = "" if tokenizer is None else tokenizer.fingerprint
    manifest = ShardsManifest(vocab_size, fingerprint, end_of_text_id, splits, provenance)
    manifest.write(out)
    return Imported(format, manifest, _notes(manifest, borders))


def _find_files(source: Path, validation: Path | None, format: str) -> dict[str, list[Path]]:
    """The files of each split, in the order of the stream."""
    found = _candidates(source, format)
    if validation is not None:
        return {"train": found, "validation": _candidates(validation, format)}
    names = [path.relative_to(source).as_posix().lower() if source.is_dir() else "" for path in found]
    held_out = [path for path, name in zip(found, names, strict=True) if _VALIDATION.search(name)]
    return {"train": [path for path in found if path not in held_out], "validation": held_out}


def _candidates(source: Path, format: str) -> list[Path]:
    if not source.is_dir():
        path = megatron_paths(source)[0] if format == "megatron" else source
        if not path.is_file():
            raise ArtifactError(f"{path}: not found.", "Name a file, or a folder of files.")
        return [path]
    manifest, suffix = source / MANIFEST, SUFFIXES[format]
    if manifest.is_file() and FORMAT.encode() in read_bytes(manifest):
        raise ArtifactError(f"{source}: these are groundup's shards already.", "Use them as they are.")
    found = [path for path in _files_below(source) if path.suffix == suffix]
    if suffix == ".bin":
        found = [path for path in found if not _is_megatron(path)]
    if not found:
        raise ArtifactError(f"{source}: there is no *{suffix} in it.", "Name another folder or --format.")
    return found


def _format_of(source: Path) -> str:
    """The format of a file, or of the first file of a known kind in a folder."""
    if not source.exists():
        if megatron_paths(source)[0].is_file():
            return "megatron"
        raise ArtifactError(f"{source}: not found.", "Name a file, or a folder of files.")
    for path in _files_below(source) if source.is_dir() else [ordinary_file(source)]:
        if path.suffix in (".parquet", ".arrow", ".npy"):
            return path.suffix[1:]
        if path.suffix in (".bin", ".idx"):
            is_llmc = struct.unpack("<2i", _first_bytes(path, 8).ljust(8, b"\0")) in LLMC_KINDS
            return "megatron" if _is_megatron(path) else "llmc" if is_llmc else "nanogpt"
    raise ArtifactError(
        f"{source}: no file of ids that groundup knows (.bin, .idx, .npy, .parquet, .arrow).",
        "Name the format: --format.",
    )


def _files_below(folder: Path) -> list[Path]:
    """The files of a folder that may hold ids, in order; a link may lead to another file of it, or of the Hub's cache.

    Raises:
        ArtifactError: a link leads out of it.
    """
    home = folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    found = [path for path in sorted(folder.rglob("*")) if path.suffix in SUFFIXES.values() and path.is_file()]
    for path in found:
        if not any(path.resolve().is_relative_to(place) for place in (home, blobs)):
            raise ArtifactError(f"{path}: is a link that leads out of {folder}.", "Name what it leads to instead.")
    return found


def _is_megatron(path: Path) -> bool:
    index_path, _ = megatron_paths(path)
    return index_path.is_file() and _first_bytes(index_path, len(MEGATRON_MAGIC)) == MEGATRON_MAGIC


def _first_bytes(path: Path, count: int) -> bytes:
    with path.open("rb") as handle:
        return handle.read(count)


def _checked(path: Path, blocks: Iterable[IdBlock], vocab_size: int) -> Iterator[IdBlock]:
    """A file's blocks, each id of which is in the vocabulary."""
    first = 0
    for block in blocks:
        tokens = block.tokens
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
            place = int(np.argmax((tokens < 0) | (tokens >= vocab_size)))
            raise ArtifactError(
                f"{path}, id number {first + place:,}: {tokens[place]}, but the vocabulary has ids 0 to "
                f"{vocab_size - 1}.",
                "Name the right tokenizer, --vocab-size or --format.",
            )
        first += len(tokens) + block.padding
        yield block


class _Borders:
    """Pieces of files to pieces of a stream of documents, each closed by the end-of-text id if there is one."""

    def __init__(self, end_of_text_id: int | None, *, begins_documents: bool, dtype: np.dtype[Any]) -> None:
        self._end = end_of_text_id
        self._may_begin = begins_documents and end_of_text_id is not None
        self._dtype = dtype
        self.closed = self.empty = self.padding = 0
        self.by_file = self.turned = False

    def documents(self, blocks: Iterable[IdBlock]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids and ends, for `StreamWriter.append`."""
        is_closed, begun, turned = True, False, False
        for block in blocks:
            self.padding += block.padding
            tokens = block.tokens.astype(self._dtype, copy=False)
            if block.ends is not None:
                yield self._closed(tokens, block.ends)
                continue
            if len(tokens) and not begun:
                begun = True
                turned = self._may_begin and int(tokens[0]) == self._end
                self.turned |= turned
                tokens = tokens[turned:]
            if self._end is not None:
                yield tokens, np.flatnonzero(tokens == self._end) + 1
            else:
                self.by_file = True
                yield tokens, np.array([len(tokens)] if block.is_last and len(tokens) else [], dtype=np.int64)
            if len(tokens):
                is_closed = self._end is None or int(tokens[-1]) == self._end
        if turned or not is_closed:
            self.closed += not turned
            yield np.array([self._end], dtype=self._dtype), np.ones(1, dtype=np.int64)

    def _closed(self, tokens: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.diff(ends, prepend=0)
        if self._end is None:
            self.empty += int((lengths == 0).sum())
            return tokens, ends[lengths > 0]
        last = np.where(lengths > 0, tokens[np.maximum(ends, 1) - 1] if len(tokens) else -1, -1)
        is_open = last != self._end
        self.closed += int(is_open.sum())
        if is_open.any():
            tokens = np.insert(tokens, ends[is_open], self._end)
        return tokens, ends + np.cumsum(is_open)


def _notes(manifest: ShardsManifest, borders: _Borders) -> list[str]:
    notes = {
        "no end-of-text id was given, and the format has no borders: each file is one document": borders.by_file,
        "end-of-text stood before each document; it now stands after each": borders.turned,
        f"documents not closed by end-of-text, which got one: {borders.closed:,}": borders.closed,
        f"empty documents, left out: {borders.empty:,}": borders.empty,
        f"padding, left out as attention_mask says: {borders.padding:,} ids": borders.padding,
        "no tokenizer was named: training takes these shards only without one": not manifest.tokenizer,
        "no validation split was found; pretraining asks for one (--validation)": not manifest.splits[SPLITS[1]].tokens,
    }
    return [note for note, is_so in notes.items() if is_so]
