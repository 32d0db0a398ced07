"""The optimizers of a model as one: which parameter is whose, one step for all, and the average of the weights.

With `muon`, the matrices inside the blocks go to Muon (`muon.py`); embeddings, output layer and vectors go to AdamW
(arXiv:1711.05101, torch's). With adamw, adafactor (arXiv:1804.04235, torch's) or lion (arXiv:2302.06675, of the library
pytorch_optimizer) everything goes to that one. Weight decay falls on matrices only. `[[pretrain.groups]]` of a recipe
changes rate and decay of the parameters that a pattern matches, or freezes them; the first pattern that matches one
counts. State is kept as whole tensors, so that a checkpoint of one process goes on in several and the other way round.

An average of the weights, if there is one, is exponential: average ← decay · average + (1 − decay) · weights after
every step, in float32; often a better model than the last step's (arXiv:1806.05594, section 3). The decay warms up as
min(decay, (1 + n) / (10 + n)) over the first n steps, so that the average does not remember the initial weights.
Validation, samples and the finished model use the average; training goes on with the weights themselves.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import importlib
import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adafactor, AdamW, Optimizer

from groundup.distributed import full_tensor, like_parameter
from groundup.errors import ArtifactError, GroundupError, Problem, RecipeError
from groundup.model.initialization import is_sharded
from groundup.recipe import GroupSettings, OptimizerName, OptimizerSettings
from groundup.training.muon import Muon

_LION = "pytorch_optimizer"


class Optimizers:
    """The optimizers of one model.

    Args:
        model: its parameters are updated, but for those that the settings freeze.
        settings: optimizer, rates, decay, momenta, groups.
        precision: dtype of Muon's Newton-Schulz steps.
        stage: named in messages.

    Raises:
        RecipeError: a group's pattern matches no parameter.
        GroundupError: the optimizer is not installed.
    """

    def __init__(
        self, model: nn.Module, settings: OptimizerSettings, precision: torch.dtype, stage: str = "pretrain"
    ) -> None:
        parameters = dict(model.named_parameters())
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
        groups = group_parameters({name: p.shape for name, p in parameters.items()}, settings, stage).groups
        kinds = sorted({group.optimizer for group in groups}, key=lambda kind: kind == "muon")
        self.all: list[Optimizer] = [
            _make(kind, [group for group in groups if group.optimizer == kind], parameters, settings, precision)
            for kind in kinds
        ]
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.all]

    def parameters(self) -> list[Tensor]:
        """Every parameter that is updated, once for each time it is."""
        return [p for optimizer in self.all for group in optimizer.param_groups for p in group["params"]]

    def step(self, lr_share: float) -> None:
        """One update with every learning rate at this share of its peak; gradients are then cleared."""
        for optimizer, peaks in zip(self.all, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * lr_share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def forget_gradients(self) -> None:
        """Clear every gradient without an update."""
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """All state as whole tensors named `parameter/state` (every process must call it)."""
        found = {}
        for optimizer in self.all:
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    found[f"{self._names[parameter]}/{key}"] = full_tensor(value).detach().cpu().contiguous()
        return found

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave, on any number of processes.

        Raises:
            ArtifactError: a state is missing or left over.
        """
        for optimizer in self.all:
            optimizer.state.clear()
        if not saved:  # every step so far was left out
            return
        by_name: dict[str, dict[str, Tensor]] = {}
        for name, value in saved.items():
            parameter_name, _, key = name.rpartition("/")
            by_name.setdefault(parameter_name, {})[key] = value
        for optimizer in self.all:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    name = self._names[parameter]
                    if name not in by_name:
                        raise ArtifactError(f"optimizer state of {name} is missing from the checkpoint.")
                    optimizer.state[parameter] = {
                        key: _placed(value, parameter, group) for key, value in by_name.pop(name).items()
                    }
        if by_name:
            raise ArtifactError(
                f"optimizer state of {', '.join(sorted(by_name)[:4])} is in the checkpoint, unknown here."
            )


