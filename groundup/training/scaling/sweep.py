"""A small sweep for a scaling law: models of several sizes, each trained on several token budgets.

In: a recipe and its token shards. Out, in one folder: `points/` with a folder for each finished run, `points.jsonl`,
`law.json` and `scaling.svg`. Each budget is a run with a schedule of its own: in the middle of a schedule the loss is
not yet what those tokens can give (arXiv:2203.15556, section 3.1). A finished run is not trained again, a killed one
goes on from its checkpoint; what decides its weights is in its folder's name.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groundup.console import Bar, Console
from groundup.distributed import World, current_world
from groundup.errors import ArtifactError, DataError, GroundupError, Interrupted
from groundup.files import check_ours, own_folder, read_json, value_digest, write_json, write_text
from groundup.model import Transformer
from groundup.model.cost import training_flops_per_token, vocabulary_parameters
from groundup.model.ladder import parse_size
from groundup.recipe import Recipe
from groundup.report.scaling import draw_scaling
from groundup.run import RECIPE_FILE, Run
from groundup.shards import TokenShards
from groundup.tokenizer import Tokenizer
from groundup.training import VERSION, pretrain
from groundup.training.scaling.fit import check_enough, fit_scaling_law
from groundup.training.scaling.grid import DEFAULT_SIZES, MOST_EPOCHS, N_BUDGETS, SweepRun, default_tokens, sweep_runs
from groundup.training.scaling.law import DEFAULT_LAW, LAW_FILE, LawData, ScalingLaw, ScalingPoint
from groundup.training.scaling.time import tokens_for
from groundup.training.threads import limited_threads

POINTS_FOLDER, POINT_FILE, POINTS_FILE, PICTURE_FILE, BUDGET_FILE = (
    "points", "point.json", "points.jsonl", "scaling.svg", "budget.json",
)  # fmt: skip


@dataclass(frozen=True)
class Sweep:
    """What a sweep is to train, and where.

    Attributes:
        recipe: what all its runs have in common.
        shards: the folder of their token shards.
        data: what text that is.
        runs: the cheapest first.
        out: the sweep's folder.
        notes: what the user should know before it starts.
        question: with `minutes`, what the budgets were chosen for.
    """

    recipe: Recipe
    shards: Path
    data: LawData
    runs: tuple[SweepRun, ...]
    out: Path
    notes: tuple[str, ...] = ()
    question: Mapping[str, Any] | None = None

    def digest(self, run: SweepRun) -> str:
        """Digest of everything that decides a run's weights and its loss."""
        return value_digest({
            "version": VERSION,
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
    tokenizer: Tokenizer | None = None,
) -> Sweep:
    """What `scaling_sweep` would train; the arguments are its own. Nothing is written.

    Raises:
        ArtifactError: shards missing, damaged or of another tokenizer.
        DataError: too few sizes or budgets for a law.
        RecipeError: the recipe's model cannot have one of the sizes.
    """
    check_question(sizes, tokens, minutes)
    shards, out = Path(shards), Path(out)
    expected = tokenizer.fingerprint if tokenizer is not None else None
    train = TokenShards.open(shards, "train", tokenizer_fingerprint=expected)
    validation = TokenShards.open(shards, "validation", tokenizer_fingerprint=expected)
    vocab_size = train.vocab_size if tokenizer is None else tokenizer.vocab_size
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
        question = _question(minutes, recipe, sizes, data)
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
    tokenizer: Tokenizer | None = None,
    world: World | None = None,
    console: Console | None = None,
) -> ScalingLaw:
    """Train models of several sizes on several token budgets, and fit their law; go on where it was interrupted.

    Args:
        recipe: seed, threads, architecture and training settings of all runs. Sizes, batches and learning rates are
            those of the ladder (`[model] size`), so that each run is as good as its size and budget allow.
        shards: a folder written by `groundup.shards.write_shards`.
        out: the sweep's folder.
        sizes: parameters in all, such as "400k".
        tokens: budgets, each for each size (default: four, each half of the next, for six to ten minutes on two cores
            with the default sizes; at most four passes over the text).
        minutes: choose the budgets so that the sweep takes so long here; what was chosen is kept in `out`.
        tokenizer: the shards' tokenizer (default: `tokenizer/` beside the shards, where there is one).
        world: the processes to train on (default: those of `torchrun`, or this one).
        console: where progress is shown.

    Raises:
        ArtifactError: shards missing, damaged or of another tokenizer.
        DataError: too little text; too few sizes or budgets; losses that follow no law.
        RecipeError: the recipe's model cannot have one of the sizes.
        RunError: another process works in `out`, or it holds files that are not ours.
        Interrupted: asked to stop; finished runs are kept, the one at work goes on from its checkpoint.
    """
    world, console, out = world or current_world(), console or Console(), Path(out)
    beside = Path(shards).parent / "tokenizer" / "tokenizer.json"
    if tokenizer is None and beside.is_file():
        tokenizer = Tokenizer.load(beside.parent)
    check_start(recipe, out)
    if world.is_first:
        own_folder(out)
    with limited_threads(recipe.threads), Run(out).lock() if world.is_first else contextlib.nullcontext():
        for first in (True, False):  # what the first process measures, the others read
            if world.is_first == first:
                sweep = plan_sweep(
                    recipe, shards, out=out, sizes=sizes, tokens=tokens, minutes=minutes, tokenizer=tokenizer
                )
            if first:
                if world.is_first and sweep.question is not None:
                    budgets = sorted({run.tokens for run in sweep.runs})
                    write_json(out / BUDGET_FILE, {"question": sweep.question, "tokens": budgets})
                world.wait()
        for note in sweep.notes if world.is_first else ():
            console.warn(note)
        figures = _train_all(sweep, tokenizer, world, console)
        if world.is_first:
            for name in (LAW_FILE, PICTURE_FILE):  # of an earlier sweep, should this one's losses follow no law
                (out / name).unlink(missing_ok=True)
        law = law_of(figures, sweep.data)
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


