"""Dynamic loss scaling for float16 (arXiv:1710.03740, section 3.2): small gradients are kept from becoming zero.

The loss is multiplied by a scale before the backward pass and gradients are divided by it afterwards. Where they were
too large, the step is left out and the scale halved; after `GROWTH_STEPS` good steps it is doubled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from groundup.errors import ArtifactError

FIRST_SCALE = 2.0**16
GROWTH_STEPS = 2000


class LossScaler:
    """The scale, and how it changes.

    Attributes:
        scale: what the loss is multiplied by.
    """

    def __init__(self) -> None:
        self.scale = FIRST_SCALE
        self._n_good = 0

    @torch.no_grad()
    def unscale(self, parameters: Sequence[Tensor]) -> None:
        """Divide every gradient by the scale."""
        gradients = [getattr(p.grad, "_local_tensor", p.grad) for p in parameters if p.grad is not None]
        torch._foreach_mul_(gradients, 1.0 / self.scale)

    def judge(self, grad_norm: float) -> bool:
        """Whether the step counts; the scale changes accordingly.

        Args:
            grad_norm: of all unscaled gradients.
        """
        if not math.isfinite(grad_norm):
            if self.scale == 1.0:
                return True  # it is not the scale: the guard is to judge
            self.scale, self._n_good = max(1.0, self.scale / 2), 0
            return False
        self._n_good += 1
        if self._n_good == GROWTH_STEPS:
            self.scale, self._n_good = self.scale * 2, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"scale": self.scale, "n_good": self._n_good}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            ArtifactError: it is something else.
        """
        try:
            self.scale, self._n_good = float(state["scale"]), int(state["n_good"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"the checkpoint's loss scale is damaged ({error!r}).") from error
