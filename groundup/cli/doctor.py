"""What this machine can do for groundup: `examine` judges, `render` and `to_json` show.

The facts come from `machine.look`; the judgement is a pure function of them. Every finding that is not "ok"
says what to do about it, and the last one says what to expect: how long the demo will take.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from groundup.cli.machine import Arithmetic, Machine, look
from groundup.console import format_bytes
from groundup.recipe import Recipe, read_recipe

Status = Literal["ok", "warn", "fail"]

OLDEST_PYTHON = (3, 11)
DEMO_MEMORY_BYTES = 2 << 30
DEMO_DISK_BYTES = 256 << 20
PATIENCE_MINUTES = 10
OVERHEAD = 2.3  # of a whole build over the forward and backward passes of its pretraining


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's table."""

    name: str  # what was looked at
    value: str  # what was found
    status: Status = "ok"  # ok; warn: works, but slower or only in part; fail: groundup cannot work like this
    advice: str = ""  # what to expect, or what to do


def examine(machine: Machine | None = None, *, runs: str | Path = "runs") -> list[Finding]:
    """Judge a machine.

    Args:
        machine: what is known of it; read from this one when absent (about a second).
        runs: where runs would be written.

    Returns:
        Findings, in the order a reader needs them.
    """
    demo = read_recipe("demo")
    if machine is None:
        machine = look(demo, runs)
    return [
        _python(machine),
        _groundup(machine),
        _torch(machine),
        _cpu(machine),
        _threads(machine),
        _memory(machine),
        *([_bfloat16(machine.torch), _gpu(machine.torch)] if machine.torch else []),
        _compiler(machine),
        _disk(machine),
        _language_model(machine),
        _expectation(machine, demo),
    ]


def render(findings: Sequence[Finding]) -> Table:
    """The findings as a table for the terminal."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    for finding in findings:
        text = Text(finding.value)
        if finding.advice:
            text.append(f"\n{finding.advice}", style="dim" if finding.status == "ok" else styles[finding.status])
        table.add_row(Text(finding.status, style=styles[finding.status]), Text(finding.name), text)
    return table


def to_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """The findings for programs, JSON-able: `{"ok": nothing failed, "findings": [{"name": ..., ...}, ...]}`."""
    ok = all(finding.status != "fail" for finding in findings)
    return {"ok": ok, "findings": [asdict(finding) for finding in findings]}


def _python(machine: Machine) -> Finding:
    version = ".".join(map(str, machine.python))
    if machine.python[:2] < OLDEST_PYTHON:
        return Finding("python", version, "fail", "Install Python 3.11 or newer, then: make clean demo.")
    return Finding("python", version)


def _groundup(machine: Machine) -> Finding:
    broken = {name: why for name, why in machine.broken_imports.items() if name != "torch"}
    if not broken:
        return Finding("groundup", f"{machine.groundup}, every part can be imported")
    listed = "; ".join(f"{name}: {why}" for name, why in broken.items())
    return Finding("groundup", f"{machine.groundup}, broken: {listed}", "fail", "Install it anew: make clean demo.")


def _torch(machine: Machine) -> Finding:
    if machine.torch is None:
        why = machine.broken_imports.get("torch", "not found")
        return Finding("torch", f"cannot be imported: {why}", "fail", "Install it anew: make clean demo.")
    return Finding("torch", machine.torch.version)


def _usable_cores(machine: Machine) -> int:
    """Cores that this process gets in the end: those it may run on, cut by its container's share of time."""
    if machine.core_quota is None:
        return machine.cores
    return max(1, min(machine.cores, math.floor(machine.core_quota)))


def _cpu(machine: Machine) -> Finding:
    value = f"{machine.cpu}, {_count(machine.cores, 'core')}"
    if machine.core_quota is not None and machine.core_quota < machine.cores:
        value += f", of which this container may use {machine.core_quota:g}"
    return Finding("cpu", value)


def _threads(machine: Machine) -> Finding:
    cores, omp = _usable_cores(machine), machine.omp_threads
    threads = machine.torch.threads if machine.torch else cores
    value = _count(threads, "thread") + (f", OMP_NUM_THREADS={omp}" if omp is not None else "")
    if omp is not None and not (omp.isascii() and omp.isdigit() and int(omp) > 0):
        return Finding("threads", value, "warn", "OMP_NUM_THREADS is not a whole number above 0: unset it.")
    advice = "unset OMP_NUM_THREADS" if omp is not None else f"--set threads={cores}"
    if threads > cores:
        return Finding("threads", value, "warn", f"More than the {_count(cores, 'core')} there are: {advice}.")
    if 2 * threads <= cores and omp is not None:
        return Finding("threads", value, "warn", f"{cores - threads} of {cores} cores would stand idle: {advice}.")
    return Finding("threads", value)


