"""The training loop, for every stage that trains and for any number of processes.

Each step: take the step's batch (a pure function of its place in the order), run forward and backward micro-batch by
micro-batch, divide every term of the objective by the whole step's count of it, look for a loss spike, clip, update. In
between: checkpoints, then validation and samples. What is written depends on recipe and seed only, so that a resumed
run gives the same bits. A batch of a fixed data set is made and moved to the device while the one before is computed.
An on-policy source asks the model as it is now: its buffer is gathered whole on every process and is in the checkpoint
that is written at once, so that no sample is drawn twice. Ctrl-C and SIGTERM set a flag that is seen after the step.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import gc
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import FrameType
from typing import Any, Generic, TypeVar

import torch
import xxhash
from torch import Tensor

from groundup.console import Bar, Console
from groundup.distributed import World, empty_copy, shard_module
from groundup.errors import GroundupError, Interrupted
from groundup.files import own_folder, remove_folder, remove_partials
from groundup.model import Transformer
from groundup.training.checkpoint import CheckpointWriter, Progress, TrainingState
from groundup.training.compilation import choose_compilation, set_checkpointing
from groundup.training.job import OnPolicySource, TrainingJob
from groundup.training.metrics import MetricLog, Trackers, live_line, summarize, summary_line
from groundup.training.objective import Batch, longest_first, micro_batches, text_lengths, weighted_sum
from groundup.training.optimizers import (
    Optimizers,
    WeightAverage,
    check_optimizer,
    frozen_groups,
    scale_to_norm,
    squared_norm,
)
from groundup.training.planning.memory import Workload, device_memory
from groundup.training.precision import LossScaler, check_precision, choose_precision, float8_products
from groundup.training.process import keep_freed_memory, peak_memory_bytes
from groundup.training.schedule import learning_rate_share
from groundup.training.spikes import Spike, SpikeDetector, bad_weights, find_origin, likely_causes
from groundup.training.throughput import ThroughputMeter
from groundup.training.validation import Validation, check_initial_loss, validation_interval

CHECKPOINTS = "checkpoints"


def train(job: TrainingJob, world: World, console: Console) -> dict[str, Any]:
    """Train to the end, from the start or from the newest checkpoint, and return the stage's figures.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; everything is saved.
        GroundupError: a loss spike stops the run, the batch does not fit the world, or the machine cannot do what the
            settings ask for, or has too little memory.
    """
    settings = job.settings
    check_precision(settings.precision, world.device.type, job.name)
    check_optimizer(settings, job.name, world.size)
    job.check_axes(world)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_on_signal())
        stack.enter_context(frozen_groups(job.trained, settings, job.name))
        if settings.precision == "float8":
            stack.enter_context(float8_products(job.model, job.name))
        return _train(job, world, console, stop)


def _train(job: TrainingJob, world: World, console: Console, stop: StopRequest) -> dict[str, Any]:
    settings, config = job.settings, job.model.config
    # Of modules beside the model their weights; of trained ones gradient and moments too.
    others = [(module, 4) for module in job.modules.values() if module is not job.model]
    others += [(module, 1) for module in job.frozen.values()]
    beside = sum(4 * copies * sum(p.numel() for p in module.parameters()) // world.size for module, copies in others)
    length = job.row_sequences * (job.row_length or config.context_length)
    # Patterns of groups may be about other modules, which are counted by their sizes alone.
    sized = job.sized or (settings if len(job.modules) == 1 else settings.model_copy(update={"groups": ()}))
    available = device_memory(world)
    available = replace(available, total=max(0, available.total - beside))
    job.micro_rows = Workload(config, sized, length, available, world.size, job.name).check(console)
    if world.device.type == "cpu":
        keep_freed_memory()
    precision, reason = choose_precision(settings.precision, world.device.type)
    for size in filter(None, (settings.batch_size, settings.batch_warmup_from)):
        world.rows(size)
    for module in job.frozen.values():
        module.requires_grad_(False)
    # Shapes alone, filled while it is asked (`Validation.benchmarks`); on one device it is asked itself.
    whole = empty_copy(job.model) if settings.evaluate is not None and world.size > 1 and world.is_first else None
    for module in job.all_modules.values():
        shard_module(module, world)
        for model in (part for part in module.modules() if isinstance(part, Transformer)):
            model.compute_dtype = precision
            set_checkpointing(model, settings.activation_checkpointing)
    trained = job.trained
    state = TrainingState(
        trained=trained,
        optimizers=Optimizers(trained, settings, precision, job.name),
        spikes=SpikeDetector(settings.on_spike, settings.spike_z),
        scaler=LossScaler() if precision == torch.float16 else None,
        average=WeightAverage(trained, settings.ema) if settings.ema else None,
    )
    folder = job.folder / CHECKPOINTS
    if world.is_first:
        own_folder(job.folder)
        own_folder(folder)
        remove_partials(job.folder)
    world.wait()
    progress = state.restore(folder, job.fingerprint, console)
    if progress is None:
        progress = Progress(0, 0, 0.0, job.fingerprint, torch.get_num_threads(), world.size)
    elif world.is_first:
        _say_resumed(job, progress, world, console)
    choice = choose_compilation(job, state, progress.compiled, world, console)
    progress = replace(progress, compiled=choice.compiled)
    log = MetricLog(job.folder, progress.step, writes=world.is_first)
    names = settings.track if world.is_first else ()
    with contextlib.ExitStack() as stack:
        stack.callback(log.close)
        trackers = Trackers(names, job.folder, job.folder.parent.name, job.name, progress.step, settings.model_dump())
        stack.callback(trackers.close)
        in_thread = world.device.type == "cuda" if settings.checkpoint_beside is None else settings.checkpoint_beside
        writer = CheckpointWriter(folder, world, config, settings.keep_checkpoints, beside=in_thread)
        stack.callback(writer.close)
        bar = stack.enter_context(console.bar(job.name, job.n_steps))
        loop = _Loop(job, state, log, trackers, writer, world, console, bar, stop, whole)
        progress = loop.run(progress)
        log.flush()
        writer.wait()
        summary = summarize(job, progress, precision, reason, state, loop.speed.overall())
        summary |= {"compiled": choice.compiled, "compiled_reason": choice.reason}
        bar.finish(summary_line(summary))
    if state.average is not None:
        state.average.make_permanent()
    return summary


def forget_checkpoints(job: TrainingJob, world: World) -> None:
    """Remove the training checkpoints; called when the finished model is safely on disk."""
    if world.is_first:
        remove_folder(job.folder / CHECKPOINTS)


class _Loop:
    """The state of one call of `train`."""

    def __init__(
        self, job: TrainingJob, state: TrainingState, log: MetricLog, trackers: Trackers, writer: CheckpointWriter,
        world: World, console: Console, bar: Bar, stop: StopRequest, whole: Transformer | None,
    ) -> None:  # fmt: skip
        self.job, self.state, self.modules = job, state, job.all_modules
        self.on_policy = job.source if isinstance(job.source, OnPolicySource) else None
        self.log, self.trackers, self.writer = log, trackers, writer
        self.world, self.console, self.bar, self.stop = world, console, bar, stop
        self.eval_every = validation_interval(job.settings, job.n_steps)
        self.micro = job.micro_rows
        self.validation = Validation(job, state, writer, world, console, self.note, self.leave_if_asked, whole)
        self.speed = ThroughputMeter(job.model.compute_dtype, world.device, world.size, measures=world.is_first)

    def run(self, progress: Progress) -> Progress:
        """Train from `progress` to the last step."""
        job, began = self.job, progress
        start = saved = time.perf_counter()
        done_here = 0
        self.leave_if_asked(progress)
        with Prefetcher(self.batch) as self.batches, collections_between_steps() as collect:
            while True:
                if self.validation_due(progress.step):
                    progress = self.validation.run(progress)
                if progress.step == job.n_steps:
                    self.leave_if_asked(progress)
                    return progress
                try:
                    if self.on_policy is not None:
                        progress = self.fill_buffer(progress, self.on_policy)
                    before = time.perf_counter()
                    line, tokens, flops = self.step(progress.step, progress.shift)
                except _RollBack as reason:
                    progress = self.go_back(progress, str(reason))
                    continue
                now = time.perf_counter()
                self.speed.add(now - before, tokens, flops)
                done_here += 1
                progress = replace(
                    progress,
                    step=progress.step + 1,
                    tokens=progress.tokens + tokens,
                    flops=progress.flops + flops,
                    seconds=began.seconds + now - start,
                    threads=torch.get_num_threads(),
                    world_size=self.world.size,
                )
                self.note("metrics", {"step": progress.step, "tokens": progress.tokens, **line})
                if progress.step == 1:
                    check_initial_loss(job, next(iter(line.values())), self.console)
                if progress.step % job.settings.log_every == 0 or progress.step == job.n_steps:
                    self.show(progress, line, (now - start) / done_here)
                asked, late = self.anywhere(self.stop.asked, now - saved >= job.settings.checkpoint_seconds)
                if asked or late or self.validation_due(progress.step):
                    try:
                        self.save(progress, at_once=asked)
                    except _RollBack as reason:
                        progress = self.go_back(progress, str(reason))
                    saved = time.perf_counter()
                    self.leave_if_asked(progress)
                collect(progress.step)

    def fill_buffer(self, progress: Progress, source: OnPolicySource) -> Progress:
        """Have the model make the rows from which the next steps take theirs, where a new buffer is due."""
        place = progress.step + progress.shift
        is_due = source.is_due(place) or progress.buffer_place is None
        if not is_due or progress.buffer_place == place:
            return progress
        for module in self.modules.values():
            module.eval()
        with torch.no_grad():
            share = self.world.rows(source.buffer_rows)
            rows, flops = source.collect(self.modules, place, share, self.state.buffer)
        self.state.buffer = {name: self.world.gather(rows[name]).contiguous() for name in sorted(rows)}
        flops = float(self.world.sum(torch.tensor([flops], dtype=torch.float64))[0])
        progress = replace(progress, buffer_place=place, flops=progress.flops + flops)
        self.save(progress, at_once=True)
        self.leave_if_asked(progress)
        return progress

    def leave_if_asked(self, progress: Progress) -> None:
        """End the run where someone asked for it; to be called where a checkpoint of `progress` was written, if any.

        Raises:
            Interrupted: someone did, in any process.
        """
        if self.world.any(self.stop.asked):
            self.writer.wait()
            raise Interrupted(
                f"{self.job.name}: stopped at step {progress.step} of {self.job.n_steps}; everything is saved."
            )

    def save(self, progress: Progress, *, at_once: bool = False) -> None:
        """Write a checkpoint that goes on from `progress`.

        Raises:
            GroundupError: a weight is not finite, and the run is to stop.
        """
        spoiled = bad_weights(self.state.trained, self.world)
        if spoiled is not None:
            what = f"{spoiled}, so no checkpoint is made of them"
            self.give_way(self.state.spikes.judge_weights(what), progress.step - 1, {})
        self.log.flush()
        self.writer.save(self.state.parts(), self.state.remembered(progress), at_once=at_once)

    def go_back(self, progress: Progress, what: str) -> Progress:
        """Take the last checkpoint back, and go on behind the batch with the spike."""
        self.writer.wait()
        self.world.wait()  # for the process that writes
        spikes = self.state.spikes
        rollbacks = spikes.rollbacks + 1
        last = self.state.restore(self.job.folder / CHECKPOINTS, self.job.fingerprint, self.console)
        if last is None:  # nothing was saved yet: there is nothing to go back to
            raise self.stopped(f"{what}, before the first checkpoint", progress.step)
        spikes.rollbacks = rollbacks
        shift = progress.shift + progress.step - last.step + 1
        self.log.take_back(last.step)
        self.console.warn(
            f"{self.job.name}: {what}. Back to step {last.step}; the {progress.step - last.step + 1} batches since "
            "then are passed over."
        )
        back = replace(last, shift=shift, seconds=progress.seconds)
        self.save(back, at_once=True)  # a kill must not lead back into the same batch
        return back

    def anywhere(self, *flags: bool) -> list[bool]:
        """Which of the flags are set in any process; all must call it."""
        if self.world.size == 1:
            return list(flags)
        return [count > 0 for count in self.world.sum(torch.tensor(flags, dtype=torch.float32)).tolist()]

    def batch(self, place: int) -> tuple[Batch, dict[str, float], float]:
        """This process's rows of the batch at a place of the plan, what each term of them is divided by, and FLOPs."""
        first, last = self.job.plan.rows(place)
        share = self.world.rows(last - first)
        if isinstance(self.job.source, OnPolicySource):
            chosen = self.job.source.minibatch(place, last - first)[share]
            chosen = chosen[longest_first({name: tensor[chosen] for name, tensor in self.state.buffer.items()})]
            rows = {name: tensor[chosen] for name, tensor in self.state.buffer.items()}
        else:
            rows = self.job.source.rows(first + share.start, first + share.stop)
        # Counted here, before they go to a GPU, which would have to be waited for.
        objective = self.job.objective
        counts, flops = objective.counts(rows), objective.flops(self.job.model.config, text_lengths(rows))
        return {name: to_device(tensor, self.world.device) for name, tensor in rows.items()}, counts, flops

    def validation_due(self, step: int) -> bool:
        """Whether validation and samples come after this step."""
        return step % self.eval_every == 0 or step == self.job.n_steps

    def note(self, name: str, line: dict[str, Any]) -> None:
        """Write a line to a log, and its numbers to whoever tracks the run."""
        self.log.add(name, line)
        self.trackers.log(line["step"], line)

    def show(self, progress: Progress, line: Mapping[str, float], seconds_per_step: float) -> None:
        """The live line, and the wall-clock log."""
        speed, memory = self.speed.lately(), peak_memory_bytes(self.world.device)
        of_step = {name: line[name] for name in (next(iter(line)), "lr", "muon_lr", "grad_norm") if name in line}
        fields = {"step": f"{progress.step}/{self.job.n_steps}", **of_step}
        left = (self.job.n_steps - progress.step) * seconds_per_step
        note = live_line(fields, speed, left, memory, self.console.rich.width, self.job.unit)
        self.bar.update(progress.step, note=note)
        timing: dict[str, Any] = {"seconds": progress.seconds, "tokens_per_second": speed.tokens_per_second}
        if speed.mfu is not None:
            timing["mfu"] = speed.mfu
        self.note("timings", {"step": progress.step, **timing, "peak_memory_bytes": memory})

    def step(self, step: int, shift: int) -> tuple[dict[str, float], int, float]:
        """One optimizer step: its metrics, its predicted targets and its FLOPs, over all processes.

        The device is waited for once, when loss and gradient norm are known, which the update stands on.

        Raises:
            GroundupError: a loss spike stops the run.
        """
        job, state = self.job, self.state
        place = step + shift
        self.seed_dropout(place)
        is_ahead = self.on_policy is None and step + 1 < job.n_steps
        batch, own, flops_here = self.batches.take(place, place + 1 if is_ahead else None)
        work = self.world.sum(torch.tensor([*own.values(), flops_here], dtype=torch.float64))
        for name, module in self.modules.items():
            module.train(name in job.modules)
        totals = torch.zeros(len(own), dtype=torch.float64, device=self.world.device)
        # FSDP averages gradients over processes: times the world's size it is the sum again.
        scale = self.world.size / work[:-1] * (1.0 if state.scaler is None else state.scaler.scale)
        factors = dict(zip(own, scale.where(work[:-1] > 0, 0.0), strict=True))
        for part in micro_batches(batch, self.micro):
            terms = job.objective.terms(self.modules, part)
            totals += torch.stack([terms[name].reported for name in own])
            weighted_sum(terms, factors).backward()  # type: ignore[no-untyped-call]
        parameters = state.optimizers.parameters()
        if state.scaler is not None:
            state.scaler.unscale(parameters)
        *sums, squared = self.world.sum(torch.cat([totals, squared_norm(parameters)])).tolist()
        *counts, flops = work.tolist()
        found = {name: part / count for name, part, count in zip(own, sums, counts, strict=True) if count}
        first = next(iter(own))
        # Nothing is counted where no answer of the batch has a reward: then nothing is learned from it.
        loss, grad_norm = found.get(first, 0.0), math.sqrt(squared)
        scale_to_norm(parameters, job.settings.max_grad_norm, grad_norm)
        lr_share = learning_rate_share(job.settings, step, job.n_steps)
        line = {first: loss}
        if job.train_bytes_per_token is not None:
            line["bits_per_byte"] = loss / math.log(2) / job.train_bytes_per_token
        line |= {**found, "lr": job.settings.lr * lr_share}
        if job.settings.optimizer == "muon":
            line["muon_lr"] = job.settings.muon_lr * lr_share
        line["grad_norm"] = grad_norm
        # A loss that is not finite has nothing to do with the scale.
        if state.scaler is not None and math.isfinite(loss) and not state.scaler.judge(grad_norm):
            state.optimizers.forget_gradients()
            return {**line, "skipped": 1}, int(counts[0]), flops
        spike = state.spikes.judge(loss, grad_norm)
        if spike is not None and spike.action != "ignore":
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                spike = replace(spike, what=f"{spike.what}; {self.origin(place, batch)}")
            return self.give_way(spike, step, line), int(counts[0]), flops
        state.optimizers.step(lr_share)
        if state.average is not None:
            state.average.update()
        return line, int(counts[0]), flops

    def seed_dropout(self, place: int) -> None:
        """Dropout's randomness is a function of the step's place, so there is no generator state to save."""
        torch.manual_seed(xxhash.xxh3_64_intdigest(f"{self.job.seed}/{place}/{self.world.rank}".encode()) >> 1)

    def origin(self, place: int, batch: Batch) -> str:
        """Where the first number of a step arose that is not finite."""

        def forward(part: Batch) -> Tensor:
            return torch.stack([term.reported for term in self.job.objective.terms(self.modules, part).values()])

        self.seed_dropout(place)
        passes = [functools.partial(forward, part) for part in micro_batches(batch, self.micro)]
        return find_origin(self.state.trained, passes, self.world)

    def give_way(self, spike: Spike, step: int, line: dict[str, float]) -> dict[str, float]:
        """Leave a step's update out, or more.

        Raises:
            GroundupError: the run is to stop.
        """
        self.state.optimizers.forget_gradients()
        if spike.action == "stop":
            raise self.stopped(spike.what, step)
        if spike.action == "rollback":
            raise _RollBack(spike.what)
        self.console.warn(f"{self.job.name}, step {step + 1}: {spike.what}; its update is left out.")
        return {**line, "skipped": 1}

    def stopped(self, what: str, step: int) -> GroundupError:
        """The error that ends the run."""
        return GroundupError(
            f"{self.job.name}: {what}, at step {step + 1}. The last checkpoint is kept.", likely_causes(what)
        )


