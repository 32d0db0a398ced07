"""The training loop, for every stage that trains and for any number of processes.

Each step: take the step's batch (a pure function of the step), run forward and backward micro-batch by
micro-batch, divide by the whole step's count of valid tokens, clip, update. In between: validation, samples,
checkpoints. What is written depends on recipe and seed only, so that a resumed run gives the same bits.
"""

from __future__ import annotations

import math
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from jaxtyping import Int
from torch import Tensor

from groundup.console import Bar, Console, format_count, format_duration
from groundup.distributed import World, shard_model
from groundup.errors import GroundupError, Interrupted
from groundup.files import value_digest
from groundup.model import Transformer
from groundup.recipe import OptimizerSettings
from groundup.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from groundup.training.interruption import StopRequest, stop_on_signal
from groundup.training.memory import keep_freed_memory
from groundup.training.metrics import MetricLog, read_log
from groundup.training.objective import head_loss, valid_tokens
from groundup.training.optimizers import Optimizers, clip_gradients
from groundup.training.precision import choose_precision
from groundup.training.schedule import learning_rate_share

CHECKPOINTS = "checkpoints"

Rows = tuple[Int[Tensor, "rows seq"], Int[Tensor, "rows seq"]]
"""Token ids and targets (-100: not predicted), int64."""


class BatchSource(Protocol):
    """Where a stage's batches come from; each a pure function of the step."""

    fingerprint: str

    def batch(self, step: int, rows: slice) -> Rows:
        """The given rows of step `step`'s batch; rows that carry no target fill up a short one."""
        ...

    def validation(self, batch_size: int, limit_tokens: int | None) -> Iterator[Rows]:
        """Validation batches of exactly `batch_size` rows, always the same, each target once."""
        ...


@dataclass
class TrainingJob:
    """What is trained, on what, and what is watched.

    Attributes:
        name: the stage, as shown on the console.
        model: trained in place.
        source: batches.
        settings: optimizer, schedule, precision, intervals.
        n_steps: optimizer steps.
        folder: where logs and checkpoints go.
        seed: of dropout.
        start: what stands for the weights it begins with; "fresh": those that its seed draws.
        expected_initial_loss: what the first step's loss should be, in nats, for a model that knows nothing.
        bytes_per_token: turns validation loss into bits per byte, where the targets are plain text.
        samples: prompts to continue at each validation pass, and what continues them.
    """

    name: str
    model: Transformer
    source: BatchSource
    settings: OptimizerSettings
    n_steps: int
    folder: Path
    seed: int = 1
    start: str = "fresh"
    expected_initial_loss: float | None = None
    bytes_per_token: float | None = None
    samples: tuple[str, ...] = ()
    continue_text: Callable[[Transformer, str], str] | None = None

    @property
    def fingerprint(self) -> str:
        """Digest of everything that decides the weights: a checkpoint of another one is not resumed."""
        return value_digest(
            {
                "model": self.model.config.to_dict(),
                "source": self.source.fingerprint,
                "settings": self.settings.fingerprint_values(),
                "steps": self.n_steps,
                "seed": self.seed,
                "start": self.start,
            }
        )


def train(job: TrainingJob, world: World, console: Console) -> dict[str, Any]:
    """Train to the end, from the start or from the newest checkpoint, and return the stage's figures.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; everything is saved.
        GroundupError: the loss is not finite, or the batch does not fit the world.
    """
    if world.device.type == "cpu":
        keep_freed_memory()
    precision, reason = choose_precision(job.settings.precision, world.device.type)
    rows = world.rows(job.settings.batch_size)
    model = shard_model(job.model, world)
    model.compute_dtype = precision
    if job.settings.compile:
        for block in model.layers:
            block.compile()
    optimizers = Optimizers(model, job.settings, precision)
    checkpoints = job.folder / CHECKPOINTS
    progress = load_checkpoint(checkpoints, model, optimizers, job.fingerprint, console)
    if progress is None:
        progress = Progress(0, 0, 0.0, job.fingerprint, torch.get_num_threads(), world.size)
    elif world.is_first:
        _say_resumed(job, progress, world, console)
    log = MetricLog(job.folder, progress.step, writes=world.is_first)
    try:
        with stop_on_signal() as stop, console.bar(job.name, job.n_steps) as bar:
            loop = _Loop(job, model, optimizers, log, world, console, bar, rows)
            progress = loop.run(progress, stop, checkpoints)
            log.flush()
            summary = _summary(job, progress, precision, reason)
            bar.finish(_summary_line(summary))
    finally:
        log.close()
    return summary


