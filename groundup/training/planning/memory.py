"""The bytes that training needs on one device, before anything is allocated, and whether they fit.

Weights, gradients and optimizer state are counted from shapes, activations tensor by tensor (`model/activations.py`);
what else is alive depends on the moment of a step, of which there are five (`_moments`). A test compares them with
torch's own record of every allocation. A refusal is certain: the activations of one row and the rest are more than the
device has. What may be too much, because a heap has holes and other programs need memory too, is a warning. The
micro-batch depends on the device's size only, not on what is free at the moment, so that a run that is stopped and goes
on computes in the same pieces and rounds alike.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import psutil
import torch

from groundup.console import Console, format_bytes
from groundup.distributed import World
from groundup.environment import container_limits
from groundup.errors import GroundupError, RecipeError
from groundup.model import ModelConfig, ladder_config
from groundup.model.activations import (
    Arithmetic,
    Device,
    Pass,
    activation_bytes,
)
from groundup.model.cost import count_parameters, parameter_shapes, state_bytes
from groundup.recipe import OptimizerSettings, PrecisionName
from groundup.training.muon import BATCH_BYTES
from groundup.training.objective import PIECE_LOGITS, PIECE_WEIGHTS, slice_rows
from groundup.training.optimizers import Grouping, Shapes, group_parameters
from groundup.training.precision import native_bfloat16

USABLE_SHARE = 0.9
"""Of a device's memory, what a plan gives away: others need some, and estimates err."""

PROCESS_BYTES = 400 << 20
"""What the program itself takes on a CPU: interpreter, torch, our modules, threads, buffers of kernels."""

# Holes in a CPU's heap, as shares of the activations of a step without checkpointing: (float32, two-byte arithmetic).
# Freed buffers are kept for the next step (`process.py`), and glibc before 2.38 cannot put an aligned buffer into the
# place of a freed one of the same size (its bug 14581). Measured by benchmarks/plan.py.
_HOLES = {"none": (0.15, 0.27), "selective": (0.31, 0.32), "full": (0.43, 0.34)}

LADDER = (
    "200k", "300k", "500k", "700k", "1m", "2m", "3m", "5m", "7m", "10m", "20m", "30m", "50m", "70m", "100m", "200m",
    "300m", "500m", "700m", "1b", "2b", "3b", "5b", "7b", "10b",
)  # fmt: skip
"""Sizes that are tried where a model is looked for, smallest first."""


@dataclass(frozen=True)
class DeviceMemory:
    """The memory of one device."""

    total: int  # bytes that one process of the run can have
    what: str  # whose they are, in words
    device: Device  # whose kernels
    has_bfloat16: bool  # natively

    def __str__(self) -> str:
        return f"{self.what}, {format_bytes(self.total)}"

    @property
    def usable(self) -> int:
        """Bytes that a plan may give away."""
        return int(USABLE_SHARE * self.total)

    def arithmetic(self, precision: PrecisionName) -> Arithmetic:
        """What a recipe's precision comes to; around float8's products it is bfloat16."""
        if precision == "auto" or precision == "float8":
            return "bfloat16" if self.has_bfloat16 else "float32"
        return precision


@dataclass(frozen=True)
class Suggestion:
    """A change that saves memory."""

    setting: str  # what to set, as for --set, or what else to do
    saves: int  # bytes, beside the changes before it
    total: int  # bytes that are needed with it and the changes before it
    fits: bool
    cost: str  # what it costs otherwise


