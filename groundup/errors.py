"""Errors a user can meet, each with a way out.

Every error groundup raises on purpose derives from `GroundupError`: a message that names the
file, the field and the value, and where possible a `fix`. The command line prints both without a
traceback and exits with `exit_code`. A broken invariant of our own is an `assert`, never one of these.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_UNPRINTABLE = re.compile("[^\t\n -~\xa0-\ud7ff\ue000-\U0010ffff]")


class GroundupError(Exception):
    """Base class: what went wrong, and the way out.

    Args:
        message: what is wrong, naming file, field and value.
        fix: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, message: str, fix: str | None = None) -> None:
        # What a file names may hold what a terminal would obey, or cannot print.
        self.message = message = _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], message)
        super().__init__(message if fix is None else f"{message}\n{fix}")
        self.fix = fix


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe: where, what, and the way out."""

    where: str
    what: str
    fix: str | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f" {self.fix}" if self.fix else "")


class RecipeError(GroundupError):
    """A recipe cannot be used; carries all its problems at once."""

    exit_code = 2

    def __init__(self, source: str, problems: list[Problem]) -> None:
        self.source = source
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{source}: {count}", *(f"  {problem}" for problem in problems)]))


class DataError(GroundupError):
    """Input text, a shard or a data file cannot be used."""


class ArtifactError(GroundupError):
    """A checkpoint, tokenizer, shard or manifest is missing, damaged or does not fit."""


class RunError(GroundupError):
    """A run folder cannot be used as asked (locked, missing, of another recipe)."""


class GateError(GroundupError):
    """The run is complete, but a figure is short of the gate that its recipe sets."""

    exit_code = 3


class Interrupted(GroundupError):
    """Stopped on request (Ctrl-C, SIGTERM) after everything was saved."""

    exit_code = 130