def _memory(machine: Machine) -> Finding:
    free = machine.memory_free
    value = f"{format_bytes(free)} free of {format_bytes(machine.memory_total)}"
    if machine.memory_limit is not None and machine.memory_limit < machine.memory_total:
        free = min(free, machine.memory_limit)
        value += f", this container may use {format_bytes(machine.memory_limit)}"
    if free < DEMO_MEMORY_BYTES:
        return Finding(
            "memory",
            value,
            "warn",
            f"The demo needs up to {format_bytes(DEMO_MEMORY_BYTES)}: close other programs, raise the container's "
            "limit, or lower --set pretrain.micro_batch_size=4.",
        )
    return Finding("memory", value)


def _bfloat16(torch: Arithmetic) -> Finding:
    native, evidence = torch.bfloat16
    measured = (
        f"matrix products: float32 {torch.float32_flops / 1e9:,.0f}, bfloat16 {torch.bfloat16_flops / 1e9:,.0f} "
        f"GFLOP/s ({torch.bfloat16_flops / torch.float32_flops:.1f} times)"
    )
    if not native:
        return Finding("precision", f"float32: {evidence}; {measured}")
    if torch.bfloat16_flops < torch.float32_flops:
        advice = "bfloat16 is slower than float32 here: --set pretrain.precision=float32"
        return Finding("precision", f"bfloat16: {evidence}; {measured}", "warn", advice)
    return Finding("precision", f"bfloat16: {evidence}; {measured}")


def _gpu(torch: Arithmetic) -> Finding:
    if torch.gpus:
        return Finding("gpu", ", ".join(torch.gpus))
    if torch.unused_device is not None:
        advice = "Everything runs on the CPU here: groundup computes on the GPUs of NVIDIA and AMD alone."
        return Finding("gpu", f"{torch.unused_device} is not used", "warn", advice)
    return Finding("gpu", "none", "ok", "Not needed for the demo.")


def _compiler(machine: Machine) -> Finding:
    missing = [
        *([] if machine.compiler else ["a C++ compiler (Debian, Ubuntu: apt install g++)"]),
        *([] if machine.python_headers else ["Python's headers (Debian, Ubuntu: apt install python3-dev)"]),
    ]
    if missing:
        advice = f"Training runs without it, more slowly. Install {' and '.join(missing)}."
        return Finding("compiler", "torch.compile cannot be used", "warn", advice)
    return Finding("compiler", f"{machine.compiler}")


def _disk(machine: Machine) -> Finding:
    value = f"{format_bytes(machine.disk_free)} free for {machine.runs}"
    if not machine.runs_writable:
        return Finding("disk", f"{machine.runs} cannot be written", "fail", "Choose another folder with --runs.")
    if machine.disk_free < DEMO_DISK_BYTES:
        advice = f"The demo needs {format_bytes(DEMO_DISK_BYTES)}: free some space, or choose another folder: --runs."
        return Finding("disk", value, "fail", advice)
    return Finding("disk", value)


def _language_model(machine: Machine) -> Finding:
    if machine.language_model:
        return Finding("languages", "detector's model is installed, no network needed")
    return Finding(
        "languages",
        "detector's model is missing",
        "fail",
        "Install it anew (make clean demo), or keep every language: --set corpus.languages=[].",
    )


def _expectation(machine: Machine, demo: Recipe) -> Finding:
    rate = machine.tokens_per_second
    if rate is None:
        return Finding("expect", "nothing can be trained until the above is fixed", "fail", "Fix what failed above.")
    tokens = demo.pretrain.tokens if isinstance(demo.pretrain.tokens, int) else 0
    minutes = OVERHEAD * tokens / rate / 60
    shown = f"{max(1, round(minutes))} min" if minutes < 90 else f"{minutes / 60:.0f} h"
    value = f"about {float(f'{rate:.1e}'):,.0f} tokens/s with the demo's model; groundup build demo: about {shown}"
    if machine.load > _usable_cores(machine) / 2:
        value += f" (while other programs keep {machine.load:.1f} cores busy)"
    if minutes > PATIENCE_MINUTES:
        advice = "Slow, but it works, and can be stopped and resumed. See threads and precision above."
        return Finding("expect", value, "warn", advice)
    return Finding("expect", value)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
