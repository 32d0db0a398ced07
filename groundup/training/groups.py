"""Which parameter is updated by which optimizer, at what rate, with what decay: decided from names and shapes alone.

With `muon`, the matrices inside the blocks go to Muon; embeddings, output layer and vectors go to AdamW. With any other
optimizer everything goes to that one. Weight decay falls on matrices only. `[[pretrain.groups]]` of a recipe changes
rate and decay of the parameters that a pattern matches, or freezes them; the first pattern that matches one counts.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from groundup.errors import Problem, RecipeError
from groundup.recipe import GroupSettings, OptimizerName, OptimizerSettings

Shapes = Mapping[str, Sequence[int]]
"""Every parameter's shape by name."""


@dataclass(frozen=True)
class Group:
    """Parameters that are updated alike.

    Attributes:
        optimizer: whose they are.
        lr: peak learning rate.
        weight_decay: decoupled.
        names: of the parameters.
        match: the recipe's pattern that chose them, if one did.
    """

    optimizer: OptimizerName
    lr: float
    weight_decay: float
    names: tuple[str, ...]
    match: str | None = None


@dataclass(frozen=True)
class Grouping:
    """All parameters, each in one group or frozen.

    Attributes:
        groups: those that are updated.
        frozen: those that are not.
    """

    groups: tuple[Group, ...]
    frozen: tuple[str, ...] = ()


def group_parameters(shapes: Shapes, settings: OptimizerSettings, stage: str = "pretrain") -> Grouping:
    """Put every parameter into its group.

    Args:
        shapes: of the model's parameters (`groundup.model.cost.parameter_shapes`, or those of a built model).
        settings: optimizer, rates, decay, groups.
        stage: named in messages.

    Raises:
        RecipeError: with every pattern that matches nothing, or not what it could change.
    """
    chosen = {name: _first_match(name, settings.groups) for name in shapes}
    problems = [
        problem
        for index, group in enumerate(settings.groups)
        if (problem := _problem(index, group, chosen, shapes, settings, stage)) is not None
    ]
    frozen = tuple(name for name, index in chosen.items() if index is not None and settings.groups[index].frozen)
    if not problems and len(frozen) == len(shapes):
        problems = [Problem(f"[{stage}] groups", "freeze every parameter: nothing is left to train.")]
    if problems:
        raise RecipeError(stage, problems)
    members: dict[tuple[OptimizerName, float, float, str | None], list[str]] = {}
    for name, index in chosen.items():
        own = settings.groups[index] if index is not None else None
        if own is None or not own.frozen:
            members.setdefault(_values(name, shapes[name], own, settings), []).append(name)
    return Grouping(tuple(Group(*values[:3], tuple(names), values[3]) for values, names in members.items()), frozen)


@contextlib.contextmanager
def frozen(model: nn.Module, settings: OptimizerSettings, stage: str = "pretrain") -> Iterator[None]:
    """Within this block no gradient is computed for the parameters that the settings freeze.

    Raises:
        RecipeError: see `group_parameters`.
    """
    had = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    names = group_parameters(shapes, settings, stage).frozen
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    try:
        yield
    finally:
        for name in names:
            model.get_parameter(name).requires_grad_(had[name])


def describe_groups(shapes: Shapes, settings: OptimizerSettings, stage: str = "pretrain") -> list[tuple[str, str, str]]:
    """What the groups come to, for people: (setting, its value, what it reaches).

    Raises:
        RecipeError: see `group_parameters`.
    """
    grouping = group_parameters(shapes, settings, stage)
    rows: dict[str | None, list[str]] = {None: []}
    for group in grouping.groups:
        what = f"{group.optimizer}: {_extent(group.names, shapes)}, lr {group.lr:g}"
        rows.setdefault(group.match, []).append(what + (f", decay {group.weight_decay:g}" * (group.weight_decay > 0)))
    found = [(f"{stage}.optimizer", str(settings.optimizer), " · ".join(rows.pop(None)))]
    for index, own in enumerate(settings.groups):
        mine = [name for name in grouping.frozen if own.frozen and _first_match(name, settings.groups) == index]
        reach = f"frozen: {_extent(mine, shapes)}" if own.frozen else " · ".join(rows[own.match])
        found.append((f"{stage}.groups", own.match, reach))
    return found


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """A matrix or a stack of them; a stack of biases is none."""
    return len(shape) >= 2 and not name.endswith("bias")


def _optimizer_of(name: str, shape: Sequence[int], settings: OptimizerSettings) -> OptimizerName:
    if settings.optimizer != "muon":
        return settings.optimizer
    return "muon" if is_matrix(name, shape) and ".layers." in f".{name}" else "adamw"


def _values(
    name: str, shape: Sequence[int], own: GroupSettings | None, settings: OptimizerSettings
) -> tuple[OptimizerName, float, float, str | None]:
    optimizer = _optimizer_of(name, shape, settings)
    lr = settings.muon_lr if optimizer == "muon" else settings.lr
    decay = settings.weight_decay
    if own is not None:
        lr = own.lr if own.lr is not None else lr * (own.lr_scale or 1.0)
        decay = decay if own.weight_decay is None else own.weight_decay
    return optimizer, lr, decay if is_matrix(name, shape) else 0.0, None if own is None else own.match


def _first_match(name: str, groups: Sequence[GroupSettings]) -> int | None:
    return next((index for index, group in enumerate(groups) if fnmatch.fnmatchcase(name, group.match)), None)


def _problem(
    index: int, group: GroupSettings, chosen: Mapping[str, int | None], shapes: Shapes, settings: OptimizerSettings,
    stage: str,
) -> Problem | None:  # fmt: skip
    where = f'[[{stage}.groups]] match = "{group.match}"'
    matching = [name for name in chosen if fnmatch.fnmatchcase(name, group.match)]
    if not matching:
        near = difflib.get_close_matches(group.match, chosen, n=3, cutoff=0.3) or list(chosen)[:3]
        return Problem(where, "no parameter has such a name.", f"Near it: {', '.join(near)}.")
    mine = [name for name in matching if chosen[name] == index]
    if not mine:
        return Problem(where, "everything it matches is in a group above it.", "The first match counts: put it first.")
    if group.lr is not None and len({_optimizer_of(name, shapes[name], settings) for name in mine}) > 1:
        what = "lr would be both Muon's and AdamW's, whose rates are of other sizes."
        return Problem(where, what, "Use lr_scale, or a narrower pattern.")
    if group.weight_decay and not any(is_matrix(name, shapes[name]) for name in mine):
        return Problem(where, "weight_decay falls on matrices only, and there is none among them.")
    return None


def _extent(names: Sequence[str], shapes: Shapes) -> str:
    tensors = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
    return f"{sum(math.prod(shapes[name]) for name in names):,} weights in {tensors}"
