"""Whether training fits into a device's memory: the largest micro-batch, a refusal, and what would make it fit.

A refusal is certain: weights, gradients, optimizer state and the activations of one row, counted at the fullest moment
of a step, are more than the device has. What may be too much, because a heap has holes and others need memory too, is
a warning. The micro-batch depends on the device's size only, not on what is free at the moment: a run that is stopped
and goes on computes in the same pieces, and rounds alike.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import psutil
import torch

from groundup.console import Console, format_bytes
from groundup.distributed import World
from groundup.environment import container_limits
from groundup.errors import GroundupError, RecipeError
from groundup.model import ModelConfig, ladder_config
from groundup.model.activations import Arithmetic, Device
from groundup.model.cost import count_parameters
from groundup.recipe import OptimizerSettings
from groundup.training.planning.memory import Memory, Step, step_memory
from groundup.training.planning.process import PROCESS_BYTES, heap_bytes
from groundup.training.precision import native_bfloat16

USABLE_SHARE = 0.9
"""Of a device's memory, what a plan gives away: others need some, and estimates err."""

LADDER = (
    "200k", "300k", "500k", "700k", "1m", "2m", "3m", "5m", "7m", "10m", "20m", "30m", "50m", "70m", "100m", "200m",
    "300m", "500m", "700m", "1b", "2b", "3b", "5b", "7b", "10b",
)  # fmt: skip
"""Sizes that are tried where a model is looked for, smallest first."""


@dataclass(frozen=True)
class Room:
    """The memory of one device.

    Attributes:
        total: bytes that one process of the run can have.
        what: whose they are, in words.
        device: whose kernels.
        has_bfloat16: natively.
    """

    total: int
    what: str
    device: Device
    has_bfloat16: bool

    @property
    def usable(self) -> int:
        """Bytes that a plan may give away."""
        return int(USABLE_SHARE * self.total)


@dataclass(frozen=True)
class Need:
    """What a run takes on one device.

    Attributes:
        memory: alive at the fullest moment.
        heap: pieces of the heap that nothing fits into (CPU).
        process: the program itself (CPU).
    """

    memory: Memory
    heap: int
    process: int

    @property
    def total(self) -> int:
        """Bytes of all: the peak of the resident set on a CPU, of the allocator on a GPU."""
        return self.memory.total + self.heap + self.process

    def parts(self) -> dict[str, int]:
        """The bytes by name."""
        return {**self.memory.parts(), "heap": self.heap, "process": self.process}


@dataclass(frozen=True)
class Remedy:
    """A change that saves memory.

    Attributes:
        setting: what to set, as for --set, or what else to do.
        saves: bytes, beside the changes before it.
        total: bytes that are needed with it and the changes before it.
        fits: whether that is little enough.
        cost: what it costs otherwise.
    """

    setting: str
    saves: int
    total: int
    fits: bool
    cost: str


def device_memory(world: World) -> Room:
    """The memory that this process's device has; on a CPU it is shared among this machine's processes of the run."""
    if world.device.type == "cuda":
        _, total = torch.cuda.mem_get_info(world.device)
        return Room(total, torch.cuda.get_device_name(world.device), "cuda", native_bfloat16("cuda")[0])
    _, limit = container_limits()
    total = psutil.virtual_memory().total
    what = "this machine's memory"
    if limit is not None and limit < total:
        total, what = limit, "the memory that this container may use"
    n_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if n_here > 1:
        total, what = total // n_here, f"a share of {what} among {n_here} processes"
    return Room(total, what, "cpu", native_bfloat16()[0])


