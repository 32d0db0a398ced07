"""Muon: momentum, then the nearest orthogonal matrix as the update (Jordan et al., 2024; arXiv:2502.16982).

For each matrix with gradient G: M ← β M + (1 − β) G, U = (1 − β) G + β M (Nesterov), and
W ← W − lr · sqrt(max(1, rows/cols)) · orthogonalize(U), where orthogonalize replaces the singular values
of U by values near 1 with five Newton-Schulz steps: X ← a X + (b A + c A²) X, A = X Xᵀ. Every direction
of the matrix is thus moved by about the same amount. Matrices of one shape are done in one batched product.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from groundup.distributed import full_tensor, like_parameter

# Chosen by Jordan for the steepest slope at 0 with five steps; singular values land in about [0.7, 1.2].
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalize(
    matrices: Float[Tensor, "*n rows cols"], *, steps: int = 5, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*n rows cols"]:
    """Move every singular value of each matrix to about 1; computed and returned in `dtype`."""
    x = matrices.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.mT if tall else x


class Muon(Optimizer):
    """Muon for matrices, sharded or not.

    Args:
        params: 2-D, or 3-D: a stack of matrices, as experts have.
        lr: learning rate (0.02 is a good start at any size).
        momentum: β above.
        weight_decay: decoupled; each step multiplies the weights by 1 − lr · weight_decay.
        dtype: dtype of the Newton-Schulz steps.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                updates = [full_tensor(self._momentum_update(parameter, group["momentum"])) for parameter in parameters]
                directions = orthogonalize(torch.stack(updates), dtype=self.dtype).float()
                scale = max(1.0, shape[-2] / shape[-1]) ** 0.5
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(like_parameter(direction, parameter), alpha=-group["lr"] * scale)

    def _momentum_update(self, parameter: Tensor, momentum: float) -> Tensor:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"]
        buffer.lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum)
