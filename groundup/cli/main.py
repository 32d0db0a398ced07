"""`groundup`: the commands, and how their errors are shown.

Every command is a few lines over the Python API. Results go to standard output, progress and messages to
standard error. Exit codes: 0 done, 1 an error, 2 a wrong recipe or command line, 3 a gate missed, 130 stopped.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any

import typer
from rich.console import Console as RichConsole
from rich.text import Text
from typer.core import TyperGroup

from groundup.cli import building, comparing, data, evaluating, inspecting, modelling, planning, talking
from groundup.cli.options import BUILD
from groundup.cli.output import same_command
from groundup.errors import GroundupError, Interrupted
from groundup.files import write_error
from groundup.recipe.registry import registered
from groundup.user_code import TRUST_ALL


class StageGroup(TyperGroup):
    """A group whose `build` command may be left out: what is not the name of another command is its argument."""

    def parse_args(self, context: Any, arguments: list[str]) -> list[str]:
        """Put `build` first where no command is named."""
        if arguments and arguments[0] not in (*self.commands, "--help", "-h"):
            arguments = ["build", *arguments]
        return super().parse_args(context, arguments)


class PipelineGroup(TyperGroup):
    """The commands in the order of the pipeline."""

    def list_commands(self, context: Any) -> list[str]:
        """`build`, the stages in their order, then the others."""
        order = {name: place for place, name in enumerate(("build", *registered()))}
        return sorted(super().list_commands(context), key=lambda name: order.get(name, len(order)))


GROUPS = {
    "corpus": (data.corpus_app, "groundup corpus crawl https://example.org/ --out pages"),
    "tokenizer": (data.tokenizer_app, 'groundup tokenizer try runs/demo "How is this cut?"'),
    "shards": (data.shards_app, "groundup shards verify runs/demo"),
}
"""Stages that have commands of their own beside being done, and an example of them."""


def make_app() -> typer.Typer:
    """The command line, with a command for every method that is registered now."""
    app = typer.Typer(
        cls=PipelineGroup,
        name="groundup",
        help="Build a large language model from the ground up: raw text in, an assistant you can talk to out.\n\n"
        "Start with: groundup build demo",
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog="Examples:  groundup build demo  ·  groundup chat runs/demo  ·  groundup recipe show demo",
    )
    app.callback(invoke_without_command=True)(_root)
    for name, method in registered().items():
        about = f"{method.about}\n\nStages it stands on are brought up to date first."
        told = f"Examples:  groundup {name} demo  ·  groundup {name} my.toml --force"
        command = building.stage_command(name)
        if name not in GROUPS:
            app.command(name, help=about, epilog=told, rich_help_panel=BUILD)(command)
            continue
        group, (more, example) = typer.Typer(cls=StageGroup, no_args_is_help=True), GROUPS[name]
        group.command("build", help=about, epilog=told)(command)
        group.add_typer(more)
        about, told = f"{about} The other commands look at it.", f"{told}  ·  {example}"
        app.add_typer(group, name=name, help=about, epilog=told, rich_help_panel=BUILD)
    # What is added later takes the place of what has its name: `evaluate` can do more than its stage.
    for room in (building, evaluating, planning, talking, comparing, modelling, inspecting):
        app.add_typer(room.app)
    return app


def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and leave."),
    trust: bool = typer.Option(False, "--trust", help="Run the code that a recipe names without asking, in scripts."),
) -> None:
    """Build a large language model from the ground up."""
    if trust:
        os.environ[TRUST_ALL] = "1"
    if version:
        from groundup import __version__

        typer.echo(f"groundup {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; known errors are shown in words, without a traceback."""
    # Threads that wait for each other spin for a moment, then sleep. Spinning on, as OpenMP does by itself, makes every
    # step wait for whatever else runs on the machine (benchmarks/cpu_ladder.py). To be set before torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started this process
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal or a pipe that is not UTF-8 shows "?" for what it cannot show.
            stream.reconfigure(errors="replace")
    try:
        _run()
    except SystemExit as end:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            from groundup.distributed import end_process

            end_process(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise


def _run() -> None:
    try:
        make_app()(prog_name="groundup")
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":  # of several processes, one speaks
            typer.echo(f"\n{stop.message}\nGo on:  {same_command(*_arguments_to_go_on())}", err=True)
        sys.exit(stop.exit_code)
    except GroundupError as error:
        _show(error)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is not None:
            _show(write_error(error.filename, error))
        else:  # of reading, most likely: what groundup writes names itself what went wrong
            place = "" if error.filename is None else f"{error.filename}: "
            _show(GroundupError(f"{place}{error.strerror or error}."))
        sys.exit(1)


def _show(error: GroundupError) -> None:
    told = str(error).replace("\n", "\n          ")
    console = RichConsole(stderr=True, highlight=False, soft_wrap=True)
    console.print(Text.assemble(("groundup: ", "bold red"), told))


def _arguments_to_go_on() -> list[str]:
    """This command's arguments without those that would do again what is done already."""
    kept: list[str] = []
    arguments = iter(sys.argv[1:])
    for argument in arguments:
        if argument == "--from":
            next(arguments, None)
        elif argument != "--force" and not argument.startswith("--from="):
            kept.append(argument)
    return kept
