"""The training loop, for every stage that trains and for any number of processes.

Each step: take the step's batch (a pure function of its place in the order), run forward and backward micro-batch by
micro-batch, divide by the whole step's count of valid tokens, let the guard judge, clip, update. In between:
checkpoints, then validation and samples. What is written depends on recipe and seed only, so that a resumed run gives
the same bits.
"""

from __future__ import annotations

import contextlib
import functools
import math
import shutil
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
from groundup.training.activation import set_checkpointing
from groundup.training.averaging import WeightAverage
from groundup.training.checkpoint import CheckpointWriter, Progress, weights_of
from groundup.training.compilation import compile_blocks
from groundup.training.guard import Guard, Trouble, likely_causes
from groundup.training.interruption import StopRequest, stop_on_signal
from groundup.training.memory import keep_freed_memory
from groundup.training.metrics import MetricLog
from groundup.training.objective import head_loss, valid_tokens
from groundup.training.optimizers import Optimizers, clip_gradients
from groundup.training.precision import choose_precision
from groundup.training.prefetch import Prefetcher, collections_between_steps, to_device
from groundup.training.scaling import LossScaler
from groundup.training.schedule import BatchPlan, learning_rate_share
from groundup.training.state import TrainingState
from groundup.training.summary import peak_memory_bytes, summarize, summary_line
from groundup.training.tracking import Trackers

CHECKPOINTS = "checkpoints"

Rows = tuple[Int[Tensor, "rows seq"], Int[Tensor, "rows seq"]]
"""Token ids and targets (-100: not predicted), int64."""