def law_of(figures: Sequence[Mapping[str, Any]], data: LawData) -> ScalingLaw:
    """The law of finished runs.

    Raises:
        DataError: they follow none.
    """
    names = ("n_parameters", "n_tokens", "loss", "flops")
    return fit_scaling_law([ScalingPoint(**{name: row[name] for name in names}) for row in figures], data)


def _train_all(sweep: Sweep, tokenizer: Tokenizer | None, world: World, console: Console) -> list[dict[str, Any]]:
    """Every run's figures, trained where they are not there yet."""
    n_runs, found = len(sweep.runs), []
    total, passed = sum(run.flops for run in sweep.runs), 0.0
    with console.bar("scaling", total) as bar:
        kept = 0
        for number, run in enumerate(sweep.runs, 1):
            figures = sweep.finished(run)
            if world.any(world.is_first and figures is None):
                inner = _RunConsole(console, bar, f"run {number}/{n_runs} {run.name}", passed, run.flops)
                figures = _train(sweep, run, tokenizer, world, inner, number)
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
        bar.finish(f"{n_runs} runs{there} · {total:.2g} FLOPs")
    return found


def _train(
    sweep: Sweep, run: SweepRun, tokenizer: Tokenizer | None, world: World, console: Console, number: int
) -> dict[str, Any]:
    """Train one run and write down its figures."""
    folder = sweep.folder(run)
    model = Transformer(run.config, seed=sweep.recipe.seed)
    try:
        summary = pretrain(
            model, sweep.shards, run.settings, out=folder, tokenizer=tokenizer, seed=sweep.recipe.seed, world=world,
            console=console,
        ).summary  # fmt: skip
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


def _question(minutes: float, recipe: Recipe, sizes: Sequence[int | str], data: LawData) -> dict[str, Any]:
    """What budgets for a time depend on, but for the machine: they stay when the sweep goes on elsewhere."""
    settings = [recipe.model.fingerprint_values(), recipe.pretrain.fingerprint_values()]
    names = [str(size) for size in sizes]
    return {"minutes": minutes, "sizes": names, "data": data.train, "recipe": value_digest(settings)}


def _kept_budgets(out: Path, question: Mapping[str, Any]) -> list[int] | None:
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
