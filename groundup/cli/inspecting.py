"""Commands that look: `report`, `status`, `runs`, `recipe`, `doctor`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from groundup.cli.options import (
    JsonOption,
    RecipeArgument,
    RunArgument,
    RunsOption,
    SetOption,
    command_line,
    print_json,
    print_table,
    result_console,
)

PANEL = "Look at runs, recipes and this machine"
recipe_app = typer.Typer(help="Look at recipes, check them, make new ones.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command(
        rich_help_panel=PANEL, epilog="Examples:  groundup report runs/demo  ·  groundup report runs/demo --open"
    )(report)
    app.command(
        rich_help_panel=PANEL, epilog="Examples:  groundup status runs/demo  ·  groundup status runs/demo --json"
    )(status)
    app.command("runs", rich_help_panel=PANEL, epilog="Examples:  groundup runs  ·  groundup runs --json")(
        list_all_runs
    )
    app.command(rich_help_panel=PANEL, epilog="Examples:  groundup doctor  ·  groundup doctor --json")(doctor)
    app.add_typer(recipe_app, name="recipe", rich_help_panel=PANEL)


def report(
    run: RunArgument,
    show: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Write the run's page again: curves, samples, scores, what was dropped, the recipe, the machine."""
    from groundup.report.page import write_report
    from groundup.run import Run

    path = write_report(Run.existing(run))
    typer.echo(path)
    if show:
        typer.launch(str(path))


def status(run: RunArgument, as_json: JsonOption = False) -> None:
    """What of a run is done, changed, interrupted or missing, and whether someone works on it now."""
    from groundup.pipeline import plan
    from groundup.run import Run

    found = Run.existing(run)
    plans = plan(found.recipe, found, strict=False)
    manifests = {stage_plan.stage.name: found.manifest(stage_plan.stage.name) for stage_plan in plans}
    if as_json:
        print_json(
            {
                "run": str(found.root),
                "working": found.is_worked_on(),
                "stages": {
                    stage_plan.stage.name: {
                        "state": stage_plan.state,
                        "seconds": manifest.seconds if (manifest := manifests[stage_plan.stage.name]) else None,
                        "summary": manifest.summary if manifest else None,
                        "problem": stage_plan.problem,
                    }
                    for stage_plan in plans
                },
            }
        )
        return
    seconds = [f"{manifest.seconds:.1f}" if manifest else "" for manifest in manifests.values()]
    shown = [(one.stage.name, one.state, took) for one, took in zip(plans, seconds, strict=True)]
    print_table(("stage", "state", "seconds"), shown, right=(2,))
    for stage_plan in plans:
        if stage_plan.problem is not None:
            typer.echo(f"{stage_plan.stage.name}: {stage_plan.problem}", err=True)
    if found.is_worked_on():
        typer.echo("A process is working on it now.")
    elif any(stage_plan.state != "done" for stage_plan in plans):
        typer.echo(f"Go on:  {command_line('build', str(found.root))}")


def list_all_runs(runs: RunsOption = Path("runs"), as_json: JsonOption = False) -> None:
    """The runs in a folder, newest first."""
    from groundup.run import RECIPE_FILE, list_runs
    from groundup.stage import stages_done

    rows: list[dict[str, Any]] = []
    for run in list_runs(runs):
        done = stages_done(run)
        changed = (run.root / RECIPE_FILE).stat().st_mtime
        rows.append({"run": str(run.root), "done": done, "recipe_written": changed})
    if as_json:
        print_json(rows)
        return
    if not rows:
        typer.echo(f"No runs in {runs}. Make one:  {command_line('build', 'demo')}")
        return
    written = [time.strftime("%Y-%m-%d %H:%M", time.localtime(row["recipe_written"])) for row in rows]
    shown = [
        (row["run"], when, " ".join(row["done"]) or "nothing yet") for row, when in zip(rows, written, strict=True)
    ]
    print_table(("run", "recipe written", "done"), shown)


