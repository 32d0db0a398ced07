"""What a training stage writes down while it runs and says at its end.

`metrics.jsonl` and `samples.jsonl` hold only what the recipe and the seed decide, so that a resumed run's files equal
an uninterrupted one's; wall-clock figures go to `timings.jsonl`. Lines past the checkpoint that a run resumes from are
taken back: those steps come again. Copies go to TensorBoard, Weights & Biases or trackio where the recipe says so; none
is imported unless asked for, and a run that goes on writes into the same board.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import orjson
import torch

from groundup.console import format_bytes, format_count, format_fields
from groundup.errors import ArtifactError, GroundupError
from groundup.files import atomic_writer, write_error
from groundup.training.checkpoint import Progress, TrainingState
from groundup.training.optimizers import describe_groups
from groundup.training.process import peak_memory_bytes
from groundup.training.throughput import Throughput

if TYPE_CHECKING:
    from groundup.training.job import TrainingJob


FILES = ("metrics", "samples", "timings")
_NO_TERMS = {"step", "tokens", "lr", "muon_lr", "grad_norm", "bits_per_byte", "skipped"}
"""What a step's line has beside the objective's terms."""


class MetricLog:
    """The three logs of one stage's folder.

    Args:
        folder: where they are.
        step: the last step that counts; later lines are removed.
        writes: False in all processes but the first.
    """

    def __init__(self, folder: Path, step: int, *, writes: bool = True) -> None:
        self._handles: dict[str, IO[bytes]] = {}
        self._folder, self._writes = folder, writes
        self.take_back(step)

    def take_back(self, step: int) -> None:
        """Remove what comes after this step."""
        self.close()
        for name in FILES if self._writes else ():
            path = self._folder / f"{name}.jsonl"
            # The validation pass after the last counted step is done again: it may have been cut off.
            kept = [
                line
                for line in read_log(path)
                if line["step"] < step or (line["step"] == step and name != "samples" and not _is_validation(line))
            ]
            with atomic_writer(path, binary=True) as handle:
                handle.writelines(orjson.dumps(line) + b"\n" for line in kept)
            with _named(path):
                self._handles[name] = path.open("ab")

    def add(self, name: str, line: dict[str, Any]) -> None:
        """Append one line, which must have a "step"."""
        if name in self._handles:
            handle = self._handles[name]
            with _named(Path(handle.name)):
                handle.write(orjson.dumps(line) + b"\n")

    def flush(self) -> None:
        """Put everything on disk; called before a checkpoint claims these steps."""
        for handle in self._handles.values():
            with _named(Path(handle.name)):
                handle.flush()
                os.fsync(handle.fileno())

    def close(self) -> None:
        """Flush and close, all of them, whichever fails."""
        handles, self._handles = self._handles, {}
        with contextlib.ExitStack() as stack:
            for handle in handles.values():
                stack.callback(_close, handle)


def _close(handle: IO[bytes]) -> None:
    with _named(Path(handle.name)):
        try:
            handle.flush()
            os.fsync(handle.fileno())
        finally:
            handle.close()


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Within this block an error of the system says which file could not be written."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


def _is_validation(line: Mapping[str, Any]) -> bool:
    return any(name.startswith("val_") for name in line)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last line cut short by a kill is left out.

    Raises:
        ArtifactError: another line is damaged.
    """
    lines: list[dict[str, Any]] = []
    raw = path.read_bytes().splitlines() if path.is_file() else []
    for number, text in enumerate(raw, 1):
        with contextlib.suppress(orjson.JSONDecodeError):
            line = orjson.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
        if len(lines) < number < len(raw):
            raise ArtifactError(f"{path}, line {number}: damaged.", "Repair the line or take it out of the file.")
    return lines


TrackerName = Literal["tensorboard", "wandb", "trackio"]
Tracker = tuple[Callable[[int, dict[str, float]], None], Callable[[], None]]
"""What notes the numbers of a step, and what writes the last of them."""


class Trackers:
    """All that a recipe asks for, as one.

    Args:
        names: of the trackers.
        folder: the stage's folder; TensorBoard's files go into `tensorboard/` in it.
        project: the run's name.
        stage: the stage's name.
        step: the step that the run goes on from.
        config: settings, shown beside the curves.

    Raises:
        GroundupError: a tracker is not installed or refuses to start.
    """

    def __init__(
        self, names: Sequence[TrackerName], folder: Path, project: str, stage: str, step: int, config: Mapping[str, Any]
    ) -> None:
        self._all: list[Tracker] = []
        for name in names:
            try:
                if name == "tensorboard":
                    self._all.append(_tensorboard(folder / "tensorboard", step))
                else:
                    self._all.append(_remote(name, project, stage, config))
            except ImportError as error:
                raise GroundupError(
                    f"[{stage}] track = {name!r}: not installed.", f"Run: pip install {name}, or leave it out."
                ) from error

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Note the numbers among the figures of a step."""
        numbers = {
            name: float(value)
            for name, value in values.items()
            if name not in ("step", "tokens") and isinstance(value, (int, float))
        }
        for log, _ in self._all if numbers else ():
            log(step, numbers)

    def close(self) -> None:
        """Write what is left."""
        for _, close in self._all:
            close()


def _tensorboard(folder: Path, step: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    # What a killed run wrote beyond its checkpoint is hidden.
    writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def log(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return log, writer.close


def _remote(name: str, project: str, stage: str, config: Mapping[str, Any]) -> Tracker:
    """Weights & Biases, or trackio, which has the same interface."""
    module: Any = importlib.import_module(name)
    options = {"resume": "allow"} if name == "wandb" else {}
    module.init(project=project, name=stage, config=dict(config), **options)
    return lambda step, values: module.log(values, step=step), module.finish


_BAR_WIDTH = 34
"""Columns that a stage's name and its bar take on a terminal."""


