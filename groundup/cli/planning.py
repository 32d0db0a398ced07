"""`groundup plan`: what a training run takes, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from groundup.cli.building import recipe_and_run
from groundup.cli.options import (
    JsonOption,
    QuietOption,
    RecipeArgument,
    RunsOption,
    SetOption,
    print_json,
    print_table,
    result_console,
)

if TYPE_CHECKING:
    from groundup.training.planning.plan import Plan


def add_to(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(
        rich_help_panel="Plan",
        epilog="Examples:  groundup plan demo  ·  groundup plan my.toml --hours 8  ·  groundup plan my.toml --device "
        "h100x8 --budget 500  ·  groundup plan demo --set model.size=1b",
    )(plan)


def plan(
    recipe: RecipeArgument,
    settings: SetOption = None,
    hours: Annotated[
        float | None, typer.Option("--hours", metavar="H", help="As many tokens as fit into so much time.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option("--budget", metavar="DOLLARS", help="As many tokens as so much money buys.")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", metavar="NAME", help="Other devices than this machine's, as h100x8.")
    ] = None,
    price: Annotated[
        float | None, typer.Option("--price", metavar="DOLLARS", help="One device's hour [the table's].")
    ] = None,
    law: Annotated[
        Path | None, typer.Option("--law", metavar="FILE", help="A scaling law [runs/scaling/law.json].")
    ] = None,
    no_probe: Annotated[
        bool, typer.Option("--no-probe", help="Measure nothing: answer at once, with an assumed speed.")
    ] = False,
    runs: RunsOption = Path("runs"),
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Say what pretraining takes before it runs: parameters, tokens, memory, time, cost, expected loss.

    A probe of at most 20 seconds measures this machine; other devices are in a table. What does not fit into memory is
    told with what to change, and the exit code is 1.
    """
    # Imported here: loads torch.
    from groundup.console import Console
    from groundup.training.planning.plan import plan as make

    chosen, folder = recipe_and_run(recipe, settings or [], False, None, runs)
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
    from groundup.console import format_bytes

    print_table(("plan", plan.recipe, ""), _facts(plan))
    typer.echo()
    memory = plan.fit.estimate
    rows: list[tuple[str, ...]] = [(name, format_bytes(size), "") for name, size in memory.parts().items() if size]
    later = memory.all_gradients - memory.gradients
    if later > 0:
        place = next((index for index, row in enumerate(rows) if row[0] == "gradients"), 1)
        shown = (format_bytes(memory.gradients), f"{format_bytes(later)} more come when activations have gone")
        rows[place : place + (rows[place][0] == "gradients")] = [("gradients", *shown)]
    verdict = "fits" if plan.fits else "does not fit"
    available = plan.hardware.available
    rows.append(("all", format_bytes(memory.total), f"{verdict}: {format_bytes(available.total)}, {available.what}"))
    print_table(("memory, each device", "bytes", f"fullest: {memory.moment}"), rows, right=(1,))
    if plan.fit.suggestions:
        typer.echo()
        print_table(("to make it fit", "saves", "then needs", ""), _suggestions(plan), right=(1, 2))
    typer.echo()
    whole = plan.total_seconds
    times = [(name, _duration(one), f"{one / whole:.0%}") for name, one in plan.seconds.items() if one >= 0.05]
    times.append(("all", _duration(whole), "" if plan.dollars is None else f"${plan.dollars:,.2f}"))
    print_table(("time", "", plan.timings.how), times, right=(1,))
    if plan.sizes:
        typer.echo()
        print_table(("size for this budget", "parameters", "tokens", "each", "loss", ""), _sizes(plan), right=(1,))
    for note in plan.notes:
        result_console().print(note)


def _facts(plan: Plan) -> list[tuple[str, ...]]:
    from groundup.console import format_bytes, format_count

    counts, amount, hardware, expected = plan.parameters, plan.amount, plan.hardware, plan.expected
    parts = f"{counts['non_embedding']:,} of them not in embeddings"
    if counts["active"] != counts["all"]:
        parts += f"; {counts['active']:,} compute a token"
    epochs = "" if amount.epochs is None else f"; the text {amount.epochs:.2g} times"
    devices = hardware.device if hardware.count == 1 else f"{hardware.count} × {hardware.device}"
    largest = plan.fit.largest_micro
    micro = plan.fit.micro_why
    if largest is not None and largest != plan.fit.step.micro:
        micro += f"; up to {largest} fit"
    rows: list[tuple[str, ...]] = [
        (
            "device",
            devices,
            f"{format_bytes(hardware.available.total)} of memory" + (" each" if hardware.count > 1 else ""),
        ),
        ("parameters", f"{counts['all']:,}", parts),
        ("tokens", f"{amount.tokens:,}", amount.why + epochs),
        ("steps", f"{amount.steps:,}", f"{plan.settings.batch_size} rows × {plan.fit.step.length:,} tokens"),
        ("micro-batch", f"{plan.fit.step.micro:,}", micro),
        ("precision", hardware.precision, hardware.precision_why),
        ("FLOPs", f"{plan.flops:.2e}", f"at {plan.timings.flops:.2e} a second"),
        ("speed", f"{format_count(plan.tokens_per_second)} tok/s", "of the training steps"),
    ]
    if expected.loss is None:
        return [*rows, ("validation loss", "", expected.why)]
    spread = "" if expected.low is None else f" ({expected.low:.3f} to {expected.high:.3f})"
    return [*rows, ("validation loss", f"{expected.loss:.3f}", f"nats per token{spread}, by {expected.why}")]


def _suggestions(plan: Plan) -> list[tuple[str, ...]]:
    from groundup.console import format_bytes

    rows: list[tuple[str, ...]] = []
    for one in plan.fit.suggestions:
        verdict = "fits" if one.fits else "not enough yet"
        rows.append((one.setting, format_bytes(one.saves), format_bytes(one.total), f"{verdict}; {one.cost}"))
    return rows


def _sizes(plan: Plan) -> list[tuple[str, ...]]:
    from groundup.console import format_count

    rows: list[tuple[str, ...]] = []
    for one in plan.sizes:
        word = "best" if one == plan.best else "" if one.fits else "does not fit"
        loss = "" if one.loss is None else f"{one.loss:.3f}"
        each = f"{one.tokens_per_parameter:.3g}"
        rows.append((one.size, f"{one.parameters:,}", format_count(one.tokens), each, loss, word))
    return rows


def _duration(seconds: float) -> str:
    """`2:10`, `1:02:10`, `12.5 days`, `1,200 days`."""
    from groundup.console import format_duration

    days = seconds / 86_400
    return format_duration(seconds) if days < 2 else f"{days:.1f} days" if days < 100 else f"{days:,.0f} days"
