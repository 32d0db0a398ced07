"""How fast a run is: tokens per second, and model FLOPs utilization (MFU; arXiv:2204.02311, appendix B).

Both are of the training steps alone, without validation, samples and checkpoints. Tokens are targets that are
predicted. FLOPs are those of every token, masked targets too and padding not, each text by itself, forward and backward
once each (`model/cost.py`); activations that are computed again do not count. MFU is their share of this machine's peak
matmul FLOP/s in the dtype of the arithmetic: not a published figure, but the fastest square product that was timed
here, which `process.py` remembers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from groundup.measured import measured_once

MEASURED_AFTER_SECONDS = 5.0
"""Of training: a shorter run does not wait for the peak to be measured, and has no MFU."""


@dataclass(frozen=True)
class Throughput:
    """Of some steps."""

    tokens_per_second: float  # predicted targets
    mfu: float | None  # a share of the measured peak; None while that is not known


class ThroughputMeter:
    """Adds up steps.

    Args:
        dtype: of its arithmetic.
        device: where one process computes.
        n_processes: that compute at the same time.
        measures: False in all processes but the first, which would disturb each other.
    """

    def __init__(
        self, dtype: torch.dtype, device: torch.device, n_processes: int = 1, *, measures: bool = True
    ) -> None:
        self._dtype, self._device, self._n_processes = dtype, device, n_processes
        self._measures = measures
        self._window = self._total = np.zeros(3)  # seconds, tokens, FLOPs
        self._peak: float | None = None

    def add(self, seconds: float, tokens: float, flops: float) -> None:
        """Count a step: all processes' tokens and FLOPs."""
        step = np.array([seconds, tokens, flops])
        self._window, self._total = self._window + step, self._total + step

    def lately(self) -> Throughput:
        """The speed of the steps since this was last asked."""
        speed = self._speed(self._window)
        self._window = np.zeros(3)
        return speed

    def overall(self) -> Throughput:
        """The speed of all steps."""
        return self._speed(self._total)

    def _speed(self, sums: NDArray[np.float64]) -> Throughput:
        seconds, tokens, flops = sums.tolist()
        if self._peak is None and self._measures and self._total[0] >= MEASURED_AFTER_SECONDS:
            self._peak = peak_matmul_flops(self._dtype, self._device)
        if not seconds:
            return Throughput(0.0, None)
        mfu = None if self._peak is None else flops / seconds / (self._peak * self._n_processes)
        return Throughput(tokens / seconds, mfu)


_SIZES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}
_PEAK_SECONDS = 1.2
"""Of timed products, over all sizes; the whole stays under two seconds."""


def peak_matmul_flops(dtype: torch.dtype, device: torch.device) -> float:
    """The peak matmul rate of one device, FLOP/s (two for each multiply-add); about a second the first time.

    Args:
        dtype: of both factors and of the product.
        device: where; on a CPU with as many threads as torch has now.
    """
    sizes = _SIZES["cuda" if device.type == "cuda" else "cpu"]
    key = {"dtype": str(dtype), "sizes": list(sizes)}
    return float(measured_once("matmul", key, device, lambda: {"flops": _best_rate(dtype, device, sizes)})["flops"])


def _best_rate(dtype: torch.dtype, device: torch.device, sizes: tuple[int, ...]) -> float:
    best, end = 0.0, time.perf_counter() + _PEAK_SECONDS
    for n_left, size in zip(range(len(sizes), 0, -1), sizes, strict=True):
        left = end - time.perf_counter()
        if best and 2 * _flops(size) / best > left:
            break  # a dtype that this device does slowly: the smaller sizes must do
        best = max(best, _flops(size) / min(product_seconds(size, dtype, device, left / n_left)))
    return best


def product_seconds(size: int, dtype: torch.dtype, device: torch.device, seconds: float) -> list[float]:
    """Times of products of two (size, size) matrices, one after the other for so many seconds; of one at least."""
    generator = torch.Generator().manual_seed(size)  # not the global one: a run that measures keeps its randomness
    left, right = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    out = left @ right  # loads the kernel
    taken: list[float] = []
    until = time.perf_counter() + seconds
    while not taken or time.perf_counter() < until:
        taken.append(timed(lambda: torch.mm(left, right, out=out), device))
    return taken


def timed(piece: Callable[[], object], device: torch.device) -> float:
    """Seconds that something takes, a GPU's queue emptied before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    piece()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _flops(size: int) -> int:
    return 2 * size**3