def doctor(as_json: JsonOption = False, runs: RunsOption = Path("runs")) -> None:
    """Look at this machine: what to expect of it, and what to fix."""
    from groundup.cli.doctor import examine, render, to_json

    findings = examine(runs=runs)
    if as_json:
        print_json(to_json(findings))
    else:
        result_console().print(render(findings))
    if any(finding.status == "fail" for finding in findings):
        raise typer.Exit(1)


@recipe_app.command("show", epilog="Examples:  groundup recipe show demo  ·  groundup recipe show my.toml --set seed=2")
def recipe_show(recipe: RecipeArgument, settings: SetOption = None, as_json: JsonOption = False) -> None:
    """Print a recipe with every default filled in, and each derived value with its reason."""
    from groundup.preview import derived_values
    from groundup.recipe import read_recipe, recipe_toml, resolve

    chosen = read_recipe(_of_run(recipe), settings or [])
    derived = derived_values(chosen)
    if as_json:
        print_json(
            {
                "recipe": resolve(chosen).model_dump(mode="json"),
                "derived": [{"setting": name, "value": value, "reason": reason} for name, value, reason in derived],
            }
        )
        return
    typer.echo(recipe_toml(chosen, all_settings=True))
    typer.echo("# Derived:")
    for name, value, reason in derived:
        typer.echo(f"#   {name} = {value}  ({reason})")


@recipe_app.command("check", epilog="Examples:  groundup recipe check my.toml")
def recipe_check(recipe: RecipeArgument, settings: SetOption = None) -> None:
    """Check a recipe: every problem at once, each with a way out; exit code 2 if there are any."""
    from groundup.errors import DataError, Problem, RecipeError
    from groundup.preview import check_recipe
    from groundup.recipe import read_recipe

    chosen = read_recipe(_of_run(recipe), settings or [])
    try:
        check_recipe(chosen, recipe)
    except DataError as error:
        raise RecipeError(recipe, [Problem("inputs", error.message, error.fix)]) from error
    typer.echo(f"{recipe}: no problems.")


@recipe_app.command(
    "new",
    epilog="Examples:  groundup recipe new my.toml  ·  groundup recipe new my.toml --like shakespeare  ·  "
    "groundup recipe new my.toml --all  ·  groundup recipe new --list",
)
def recipe_new(
    path: Annotated[Path | None, typer.Argument(metavar="FILE", help="The file to write.")] = None,
    like: Annotated[str, typer.Option("--like", help="The recipe or run to start from.")] = "demo",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    every: Annotated[
        bool, typer.Option("--all", help="Every setting there is, each with its default and its comment.")
    ] = False,
    names: Annotated[bool, typer.Option("--list", help="List the shipped recipes and the model presets.")] = False,
) -> None:
    """Write a new recipe: what another one sets, or with --all every setting there is."""
    from groundup.errors import GroundupError
    from groundup.files import write_text
    from groundup.recipe import read_recipe, recipe_toml, shipped_recipes

    if names or path is None:
        from groundup.model import preset_names

        for name, about in shipped_recipes().items():
            typer.echo(f"{name:<12} {about}")
        typer.echo(f"\npresets: {', '.join(preset_names())}")
        if path is None and not names:
            typer.echo(f"\nMake one:  {command_line('recipe', 'new', 'my.toml')}")
        return
    if path.exists() and not overwrite:
        raise GroundupError(f"{path}: is there already.", "Choose another name, or add --overwrite.")
    recipe = read_recipe(_of_run(like))
    renamed = recipe.model_copy(update={"name": path.stem}) if _fits_as_name(path.stem) else recipe
    write_text(path, recipe_toml(renamed, all_settings=every, comments=True))
    typer.echo(f"{path}: written. Change it, then:  {command_line('build', str(path))}")


def _of_run(source: str) -> str:
    """A run's folder stands for the recipe in it."""
    inside = Path(source) / "recipe.toml"
    return str(inside) if inside.is_file() else source


def _fits_as_name(stem: str) -> bool:
    return bool(stem) and stem[0].isalnum() and all(letter.isalnum() or letter in "._-" for letter in stem)
