"""The shards stage: documents and a tokenizer in, binary token files out, whole or not at all."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import xxhash

from groundup.console import Console, format_count
from groundup.corpus import Document
from groundup.errors import DataError
from groundup.files import atomic_writer
from groundup.recipe import ShardsSettings
from groundup.shards.format import INDEX_DTYPE, MANIFEST, SPLITS, ShardFile, ShardsManifest, Split, token_dtype

if TYPE_CHECKING:
    from groundup.tokenizer import Tokenizer

GROUP_CHARACTERS = 4 << 20


def write_shards(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    out: Path,
    settings: ShardsSettings | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Encode documents into the folder `out`, each in the split it carries, in the order given.

    Text never becomes a control token; `<|endoftext|>` follows every document. Shards of an earlier call in
    the same folder are replaced.

    Returns:
        The stage's figures: tokens_train, tokens_validation (`<|endoftext|>` included), bytes_train,
        bytes_validation (UTF-8 of the text), documents_train, documents_validation, dtype, files (number of
        .bin files), bytes_per_token (text bytes by text tokens, over both splits).

    Raises:
        DataError: no document in the training split.
    """
    console = console or Console(quiet=True)
    settings = settings or ShardsSettings()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    _remove_old(out)
    with console.bar("shards") as bar, contextlib.ExitStack() as stack:
        dtype = token_dtype(tokenizer.vocab_size)
        writers = {name: stack.enter_context(_SplitWriter(out, name, dtype, settings.shard_tokens)) for name in SPLITS}
        n_documents = 0
        for group in _groups(documents):
            for document, ids in zip(group, tokenizer.encode_batch([item.text for item in group]), strict=True):
                writers[document.split].add(ids, tokenizer.end_of_text_id, len(document.text.encode()))
            n_documents += len(group)
            bar.update(n_documents, note=f"{n_documents:,} docs")
        splits = {name: writer.finish() for name, writer in writers.items()}
        train, validation = (splits[name] for name in SPLITS)
        if not train.documents:
            raise DataError(f"{out}: there is no training document to write.", "Run the corpus stage first.")
        bar.finish(f"{format_count(train.tokens)} tokens train, {format_count(validation.tokens)} validation")
    ShardsManifest(tokenizer.vocab_size, tokenizer.fingerprint, tokenizer.end_of_text_id, splits).write(out)
    text_tokens = sum(split.tokens - split.documents for split in splits.values())
    return {
        "tokens_train": train.tokens,
        "tokens_validation": validation.tokens,
        "bytes_train": train.text_bytes,
        "bytes_validation": validation.text_bytes,
        "documents_train": train.documents,
        "documents_validation": validation.documents,
        "dtype": dtype.name,
        "files": len(train.files) + len(validation.files),
        "bytes_per_token": (train.text_bytes + validation.text_bytes) / max(1, text_tokens),
    }


def _remove_old(out: Path) -> None:
    # The manifest first: without it, what is left of old shards is no longer taken for shards.
    (out / MANIFEST).unlink(missing_ok=True)
    for name in SPLITS:
        for path in [*out.glob(f"{name}-[0-9]*.bin"), *out.glob(f"{name}-[0-9]*.idx")]:
            path.unlink()


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in groups of a few MiB, so that the tokenizer can use every core in bounded memory."""
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document.text)
        if size >= GROUP_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


class _SplitWriter:
    """One split's stream of tokens, cut into files of exactly `shard_tokens` (the last has the rest)."""

    def __init__(self, out: Path, name: str, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self._out = out
        self._name = name
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._files: list[ShardFile] = []
        self._n_tokens = self._n_documents = self._text_bytes = 0
        self._file = contextlib.ExitStack()
        self._handle: IO[bytes] | None = None

    def __enter__(self) -> _SplitWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self._file.__exit__(kind, error, trace)

    def add(self, ids: list[int], end_of_text_id: int, text_bytes: int) -> None:
        """Append one document."""
        rest = np.array([*ids, end_of_text_id], dtype=self._dtype)
        while len(rest):
            if self._handle is None:
                self._begin_file()
            room = self._shard_tokens - self._tokens_here
            self._write(rest[:room])
            rest = rest[room:]
            if not len(rest):
                self._ends.append(self._tokens_here)
            if self._tokens_here == self._shard_tokens:
                self._end_file()
        self._n_documents += 1
        self._text_bytes += text_bytes

    def finish(self) -> Split:
        """Close the last file; what the manifest shall say."""
        if self._handle is not None:
            self._end_file()
        return Split(self._n_tokens, self._n_documents, self._text_bytes, tuple(self._files))

    def _begin_file(self) -> None:
        path = self._out / f"{self._name}-{len(self._files):05d}.bin"
        self._handle = self._file.enter_context(atomic_writer(path, binary=True))
        self._checksum = xxhash.xxh3_128()
        self._tokens_here = 0
        self._ends: list[int] = []

    def _write(self, ids: np.ndarray) -> None:
        assert self._handle is not None
        data = ids.tobytes()
        self._handle.write(data)
        self._checksum.update(data)
        self._tokens_here += len(ids)
        self._n_tokens += len(ids)

    def _end_file(self) -> None:
        self._file.close()
        self._handle = None
        number = len(self._files)
        index = np.array(self._ends, dtype=INDEX_DTYPE).tobytes()
        index_name = f"{self._name}-{number:05d}.idx"
        with atomic_writer(self._out / index_name, binary=True) as handle:
            handle.write(index)
        self._files.append(
            ShardFile(
                name=f"{self._name}-{number:05d}.bin",
                tokens=self._tokens_here,
                checksum=self._checksum.hexdigest(),
                index_name=index_name,
                documents=len(self._ends),
                index_checksum=xxhash.xxh3_128_hexdigest(index),
            )
        )
