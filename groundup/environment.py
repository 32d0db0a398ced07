"""What a result was made with: versions, machine, threads; kept in every manifest. And what a program may use here.

A container's limits are read from its control groups, version 1 or 2 (kernel documentation, admin-guide).
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import psutil


def describe_environment() -> dict[str, Any]:
    """Versions and machine, as plain values."""
    return {
        "groundup": version_of("groundup"),
        "python": platform.python_version(),
        **{name: version_of(name) for name in ("torch", "numpy", "tokenizers", "safetensors")},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


@functools.cache
def device_table() -> dict[str, dict[str, float]]:
    """The figures of `data/devices.toml`, by the name of the accelerator."""
    table: dict[str, dict[str, float]] = tomllib.loads(
        resources.files("groundup").joinpath("data", "devices.toml").read_text(encoding="utf-8")
    )
    return table


def version_of(package: str) -> str:
    """An installed package's version, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def usable_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def cpu_name() -> str:
    """The processor's name, as the system gives it."""
    return _cpu_field("model name") or platform.processor() or platform.machine()


@functools.cache
def cpu_features() -> str:
    """The processor's instruction sets, as Linux names them; empty elsewhere."""
    return _cpu_field("flags") or _cpu_field("Features")


def _cpu_field(wanted: str) -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == wanted:
                return value.strip()
    return ""


def container_limits(root: Path = Path("/")) -> tuple[float | None, int | None]:
    """The cores' worth of time and the bytes of memory that this process's control groups allow.

    Limits hold for a group and all below it, so the tightest on the way up counts.

    Args:
        root: the file system's root; another one in tests.
    """
    quotas: list[float] = []
    limits: list[int] = []
    for folder in _control_groups(root):
        both = (
            _whole_numbers(folder / "cpu.max"),
            _whole_numbers(folder / "cpu.cfs_quota_us") + _whole_numbers(folder / "cpu.cfs_period_us"),
        )
        quotas += [pair[0] / pair[1] for pair in both if len(pair) == 2 and min(pair) > 0]
        limits += _whole_numbers(folder / "memory.max") + _whole_numbers(folder / "memory.limit_in_bytes")
    # Version 1 writes "no limit" as a number of bytes beyond any machine.
    return min(quotas, default=None), min((limit for limit in limits if 0 < limit < 1 << 60), default=None)


def _control_groups(root: Path) -> list[Path]:
    """The folders of this process's control groups, and of all groups above them."""
    folders = []
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)  # version 2's single tree names no controllers
        below = Path(path.strip("/"))
        if ".." in below.parts:  # a group outside the container's view
            below = Path()
        for mount in {controllers, *controllers.split(",")}:
            folders += [root / "sys/fs/cgroup" / mount / part for part in (below, *below.parents)]
    return folders


def _whole_numbers(path: Path) -> list[int]:
    """The numbers in a control file; none when it is absent or says "max"."""
    try:
        return [int(word) for word in path.read_text(encoding="ascii").split()]
    except (OSError, ValueError):
        return []
