"""The road: a recipe's stages in order, each done once and skipped while it still stands.

    corpus → tokenizer → shards → pretrain → sft → evaluate

(With `[sft] init` without pretraining, and without text unless bits per byte are asked for.)

A stage is a function from settings and finished stages to a folder and a summary. Its fingerprint is made of its
settings, the fingerprints of the stages it stands on, outside files' digests and its code's version: change
`[sft]` and only sft and what stands on it are made again. Started by `torchrun`, all processes walk the road
together; the first alone does what is not training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from groundup import alignment, corpus, evaluation, shards, tokenizer, training
from groundup.console import Console
from groundup.distributed import World, current_world
from groundup.environment import describe_environment
from groundup.errors import GateError, GroundupError, RunError
from groundup.files import read_json, write_json
from groundup.interop import load_model
from groundup.model import Transformer
from groundup.preview import check_memory, check_recipe
from groundup.recipe import Recipe, Section, changed_settings
from groundup.run import MANIFEST, RECIPE_FILE, Manifest, Run, State, stage_fingerprint
from groundup.tokenizer import Tokenizer
from groundup.training.threads import limited_threads

REPORT_FILE = "report.html"


@dataclass(frozen=True)
class Context:
    """What a stage's work is given."""

    recipe: Recipe
    run: Run
    folder: Path
    world: World
    console: Console

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer; of a road without text, that of the model it starts from."""
        if self.recipe.reads_text:
            return Tokenizer.load(self.run.folder("tokenizer"))
        return training.start_tokenizer(self.recipe.init or "")

    def first_model(self) -> Transformer:
        """The model before any training: that of `init`, or a fresh one with this run's vocabulary."""
        if self.recipe.init is not None:
            return training.start_model(self.recipe.init, self.recipe.model, self.tokenizer, self.console)
        return Transformer(self.recipe.model.config(self.tokenizer.vocab_size), seed=self.recipe.seed)


@dataclass(frozen=True)
class Stage:
    """One stage of the road.

    Attributes:
        name: its name, which is also its folder's and its section's.
        needs: the stages it stands on.
        version: of its code; raised when results change.
        settings: what of the recipe decides its result.
        outside: digests of what it reads from outside the run.
        work: does it and returns the summary.
        trains: whether every process takes part.
        keeps: subfolders that outlive a change of the recipe, because the stage checks them piece by piece.
    """

    name: str
    needs: tuple[str, ...]
    version: int
    settings: Callable[[Recipe], tuple[Section, ...]]
    work: Callable[[Context], dict[str, Any]]
    outside: Callable[[Recipe], dict[str, str]] = lambda recipe: {}
    trains: bool = False
    keeps: tuple[str, ...] = ()


def stages(recipe: Recipe) -> list[Stage]:
    """The recipe's stages, in the order of the road."""
    text = [
        Stage(
            "corpus", (), corpus.VERSION, lambda r: (r.corpus,), _corpus,
            outside=lambda r: {"inputs": corpus.input_fingerprint(r.corpus)}, keeps=corpus.KEEPS,
        ),
        Stage(
            "tokenizer", ("corpus",), tokenizer.VERSION, lambda r: (r.tokenizer,), _tokenizer, outside=_given_tokenizer
        ),
        Stage("shards", ("corpus", "tokenizer"), shards.VERSION, lambda r: (r.shards,), _shards),
    ]  # fmt: skip
    pretrain = Stage(
        "pretrain", ("tokenizer", "shards"), training.VERSION, lambda r: (r.model, r.pretrain), _pretrain,
        outside=_init_digest, trains=True,
    )  # fmt: skip
    fine_tune = Stage(
        "sft", ("pretrain",), alignment.VERSION, lambda r: (_sft(r),), _fine_tune,
        outside=lambda r: {"data": ",".join(alignment.data_fingerprint(_sft(r)))}, trains=True,
    )  # fmt: skip
    road = [*text, pretrain] if recipe.sft is None else [*text, pretrain, fine_tune]
    if recipe.sft is not None and recipe.sft.init is not None:
        text = text if recipe.reads_text else []
        road = [*text, dataclasses.replace(
            fine_tune, needs=("tokenizer",) if text else (), settings=lambda r: (r.model, _sft(r)),
            outside=lambda r: {**fine_tune.outside(r), **_init_digest(r)},
        )]  # fmt: skip
    trained = tuple(stage.name for stage in road if stage.name in ("shards", "pretrain", "sft"))
    return [*road, Stage("evaluate", trained, evaluation.VERSION, lambda r: (r.evaluate,), _evaluate)]


@dataclass(frozen=True)
class StagePlan:
    """Whether a stage is to be done, and why.

    Attributes:
        state: done; changed (settings, inputs or code are not what they were); begun (interrupted); missing.
        forced: asked for, whatever its state.
    """

    stage: Stage
    fingerprint: str
    state: State
    forced: bool = False


