"""The process that trains and its machine: threads, memory kept between steps, and what was measured here before.

A training step allocates and frees the same large buffers again and again. glibc maps the largest anew each time, and
the kernel clears them page by page: a few percent of a small model's step (benchmarks/cpu_ladder.py). Measurements
(peak matmul FLOP/s, whether compiling pays) have a name and a key of plain values. Machine, threads, torch's version
and forbidden vector units belong to every key, so that another processor or version measures anew. A file that cannot
be read or written costs a measurement, nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson
import torch

from groundup.environment import cpu_name
from groundup.errors import GroundupError
from groundup.files import read_json, value_digest, write_json


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


@functools.cache
def keep_freed_memory() -> bool:
    """Tell glibc to serve buffers up to 1 GiB from its heap and to keep them; whether it listened."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(option, _KEPT_BYTES) == 1 for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))


_LIMITS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
"""Settings of torch's libraries that forbid them some of the machine's vector units."""


def cache_root() -> Path:
    """Where groundup keeps what it can make again: `groundup/` in the user's cache."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "groundup"


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


def measured_once(
    name: str, key: Mapping[str, Any], device: torch.device, measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What `measure` gives; on this machine it is called once for each key.

    Args:
        name: of the measurement, as a file name.
        key: plain values that decide the result.
        device: where it is measured.
        measure: gives plain values.
    """
    found = recall(name, key, device)
    if found is None:
        found = measure()
        remember(name, key, device, found)
    return found


def recall(name: str, key: Mapping[str, Any], device: torch.device) -> dict[str, Any] | None:
    """What was measured here before, or None."""
    whole = _whole(key, device)
    with contextlib.suppress(GroundupError, OSError, KeyError, TypeError):
        found = read_json(_file(name, whole))
        if found["key"] == whole:
            return dict(found["result"])
    return None


def remember(name: str, key: Mapping[str, Any], device: torch.device, result: Mapping[str, Any]) -> None:
    """Keep a measurement for the next run."""
    whole = _whole(key, device)
    path = _file(name, whole)
    with contextlib.suppress(GroundupError, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": whole, "result": dict(result)})


def machine(device: torch.device) -> dict[str, Any]:
    """What decides how fast this machine is, as far as one can see."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    limits = {name: os.environ[name] for name in _LIMITS if name in os.environ}
    known = {"device": device.type, "name": name, "threads": torch.get_num_threads(), "torch": str(torch.__version__)}
    return known | ({"limits": limits} if limits else {})


def _whole(key: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    whole: dict[str, Any] = orjson.loads(orjson.dumps({**key, "machine": machine(device)}))  # as it is read back
    return whole


def _file(name: str, whole: Mapping[str, Any]) -> Path:
    return cache_root() / "measured" / f"{name}-{value_digest(whole)[:16]}.json"
