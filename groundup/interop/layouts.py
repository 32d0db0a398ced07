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


@dataclass(frozen=True)
class ModuleMapping:
    """Where a module's parameters stand.

    Attributes:
        module: its name there; `*` is the layer's number, and `#` the expert's: then each has a tensor of its own.
        transposed: matrices are (in, out), as in GPT-2's Conv1D.
        slot: which part it is of a tensor in which several stand one after the other, along the outputs.
        slots: how many parts that tensor has, all of one size.
    """

    module: str
    transposed: bool = False
    slot: int = 0
    slots: int = 1

    @property
    def is_apart(self) -> bool:
        """Whether each expert has a tensor of its own."""
        return "#" in self.module


ModuleMappings = Mapping[str, ModuleMapping]
"""By our module's name, with `*` for the layer's number."""


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
        places: how each of our parameters stands there.
        sources: the tensor that has it, or one for each expert.
        tensors: of the file.
    """

    places: dict[str, ModuleMapping]
    sources: dict[str, list[str]]
    tensors: dict[str, Made]


def shapes_in_file(shapes: Mapping[str, Shape], config: ModelConfig) -> dict[str, Shape]:
    """Our parameters' shapes without the rows that fill up the vocabulary."""
    return {
        name: (config.vocab_size, *shape[1:]) if name.partition(".")[0] in _VOCABULARY else shape
        for name, shape in shapes.items()
    }


def make_layout(mappings: ModuleMappings, shapes: Mapping[str, Shape], n_experts: int = 0) -> Layout:
    """The layout of a model's parameters, whose shapes `shapes_in_file` gives, by a family's table."""
    layout = Layout({}, {}, {})
    pieces: dict[str, list[tuple[str, int | None]]] = {}
    for name in shapes:
        module, kind = name.rsplit(".", 1)
        number = _LAYER.match(module)
        pattern = _LAYER.sub("layers.*.", module)
        place = mappings.get(pattern) or ModuleMapping(pattern if module == "lm_head" else f"model.{pattern}")
        outside = f"{place.module}.{kind}".replace("*", number[1] if number else "*")
        layout.places[name], layout.sources[name] = place, []
        for index in range(n_experts) if place.is_apart else [None]:
            layout.sources[name].append(outside.replace("#", str(index)))
            pieces.setdefault(layout.sources[name][-1], []).append((name, index))
    for tensor, found in pieces.items():
        found.sort(key=lambda piece: layout.places[piece[0]].slot)
        name, index = found[0]
        place = layout.places[name]
        rows, *rest = shapes[name] if index is None else shapes[name][1:]
        shape = (rows * place.slots, *rest)
        is_turned = place.transposed and len(shape) == 2
        layout.tensors[tensor] = Made(shape[::-1] if is_turned else shape, place, tuple(found))
    return layout


def take(contents: Tensor, place: ModuleMapping) -> Tensor:
    """A parameter's part of a tensor that was read: a view."""
    ours = contents.mT if place.transposed and contents.ndim == 2 else contents
    return ours.chunk(place.slots)[place.slot]


def put_together(made: Made, get: Callable[[str, int | None], Tensor]) -> Tensor:
    """A tensor for a file, from our parameters."""
    pieces = [get(name, index) for name, index in made.pieces]
    ours = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return ours.mT.contiguous() if made.place.transposed and ours.ndim == 2 else ours.contiguous()