def step_of(settings: OptimizerSettings, length: int, room: Room, n_devices: int, micro: int | None = None) -> Step:
    """What one of the devices does between two updates.

    Args:
        settings: batch, precision.
        length: tokens in a row.
        room: the device.
        n_devices: over which the batch is spread.
        micro: rows in a forward pass (default: as the settings say, or all).
    """
    rows = max(1, settings.batch_size // n_devices)
    micro = min(micro or settings.micro_batch_size or rows, rows)
    dtype: Arithmetic
    if settings.precision == "auto":
        dtype = "bfloat16" if room.has_bfloat16 else "float32"
    else:  # around float8's products the arithmetic is in bfloat16
        dtype = "bfloat16" if settings.precision == "float8" else settings.precision
    return Step(rows, micro, length, dtype, room.device, n_devices)


def need(config: ModelConfig, settings: OptimizerSettings, step: Step, stage: str = "pretrain") -> Need:
    """What a run takes on one device.

    Raises:
        RecipeError: a group's pattern matches no parameter.
    """
    memory = step_memory(config, settings, step, stage)
    if step.device == "cuda":
        return Need(memory, 0, 0)
    return Need(memory, heap_bytes(config, settings, step), PROCESS_BYTES)


def choose_micro_batch(
    config: ModelConfig, settings: OptimizerSettings, length: int, room: Room, n_devices: int = 1,
    stage: str = "pretrain",
) -> tuple[int, str]:  # fmt: skip
    """Rows in one forward pass on one device, and why so many: the whole batch wherever it fits.

    Args:
        config: the model.
        settings: batch, and what else decides memory.
        length: tokens in a row.
        room: the device.
        n_devices: over which the batch is spread.
        stage: named in messages.
    """
    whole = step_of(settings, length, room, n_devices)
    if settings.micro_batch_size is not None:
        return whole.micro, "as the recipe says"
    for micro in _divisors(whole.rows):
        if need(config, settings, replace(whole, micro=micro), stage).total <= room.usable:
            return micro, "the batch" if micro == whole.rows else f"the most that fits {_of(room)}"
    return 1, f"one row at a time, and even so perhaps too much for {_of(room)}"


def check_memory(
    config: ModelConfig, settings: OptimizerSettings, length: int, world: World, console: Console,
    stage: str = "pretrain",
) -> int:  # fmt: skip
    """Refuse what cannot fit, warn of what may not, and say how many rows one forward pass takes.

    Args:
        config: the model.
        settings: of the stage.
        length: tokens in a row, at most.
        world: the processes; each has one device.
        console: where it is said.
        stage: named in messages.

    Raises:
        GroundupError: it is certain that memory will not do.
    """
    room = device_memory(world)
    refuse_what_cannot_fit(config, settings, length, room, world.size, stage)
    micro, reason = choose_micro_batch(config, settings, length, room, world.size, stage)
    step = step_of(settings, length, room, world.size, micro)
    wanted = need(config, settings, step, stage).total
    if micro < step.rows and settings.micro_batch_size is None:
        console.note(f"{stage}: micro-batches of {micro} of {step.rows} rows: {reason}")
    if wanted > room.usable:
        console.warn(
            f"{stage}: needs about {format_bytes(wanted)} of {_of(room)} and may run out of it. "
            "What would help:  groundup plan"
        )
    return micro


def refuse_what_cannot_fit(
    config: ModelConfig, settings: OptimizerSettings, length: int, room: Room, n_devices: int = 1,
    stage: str = "pretrain",
) -> None:  # fmt: skip
    """Hold that one row at a time would fit; nothing is allocated.

    Raises:
        GroundupError: it does not; with the parts, largest first, and the ways out.
    """
    # A compiler may compute nearly all activations again.
    frugal = settings.model_copy(update={"activation_checkpointing": "full"}) if settings.compile else settings
    least = step_memory(config, frugal, step_of(settings, length, room, n_devices, 1), stage)
    if least.total <= room.total:
        return
    parts = sorted(least.parts().items(), key=lambda part: -part[1])
    listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts if size)
    where = "" if n_devices == 1 else f" on each of {n_devices} devices"
    raise GroundupError(
        f"[{stage}]: training {count_parameters(config):,} parameters takes {format_bytes(least.total)}{where} at "
        f"least, one row of {length:,} tokens at a time, and {room.what} is {format_bytes(room.total)}: {listed}.",
        _ways_out(config, settings, length, room, n_devices, stage),
    )


