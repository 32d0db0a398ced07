"""Weights of a folder, one tensor at a time: safetensors, in one file or in several with an index.

The safetensors library checks every header before a tensor is read. The tensors are read without it: nothing is mapped,
so memory holds what was asked for, and a file that is cut short meanwhile gives an error instead of a signal. Pickles
are refused: to load one is to run it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from groundup.errors import ArtifactError
from groundup.untrusted import MOST_CONFIG_BYTES, file_inside, ordinary_file, parse_object, read_object, reading

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CHECKPOINT_FILE = "weights.safetensors"
"""The weights' file of a training checkpoint."""

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes of weights."""
PACKED_DTYPES = {"I8": torch.int8, "U8": torch.uint8}
"""Those of quantized weights' values."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_DAMAGED = "The file is damaged: get or make it again."


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file: `dtype` is safetensors' name of it, `begin` and `n_bytes` say where its bytes are."""

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
        self.read_shared = functools.lru_cache(maxsize=2)(self.read)  # of those that several parameters are cut from

    def dtype(self, name: str, *, quantized: bool = False) -> torch.dtype:
        """A tensor's dtype.

        Raises:
            ArtifactError: weights cannot have it, or only those of a model that groundup has quantized.
        """
        stored, known = self.tensors[name], DTYPES | PACKED_DTYPES if quantized else DTYPES
        if stored.dtype not in known:
            raise ArtifactError(
                f"{stored.file}: {name} has dtype {stored.dtype}; weights have {', '.join(DTYPES)}.",
                "Weights that others quantized cannot be read; look for the model they were made from.",
            )
        return known[stored.dtype]

    def read(self, name: str) -> Tensor:
        """A tensor, in memory of its own.

        Raises:
            ArtifactError: of a dtype that weights cannot have, or the file is no longer what its header says.
        """
        stored, dtype = self.tensors[name], self.dtype(name, quantized=True)
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
    """Every tensor of a safetensors file; the library holds shapes, dtypes, places and the file's size to each other.

    Raises:
        ArtifactError: it is not such a file, or damaged.
    """
    with reading(str(path), fix=_DAMAGED), ordinary_file(path).open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if MOST_CONFIG_BYTES < length < path.stat().st_size:
            raise ArtifactError(f"{path}: cannot be read (its header is {length:,} bytes long).", _DAMAGED)
        with safe_open(path, "np"):
            header = parse_object(handle.read(length), f"{path}: cannot be read: its header")
    header.pop("__metadata__", None)
    found = {name: (entry["dtype"], entry["shape"], entry["data_offsets"]) for name, entry in header.items()}
    return {
        name: StoredTensor(path, dtype, tuple(shape), 8 + length + begin, end - begin)
        for name, (dtype, shape, (begin, end)) in found.items()
    }


def _open_shards(folder: Path) -> Weights:
    index = file_inside(folder, INDEX_FILE)
    places = read_object(index, MOST_CONFIG_BYTES).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ArtifactError(f"{index}: has no weight_map of tensors to files.")
    found: dict[tuple[str, str], StoredTensor] = {}
    for file in sorted(set(places.values())):
        if not file.endswith(".safetensors"):
            raise ArtifactError(f"{index}: names the file {file!r:.80}, which is no safetensors.")
        found |= {(name, file): stored for name, stored in read_header(file_inside(folder, file)).items()}
    for name, file in sorted(found.keys() ^ set(places.items()))[:1]:
        raise ArtifactError(f"{index}: does not fit {file}: {name!r:.80} stands in only one of them.", _DAMAGED)
    return Weights(index, {name: stored for (name, _), stored in found.items()})
