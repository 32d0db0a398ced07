"""Token shards as one long memory-mapped stream of ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from groundup.errors import ArtifactError
from groundup.files import file_digest, value_digest
from groundup.shards.format import AGAIN, INDEX_DTYPE, MANIFEST, ShardsManifest


class TokenShards:
    """One split's tokens, mapped from its files and read as if they were one.

    Attributes:
        n_tokens: ids, `<|endoftext|>` after each document included.
        n_bytes: UTF-8 bytes of the text.
        n_documents: documents.
        vocab_size: of the tokenizer that made the ids.
        tokenizer_fingerprint: of the tokenizer that made the ids.
        end_of_text_id: of `<|endoftext|>`.
        fingerprint: digest of everything above and of every file's checksum.
        dtype: how ids are stored.
    """

    def __init__(self, folder: Path, split: str, manifest: ShardsManifest) -> None:
        self._folder = folder
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
        self._tokens = [_mapped(folder / file.name, self.dtype, file.tokens) for file in self._files]
        self._ends = [_mapped(folder / file.index_name, INDEX_DTYPE, file.documents) for file in self._files]
        self._starts = np.cumsum([0, *(file.tokens for file in self._files)])

    @classmethod
    def open(cls, folder: str | Path, split: str, *, tokenizer_fingerprint: str | None = None) -> TokenShards:
        """Open a split ("train" or "validation") of a folder that `write_shards` made.

        Args:
            tokenizer_fingerprint: refuse shards of another tokenizer than this.

        Raises:
            ArtifactError: a file is missing, has the wrong size or a damaged manifest; the split is empty; the
                shards are another tokenizer's. The message names the file.
        """
        folder = Path(folder)
        manifest = ShardsManifest.read(folder)
        if tokenizer_fingerprint is not None and manifest.tokenizer != tokenizer_fingerprint:
            raise ArtifactError(
                f"{folder / MANIFEST}: made with another tokenizer ({manifest.tokenizer[:12]}…, here is "
                f"{tokenizer_fingerprint[:12]}…); its ids would mean other text.",
                AGAIN,
            )
        if split not in manifest.splits or not manifest.splits[split].files:
            raise ArtifactError(f"{folder}: there are no {split} documents in these shards.", AGAIN)
        return cls(folder, split, manifest)

    def window(self, start: int, length: int) -> np.ndarray:
        """The ids `start` … `start + length - 1` of the stream.

        Returns:
            (length,) int64.
        """
        if start < 0 or length < 0 or start + length > self.n_tokens:
            raise IndexError(f"tokens {start} to {start + length} of {self.n_tokens}")
        out = np.empty(length, dtype=np.int64)
        filled = 0
        file = int(np.searchsorted(self._starts, start, side="right")) - 1
        while filled < length:
            offset = start + filled - int(self._starts[file])
            piece = self._tokens[file][offset : offset + length - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            file += 1
        return out

    def documents(self) -> Iterator[np.ndarray]:
        """Every document's ids, its closing `<|endoftext|>` included, in order: (length,) int64 each."""
        begin = 0
        for start, ends in zip(self._starts, self._ends, strict=False):
            for end in ends:
                stop = int(start) + int(end)
                yield self.window(begin, stop - begin)
                begin = stop

    def verify(self) -> None:
        """Read every file through and compare it with its checksum.

        Raises:
            ArtifactError: naming the first damaged file.
        """
        for file in self._files:
            for name, checksum in ((file.name, file.checksum), (file.index_name, file.index_checksum)):
                path = self._folder / name
                if not path.is_file() or file_digest(path) != checksum:
                    raise ArtifactError(f"{path}: damaged, its checksum does not fit.", AGAIN)


def _mapped(path: Path, dtype: np.dtype[Any], count: int) -> np.ndarray:
    """A file's values, mapped read-only: (count,)."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ArtifactError(f"{path}: missing or unreadable ({error.strerror}).", AGAIN) from error
    if size != count * dtype.itemsize:
        raise ArtifactError(f"{path}: {size:,} bytes instead of {count * dtype.itemsize:,}; cut off or damaged.", AGAIN)
    if not count:
        return np.empty(0, dtype=dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,))
