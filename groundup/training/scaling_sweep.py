"""A small sweep for a scaling law: models of several sizes, each trained on several token budgets.

In: a recipe and its token shards. Out, in one folder: `points/` with a folder for each finished run, `points.jsonl`,
`law.json` and `scaling.svg`. All runs have the recipe's architecture, context and training settings; width, depth,
batch and learning rates follow the ladder (`model.ladder`). Each budget is a run with a schedule of its own: in the
middle of a schedule the loss is not yet what those tokens can give (arXiv:2203.15556, section 3.1). A finished run is
not trained again, a killed one goes on from its checkpoint; what decides its weights is in its folder's name.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from groundup.console import Bar, Console
from groundup.distributed import World, current_world
from groundup.errors import ArtifactError, DataError, GroundupError, Interrupted
from groundup.files import check_ours, own_folder, read_json, value_digest, write_json, write_text
from groundup.model import ModelConfig, Transformer, count_parameters
from groundup.model.cost import training_flops_per_token, vocabulary_parameters
from groundup.model.ladder import parse_size, shape_on_line, training_choices
from groundup.model.presets import reshaped
from groundup.recipe import PretrainSettings, Recipe
from groundup.report.scaling import draw_scaling
from groundup.run import RECIPE_FILE, Run
from groundup.shards import TokenShards
from groundup.training import pretrain
from groundup.training.optimizers import Optimizers
from groundup.training.planning.probe import medians, step_pieces
from groundup.training.precision import choose_precision
from groundup.training.pretrain import PRETRAIN
from groundup.training.process import keep_freed_memory, limited_threads
from groundup.training.scaling_law import (
    DEFAULT_LAW,
    LAW_FILE,
    LawData,
    ScalingLaw,
    ScalingPoint,
    check_enough,
    fit_scaling_law,
)
from groundup.training.schedule import sequence_length
from groundup.training.validation import EVAL_TOKENS

DEFAULT_SIZES = ("200k", "500k", "1m", "2m")
N_BUDGETS = 4
"""Token budgets of a sweep that names none: each half of the next."""
TOKENS_PER_PARAMETER = 1.5
"""Of the middle size, for the largest default budget: few, so that the sweep of the demo takes minutes."""
MOST_EPOCHS = 4
"""Up to so many passes, text teaches nearly as much as new text: arXiv:2305.16264."""
_SHAPE = ("n_layers", "n_heads", "n_kv_heads", "head_dim", "d_model", "d_ff")
_NEVER = 1_000_000_000
PROBE_SECONDS = 1.0
_FIRST_GUESS = 1_000_000
_VALIDATION_PASSES = 2
_FEWEST_STEPS = 20
POINTS_FOLDER, POINT_FILE, POINTS_FILE = "points", "point.json", "points.jsonl"
PICTURE_FILE, BUDGET_FILE = "scaling.svg", "budget.json"


@dataclass(frozen=True)
class Sweep:
    """What a sweep is to train, and where."""

    recipe: Recipe  # what all its runs have in common
    shards: Path  # the folder of their token shards
    data: LawData  # what text that is
    runs: tuple[SweepRun, ...]  # the cheapest first
    out: Path  # the sweep's folder
    notes: tuple[str, ...] = ()  # what the user should know before it starts
    question: str | None = None  # with `minutes`, digest of what the budgets were chosen for

    def digest(self, run: SweepRun) -> str:
        """Digest of everything that decides a run's weights and its loss."""
        return value_digest({
            "version": PRETRAIN.version,
            "seed": self.recipe.seed,
            "model": run.config.to_dict(),
            "settings": run.settings.fingerprint_values(),
            "data": [self.data.train, self.data.validation],
        })  # fmt: skip

    def folder(self, run: SweepRun) -> Path:
        """Where a run is trained."""
        return self.out / POINTS_FOLDER / f"{run.name}-{self.digest(run)[:8]}"

    def finished(self, run: SweepRun) -> dict[str, Any] | None:
        """A run's figures, or None if it is not finished."""
        path = self.folder(run) / POINT_FILE
        with contextlib.suppress(ArtifactError):
            figures = read_json(path) if path.is_file() else None
            if isinstance(figures, dict) and figures.get("digest") == self.digest(run):
                return figures
        return None


