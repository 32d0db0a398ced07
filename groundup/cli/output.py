"""How results are shown, and commands that can be pasted."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import typer
from rich.console import Console as RichConsole
from rich.table import Table
from rich.text import Text


def print_json(value: Any) -> None:
    """Print a value as JSON on standard output."""
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))


def result_console() -> RichConsole:
    """Standard output, for tables; in a file or a pipe no line is folded."""
    return RichConsole(highlight=False, width=None if sys.stdout.isatty() else 1000)


def print_table(titles: Sequence[str], rows: Iterable[Sequence[Any]], **style: Any) -> None:
    """Print a table without lines on standard output; whole numbers with thousands, columns of figures to the right."""
    shown = [[_cell(value) for value in row] for row in rows]
    table = Table(box=None, pad_edge=False, **style)
    for title, *column in zip_longest(titles, *shown, fillvalue=""):
        starts = {str(cell)[:1] for cell in column} - {""}
        is_figures = starts and all(start.isdecimal() or start in "+-±$<" for start in starts)
        table.add_column(str(title), justify="right" if is_figures else "left")
    for row in shown:
        table.add_row(*row)
    result_console().print(table)


def _cell(value: Any) -> Text:
    """Text, never markup: a name in [brackets] is a name."""
    return value if isinstance(value, Text) else Text(f"{value:,}" if isinstance(value, int) else str(value))


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
