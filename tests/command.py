"""The command line, called in this process (fast) or in one of its own (real)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from groundup.cli.main import main

PROGRAM = (sys.executable, "-m", "groundup")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON value and nothing else."""
        return json.loads(self.out)


class CommandLine:
    """Calls commands in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, *arguments: str | Path, program: str = "groundup") -> Ended:
        """Run one command; whatever it does, it shows no traceback."""
        self._capsys.readouterr()
        self._monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
        code: int | str | None = 0
        try:
            main()
        except SystemExit as left:
            code = left.code
        out, err = self._capsys.readouterr()
        assert "Traceback" not in out + err
        return Ended(int(code or 0), out, err)


@pytest.fixture
def groundup(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """`groundup(...)` runs a command in this process."""
    return CommandLine(capsys, monkeypatch)


def start(*arguments: str | Path, cwd: Path | None = None, **environment: str) -> subprocess.Popen[str]:
    """A command in a process of its own, one thread, its streams as pipes."""
    return subprocess.Popen(
        [*PROGRAM, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def run_to_end(*arguments: str | Path, given: str = "", cwd: Path | None = None, **environment: str) -> Ended:
    """A command in a process of its own, to its end."""
    with start(*arguments, cwd=cwd, **environment) as process:
        out, err = process.communicate(given, timeout=120)
    assert "Traceback" not in out + err
    return Ended(process.returncode, out, err)
