"""Commands that build: `build`, and one for each method."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from groundup.cli.grouping import DEFAULT, StageGroup
from groundup.cli.options import (
    JsonOption,
    QuietOption,
    RecipeArgument,
    RunOption,
    RunsOption,
    SetOption,
    command_line,
    print_json,
    print_table,
    result_console,
)
from groundup.recipe.registry import registered

if TYPE_CHECKING:
    from groundup.console import Console
    from groundup.recipe import Recipe
    from groundup.run import Run

SmokeOption = Annotated[
    bool, typer.Option("--smoke", help="The same pipeline in a fraction of the time, to see that it works.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]


PANEL = "Build, stage by stage"


def add_to(
    app: typer.Typer,
    groups: Mapping[str, tuple[typer.Typer, str]],
    others: Mapping[str, tuple[Callable[..., None], str]],
) -> None:
    """Add these commands to the command line: `build`, and one for each method, those of others too.

    Args:
        app: the command line.
        groups: for stages that have other commands too, these, and an example.
        others: for stages whose command can do more, that command, and an example.
    """
    app.command(
        rich_help_panel=PANEL,
        epilog="Examples:  groundup build demo  ·  groundup build shakespeare --set corpus.inputs=my.txt  ·  "
        "groundup build my.toml --from pretrain  ·  groundup build demo --seeds 1,2,3  ·  "
        "torchrun --nproc-per-node 2 -m groundup build demo",
    )(build)
    app.command(rich_help_panel=PANEL, epilog="Example:  groundup trust my_reward.py")(trust)
    for name, method in registered().items():
        about = f"{method.about}\n\nStages it stands on are brought up to date first."
        examples = f"Examples:  groundup {name} demo  ·  groundup {name} my.toml --force"
        if name not in groups:
            command, more = others.get(name, (stage_command(name), ""))
            examples += f"  ·  {more}" if more else ""
            app.command(name, help=command.__doc__ or about, epilog=examples, rich_help_panel=PANEL)(command)
            continue
        group, more = groups[name]
        group.command(DEFAULT, help=about, epilog=examples)(stage_command(name))
        about, examples = f"{about} The other commands look at it.", f"{examples}  ·  {more}"
        app.add_typer(
            group, name=name, cls=StageGroup, help=about, epilog=examples, no_args_is_help=True, rich_help_panel=PANEL
        )


def build(
    recipe: RecipeArgument,
    settings: SetOption = None,
    start_from: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Do this stage and all that stand on it again.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="STAGE", help="Do this stage and what it stands on; may be given many times."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Do every stage again.")] = False,
    smoke: SmokeOption = False,
    dry_run: DryRunOption = False,
    run: RunOption = None,
    runs: RunsOption = Path("runs"),
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    seeds: Annotated[
        str | None,
        typer.Option(
            "--seeds", metavar="1,2,3", help="A run for each seed, in RUNS/NAME-seeds/, and every figure's interval."
        ),
    ] = None,
) -> None:
    """Run the whole pipeline of a recipe: text in, models, their scores and a report out.

    Finished stages are skipped. Interrupted anywhere, the same command goes on.
    """
    chosen, folder = recipe_and_run(recipe, settings or [], smoke, run, runs)
    if seeds is not None:
        recipes = {
            seed: recipe_and_run(recipe, [*(settings or []), f"seed={seed}"], smoke, run, runs)[0]
            for seed in _seeds(seeds, settings or [])
        }
        root = run or runs / f"{chosen.name}-seeds"
        _build_seeds(recipes, root, only or None, start_from, force, dry_run, as_json, quiet)
        return
    if dry_run:
        _show_plans([_plan(chosen, folder, only or None, start_from, force)], as_json)
        return
    _build(chosen, folder, only or None, start_from, force, as_json, quiet)


def trust(file: Annotated[Path, typer.Argument(help="A Python file that a recipe names.")]) -> None:
    """Allow recipes to run the code in a file, as it is now: a predicate, a reward. Read it first.

    A file that changes is asked for again. `groundup --trust build …` asks for none, for scripts.
    """
    from groundup import user_code

    typer.echo(f"{file} may be run as it is now ({user_code.trust(file)[:12]}).")


def stage_command(name: str) -> Callable[..., None]:
    """A command that brings the stages of a method up to date."""

    def command(
        recipe: RecipeArgument,
        settings: SetOption = None,
        force: Annotated[bool, typer.Option("--force", help="Do this stage again.")] = False,
        smoke: SmokeOption = False,
        dry_run: DryRunOption = False,
        run: RunOption = None,
        runs: RunsOption = Path("runs"),
        as_json: JsonOption = False,
        quiet: QuietOption = False,
    ) -> None:
        chosen, folder = recipe_and_run(recipe, settings or [], smoke, run, runs)
        only = _of_method(chosen, name)
        if dry_run:
            _show_plans([_plan(chosen, folder, only, None, force)], as_json)
            return
        _build(chosen, folder, only, None, force, as_json, quiet)

    return command


def _of_method(recipe: Recipe, name: str) -> list[str]:
    """The stages of a method, whatever they are called."""
    from groundup.errors import RunError
    from groundup.stage import graph

    stages = graph(recipe)
    found = [stage.name for stage in stages.values() if stage.kind == name]
    if not found:
        raise RunError(f"no stage of this recipe is done by {name}.", f"Its stages: {', '.join(stages)}.")
    return found


def _seeds(text: str, settings: Sequence[str]) -> list[int]:
    """The numbers that --seeds names.

    Raises:
        RunError: they are none, too few, or one stands there twice; or a setting names a seed, too.
    """
    from groundup.errors import RunError

    if twice := next((one for one in settings if one.partition("=")[0].strip() == "seed"), None):
        raise RunError(f"--set {twice}: --seeds {text} says which seeds.", "Leave one of them out.")
    words = [word.strip() for word in text.split(",")]
    seeds = [int(word) for word in words if word.isdecimal()]
    if len(seeds) < 2 or len({*seeds}) < len(words):
        raise RunError(f"--seeds {text}: two or more different whole numbers are needed.", "For example: --seeds 1,2,3")
    return seeds


def _build_seeds(
    recipes: Mapping[int, Recipe], root: Path, only: list[str] | None, start_from: str | None, force: bool,
    dry_run: bool, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """A run for each seed, one after the other, and a line for each figure; a missed gate is told at the end."""
    from groundup.distributed import current_world
    from groundup.errors import GateError
    from groundup.evaluation.seeds import seed_folder, write_seeds
    from groundup.files import check_ours, own_folder

    of_seeds = [(recipe, seed_folder(root, seed)) for seed, recipe in recipes.items()]
    check_ours(root)
    if dry_run:
        _show_plans([_plan(one, folder, only, start_from, force) for one, folder in of_seeds], as_json)
        return
    if current_world().is_first:
        own_folder(root)
    missed = []
    for one, folder in of_seeds:
        try:
            _run(one, folder, only, start_from, force, quiet or as_json)
        except GateError as error:
            missed.append(error)
    if current_world().is_first:
        found = write_seeds(root, list(recipes))
        if as_json:
            print_json(found)
        elif not quiet:
            titles = ["", "mean", "95 % interval", f"seeds {', '.join(map(str, recipes))}"]
            print_table(titles, [_seeds_row(row) for row in found["rows"]], right=(1, 2, 3))
    if missed:
        raise missed[0]


def _seeds_row(row: Mapping[str, Any]) -> list[str]:
    from groundup.report.closing import format_figure

    values = row["mean"], row["low"], row["high"], *row["values"]
    mean, low, high, *each = (format_figure(row["key"], value) for value in values)
    return [row["label"], mean, f"{low} to {high}", "  ".join(each)]


def _build(
    recipe: Recipe, folder: Path, only: list[str] | None, start_from: str | None, force: bool, as_json: bool,
    quiet: bool,
) -> None:  # fmt: skip
    from groundup.console import Console
    from groundup.distributed import current_world
    from groundup.errors import GateError
    from groundup.run import Run

    missed: GateError | None = None
    try:
        _run(recipe, folder, only, start_from, force, quiet)
    except GateError as error:
        missed = error
    is_first = current_world().is_first
    if is_first and as_json:
        print_json(_result(Run(folder), recipe, only))
    elif is_first and not quiet and (only is None or _is_scored(recipe, only)):
        show_table(Run(folder), Console(quiet=quiet))
    if missed is not None:
        raise missed


def _run(
    recipe: Recipe, folder: Path, only: list[str] | None, start_from: str | None, force: bool, quiet: bool
) -> None:
    import torch

    from groundup import __version__
    from groundup.console import Console
    from groundup.distributed import current_world
    from groundup.errors import Interrupted
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
        with stopped_by_sigterm():
            run_pipeline(recipe, folder, only=only, start_from=start_from, force=force, console=console)
    except KeyboardInterrupt as error:
        raise Interrupted("Stopped. Finished stages are kept, and no file is half written.") from error


def _is_scored(recipe: Recipe, only: list[str] | None) -> bool:
    from groundup.stage import graph, select

    stages = graph(recipe)
    names = stages if only is None else select(stages, only)
    return any(stages[name].subject is not None for name in names)


def show_table(run: Run, console: Console) -> None:
    """The closing table, and how to go on."""
    from groundup.evaluation import read_comparison
    from groundup.recipe import shipped_recipes
    from groundup.report.closing import closing_table
    from groundup.stage import default_model, graph, language_models

    recipe, page = run.recipe, run.root / "report.html"
    if (run.folder("evaluate") / "scores.json").is_file():
        result_console().print(closing_table(read_comparison(run), run))
    models = language_models(graph(recipe))
    if models and default_model(recipe, to_chat=True)[0] in recipe.align:
        console.note(f"Talk to it:    {command_line('chat', str(run.root))}      See it:  {page}")
    elif models:
        console.note(f"Let it write:  {command_line('generate', str(run.root))}      See it:  {page}")
    shipped = recipe.name.removesuffix("-smoke")
    like = shipped if shipped in shipped_recipes() else str(run.root)
    console.note(f"Go on:         {command_line('recipe', 'new', 'my.toml', '--like', like)}")
    if models:
        console.note(f"On a page:     {command_line('serve', str(run.root), '--open')}")


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Within this block SIGTERM stops as Ctrl-C does, with the same message."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _result(run: Run, recipe: Recipe, only: list[str] | None) -> dict[str, object]:
    """What a program wants to know of a build."""
    from groundup.evaluation import read_comparison
    from groundup.stage import ancestors, graph, select

    stages = graph(recipe)
    wanted = ancestors(stages, select(stages, stages if only is None else only))
    manifests = {name: run.manifest(name) for name in stages if name in wanted}
    found = read_comparison(run) if _is_scored(recipe, only) else {"rows": None, "gates": None}
    return {
        "run": str(run.root),
        "stages": {
            name: {"seconds": manifest.seconds, "summary": manifest.summary}
            for name, manifest in manifests.items()
            if manifest is not None
        },
        "scores": found["rows"],
        "gates": found["gates"],
    }


def recipe_and_run(source: str, settings: list[str], smoke: bool, run: Path | None, runs: Path) -> tuple[Recipe, Path]:
    """The recipe asked for and the folder it is built in; a run's folder stands for its own recipe."""
    from groundup.errors import RunError
    from groundup.recipe import read_recipe
    from groundup.run import RECIPE_FILE

    path = Path(source)
    if (path / RECIPE_FILE).is_file():
        if smoke:
            raise RunError(
                f"{source}: --smoke makes another recipe of one, and this is a run's folder.",
                "Leave --smoke out, or name a recipe; a folder here hides a shipped one of its name.",
            )
        return read_recipe(path / RECIPE_FILE, settings), run or path
    recipe = read_recipe(source, settings)
    if smoke:
        from groundup.preview import smoke_profile

        recipe = smoke_profile(recipe)
    return recipe, run or runs / recipe.name


def _plan(recipe: Recipe, folder: Path, only: list[str] | None, start_from: str | None, force: bool) -> dict[str, Any]:
    """What would be done with each stage."""
    from groundup.pipeline import plan
    from groundup.preview import check_recipe
    from groundup.run import Run
    from groundup.stage import graph

    check_recipe(recipe, recipe.name)
    Run(folder).check(recipe, graph(recipe))
    plans = plan(recipe, Run(folder), only=only, start_from=start_from, force=force)
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
