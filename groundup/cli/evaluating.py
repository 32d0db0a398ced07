"""Commands that measure: `evaluate`, also with benchmarks, and `compare`."""

from __future__ import annotations

from dataclasses import asdict
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


def add_to(app: typer.Typer) -> None:
    """Add `compare` to the command line; `evaluate` stands among the stages."""
    app.command(
        rich_help_panel="Look at runs, recipes and this machine",
        epilog="Example:  groundup compare runs/demo/pretrain/benchmarks runs/demo/sft/benchmarks",
    )(compare)


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
        int | None,
        typer.Option(
            "--contamination",
            metavar="N",
            min=8,
            max=13,
            help="Score also without items of which N words in a row (13 is usual) stand in what the run learned from.",
        ),
    ] = None,
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
    from groundup.evaluation.contamination import NGRAM, training_texts
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
        trained_on=None if contamination is None else training_texts(folder),
        ngram=contamination or NGRAM,
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


def compare(
    first: Annotated[Path, typer.Argument(metavar="SCORES", help="A folder that `groundup evaluate --tasks` wrote.")],
    second: Annotated[Path, typer.Argument(metavar="SCORES", help="Another one, of the same items.")],
    as_json: JsonOption = False,
) -> None:
    """Compare two models item by item: differences with intervals, corrected for how many are looked at."""
    from groundup.evaluation.scorecard import compare_cards

    found = compare_cards(first, second)
    if as_json:
        print_json([asdict(one) for one in found])
        return
    table = Table("benchmark", "first", "second", "difference (95 %)", "p", "verdict")
    for one in found:
        interval = f"{one.value:+.3f} [{one.low:+.3f}, {one.high:+.3f}]"
        table.add_row(one.benchmark, f"{one.first:.3f}", f"{one.second:.3f}", interval, f"{one.p:.3f}", one.verdict)
    result_console().print(table)
