"""`groundup scaling`: a small sweep of models, and the law that says what larger ones would reach."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from groundup.cli.building import recipe_and_run, stopped_by_sigterm
from groundup.cli.options import (
    JsonOption,
    QuietOption,
    RecipeArgument,
    RunsOption,
    SetOption,
    command_line,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from groundup.console import Console
    from groundup.recipe import Recipe
    from groundup.training.scaling_law import Optimum, ScalingLaw
    from groundup.training.scaling_sweep import Sweep

FURTHER = (1, 10, 100)
"""The table's budgets of compute, as multiples of the largest run's."""


def add_to(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(
        rich_help_panel="Plan",
        epilog="Examples:  groundup scaling demo --dry-run  ·  groundup scaling demo  ·  groundup scaling my.toml "
        "--sizes 1m,2m,4m,8m --minutes 60",
    )(scaling)


def scaling(
    recipe: RecipeArgument,
    settings: SetOption = None,
    sizes: Annotated[
        str | None, typer.Option("--sizes", metavar="N,N,…", help="Parameters in all [200k,500k,1m,2m].")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option("--tokens", metavar="D,D,…", help="Token budgets, each for each size.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option("--minutes", metavar="M", help="Choose the budgets for so much time here.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FOLDER", help="The sweep's folder (default: RUNS/scaling).")
    ] = None,
    runs: RunsOption = Path("runs"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be trained and how long it takes, and train nothing.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Fit a scaling law: train a few small models on a few budgets, and predict what larger ones reach.

    Uses the recipe's text, tokenizer and shards (made first where they are missing) and its architecture. Finished
    runs are kept; interrupted, the same command goes on. Leaves points.jsonl, law.json and scaling.svg.
    """
    from groundup.console import Console
    from groundup.distributed import current_world
    from groundup.training.scaling_sweep import DEFAULT_SIZES

    chosen, folder = recipe_and_run(recipe, settings or [], False, None, runs)
    asked: dict[str, Any] = {
        "out": out or runs / "scaling",
        "sizes": [size.strip() for size in sizes.split(",")] if sizes is not None else list(DEFAULT_SIZES),
        "tokens": _budgets(tokens) if tokens is not None else None,
        "minutes": minutes,
    }
    world = current_world()
    console = Console(quiet=quiet or not world.is_first)
    if dry_run:
        _show_plan(chosen, folder, asked, as_json, console)
        return
    law = _sweep(chosen, folder, asked, console)
    if not world.is_first:
        return
    if as_json:
        print_json(
            {"folder": str(asked["out"]), **law.to_dict(), "compute_optimal": [asdict(row) for row in _optima(law)]}
        )
    elif not quiet:
        show_law(law, asked["out"])


def _sweep(recipe: Recipe, folder: Path, asked: dict[str, Any], console: Console) -> ScalingLaw:
    from groundup.errors import Interrupted
    from groundup.pipeline import build
    from groundup.training.scaling_sweep import check_question, check_start, scaling_sweep

    check_start(recipe, asked["out"])
    check_question(asked["sizes"], asked["tokens"], asked["minutes"])
    try:
        with stopped_by_sigterm():
            run = build(recipe, folder, only=["shards"], console=console)
            return scaling_sweep(recipe, run.folder("shards"), console=console, **asked)
    except KeyboardInterrupt as error:
        raise Interrupted("Stopped. Finished runs and stages are kept, and no file is half written.") from error


def show_law(law: ScalingLaw, out: Path) -> None:
    """The law, how well it fits, and what it says of more compute."""
    from groundup.console import format_count
    from groundup.training.scaling_law import LEVEL

    meanings = {
        "e": "E, nats per token that nothing takes away", "a": "A", "alpha": "alpha, of parameters N", "b": "B",
        "beta": "beta, of tokens D",
    }  # fmt: skip
    rows = [
        (meanings[name], f"{getattr(law, name):.3g}", f"{low:.3g} to {high:.3g}")
        for name, (low, high) in law.intervals().items()
    ]
    titles = ("L(N, D) = E + A / N^alpha + B / D^beta", "", f"{LEVEL:.0%} interval")
    print_table(titles, rows, right=(1, 2), header_style="dim")
    typer.echo(
        f"n = {len(law.points)} runs · scatter about the law {law.noise:.2%} of loss · a run that the law has not seen "
        f"is off by {law.left_out_error:.2%} (rms)\n"
    )
    optima = [
        (
            f"{row.flops:.1e}",
            format_count(row.n_parameters),
            format_count(row.n_tokens),
            f"{row.n_tokens / row.n_parameters:.1f}",
            f"{row.prediction.loss:.3f}",
            f"{row.prediction.low:.3f} to {row.prediction.high:.3f}",
            reach(row, law),
        )
        for row in _optima(law)
    ]
    columns = ("compute", "best N", "best D", "D / N", "loss", f"{LEVEL:.0%} interval", "")
    print_table(columns, optima, right=range(6), header_style="dim")
    typer.echo(
        f"\nSee it:  {out / 'scaling.svg'}      Use it:  {command_line('plan', law.data.recipe if law.data else '')}"
    )


