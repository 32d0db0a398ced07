"""`groundup evaluate`: the stage, and benchmarks of any model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from groundup.cli.building import DryRunOption, SmokeOption, stage_command
from groundup.cli.options import JsonOption, QuietOption, RunOption, RunsOption, SetOption, print_json, result_console

EXAMPLE = (
    "groundup evaluate runs/demo --tasks arc_easy,piqa --data benchmarks/  ·  "
    "groundup evaluate llama/ --tasks mmlu --shots 5 --limit 500 --data mmlu/ --scores scores/llama"
)
_FOLDER = "benchmarks"


def evaluate(
    context: typer.Context,
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE|RUN|MODEL", help="A recipe, a run, or with --tasks anybody's model.")
    ],
    tasks: Annotated[
        str | None, typer.Option("--tasks", help="Benchmarks that ship, or .toml files, between commas.")
    ] = None,
    data: Annotated[Path, typer.Option("--data", metavar="FOLDER", help="Where the benchmarks' files are.")] = Path(),
    stage: Annotated[str | None, typer.Option("--model", "-m", metavar="STAGE", help="Of a run: whose model.")] = None,
    shots: Annotated[int, typer.Option("--shots", min=0, help="Worked examples before each item.")] = 0,
    limit: Annotated[int | None, typer.Option("--limit", min=2, help="Most items of each benchmark.")] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Programs for each problem, for pass@k.")] = 1,
    seed: Annotated[int, typer.Option("--seed", help="Of the items under --limit, of examples and draws.")] = 1,
    scores: Annotated[
        Path | None, typer.Option("--scores", metavar="FOLDER", help="Of the result (default: beside the model).")
    ] = None,
    contamination: Annotated[
        bool,
        typer.Option("--contamination", help="Score also without the items that the run was trained on."),
    ] = False,
    unisolated: Annotated[
        bool, typer.Option("--unisolated-code", help="Run what the model wrote even where it cannot be isolated.")
    ] = False,
    settings: SetOption = None,
    force: Annotated[bool, typer.Option("--force", help="Do this stage again.")] = False,
    smoke: SmokeOption = False,
    dry_run: DryRunOption = False,
    run: RunOption = None,
    runs: RunsOption = Path("runs"),
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """The evaluation of a recipe; or with --tasks, benchmarks of a model. The same command goes on where it stopped."""
    _check_options(context, with_tasks=tasks is not None)
    if tasks is None:
        stage_command("evaluate")(recipe, settings, force, smoke, dry_run, run, runs, as_json, quiet)
        return
    from groundup.cli.talking import load_model
    from groundup.console import Console
    from groundup.evaluation.measure import Decoding
    from groundup.evaluation.scorecard import say, score_benchmarks
    from groundup.stage import MODEL_FOLDER, model_digest

    model, tokenizer, folder = load_model(Path(recipe), stage, to_chat=False)
    folder = folder.resolve()
    beside = folder.parent / _FOLDER if folder.name == MODEL_FOLDER else folder.with_name(f"{folder.name}-{_FOLDER}")
    target = scores if scores is not None else beside
    card = score_benchmarks(
        model,
        tokenizer,
        [name.strip() for name in tasks.split(",") if name.strip()],
        data,
        folder=target,
        identity=model_digest(folder),
        shots=shots,
        limit=limit,
        decoding=Decoding(samples=samples, seed=seed, allow_unisolated=unisolated),
        trained_on=_training_texts(folder) if contamination else None,
        console=Console(quiet=quiet or as_json),
    )
    if as_json:
        print_json(card)
        return
    table = Table("benchmark", "figure", "value", "n")
    for name, one in card["benchmarks"].items():
        for figure, estimate in one["figures"].items():
            table.add_row(name, figure, say(figure, estimate["value"], estimate["stderr"]), f"{estimate['n']:,}")
        if clean := one.get("clean"):
            figure, estimate = next(iter(clean.items()))
            told = f"{figure}, without {one['n_contaminated']:,} items that were trained on"
            table.add_row(name, told, say(figure, estimate["value"], estimate["stderr"]), f"{estimate['n']:,}")
    if card["aggregate"] is not None and card["aggregate"]["n"] > 1:
        whole = card["aggregate"]
        table.add_row(
            "all choices", "centered", say("centered", whole["centered_accuracy"], whole["stderr"]), str(whole["n"])
        )
    result_console().print(table)
    typer.echo(target / "scores.json", err=True)


def _check_options(context: typer.Context, *, with_tasks: bool) -> None:
    """Raise DataError for an option of the other half of the command, which would do nothing."""
    from groundup.errors import DataError

    benchmarks = {"data", "stage", "shots", "limit", "samples", "seed", "scores", "contamination", "unisolated"}
    other = {"settings", "force", "smoke", "dry_run", "run", "runs"} if with_tasks else benchmarks
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in other and source is not None and source.name == "COMMANDLINE":
            where = "with --tasks it does nothing" if with_tasks else "it is about benchmarks, which --tasks names"
            raise DataError(f"{parameter.opts[0]}: {where}.", "Leave it out." if with_tasks else "Add --tasks …")


def _training_texts(folder: Path) -> Callable[[], Iterator[str]]:
    """The training documents of the run that a model is of."""
    from groundup.corpus import stream_documents
    from groundup.errors import ArtifactError

    corpus = folder.parent.parent / "corpus"
    if not corpus.is_dir():
        raise ArtifactError(f"{folder}: --contamination: no run with a corpus is around this model.", "Leave it out.")
    return lambda: (document.text for document in stream_documents(corpus, "train"))