def plan_sweep(
    recipe: Recipe,
    shards: str | Path,
    *,
    out: str | Path = DEFAULT_LAW.parent,
    sizes: Sequence[int | str] = DEFAULT_SIZES,
    tokens: Sequence[int] | None = None,
    minutes: float | None = None,
) -> Sweep:
    """What `scaling_sweep` would train; the arguments are its own. Nothing is written.

    Raises:
        ArtifactError: shards missing or damaged.
        DataError: too few sizes or budgets for a law.
        RecipeError: the recipe's model cannot have one of the sizes.
    """
    check_question(sizes, tokens, minutes)
    shards, out = Path(shards), Path(out)
    train, validation = (TokenShards.open(shards, split) for split in ("train", "validation"))
    vocab_size = train.vocab_size
    data = LawData(
        recipe=recipe.name,
        tokenizer=train.tokenizer_fingerprint,
        train=train.fingerprint,
        validation=validation.fingerprint,
        train_tokens=train.n_tokens,
        bytes_per_token=validation.n_bytes / max(1, validation.n_tokens - validation.n_documents),
    )
    question = None
    if minutes is not None:
        # What the budgets depend on, but for the machine: they stay when the sweep goes on elsewhere.
        settings = [recipe.model.fingerprint_values(), recipe.pretrain.fingerprint_values()]
        question = value_digest([minutes, [str(size) for size in sizes], data.train, settings])
        tokens = _kept_budgets(out, question) or tokens_for(minutes, recipe, sizes, vocab_size, data.train_tokens)
    elif tokens is None:
        tokens = default_tokens(recipe, sizes, vocab_size, data.train_tokens)
    runs, notes = sweep_runs(recipe, sizes, tokens, vocab_size)
    try:
        check_enough([run.n_parameters for run in runs], [run.tokens for run in runs])
    except DataError as error:
        raise DataError(" ".join([error.message, *notes]), error.fix) from error
    most = max(run.tokens for run in runs) / data.train_tokens
    if most > MOST_EPOCHS:
        notes.append(
            f"The largest budget sees the training text {most:.1f} times: over {MOST_EPOCHS} times, text teaches less "
            "than new text would (arXiv:2305.16264), and the law is of such text."
        )
    return Sweep(recipe, shards, data, tuple(runs), out, tuple(notes), question)


def scaling_sweep(
    recipe: Recipe,
    shards: str | Path,
    *,
    out: str | Path = DEFAULT_LAW.parent,
    sizes: Sequence[int | str] = DEFAULT_SIZES,
    tokens: Sequence[int] | None = None,
    minutes: float | None = None,
    console: Console | None = None,
) -> ScalingLaw:
    """Train models of several sizes on several token budgets, and fit their law; go on where it was interrupted.

    Args:
        recipe: seed, threads, architecture and training settings of all runs. Sizes, batches and learning rates are
            those of the ladder (`[model] size`), so that each run is as good as its size and budget allow.
        shards: a folder written by `groundup.shards.write_shards`; the tokenizer in `tokenizer/` beside it, where there
            is one, is kept with the models.
        out: the sweep's folder.
        sizes: parameters in all, such as "400k".
        tokens: budgets, each for each size (default: four, each half of the next, for six to ten minutes on two cores
            with the default sizes; at most four passes over the text).
        minutes: choose the budgets so that the sweep takes so long here; what was chosen is kept in `out`.
        console: where progress is shown.

    Raises:
        ArtifactError: shards missing, damaged or of another tokenizer.
        DataError: too little text; too few sizes or budgets; losses that follow no law.
        RecipeError: the recipe's model cannot have one of the sizes.
        RunError: another process works in `out`, or it holds files that are not ours.
        Interrupted: asked to stop; finished runs are kept, the one at work goes on from its checkpoint.
    """
    world, console, out = current_world(), console or Console(), Path(out)
    make = functools.partial(plan_sweep, recipe, shards, out=out, sizes=sizes, tokens=tokens, minutes=minutes)
    check_start(recipe, out)
    if world.is_first:
        own_folder(out)
    with limited_threads(recipe.threads), Run(out).lock() if world.is_first else contextlib.nullcontext():
        if world.is_first:
            sweep = make()
            if sweep.question is not None:
                budgets = sorted({run.tokens for run in sweep.runs})
                write_json(out / BUDGET_FILE, {"question": sweep.question, "tokens": budgets})
        world.wait()
        if not world.is_first:
            sweep = make()  # with the budgets that the first process has measured
        for note in sweep.notes if world.is_first else ():
            console.warn(note)
        figures = _train_all(sweep, world, console)
        if world.is_first:
            for name in (LAW_FILE, PICTURE_FILE):  # of an earlier sweep, should this one's losses follow no law
                (out / name).unlink(missing_ok=True)
        names = ("n_parameters", "n_tokens", "loss", "flops")
        law = fit_scaling_law([ScalingPoint(**{name: row[name] for name in names}) for row in figures], sweep.data)
        if world.is_first:
            law.save(out / LAW_FILE)
            write_text(out / PICTURE_FILE, draw_scaling(law))
        world.wait()
    return law