def summarize(
    job: TrainingJob, progress: Progress, precision: torch.dtype, reason: str, state: TrainingState, speed: Throughput
) -> dict[str, Any]:
    """The stage's figures, as its manifest keeps them.

    `tokens_per_second` is of the whole run, validation and checkpoints included; `mfu` of the training steps since it
    was last started.
    """
    lines = read_log(job.folder / "metrics.jsonl")
    steps = [line for line in lines if "lr" in line]
    validation: dict[str, Any] = next((line for line in reversed(lines) if _is_validation(line)), {})
    terms = [name for name in (steps[-1] if steps else ()) if name not in _NO_TERMS]
    curves = {name: [line[name] for line in steps if math.isfinite(line.get(name) or math.nan)] for name in terms}
    final = {
        name: sum(tail) / len(tail) for name, values in curves.items() if (tail := values[-max(1, len(values) // 20) :])
    }
    first = terms[0] if terms else "loss"
    losses = curves.get(first, [])
    others = [module for module in job.modules.values() if module is not job.model]
    summary = {
        "parameters": job.model.n_parameters + sum(p.numel() for module in others for p in module.parameters()),
        "steps": progress.step,
        "tokens": progress.tokens,
        **({} if job.unit == "tokens" else {"unit": job.unit}),
        "flops": progress.flops,
        "initial_loss": losses[0] if losses else math.nan,
        "expected_initial_loss": job.expected_initial_loss,
        "final_loss": final.get(first, math.nan),
        "val_loss": validation.get(f"val_{first}"),
        **{f"final_{name}": value for name, value in final.items() if name != first},
        **{name: value for name, value in validation.items() if name not in ("step", "tokens", f"val_{first}")},
        "precision": "float8" if job.settings.precision == "float8" else str(precision).removeprefix("torch."),
        "precision_reason": reason,
        "tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
        "mfu": speed.mfu,
        "peak_memory_bytes": peak_memory_bytes(next(job.model.parameters()).device),
        "skipped_steps": state.spikes.skipped,
        "rollbacks": state.spikes.rollbacks,
    }
    if job.settings.groups:
        shapes = {name: parameter.shape for name, parameter in job.trained.named_parameters()}
        rows = describe_groups(shapes, job.settings, job.name)
        summary["groups"] = [f"{match}: {reach}" for place, match, reach in rows if place.endswith("groups")]
    return summary


def summary_line(summary: Mapping[str, Any]) -> str:
    """The most telling of them, for the finished line."""
    unit = summary.get("unit", "tokens")
    parts = [
        f"{format_count(summary['tokens'])} {unit}",
        f"loss {summary['initial_loss']:.2f} → {summary['final_loss']:.2f}",
    ]
    if summary["val_loss"] is not None:
        parts.append(f"val {summary['val_loss']:.3f}")
    if "val_bits_per_byte" in summary:
        parts.append(f"{summary['val_bits_per_byte']:.3f} bits/byte")
    parts.append(f"{format_count(summary['tokens_per_second'])} {_short(unit)}/s")
    if summary["mfu"] is not None:
        parts.append(f"mfu {summary['mfu']:.0%}")
    return " · ".join(parts)


def live_line(
    fields: Mapping[str, Any], speed: Throughput, seconds_left: float, memory_bytes: int, width: int,
    unit: str = "tokens",
) -> str:  # fmt: skip
    """What stands behind the bar, in the grammar of a log line, on a terminal with so many columns.

    `fields` are step, loss, learning rates and gradient norm; what is least missed goes first where it is narrow.
    """
    shown = {**fields, f"{_short(unit)}/s": round(speed.tokens_per_second)}
    if speed.mfu is not None:
        shown["mfu"] = f"{speed.mfu:.0%}"
    shown |= {"mem": format_bytes(memory_bytes).replace(" ", ""), "eta": _duration(seconds_left)}
    for name in ("mem", "muon_lr", "grad_norm", "lr", "mfu"):
        if len(format_fields(shown)) <= width - _BAR_WIDTH:
            break
        shown.pop(name, None)
    return format_fields(shown)


def _short(unit: str) -> str:
    return "tok" if unit == "tokens" else unit


def _duration(seconds: float) -> str:
    """`45s`, `2m10s`, `1h02m`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minute:02d}m"
    return f"{minute}m{second:02d}s" if minute else f"{second}s"