def reach(row: Optimum, law: ScalingLaw) -> str:
    """How far from what was measured a prediction is, in words."""
    from groundup.training.scaling_sweep import MOST_EPOCHS

    if row.beyond > 1.0:
        words = f"extrapolated: {row.beyond:.3g}× the compute of the largest run"
    elif row.prediction.beyond > 1.0:
        words = f"extrapolated: {row.prediction.beyond:.3g}× beyond the sweep's sizes or budgets"
    else:
        words = "within the sweep"
    passes = row.n_tokens / law.data.train_tokens if law.data is not None else 0.0
    return f"{words}; {passes:.1f} passes over this text: needs more" if passes > MOST_EPOCHS else words


def _optima(law: ScalingLaw) -> list[Optimum]:
    largest = max(point.flops for point in law.points)
    return [law.compute_optimal(factor * largest) for factor in FURTHER]


def _show_plan(recipe: Recipe, folder: Path, asked: dict[str, Any], as_json: bool, console: Console) -> None:
    """The runs, what each costs, and which are there; the pipeline's stages as `build --dry-run` says them."""
    from groundup.pipeline import plan
    from groundup.preview import check_recipe
    from groundup.run import Run
    from groundup.training.process import limited_threads
    from groundup.training.scaling_sweep import check_start, plan_sweep, seconds_of

    check_start(recipe, asked["out"])
    check_recipe(recipe, recipe.name)
    run = Run(folder)
    missing = [item.stage.name for item in plan(recipe, run, only=["shards"]) if item.state != "done"]
    if missing:
        if as_json:
            print_json({"folder": str(asked["out"]), "missing_stages": missing, "runs": None, "seconds": None})
            return
        typer.echo(
            f"{folder}: {', '.join(missing)} would be done first; how much text there is, and so which budgets and how "
            f"long, is known then.\nDo that now:  {command_line('shards', recipe.name)}"
        )
        return
    with limited_threads(recipe.threads):
        sweep = plan_sweep(recipe, run.folder("shards"), **asked)
        seconds = seconds_of(sweep.runs)
    for note in sweep.notes:
        console.warn(note)
    if as_json:
        print_json({"folder": str(sweep.out), "missing_stages": [], **_plan_json(sweep, seconds)})
        return
    _show_runs(sweep, seconds)


def _show_runs(sweep: Sweep, seconds: list[float]) -> None:
    from groundup.console import format_duration

    names = ("parameters", "blocks × width", "tokens", "a parameter", "passes", "batch", "lr", "FLOPs", "time", "")
    done = [sweep.finished(run) is not None for run in sweep.runs]
    rows = [
        (
            f"{run.n_parameters:,}",
            f"{run.config.n_layers} × {run.config.d_model}",
            f"{run.tokens:,}",
            f"{run.tokens / run.n_parameters:.1f}",
            f"{run.tokens / sweep.data.train_tokens:.1f}",
            f"{run.settings.batch_size} × {run.sequence_length}",
            f"{run.settings.lr:g}",
            f"{run.flops:.1e}",
            format_duration(took),
            "there already" if is_there else "",
        )
        for run, took, is_there in zip(sweep.runs, seconds, done, strict=True)
    ]
    print_table(names, rows, right=range(9), header_style="dim")
    left = sum(took for took, is_there in zip(seconds, done, strict=True) if not is_there)
    typer.echo(
        f"\n{len(sweep.runs)} runs · {sum(run.flops for run in sweep.runs):.2g} FLOPs · about {format_duration(left)} "
        f"to go here, by a few steps of each model\nfolder {sweep.out}"
    )


def _plan_json(sweep: Sweep, seconds: list[float]) -> dict[str, Any]:
    rows = [
        {
            "n_parameters": run.n_parameters,
            "n_tokens": run.tokens,
            "batch_size": run.settings.batch_size,
            "sequence_length": run.sequence_length,
            "lr": run.settings.lr,
            "flops": run.flops,
            "seconds": took,
            "done": sweep.finished(run) is not None,
        }
        for run, took in zip(sweep.runs, seconds, strict=True)
    ]
    left = sum(took for row, took in zip(rows, seconds, strict=True) if not row["done"])
    return {"runs": rows, "seconds": left}


def _budgets(text: str) -> list[int]:
    """Token counts that "200k,1.6m" means."""
    from groundup.errors import Problem, RecipeError
    from groundup.model.ladder import parse_count

    parts = text.split(",")
    numbers = [count for part in parts if (count := parse_count(part)) is not None]
    if len(numbers) < len(parts):
        problem = Problem(f"--tokens {text}", "is no list of numbers.", "Write it as 200k,400k,1.6m.")
        raise RecipeError("command line", [problem])
    return numbers
