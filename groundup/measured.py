"""What was measured on this machine before, kept under the user's cache, so that a trial is made once.

A measurement has a name and a key of plain values. Machine, threads, torch's version and forbidden vector units belong
to every key, so that another processor or version measures anew. A file that cannot be read or written costs a
measurement, nothing else. What was measured while other programs disturbed it is used, not kept, and nothing is kept
for ever.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import orjson
import torch

from groundup.environment import cpu_name
from groundup.errors import GroundupError
from groundup.files import read_json, value_digest, write_json

_LIMITS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
"""Settings of torch's libraries that forbid them some of the machine's vector units."""

_DAYS = 30
_MOST_SPREAD = 1.2


def cache_root() -> Path:
    """Where groundup keeps what it can make again: `groundup/` in the user's cache."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "groundup"


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


def fastest(ways: Mapping[str, Callable[[], object]]) -> tuple[dict[str, float], float]:
    """Seconds of the fastest run of each way, and the largest spread: the second fastest run's over the fastest's.

    They take turns after one run that warms up, three times or more: shared machines are slow for a while at a time.
    """
    for run in ways.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    begin = time.perf_counter()
    for n_done in range(50):
        if n_done >= 3 and time.perf_counter() - begin > 0.02 * len(ways):
            break
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    ordered = {name: sorted(times) for name, times in seconds.items()}
    return {name: times[0] for name, times in ordered.items()}, max(one[1] / one[0] for one in ordered.values())


def recall(name: str, key: Mapping[str, Any], device: torch.device) -> dict[str, Any] | None:
    """What was measured here before, or None."""
    whole = _whole(key, device)
    with contextlib.suppress(GroundupError, OSError, KeyError, TypeError):
        found = read_json(_file(name, whole))
        if found["key"] == whole and time.time() - found["time"] < _DAYS * 86_400:
            return dict(found["result"])
    return None


def remember(name: str, key: Mapping[str, Any], device: torch.device, result: Mapping[str, Any]) -> None:
    """Keep a measurement for the next run, unless its `spread` says that it was disturbed."""
    if result.get("spread", 1.0) > _MOST_SPREAD:
        return
    whole = _whole(key, device)
    path = _file(name, whole)
    with contextlib.suppress(GroundupError, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": whole, "time": time.time(), "result": dict(result)})


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
