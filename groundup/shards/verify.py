"""Whether a folder of shards is what its manifest says, byte by byte and document by document."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from groundup.errors import ArtifactError
from groundup.files import file_digest
from groundup.shards.format import INDEX_DTYPE, ShardFile, ShardsManifest
from groundup.shards.read import mapped
from groundup.untrusted import file_inside, reading

BLOCK_TOKENS = 1 << 22


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        offset: the byte of the file at which it is wrong, or None where the file as a whole is.
    """

    path: Path
    offset: int | None
    what: str

    def __str__(self) -> str:
        return f"{self.path}{'' if self.offset is None else f', byte {self.offset:,}'}: {self.what}"


@dataclass(frozen=True)
class Verification:
    """What was looked at, and what is wrong.

    Attributes:
        files: .bin and .idx files looked at.
        tokens, documents: that the manifest names.
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
        ArtifactError: the manifest is missing or damaged, or its counts do not add up: nothing else can be judged.
    """
    folder = Path(folder)
    manifest = ShardsManifest.read(folder)
    splits = manifest.splits.values()
    faults = [
        fault
        for split in splits
        for file in split.files
        for fault in _faults_of_file(folder, file, manifest, is_last=file is split.files[-1])
    ]
    n_tokens, n_documents = (sum(getattr(split, what) for split in splits) for what in ("tokens", "documents"))
    return Verification(2 * sum(len(split.files) for split in splits), n_tokens, n_documents, tuple(faults))


def _faults_of_file(folder: Path, file: ShardFile, manifest: ShardsManifest, *, is_last: bool) -> Iterator[Fault]:
    path, index_path = folder / file.name, folder / file.index_name
    tokens = yield from _read(folder, file.name, manifest.dtype, file.tokens, file.checksum)
    ends = yield from _read(folder, file.index_name, INDEX_DTYPE, file.documents, file.index_checksum)
    if tokens is not None:
        for begin in range(0, len(tokens), BLOCK_TOKENS):
            block = tokens[begin : begin + BLOCK_TOKENS]
            if int(block.max()) >= manifest.vocab_size:
                place = begin + int(np.argmax(block >= manifest.vocab_size))
                what = f"id {tokens[place]}, but the vocabulary has {manifest.vocab_size} entries"
                yield Fault(path, place * manifest.dtype.itemsize, what)
                break
    if ends is None:
        return
    for place in np.flatnonzero(ends[1:] <= ends[:-1])[:1] + 1:
        what = f"document end {ends[place]} does not follow {ends[place - 1]}"
        yield Fault(index_path, int(place) * INDEX_DTYPE.itemsize, what)
    is_inside = (ends >= 1) & (ends <= file.tokens)
    for place in np.flatnonzero(~is_inside)[:1]:
        what = f"document end {ends[place]} is not in the file's {file.tokens} tokens"
        yield Fault(index_path, int(place) * INDEX_DTYPE.itemsize, what)
    if is_last and (not len(ends) or int(ends[-1]) != file.tokens):
        yield Fault(index_path, None, "the last document is not closed at the stream's end")
    if tokens is not None and manifest.end_of_text_id is not None:
        last = ends[is_inside].astype(np.int64) - 1
        for place in last[tokens[last] != manifest.end_of_text_id][:1]:
            what = f"a document ends with id {tokens[place]}, not with end-of-text ({manifest.end_of_text_id})"
            yield Fault(path, int(place) * manifest.dtype.itemsize, what)


def _read(
    folder: Path, name: str, dtype: np.dtype[Any], count: int, checksum: str
) -> Generator[Fault, None, np.ndarray | None]:
    """Yields what is wrong with a file's bytes; returns its values, mapped, if there are as many as there should be."""
    path = folder / name
    try:
        with reading(str(path)):
            size, n_bytes = file_inside(folder, name).stat().st_size, count * dtype.itemsize
            if size != n_bytes:
                yield Fault(path, min(size, n_bytes), f"{size:,} bytes instead of {n_bytes:,}")
                return None
            if file_digest(path) != checksum:
                yield Fault(path, None, "damaged, its checksum does not fit")
            return mapped(path, dtype, count)
    except ArtifactError as error:
        yield Fault(path, None, error.message.removeprefix(f"{path}: "))
        return None
