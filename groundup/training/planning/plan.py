"""A training run before it runs: parameters, tokens, memory, time, cost, expected loss, and what to change.

In: a recipe, and a device or a budget. Out: a `Plan`, which `groundup plan` prints. Nothing of the run is made: on this
machine a probe of at most 20 seconds measures how fast it is, for another a table says it. A budget of time or money
buys tokens for the recipe's model, and the size on the ladder that makes most of it: with a scaling law the one of the
lowest predicted loss, else the one nearest to 20 tokens for each parameter (arXiv:2203.15556). On this machine the
probe's FLOP/s are carried over to every size; of a device in the table each size has its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from groundup.distributed import current_world
from groundup.environment import cpu_name
from groundup.errors import DataError, GroundupError, RecipeError
from groundup.interop.start import start_config
from groundup.model import ModelConfig, count_parameters, ladder_config
from groundup.model.cost import training_flops, training_flops_per_token
from groundup.model.ladder import TOKENS_PER_PARAMETER
from groundup.recipe import OptimizerSettings, PretrainSettings, Recipe, read_recipe, resolve
from groundup.run import Run
from groundup.shards import TokenShards
from groundup.training.compilation import choose_without_trial, trial_key
from groundup.training.planning.device import Device, find_device, table_timings
from groundup.training.planning.memory import (
    LADDER,
    DeviceMemory,
    choose_micro_batch,
    device_memory,
    estimate_memory,
    step_memory,
    step_of,
    suggestions,
)
from groundup.training.planning.probe import (
    PROBE_SECONDS,
    Timings,
    ValidationPass,
    assumed_timings,
    measured_timings,
    process_bytes,
    rows_within,
    run_seconds,
    validation_pass,
)
from groundup.training.planning.result import Amount, Candidate, Expected, Fit, Hardware, Plan
from groundup.training.precision import choose_precision
from groundup.training.process import limited_threads, recall
from groundup.training.scaling_law import DEFAULT_LAW, ScalingLaw
from groundup.training.schedule import BatchPlan, count_tokens, sequence_length

__all__ = ["Plan", "plan"]


def plan(
    recipe: Recipe | str | Path, overrides: Sequence[str] = (), *, hours: float | None = None,
    budget: float | None = None, device: str | None = None, price: float | None = None, probe: bool = True,
    run: str | Path | None = None, law: str | Path | None = None,
) -> Plan:  # fmt: skip
    """Say what pretraining a recipe takes, before anything runs.

    Args:
        recipe: a recipe, or where it is.
        overrides: `section.key=value`, for a recipe that is read.
        hours: of the whole stage; tokens then follow.
        budget: the same in dollars.
        device: from the table, as "h100x8" (default: this machine).
        price: dollars an hour of one device (default: the table's).
        probe: measure this machine's timings and process; else both are assumed.
        run: the run's folder, whose shards say how much text there is.
        law: a scaling law's file (default: the one that `groundup scaling` left, if there is one).

    Raises:
        RecipeError: the recipe is wrong.
        DataError: a budget that is none, or too small for one step.
        GroundupError: no such device, or the recipe does not pretrain.
    """
    recipe = recipe if isinstance(recipe, Recipe) else read_recipe(str(recipe), list(overrides))
    recipe = resolve(recipe)
    if not recipe.has_trunk:
        raise GroundupError(f"{recipe.name}: every stage starts from a model, so there is nothing to pretrain.")
    text = _Text.of(run)
    config = _model(recipe, text)
    known, hardware = _hardware(recipe.pretrain, device, price)
    seconds = _budget(hours, budget, hardware)
    settings = recipe.pretrain.model_copy(update={"precision": hardware.precision})
    length = sequence_length(config, settings)
    fit = _fit(config, settings, length, hardware, is_here=known is None, measure=probe)
    notes: list[str] = []
    if known is None:
        with limited_threads(recipe.threads):
            timings, notes = _timings_here(config, settings, fit, probe, run)
    else:
        timings = table_timings(config, settings, fit.step, known)
    validation = validation_pass(settings, length, text.validation_tokens)
    settings, amount = _amount(config, settings, length, text, timings, validation, seconds)
    parts = run_seconds(timings, settings, amount.rows, validation)
    found_law, why_none = _law(law, text)
    sizes = [] if seconds is None else candidates(
        seconds * parts["training"] / sum(parts.values()), _speed(timings, settings, hardware, known), settings,
        _vocabulary(recipe, config, found_law), hardware.available, hardware.count, found_law,
    )  # fmt: skip
    return Plan(
        recipe=recipe.name, config=config, settings=settings, hardware=hardware, amount=amount, fit=fit,
        timings=timings, seconds=parts, expected=_expected(found_law, why_none, config, amount), best=best(sizes),
        sizes=neighbours(sizes), notes=notes,
    )  # fmt: skip


@dataclass(frozen=True)
class _Text:
    """What is known of the text: nothing, while there are no shards."""

    vocab_size: int | None = None
    train_tokens: int | None = None
    validation_tokens: int | None = None
    tokenizer: str | None = None
    train: str | None = None
    validation: str | None = None

    @classmethod
    def of(cls, run: str | Path | None) -> _Text:
        shards = None if run is None else Run(run).folder("shards")
        if shards is None or not (shards / "manifest.json").is_file():
            return cls()
        train, validation = (TokenShards.open(shards, split) for split in ("train", "validation"))
        return cls(
            train.vocab_size, train.n_tokens, validation.n_tokens, train.tokenizer_fingerprint, train.fingerprint,
            validation.fingerprint,
        )  # fmt: skip


def _model(recipe: Recipe, text: _Text) -> ModelConfig:
    if recipe.init is not None:
        return start_config(recipe.init, recipe.model)
    return recipe.model.config(text.vocab_size or recipe.tokenizer.vocab_size)


def _vocabulary(recipe: Recipe, config: ModelConfig, law: ScalingLaw | None) -> int | None:
    """Of other sizes: the same where a tokenizer is given, or a law is about one; else it follows from the size."""
    follows = recipe.model.follows_from_one_number and "vocab_size" not in recipe.tokenizer.model_fields_set
    return None if follows and law is None else config.vocab_size


def _hardware(settings: PretrainSettings, device: str | None, price: float | None) -> tuple[Device | None, Hardware]:
    if device is not None:
        known, count = find_device(device)
        precision = known.arithmetic(settings.precision)
        why = "as the recipe says" if precision == settings.precision else f"what {known.name} multiplies fastest"
        return known, Hardware(
            known.name, count, known.available, known.price if price is None else price, precision, why
        )
    world = current_world()
    dtype, why = choose_precision(settings.precision, world.device.type)
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else cpu_name()
    shown = "float8" if settings.precision == "float8" else str(dtype).removeprefix("torch.")
    return None, Hardware(name, world.size, device_memory(world), price, shown, why)


def _fit(
    config: ModelConfig, settings: PretrainSettings, length: int, hardware: Hardware, *, is_here: bool, measure: bool
) -> Fit:
    available, count = hardware.available, hardware.count
    micro, why = choose_micro_batch(config, settings, length, available, count)
    step = step_of(settings, length, available, count, micro)
    needed = estimate_memory(config, settings, step)
    if is_here and available.device == "cpu":
        needed = replace(needed, process=process_bytes(step.dtype, measure=measure))
    free = settings.model_copy(update={"micro_batch_size": None})
    largest, _ = choose_micro_batch(config, free, length, available, count)
    if estimate_memory(config, free, replace(step, micro=largest)).total > available.usable:
        return Fit(step, why, None, needed, suggestions(config, settings, length, available, count))
    return Fit(step, why, largest, needed, suggestions(config, settings, length, available, count))


def _timings_here(
    config: ModelConfig, settings: PretrainSettings, fit: Fit, probe: bool, run: str | Path | None
) -> tuple[Timings, list[str]]:
    """This machine's timings, with a compiler's gain where it is known; and what is to be said of it."""
    world = current_world()
    if not probe:
        return assumed_timings(config, fit.step, world), []
    available = device_memory(world)
    timings = measured_timings(
        config, settings, fit.step, world, available, seconds=PROBE_SECONDS, folder=None if run is None else Path(run)
    )
    tokens, _ = count_tokens(count_parameters(config), settings)
    n_flops = tokens / fit.step.length * training_flops(config, fit.step.length)
    choice = choose_without_trial(settings.compile, world.device.type, n_flops, world.size, rows_are_alike=True)
    if choice is not None and not choice.compiled:
        return timings, []
    key = trial_key(config, (fit.step.micro, fit.step.length), fit.step.dtype, settings.activation_checkpointing)
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
    config: ModelConfig, settings: PretrainSettings, length: int, text: _Text, timings: Timings,
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
    epochs = None if text.train_tokens is None else own_share * rows * length / text.train_tokens
    return settings, Amount(rows * length, why, plan.n_steps, rows, epochs)


def _speed(
    timings: Timings, settings: PretrainSettings, hardware: Hardware, known: Device | None
) -> Callable[[ModelConfig], float]:
    """Training FLOP/s of a model: those of the timings, or its own by the table."""

    def by_table(config: ModelConfig) -> float:
        assert known is not None
        length = config.context_length
        micro, _ = choose_micro_batch(config, settings, length, hardware.available, hardware.count)
        return table_timings(
            config, settings, step_of(settings, length, hardware.available, hardware.count, micro), known
        ).flops

    return by_table if known is not None else lambda config: timings.flops


def _law(asked: str | Path | None, text: _Text) -> tuple[ScalingLaw | None, str]:
    """The scaling law, if there is one of this text; else why there is none.

    Raises:
        ArtifactError: the file is no law.
    """
    path = Path(asked) if asked is not None else DEFAULT_LAW
    if asked is None and not path.is_file():
        return None, "no law yet: groundup scaling"
    law = ScalingLaw.load(path)
    other = law.other_data(tokenizer=text.tokenizer, train=text.train, validation=text.validation)
    if other is not None and asked is None:
        return None, f"not by {path}: {other}"
    return law, f"{path}: {other}" if other is not None else str(path)


def _expected(law: ScalingLaw | None, why: str, config: ModelConfig, amount: Amount) -> Expected:
    if law is None:
        return Expected(None, None, None, why)
    found = law.predict(count_parameters(config), amount.tokens)
    if found.beyond > 1.05:
        why += f", {found.beyond:.1f}× beyond its runs"
    has_interval = math.isfinite(found.low)
    return Expected(found.loss, found.low if has_interval else None, found.high if has_interval else None, why)


def candidates(
    seconds: float, speed: Callable[[ModelConfig], float], settings: OptimizerSettings, vocab_size: int | None,
    available: DeviceMemory, n_devices: int, law: ScalingLaw | None,
) -> list[Candidate]:  # fmt: skip
    """Every size of the ladder with at least one token a parameter in so many seconds of training.

    Args:
        seconds: of training alone.
        speed: a model's training FLOP/s.
        settings: optimizer and checkpointing, for memory.
        vocab_size: of the tokenizer; None: what the ladder gives each size.
        available: memory of a device.
        n_devices: how many.
        law: for losses.
    """
    found: list[Candidate] = []
    for size in LADDER:
        config = _rung(size, vocab_size)
        if config is None:
            continue
        length, n = config.context_length, count_parameters(config)
        tokens = int(seconds * speed(config) / training_flops_per_token(config, length))
        if tokens < n:
            break
        if found and found[-1].parameters == n:
            continue  # with this vocabulary the ladder has no other
        step = step_of(settings, length, available, n_devices, 1)
        fits = step_memory(config, settings.model_copy(update={"groups": ()}), step).total <= available.usable
        found.append(Candidate(size, n, tokens, None if law is None else law.loss(n, tokens), fits))
    return found


@functools.cache
def _rung(size: str, vocab_size: int | None) -> ModelConfig | None:
    try:
        return ladder_config(size=size, **({} if vocab_size is None else {"vocab_size": vocab_size}))
    except RecipeError:
        return None


def best(found: list[Candidate]) -> Candidate | None:
    """The one that makes most of the budget, of those that fit in memory."""
    fitting = [one for one in found if one.fits]
    if not fitting:
        return None
    if fitting[0].loss is not None:
        return min(fitting, key=lambda one: one.loss if one.loss is not None else math.inf)
    return min(fitting, key=lambda one: abs(math.log(one.tokens_per_parameter / TOKENS_PER_PARAMETER)))


def neighbours(found: list[Candidate], how_many: int = 2) -> list[Candidate]:
    """The best and so many on each side."""
    chosen = best(found)
    if chosen is None:
        return found[-(2 * how_many + 1) :]
    place = found.index(chosen)
    return found[max(0, place - how_many) : place + how_many + 1]