class _RollBack(Exception):
    """The last checkpoint is wanted back; says why."""


def _say_resumed(job: TrainingJob, progress: Progress, world: World, console: Console) -> None:
    console.note(f"{job.name}: going on from step {progress.step} of {job.n_steps}")
    if (progress.threads, progress.world_size) != (torch.get_num_threads(), world.size):
        console.warn(
            f"{job.name}: it began with {progress.threads} threads and {progress.world_size} processes, now there are "
            f"{torch.get_num_threads()} and {world.size}: sums may round differently, "
            "so the same bits cannot be promised."
        )


class StopRequest:
    """Whether someone asked to stop."""

    def __init__(self) -> None:
        self.asked = False


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Within this block the first SIGINT or SIGTERM only sets the flag; a second SIGINT raises KeyboardInterrupt."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # signals reach the main thread only
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if request.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.asked = True

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


Made = TypeVar("Made")

STEPS_BETWEEN_COLLECTIONS = 200


class Prefetcher(Generic[Made]):
    """Makes one batch ahead, that of a place, in a thread. Use it in a `with` statement."""

    def __init__(self, make: Callable[[int], Made]) -> None:
        self._make = make
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="next batch")
        self._next: tuple[int, concurrent.futures.Future[Made]] | None = None

    def take(self, place: int, following: int | None) -> Made:
        """The batch of `place`; that of `following` is begun (None: there is none)."""
        is_ahead = self._next is not None and self._next[0] == place
        batch = self._next[1].result() if is_ahead and self._next is not None else self._make(place)
        self._next = None if following is None else (following, self._thread.submit(self._make, following))
        return batch

    def __enter__(self) -> Prefetcher[Made]:
        return self

    def __exit__(self, *error: object) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a batch, on CUDA through pinned memory, so that the copy runs beside the arithmetic."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@contextlib.contextmanager
def collections_between_steps() -> Iterator[Callable[[int], None]]:
    """Within this block garbage is collected only when the function that is given says so: once every some steps."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()

    def collect(step: int) -> None:
        if step % STEPS_BETWEEN_COLLECTIONS == 0:
            gc.collect()

    try:
        yield collect
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
