"""How fast a run is: tokens per second, and model FLOPs utilization (MFU; arXiv:2204.02311, appendix B).

Both are of the training steps alone: validation, samples and checkpoints have their own time. Tokens are targets that
are predicted. FLOPs are those of every position that is computed, masked targets and padding too, forward and backward
once each (`model/cost.py`): activations that are computed again do not count. MFU is their share of what the same
processes would do at the best matmul rate that was measured here (`ceiling.py`), in the dtype of the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from groundup.model import ModelConfig
from groundup.model.cost import training_flops
from groundup.training.ceiling import measured_ceiling

MEASURED_AFTER_SECONDS = 5.0
"""Of training: a shorter run is not made to wait for the ceiling, and has no MFU."""


@dataclass(frozen=True)
class Speed:
    """Of some steps.

    Attributes:
        tokens_per_second: predicted targets.
        mfu: a share of the measured ceiling, or None while that is not known.
    """

    tokens_per_second: float
    mfu: float | None


class Speedometer:
    """Adds up steps.

    Args:
        config: the model's.
        dtype: of its arithmetic.
        device: where one process computes.
        n_processes: that compute at the same time.
        measures: False in all processes but the first, which would disturb each other.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        n_processes: int = 1,
        *,
        measures: bool = True,
    ) -> None:
        self._config, self._dtype, self._device, self._n_processes = config, dtype, device, n_processes
        self._measures = measures
        self._flops_of_row: dict[int, int] = {}
        self._window = (0.0, 0.0, 0.0)  # seconds, tokens, FLOPs
        self._total = (0.0, 0.0, 0.0)
        self._ceiling: float | None = None

    def flops(self, n_rows: int, length: int) -> int:
        """FLOPs of forward and backward over this many rows of this many positions."""
        if length not in self._flops_of_row:
            self._flops_of_row[length] = training_flops(self._config, length)
        return n_rows * self._flops_of_row[length]

    def add(self, seconds: float, tokens: float, flops: float) -> None:
        """Count a step: all processes' tokens and FLOPs."""
        step = (seconds, tokens, flops)
        self._window = _sum(self._window, step)
        self._total = _sum(self._total, step)

    def lately(self) -> Speed:
        """The speed of the steps since this was last asked."""
        speed = self._speed(self._window)
        self._window = (0.0, 0.0, 0.0)
        return speed

    def overall(self) -> Speed:
        """The speed of all steps."""
        return self._speed(self._total)

    def _speed(self, sums: tuple[float, float, float]) -> Speed:
        seconds, tokens, flops = sums
        if self._ceiling is None and self._measures and self._total[0] >= MEASURED_AFTER_SECONDS:
            self._ceiling = measured_ceiling(self._dtype, self._device)
        if not seconds:
            return Speed(0.0, None)
        mfu = None if self._ceiling is None else flops / seconds / (self._ceiling * self._n_processes)
        return Speed(tokens / seconds, mfu)


def _sum(one: tuple[float, float, float], other: tuple[float, float, float]) -> tuple[float, float, float]:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]
