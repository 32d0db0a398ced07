"""The best matmul rate of this machine: what model FLOPs utilization (MFU) is a share of.

No published peak: square products of several sizes are timed here, in the dtype of the arithmetic, and the fastest
single product counts. What a busy moment slows down can only lower it, so the best of many repeats is kept, and
`measured.py` remembers it for each machine, number of threads and version of torch.
"""

from __future__ import annotations

import math
import time

import torch

from groundup.training.measured import measured_once

_SIZES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}
_SECONDS = 1.2
"""Of timed products, over all sizes; the whole stays under two seconds."""


def measured_ceiling(dtype: torch.dtype, device: torch.device) -> float:
    """The best matmul rate of one device, FLOP/s (two for each multiply-add); about a second the first time.

    Args:
        dtype: of both factors and of the product.
        device: where; on a CPU with as many threads as torch has now.
    """
    sizes = _SIZES["cuda" if device.type == "cuda" else "cpu"]
    key = {"dtype": str(dtype), "sizes": list(sizes)}
    return float(measured_once("ceiling", key, device, lambda: {"flops": _best_rate(dtype, device, sizes)})["flops"])


def _best_rate(dtype: torch.dtype, device: torch.device, sizes: tuple[int, ...]) -> float:
    best, end = 0.0, time.perf_counter() + _SECONDS
    for left, size in zip(range(len(sizes), 0, -1), sizes, strict=True):
        until = time.perf_counter() + (end - time.perf_counter()) / left
        if best and time.perf_counter() + 2 * _flops(size) / best > end:
            break  # a dtype that this device does slowly: the smaller sizes must do
        best = max(best, _rate(size, dtype, device, until))
    return best


def _rate(size: int, dtype: torch.dtype, device: torch.device, until: float) -> float:
    """FLOP/s of the fastest product of two (size, size) matrices that ends by a time; of one at least."""
    generator = torch.Generator().manual_seed(size)  # not the global one: a run that measures keeps its randomness
    left, right = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    out = left @ right  # loads the kernel
    _wait(device)
    fastest = math.inf
    while math.isinf(fastest) or time.perf_counter() < until:
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        _wait(device)
        fastest = min(fastest, time.perf_counter() - start)
    return _flops(size) / fastest


def _flops(size: int) -> int:
    return 2 * size**3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