def remedies(
    config: ModelConfig, settings: OptimizerSettings, length: int, room: Room, n_devices: int = 1,
    stage: str = "pretrain",
) -> list[Remedy]:  # fmt: skip
    """What to change so that it fits, cheapest first, each on top of those before; up to the first that is enough.

    Then, each for itself: a smaller model, and more devices. Empty if it fits.
    """
    micro, _ = choose_micro_batch(config, settings, length, room, n_devices, stage)
    before = need(config, settings, step_of(settings, length, room, n_devices, micro), stage).total
    if before <= room.usable:
        return []
    found: list[Remedy] = []
    asked = settings
    for changes, cost in _settings_that_save(settings, room, n_devices, micro):
        settings = settings.model_copy(update=changes)
        total = need(config, settings, step_of(settings, length, room, n_devices, 1), stage).total
        if total >= before:
            continue
        names = " ".join(f"{stage}.{name}={value}" for name, value in changes.items())
        found.append(Remedy(names, before - total, total, total <= room.usable, cost))
        before = total
        if found[-1].fits:
            return found
    found += _smaller_model(config, asked, length, room, n_devices, stage)
    found += _more_devices(config, asked, length, room, n_devices, stage)
    return found


def _settings_that_save(
    settings: OptimizerSettings, room: Room, n_devices: int, micro: int
) -> Iterator[tuple[dict[str, object], str]]:
    """Changes of settings with what they cost, the cheapest first."""
    if micro > 1:
        yield {"micro_batch_size": 1}, "more passes a step; small ones are less efficient"
    if settings.precision == "float32" and room.has_bfloat16:
        yield {"precision": "bfloat16"}, "results round otherwise; faster here"
    if settings.activation_checkpointing == "none":
        yield {"activation_checkpointing": "selective"}, "a few percent more time"
    if settings.activation_checkpointing != "full":
        yield {"activation_checkpointing": "full"}, "up to a third more time"
    if settings.ema:
        yield {"ema": 0.0}, "no averaged weights"
    if settings.optimizer == "adamw":
        yield {"optimizer": "muon"}, "another optimizer, with a rate of its own"
    if settings.optimizer != "adafactor" and n_devices == 1:
        yield {"optimizer": "adafactor"}, "learns less from a token"


def _smaller_model(
    config: ModelConfig, settings: OptimizerSettings, length: int, room: Room, n_devices: int, stage: str
) -> Iterator[Remedy]:
    before = need(config, settings, step_of(settings, length, room, n_devices, 1), stage).total
    for size in reversed(LADDER):
        try:
            smaller = ladder_config(size=size, vocab_size=config.vocab_size, context_length=config.context_length)
        except RecipeError:
            continue
        if count_parameters(smaller) >= count_parameters(config):
            continue
        total = need(smaller, settings, step_of(settings, length, room, n_devices, 1), stage).total
        if total <= room.usable:
            yield Remedy(f"model.size={size}", before - total, total, True, "another model")
            return


def _more_devices(
    config: ModelConfig, settings: OptimizerSettings, length: int, room: Room, n_devices: int, stage: str
) -> Iterator[Remedy]:
    """The least power of two of them, as they are or with all activations computed again."""
    before = need(config, settings, step_of(settings, length, room, n_devices, 1), stage).total
    frugal = settings.model_copy(update={"activation_checkpointing": "full"})
    for chosen, extra in ((settings, ""), (frugal, f" and {stage}.activation_checkpointing=full")):
        for count in (n_devices * 2**power for power in range(1, 11)):
            total = need(config, chosen, step_of(chosen, length, room, count, 1), stage).total
            if total <= room.usable:
                yield Remedy(f"{count} devices of this size{extra}", before - total, total, True, "their price")
                return


def _ways_out(
    config: ModelConfig, settings: OptimizerSettings, length: int, room: Room, n_devices: int, stage: str
) -> str:
    found = remedies(config, settings, length, room, n_devices, stage)
    enough = [remedy for remedy in found if remedy.fits]
    if not enough:
        return "No setting and no number of devices makes it fit: choose a smaller model."
    steps = [remedy.setting for remedy in found[: found.index(enough[0])]]
    if enough[0].setting.startswith(f"{stage}."):
        return "It fits with:  " + " ".join(f"--set {one}" for one in " ".join([*steps, enough[0].setting]).split())
    ways = " or ".join(
        f"--set {remedy.setting}" if remedy.setting.startswith("model.") else remedy.setting for remedy in enough
    )
    return f"It fits with:  {ways}"


def _divisors(count: int) -> list[int]:
    """Of a number of rows, the largest first."""
    return [size for size in range(count, 0, -1) if count % size == 0]


def _of(room: Room) -> str:
    return f"{room.what}, {format_bytes(room.total)}"
