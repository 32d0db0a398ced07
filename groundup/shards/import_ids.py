"""Other programs' token ids to shards.

Where a format does not say where documents end, they are cut at the end-of-text id; where none is given, each file is
one document, and a note says so. A document without a closing end-of-text gets one, counted in a note: no id is ever
left out. llm.c has end-of-text before each document: its stream is turned by one place, so that it comes after.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from groundup.errors import ArtifactError, DataError, GroundupError
from groundup.files import file_digest
from groundup.recipe import ShardsSettings
from groundup.shards.external_formats import IdBlock
from groundup.shards.format import LARGEST_VOCABULARY, SPLITS, ShardsManifest, Split, token_dtype
from groundup.shards.inputs import Inputs, find_inputs, largest_id, reader
from groundup.shards.stream import StreamWriter, begin_shards

if TYPE_CHECKING:
    from groundup.tokenizer import Tokenizer


@dataclass
class Imported:
    """What an import did.

    Attributes:
        format: that was read.
        manifest: of the shards that were made.
        closed: documents that had no closing end-of-text and got one.
        empty: empty documents that were left out, since nothing closes them.
        notes: what the user should know.
    """

    format: str
    manifest: ShardsManifest
    closed: int = 0
    empty: int = 0
    notes: list[str] = field(default_factory=list)


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
        source: a file or folder (`find_inputs` says which of its files are for validation).
        out: the folder for the shards; those of an earlier call are replaced.
        validation: a file or folder with the validation split.
        format: one of `inputs.FORMATS` (default: told from the files).
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
    settings, out = settings or ShardsSettings(), Path(out)
    inputs = find_inputs(Path(source), Path(validation) if validation is not None else None, format)
    readers = {name: [reader(inputs.format, path, column, join_rows) for path in inputs.files[name]] for name in SPLITS}
    if tokenizer is not None:
        end_of_text_id = _agreed("end-of-text id", end_of_text_id, tokenizer.end_of_text_id)
        vocab_size = _agreed("vocabulary", vocab_size, tokenizer.vocab_size)
    elif join_rows and end_of_text_id is None:
        raise GroundupError("--join-rows: nothing says where documents end.", "Give --end-of-text-id.")
    if vocab_size is None:
        largest = max(largest_id(read()) for name in SPLITS for read in readers[name])
        vocab_size = 1 + max(largest, end_of_text_id or 0)
    if vocab_size > LARGEST_VOCABULARY:
        raise ArtifactError(
            f"{source}: ids up to {vocab_size - 1:,}, more than any vocabulary has.", "Name the right --format."
        )
    if end_of_text_id is not None and not 0 <= end_of_text_id < vocab_size:
        raise GroundupError(f"end-of-text id {end_of_text_id}: the vocabulary has ids 0 to {vocab_size - 1}.")
    if any(path.resolve().parent == out.resolve() for name in SPLITS for path in inputs.files[name]):
        raise GroundupError(f"{out}: the ids to import lie in it.", "Name another folder for the shards.")
    begin_shards(out)
    dtype = token_dtype(vocab_size)
    borders = _Borders(end_of_text_id, begins_documents=inputs.format == "llmc", dtype=dtype)
    splits, byte_counts = {}, _byte_counts(tokenizer)
    for name in SPLITS:
        text_bytes = 0
        with StreamWriter(out, name, dtype, settings.shard_tokens) as writer:
            pieces = (piece for read in readers[name] for piece in read())
            for tokens, ends in borders.documents(_checked(pieces, vocab_size)):
                writer.append(tokens, ends)
                text_bytes += 0 if byte_counts is None else int(byte_counts[tokens].sum())
            files = writer.finish()
        splits[name] = Split(writer.n_tokens, writer.n_documents, text_bytes, files)
    if not splits["train"].tokens:
        raise DataError(f"{source}: there are no ids for training.", "Name files that have some.")
    fingerprint = "" if tokenizer is None else tokenizer.fingerprint
    manifest = ShardsManifest(vocab_size, fingerprint, end_of_text_id, splits, _provenance(inputs, settings))
    manifest.write(out)
    return Imported(inputs.format, manifest, borders.closed, borders.empty, _notes(manifest, borders))


class _Borders:
    """Pieces of files to pieces of a stream of documents, each closed by the end-of-text id if there is one."""

    def __init__(self, end_of_text_id: int | None, *, begins_documents: bool, dtype: np.dtype[Any]) -> None:
        self._end = end_of_text_id
        self._may_begin = begins_documents and end_of_text_id is not None
        self._dtype = dtype
        self.closed = self.empty = self.padding = 0
        self.by_file = self.turned = False

    def documents(self, pieces: Iterable[IdBlock]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids and ends, for `StreamWriter.append`."""
        is_closed, begun, turned = True, False, False
        for piece in pieces:
            self.padding += piece.padding
            tokens = piece.tokens.astype(self._dtype, copy=False)
            if piece.ends is not None:
                yield self._closed(tokens, piece.ends)
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
                yield tokens, np.array([len(tokens)] if piece.is_last and len(tokens) else [], dtype=np.int64)
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


def _checked(pieces: Iterable[IdBlock], vocab_size: int) -> Iterator[IdBlock]:
    """The pieces, each id of which is in the vocabulary."""
    for piece in pieces:
        if len(piece.tokens) and not 0 <= int(piece.tokens.min()) <= int(piece.tokens.max()) < vocab_size:
            place = int(np.argmax((piece.tokens < 0) | (piece.tokens >= vocab_size)))
            raise ArtifactError(
                f"{piece.path}, id number {piece.first + place:,}: {piece.tokens[place]}, but the vocabulary has ids 0 "
                f"to {vocab_size - 1}.",
                "Name the right tokenizer, --vocab-size or --format.",
            )
        yield piece


def _byte_counts(tokenizer: Tokenizer | None) -> np.ndarray | None:
    """The UTF-8 bytes that each id stands for, (vocab,)."""
    if tokenizer is None:
        return None
    return np.array([len(tokenizer.token_bytes(index)) for index in range(tokenizer.vocab_size)])


def _agreed(what: str, given: int | None, of_tokenizer: int) -> int:
    if given is not None and given != of_tokenizer:
        raise GroundupError(f"{what} {given}: the tokenizer's is {of_tokenizer}.", "Give one of the two.")
    return of_tokenizer


def _provenance(inputs: Inputs, settings: ShardsSettings) -> dict[str, Any]:
    files = {
        name: [{"name": path.name, "bytes": path.stat().st_size, "checksum": file_digest(path)} for path in paths]
        for name, paths in inputs.files.items()
    }
    return {
        "corpus": None,
        "format": inputs.format,
        "files": files,
        "settings": {"shard_tokens": settings.shard_tokens},
    }


def _notes(manifest: ShardsManifest, borders: _Borders) -> list[str]:
    notes = []
    if borders.by_file:
        notes.append("no end-of-text id was given, and the format has no document borders: each file is one document")
    if borders.turned:
        notes.append("end-of-text stood before each document; it now stands after each")
    if borders.closed:
        notes.append(f"documents not closed by end-of-text, which got one: {borders.closed:,}")
    if borders.empty:
        notes.append(f"empty documents, left out: {borders.empty:,}")
    if borders.padding:
        notes.append(f"padding, left out as attention_mask says: {borders.padding:,} ids")
    if not manifest.tokenizer:
        notes.append("no tokenizer was named: training takes these shards only without one")
    if not manifest.splits["validation"].tokens:
        notes.append("no validation split was found; pretraining asks for one (--validation)")
    return notes
