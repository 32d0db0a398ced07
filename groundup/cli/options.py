"""What several commands share: options, spelled once, and how results are shown."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.table import Table

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, a run's folder, or a shipped recipe, such as demo.")
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, such as runs/demo.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="SECTION.KEY=VALUE", help="Override one setting; may be given many times."),
]
RunsOption = Annotated[Path, typer.Option("--runs", metavar="FOLDER", help="Where runs are kept.")]
RunOption = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="FOLDER", help="This run's folder (default: RUNS/NAME of the recipe)."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for programs.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Show warnings and errors only.")]


def print_json(value: Any) -> None:
    """Print a value as JSON on standard output."""
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))


def result_console() -> RichConsole:
    """Standard output, for tables; in a file or a pipe no line is folded."""
    return RichConsole(highlight=False, width=None if sys.stdout.isatty() else 1000)


def print_table(
    titles: Sequence[str], rows: Iterable[Sequence[RenderableType]], right: Container[int] = (), **style: Any
) -> None:
    """Print a table without lines on standard output; the columns in `right` are aligned to the right."""
    table = Table(box=None, pad_edge=False, **style)
    for index, title in enumerate(titles):
        table.add_column(title, justify="right" if index in right else "left")
    for row in rows:
        table.add_row(*row)
    result_console().print(table)


def command_line(*arguments: str) -> str:
    """A command that can be pasted: this program as it was called, and arguments, quoted where they must be."""
    return f"{_program()} {shlex.join(arguments)}"


def same_command(*arguments: str) -> str:
    """`command_line`, started by `torchrun` again if this process was."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        n_here = os.environ.get("LOCAL_WORLD_SIZE", "1")
        return f"torchrun --nproc-per-node {n_here} -m groundup {shlex.join(arguments)}"
    return command_line(*arguments)


def _program() -> str:
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{_from_here(Path(sys.executable), 'python')} -m groundup"
    return _from_here(called, "groundup") if called.stem == "groundup" else "groundup"


def _from_here(program: Path, name: str) -> str:
    """`name` where the shell finds this program under it, else the path from the current folder."""
    found = shutil.which(name)
    if found and Path(found).absolute() == program.absolute():
        return name
    path = program.absolute()
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))