def check_start(recipe: Recipe, out: Path) -> None:
    """Hold that a law can be fitted with this recipe, in this folder.

    Raises:
        DataError: it begins from a model that is there, or the folder is a run's.
        RunError: the folder holds files that are not ours.
    """
    if recipe.init is not None:
        raise DataError(
            f"init = {recipe.init!r}: a scaling law is of models that begin fresh.",
            "Leave init out of the recipe.",
        )
    if (out / RECIPE_FILE).is_file():
        raise DataError(f"{out}: a run's folder, and a sweep needs one of its own.", "Choose another with --out.")
    check_ours(out)


def check_question(sizes: Sequence[int | str], tokens: Sequence[int] | None, minutes: float | None) -> None:
    """Hold what can be held of a sweep's arguments before there are shards.

    Raises:
        DataError: too few sizes or budgets for a law, or no time.
        RecipeError: a size that is no number of parameters.
    """
    if tokens is not None and minutes is not None:
        raise DataError("--tokens and --minutes are both given: each says how long to train.", "Keep one.")
    if minutes is not None and not (math.isfinite(minutes) and minutes > 0):
        raise DataError(f"--minutes {minutes:g}: no time.", "Give a positive number.")
    wanted = [parse_size(str(size)) for size in sizes]
    runs = list(itertools.product(wanted, range(N_BUDGETS) if tokens is None else tokens))
    check_enough([size for size, _ in runs], [budget for _, budget in runs])


def _train_all(sweep: Sweep, world: World, console: Console) -> list[dict[str, Any]]:
    """Every run's figures, trained where they are not there yet."""
    n_runs, found, kept, passed = len(sweep.runs), [], 0, 0.0
    with console.bar("scaling", sum(run.flops for run in sweep.runs)) as bar:
        for number, run in enumerate(sweep.runs, 1):
            figures = sweep.finished(run)
            if world.any(world.is_first and figures is None):
                inner = _RunConsole(console, bar, f"run {number}/{n_runs} {run.name}", passed, run.flops)
                figures = _train(sweep, run, world, inner, number)
                shown = ("n_parameters", "n_tokens", "loss")
                console.log({"run": f"{number}/{n_runs}", **{name: figures[name] for name in shown}})
            else:
                kept += 1
                figures = sweep.finished(run)
            assert figures is not None
            found.append(figures)
            passed += run.flops
            bar.update(passed)
            if world.is_first:
                lines = [json.dumps({k: v for k, v in row.items() if k != "digest"}) + "\n" for row in found]
                write_text(sweep.out / POINTS_FILE, "".join(lines))
        there = f", {kept} of them there already" if kept else ""
        bar.finish(f"{n_runs} runs{there} · {passed:.2g} FLOPs")
    return found