def check_optimizer(settings: OptimizerSettings, stage: str = "pretrain", n_processes: int = 1) -> None:
    """Hold that the optimizer can be had and can work on so many processes; nothing is imported.

    Raises:
        GroundupError: it is not installed, or works on whole parameters only.
    """
    where = f'[{stage}] optimizer = "{settings.optimizer}"'
    if settings.optimizer == "lion" and importlib.util.find_spec(_LION) is None:
        raise GroundupError(
            f"{where}: the library {_LION} is not installed.",
            "Run: pip install 'groundup[optim]', or choose muon, adamw or adafactor.",
        )
    if settings.optimizer == "adafactor" and n_processes > 1:
        # Its means of rows and columns, and the sizes it clips by, are of whole matrices; each process has a part.
        raise GroundupError(
            f"{where}: works on whole parameters, but {n_processes} processes have a part of each.",
            "Train in one process, or choose muon, adamw or lion.",
        )


def _make(
    kind: OptimizerName, groups: Sequence[Group], parameters: Mapping[str, Tensor], settings: OptimizerSettings,
    precision: torch.dtype,
) -> Optimizer:  # fmt: skip
    members = [
        {"params": [parameters[name] for name in group.names], "lr": group.lr, "weight_decay": group.weight_decay}
        for group in groups
    ]
    if kind == "muon":
        return Muon(members, momentum=settings.muon_momentum, dtype=precision)
    if kind == "adafactor":
        return Adafactor(members, lr=settings.lr)
    betas = (settings.beta1, settings.beta2)
    if kind == "lion":
        lion: Any = importlib.import_module(_LION).Lion
        made: Optimizer = lion(members, lr=settings.lr, betas=betas)
        return made
    # One pass over weights, gradients and moments where torch has such a kernel: on a CPU a third of the time
    # of the passes one after another (benchmarks/optimizer_step.py).
    device_type = next(iter(parameters.values())).device.type
    is_fused = device_type in ("cpu", "cuda")
    return AdamW(members, lr=settings.lr, betas=betas, eps=1e-8, fused=is_fused, foreach=not is_fused)


