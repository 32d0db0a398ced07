"""The process that trains: its threads, and memory kept between steps.

A training step allocates and frees the same large buffers again and again. glibc maps the largest anew each time, and
the kernel clears them page by page: a few percent of a small model's step (benchmarks/cpu_ladder.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch


@contextlib.contextmanager
def limited_threads(count: int | None) -> Iterator[None]:
    """As many threads as the recipe says; the caller's number comes back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_KEPT_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Tell glibc to serve buffers up to 1 GiB from its heap and to keep them; whether it listened.

    What the stages before have left is given back first: it lies in pieces of their sizes.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    return all(libc.mallopt(option, _KEPT_BYTES) == 1 for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))


def peak_memory_bytes(device: torch.device | None = None) -> int:
    """The most memory held so far, in bytes: on CUDA by torch's allocator, else by this process (resident set)."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    # Of this program only: getrusage's peak begins with what the process that started it held.
    for line in status.read_text(encoding="ascii", errors="replace").splitlines() if status.is_file() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
