"""What a training stage says of itself at its end: losses, speed, memory, steps that made trouble."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from groundup.console import format_bytes, format_count, format_fields
from groundup.training.checkpoint import Progress
from groundup.training.groups import describe_groups
from groundup.training.metrics import read_log
from groundup.training.speed import Speed
from groundup.training.state import TrainingState

if TYPE_CHECKING:
    from groundup.training.job import TrainingJob


_BAR_WIDTH = 34
"""Columns that a stage's name and its bar take on a terminal."""


def summarize(
    job: TrainingJob, progress: Progress, precision: torch.dtype, reason: str, state: TrainingState, speed: Speed
) -> dict[str, Any]:
    """The stage's figures, as its manifest keeps them.

    `tokens_per_second` is of the whole run, validation and checkpoints included; `mfu` of the training steps since it
    was last started.
    """
    lines = read_log(job.folder / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line and math.isfinite(line["loss"] or math.nan)]
    watched = [line for line in lines if "val_loss" in line]
    tail = losses[-max(1, len(losses) // 20) :]
    summary = {
        "parameters": job.model.n_parameters,
        "steps": progress.step,
        "tokens": progress.tokens,
        "initial_loss": losses[0] if losses else math.nan,
        "expected_initial_loss": job.expected_initial_loss,
        "final_loss": sum(tail) / len(tail) if tail else math.nan,
        "val_loss": watched[-1]["val_loss"],
        "precision": "float8" if job.settings.precision == "float8" else str(precision).removeprefix("torch."),
        "precision_reason": reason,
        "tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
        "mfu": speed.mfu,
        "peak_memory_bytes": peak_memory_bytes(next(job.model.parameters()).device),
        "skipped_steps": state.guard.skipped,
        "rollbacks": state.guard.rollbacks,
    }
    if job.settings.groups:
        shapes = {name: parameter.shape for name, parameter in job.model.named_parameters()}
        rows = describe_groups(shapes, job.settings, job.name)
        summary["groups"] = [f"{match}: {reach}" for place, match, reach in rows if place.endswith("groups")]
    if "val_bits_per_byte" in watched[-1]:
        summary["val_bits_per_byte"] = watched[-1]["val_bits_per_byte"]
    return summary


def summary_line(summary: Mapping[str, Any]) -> str:
    """The most telling of them, for the finished line."""
    parts = [
        f"{format_count(summary['tokens'])} tokens",
        f"loss {summary['initial_loss']:.2f} → {summary['final_loss']:.2f}",
        f"val {summary['val_loss']:.3f}",
    ]
    if "val_bits_per_byte" in summary:
        parts.append(f"{summary['val_bits_per_byte']:.3f} bits/byte")
    parts.append(f"{format_count(summary['tokens_per_second'])} tok/s")
    if summary["mfu"] is not None:
        parts.append(f"mfu {summary['mfu']:.0%}")
    return " · ".join(parts)


def live_line(fields: Mapping[str, Any], speed: Speed, seconds_left: float, memory_bytes: int, width: int) -> str:
    """What stands behind the bar, in the grammar of a log line; what is least missed goes first on a narrow terminal.

    Args:
        fields: step, loss, learning rates and gradient norm.
        speed: of the last steps.
        seconds_left: to the end of the run.
        memory_bytes: peak so far.
        width: columns of the terminal.
    """
    shown = {**fields, "tok/s": round(speed.tokens_per_second)}
    if speed.mfu is not None:
        shown["mfu"] = f"{speed.mfu:.0%}"
    shown |= {"mem": format_bytes(memory_bytes).replace(" ", ""), "eta": _duration(seconds_left)}
    for name in ("mem", "muon_lr", "grad_norm", "lr", "mfu"):
        if len(format_fields(shown)) <= width - _BAR_WIDTH:
            break
        shown.pop(name, None)
    return format_fields(shown)


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


def _duration(seconds: float) -> str:
    """`45s`, `2m10s`, `1h02m`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minute:02d}m"
    return f"{minute}m{second:02d}s" if minute else f"{second}s"
