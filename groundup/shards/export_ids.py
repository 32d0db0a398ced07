"""Shards to the files that other programs train on.

llm.c has end-of-text before each document, these shards have it after: the stream is turned by one place on the way
out, and back on the way in (`import_ids`), so that shards exported and imported again are the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from groundup.errors import GroundupError
from groundup.shards.external_formats import BLOCK_TOKENS, megatron_paths, write_ids, write_llmc, write_megatron_index
from groundup.shards.format import SPLITS, ShardsManifest
from groundup.shards.read import TokenShards

EXPORTED = ("nanogpt", "llmc", "megatron")


def export_shards(folder: str | Path, out: str | Path, format: str, *, force: bool = False) -> list[Path]:
    """Write shards as another program reads them.

    nanogpt: `train.bin`, `val.bin`. llmc: `train_000000.bin`, …, `val_000000.bin`, … one for each shard. megatron:
    `train_text_document.bin` and `.idx`, `validation_text_document.…`; one sequence a document.

    Args:
        folder: of the shards; their checksums are compared first.
        out: the folder for the files.
        format: one of `EXPORTED`.
        force: replace files that are there.

    Returns:
        The files written.

    Raises:
        ArtifactError: the shards are damaged.
        GroundupError: the format cannot hold them, or one of the files is there already.
    """
    if format not in EXPORTED:
        raise GroundupError(f"--format {format}: unknown.", f"Formats to write: {', '.join(EXPORTED)}.")
    folder, out = Path(folder), Path(out)
    manifest = ShardsManifest.read(folder)
    if format == "nanogpt" and manifest.dtype.itemsize != 2:
        raise GroundupError(
            f"{folder}: {manifest.vocab_size:,} ids do not fit in nanoGPT's uint16.", "Use --format llmc or megatron."
        )
    splits = {name: manifest.splits[name].files for name in SPLITS if name in manifest.splits}
    files = {name: _paths(out, format, name, len(shards)) for name, shards in splits.items() if shards}
    written = [path for paths in files.values() for path in paths]
    if not force and (there := [path for path in written if path.exists()]):
        raise GroundupError(f"{there[0]}: is there already.", "Name another folder, or replace it with --force.")
    for name, paths in files.items():
        shards = TokenShards.open(folder, name)
        if format == "nanogpt":
            write_ids(paths[0], shards.blocks())
        elif format == "llmc":
            first = 0
            for path, file in zip(paths, splits[name], strict=True):
                write_llmc(path, _turned_blocks(shards, first, file.tokens), file.tokens, shards.dtype)
                first += file.tokens
        else:
            dtype = np.dtype("<u2") if shards.dtype.itemsize == 2 else np.dtype("<i4")
            write_ids(paths[1], (block.astype(dtype, copy=False) for block in shards.blocks()))
            write_megatron_index(paths[0], np.diff(shards.document_ends(), prepend=0), dtype)
    return written


def _paths(out: Path, format: str, split: str, n_shards: int) -> list[Path]:
    name = "train" if split == "train" else "val"
    if format == "nanogpt":
        return [out / f"{name}.bin"]
    if format == "llmc":
        return [out / f"{name}_{number:06d}.bin" for number in range(n_shards)]
    return list(megatron_paths(out / f"{split}_text_document"))


def _turned_blocks(shards: TokenShards, first: int, n_tokens: int) -> Iterator[np.ndarray]:
    """The ids of places `first` … of the stream turned by one, so that end-of-text comes before each document."""
    first -= 0 if shards.end_of_text_id is None else 1
    last = first + n_tokens
    if first < 0:
        yield shards.window(shards.n_tokens - 1, 1).astype(shards.dtype)  # the stream's last end-of-text
        first = 0
    for begin in range(first, last, BLOCK_TOKENS):
        yield shards.window(begin, min(BLOCK_TOKENS, last - begin)).astype(shards.dtype)