def _train(sweep: Sweep, run: SweepRun, world: World, console: Console, number: int) -> dict[str, Any]:
    """Train one run and write down its figures."""
    folder = sweep.folder(run)
    model = Transformer(run.config, seed=sweep.recipe.seed)
    try:
        summary = pretrain(
            model, sweep.shards, run.settings, out=folder, seed=sweep.recipe.seed, world=world, console=console
        ).summary
    except Interrupted as error:
        raise Interrupted(
            f"scaling: stopped in run {number} of {len(sweep.runs)}; finished runs are kept, this one goes on from its "
            "checkpoint."
        ) from error
    except GroundupError as error:
        raise type(error)(f"{folder}: {error.message}", error.fix) from error
    n_tokens, per_token = summary["tokens"], training_flops_per_token(run.config, run.sequence_length)
    figures = {
        "run": run.name,
        "n_parameters": run.n_parameters,
        "n_non_embedding": run.n_parameters - vocabulary_parameters(run.config),
        "n_tokens": n_tokens,
        "loss": summary["val_loss"],
        "bits_per_byte": summary.get("val_bits_per_byte"),
        "train_loss": summary["final_loss"],
        "flops": n_tokens * per_token,
        "epochs": n_tokens / sweep.data.train_tokens,
        "steps": summary["steps"],
        "batch_size": run.settings.batch_size,
        "sequence_length": run.sequence_length,
        "lr": run.settings.lr,
        "muon_lr": run.settings.muon_lr,
        "digest": sweep.digest(run),
    }
    if world.is_first:
        write_json(folder / POINT_FILE, figures)
    world.wait()
    return figures


def _kept_budgets(out: Path, question: str) -> list[int] | None:
    with contextlib.suppress(ArtifactError, KeyError, TypeError, ValueError):
        kept = read_json(out / BUDGET_FILE)
        return [int(budget) for budget in kept["tokens"]] if kept["question"] == question else None
    return None


class _RunConsole(Console):
    """What a single run says: its steps move the sweep's bar, its warnings bear its name."""

    def __init__(self, outer: Console, whole: Bar, name: str, passed: float, flops: float) -> None:
        super().__init__(quiet=True)
        self._outer, self._whole, self._name, self._passed, self._flops = outer, whole, name, passed, flops

    def bar(self, name: str, total: float | None = None) -> Bar:
        """A bar that shows nothing itself."""
        whole, title, passed, flops = self._whole, self._name, self._passed, self._flops

        class Part(Bar):
            def update(self, completed: float, total: float | None = total, note: str | None = None) -> None:
                whole.update(passed + flops * completed / max(1.0, total or 1.0), note=f"{title} · {note or ''}")

        return Part(self, name, total)

    def warn(self, text: str) -> None:
        """Shown by the sweep's console."""
        self._outer.warn(f"{self._name}: {text}")


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    config: ModelConfig
    settings: PretrainSettings
    tokens: int  # the budget
    sequence_length: int
    n_parameters: int  # all of the model
    flops: float  # of its training, about

    @property
    def name(self) -> str:
        """`n344256-d770000`: parameters and tokens."""
        return f"n{self.n_parameters}-d{self.tokens}"


def sweep_runs(
    recipe: Recipe, sizes: Sequence[int | str], tokens: Sequence[int], vocab_size: int
) -> tuple[list[SweepRun], list[str]]:
    """Every size with every budget, the cheapest first; and what is to be said of sizes that fell together.

    Raises:
        DataError: a budget that is none.
        RecipeError: a size that the ladder does not have.
    """
    notes, configs = [], {}
    for size in sizes:
        config = config_of(recipe, size, vocab_size)
        n_parameters = count_parameters(config)
        if n_parameters in configs:
            notes.append(f"Size {size} is {n_parameters:,} parameters with this vocabulary, as another: trained once.")
        configs[n_parameters] = config
    for budget in tokens:
        if budget < 1:
            raise DataError(f"--tokens {budget}: no budget.", "Give positive numbers.")
    runs = [_run(recipe, config, budget) for config in configs.values() for budget in sorted(set(tokens))]
    return sorted(runs, key=lambda run: run.flops), notes


_shape_of = functools.cache(shape_on_line)  # a search along the whole ladder


def config_of(recipe: Recipe, size: int | str, vocab_size: int) -> ModelConfig:
    """The recipe's architecture in the shape that the ladder gives a size.

    Raises:
        RecipeError: a size that the ladder does not have, or an architecture that does not go with its shape.
    """
    shape = _shape_of(parse_size(str(size)), vocab_size)
    return reshaped(recipe.model.config(vocab_size).to_dict(), {name: shape[name] for name in _SHAPE})


