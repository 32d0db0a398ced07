"""Tensors to safetensors files, one at a time: the header is known before the first tensor is.

The bytes are those that the safetensors library writes for the same tensors (a test compares them); unlike there,
memory holds one tensor, not all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from groundup.files import write_json
from groundup.interop.read_weights import DTYPES, INDEX_FILE, PACKED_DTYPES, WEIGHTS_FILE

_NAMES = {dtype: name for name, dtype in (DTYPES | PACKED_DTYPES).items()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_weights(
    folder: Path | None,
    specs: Sequence[TensorSpec],
    get: Callable[[str], Tensor],
    *,
    most_bytes: int | None = None,
) -> int:
    """Write tensors as `model.safetensors`, or as several files and an index; for use inside `atomic_folder`.

    Args:
        folder: where; None asks for the tensors in the same order and writes nothing (the other processes of a world
            whose tensors are gathered by all).
        specs: the tensors, in any order.
        get: gives a tensor by its name, once each.
        most_bytes: of tensors in a file; None: one file.

    Returns:
        The tensors' bytes.
    """
    # safetensors' own order: wide dtypes first, so that every tensor is aligned; then by name.
    order = sorted(specs, key=lambda spec: (-spec.dtype.itemsize, spec.name))
    shards: list[list[TensorSpec]] = [[]]
    room = most_bytes
    for spec in order:
        if room is not None and most_bytes is not None:
            if spec.n_bytes > room and shards[-1]:
                shards.append([])
                room = most_bytes
            room -= spec.n_bytes
        shards[-1].append(spec)
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = WEIGHTS_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        places |= dict.fromkeys((spec.name for spec in shard), name)
        _write_file(None if folder is None else folder / name, shard, get)
    total = sum(spec.n_bytes for spec in specs)
    if folder is not None and len(shards) > 1:
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})
    return total


def _write_file(path: Path | None, specs: Sequence[TensorSpec], get: Callable[[str], Tensor]) -> None:
    if path is None:
        for spec in specs:
            get(spec.name)
        return
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.n_bytes],
        }
        offset += spec.n_bytes
    contents = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    contents += b" " * (-len(contents) % 8)
    with path.open("wb") as handle:
        handle.write(len(contents).to_bytes(8, "little") + contents)
        for spec in specs:
            tensor = get(spec.name)
            assert tensor.shape == spec.shape, (spec, tensor.shape)
            assert tensor.dtype == spec.dtype, (spec, tensor.dtype)
            handle.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
