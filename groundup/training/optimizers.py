"""Which optimizer updates which parameter, and their state by parameter name.

With `muon`, the matrices inside the blocks go to Muon; embeddings, output layer and vectors go to AdamW
(arXiv:1711.05101). Weight decay falls on matrices only. Every parameter is in exactly one group.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from groundup.distributed import full_tensor, like_parameter
from groundup.errors import ArtifactError
from groundup.recipe import OptimizerSettings
from groundup.training.muon import Muon


class Optimizers:
    """The optimizers of one model, as one.

    Args:
        model: its parameters are updated.
        settings: rates, decay, momenta.
        precision: dtype of Muon's Newton-Schulz steps.
    """

    def __init__(self, model: nn.Module, settings: OptimizerSettings, precision: torch.dtype) -> None:
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        matrices = [p for name, p in model.named_parameters() if _is_matrix(name, p) and ".layers." in f".{name}"]
        to_muon = matrices if settings.optimizer == "muon" else []
        rest = [p for p in model.parameters() if not any(p is matrix for matrix in to_muon)]
        self.all: list[Optimizer] = [
            AdamW(
                [
                    {"params": [p for p in rest if self._is_matrix(p)], "weight_decay": settings.weight_decay},
                    {"params": [p for p in rest if not self._is_matrix(p)], "weight_decay": 0.0},
                ],
                lr=settings.lr,
                betas=(settings.beta1, settings.beta2),
                eps=1e-8,
                foreach=True,
            )
        ]
        if to_muon:
            self.all.append(
                Muon(to_muon, settings.muon_lr, settings.muon_momentum, settings.weight_decay, dtype=precision)
            )
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.all]

    def _is_matrix(self, parameter: Tensor) -> bool:
        return _is_matrix(self._names[parameter], parameter)

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
            ArtifactError: a state is missing or of another shape.
        """
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
                        key: like_parameter(value, parameter) if value.ndim else value.clone()
                        for key, value in by_name[name].items()
                    }


def _is_matrix(name: str, parameter: Tensor) -> bool:
    """A matrix or a stack of them; a stack of biases is none."""
    return parameter.ndim >= 2 and not name.endswith("bias")


@torch.no_grad()
def clip_gradients(parameters: list[Tensor], max_norm: float, world_sum: object) -> float:
    """Scale all gradients so that their global norm is at most `max_norm`; return the norm before.

    Args:
        parameters: sharded or not; each process counts its own shards.
        max_norm: 0 measures only.
        world_sum: `World.sum`.
    """
    assert callable(world_sum)
    gradients = [getattr(p.grad, "_local_tensor", p.grad) for p in parameters if p.grad is not None]
    # In float64 the order of the sum, and so the sharding, does not show in the result.
    norms = torch.stack([torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients])
    norm = float(world_sum(norms.square().sum().reshape(1))[0].sqrt())
    if max_norm and norm > max_norm:
        torch._foreach_mul_(gradients, max_norm / (norm + 1e-6))
    return norm
