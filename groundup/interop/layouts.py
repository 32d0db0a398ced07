"""Where each of our parameters stands in a file: other names, transposed, fused with others, or one tensor an expert.

A family's layout is a table of modules (`families.py`); a module that the table does not name stands under our name,
with `model.` before it, as in Llama. Both directions follow from the table: what to read for a parameter, and what a
tensor of the file is made of. The vocabulary's filling rows are no part of any file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from groundup.model import ModelConfig

Shape = tuple[int, ...]

_LAYER = re.compile(r"layers\.(\d+)\.")
_VOCABULARY = ("embed_tokens", "lm_head")
_OF_EXPERTS = re.compile(r"\.mlp\.(gate|up|down)_proj\.")


@dataclass(frozen=True)
class ModuleMapping:
    """Where a module's parameters stand.

    Attributes:
        module: its name there; `*` is the layer's number, and `#` the expert's: then each has a tensor of its own.
        transposed: matrices are (in, out), as in GPT-2's Conv1D.
        slot: which part it is of a tensor in which several stand one after the other, along the outputs.
        slots: how many parts that tensor has, all of one size.
        suffixed: tensors are named `module.weight`; else as the module.
    """

    module: str
    transposed: bool = False
    slot: int = 0
    slots: int = 1
    suffixed: bool = True


ModuleMappings = Mapping[str, ModuleMapping]
"""By our module's name, with `*` for the layer's number."""


@dataclass(frozen=True)
class StoredPart:
    """Where (an expert's part of) one parameter stands.

    Attributes:
        tensor: in the file.
        place: how.
    """

    tensor: str
    place: ModuleMapping


@dataclass(frozen=True)
class Made:
    """What a tensor of the file is made of: our parameters in the order of their slots.

    Attributes:
        shape: in the file.
        place: of the first; all are transposed, or none.
        pieces: parameters, each with an expert's number, or None for the whole.
    """

    shape: Shape
    place: ModuleMapping
    pieces: tuple[tuple[str, int | None], ...]


@dataclass(frozen=True)
class Layout:
    """All parameters of one model in one kind of file.

    Attributes:
        parts: of each of our parameters: one, or as many as there are experts.
        tensors: of the file.
    """

    parts: dict[str, tuple[StoredPart, ...]]
    tensors: dict[str, Made]


def shapes_in_file(shapes: Mapping[str, Shape], config: ModelConfig) -> dict[str, Shape]:
    """Our parameters' shapes without the rows that fill up the vocabulary."""
    return {
        name: (config.vocab_size, *shape[1:]) if name.partition(".")[0] in _VOCABULARY else shape
        for name, shape in shapes.items()
    }


def make_layout(places: ModuleMappings, shapes: Mapping[str, Shape], n_experts: int = 0) -> Layout:
    """The layout of a model's parameters by a family's table.

    Args:
        places: the table; empty for our own names.
        shapes: of our parameters, as `shapes_in_file` gives them.
        n_experts: of the model.
    """
    parts: dict[str, tuple[StoredPart, ...]] = {}
    collected: dict[str, list[tuple[int, str, int | None, ModuleMapping, Shape]]] = {}
    for name, shape in shapes.items():
        module, kind = name.rsplit(".", 1)
        number = _LAYER.match(module)
        place = places.get(_LAYER.sub("layers.*.", module)) or _own_place(module)
        outside = place.module.replace("*", number[1]) if number else place.module
        outside = f"{outside}.{kind}" if place.suffixed else outside
        each = range(n_experts) if "#" in place.module else [None]
        found = []
        for index in each:
            tensor = outside if index is None else outside.replace("#", str(index))
            found.append(StoredPart(tensor, place))
            of_one = shape if index is None else shape[1:]
            collected.setdefault(tensor, []).append((place.slot, name, index, place, of_one))
        parts[name] = tuple(found)
    tensors = {}
    for tensor, entries in collected.items():
        entries.sort(key=lambda entry: entry[0])
        place, shape = entries[0][3], entries[0][4]
        axis = _output_axis(entries[0][1], entries[0][2], n_experts)
        whole = (*shape[:axis], shape[axis] * place.slots, *shape[axis + 1 :])
        if place.transposed and len(whole) == 2:
            whole = (whole[1], whole[0])
        tensors[tensor] = Made(whole, place, tuple((name, index) for _, name, index, _, _ in entries))
    return Layout(parts, tensors)


def take(contents: Tensor, place: ModuleMapping, *, stacked: bool = False) -> Tensor:
    """A parameter's part of a tensor that was read: a view.

    Args:
        contents: of the tensor in the file.
        place: of the parameter.
        stacked: the first axis counts experts.
    """
    ours = contents.mT if place.transposed and contents.ndim == 2 else contents
    if place.slots == 1:
        return ours
    axis = 1 if stacked else 0
    width = ours.shape[axis] // place.slots
    return ours.narrow(axis, place.slot * width, width)


def put_together(made: Made, get: Callable[[str, int | None], Tensor], n_experts: int) -> Tensor:
    """A tensor for a file, from our parameters."""
    pieces = [get(name, index) for name, index in made.pieces]
    axis = _output_axis(*made.pieces[0], n_experts)
    ours = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=axis)
    return ours.mT.contiguous() if made.place.transposed and ours.ndim == 2 else ours.contiguous()


def is_of_experts(name: str, n_experts: int) -> bool:
    """Whether a parameter of ours holds all experts' matrices or biases."""
    return n_experts > 0 and bool(_OF_EXPERTS.search(name))


def _output_axis(name: str, index: int | None, n_experts: int) -> int:
    """The axis of the outputs in our weight (out, in) or bias (out); behind the experts', where they are stacked."""
    return 1 if index is None and is_of_experts(name, n_experts) else 0


def _own_place(module: str) -> ModuleMapping:
    own = _LAYER.sub("layers.*.", module)
    return ModuleMapping(own if module == "lm_head" else f"model.{own}")