def plan(
    recipe: Recipe, run: Run, *, until: str | None = None, start_from: str | None = None, force: bool = False
) -> list[StagePlan]:
    """Each stage's fingerprint and state, in order; the arguments are those of `build`.

    Raises:
        DataError: an input file that the recipe names is missing.
        RunError: no such stage.
    """
    road = stages(recipe)
    _check_names(road, until, start_from)
    fingerprints: dict[str, str] = {}
    plans = []
    forced = force and until is None
    for stage in road:
        settings = [section.fingerprint_values() for section in stage.settings(recipe)]
        inputs = {name: fingerprints[name] for name in stage.needs} | stage.outside(recipe)
        fingerprint = stage_fingerprint(stage.version, [recipe.seed, settings], inputs)
        fingerprints[stage.name] = fingerprint
        forced = forced or stage.name == start_from or (force and stage.name == until)
        plans.append(StagePlan(stage, fingerprint, run.state(stage.name, fingerprint), forced))
        if stage.name == until:
            break
    return plans


def build(
    recipe: Recipe,
    root: str | Path,
    *,
    until: str | None = None,
    start_from: str | None = None,
    force: bool = False,
    console: Console | None = None,
) -> Run:
    """Walk the road: do every stage that is not done, and write the report.

    Args:
        recipe: what to build.
        root: the run's folder.
        until: the last stage to do (default: all).
        start_from: do this stage and all that follow again.
        force: do every stage again; with `until`, that stage only.
        console: where progress is shown.

    Raises:
        GateError: all is done, but a figure is short of the recipe's gate.
        RunError: no such stage, or another process works on the run.
        GroundupError: what a stage raises.
    """
    world = current_world()
    console = console if console is not None and world.is_first else Console(quiet=not world.is_first)
    console.rich.quiet = not world.is_first  # of several processes, one warns
    run = Run(root)
    if world.is_first:
        _check_names(stages(recipe), until, start_from)
        check_recipe(recipe, recipe.name)
        run.check(recipe, [stage.name for stage in stages(recipe)])
    with limited_threads(recipe.threads), run.lock() if world.is_first else contextlib.nullcontext():
        plans = plan(recipe, run, until=until, start_from=start_from, force=force)
        check_memory(recipe, [item.stage.name for item in plans if item.forced or item.state != "done"])
        if world.is_first:
            _say_what_changed(run, recipe, console)
            run.create(recipe)
            # All at once: if this is interrupted, the same command without --force does what is left.
            for stage_plan in plans:
                if stage_plan.forced:
                    run.forget(stage_plan.stage.name)
        world.wait()
        for stage_plan in plans:
            name = stage_plan.stage.name
            if world.any(world.is_first and (stage_plan.forced or stage_plan.state != "done")):
                _do(stage_plan, Context(recipe, run, run.folder(name), world, console))
            else:
                if world.is_first:
                    run.clear(name)
                console.stage_line(name, "up to date")
        if world.is_first:
            _write_report_if_old(run)
            if plans[-1].stage.name == "evaluate":
                check_gates(run)
    return run


def check_gates(run: Run) -> None:
    """Hold the scores against the recipe's gates.

    Raises:
        GateError: with every gate that is missed.
    """
    rows = read_json(run.folder("evaluate") / "scores.json")["rows"]
    missed = [f"{row['label']}: {row['gate']['text']}" for row in rows if row["gate"] and not row["gate"]["passed"]]
    if missed:
        raise GateError(
            f"{run.root}: everything is built, but a gate of the recipe is missed: {'; '.join(missed)}.",
            "Train longer (--set pretrain.tokens=…, --set sft.epochs=…), or change [evaluate.gates].",
        )


def _do(stage_plan: StagePlan, context: Context) -> None:
    stage = stage_plan.stage
    if context.world.is_first:
        context.run.begin(stage.name, stage_plan.fingerprint, stage.keeps)
    context.world.wait()
    start = time.perf_counter()
    summary = stage.work(context) if stage.trains or context.world.is_first else {}
    if context.world.is_first:
        context.run.finish(
            Manifest(
                stage=stage.name,
                fingerprint=stage_plan.fingerprint,
                seconds=time.perf_counter() - start,
                summary=summary,
                environment={**describe_environment(), "threads": torch.get_num_threads()},
                settings={
                    name: values
                    for section in stage.settings(context.recipe)
                    for name, values in section.model_dump(mode="json").items()
                },
            )
        )
    context.world.wait()


def _corpus(context: Context) -> dict[str, Any]:
    return corpus.curate(context.recipe.corpus, context.folder, context.console)


