"""`groundup plan` and `groundup scaling`: what training takes before it runs, and what larger models would reach."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from groundup.cli import options
from groundup.cli.building import recipe_and_run, stopping
from groundup.cli.output import command_line, print_json, print_table
from groundup.errors import Problem, RecipeError
from groundup.recipe import Recipe

if TYPE_CHECKING:
    from groundup.console import Console
    from groundup.training.planning.plan import Plan
    from groundup.training.scaling_law import Optimum, ScalingLaw

FURTHER = (1, 10, 100)
"""Budgets of compute in the table of `scaling`, as multiples of the largest run's."""

app = typer.Typer()


@app.command(
    rich_help_panel=options.PLAN,
    epilog="Examples:  groundup plan demo  ·  groundup plan my.toml --hours 8  ·  groundup plan my.toml --device "
    "h100x8 --budget 500  ·  groundup plan demo --set model.size=1b",
)
def plan(
    recipe: options.Recipe,
    settings: options.Set = None,
    hours: Annotated[float | None, Option(metavar="H", help="As many tokens as fit into so much time.")] = None,
    budget: Annotated[float | None, Option(metavar="DOLLARS", help="As many tokens as so much money buys.")] = None,
    device: Annotated[str | None, Option(metavar="NAME", help="Other devices than this machine's, as h100x8.")] = None,
    price: Annotated[float | None, Option(metavar="DOLLARS", help="One device's hour [the table's].")] = None,
    law: Annotated[Path | None, Option(metavar="FILE", help="A scaling law [runs/scaling/law.json].")] = None,
    no_probe: Annotated[
        bool, Option("--no-probe", help="Measure nothing: answer at once, with an assumed speed.")
    ] = False,
    runs: options.Runs = Path("runs"),
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Say what pretraining takes before it runs: parameters, tokens, memory, time, cost, expected loss.

    A probe of at most 20 seconds measures this machine; other devices are in a table. What does not fit into memory is
    told with what to change, and the exit code is 1.
    """
    # Imported here: loads torch.
    from groundup.console import Console
    from groundup.training.planning.plan import plan as make

    chosen, folder = recipe_and_run(recipe, settings, False, None, runs)
    if device is None and not no_probe:
        Console(quiet=quiet or as_json).note("Measuring this machine, at most 20 seconds …")
    found = make(
        chosen, hours=hours, budget=budget, device=device, price=price, probe=not no_probe, run=folder, law=law
    )
    if as_json:
        print_json(found.to_dict())
    else:
        _show(found)
    found.check()


def _show(plan: Plan) -> None:
    from groundup.console import format_bytes, format_count

    print_table(("plan", plan.recipe, ""), _facts(plan))
    memory, available = plan.fit.estimate, plan.hardware.available
    rows: list[tuple[Any, ...]] = [(name, format_bytes(size), "") for name, size in memory.parts().items() if size]
    later = memory.all_gradients - memory.gradients
    if later > 0:
        place = next((index for index, row in enumerate(rows) if row[0] == "gradients"), 1)
        shown = (format_bytes(memory.gradients), f"{format_bytes(later)} more come when activations have gone")
        rows[place : place + (rows[place][0] == "gradients")] = [("gradients", *shown)]
    verdict = f"{'fits' if plan.fits else 'does not fit'}: {format_bytes(available.total)}, {available.what}"
    rows.append(("all", format_bytes(memory.total), verdict))
    tables: list[tuple[tuple[str, ...], list[tuple[Any, ...]]]] = [
        (("memory, each device", "bytes", f"fullest: {memory.moment}"), rows)
    ]
    rows = [
        (
            one.setting, format_bytes(one.saves), format_bytes(one.total),
            f"{'fits' if one.fits else 'not enough yet'}; {one.cost}",
        )
        for one in plan.fit.suggestions
    ]  # fmt: skip
    tables.append((("to make it fit", "saves", "then needs", ""), rows))
    whole = plan.total_seconds
    rows = [(name, _duration(one), f"{one / whole:.0%}") for name, one in plan.seconds.items() if one >= 0.05]
    rows.append(("all", _duration(whole), "" if plan.dollars is None else f"${plan.dollars:,.2f}"))
    tables.append((("time", "", plan.timings.how), rows))
    rows = [
        (
            one.size, one.parameters, format_count(one.tokens), f"{one.tokens_per_parameter:.3g}",
            "" if one.loss is None else f"{one.loss:.3f}",
            "best" if one == plan.best else "" if one.fits else "does not fit",
        )
        for one in plan.sizes
    ]  # fmt: skip
    tables.append((("size for this budget", "parameters", "tokens", "each", "loss", ""), rows))
    for titles, rows in tables:
        if rows:
            typer.echo()
            print_table(titles, rows)
    for note in plan.notes:
        typer.echo(note)


def _facts(plan: Plan) -> list[tuple[Any, ...]]:
    from groundup.console import format_bytes, format_count

    counts, amount, hardware, expected, fit = plan.parameters, plan.amount, plan.hardware, plan.expected, plan.fit
    several = hardware.count > 1
    parts = f"{counts['non_embedding']:,} of them not in embeddings"
    if counts["active"] != counts["all"]:
        parts += f"; {counts['active']:,} compute a token"
    epochs = "" if amount.epochs is None else f"; the text {amount.epochs:.2g} times"
    more = f"; up to {fit.largest_micro} fit" if fit.largest_micro not in (None, fit.step.micro) else ""
    spread = "" if expected.low is None else f" ({expected.low:.3f} to {expected.high:.3f})"
    loss = ("", expected.why)
    if expected.loss is not None:
        loss = (f"{expected.loss:.3f}", f"nats per token{spread}, by {expected.why}")
    return [
        (
            "device", f"{hardware.count} × {hardware.device}" if several else hardware.device,
            f"{format_bytes(hardware.available.total)} of memory" + (" each" if several else ""),
        ),
        ("parameters", counts["all"], parts),
        ("tokens", amount.tokens, amount.why + epochs),
        ("steps", amount.steps, f"{plan.settings.batch_size} rows × {fit.step.length:,} tokens"),
        ("micro-batch", fit.step.micro, fit.micro_why + more),
        ("precision", hardware.precision, hardware.precision_why),
        ("FLOPs", f"{plan.flops:.2e}", f"at {plan.timings.flops:.2e} a second"),
        ("speed", f"{format_count(plan.tokens_per_second)} tok/s", "of the training steps"),
        ("validation loss", *loss),
    ]  # fmt: skip


def _duration(seconds: float) -> str:
    """`2:10`, `1:02:10`, `12.5 days`, `1,200 days`."""
    from groundup.console import format_duration

    days = seconds / 86_400
    return format_duration(seconds) if days < 2 else f"{days:.1f} days" if days < 100 else f"{days:,.0f} days"


@app.command(
    rich_help_panel=options.PLAN,
    epilog="Examples:  groundup scaling demo --dry-run  ·  groundup scaling demo  ·  groundup scaling my.toml "
    "--sizes 1m,2m,4m,8m --minutes 60",
)
def scaling(
    recipe: options.Recipe,
    settings: options.Set = None,
    sizes: Annotated[str | None, Option(metavar="N,N,…", help="Parameters in all [200k,500k,1m,2m].")] = None,
    tokens: Annotated[str | None, Option(metavar="D,D,…", help="Token budgets, each for each size.")] = None,
    minutes: Annotated[float | None, Option(metavar="M", help="Choose the budgets for so much time here.")] = None,
    out: Annotated[
        Path | None, Option("--out", "-o", metavar="FOLDER", help="The sweep's folder (default: RUNS/scaling).")
    ] = None,
    runs: options.Runs = Path("runs"),
    dry_run: Annotated[
        bool, Option("--dry-run", help="Say what would be trained and how long it takes, and train nothing.")
    ] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Fit a scaling law: train a few small models on a few budgets, and predict what larger ones reach.

    Uses the recipe's text, tokenizer and shards (made first where they are missing) and its architecture. Finished
    runs are kept; interrupted, the same command goes on. Leaves points.jsonl, law.json and scaling.svg.
    """
    from groundup.console import Console
    from groundup.distributed import current_world
    from groundup.pipeline import build
    from groundup.training.scaling_sweep import DEFAULT_SIZES, check_question, check_start, scaling_sweep

    chosen, folder = recipe_and_run(recipe, settings, False, None, runs)
    asked: dict[str, Any] = {
        "out": out or runs / "scaling",
        "sizes": [size.strip() for size in sizes.split(",")] if sizes is not None else list(DEFAULT_SIZES),
        "tokens": _budgets(tokens) if tokens is not None else None,
        "minutes": minutes,
    }
    world = current_world()
    console = Console(quiet=quiet or not world.is_first)
    check_start(chosen, asked["out"])
    if dry_run:
        _show_plan(chosen, folder, asked, as_json, console)
        return
    check_question(asked["sizes"], asked["tokens"], asked["minutes"])
    with stopping("Finished runs and stages are kept, and no file is half written."):
        run = build(chosen, folder, only=["shards"], console=console)
        law = scaling_sweep(chosen, run.folder("shards"), console=console, **asked)
    if not world.is_first:
        return
    largest = max(point.flops for point in law.points)
    optima = [law.compute_optimal(factor * largest) for factor in FURTHER]
    if as_json:
        print_json({"folder": str(asked["out"]), **law.to_dict(), "compute_optimal": [asdict(row) for row in optima]})
    elif not quiet:
        _show_law(law, optima, asked["out"])


def _show_law(law: ScalingLaw, optima: list[Optimum], out: Path) -> None:
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
    print_table(("L(N, D) = E + A / N^alpha + B / D^beta", "", f"{LEVEL:.0%} interval"), rows, header_style="dim")
    typer.echo(
        f"n = {len(law.points)} runs · scatter about the law {law.noise:.2%} of loss · a run that the law has not seen "
        f"is off by {law.left_out_error:.2%} (rms)\n"
    )
    print_table(
        ("compute", "best N", "best D", "D / N", "loss", f"{LEVEL:.0%} interval", ""),
        [
            (
                f"{row.flops:.1e}", format_count(row.n_parameters), format_count(row.n_tokens),
                f"{row.n_tokens / row.n_parameters:.1f}", f"{row.prediction.loss:.3f}",
                f"{row.prediction.low:.3f} to {row.prediction.high:.3f}", _reach(row, law),
            )
            for row in optima
        ],
        header_style="dim",
    )  # fmt: skip
    typer.echo(
        f"\nSee it:  {out / 'scaling.svg'}      Use it:  {command_line('plan', law.data.recipe if law.data else '')}"
    )


def _reach(row: Optimum, law: ScalingLaw) -> str:
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


def _show_plan(recipe: Recipe, folder: Path, asked: dict[str, Any], as_json: bool, console: Console) -> None:
    """The runs, what each costs, and which are there; the pipeline's stages as `build --dry-run` says them."""
    from groundup.console import format_duration
    from groundup.pipeline import plan
    from groundup.preview import check_recipe
    from groundup.run import Run
    from groundup.training.process import limited_threads
    from groundup.training.scaling_sweep import plan_sweep, seconds_of

    check_recipe(recipe, recipe.name)
    run = Run(folder)
    missing = [item.stage.name for item in plan(recipe, run, only=["shards"]) if item.state != "done"]
    told: dict[str, Any] = {"folder": str(asked["out"]), "missing_stages": missing, "runs": None, "seconds": None}
    if missing:
        if as_json:
            print_json(told)
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
    runs = [(run, took, sweep.finished(run) is not None) for run, took in zip(sweep.runs, seconds, strict=True)]
    left = sum(took for _, took, is_done in runs if not is_done)
    if as_json:
        rows = [
            {
                "n_parameters": run.n_parameters, "n_tokens": run.tokens, "batch_size": run.settings.batch_size,
                "sequence_length": run.sequence_length, "lr": run.settings.lr, "flops": run.flops, "seconds": took,
                "done": is_done,
            }
            for run, took, is_done in runs
        ]  # fmt: skip
        print_json({**told, "runs": rows, "seconds": left})
        return
    names = ("parameters", "blocks × width", "tokens", "a parameter", "passes", "batch", "lr", "FLOPs", "time", "")
    print_table(
        names,
        [
            (
                run.n_parameters, f"{run.config.n_layers} × {run.config.d_model}", run.tokens,
                f"{run.tokens / run.n_parameters:.1f}", f"{run.tokens / sweep.data.train_tokens:.1f}",
                f"{run.settings.batch_size} × {run.sequence_length}", f"{run.settings.lr:g}", f"{run.flops:.1e}",
                format_duration(took), "there already" if is_done else "",
            )
            for run, took, is_done in runs
        ],
        header_style="dim",
    )  # fmt: skip
    typer.echo(
        f"\n{len(runs)} runs · {sum(run.flops for run in sweep.runs):.2g} FLOPs · about {format_duration(left)} "
        f"to go here, by a few steps of each model\nfolder {sweep.out}"
    )


def _budgets(text: str) -> list[int]:
    """Token counts that "200k,1.6m" means."""
    from groundup.model.ladder import parse_count

    parts = text.split(",")
    numbers = [count for part in parts if (count := parse_count(part)) is not None]
    if len(numbers) < len(parts):
        problem = Problem(f"--tokens {text}", "is no list of numbers.", "Write it as 200k,400k,1.6m.")
        raise RecipeError("command line", [problem])
    return numbers
