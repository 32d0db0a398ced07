"""One split's stream of tokens, cut into files of exactly so many tokens; each file appears whole or not at all."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from groundup.files import atomic_writer, own_folder, remove_partials
from groundup.shards.format import INDEX_DTYPE, MANIFEST, SPLITS, ShardFile


class StreamWriter:
    """Writes one split's files; use it in a `with` statement: an error leaves no half file behind.

    Args:
        out: the folder.
        split: "train" or "validation".
        dtype: of the ids on disk.
        shard_tokens: ids in a file (the last has the rest; default: one file for all).

    Attributes:
        files: the files that are complete.
    """

    def __init__(self, out: Path, split: str, dtype: np.dtype[Any], shard_tokens: int = 1 << 62) -> None:
        self._out = out
        self._split = split
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._file = contextlib.ExitStack()
        self._handle: IO[bytes] | None = None
        self.files: list[ShardFile] = []

    def __enter__(self) -> StreamWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def append(self, tokens: np.ndarray, ends: np.ndarray) -> None:
        """Append ids, any number of documents or a part of one.

        Args:
            tokens: (n,) ids.
            ends: where documents end in them, (n_documents,), each 1 … n, rising.
        """
        tokens = tokens.astype(self._dtype, copy=False)
        begin = 0
        while begin < len(tokens):
            if self._handle is None:
                self._begin_file()
            end = min(len(tokens), begin + self._shard_tokens - self._tokens_here)
            here = ends[np.searchsorted(ends, begin, side="right") : np.searchsorted(ends, end, side="right")]
            self._ends.append(here + (self._tokens_here - begin))
            self._write(tokens[begin:end])
            begin = end
            if self._tokens_here == self._shard_tokens:
                self._end_file()

    def finish(self) -> tuple[ShardFile, ...]:
        """Close the last file; all files."""
        if self._handle is not None:
            self._end_file()
        return tuple(self.files)

    def _begin_file(self) -> None:
        number = len(self.files)
        self._name, self._index_name = f"{self._split}-{number:05d}.bin", f"{self._split}-{number:05d}.idx"
        self._handle = self._file.enter_context(atomic_writer(self._out / self._name, binary=True))
        self._checksum = xxhash.xxh3_128()
        self._tokens_here = 0
        self._ends: list[np.ndarray] = []

    def _write(self, tokens: np.ndarray) -> None:
        assert self._handle is not None
        data = np.ascontiguousarray(tokens).data
        self._handle.write(data)
        self._checksum.update(data)
        self._tokens_here += len(tokens)

    def _end_file(self) -> None:
        self._file.close()
        self._handle = None
        ends = np.concatenate(self._ends).astype(INDEX_DTYPE)
        with atomic_writer(self._out / self._index_name, binary=True) as handle:
            handle.write(ends.data)
        checksums = self._checksum.hexdigest(), xxhash.xxh3_128_hexdigest(ends.data)
        self.files.append(
            ShardFile(self._name, self._tokens_here, checksums[0], self._index_name, len(ends), checksums[1])
        )


def begin_shards(out: Path) -> None:
    """Make the folder for shards, and remove those that it has and what a killed process left half-written in it.

    Raises:
        RunError: it holds files that are not ours.
    """
    own_folder(out)
    remove_partials(out)
    # The manifest first: without it, what is left of old shards is no longer taken for shards.
    (out / MANIFEST).unlink(missing_ok=True)
    for split in SPLITS:
        for path in [*out.glob(f"{split}-[0-9]*.bin"), *out.glob(f"{split}-[0-9]*.idx")]:
            path.unlink()
