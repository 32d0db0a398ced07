"""Shards to the files that other programs train on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from groundup.errors import GroundupError
from groundup.shards.external_formats import megatron_paths, write_ids, write_megatron_index
from groundup.shards.format import SPLITS, ShardsManifest
from groundup.shards.read import TokenShards

EXPORTED = ("nanogpt", "megatron")


def export_shards(folder: str | Path, out: str | Path, format: str, *, force: bool = False) -> list[Path]:
    """Write shards as another program reads them.

    nanogpt: `train.bin`, `val.bin`. megatron: `train_text_document.bin` and `.idx`, `validation_text_document.…`; one
    sequence a document.

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
            f"{folder}: {manifest.vocab_size:,} ids do not fit in nanoGPT's uint16.", "Use --format megatron."
        )
    files = {}
    for name in SPLITS:
        if name in manifest.splits and manifest.splits[name].files:
            short = "train" if name == "train" else "val"
            files[name] = (
                [out / f"{short}.bin"] if format == "nanogpt" else [*megatron_paths(out / f"{name}_text_document")]
            )
    written = [path for paths in files.values() for path in paths]
    if not force and (there := [path for path in written if path.exists()]):
        raise GroundupError(f"{there[0]}: is there already.", "Name another folder, or replace it with --force.")
    for name, paths in files.items():
        shards = TokenShards.open(folder, name)
        dtype = shards.dtype if shards.dtype.itemsize == 2 else np.dtype("<i4")
        write_ids(paths[-1], (block.astype(dtype, copy=False) for block in shards.blocks()))
        if format == "megatron":
            write_megatron_index(paths[0], np.diff(shards.document_ends(), prepend=0), dtype)
    return written
