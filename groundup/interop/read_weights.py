"""Weights of a folder, one tensor at a time: safetensors, in one file or in several with an index.

Nothing is mapped and nothing is read ahead: memory holds the tensors that were asked for, and a file that is cut short
while it is read gives an error instead of a signal. Every header is checked before a tensor is read. The format is
eight bytes with the header's length, the header (JSON: name → dtype, shape, offsets) and the tensors' bytes without
holes (https://huggingface.co/docs/safetensors). Pickles are refused: to load one is to run it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groundup.errors import ArtifactError
from groundup.untrusted import MOST_CONFIG_BYTES, file_inside, ordinary_file, parse_object, read_object, reading

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CHECKPOINT_FILE = "weights.safetensors"
"""The weights' file of a training checkpoint."""

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes of weights; tensors of other dtypes are quantized, or no weights."""

_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_MOST_DIMENSIONS = 8
_DAMAGED = "The file is damaged: get or make it again."


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file.

    Attributes:
        file: which.
        dtype: safetensors' name of it.
        shape: its shape.
        begin: of its bytes in the file.
        n_bytes: their number.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    n_bytes: int


class Weights:
    """The tensors of a folder, by name; see `open_weights`.

    Args:
        source: what to call them in an error message.
        tensors: where each is.
    """

    def __init__(self, source: Path, tensors: dict[str, StoredTensor]) -> None:
        self.source = source
        self.tensors = tensors

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype.

        Raises:
            ArtifactError: weights cannot have it.
        """
        stored = self.tensors[name]
        if stored.dtype not in DTYPES:
            raise ArtifactError(
                f"{stored.file}: {name} has dtype {stored.dtype}; weights have {', '.join(DTYPES)}.",
                "Quantized weights cannot be read; look for the model they were made from.",
            )
        return DTYPES[stored.dtype]

    def read(self, name: str) -> Tensor:
        """A tensor, in memory of its own.

        Raises:
            ArtifactError: of a dtype that weights cannot have, or the file is no longer what its header says.
        """
        stored, dtype = self.tensors[name], self.dtype(name)
        with reading(str(stored.file)), stored.file.open("rb") as handle:
            contents = torch.empty(stored.n_bytes, dtype=torch.uint8)
            handle.seek(stored.begin)
            n_read = handle.readinto(contents.numpy().data)
        if n_read != stored.n_bytes:
            raise ArtifactError(f"{stored.file}: cannot be read (cut short in {name}).")
        return contents.view(dtype).view(stored.shape)


def open_weights(folder: Path) -> Weights:
    """The weights of a model's folder: headers are read and checked, tensors are not read.

    Raises:
        ArtifactError: there are none, only pickles, or the files do not hold together.
    """
    for name in (WEIGHTS_FILE, CHECKPOINT_FILE):
        if (folder / name).exists() or (folder / name).is_symlink():
            path = file_inside(folder, name)
            return Weights(path, read_header(path))
    if (folder / INDEX_FILE).exists() or (folder / INDEX_FILE).is_symlink():
        return _open_shards(folder)
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ArtifactError(
            f"{folder / pickles[0]}: is a pickle, which can run any code when it is loaded; groundup loads none.",
            "Take the safetensors that most models also come as, or have transformers save it again as such.",
        )
    raise ArtifactError(f"{folder / WEIGHTS_FILE}: cannot be read (not found).", "The folder has no safetensors.")


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file, with dtype, shape and place checked against the file's size.

    Raises:
        ArtifactError: it is not such a file, or damaged.
    """
    with reading(str(path), fix=_DAMAGED), ordinary_file(path).open("rb") as handle:
        size = path.stat().st_size
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or not 2 <= length <= size - 8:
            raise _unreadable(path, "no safetensors, or cut short")
        if length > MOST_CONFIG_BYTES:
            raise _unreadable(path, f"its header would be {length:,} bytes long")
        header = parse_object(handle.read(length), f"{path}: cannot be read: its header")
    header.pop("__metadata__", None)
    tensors = {name: _entry(path, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].n_bytes)):
        if stored.begin != end:
            fault = "overlap" if stored.begin < end else "leave a hole"
            raise _unreadable(path, f"the bytes of {name!r:.80} and of the tensor before it {fault}")
        end += stored.n_bytes
    if end != size:
        raise _unreadable(path, f"it has {size:,} bytes, its header describes {end:,}: cut short, or something behind")
    return tensors


def _entry(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _unreadable(path, f"{name!r:.80} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise _unreadable(path, f"{name!r:.80} has dtype {dtype!r:.40}, which the format does not have")
    if not _is_counts(shape) or len(shape) > _MOST_DIMENSIONS:
        raise _unreadable(path, f"{name!r:.80} has shape {shape!r:.80}")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _unreadable(path, f"{name!r:.80} has data_offsets {offsets!r:.80}")
    n_bytes = math.prod(shape) * _SIZES[dtype]
    if offsets[1] - offsets[0] != n_bytes:
        raise _unreadable(path, f"{name!r:.80} has {offsets[1] - offsets[0]:,} bytes, its shape needs {n_bytes:,}")
    return StoredTensor(path, dtype, tuple(shape), start + offsets[0], n_bytes)


def _open_shards(folder: Path) -> Weights:
    index = file_inside(folder, INDEX_FILE)
    places = read_object(index, MOST_CONFIG_BYTES).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ArtifactError(f"{index}: has no weight_map of tensors to files.")
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(places.values())):
        if not name.endswith(".safetensors"):
            raise ArtifactError(f"{index}: names the file {name!r:.80}, which is no safetensors.")
        for tensor, stored in read_header(file_inside(folder, name)).items():
            if tensor in tensors:
                raise ArtifactError(f"{index}: {tensor} stands in {tensors[tensor].file.name} and in {name}.")
            tensors[tensor] = stored
    for tensor, name in places.items():
        if tensor not in tensors or tensors[tensor].file.name != name:
            raise ArtifactError(
                f"{index}: says that {tensor!r:.80} is in {name}, which does not have it.", "Download the file again."
            )
    if len(tensors) > len(places):
        odd = sorted(tensors.keys() - places.keys())
        raise ArtifactError(f"{index}: does not name {odd[0]!r:.80}, which is in {tensors[odd[0]].file.name}.")
    return Weights(index, tensors)


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _unreadable(path: Path, why: str) -> ArtifactError:
    return ArtifactError(f"{path}: cannot be read ({why}).", _DAMAGED)
