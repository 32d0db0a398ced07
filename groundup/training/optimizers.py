"""The optimizers of a model as one: one step for all of them, and their state by parameter name.

Which parameter is whose is decided in `groups.py`. Muon is ours; AdamW (arXiv:1711.05101) and Adafactor
(arXiv:1804.04235) are torch's, Lion (arXiv:2302.06675) is that of the library pytorch_optimizer. State is kept as whole
tensors, so that a checkpoint of one process goes on in several and the other way round.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Adafactor, AdamW, Optimizer

from groundup.distributed import full_tensor, like_parameter
from groundup.errors import ArtifactError, GroundupError
from groundup.recipe import OptimizerName, OptimizerSettings
from groundup.training.groups import Group, group_parameters
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
    assert not isinstance(parameter, DTensor), "a state of another shape than its sharded parameter"
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


def clip_gradients(parameters: Sequence[Tensor], max_norm: float, world_sum: Callable[[Tensor], Tensor]) -> float:
    """Clip by the global norm, and return the norm before: both of the above in one, with a wait for the device.

    Args:
        parameters: sharded or not; each process counts its own shards.
        max_norm: 0 measures only.
        world_sum: `World.sum`.
    """
    norm = math.sqrt(float(world_sum(squared_norm(parameters))[0]))
    scale_to_norm(parameters, max_norm, norm)
    return norm
