"""Shards to the files that other programs train on.

llm.c has end-of-text before each document, these shards have it after: the stream is turned by one place on the way
out, and back on the way in (`import_ids`), so that shards exported and imported again are the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from groundup.errors import GroundupError
from groundup.files import atomic_writer
from groundup.shards.external_formats import megatron_paths, write_llmc, write_megatron_index
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
    files = {
        split: _files(out, format, split, len(manifest.splits[split].files))
        for split in SPLITS
        if manifest.splits.get(split) and manifest.splits[split].files
    }
    written = [path for paths in files.values() for path in paths]
    if not force and (there := [path for path in written if path.exists()]):
        raise GroundupError(f"{there[0]}: is there already.", "Name another folder, or replace it with --force.")
    for split, paths in files.items():
        _EXPORTERS[format](TokenShards.open(folder, split), manifest, paths)
    return written


def _files(out: Path, format: str, split: str, n_shards: int) -> list[Path]:
    name = "train" if split == "train" else "val"
    if format == "nanogpt":
        return [out / f"{name}.bin"]
    if format == "llmc":
        return [out / f"{name}_{number:06d}.bin" for number in range(n_shards)]
    return list(megatron_paths(out / f"{split}_text_document"))


def _export_nanogpt(shards: TokenShards, manifest: ShardsManifest, paths: list[Path]) -> None:
    with atomic_writer(paths[0], binary=True) as handle:
        for block in shards.blocks():
            handle.write(block.data)


def _export_llmc(shards: TokenShards, manifest: ShardsManifest, paths: list[Path]) -> None:
    first = 0
    for path, file in zip(paths, manifest.splits[shards.split].files, strict=True):
        write_llmc(path, _turned_blocks(shards, first, file.tokens), file.tokens, shards.dtype)
        first += file.tokens


def _turned_blocks(shards: TokenShards, first: int, n_tokens: int, block: int = 1 << 22) -> Iterator[np.ndarray]:
    """The ids of places `first` … of the stream turned by one, so that end-of-text comes before each document."""
    turn = 0 if shards.end_of_text_id is None else 1
    for begin in range(first - turn, first - turn + n_tokens, block):
        length = min(block, first - turn + n_tokens - begin)
        if begin < 0:  # the stream's last end-of-text
            parts = [shards.window(shards.n_tokens - 1, 1), shards.window(0, length - 1)]
            yield np.concatenate(parts).astype(shards.dtype)
        else:
            yield shards.window(begin, length).astype(shards.dtype)


def _export_megatron(shards: TokenShards, manifest: ShardsManifest, paths: list[Path]) -> None:
    index_path, path = paths
    dtype = np.dtype("<u2") if shards.dtype.itemsize == 2 else np.dtype("<i4")
    with atomic_writer(path, binary=True) as handle:
        for block in shards.blocks():
            handle.write(block.astype(dtype, copy=False).data)
    write_megatron_index(index_path, np.diff(shards.document_ends(), prepend=0), dtype)


_EXPORTERS: dict[str, Callable[[TokenShards, ShardsManifest, list[Path]], None]] = {
    "nanogpt": _export_nanogpt,
    "llmc": _export_llmc,
    "megatron": _export_megatron,
}