def _placed(value: Tensor, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
    """A state's whole tensor, where the parameter's optimizer wants it."""
    if value.ndim == 0:  # a count of steps: kept on the host, but by kernels that read it themselves
        return value.to(parameter.device, copy=True) if group.get("fused") else value.clone()
    if value.shape == parameter.shape:
        return like_parameter(value, parameter).clone()
    assert not is_sharded(parameter), "a state of another shape than its sharded parameter"
    return value.to(parameter.device, copy=True)


@torch.no_grad()
def squared_norm(parameters: Sequence[Tensor]) -> Tensor:
    """The sum of all gradients' squares, float64, (1,), on their device; of this process's shards.

    Rows are summed in float32 and their squares in float64: three times as fast as float64 throughout, as exact as it
    matters, and the same bits for any sharding, which never cuts a row.
    """
    gradients = [getattr(p.grad, "_local_tensor", p.grad) for p in parameters if p.grad is not None]
    dtypes = (torch.float64 if gradient.ndim < 2 else None for gradient in gradients)
    norms = [torch.linalg.vector_norm(g, dim=-1, dtype=dtype) for g, dtype in zip(gradients, dtypes, strict=True)]
    return torch.cat([norm.double().flatten() for norm in norms]).square().sum().reshape(1)


@torch.no_grad()
def scale_to_norm(parameters: Sequence[Tensor], max_norm: float, norm: float) -> None:
    """Scale all gradients, whose global norm is `norm`, so that it is at most `max_norm` (0: leave them)."""
    if max_norm and norm > max_norm:
        gradients = [getattr(p.grad, "_local_tensor", p.grad) for p in parameters if p.grad is not None]
        torch._foreach_mul_(gradients, max_norm / (norm + 1e-6))


def clip_gradients(parameters: Sequence[Tensor], max_norm: float) -> float:
    """Clip by the global norm of one process, and return the norm before: both of the above, with a wait between."""
    norm = math.sqrt(float(squared_norm(parameters)))
    scale_to_norm(parameters, max_norm, norm)
    return norm


Shapes = Mapping[str, Sequence[int]]
"""Every parameter's shape by name."""


@dataclass(frozen=True)
class Group:
    """Parameters that are updated alike."""

    optimizer: OptimizerName  # whose they are
    lr: float  # peak learning rate
    weight_decay: float  # decoupled
    names: tuple[str, ...]  # of the parameters
    match: str | None = None  # the recipe's pattern that chose them, if one did


@dataclass(frozen=True)
class Grouping:
    """All parameters, each in one group or frozen."""

    groups: tuple[Group, ...]  # those that are updated
    frozen: tuple[str, ...] = ()  # those that are not


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
    problems = list(_problems(chosen, shapes, settings, stage))
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
def frozen_groups(model: nn.Module, settings: OptimizerSettings, stage: str = "pretrain") -> Iterator[None]:
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


def _problems(
    chosen: Mapping[str, int | None], shapes: Shapes, settings: OptimizerSettings, stage: str
) -> Iterator[Problem]:
    """Groups that match nothing, or not what they could change."""
    for index, group in enumerate(settings.groups):
        where = f'[[{stage}.groups]] match = "{group.match}"'
        mine = [name for name, place in chosen.items() if place == index]
        if not any(fnmatch.fnmatchcase(name, group.match) for name in chosen):
            near = difflib.get_close_matches(group.match, chosen, n=3, cutoff=0.3) or list(chosen)[:3]
            yield Problem(where, "no parameter has such a name.", f"Near it: {', '.join(near)}.")
        elif not mine:
            what = "everything it matches is in a group above it."
            yield Problem(where, what, "The first match counts: put it first.")
        elif group.lr is not None and len({_optimizer_of(name, shapes[name], settings) for name in mine}) > 1:
            what = "lr would be both Muon's and AdamW's, whose rates are of other sizes."
            yield Problem(where, what, "Use lr_scale, or a narrower pattern.")
        elif group.weight_decay and not any(is_matrix(name, shapes[name]) for name in mine):
            yield Problem(where, "weight_decay falls on matrices only, and there is none among them.")


def _extent(names: Sequence[str], shapes: Shapes) -> str:
    tensors = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
    return f"{sum(math.prod(shapes[name]) for name in names):,} weights in {tensors}"


class WeightAverage:
    """The average of a model's weights, sharded as they are.

    Args:
        model: whose weights.
        decay: share of the average that stays at each step, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._parameters = dict(model.named_parameters())
        self._decay, self._n = decay, 0
        self._average = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Let the weights as they are now enter the average."""
        self._n += 1
        decay = min(self._decay, (1 + self._n) / (10 + self._n))
        averages, weights = list(self._average.values()), [p.detach() for p in self._parameters.values()]
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this block the model has the average for its weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            own = parameter.detach().clone()
            parameter.copy_(self._average[name])
            self._average[name].copy_(own)

    @torch.no_grad()
    def make_permanent(self) -> None:
        """Give the model the average for good."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self._average[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The average as whole tensors by parameter name, and the count (every process must call it)."""
        state = {name: full_tensor(value).detach().cpu().contiguous() for name, value in self._average.items()}
        return {**state, "n": torch.tensor(self._n)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave, on any number of processes.

        Raises:
            ArtifactError: it is of another model.
        """
        if state.keys() != {*self._average, "n"}:
            odd = sorted(state.keys() ^ {*self._average, "n"})
            raise ArtifactError(f"the checkpoint's average is of another model: {', '.join(odd[:4])}.")
        for name, value in self._average.items():
            value.copy_(like_parameter(state[name], self._parameters[name]))
        self._n = int(state["n"])