@dataclass(frozen=True)
class Step:
    """What one device does between two updates."""

    rows: int  # of the batch, on this device
    micro: int  # rows in one forward pass
    length: int  # tokens in a row
    dtype: Arithmetic
    device: Device = "cpu"
    n_devices: int = 1  # over which weights, gradients and optimizer state are spread


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the fullest moment of a step."""

    weights: int  # float32, and what is gathered of them for a moment where they are spread
    gradients: int  # those that are there at this moment
    optimizer: int
    average: int  # of the weights
    activations: int  # kept for the backward pass, and the gradients of it at this moment
    logits: int  # the slice of them that is there, with its gradient
    other: int  # what an update needs for a moment
    moment: str  # which one it is
    all_gradients: int  # of all parameters; where `gradients` is less, they come when activations have gone
    heap: int = 0  # pieces of the heap that nothing fits into (CPU)
    process: int = 0  # the program itself (CPU)

    @property
    def total(self) -> int:
        """Bytes of all: the peak of the resident set on a CPU, of the allocator on a GPU."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """The bytes by name."""
        return {
            "weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer,
            "averaged weights": self.average, "activations": self.activations, "logits slice": self.logits,
            "other": self.other, "heap": self.heap, "process": self.process,
        }  # fmt: skip


def device_memory(world: World) -> DeviceMemory:
    """The memory that this process's device has; on a CPU it is shared among this machine's processes of the run."""
    if world.device.type == "cuda":
        _, total = torch.cuda.mem_get_info(world.device)
        return DeviceMemory(total, torch.cuda.get_device_name(world.device), "cuda", native_bfloat16("cuda")[0])
    _, limit = container_limits()
    total = psutil.virtual_memory().total
    what = "this machine's memory"
    if limit is not None and limit < total:
        total, what = limit, "the memory that this container may use"
    n_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if n_here > 1:
        total, what = total // n_here, f"a share of {what} among {n_here} processes"
    return DeviceMemory(total, what, "cpu", native_bfloat16()[0])


@dataclass(frozen=True)
class Workload:
    """What is trained on each of some devices: all that its memory depends on but the rows in one forward pass."""

    config: ModelConfig
    settings: OptimizerSettings
    length: int  # tokens in a row, at most
    available: DeviceMemory  # of one device
    n_devices: int = 1  # over which the batch is spread
    stage: str = "pretrain"  # named in messages

    def step(self, micro: int | None = None) -> Step:
        """What one of the devices does between two updates, with so many rows in a forward pass (default: all)."""
        rows = max(1, self.settings.batch_size // self.n_devices)
        micro = min(micro or self.settings.micro_batch_size or rows, rows)
        dtype = self.available.arithmetic(self.settings.precision)
        return Step(rows, micro, self.length, dtype, self.available.device, self.n_devices)

    def memory(self, micro: int | None = None) -> Memory:
        """What a run takes on one device, the program and the heap's holes included.

        Raises:
            RecipeError: a group's pattern matches no parameter.
        """
        step = self.step(micro)
        memory = step_memory(self.config, self.settings, step)
        if step.device == "cuda":
            return memory
        allocated = sum(activation_bytes(self.config, step.micro, step.length, step.dtype).values())
        holes = round(_HOLES[self.settings.activation_checkpointing][step.dtype != "float32"] * allocated)
        return replace(memory, heap=holes, process=PROCESS_BYTES)

    def fits(self, micro: int) -> bool:
        """Whether so many rows at a time are expected to fit."""
        return self.memory(micro).total <= self.available.usable

    def micro_batch(self) -> tuple[int, str]:
        """Rows in one forward pass on one device, and why so many: the whole batch wherever it fits."""
        whole = self.step()
        if self.settings.micro_batch_size is not None:
            return whole.micro, "as the recipe says"
        small = [n for n in range(1, math.isqrt(whole.rows) + 1) if whole.rows % n == 0]
        for micro in (*(whole.rows // n for n in small), *reversed(small)):  # every divisor, the largest first
            if self.fits(micro):
                return micro, "the batch" if micro == whole.rows else f"the most that fits {self.available}"
        return 1, f"one row at a time, and even so perhaps too much for {self.available}"

    def check(self, console: Console) -> int:
        """Refuse what cannot fit, warn of what may not, and say how many rows one forward pass takes.

        Raises:
            GroundupError: it is certain that memory will not do.
        """
        self.refuse_what_cannot_fit()
        micro, reason = self.micro_batch()
        rows, wanted = self.step().rows, self.memory(micro).total
        if micro < rows and self.settings.micro_batch_size is None:
            console.note(f"{self.stage}: micro-batches of {micro} of {rows} rows: {reason}")
        if wanted > self.available.usable:
            console.warn(
                f"{self.stage}: needs about {format_bytes(wanted)} of {self.available} and may run out of it. "
                "What would help:  groundup plan"
            )
        return micro

    def refuse_what_cannot_fit(self) -> None:
        """Hold that one row at a time would fit; nothing is allocated.

        Raises:
            GroundupError: it does not; with the parts, largest first, and the ways out.
        """
        # A compiler may compute nearly all activations again.
        frugal = {"activation_checkpointing": "full"} if self.settings.compile else {}
        least = step_memory(self.config, self.settings.model_copy(update=frugal), self.step(1))
        if least.total <= self.available.total:
            return
        parts = sorted(least.parts().items(), key=lambda part: -part[1])
        listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts if size)
        where = "" if self.n_devices == 1 else f" on each of {self.n_devices} devices"
        raise GroundupError(
            f"[{self.stage}]: training {count_parameters(self.config):,} parameters takes {format_bytes(least.total)}"
            f"{where} at least, one row of {self.length:,} tokens at a time, and {self.available.what} is "
            f"{format_bytes(self.available.total)}: {listed}.",
            _ways_out(self.suggestions(), self.stage),
        )

    def suggestions(self) -> list[Suggestion]:
        """What to change so that it fits, cheapest first, each on top of those before; up to the first that is enough.

        Then, each for itself: a smaller model, and more devices. Empty if it fits.
        """
        usable, stage = self.available.usable, self.stage
        micro, _ = self.micro_batch()
        before = self.memory(micro).total
        if before <= usable:
            return []
        found: list[Suggestion] = []
        changed = self
        for name, value, cost in _settings_that_save(self.settings, self.available, self.n_devices, micro):
            changed = replace(changed, settings=changed.settings.model_copy(update={name: value}))
            total = changed.memory(1).total
            if total >= before:
                continue
            found.append(Suggestion(f"{stage}.{name}={value}", before - total, total, total <= usable, cost))
            before = total
            if found[-1].fits:
                return found
        one_row, n_parameters = self.memory(1).total, count_parameters(self.config)
        for size in reversed(LADDER):
            try:
                smaller = ladder_config(
                    size=size, vocab_size=self.config.vocab_size, context_length=self.config.context_length
                )
            except RecipeError:
                continue
            total = replace(self, config=smaller).memory(1).total
            if count_parameters(smaller) < n_parameters and total <= usable:
                found.append(Suggestion(f"model.size={size}", one_row - total, total, True, "another model"))
                break
        frugal = replace(self, settings=self.settings.model_copy(update={"activation_checkpointing": "full"}))
        for chosen, extra in ((self, ""), (frugal, f" and {stage}.activation_checkpointing=full")):
            for count in (self.n_devices * 2**power for power in range(1, 11)):
                total = replace(chosen, n_devices=count).memory(1).total
                if total <= usable:
                    setting = f"{count} devices of this size{extra}"
                    return [*found, Suggestion(setting, one_row - total, total, True, "their price")]
        return found


def _settings_that_save(
    settings: OptimizerSettings, available: DeviceMemory, n_devices: int, micro: int
) -> Iterator[tuple[str, object, str]]:
    """Changes of settings with what they cost, the cheapest first."""
    if micro > 1:
        yield "micro_batch_size", 1, "more passes a step; small ones are less efficient"
    if settings.precision == "float32" and available.has_bfloat16:
        yield "precision", "bfloat16", "results round otherwise; faster here"
    if settings.activation_checkpointing == "none":
        yield "activation_checkpointing", "selective", "a few percent more time"
    if settings.activation_checkpointing != "full":
        yield "activation_checkpointing", "full", "up to a third more time"
    if settings.ema:
        yield "ema", 0.0, "no averaged weights"
    if settings.optimizer == "adamw":
        yield "optimizer", "muon", "another optimizer, with a rate of its own"
    if settings.optimizer != "adafactor" and n_devices == 1:
        yield "optimizer", "adafactor", "learns less from a token"


def _ways_out(found: list[Suggestion], stage: str) -> str:
    """Suggestions as options of the command line: all settings up to the one that is enough, or what else would do."""
    enough = [one for one in found if one.fits]
    if not enough:
        return "No setting and no number of devices makes it fit: choose a smaller model."
    if enough[0].setting.startswith(f"{stage}."):
        steps = found[: found.index(enough[0]) + 1]
        return "It fits with:  " + " ".join(f"--set {one.setting}" for one in steps)
    ways = [f"--set {one.setting}" if one.setting.startswith("model.") else one.setting for one in enough]
    return "It fits with:  " + " or ".join(ways)


def step_memory(config: ModelConfig, settings: OptimizerSettings, step: Step) -> Memory:
    """What training holds at the fullest moment of a step, validation included.

    Raises:
        RecipeError: a group's pattern matches no parameter.
    """
    shapes = parameter_shapes(config)
    grouping = group_parameters(shapes, settings)
    sizes = {name: 4 * math.prod(shape) for name, shape in shapes.items()}
    weights, spread = sum(sizes.values()), step.n_devices
    gradients = (weights - sum(sizes[name] for name in grouping.frozen)) // spread
    # Where weights are spread: two whole blocks (one computes, one comes), and all that is in no block.
    outside = sum(size for name, size in sizes.items() if not name.startswith("layers."))
    gathered = outside + 2 * (weights - outside) // config.n_layers if spread > 1 else 0
    moments = _moments(config, settings, step, gradients, sizes)
    moments["update"] = (gradients, 0, 0, _update(shapes, grouping, step))
    moment, (held, activations, logits, other) = max(moments.items(), key=lambda item: sum(item[1]))
    state = sum(state_bytes(group.optimizer, shapes[name]) for group in grouping.groups for name in group.names)
    return Memory(
        weights=weights // spread + gathered, gradients=held, optimizer=state // spread,
        average=weights // spread if settings.ema else 0, activations=activations, logits=logits, other=other,
        moment=moment, all_gradients=gradients,
    )  # fmt: skip


def _moments(
    config: ModelConfig, settings: OptimizerSettings, step: Step, gradients: int, sizes: Mapping[str, int]
) -> dict[str, tuple[int, int, int, int]]:
    """(gradients, activations, logits, other) alive at each moment that can be the fullest, before the update.

    The forward pass fills up activations; the backward pass takes them down block by block while gradients come, so
    that its fullest moment is in the last block or at its end. Within a block it is where the feed-forward layer's
    gradients are (of both factors of its product), or where the softmax's are if it is held.
    """
    kind, last = settings.activation_checkpointing, config.n_layers - 1
    one = Pass(config, step.micro, step.length, step.dtype, step.device)
    stream = one.n_tokens * config.d_model * one.size  # one value for each feature of the residual stream
    kept = sum(activation_bytes(config, step.micro, step.length, step.dtype, kind, step.device).values())
    block = one.block(last)
    # What checkpointing computes again in the last block's backward pass.
    again = sum(block.values()) - sum(one.block(last, kind).values())
    # In the last block, what came behind it is gone: the last norm's and the hidden states' gradient.
    in_block = kept - one.last_norm - stream + again
    # With several micro-batches the gradients of those before are there all the time, and each new one for a moment.
    earlier = gradients + max(sizes.values()) if step.micro < step.rows else 0
    inner = config.d_model * config.d_ff * 4 * max(1, config.n_experts)  # of a feed-forward layer's matrix
    # Gradients inside a feed-forward layer beside what it keeps: of both factors where it has a gate.
    rows = one.n_tokens * config.experts_per_token / config.n_experts if config.n_experts else one.n_tokens
    within = round(rows * config.d_ff * one.size * (2 if config.is_gated else 1)) + stream * (config.n_experts > 0)
    at_end = gradients + sizes["embed_tokens.weight"]
    moments = {
        "end of the forward pass": (earlier, kept + stream, _logits(one), 0),
        "backward pass, feed-forward": (earlier or inner, in_block + stream + within, 0, 0),
        "end of the backward pass": (at_end, 2 * one.n_tokens * config.d_model * 4, 0, 0),
    }
    scores = 2 * one.attention_squares(last) or 3 * one.score_block(last)
    if scores:
        gone = block["feedforward"] + block["norms"] // 4
        moments["backward pass, attention"] = (earlier or 3 * inner, in_block - gone + scores + 2 * stream, 0, 0)
    return moments


def _logits(one: Pass) -> int:
    """What the loss needs beside what it keeps (`objective.py`): a slice of logits, a piece, the output matrix."""
    size, vocabulary, d, on_cpu = one.size, one.config.padded_vocab_size, one.config.d_model, one.device == "cpu"
    rows = slice_rows(one.n_tokens, size * vocabulary)
    piece = 4 * vocabulary * min(rows, max(1, PIECE_LOGITS // vocabulary) if on_cpu else rows)
    if one.config.logit_softcap is not None:
        piece *= 2  # what it was before it was bent
    # A piece of the output matrix's gradient; that of a second slice, in two-byte arithmetic, in float32 to be added.
    widened = 4 * (size == 2 and rows < one.n_tokens)
    gradient = d * min(vocabulary, max(1, PIECE_WEIGHTS // d) if on_cpu else vocabulary) * (size + widened)
    cast = vocabulary * d * 2 if size == 2 else 0
    return rows * vocabulary * size + max(piece, gradient) + cast


def _update(shapes: Shapes, grouping: Grouping, step: Step) -> int:
    """What an update needs for a moment: fused AdamW nothing, Muon copies of a few matrices, the others of one."""
    size = 4 if step.dtype == "float32" else 2
    most = 0
    for group in grouping.groups:
        counts = Counter(tuple(shapes[name]) for name in group.names)
        if group.optimizer == "muon":
            for shape, count in counts.items():
                n = math.prod(shape)
                together = n * min(count, max(1, BATCH_BYTES[step.device] // (n * size)))
                most = max(most, together * (14 + size))
        elif group.optimizer != "adamw":
            most = max(most, *(2 * 4 * math.prod(shape) for shape in counts))
    return most
