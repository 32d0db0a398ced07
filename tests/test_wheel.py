"""The package as it is published: built, installed outside the checkout, and the smoke recipe run with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_built_wheel_runs_the_smoke_recipe_outside_the_checkout(tmp_path: Path) -> None:
    checkout, installed = Path(__file__).resolve().parents[1], tmp_path / "installed"
    subprocess.run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, checkout], check=True)
    (wheel,) = tmp_path.glob("groundup-*.whl")
    subprocess.run([*PIP, "install", "--no-deps", "--target", installed, wheel], check=True)

    def python(*arguments: str) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(installed)}
        return subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, check=True
        ).stdout

    assert Path(python("-c", "import groundup; print(groundup.__file__)").strip()).is_relative_to(installed)
    for folder in ("data", "recipes"):  # tables, texts and recipes that ship
        own = {path.name: path.read_bytes() for path in (checkout / "groundup" / folder).glob("*.*")}
        assert len(own) > 3
        assert {name: (installed / "groundup" / folder / name).read_bytes() for name in own} == own
    page = {path.name for path in (installed / "groundup" / "serving" / "page").rglob("*")}
    assert page >= {"index.html", "app.js", "style.css", "purify.js", "LICENSE-marked"}
    shorter = ("--set", "pretrain.tokens=40_000")  # of 160,000
    assert "bits per byte" in python("-m", "groundup", "build", "demo", "--smoke", *shorter)
    assert (tmp_path / "runs" / "demo-smoke" / "report.html").stat().st_size > 8_000
