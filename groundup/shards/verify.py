"""Whether a folder of shards is what its manifest says, byte by byte and document by document."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from groundup.errors import ArtifactError
from groundup.files import file_digest
from groundup.shards.format import INDEX_DTYPE, MANIFEST, ShardFile, ShardsManifest, Split

BLOCK_TOKENS = 1 << 22


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        path: the file.
        offset: the byte at which it is wrong, or None where the file as a whole is.
        what: what is wrong.
    """

    path: Path
    offset: int | None
    what: str

    def __str__(self) -> str:
        where = f"{self.path}" if self.offset is None else f"{self.path}, byte {self.offset:,}"
        return f"{where}: {self.what}"


@dataclass(frozen=True)
class Verification:
    """What was looked at, and what is wrong.

    Attributes:
        files: .bin and .idx files looked at.
        tokens: that the manifest names.
        documents: that the manifest names.
        faults: in the order of the files; at most one of a kind for each file.
    """

    files: int
    tokens: int
    documents: int
    faults: tuple[Fault, ...]


def verify_shards(folder: str | Path) -> Verification:
    """Read every file of a folder of shards and compare.

    Looked at: sizes and checksums; every id is in the vocabulary; ends of documents rise, lie in their file, and
    are as many as the manifest says; every document ends with `<|endoftext|>` and the last one with the stream.

    Raises:
        ArtifactError: the manifest is missing or damaged (then nothing else can be judged).
    """
    folder = Path(folder)
    manifest = ShardsManifest.read(folder)
    faults: list[Fault] = []
    for split in manifest.splits.values():
        for file in split.files:
            faults += _faults_of_file(folder, file, manifest)
        faults += _faults_of_split(folder, split)
    return Verification(
        files=2 * sum(len(split.files) for split in manifest.splits.values()),
        tokens=sum(split.tokens for split in manifest.splits.values()),
        documents=sum(split.documents for split in manifest.splits.values()),
        faults=tuple(faults),
    )


def _faults_of_file(folder: Path, file: ShardFile, manifest: ShardsManifest) -> Iterator[Fault]:
    path, index_path = folder / file.name, folder / file.index_name
    tokens_fit = yield from _size_faults(path, file.tokens * manifest.dtype.itemsize)
    index_fits = yield from _size_faults(index_path, file.documents * INDEX_DTYPE.itemsize)
    if tokens_fit:
        yield from _token_faults(path, file, manifest)
    if index_fits:
        if file_digest(index_path) != file.index_checksum:
            yield Fault(index_path, None, "damaged, its checksum does not fit")
        ends = np.fromfile(index_path, dtype=INDEX_DTYPE)
        yield from _index_faults(index_path, ends, file)
        if tokens_fit and manifest.end_of_text_id is not None:
            yield from _border_faults(path, ends, file, manifest)


def _size_faults(path: Path, n_bytes: int) -> Generator[Fault, None, bool]:
    """Yields a fault if the file has another size; returns whether it fits."""
    try:
        size = path.stat().st_size
    except OSError as error:
        yield Fault(path, None, f"missing or unreadable ({error.strerror})")
        return False
    if size != n_bytes:
        yield Fault(path, min(size, n_bytes), f"{size:,} bytes instead of {n_bytes:,}")
    return size == n_bytes


def _token_faults(path: Path, file: ShardFile, manifest: ShardsManifest) -> Iterator[Fault]:
    checksum = xxhash.xxh3_128()
    outside: Fault | None = None
    for first, tokens in _blocks(path, manifest.dtype):
        checksum.update(tokens.data)
        if outside is None and int(tokens.max(initial=0)) >= manifest.vocab_size:
            place = int(np.argmax(tokens >= manifest.vocab_size))
            offset = (first + place) * manifest.dtype.itemsize
            outside = Fault(path, offset, f"id {tokens[place]}, but the vocabulary has {manifest.vocab_size} entries")
    if checksum.hexdigest() != file.checksum:
        yield Fault(path, None, "damaged, its checksum does not fit")
    if outside is not None:
        yield outside


def _blocks(path: Path, dtype: np.dtype[Any]) -> Iterator[tuple[int, np.ndarray]]:
    first = 0
    with path.open("rb") as handle:
        while len(tokens := np.fromfile(handle, dtype=dtype, count=BLOCK_TOKENS)):
            yield first, tokens
            first += len(tokens)


def _index_faults(path: Path, ends: np.ndarray, file: ShardFile) -> Iterator[Fault]:
    falls = np.flatnonzero(ends[1:] <= ends[:-1]) + 1
    if len(falls):
        place = int(falls[0])
        what = f"document end {ends[place]} does not follow {ends[place - 1]}"
        yield Fault(path, place * INDEX_DTYPE.itemsize, what)
    outside = np.flatnonzero((ends < 1) | (ends > file.tokens))
    if len(outside):
        place = int(outside[0])
        what = f"document end {ends[place]} is not in the file's {file.tokens} tokens"
        yield Fault(path, place * INDEX_DTYPE.itemsize, what)


def _border_faults(path: Path, ends: np.ndarray, file: ShardFile, manifest: ShardsManifest) -> Iterator[Fault]:
    if not file.tokens or not len(ends):
        return
    inside = ends[(ends >= 1) & (ends <= file.tokens)].astype(np.int64)
    last_ids = np.memmap(path, dtype=manifest.dtype, mode="r")[inside - 1]
    wrong = np.flatnonzero(last_ids != manifest.end_of_text_id)
    if len(wrong):
        place = int(inside[wrong[0]]) - 1
        what = f"a document ends with id {last_ids[wrong[0]]}, not with end-of-text ({manifest.end_of_text_id})"
        yield Fault(path, place * manifest.dtype.itemsize, what)


def _faults_of_split(folder: Path, split: Split) -> Iterator[Fault]:
    for what, said, found in (
        ("tokens", split.tokens, sum(file.tokens for file in split.files)),
        ("documents", split.documents, sum(file.documents for file in split.files)),
    ):
        if said != found:
            yield Fault(folder / MANIFEST, None, f"{said:,} {what}, but its files have {found:,}")
    if split.files and (folder / split.files[-1].index_name).is_file():
        file = split.files[-1]
        ends = np.fromfile(folder / file.index_name, dtype=INDEX_DTYPE)
        if not len(ends) or int(ends[-1]) != file.tokens:
            yield Fault(folder / file.index_name, None, "the last document is not closed at the stream's end")


def refuse_faults(verification: Verification) -> None:
    """Raise if anything is wrong.

    Raises:
        ArtifactError: naming every fault.
    """
    if verification.faults:
        first, *rest = map(str, verification.faults)
        raise ArtifactError("\n".join([first, *rest]), "Make the shards again with --from shards.")