def forget_checkpoints(job: TrainingJob, world: World) -> None:
    """Remove the training checkpoints; called when the finished model is safely on disk."""
    if world.is_first:
        shutil.rmtree(job.folder / CHECKPOINTS, ignore_errors=True)


class _Loop:
    """The state of one call of `train`."""

    def __init__(
        self,
        job: TrainingJob,
        model: Transformer,
        optimizers: Optimizers,
        log: MetricLog,
        world: World,
        console: Console,
        bar: Bar,
        rows: slice,
    ) -> None:
        self.job, self.model, self.optimizers, self.log = job, model, optimizers, log
        self.world, self.console, self.bar, self.rows = world, console, bar, rows
        settings = job.settings
        self.eval_every = settings.eval_every or max(1, math.ceil(job.n_steps / 20))
        self.micro = min(settings.micro_batch_size or settings.batch_size, rows.stop - rows.start)

    def run(self, progress: Progress, stop: StopRequest, checkpoints: Path) -> Progress:
        """Train from `progress` to the last step."""
        job, began = self.job, progress
        start = saved = shown = time.perf_counter()
        shown_tokens = began.tokens
        while True:
            if self.watch_due(progress.step):
                self.watch(progress.step, progress.tokens)
            if progress.step == job.n_steps:
                return progress
            line, tokens = self.step(progress.step)
            now = time.perf_counter()
            progress = replace(
                progress,
                step=progress.step + 1,
                tokens=progress.tokens + tokens,
                seconds=began.seconds + now - start,
                threads=torch.get_num_threads(),
                world_size=self.world.size,
            )
            self.log.add("metrics", {"step": progress.step, "tokens": progress.tokens, **line})
            if progress.step == 1:
                self.check_initial_loss(line["loss"])
            if progress.step % job.settings.log_every == 0 or progress.step == job.n_steps:
                speed = (progress.tokens - shown_tokens) / (now - shown)
                self.show(progress, line, speed, (now - start) / (progress.step - began.step))
                shown, shown_tokens = now, progress.tokens
            asked, late = self.world.any(stop.asked), now - saved >= job.settings.checkpoint_seconds
            if asked or self.watch_due(progress.step) or self.world.any(late):
                self.log.flush()
                save_checkpoint(checkpoints, self.model, self.optimizers, progress, self.world)
                saved = time.perf_counter()
            if asked and progress.step < job.n_steps:
                raise Interrupted(f"{job.name}: stopped at step {progress.step} of {job.n_steps}; everything is saved.")

    def watch_due(self, step: int) -> bool:
        """Whether validation and samples come after this step."""
        return step % self.eval_every == 0 or step == self.job.n_steps

    def show(self, progress: Progress, line: Mapping[str, float], speed: float, seconds_per_step: float) -> None:
        """The live line, and the wall-clock log."""
        left = format_duration((self.job.n_steps - progress.step) * seconds_per_step)
        self.bar.update(
            progress.step,
            note=f"step {progress.step}/{self.job.n_steps} loss {line['loss']:.3f} "
            f"· {format_count(speed)} tok/s · eta {left}",
        )
        self.log.add("timings", {"step": progress.step, "seconds": progress.seconds, "tokens_per_second": speed})

    def step(self, step: int) -> tuple[dict[str, float], int]:
        """One optimizer step: its metrics (mean loss in nats, learning rate, gradient norm) and its valid tokens."""
        # Dropout's randomness is a function of the step, so there is no generator state to save.
        torch.manual_seed(xxhash.xxh3_64_intdigest(f"{self.job.seed}/{step}/{self.world.rank}".encode()) >> 1)
        ids, targets = (part.to(self.world.device) for part in self.job.source.batch(step, self.rows))
        count = self.world.sum(torch.tensor([float(valid_tokens(targets))], dtype=torch.float64))[0]
        self.model.train()
        total = torch.zeros(1, dtype=torch.float64, device=self.world.device)
        for first in range(0, len(ids), self.micro):
            part = slice(first, first + self.micro)
            loss = self.model(ids[part], head=head_loss(targets[part]))
            balance = self.model.balance_loss()
            objective = loss.objective if balance is None else loss.objective + balance
            # FSDP averages gradients over processes: times the world's size it is the sum again.
            (objective * (self.world.size / count)).backward()
            total += loss.nats
        nats = float(self.world.sum(total)[0] / count)
        grad_norm = clip_gradients(self.optimizers.parameters(), self.job.settings.clip, self.world.sum)
        if not (math.isfinite(nats) and math.isfinite(grad_norm)):
            raise GroundupError(
                f"{self.job.name}: loss {nats} and gradient norm {grad_norm} at step {step + 1} are not finite.",
                "Likely causes: a learning rate too high (lower lr and muon_lr), or clip = 0. "
                "The last checkpoint is kept.",
            )
        lr_share = learning_rate_share(self.job.settings, step, self.job.n_steps)
        self.optimizers.step(lr_share)
        return {"loss": nats, "lr": self.job.settings.lr * lr_share, "grad_norm": grad_norm}, int(count)

    def watch(self, step: int, tokens: int) -> None:
        """Validation loss and samples."""
        loss = self.validation_loss()
        line: dict[str, Any] = {"step": step, "tokens": tokens, "val_loss": loss}
        if self.job.bytes_per_token is not None:
            line["val_bits_per_byte"] = loss / math.log(2) / self.job.bytes_per_token
        self.log.add("metrics", line)
        self.console.log(
            {"step": f"{step}/{self.job.n_steps}", **{k: v for k, v in line.items() if k.startswith("val")}}
        )
        if self.job.continue_text is not None:
            for prompt in self.job.samples:
                text = self.job.continue_text(self.model, prompt)
                self.log.add("samples", {"step": step, "prompt": prompt, "text": text})

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean loss in nats over the validation targets."""
        self.model.eval()
        batch_size = self.job.settings.batch_size
        sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        for ids, targets in self.job.source.validation(batch_size, self.job.settings.eval_tokens or 50_000):
            mine_ids, mine = ids[self.rows].to(self.world.device), targets[self.rows].to(self.world.device)
            sums[0] += self.model(mine_ids, head=head_loss(mine)).nats
            sums[1] += valid_tokens(mine)
        total, count = self.world.sum(sums).tolist()
        return total / count

    def check_initial_loss(self, loss: float) -> None:
        """A model that knows nothing predicts uniformly: its loss is ln V, or something is wrong."""
        expected = self.job.expected_initial_loss
        if expected is not None and abs(loss / expected - 1) > 0.02:
            self.console.warn(
                f"{self.job.name}: the first loss is {loss:.3f}, but a model that knows nothing gives "
                f"ln V = {expected:.3f}. Look at the initialization, the targets and the vocabulary's size."
            )


def _say_resumed(job: TrainingJob, progress: Progress, world: World, console: Console) -> None:
    console.note(f"{job.name}: going on from step {progress.step} of {job.n_steps}")
    if (progress.threads, progress.world_size) != (torch.get_num_threads(), world.size):
        console.warn(
            f"{job.name}: it began with {progress.threads} threads and {progress.world_size} processes, now there are "
            f"{torch.get_num_threads()} and {world.size}: sums may round differently, "
            "so the same bits cannot be promised."
        )


def _summary(job: TrainingJob, progress: Progress, precision: torch.dtype, reason: str) -> dict[str, Any]:
    lines = read_log(job.folder / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    watched = [line for line in lines if "val_loss" in line]
    tail = losses[-max(1, len(losses) // 20) :]
    summary = {
        "parameters": job.model.n_parameters,
        "steps": progress.step,
        "tokens": progress.tokens,
        "initial_loss": losses[0],
        "expected_initial_loss": job.expected_initial_loss,
        "final_loss": sum(tail) / len(tail),
        "val_loss": watched[-1]["val_loss"],
        "precision": str(precision).removeprefix("torch."),
        "precision_reason": reason,
        "tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    if "val_bits_per_byte" in watched[-1]:
        summary["val_bits_per_byte"] = watched[-1]["val_bits_per_byte"]
    return summary


def _summary_line(summary: Mapping[str, Any]) -> str:
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
