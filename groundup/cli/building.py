"""Commands that build: `build`, and what does the stages of one method."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from groundup.cli import options
from groundup.cli.output import command_line, print_json, print_table, result_console
from groundup.errors import GateError, Interrupted, RunError
from groundup.files import check_ours, own_folder
from groundup.recipe import Recipe, read_recipe, shipped_recipes

if TYPE_CHECKING:
    from groundup.run import Run

app = typer.Typer()


@app.command(
    rich_help_panel=options.BUILD,
    epilog="Examples:  groundup build demo  ·  groundup build shakespeare --set corpus.inputs=my.txt  ·  "
    "groundup build my.toml --from pretrain  ·  groundup build demo --seeds 1,2,3  ·  "
    "torchrun --nproc-per-node 2 -m groundup build demo",
)
def build(
    recipe: options.Recipe,
    settings: options.Set = None,
    start_from: Annotated[
        str | None, Option("--from", metavar="STAGE", help="Do this stage and all that stand on it again.")
    ] = None,
    only: Annotated[
        list[str] | None, Option(metavar="STAGE", help="Do this stage and what it stands on; may be given many times.")
    ] = None,
    force: Annotated[bool, Option("--force", help="Do every stage again.")] = False,
    smoke: options.Smoke = False,
    dry_run: options.DryRun = False,
    run: options.Out = None,
    runs: options.Runs = Path("runs"),
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    seeds: Annotated[
        str | None,
        Option(metavar="1,2,3", help="A run for each seed, in RUNS/NAME-seeds/, and every figure's interval."),
    ] = None,
) -> None:
    """Run the whole pipeline of a recipe: text in, models, their scores and a report out.

    Finished stages are skipped. Interrupted anywhere, the same command goes on.
    """
    how = {"only": only or None, "start_from": start_from, "force": force}
    chosen, folder = recipe_and_run(recipe, settings, smoke, run, runs)
    if seeds is None:
        _build(chosen, folder, how, dry_run, as_json, quiet)
        return
    recipes = {
        seed: recipe_and_run(recipe, [*(settings or ()), f"seed={seed}"], smoke, run, runs)[0]
        for seed in _seeds(seeds, settings or ())
    }
    _build_seeds(recipes, run or runs / f"{chosen.name}-seeds", how, dry_run, as_json, quiet)


@app.command(rich_help_panel=options.BUILD, epilog="Example:  groundup trust my_reward.py")
def trust(file: Annotated[Path, Argument(help="A Python file that a recipe names.")]) -> None:
    """Allow recipes to run the code in a file, as it is now: a predicate, a reward. Read it first.

    A file that changes is asked for again. `groundup --trust build …` asks for none, for scripts.
    """
    from groundup import user_code

    typer.echo(f"{file} may be run as it is now ({user_code.trust(file)[:12]}).")


def stage_command(name: str) -> Callable[..., None]:
    """A command that brings the stages of a method up to date."""

    def command(
        recipe: options.Recipe,
        settings: options.Set = None,
        force: Annotated[bool, Option("--force", help="Do this stage again.")] = False,
        smoke: options.Smoke = False,
        dry_run: options.DryRun = False,
        run: options.Out = None,
        runs: options.Runs = Path("runs"),
        as_json: options.Json = False,
        quiet: options.Quiet = False,
    ) -> None:
        from groundup.stage import graph

        chosen, folder = recipe_and_run(recipe, settings, smoke, run, runs)
        stages = graph(chosen)
        only = [stage.name for stage in stages.values() if stage.kind == name]
        if not only:
            raise RunError(f"no stage of this recipe is done by {name}.", f"Its stages: {', '.join(stages)}.")
        _build(chosen, folder, {"only": only, "force": force}, dry_run, as_json, quiet)

    return command


def _seeds(text: str, settings: Sequence[str]) -> list[int]:
    """The numbers that --seeds names."""
    if twice := next((one for one in settings if one.partition("=")[0].strip() == "seed"), None):
        raise RunError(f"--set {twice}: --seeds {text} says which seeds.", "Leave one of them out.")
    words = [word.strip() for word in text.split(",")]
    seeds = [int(word) for word in words if word.isdecimal()]
    if len(seeds) < 2 or len({*seeds}) < len(words):
        raise RunError(f"--seeds {text}: two or more different whole numbers are needed.", "For example: --seeds 1,2,3")
    return seeds


def _build_seeds(
    recipes: Mapping[int, Recipe], root: Path, how: Mapping[str, Any], dry_run: bool, as_json: bool, quiet: bool
) -> None:
    """A run for each seed, one after the other, and a line for each figure; a missed gate is told at the end."""
    from groundup.distributed import current_world
    from groundup.evaluation.seeds import seed_folder, write_seeds
    from groundup.report.closing import format_figure
    from groundup.run import Run

    check_ours(root)
    folders = {seed: seed_folder(root, seed) for seed in recipes}
    if dry_run:
        _show_plans([_plan(recipe, folders[seed], how) for seed, recipe in recipes.items()], as_json)
        return
    is_first = current_world().is_first
    if is_first:
        own_folder(root)
        # All at once, as in one run: if this is interrupted, the same command without --force does what is left.
        for seed, recipe in recipes.items() if how["force"] or how["start_from"] else ():
            states = _plan(recipe, folders[seed], how)["stages"].items()
            if forced := [name for name, state in states if state == "forced"]:
                with (run := Run(folders[seed])).lock():
                    for name in forced:
                        run.forget(name)
    missed = [_run(recipe, folders[seed], how, quiet or as_json) for seed, recipe in recipes.items()]
    if is_first:
        found = write_seeds(root, list(recipes))
        if as_json:
            print_json(found)
        elif not quiet:
            titles = ["", "mean", "95 % interval", f"seeds {', '.join(map(str, recipes))}"]
            print_table(
                titles, [_seeds_row(row, functools.partial(format_figure, row["key"])) for row in found["rows"]]
            )
    if gate := next(filter(None, missed), None):
        raise gate


def _seeds_row(row: Mapping[str, Any], shown: Callable[[float], str]) -> list[str]:
    interval = f"{shown(row['low'])} to {shown(row['high'])}"
    return [row["label"], shown(row["mean"]), interval, "  ".join(map(shown, row["values"]))]


def _build(recipe: Recipe, folder: Path, how: Mapping[str, Any], dry_run: bool, as_json: bool, quiet: bool) -> None:
    """One run, and what came of it."""
    from groundup.distributed import current_world
    from groundup.run import Run
    from groundup.stage import graph, select

    if dry_run:
        _show_plans([_plan(recipe, folder, how)], as_json)
        return
    missed = _run(recipe, folder, how, quiet)
    if current_world().is_first:
        stages = graph(recipe)
        asked = select(stages, how["only"] or stages)
        is_scored = any(stages[name].subject is not None for name in asked)
        if as_json:
            print_json(_result(Run(folder), asked, is_scored))
        elif not quiet and (how["only"] is None or is_scored):
            _show_result(Run(folder))
    if missed is not None:
        raise missed


def _run(recipe: Recipe, folder: Path, how: Mapping[str, Any], quiet: bool) -> GateError | None:
    """Run the pipeline, and return what says that a gate is missed, to be raised when all is shown."""
    import torch

    from groundup import __version__
    from groundup.console import Console
    from groundup.distributed import current_world
    from groundup.pipeline import build as run_pipeline
    from groundup.training import choose_precision

    world = current_world()
    console = Console(quiet=quiet or not world.is_first)
    dtype, reason = choose_precision(recipe.pretrain.precision, world.device.type)
    console.note(
        f"groundup {__version__} · recipe {recipe.name} · run {folder} "
        f"· {recipe.threads or torch.get_num_threads()} threads"
        + (f" × {world.size} processes" if world.size > 1 else "")
        + f", {str(dtype).removeprefix('torch.')} ({reason})"
    )
    try:
        with stopping("Finished stages are kept, and no file is half written."):
            run_pipeline(recipe, folder, console=console, **how)
    except GateError as error:
        return error
    return None


def _show_result(run: Run) -> None:
    """The closing table, and how to go on."""
    from groundup.console import Console
    from groundup.evaluation import read_comparison
    from groundup.report.closing import closing_table
    from groundup.stage import default_model, graph, language_models

    recipe, root = run.recipe, str(run.root)
    if (run.folder("evaluate") / "scores.json").is_file():
        result_console().print(closing_table(read_comparison(run), run))
    shipped = recipe.name.removesuffix("-smoke")
    like = shipped if shipped in shipped_recipes() else root
    lines = {"Go on:": command_line("recipe", "new", "my.toml", "--like", like)}
    if language_models(graph(recipe)):
        is_chat = default_model(recipe, to_chat=True)[0] in recipe.align
        label, command = ("Talk to it:", "chat") if is_chat else ("Let it write:", "generate")
        use = f"{command_line(command, root)}      See it:  {run.root / 'report.html'}"
        lines = {label: use, **lines, "On a page:": command_line("serve", root, "--open")}
    for label, told in lines.items():
        Console().note(f"{label:<15}{told}")


@contextlib.contextmanager
def stopping(kept: str) -> Iterator[None]:
    """Within this block SIGTERM stops as Ctrl-C does, and both say what is kept.

    Raises:
        Interrupted: it was stopped.
    """
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if is_main else None
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(f"Stopped. {kept}") from error
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)


def _result(run: Run, asked: Sequence[str], is_scored: bool) -> dict[str, Any]:
    """What a program wants to know of a build."""
    from groundup.evaluation import read_comparison
    from groundup.stage import ancestors, graph

    stages = graph(run.recipe)
    wanted = ancestors(stages, asked)
    manifests = {name: manifest for name in stages if name in wanted and (manifest := run.manifest(name))}
    found = read_comparison(run) if is_scored else {"rows": None, "gates": None}
    return {
        "run": str(run.root),
        "stages": {name: {"seconds": one.seconds, "summary": one.summary} for name, one in manifests.items()},
        "scores": found["rows"],
        "gates": found["gates"],
    }


def recipe_and_run(
    source: str, settings: Sequence[str] | None, smoke: bool, run: Path | None, runs: Path
) -> tuple[Recipe, Path]:
    """The recipe asked for and the folder it is built in; a run's folder stands for its own recipe."""
    from groundup.run import RECIPE_FILE

    path = Path(source)
    if (path / RECIPE_FILE).is_file():
        if smoke:
            raise RunError(
                f"{source}: --smoke makes another recipe of one, and this is a run's folder.",
                "Leave --smoke out, or name a recipe; a folder here hides a shipped one of its name.",
            )
        return read_recipe(path / RECIPE_FILE, settings or ()), run or path
    recipe = read_recipe(source, settings or ())
    if smoke:
        from groundup.preview import smoke_profile

        recipe = smoke_profile(recipe)
    return recipe, run or runs / recipe.name


def _plan(recipe: Recipe, folder: Path, how: Mapping[str, Any]) -> dict[str, Any]:
    """What would be done with each stage."""
    from groundup.pipeline import plan
    from groundup.preview import check_recipe
    from groundup.run import Run
    from groundup.stage import graph

    check_recipe(recipe, recipe.name)
    Run(folder).check(recipe, graph(recipe))
    plans = plan(recipe, Run(folder), **how)
    states = {item.stage.name: "forced" if item.forced and item.state != "missing" else item.state for item in plans}
    return {"run": str(folder), "stages": states}


def _show_plans(plans: list[dict[str, Any]], as_json: bool) -> None:
    words = {
        "done": "up to date",
        "changed": "would be done again: its settings, inputs or code have changed",
        "begun": "would go on from where it was interrupted",
        "missing": "would be done",
        "forced": "would be done again, as asked",
    }
    if as_json:
        print_json(plans if len(plans) > 1 else plans[0])
        return
    for one in plans:
        typer.echo(f"run {one['run']}")
        width = max(len(name) for name in one["stages"])
        for name, state in one["stages"].items():
            typer.echo(f"{name:<{width}} {words[state]}")