def _tokenizer(context: Context) -> dict[str, Any]:
    settings = context.recipe.tokenizer
    documents = context.run.folder("corpus")
    with context.console.bar("tokenizer") as bar:
        trained = training.given_tokenizer(settings.use, context.recipe.init) or Tokenizer.train(
            corpus.stream_documents(documents, "train"),
            kind=settings.kind,
            vocab_size=settings.vocab_size,
            split=settings.split,
            spare_tokens=settings.spare_tokens,
            trainer=settings.trainer,
            sample_bytes=int(settings.sample_mib * 2**20),
            console=context.console,
        )
        trained.save(context.folder)
        n_bytes, n_tokens = 0, 0
        for document in corpus.stream_documents(documents, "validation"):
            n_bytes += len(document.text.encode())
            n_tokens += len(trained.encode(document.text))
        ratio = n_bytes / max(1, n_tokens)
        bar.finish(f"{trained.vocab_size:,} entries · {ratio:.2f} bytes/token")
    return {
        "kind": trained.kind,
        "vocab_size": trained.vocab_size,
        "bytes_per_token": ratio,
        "longest": trained.longest_tokens(20),
    }


def _given_tokenizer(recipe: Recipe) -> dict[str, str]:
    given = training.given_tokenizer(recipe.tokenizer.use, recipe.init)
    return {} if given is None else {"tokenizer": given.fingerprint}


def _init_digest(recipe: Recipe) -> dict[str, str]:
    return {} if recipe.init is None else {"init": training.start_digest(recipe.init)}


def _shards(context: Context) -> dict[str, Any]:
    recipe, documents = context.recipe, context.run.folder("corpus") / corpus.DOCUMENTS
    workers = recipe.shards.workers or recipe.corpus.workers
    size = documents.stat().st_size
    with corpus.engine_for(recipe.corpus.engine, workers, size, shards.SMALL_BYTES) as engine:
        return shards.write_shards_from_file(
            documents, context.run.folder("tokenizer"), context.folder, recipe.shards, context.console, engine
        )


def _pretrain(context: Context) -> dict[str, Any]:
    return training.pretrain(
        context.first_model(),
        context.run.folder("shards"),
        context.recipe.pretrain,
        out=context.folder,
        tokenizer=context.tokenizer,
        seed=context.recipe.seed,
        world=context.world,
        console=context.console,
    ).summary


def _fine_tune(context: Context) -> dict[str, Any]:
    if _sft(context.recipe).init is not None:
        model, own_tokenizer = context.first_model(), None
    else:
        model, own_tokenizer = load_model(context.run.folder("pretrain") / "model")
    return alignment.fine_tune(
        model,
        own_tokenizer or context.tokenizer,
        _sft(context.recipe),
        out=context.folder,
        seed=context.recipe.seed,
        world=context.world,
        console=context.console,
    ).summary


def _evaluate(context: Context) -> dict[str, Any]:
    recipe, run = context.recipe, context.run
    if recipe.sft is not None and recipe.sft.init is not None:
        models = {"base": context.first_model().eval()}
    else:
        models = {"initial": context.first_model().eval()}
        models["base"] = load_model(run.folder("pretrain") / "model")[0]
    if recipe.sft is not None:
        models["assistant"] = load_model(run.folder("sft") / "model")[0]
    scores, summary = evaluation.compare(
        models,
        context.tokenizer,
        settings=recipe.evaluate,
        shards_folder=run.folder("shards"),
        n_tasks=recipe.sft.examples if recipe.sft is not None else 10_000,
        seed=recipe.seed,
        console=context.console,
    )
    write_json(context.folder / "scores.json", scores)
    return summary


def _say_what_changed(run: Run, recipe: Recipe, console: Console) -> None:
    with contextlib.suppress(GroundupError, OSError):
        changes = changed_settings(run.recipe, recipe)
        if changes:
            more = f"; and {len(changes) - 6} more" if len(changes) > 6 else ""
            console.note("The recipe has changed since the last build: " + "; ".join(changes[:6]) + more)


def _write_report_if_old(run: Run) -> None:
    """Write the page unless it is younger than all it shows."""
    page = run.root / REPORT_FILE
    newest = max(path.stat().st_mtime_ns for path in (run.root / RECIPE_FILE, *run.root.glob(f"*/{MANIFEST}")))
    if not page.exists() or page.stat().st_mtime_ns <= newest:
        # Imported here: charts take long to import, and most commands draw none.
        from groundup.report import write_report

        write_report(run)


def _check_names(road: list[Stage], *asked: str | None) -> None:
    names = [stage.name for stage in road]
    for name in asked:
        if name is not None and name not in names:
            raise RunError(f"{name!r} is no stage of this recipe.", f"Its stages: {', '.join(names)}.")


def _sft(recipe: Recipe) -> Any:
    assert recipe.sft is not None
    return recipe.sft
