"""Muon: momentum, then the nearest orthogonal matrix as the update (Jordan et al., 2024; arXiv:2502.16982).

For each matrix with gradient G: M ← β M + (1 − β) G, U = (1 − β) G + β M (Nesterov), and
W ← W − lr · sqrt(max(1, rows/cols)) · orthogonalize(U), where orthogonalize replaces the singular values
of U by values near 1 with five Newton-Schulz steps: X ← a X + (b A + c A²) X, A = X Xᵀ. Every direction
of the matrix is thus moved by about the same amount. Matrices of one shape are done together, as many as stay near
the processor: beside a small batch these products are a quarter of a step (`groundup.reference.optimizers` is the plain
form).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from groundup.distributed import full_tensor, like_parameter

# Chosen by Jordan for the steepest slope at 0 with five steps; singular values land in about [0.7, 1.2].
_A, _B, _C, _STEPS = 3.4445, -4.7750, 2.0315, 5

# Of one batch of matrices in the dtype of the steps. On a CPU about a core's second-level cache: about as fast as all
# matrices at once (benchmarks/optimizer_step.py), and little is held. On a GPU only memory sets a limit.
BATCH_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}


def orthogonalize(
    matrices: Float[Tensor, "*n rows cols"], *, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*n rows cols"]:
    """Move every singular value of each matrix to about 1; computed and returned in `dtype`."""
    shape = matrices.shape
    tall = shape[-2] > shape[-1]
    x = (matrices.mT if tall else matrices).reshape(-1, min(shape[-2:]), max(shape[-2:]))
    # Divided before the cast: float16 could not hold what a small gradient is.
    norms = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = (x / (norms + 1e-7)).to(dtype)
    for _ in range(_STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
        x = torch.baddbmm(x, polynomial, x, beta=_A)
    return (x.mT if tall else x).reshape(shape)


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
            for parameters in by_shape.values():
                for batch in self._batches(parameters):
                    self._update(batch, group["lr"], group["momentum"], group["weight_decay"])

    def _update(self, parameters: list[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        gradients: list[Tensor] = [parameter.grad for parameter in parameters if parameter.grad is not None]
        buffers = [self._buffer(parameter) for parameter in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, buffers, momentum)
        directions = orthogonalize(torch.stack([full_tensor(update) for update in updates]), dtype=self.dtype)
        if weight_decay:
            torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        rows, cols = parameters[0].shape[-2:]
        for parameter, direction in zip(parameters, directions.float(), strict=True):
            parameter.add_(like_parameter(direction, parameter), alpha=-lr * max(1.0, rows / cols) ** 0.5)

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        return buffer

    def _batches(self, parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        first = parameters[0]
        limit = BATCH_BYTES.get(first.device.type, BATCH_BYTES["cuda"])
        n = max(1, limit // (first.numel() * self.dtype.itemsize))
        for start in range(0, len(parameters), n):
            yield list(parameters[start : start + n])
