"""Stages that have commands of their own beside being done: `groundup shards RECIPE` and `groundup shards verify`."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

DEFAULT = "build"


class StageGroup(TyperGroup):
    """A group whose `build` command may be left out: what is not the name of another command is its argument."""

    def parse_args(self, context: Any, arguments: list[str]) -> list[str]:
        """Put `build` first where no command is named."""
        if arguments and arguments[0] not in (*self.commands, "--help", "-h"):
            arguments = [DEFAULT, *arguments]
        return super().parse_args(context, arguments)
