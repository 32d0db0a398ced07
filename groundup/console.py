"""How work is shown while it happens: one line a stage, a bar while it runs, log lines in one grammar.

Everything here goes to standard error; standard output is left to results (tables, text, JSON).
A terminal gets live bars; a file or a pipe gets the finished lines only; a quiet console gets nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text


def format_fields(fields: Mapping[str, Any]) -> str:
    """One grammar for people and machines: `step=120/2000 loss=2.914 lr=3.0e-04 tok/s=18,420`."""
    return " ".join(f"{name}={_format_value(name, value)}" for name, value in fields.items())


def format_duration(seconds: float) -> str:
    """`0:07`, `2:10`, `1:02:10`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def format_bytes(count: float) -> str:
    """Binary units: `512 B`, `1.4 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_count(count: float) -> str:
    """`950`, `48.2 k`, `3.0 M`, `1.1 B`."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if count >= size:
            return f"{count / (1e3 if unit == 'k' else size):.1f} {unit}"
    return f"{count:,.0f}"


def _format_value(name: str, value: Any) -> str:
    if isinstance(value, float):
        if name.endswith("lr"):
            return f"{value:.1e}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


class Bar:
    """One stage's line: a live bar on a terminal, one finished line anywhere."""

    def __init__(self, console: Console, name: str, total: float | None) -> None:
        self._console = console
        self._name = name
        self._start = time.perf_counter()
        self._summary: str | None = None
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        if console.live:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[note]}"),
                console=console.rich,
                transient=True,
                refresh_per_second=8,
            )
            self._task = self._progress.add_task(f"{name:<{console.name_width}}", total=total, note="")
            self._progress.start()

    def update(self, completed: float, total: float | None = None, note: str | None = None) -> None:
        """Show progress; `note` stands behind the bar."""
        if self._progress is not None and self._task is not None:
            changes: dict[str, Any] = {"completed": completed}
            if total is not None:
                changes["total"] = total
            if note is not None:
                changes["note"] = note
            self._progress.update(self._task, **changes)

    def finish(self, summary: str) -> None:
        """What the finished line says."""
        self._summary = summary

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        if kind is None and self._summary is not None:
            seconds = time.perf_counter() - self._start
            self._console.stage_line(self._name, self._summary, f"{seconds:.1f} s")


class Console:
    """Where progress and messages are shown.

    Args:
        quiet: show nothing but warnings.

    Attributes:
        name_width: columns of the stages' names.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.rich = RichConsole(stderr=True, highlight=False, soft_wrap=True)
        self.live = not quiet and self.rich.is_terminal
        self.name_width = 10

    def bar(self, name: str, total: float | None = None) -> Bar:
        """A bar for the stage `name`; use it in a `with` statement."""
        return Bar(self, name, total)

    def stage_line(self, name: str, summary: str, right: str = "") -> None:
        """One finished line: `corpus     420 docs -> 405 kept   2.1 s`."""
        if not self.quiet:
            line = Text(f"{name:<{self.name_width}} ", style="bold")
            line.append(summary, style="not bold")
            if right:
                line.append(f"  {right}", style="dim not bold")
            self.rich.print(line)

    def log(self, fields: Mapping[str, Any]) -> None:
        """One log line in the common grammar."""
        if not self.quiet:
            self.rich.print(Text(format_fields(fields), style="dim"))

    def note(self, text: str) -> None:
        """A line of information."""
        if not self.quiet:
            self.rich.print(Text(text))

    def warn(self, text: str) -> None:
        """A line that is shown even when quiet."""
        self.rich.print(Text(f"note: {text}", style="yellow"))

    def show(self, renderable: RenderableType) -> None:
        """Show a rich table or panel."""
        if not self.quiet:
            self.rich.print(renderable)