class BatchSource(Protocol):
    """Where a stage's rows come from; each a pure function of its place."""

    fingerprint: str

    def rows(self, first: int, last: int) -> Rows:
        """Rows `first` … `last` − 1 of the endless order."""
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
        n_rows: rows to see, at least; the last batch is whole.
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
    n_rows: int
    folder: Path
    seed: int = 1
    start: str = "fresh"
    expected_initial_loss: float | None = None
    bytes_per_token: float | None = None
    samples: tuple[str, ...] = ()
    continue_text: Callable[[Transformer, str], str] | None = None

    @functools.cached_property
    def plan(self) -> BatchPlan:
        """Which rows each step takes."""
        settings = self.settings
        return BatchPlan(settings.batch_size, self.n_rows, settings.ramp_from, settings.ramp_share)

    @property
    def n_steps(self) -> int:
        """Optimizer steps."""
        return self.plan.n_steps

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
        GroundupError: the guard stops the run, or the batch does not fit the world.
    """
    settings = job.settings
    if world.device.type == "cpu":
        keep_freed_memory()
    precision, reason = choose_precision(settings.precision, world.device.type)
    for size in filter(None, (settings.batch_size, settings.ramp_from)):
        world.rows(size)
    model = shard_model(job.model, world)
    model.compute_dtype = precision
    set_checkpointing(model, settings.activation_checkpointing)
    state = TrainingState(
        model=model,
        optimizers=Optimizers(model, settings, precision),
        guard=Guard(settings.on_trouble, settings.spike_z),
        scaler=LossScaler() if precision == torch.float16 else None,
        average=WeightAverage(model, settings.ema) if settings.ema else None,
    )
    folder = job.folder / CHECKPOINTS
    progress = state.restore(folder, job.fingerprint, console)
    if progress is None:
        progress = Progress(0, 0, 0.0, job.fingerprint, torch.get_num_threads(), world.size)
    elif world.is_first:
        _say_resumed(job, progress, world, console)
    if settings.compile:
        compile_blocks(model, console)
    log = MetricLog(job.folder, progress.step, writes=world.is_first)
    names = settings.track if world.is_first else ()
    with contextlib.ExitStack() as stack:
        stack.callback(log.close)
        trackers = Trackers(names, job.folder, job.folder.parent.name, job.name, progress.step, settings.model_dump())
        stack.callback(trackers.close)
        beside = world.device.type == "cuda" if settings.checkpoint_beside is None else settings.checkpoint_beside
        writer = CheckpointWriter(folder, world, model.config, settings.keep_checkpoints, beside=beside)
        stack.callback(writer.close)
        stop = stack.enter_context(stop_on_signal())
        bar = stack.enter_context(console.bar(job.name, job.n_steps))
        loop = _Loop(job, state, log, trackers, writer, world, console, bar)
        progress = loop.run(progress, stop)
        log.flush()
        writer.wait()
        summary = summarize(job, progress, precision, reason, state)
        bar.finish(summary_line(summary))
    if state.average is not None:
        state.average.make_permanent()
    return summary


def forget_checkpoints(job: TrainingJob, world: World) -> None:
    """Remove the training checkpoints; called when the finished model is safely on disk."""
    if world.is_first:
        shutil.rmtree(job.folder / CHECKPOINTS, ignore_errors=True)


class _Loop:
    """The state of one call of `train`."""

    def __init__(
        self, job: TrainingJob, state: TrainingState, log: MetricLog, trackers: Trackers, writer: CheckpointWriter,
        world: World, console: Console, bar: Bar,
    ) -> None:  # fmt: skip
        self.job, self.state, self.model = job, state, state.model
        self.log, self.trackers, self.writer = log, trackers, writer
        self.world, self.console, self.bar = world, console, bar
        self.eval_every = job.settings.eval_every or max(1, math.ceil(job.n_steps / 20))
        share = job.settings.batch_size // world.size
        self.micro = min(job.settings.micro_batch_size or job.settings.batch_size, share)

    def run(self, progress: Progress, stop: StopRequest) -> Progress:
        """Train from `progress` to the last step."""
        job, began = self.job, progress
        start = saved = shown = time.perf_counter()
        shown_tokens, done_here = began.tokens, 0
        with Prefetcher(self.batch) as self.batches, collections_between_steps() as collect:
            while True:
                if self.watch_due(progress.step):
                    progress = self.watch(progress)
                if progress.step == job.n_steps:
                    return progress
                try:
                    line, tokens = self.step(progress.step, progress.shift)
                except _RollBack as trouble:
                    progress = self.go_back(progress, str(trouble))
                    continue
                now = time.perf_counter()
                done_here += 1
                progress = replace(
                    progress,
                    step=progress.step + 1,
                    tokens=progress.tokens + tokens,
                    seconds=began.seconds + now - start,
                    threads=torch.get_num_threads(),
                    world_size=self.world.size,
                )
                self.note("metrics", {"step": progress.step, "tokens": progress.tokens, **line})
                if progress.step == 1:
                    self.check_initial_loss(line["loss"])
                if progress.step % job.settings.log_every == 0 or progress.step == job.n_steps:
                    speed = (progress.tokens - shown_tokens) / (now - shown)
                    self.show(progress, line, speed, (now - start) / done_here)
                    shown, shown_tokens = now, progress.tokens
                asked, late = self.world.any(stop.asked), now - saved >= job.settings.checkpoint_seconds
                if asked or self.watch_due(progress.step) or self.world.any(late):
                    self.save(progress, at_once=asked)
                    saved = time.perf_counter()
                if asked and progress.step < job.n_steps:
                    raise Interrupted(
                        f"{job.name}: stopped at step {progress.step} of {job.n_steps}; everything is saved."
                    )
                collect(progress.step)

    def save(self, progress: Progress, *, at_once: bool = False) -> None:
        """Write a checkpoint that goes on from `progress`."""
        self.log.flush()
        self.writer.save(self.state.parts(), self.state.remembered(progress), at_once=at_once)

    def go_back(self, progress: Progress, what: str) -> Progress:
        """Take the last checkpoint back, and go on behind the batch that made trouble."""
        self.writer.wait()
        self.world.wait()  # for the process that writes
        guard = self.state.guard
        rollbacks = guard.rollbacks + 1
        last = self.state.restore(self.job.folder / CHECKPOINTS, self.job.fingerprint, self.console)
        if last is None:  # nothing was saved yet: there is nothing to go back to
            raise self.stopped(f"{what}, before the first checkpoint", progress.step)
        guard.rollbacks = rollbacks
        shift = progress.shift + progress.step - last.step + 1
        self.log.take_back(last.step)
        self.console.warn(
            f"{self.job.name}: {what}. Back to step {last.step}; the {progress.step - last.step + 1} batches since "
            "then are passed over."
        )
        back = replace(last, shift=shift, seconds=progress.seconds)
        self.save(back, at_once=True)  # a kill must not lead back into the same batch
        return back

    def batch(self, place: int) -> Rows:
        """This process's rows of the batch at a place of the plan."""
        first, last = self.job.plan.rows(place)
        share = self.world.rows(last - first)
        ids, targets = self.job.source.rows(first + share.start, first + share.stop)
        return to_device(ids, self.world.device), to_device(targets, self.world.device)

    def watch_due(self, step: int) -> bool:
        """Whether validation and samples come after this step."""
        return step % self.eval_every == 0 or step == self.job.n_steps

    def note(self, name: str, line: dict[str, Any]) -> None:
        """Write a line to a log, and to whoever tracks the run."""
        self.log.add(name, line)
        self.trackers.log(line["step"], line)

    def show(self, progress: Progress, line: Mapping[str, float], speed: float, seconds_per_step: float) -> None:
        """The live line, and the wall-clock log."""
        left = format_duration((self.job.n_steps - progress.step) * seconds_per_step)
        self.bar.update(
            progress.step,
            note=f"step {progress.step}/{self.job.n_steps} loss {line['loss']:.3f} "
            f"· {format_count(speed)} tok/s · eta {left}",
        )
        timing = {"seconds": progress.seconds, "tokens_per_second": speed, "peak_memory_bytes": peak_memory_bytes()}
        self.note("timings", {"step": progress.step, **timing})

    def step(self, step: int, shift: int) -> tuple[dict[str, float], int]:
        """One optimizer step: its metrics (mean loss in nats, learning rate, gradient norm) and its valid tokens.

        Raises:
            GroundupError: the guard stops the run.
        """
        job, state = self.job, self.state
        # Dropout's randomness is a function of the step, so there is no generator state to save.
        torch.manual_seed(xxhash.xxh3_64_intdigest(f"{job.seed}/{step + shift}/{self.world.rank}".encode()) >> 1)
        place = step + shift
        ids, targets = self.batches.take(place, place + 1 if step + 1 < job.n_steps else None)
        count = self.world.sum(torch.tensor([float(valid_tokens(targets))], dtype=torch.float64))[0]
        self.model.train()
        total = torch.zeros(1, dtype=torch.float64, device=self.world.device)
        # FSDP averages gradients over processes: times the world's size it is the sum again.
        weight = self.world.size / count * (1.0 if state.scaler is None else state.scaler.scale)
        for first in range(0, len(ids), self.micro):
            part = slice(first, first + self.micro)
            loss = self.model(ids[part], head=self.head(targets[part]))
            balance = self.model.balance_loss()
            objective = loss.objective if balance is None else loss.objective + balance
            (objective * weight).backward()
            total += loss.nats
        nats = float(self.world.sum(total)[0] / count)
        lr_share = learning_rate_share(job.settings, step, job.n_steps)
        parameters = state.optimizers.parameters()
        if state.scaler is not None:
            state.scaler.unscale(parameters)
        grad_norm = clip_gradients(parameters, job.settings.clip, self.world.sum)
        line = {"loss": nats, "lr": job.settings.lr * lr_share, "grad_norm": grad_norm}
        if state.scaler is not None and not state.scaler.judge(grad_norm):
            state.optimizers.forget_gradients()
            return {**line, "skipped": 1}, int(count)
        trouble = state.guard.judge(nats, grad_norm)
        if trouble is not None and trouble.action != "ignore":
            return self.give_way(trouble, step, line), int(count)
        state.optimizers.step(lr_share)
        if state.average is not None:
            state.average.update()
        return line, int(count)

    def give_way(self, trouble: Trouble, step: int, line: dict[str, float]) -> dict[str, float]:
        """Leave a step's update out, or more.

        Raises:
            GroundupError: the run is to stop.
        """
        self.state.optimizers.forget_gradients()
        if trouble.action == "stop":
            raise self.stopped(trouble.what, step)
        if trouble.action == "rollback":
            raise _RollBack(trouble.what)
        self.console.warn(f"{self.job.name}, step {step + 1}: {trouble.what}; its update is left out.")
        return {**line, "skipped": 1}

    def stopped(self, what: str, step: int) -> GroundupError:
        """The error that ends the run."""
        return GroundupError(
            f"{self.job.name}: {what}, at step {step + 1}. The last checkpoint is kept.", likely_causes(what)
        )

    def head(self, targets: Tensor) -> Callable[..., Any]:
        """The loss of these targets."""
        settings = self.job.settings
        return head_loss(targets, label_smoothing=settings.label_smoothing, z_loss=settings.z_loss)

    def watch(self, progress: Progress) -> Progress:
        """Validation loss and samples, by the averaged weights where there are some."""
        step, job = progress.step, self.job
        averaged = self.state.average.in_place() if self.state.average is not None else contextlib.nullcontext()
        with averaged:
            loss = self.validation_loss()
            line: dict[str, Any] = {"step": step, "tokens": progress.tokens, "val_loss": loss}
            if job.bytes_per_token is not None:
                line["val_bits_per_byte"] = loss / math.log(2) / job.bytes_per_token
            self.note("metrics", line)
            self.console.log(
                {"step": f"{step}/{job.n_steps}", **{k: v for k, v in line.items() if k.startswith("val")}}
            )
            if job.continue_text is not None:
                for prompt in job.samples:
                    text = job.continue_text(self.model, prompt)
                    self.log.add("samples", {"step": step, "prompt": prompt, "text": text})
            if step > 0 and (progress.best_loss is None or loss < progress.best_loss):
                progress = replace(progress, best_loss=loss)
                if job.settings.keep_best:
                    self.writer.save_best(weights_of(self.model), progress)
        return progress

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean loss in nats over the validation targets."""
        self.model.eval()
        batch_size = self.job.settings.batch_size
        share = self.world.rows(batch_size)
        sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        for ids, targets in self.job.source.validation(batch_size, self.job.settings.eval_tokens or 50_000):
            mine_ids, mine = ids[share].to(self.world.device), targets[share].to(self.world.device)
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


class _RollBack(Exception):
    """The guard wants the last checkpoint back; says why."""


def _say_resumed(job: TrainingJob, progress: Progress, world: World, console: Console) -> None:
    console.note(f"{job.name}: going on from step {progress.step} of {job.n_steps}")
    if (progress.threads, progress.world_size) != (torch.get_num_threads(), world.size):
        console.warn(
            f"{job.name}: it began with {progress.threads} threads and {progress.world_size} processes, now there are "
            f"{torch.get_num_threads()} and {world.size}: sums may round differently, "
            "so the same bits cannot be promised."
        )
