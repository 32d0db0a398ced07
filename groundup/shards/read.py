"""Token shards as one long memory-mapped stream of ids."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from groundup.errors import ArtifactError
from groundup.files import value_digest
from groundup.integrity import check_files
from groundup.shards.format import AGAIN, INDEX_DTYPE, MANIFEST, ShardsManifest
from groundup.untrusted import reading


class TokenShards:
    """One split's tokens, mapped from its files and read as if they were one.

    Attributes:
        folder: where the files are.
        split: "train" or "validation".
        n_tokens: ids, `<|endoftext|>` after each document included.
        n_bytes: UTF-8 bytes of the text (0: unknown, converted from ids).
        n_documents: documents.
        vocab_size: of the tokenizer that made the ids.
        tokenizer_fingerprint: of the tokenizer that made the ids ("": unknown, converted from ids).
        end_of_text_id: of `<|endoftext|>`; None if documents are not closed by one (converted from ids).
        fingerprint: digest of everything above and of every file's checksum.
        dtype: how ids are stored.
    """

    def __init__(self, folder: Path, split: str, manifest: ShardsManifest, *, verify: bool = True) -> None:
        check_files(folder, manifest.records(split), AGAIN, digests=verify)
        self.folder = folder
        self._files = manifest.splits[split].files
        self.split = split
        self.n_tokens = manifest.splits[split].tokens
        self.n_bytes = manifest.splits[split].text_bytes
        self.n_documents = manifest.splits[split].documents
        self.vocab_size = manifest.vocab_size
        self.tokenizer_fingerprint = manifest.tokenizer
        self.end_of_text_id = manifest.end_of_text_id
        self.dtype = manifest.dtype
        self.fingerprint = value_digest(
            [self.vocab_size, self.tokenizer_fingerprint, self.end_of_text_id, self.n_bytes]
            + [[file.tokens, file.checksum, file.index_checksum] for file in self._files]
        )
        self._tokens = [mapped(folder / file.name, self.dtype, file.tokens) for file in self._files]
        self._ends = [mapped(folder / file.index_name, INDEX_DTYPE, file.documents) for file in self._files]
        self._starts = np.cumsum([0, *(file.tokens for file in self._files)])

    @classmethod
    def open(
        cls, folder: str | Path, split: str, *, tokenizer_fingerprint: str | None = None, verify: bool = True
    ) -> TokenShards:
        """Open a split ("train" or "validation") of a folder that `write_shards` made.

        Args:
            folder: the folder.
            split: the split.
            tokenizer_fingerprint: refuse shards of another tokenizer than this.
            verify: compare every file's digest, unless that was done since it was last touched; without it only
                sizes are compared.

        Raises:
            ArtifactError: a file is missing or damaged; the split is empty; the shards are another tokenizer's. The
                message names the file.
        """
        folder = Path(folder)
        manifest = ShardsManifest.read(folder)
        if tokenizer_fingerprint is not None and manifest.tokenizer != tokenizer_fingerprint:
            theirs = f"{manifest.tokenizer[:12]}…" if manifest.tokenizer else "unknown"
            raise ArtifactError(
                f"{folder / MANIFEST}: made with another tokenizer ({theirs}, here is {tokenizer_fingerprint[:12]}…); "
                "its ids would mean other text.",
                AGAIN,
            )
        if split not in manifest.splits or not manifest.splits[split].files:
            raise ArtifactError(f"{folder}: there are no {split} documents in these shards.", AGAIN)
        return cls(folder, split, manifest, verify=verify)

    def window(self, start: int, length: int) -> np.ndarray:
        """The ids `start` … `start + length - 1` of the stream, (length,) int64."""
        return self.windows(np.array([start]), length)[0]

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Many windows at once, (rows, length) int64: the ids `start` … `start + length - 1` for each of `starts`."""
        outside = (starts < 0) | (starts + length > self.n_tokens)
        if length < 0 or outside.any():
            raise IndexError(f"tokens {starts[outside][:1]} and {length} more, of {self.n_tokens}")
        out = np.empty((len(starts), length), dtype=np.int64)
        if not length:
            return out
        files = np.searchsorted(self._starts, starts, side="right") - 1
        offsets = starts - self._starts[files]
        for row, file, offset in zip(out, files.tolist(), offsets.tolist(), strict=True):
            piece = self._tokens[file][offset : offset + length]
            row[: len(piece)] = piece
            filled = len(piece)
            while filled < length:  # over the borders of files
                file += 1
                piece = self._tokens[file][: length - filled]
                row[filled : filled + len(piece)] = piece
                filled += len(piece)
        return out

    def document(self, number: int) -> np.ndarray:
        """Document `number` (0, 1, …): its ids, its closing `<|endoftext|>` included, (length,) int64."""
        if not 0 <= number < self.n_documents:
            raise IndexError(f"document {number} of {self.n_documents}")
        begin, end = np.append(0, self.document_ends())[number : number + 2].tolist()
        return self.window(begin, end - begin)

    def documents(self) -> Iterator[np.ndarray]:
        """Every document's ids, its closing `<|endoftext|>` included, in order: (length,) int64 each."""
        for begin, end in itertools.pairwise([0, *self.document_ends().tolist()]):
            yield self.window(begin, end - begin)

    def document_ends(self) -> np.ndarray:
        """Where each document ends in the stream, (n_documents,) int64; in memory, 8 bytes a document."""
        return np.concatenate([np.empty(0, dtype=np.int64), *map(self._ends_in, range(len(self._files)))])

    def _ends_in(self, file: int) -> np.ndarray:
        """Where the documents end that end in a file, in the stream: (n,) int64, rising.

        Raises:
            ArtifactError: the index is damaged.
        """
        ends = self._ends[file].astype(np.int64)
        if len(ends) and (ends[0] < 1 or ends[-1] > self._files[file].tokens or (np.diff(ends) < 1).any()):
            what = f"its documents' ends do not rise from 1 to the file's {self._files[file].tokens:,} tokens; damaged."
            raise ArtifactError(f"{self.folder / self._files[file].index_name}: {what}", AGAIN)
        return ends + self._starts[file]

    def blocks(self, n_tokens: int = 1 << 22) -> Iterator[np.ndarray]:
        """The whole stream in order, in pieces of at most `n_tokens` ids as they are stored."""
        for tokens in self._tokens:
            for begin in range(0, len(tokens), n_tokens):
                yield tokens[begin : begin + n_tokens]


def mapped(path: Path, dtype: np.dtype[Any], count: int) -> np.ndarray:
    """A file's values, mapped read-only: (count,)."""
    if not count:
        return np.empty(0, dtype=dtype)  # an empty file cannot be mapped
    # A plain array over the map: np.memmap's own class makes every slice several times slower.
    with reading(str(path), fix=AGAIN):
        return np.memmap(path, dtype=dtype, mode="r", shape=(count,)).view(np.ndarray)