def default_tokens(recipe: Recipe, sizes: Sequence[int | str], vocab_size: int, train_tokens: int) -> list[int]:
    """Budgets that suit these sizes and this much text."""
    middle = statistics.geometric_mean([count_parameters(config_of(recipe, size, vocab_size)) for size in sizes])
    return halved(min(TOKENS_PER_PARAMETER * middle, MOST_EPOCHS * train_tokens))


def halved(most: float) -> list[int]:
    """A largest budget, its half, and so on, in two digits; the smallest first."""
    return [int(float(f"{most / 2**power:.1e}")) for power in reversed(range(N_BUDGETS))]


def _run(recipe: Recipe, config: ModelConfig, tokens: int) -> SweepRun:
    given = recipe.pretrain
    length = sequence_length(config, given)
    choices = training_choices(config, tokens=tokens, sequence_length=length, optimizer=given.optimizer)
    chosen = {choice.name.removeprefix("pretrain."): choice.value for choice in choices}
    # Validation at the start and at the end only, and no batch that a ramp or a micro-batch would not divide.
    plain = {"tokens": tokens, "eval_every": _NEVER, "samples": (), "track": (), "keep_best": False}
    settings = PretrainSettings.model_validate(
        {**given.model_dump(), **chosen, **plain, "micro_batch_size": None, "batch_warmup_from": None}
    )
    flops = tokens * training_flops_per_token(config, length)
    return SweepRun(config, settings, tokens, length, count_parameters(config), flops)


def seconds_of(runs: Sequence[SweepRun]) -> list[float]:
    """Seconds that each run takes here, about: training, and validation before and after it."""
    return [training + validation for training, validation in _parts_of(runs)]


def tokens_for(
    minutes: float, recipe: Recipe, sizes: Sequence[int | str], vocab_size: int, train_tokens: int
) -> list[int]:
    """Budgets with which a sweep of these sizes takes so many minutes here, at most four passes over the text.

    Raises:
        DataError: in that time the smallest budget would be no training.
    """
    most = float(_FIRST_GUESS)
    for _ in range(2):  # again with the batches that the budgets found first have
        runs, _ = sweep_runs(recipe, sizes, halved(most), vocab_size)
        seconds = _parts_of(runs)
        training, validation = (sum(column) for column in zip(*seconds, strict=True))
        most *= max(0.0, 60 * minutes - validation) / training
        smallest, step = halved(most)[0], max(run.settings.batch_size * run.sequence_length for run in runs)
        if smallest < _FEWEST_STEPS * step:
            raise DataError(
                f"--minutes {minutes:g}: the smallest budget would be {smallest:,} tokens, under {_FEWEST_STEPS} "
                f"steps; validation alone takes {validation / 60:.1f} minutes.",
                "Give more minutes, or smaller --sizes.",
            )
    return halved(min(most, MOST_EPOCHS * train_tokens))


def training_speed(run: SweepRun) -> float:
    """Tokens per second of a run's training steps, optimizer included."""
    settings, config, world = run.settings, run.config, current_world()
    if world.device.type == "cpu":
        keep_freed_memory()
    model = Transformer(config).to(world.device)
    model.compute_dtype, _ = choose_precision(settings.precision, world.device.type)
    shape = (settings.batch_size, run.sequence_length)
    ids = torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(world.device)
    pieces = step_pieces(model, Optimizers(model, settings, model.compute_dtype), settings, ids)
    return ids.numel() / sum(medians(pieces, world, time.perf_counter() + PROBE_SECONDS))


def _parts_of(runs: Sequence[SweepRun]) -> list[tuple[float, float]]:
    """Seconds of each run's training and of its validation; runs of one model and batch are measured once."""
    keys = [(run.n_parameters, run.settings.batch_size) for run in runs]
    speeds = {key: training_speed(run) for key, run in dict(zip(keys, runs, strict=True)).items()}
    # Validation's tokens as so many of training: forward alone is a third.
    validation = [_VALIDATION_PASSES * (run.settings.eval_tokens or EVAL_TOKENS) / 3 for run in runs]
    return [(run.tokens / speeds[k], cost / speeds[k]) for run, k, cost in zip(runs, keys, validation, strict=True)]
