"""Keeping freed memory for the next step, where the C library would give it back.

A training step allocates and frees the same large buffers again and again. glibc maps the largest anew each time, and
the kernel clears them page by page: a few percent of a small model's step (benchmarks/cpu_ladder.py).
"""

from __future__ import annotations

import ctypes
import functools
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_KEPT_BYTES = 1 << 30


@functools.cache
def keep_freed_memory() -> bool:
    """Tell glibc to serve buffers up to 1 GiB from its heap and to keep them; whether it listened."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(option, _KEPT_BYTES) == 1 for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))
