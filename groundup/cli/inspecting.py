"""Commands that look: `report`, `status`, `runs`, `recipe`, `doctor`."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from groundup.cli import options
from groundup.cli.building import recipe_and_run
from groundup.cli.output import command_line, print_json, print_table, result_console
from groundup.errors import DataError, GroundupError, Problem, RecipeError
from groundup.files import write_text
from groundup.recipe import recipe_toml, resolve, shipped_recipes

app = typer.Typer()
recipe_app = typer.Typer(help="Look at recipes, check them, make new ones.", no_args_is_help=True)
app.add_typer(recipe_app, name="recipe", rich_help_panel=options.LOOK)


@app.command(
    rich_help_panel=options.LOOK, epilog="Examples:  groundup report runs/demo  ·  groundup report runs/demo --open"
)
def report(
    run: options.Run, show: Annotated[bool, Option("--open", help="Open the page in a browser.")] = False
) -> None:
    """Write the run's page again: curves, samples, scores, what was dropped, the recipe, the machine."""
    from groundup.report.page import write_report
    from groundup.run import Run

    path = write_report(Run.existing(run))
    typer.echo(path)
    if show:
        typer.launch(str(path))


@app.command(
    rich_help_panel=options.LOOK, epilog="Examples:  groundup status runs/demo  ·  groundup status runs/demo --json"
)
def status(run: options.Run, as_json: options.Json = False) -> None:
    """What of a run is done, changed, interrupted or missing, and whether someone works on it now."""
    from groundup.pipeline import plan
    from groundup.run import Run

    found = Run.existing(run)
    plans = {one.stage.name: one for one in plan(found.recipe, found, strict=False)}
    manifests = {name: found.manifest(name) for name in plans}
    if as_json:
        stages = {
            name: {
                "state": one.state, "seconds": manifest.seconds if (manifest := manifests[name]) else None,
                "summary": manifest.summary if manifest else None, "problem": one.problem,
            }
            for name, one in plans.items()
        }  # fmt: skip
        print_json({"run": str(found.root), "working": found.is_worked_on(), "stages": stages})
        return
    rows = [
        (name, one.state, f"{manifest.seconds:.1f}" if (manifest := manifests[name]) else "")
        for name, one in plans.items()
    ]
    print_table(("stage", "state", "seconds"), rows)
    for name, one in plans.items():
        if one.problem is not None:
            typer.echo(f"{name}: {one.problem}", err=True)
    if found.is_worked_on():
        typer.echo("A process is working on it now.")
    elif any(one.state != "done" for one in plans.values()):
        typer.echo(f"Go on:  {command_line('build', str(found.root))}")


@app.command("runs", rich_help_panel=options.LOOK, epilog="Examples:  groundup runs  ·  groundup runs --json")
def list_all_runs(runs: options.Runs = Path("runs"), as_json: options.Json = False) -> None:
    """The runs in a folder, newest first."""
    from groundup.run import RECIPE_FILE, list_runs
    from groundup.stage import stages_done

    rows = [(str(run.root), stages_done(run), (run.root / RECIPE_FILE).stat().st_mtime) for run in list_runs(runs)]
    if as_json:
        print_json([{"run": run, "done": done, "recipe_written": when} for run, done, when in rows])
    elif not rows:
        typer.echo(f"No runs in {runs}. Make one:  {command_line('build', 'demo')}")
    else:
        shown = [
            (run, time.strftime("%Y-%m-%d %H:%M", time.localtime(when)), " ".join(done) or "nothing yet")
            for run, done, when in rows
        ]
        print_table(("run", "recipe written", "done"), shown)


@app.command(rich_help_panel=options.LOOK, epilog="Examples:  groundup doctor  ·  groundup doctor --json")
def doctor(as_json: options.Json = False, runs: options.Runs = Path("runs")) -> None:
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
def recipe_show(recipe: options.Recipe, settings: options.Set = None, as_json: options.Json = False) -> None:
    """Print a recipe with every default filled in, and each derived value with its reason."""
    from groundup.preview import derived_values

    chosen, _ = recipe_and_run(recipe, settings, False, None, Path())
    derived = derived_values(chosen)
    if as_json:
        told = [{"setting": name, "value": value, "reason": reason} for name, value, reason in derived]
        print_json({"recipe": resolve(chosen).model_dump(mode="json"), "derived": told})
        return
    typer.echo(f"{recipe_toml(chosen, all_settings=True)}\n# Derived:")
    for name, value, reason in derived:
        typer.echo(f"#   {name} = {value}  ({reason})")


@recipe_app.command("check", epilog="Examples:  groundup recipe check my.toml")
def recipe_check(recipe: options.Recipe, settings: options.Set = None) -> None:
    """Check a recipe: every problem at once, each with a way out; exit code 2 if there are any."""
    from groundup.preview import check_recipe

    chosen, _ = recipe_and_run(recipe, settings, False, None, Path())
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
    path: Annotated[Path | None, Argument(metavar="FILE", help="The file to write.")] = None,
    like: Annotated[str, Option(help="The recipe or run to start from.")] = "demo",
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an existing file.")] = False,
    every: Annotated[
        bool, Option("--all", help="Every setting there is, each with its default and its comment.")
    ] = False,
    names: Annotated[bool, Option("--list", help="List the shipped recipes and the model presets.")] = False,
) -> None:
    """Write a new recipe: what another one sets, or with --all every setting there is."""
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
    recipe, _ = recipe_and_run(like, None, False, None, Path())
    if re.fullmatch(r"[^\W_][\w.-]*", path.stem):
        recipe = recipe.model_copy(update={"name": path.stem})
    write_text(path, recipe_toml(recipe, all_settings=every, comments=True))
    typer.echo(f"{path}: written. Change it, then:  {command_line('build', str(path))}")
