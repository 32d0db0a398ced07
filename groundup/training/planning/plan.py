"""A training run before it runs: parameters, tokens, memory, time, cost, expected loss, and what to change.

In: a recipe, and a device or a budget. Out: a `Plan`, which `groundup plan` prints. Nothing of the run is made: on this
machine a probe of at most 20 seconds measures how fast it is, for another a table says it. A budget of time or money
buys tokens for the recipe's model, and the size on the ladder that makes most of it: with a scaling law the one of the
lowest predicted loss, else the one nearest to 20 tokens for each parameter (arXiv:2203.15556).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from groundup.distributed import current_world
from groundup.environment import cpu_name
from groundup.errors import DataError, GroundupError, RecipeError
from groundup.interop.start import start_config
from groundup.measured import recall
from groundup.model import ModelConfig, count_parameters, ladder_config
from groundup.model.cost import (
    active_parameters,
    training_flops,
    training_flops_per_token,
    vocabulary_parameters,
)
from groundup.model.ladder import TOKENS_PER_PARAMETER
from groundup.recipe import PretrainSettings, Recipe, read_recipe, resolve
from groundup.run import Run
from groundup.shards import TokenShards
from groundup.training.compilation import choose_without_trial, trial_key
from groundup.training.planning.device import Device, find_device, table_timings
from groundup.training.planning.memory import (
    LADDER,
    DeviceMemory,
    Memory,
    Step,
    Suggestion,
    Workload,
    device_memory,
    step_memory,
)
from groundup.training.planning.probe import (
    Timings,
    ValidationPass,
    assumed_timings,
    measured_timings,
    rows_within,
    run_seconds,
    validation_pass,
)
from groundup.training.precision import choose_precision
from groundup.training.process import limited_threads
from groundup.training.scaling_law import DEFAULT_LAW, ScalingLaw
from groundup.training.schedule import BatchPlan, count_tokens, sequence_length


def plan(
    recipe: Recipe | str | Path, *, hours: float | None = None,
    budget: float | None = None, device: str | None = None, price: float | None = None, probe: bool = True,
    run: str | Path | None = None, law: str | Path | None = None,
) -> Plan:  # fmt: skip
    """Say what pretraining a recipe takes, before anything runs.

    Args:
        recipe: a recipe, or where it is.
        hours: of the whole stage; tokens then follow.
        budget: the same in dollars.
        device: from the table, as "h100x8" (default: this machine).
        price: dollars an hour of one device (default: the table's).
        probe: measure how fast this machine is; else that is assumed.
        run: the run's folder, whose shards say how much text there is.
        law: a scaling law's file (default: the one that `groundup scaling` left, if there is one).

    Raises:
        RecipeError: the recipe is wrong.
        DataError: a budget that is none, or too small for one step.
        GroundupError: no such device, or the recipe does not pretrain.
    """
    recipe = resolve(recipe if isinstance(recipe, Recipe) else read_recipe(str(recipe)))
    if not recipe.has_trunk:
        raise GroundupError(f"{recipe.name}: every stage starts from a model, so there is nothing to pretrain.")
    shards = None
    if run is not None and (Run(run).folder("shards") / "manifest.json").is_file():  # the text is cut into tokens
        folder = Run(run).folder("shards")
        shards = tuple(TokenShards.open(folder, split, verify=False) for split in ("train", "validation"))
    vocab_size = shards[0].vocab_size if shards else recipe.tokenizer.vocab_size
    config = recipe.model.config(vocab_size) if recipe.init is None else start_config(recipe.init, recipe.model)
    known, hardware = _hardware(recipe.pretrain, device, price)
    seconds = _budget(hours, budget, hardware)
    settings = recipe.pretrain.model_copy(update={"precision": hardware.precision})
    length = sequence_length(config, settings)
    work = Workload(config, settings, length, hardware.available, hardware.count)
    fit = _fit(work)
    notes: list[str] = []
    if known is None:
        with limited_threads(recipe.threads):
            timings, notes = _timings_here(work, fit.step, probe, run)
    else:
        timings = table_timings(config, settings, fit.step, known)
    validation = validation_pass(settings, length, shards[1].n_tokens if shards else None)
    settings, amount = _amount(
        config, settings, length, shards[0].n_tokens if shards else None, timings, validation, seconds
    )
    parts = run_seconds(timings, settings, amount.rows, validation)
    found_law, why_none = _law(law, shards)
    best: Candidate | None = None
    sizes: list[Candidate] = []
    if seconds is not None:
        training = seconds * parts["training"] / sum(parts.values())
        # The vocabulary of other sizes is the same where a tokenizer is given, or a law is about one.
        follows = recipe.model.follows_from_one_number and "vocab_size" not in recipe.tokenizer.model_fields_set
        given = {} if follows and found_law is None else {"vocab_size": config.vocab_size}
        best, sizes = _candidates(work, training, timings.flops, known, given, found_law)
    return Plan(
        recipe=recipe.name, config=config, settings=settings, hardware=hardware, amount=amount, fit=fit,
        timings=timings, seconds=parts, expected=_expected(found_law, why_none, config, amount), best=best,
        sizes=sizes, notes=notes,
    )  # fmt: skip


@dataclass(frozen=True)
class Hardware:
    """Where a run is to be."""

    device: str
    count: int
    available: DeviceMemory  # of one
    price: float | None  # dollars an hour of one; None: unknown
    precision: str  # of the arithmetic
    precision_why: str


@dataclass(frozen=True)
class Amount:
    """How much is trained."""

    tokens: int  # target tokens to see, in whole batches
    why: str
    steps: int
    rows: int
    epochs: float | None  # how often the text is seen; None while it is not known how much there is


@dataclass(frozen=True)
class Fit:
    """Memory on one device."""

    step: Step  # with the micro-batch that will be used
    micro_why: str
    largest_micro: int | None  # the most rows that fit; None: not one
    estimate: Memory
    suggestions: list[Suggestion]  # what to change; empty if it fits


@dataclass(frozen=True)
class Expected:
    """What a scaling law says of the run: validation loss in nats per token, with the ends of its 90 % interval."""

    loss: float | None
    low: float | None
    high: float | None
    why: str  # where it comes from and how far it is carried, or why there is none


@dataclass(frozen=True)
class Candidate:
    """A size on the ladder and what a budget makes of it."""

    size: str  # as for [model] size
    parameters: int
    tokens: int  # that fit into the budget
    loss: float | None  # predicted, nats per token; None without a law
    fits: bool  # in memory, one row at a time at least

    @property
    def tokens_per_parameter(self) -> float:
        """20 is compute-optimal."""
        return self.tokens / self.parameters


@dataclass(frozen=True)
class Plan:
    """A run before it runs."""

    recipe: str
    config: ModelConfig
    settings: PretrainSettings  # with the tokens that the plan has
    hardware: Hardware
    amount: Amount
    fit: Fit
    timings: Timings
    seconds: dict[str, float]  # of the stage, by part
    expected: Expected
    best: Candidate | None  # of a budget: the size on the ladder that makes most of it
    sizes: list[Candidate]  # the same and its neighbours
    notes: list[str]  # what else to know

    @property
    def parameters(self) -> dict[str, int]:
        """All, those in the blocks, and those that compute one token."""
        n = count_parameters(self.config)
        return {
            "all": n, "non_embedding": n - vocabulary_parameters(self.config), "active": active_parameters(self.config),
        }  # fmt: skip

    @property
    def flops(self) -> float:
        """Of training, forward and backward."""
        return float(self.amount.rows * training_flops(self.config, self.fit.step.length))

    @property
    def total_seconds(self) -> float:
        """Of the whole stage."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Of the training steps."""
        return self.amount.tokens / self.seconds["training"]

    @property
    def dollars(self) -> float | None:
        """Of all devices, where there is a price."""
        price = self.hardware.price
        return None if price is None else price * self.hardware.count * self.total_seconds / 3600

    @property
    def fits(self) -> bool:
        """Whether the memory that is expected is there."""
        return self.fit.estimate.total <= self.hardware.available.usable

    def check(self) -> None:
        """Hold that it can fit.

        Raises:
            GroundupError: it is certain that it cannot.
        """
        hardware = self.hardware
        work = Workload(self.config, self.settings, self.fit.step.length, hardware.available, hardware.count)
        work.refuse_what_cannot_fit()

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        fit, hardware, memory = self.fit, self.hardware, self.fit.estimate
        return {
            "recipe": self.recipe,
            "parameters": self.parameters,
            "device": {
                "name": hardware.device, "count": hardware.count,
                "memory": hardware.available.total, "of": hardware.available.what,
            },
            "precision": {"name": hardware.precision, "why": hardware.precision_why},
            "training": {
                **vars(self.amount), "batch_size": self.settings.batch_size, "sequence_length": fit.step.length,
                "flops": self.flops,
            },
            "memory": {
                "parts": memory.parts(), "total": memory.total, "usable": hardware.available.usable, "fits": self.fits,
                "fullest": memory.moment, "all_gradients": memory.all_gradients,
                "micro_batch_size": fit.step.micro, "micro_why": fit.micro_why,
                "largest_micro_batch": fit.largest_micro, "suggestions": [vars(one) for one in fit.suggestions],
            },
            "time": {
                "seconds": self.seconds, "total_seconds": self.total_seconds,
                "tokens_per_second": self.tokens_per_second, "flops_per_second": self.timings.flops,
                "how": self.timings.how, "is_measured": self.timings.is_measured,
            },
            "dollars": self.dollars,
            "expected_loss": vars(self.expected),
            "budget": None if not self.sizes else {
                "best": None if self.best is None else vars(self.best), "sizes": [vars(one) for one in self.sizes],
            },
            "notes": self.notes,
        }  # fmt: skip


def _hardware(settings: PretrainSettings, device: str | None, price: float | None) -> tuple[Device | None, Hardware]:
    if device is not None:
        known, count = find_device(device)
        precision = known.available.arithmetic(settings.precision)
        why = "as the recipe says" if precision == settings.precision else f"what {known.name} multiplies fastest"
        return known, Hardware(
            known.name, count, known.available, known.price if price is None else price, precision, why
        )
    world = current_world()
    dtype, why = choose_precision(settings.precision, world.device.type)
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else cpu_name()
    shown = "float8" if settings.precision == "float8" else str(dtype).removeprefix("torch.")
    return None, Hardware(name, world.size, device_memory(world), price, shown, why)


def _fit(work: Workload) -> Fit:
    micro, why = work.micro_batch()
    free = replace(work, settings=work.settings.model_copy(update={"micro_batch_size": None}))
    largest, _ = free.micro_batch()
    return Fit(work.step(micro), why, largest if free.fits(largest) else None, work.memory(micro), work.suggestions())


def _timings_here(work: Workload, step: Step, probe: bool, run: str | Path | None) -> tuple[Timings, list[str]]:
    """This machine's timings, with a compiler's gain where it is known; and what is to be said of it."""
    config, settings, world = work.config, work.settings, current_world()
    assert isinstance(settings, PretrainSettings)
    if not probe:
        return assumed_timings(config, step, world), []
    timings = measured_timings(work, step, world, folder=None if run is None else Path(run))
    tokens, _ = count_tokens(count_parameters(config), settings)
    n_flops = tokens / step.length * training_flops(config, step.length)
    choice = choose_without_trial(settings.compile, world.device.type, n_flops, world.size, rows_are_alike=True)
    if choice is not None and not choice.compiled:
        return timings, []
    key = trial_key(config, (step.micro, step.length), step.dtype, settings.activation_checkpointing)
    found = recall("compile", key, world.device)
    if found is None:
        return timings, ["The run will try torch.compile, which may make it faster; the plan is without it."]
    if not found["pays"] or found["failure"] is not None:
        return timings, []
    gain = found["eager_seconds"] / found["compiled_seconds"]
    how = f"{timings.how}; compiled, {gain:.2f}× as fast when it was tried here"
    return replace(timings, row=timings.row / gain, flops=timings.flops * gain, how=how), []


def _budget(hours: float | None, budget: float | None, hardware: Hardware) -> float | None:
    """Seconds that a time or a sum of money allows; None without either.

    Raises:
        DataError: both, nothing, or money without a price.
    """
    if hours is not None and budget is not None:
        raise DataError("--hours and --budget are both given: each says how much there is.", "Keep one.")
    for name, value in (("hours", hours), ("budget", budget)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise DataError(f"--{name} {value:g}: no budget.", "Give a positive number.")
    if budget is None:
        return None if hours is None else 3600 * hours
    if not hardware.price:
        raise DataError("--budget: this machine has no price.", "Name a --device, or its --price in dollars an hour.")
    return 3600 * budget / (hardware.price * hardware.count)


def _amount(
    config: ModelConfig, settings: PretrainSettings, length: int, text_tokens: int | None, timings: Timings,
    validation: ValidationPass, seconds: float | None,
) -> tuple[PretrainSettings, Amount]:  # fmt: skip
    """How much is trained, and the settings that say so.

    Raises:
        DataError: the time is too little for one step.
    """
    tokens, why = count_tokens(count_parameters(config), settings)
    if seconds is not None:
        rows = rows_within(seconds, timings, settings, validation)
        if not rows:
            needed = sum(run_seconds(timings, settings, settings.batch_size, validation).values())
            raise DataError(
                f"{seconds:,.0f} seconds are too few: one step, with the validation around it, takes {needed:,.0f}.",
                "Give more, or take a smaller model.",
            )
        tokens, why = rows * length, f"what fits into {seconds / 3600:.3g} hours"
        settings = settings.model_copy(update={"tokens": tokens})
    plan = BatchPlan(
        settings.batch_size, math.ceil(tokens / length), settings.batch_warmup_from, settings.batch_warmup_share
    )
    rows = plan.rows(plan.n_steps - 1)[1]
    own_share = 1 / (1 + sum(part.weight for part in settings.mixture))
    epochs = None if text_tokens is None else own_share * rows * length / text_tokens
    return settings, Amount(rows * length, why, plan.n_steps, rows, epochs)


def _law(asked: str | Path | None, shards: tuple[TokenShards, ...] | None) -> tuple[ScalingLaw | None, str]:
    """The scaling law, if there is one of this text; else why there is none.

    Raises:
        ArtifactError: the file is no law.
    """
    path = Path(asked) if asked is not None else DEFAULT_LAW
    if asked is None and not path.is_file():
        return None, "no law yet: groundup scaling"
    law = ScalingLaw.load(path)
    about = {}
    if shards is not None:
        train, validation = shards
        about = {
            "tokenizer": train.tokenizer_fingerprint, "train": train.fingerprint, "validation": validation.fingerprint,
        }  # fmt: skip
    other = law.other_data(**about)
    if other is not None and asked is None:
        return None, f"not by {path}: {other}"
    return law, f"{path}: {other}" if other is not None else str(path)


def _expected(law: ScalingLaw | None, why: str, config: ModelConfig, amount: Amount) -> Expected:
    if law is None:
        return Expected(None, None, None, why)
    found = law.predict(count_parameters(config), amount.tokens)
    if found.beyond > 1.05:
        why += f", {found.beyond:.1f}× beyond its runs"
    low, high = (end if math.isfinite(end) else None for end in (found.low, found.high))
    return Expected(found.loss, low, high, why)


def _candidates(
    work: Workload, seconds: float, flops: float, known: Device | None, given: dict[str, int], law: ScalingLaw | None
) -> tuple[Candidate | None, list[Candidate]]:
    """Of the ladder the size that makes most of a budget, of those that fit in memory, with two on each side.

    Args:
        work: the recipe's; another size has its batch, its optimizer and its device.
        seconds: of training alone; sizes with less than one token a parameter in it are left out.
        flops: a second, as the probe has them; of a device in the table each size has its own.
        known: that device.
        given: the tokenizer's `vocab_size`; empty: what the ladder gives each size.
        law: for losses.
    """
    work = replace(work, settings=work.settings.model_copy(update={"groups": ()}))
    found: list[Candidate] = []
    for size in LADDER:
        try:
            config = ladder_config(size=size, **given)
        except RecipeError:  # the vocabulary alone is larger
            continue
        n, one = count_parameters(config), replace(work, config=config, length=config.context_length)
        if known is not None:
            flops = table_timings(config, one.settings, one.step(one.micro_batch()[0]), known).flops
        tokens = int(seconds * flops / training_flops_per_token(config, one.length))
        if tokens < n:
            break
        if found and found[-1].parameters == n:
            continue  # with this vocabulary the ladder has no other
        needed = step_memory(config, one.settings, one.step(1)).total
        loss = None if law is None else law.loss(n, tokens)
        found.append(Candidate(size, n, tokens, loss, needed <= work.available.usable))

    def distance(one: Candidate) -> float:
        from_optimum = abs(math.log(one.tokens_per_parameter / TOKENS_PER_PARAMETER))
        return from_optimum if one.loss is None else one.loss

    best = min((one for one in found if one.fits), key=distance, default=None)
    if best is None:
        return None, found[-5:]
    place = found.index(best)
    return best, found[max(0, place - 2) : place + 3]
