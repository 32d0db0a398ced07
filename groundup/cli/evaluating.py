"""`groundup evaluate`: the stage, or the scores of any model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from groundup.cli import options
from groundup.cli.building import recipe_and_run, stage_command
from groundup.cli.output import print_json, print_table
from groundup.errors import ArtifactError, DataError
from groundup.recipe import EvaluateSettings

if TYPE_CHECKING:
    from groundup.evaluation.benchmarks import EvaluationTask

_TASKS, _STAGE = "With --tasks", "Without --tasks: the recipe's evaluation"
app = typer.Typer()


def _about_tasks(*names: str, help: str, **kind: Any) -> Any:
    return Option(*names, help=help, rich_help_panel=_TASKS, **kind)


@app.command(
    rich_help_panel=options.BUILD,
    epilog="Examples:  groundup evaluate demo  ·  groundup evaluate my.toml --force  ·  "
    "groundup evaluate runs/demo --tasks groundup:tasks,arc_easy --data files/  ·  "
    "groundup evaluate llama/ --tasks mmlu --shots 5 --limit 500 --data mmlu/ --scores scores/llama  ·  "
    "groundup evaluate runs/demo --model sft --tasks gsm8k --chat --data gsm8k/",
)
def evaluate(
    context: typer.Context,
    model: Annotated[
        str, Argument(metavar="RECIPE|RUN|MODEL", help="A recipe, its run, or with --tasks anybody's model.")
    ],
    tasks: Annotated[
        str | None, Option(help="Instead of the recipe's: generated sets, benchmarks, .toml files; with commas.")
    ] = None,
    data: Annotated[Path, _about_tasks(metavar="FOLDER", help="Where benchmarks' files are.")] = Path(),
    stage: Annotated[
        str | None, _about_tasks("--model", "-m", metavar="STAGE", help="The stage of a run.")
    ] = None,
    shots: Annotated[int, _about_tasks(min=0, help="Worked examples before each item.")] = 0,
    chat: Annotated[bool, _about_tasks("--chat", help="Put items through the model's chat template.")] = False,
    limit: Annotated[int | None, _about_tasks(min=2, help="At most so many items a task.")] = None,
    samples: Annotated[int, _about_tasks(min=1, max=1000, help="Programs for a problem, for pass@k.")] = 1,
    seed: Annotated[int, _about_tasks(help="Seed of --limit, of worked examples and of sampling.")] = 1,
    scores: Annotated[
        Path | None, _about_tasks(metavar="FOLDER", help="Where to write (default: beside the model).")
    ] = None,
    contamination: Annotated[
        int | None,
        _about_tasks(
            metavar="N", min=8, max=13,
            help="Score also without items of which N words in a row (13 is usual) stand in what the run learned from.",
        ),
    ] = None,
    unisolated: Annotated[
        bool, _about_tasks("--unisolated-code", help="Run programs even where they cannot be isolated.")
    ] = False,
    settings: options.Set = None,
    force: Annotated[bool, Option("--force", help="Do this stage again.", rich_help_panel=_STAGE)] = False,
    smoke: options.Smoke = False,
    dry_run: options.DryRun = False,
    run: options.Out = None,
    runs: options.Runs = Path("runs"),
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:  # fmt: skip
    """Models to scores with error bars: those of a recipe, or with --tasks one of anybody's.

    Stages that a recipe's evaluation stands on are brought up to date first. The same command goes on where it stopped.
    """
    _check_options(context, with_tasks=tasks is not None)
    if tasks is None:
        stage_command("evaluate")(model, settings, force, smoke, dry_run, run, runs, as_json, quiet)
        return
    from groundup.cli.talking import load_model
    from groundup.console import Console
    from groundup.evaluation.contamination import NGRAM, training_texts
    from groundup.evaluation.scorecard import BENCHMARKS, CARD, score_model
    from groundup.evaluation.sets import BITS_PER_BYTE, METRICS_OF_TASK, check_tasks, find_tasks
    from groundup.stage import MODEL_FOLDER, model_digest

    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    if not names:
        raise DataError(f"--tasks {tasks!r} names none.", "For example: --tasks groundup:tasks,arc_easy")
    asked = EvaluateSettings(
        tasks=names, data=str(data), shots=shots, chat=chat, limit=limit, samples=samples, unisolated_code=unisolated
    )
    check_tasks(asked)  # before a model is read
    _check_tasks(context, find_tasks(asked))
    path = Path(model) if Path(model).is_dir() else recipe_and_run(model, settings, smoke, run, runs)[1]
    to_chat = chat or any(name in METRICS_OF_TASK and name != BITS_PER_BYTE for name in names)
    loaded, tokenizer, folder = load_model(path, stage, to_chat=to_chat)
    folder = folder.resolve()
    is_runs = folder.name == MODEL_FOLDER
    target = scores or (folder.parent / BENCHMARKS if is_runs else folder.with_name(f"{folder.name}-{BENCHMARKS}"))
    with Console(quiet=quiet or as_json).bar("evaluate") as bar:
        found = score_model(
            loaded, tokenizer, asked, seed=seed, identity=model_digest(folder), folder=target, bar=bar,
            texts=_validation_texts(folder) if BITS_PER_BYTE in names else (),
            trained_on=None if contamination is None else training_texts(folder), ngram=contamination or NGRAM,
        )  # fmt: skip
    if as_json:
        print_json(found.card)
    elif not quiet:
        print_table(
            ("task", "figure", "value", "n"),
            _rows({name: found.card["tasks"][name] for name in found.records}, found.card["core"]),
        )
        typer.echo(target / CARD, err=True)


def _rows(tasks: Mapping[str, Any], core: Mapping[str, Any] | None) -> Iterator[tuple[Any, ...]]:
    """Every figure, for the table."""
    from groundup.evaluation.scorecard import say

    def row(name: str, figure: str, estimate: Mapping[str, Any], more: str = "") -> tuple[Any, ...]:
        return name, figure + more, say(figure, estimate["value"], estimate["stderr"]), estimate["n"]

    for name, one in tasks.items():
        ran = f", isolation: {one['sandbox']}" if "sandbox" in one else ""
        yield from (row(name, figure, estimate, ran) for figure, estimate in one["figures"].items())
        for figure, estimate in [*(one.get("clean") or {}).items()][:1]:
            yield row(name, figure, estimate, f", without {one['n_contaminated']:,} items that were trained on")
    if core is not None:
        yield row(f"CORE, {core['n']} of its {core['of']} tasks", "core", core)


def _check_options(context: typer.Context, *, with_tasks: bool) -> None:
    """Raise DataError for an option that would do nothing: of the other half of the command, or of a recipe."""
    panels = [(parameter.name, getattr(parameter, "rich_help_panel", None)) for parameter in context.command.params]
    other = {name for name, panel in panels if panel == (_STAGE if with_tasks else _TASKS)}
    why, fix = "it is about --tasks", "Add --tasks …, or write it into [evaluate]."
    if with_tasks:
        is_recipe = not Path(context.params["model"]).is_dir()
        other |= {"dry_run"} | (set() if is_recipe else {"settings", "smoke", "run", "runs"})
        why, fix = "with --tasks it does nothing" + ("" if is_recipe else " to a folder"), "Leave it out."
        if any(one.partition("=")[0].strip() != "name" for one in context.params["settings"] or () if is_recipe):
            other, why = other | {"settings"}, "with --tasks only the recipe's name counts, by which its run is found"
    _refuse(context, other, why, fix)


def _check_tasks(context: typer.Context, tasks: Sequence[EvaluationTask]) -> None:
    """Raise DataError for an option that would do nothing for these tasks."""
    from groundup.evaluation.benchmarks import Benchmark

    kinds = {task.kind for task in tasks if isinstance(task, Benchmark)}
    nothing = set() if "code" in kinds else {"samples", "unisolated"}
    nothing |= set() if kinds else {"data", "shots"}
    nothing |= set() if kinds - {"text"} else {"chat"}  # the generated sets are always asked so
    _refuse(context, nothing, f"does nothing for {', '.join(task.name for task in tasks)}", "Leave it out.")


def _refuse(context: typer.Context, names: Set[str], why: str, fix: str) -> None:
    """Raise DataError for the first of these parameters that the command line gives."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in names and source is not None and source.name == "COMMANDLINE":
            raise DataError(f"{parameter.opts[0]}: {why}.", fix)


def _validation_texts(folder: Path) -> Iterator[str]:
    """The documents of the run that a model is of."""
    from groundup.corpus import stream_documents

    corpus = folder.parent.parent / "corpus"
    if not corpus.is_dir():
        raise ArtifactError(f"{folder}: bits_per_byte: no run with a corpus is around this model.", "Leave it out.")
    return (document.text for document in stream_documents(corpus, "validation"))
