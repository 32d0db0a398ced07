"""What a training stage says of itself at its end: losses, speed, memory, steps that made trouble."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from groundup.console import format_count
from groundup.training.checkpoint import Progress
from groundup.training.metrics import read_log
from groundup.training.state import TrainingState

if TYPE_CHECKING:
    from groundup.training.loop import TrainingJob


def summarize(
    job: TrainingJob, progress: Progress, precision: torch.dtype, reason: str, state: TrainingState
) -> dict[str, Any]:
    """The stage's figures, as its manifest keeps them."""
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
        "precision": str(precision).removeprefix("torch."),
        "precision_reason": reason,
        "tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
        "peak_memory_bytes": peak_memory_bytes(),
        "skipped_steps": state.guard.skipped,
        "rollbacks": state.guard.rollbacks,
    }
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
    return " · ".join([*parts, f"{format_count(summary['tokens_per_second'])} tok/s"])


def peak_memory_bytes() -> int:
    """The most memory this process has held (resident set), in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
