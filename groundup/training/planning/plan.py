"""A training run before it runs: parameters, tokens, memory, time, cost, expected loss, and what to change.

In: a recipe, and a device or a budget. Out: a `Plan`, which `groundup plan` prints. Nothing of the run is made: on this
machine a probe of at most 20 seconds measures how fast it is, for another a table says it. The parts: `memory.py`,
`process.py`, `fit.py` (bytes); `pace.py`, `probe.py`, `device.py` (seconds); `budget.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from groundup.distributed import current_world
from groundup.environment import cpu_name
from groundup.errors import DataError, GroundupError
from groundup.interop.start import start_config
from groundup.model import ModelConfig, count_parameters
from groundup.model.cost import training_flops
from groundup.recipe import PretrainSettings, Recipe, read_recipe, resolve
from groundup.run import Run
from groundup.shards import TokenShards
from groundup.training.compile_trial import choose_without_trial, trial_key
from groundup.training.measured import recall
from groundup.training.planning.budget import best, candidates, neighbours
from groundup.training.planning.device import Device, find_device, table_pace
from groundup.training.planning.fit import choose_micro_batch, device_memory, need, remedies, step_of
from groundup.training.planning.pace import Pace, Watching, rows_within, run_seconds, watching
from groundup.training.planning.probe import PROBE_SECONDS, assumed_pace
from groundup.training.planning.probe import probe as measured_pace
from groundup.training.planning.process import process_bytes
from groundup.training.planning.result import Amount, Expected, Fit, Place, Plan
from groundup.training.precision import choose_precision
from groundup.training.pretrain import count_tokens, sequence_length
from groundup.training.scaling.law import DEFAULT_LAW, ScalingLaw
from groundup.training.schedule import BatchPlan
from groundup.training.threads import limited_threads

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
        probe: measure this machine's pace and process; else both are assumed.
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
    known, place = _place(recipe.pretrain, device, price)
    seconds = _budget(hours, budget, place)
    settings = recipe.pretrain.model_copy(update={"precision": place.precision})
    length = sequence_length(config, settings)
    fit = _fit(config, settings, length, place, is_here=known is None, measure=probe)
    notes: list[str] = []
    if known is None:
        with limited_threads(recipe.threads):
            pace, notes = _pace_here(config, settings, fit, probe, run)
    else:
        pace = table_pace(config, settings, fit.step, known)
    watch = watching(settings, length, text.validation_tokens)
    settings, amount = _amount(config, settings, length, text, pace, watch, seconds)
    parts = run_seconds(pace, settings, amount.rows, watch)
    found_law, why_none = _law(law, text)
    sizes = [] if seconds is None else candidates(
        seconds * parts["training"] / sum(parts.values()), _speed(pace, settings, place, known), settings,
        _vocabulary(recipe, config, found_law), place.room, place.count, found_law,
    )  # fmt: skip
    return Plan(
        recipe=recipe.name, config=config, settings=settings, place=place, amount=amount, fit=fit, pace=pace,
        seconds=parts, expected=_expected(found_law, why_none, config, amount), best=best(sizes),
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


def _place(settings: PretrainSettings, device: str | None, price: float | None) -> tuple[Device | None, Place]:
    if device is not None:
        known, count = find_device(device)
        precision = known.arithmetic(settings.precision)
        why = "as the recipe says" if precision == settings.precision else f"what {known.name} multiplies fastest"
        return known, Place(known.name, count, known.room, known.price if price is None else price, precision, why)
    world = current_world()
    dtype, why = choose_precision(settings.precision, world.device.type)
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else cpu_name()
    shown = "float8" if settings.precision == "float8" else str(dtype).removeprefix("torch.")
    return None, Place(name, world.size, device_memory(world), price, shown, why)


def _fit(
    config: ModelConfig, settings: PretrainSettings, length: int, place: Place, *, is_here: bool, measure: bool
) -> Fit:
    room, count = place.room, place.count
    micro, why = choose_micro_batch(config, settings, length, room, count)
    step = step_of(settings, length, room, count, micro)
    needed = need(config, settings, step)
    if is_here and room.device == "cpu":
        needed = replace(needed, process=process_bytes(step.dtype, measure=measure))
    free = settings.model_copy(update={"micro_batch_size": None})
    largest, _ = choose_micro_batch(config, free, length, room, count)
    if need(config, free, replace(step, micro=largest)).total > room.usable:
        return Fit(step, why, None, needed, remedies(config, settings, length, room, count))
    return Fit(step, why, largest, needed, remedies(config, settings, length, room, count))


def _pace_here(
    config: ModelConfig, settings: PretrainSettings, fit: Fit, probe: bool, run: str | Path | None
) -> tuple[Pace, list[str]]:
    """This machine's pace, with a compiler's gain where it is known; and what is to be said of it."""
    world = current_world()
    if not probe:
        return assumed_pace(config, fit.step, world), []
    room = device_memory(world)
    pace = measured_pace(
        config, settings, fit.step, world, room, seconds=PROBE_SECONDS, folder=None if run is None else Path(run)
    )
    tokens, _ = count_tokens(count_parameters(config), settings)
    n_flops = tokens / fit.step.length * training_flops(config, fit.step.length)
    choice = choose_without_trial(settings.compile, world.device.type, n_flops, world.size, rows_are_alike=True)
    if choice is not None and not choice.compiled:
        return pace, []
    key = trial_key(config, (fit.step.micro, fit.step.length), fit.step.dtype, settings.activation_checkpointing)
    found = recall("compile", key, world.device)
    if found is None:
        return pace, ["The run will try torch.compile, which may make it faster; the plan is without it."]
    if not found["pays"] or found["failure"] is not None:
        return pace, []
    gain = found["eager_seconds"] / found["compiled_seconds"]
    how = f"{pace.how}; compiled, {gain:.2f}× as fast when it was tried here"
    return replace(pace, row=pace.row / gain, flops=pace.flops * gain, how=how), []


def _budget(hours: float | None, budget: float | None, place: Place) -> float | None:
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
    if not place.price:
        raise DataError("--budget: this machine has no price.", "Name a --device, or its --price in dollars an hour.")
    return 3600 * budget / (place.price * place.count)


def _amount(
    config: ModelConfig, settings: PretrainSettings, length: int, text: _Text, pace: Pace, watch: Watching,
    seconds: float | None,
) -> tuple[PretrainSettings, Amount]:  # fmt: skip
    """How much is trained, and the settings that say so.

    Raises:
        DataError: the time is too little for one step.
    """
    tokens, why = count_tokens(count_parameters(config), settings)
    if seconds is not None:
        rows = rows_within(seconds, pace, settings, watch)
        if not rows:
            needed = sum(run_seconds(pace, settings, settings.batch_size, watch).values())
            raise DataError(
                f"{seconds:,.0f} seconds are too few: one step, with the validation around it, takes {needed:,.0f}.",
                "Give more, or take a smaller model.",
            )
        tokens, why = rows * length, f"what fits into {seconds / 3600:.3g} hours"
        settings = settings.model_copy(update={"tokens": tokens})
    plan = BatchPlan(settings.batch_size, math.ceil(tokens / length), settings.ramp_from, settings.ramp_share)
    rows = plan.rows(plan.n_steps - 1)[1]
    epochs = None if text.train_tokens is None else rows * length / text.train_tokens
    return settings, Amount(rows * length, why, plan.n_steps, rows, epochs)


def _speed(
    pace: Pace, settings: PretrainSettings, place: Place, known: Device | None
) -> Callable[[ModelConfig], float]:
    """Training FLOP/s of a model: those of the pace, or its own by the table."""

    def by_table(config: ModelConfig) -> float:
        assert known is not None
        length = config.context_length
        micro, _ = choose_micro_batch(config, settings, length, place.room, place.count)
        return table_pace(config, settings, step_of(settings, length, place.room, place.count, micro), known).flops

    return by_table if known is not None else lambda config: pace.flops


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
