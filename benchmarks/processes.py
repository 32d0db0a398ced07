"""Runs a command and measures all of its processes: CPU seconds, wall seconds, and the peak memory of each.

CPU time is what the system books for the process and for its children that it waited for. Memory is each process's own
high-water mark (`VmHWM`, which begins anew with every program), looked at ten times a second until it ends; where the
system has no such mark, the largest resident size that was seen.
"""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ONE_THREAD = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""One thread a process, for every library with threads of its own."""

LOOK_SECONDS = 0.1
OUTPUT_SHOWN = 4000


@dataclass(frozen=True)
class Usage:
    """What a command took.

    Attributes:
        cpu_seconds: of the process and its children, start and imports included.
        wall_seconds: from start to end.
        peak_mib: most memory of the process itself.
        children_peak_mib: most memory of any one of its children; 0 without any.
        children: how many there were.
    """

    cpu_seconds: float
    wall_seconds: float
    peak_mib: float
    children_peak_mib: float
    children: int


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Usage:
    """Run a command to its end; what it prints is shown only if it fails.

    Args:
        command: program and arguments.
        environment: variables beside those of this process.

    Raises:
        RuntimeError: it failed.
    """
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        child = subprocess.Popen(
            command,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        peaks: dict[int, int] = {}
        while True:
            _look(child.pid, peaks)
            ended, status, usage = os.wait4(child.pid, os.WNOHANG)
            if ended:
                break
            time.sleep(LOOK_SECONDS)
        wall = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            output.seek(0)
            said = output.read().decode(errors="replace")[-OUTPUT_SHOWN:]
            raise RuntimeError(f"{' '.join(map(str, command))}\nended with {child.returncode}:\n{said}")
    own = peaks.pop(child.pid, 0)
    return Usage(
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        wall_seconds=wall,
        peak_mib=own / 2**20,
        children_peak_mib=max(peaks.values(), default=0) / 2**20,
        children=len(peaks),
    )


def _look(pid: int, peaks: dict[int, int]) -> None:
    """Note the peaks of a process and its children so far."""
    with contextlib.suppress(psutil.Error, OSError):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error, OSError, ValueError):
                if not _is_helper(one):
                    peaks[one.pid] = max(peaks.get(one.pid, 0), _peak_bytes(one))


def _is_helper(process: psutil.Process) -> bool:
    """Python's own helper that removes what workers leave behind."""
    return any("resource_tracker" in part for part in process.cmdline())


def _peak_bytes(process: psutil.Process) -> int:
    status = Path(f"/proc/{process.pid}/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return 0  # it has ended, and was not waited for yet
    return int(process.memory_info().rss)


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)
