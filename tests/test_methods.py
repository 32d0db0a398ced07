"""A method is one file and one line: one from outside the package does all that those within do."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_run
import toy_method  # registers the method
from command import CommandLine, groundup  # noqa: F401
from tiny_run import bits, build_quietly, copy_of_finished, finished_run

import groundup as package
from groundup.files import read_json
from groundup.interop import load
from groundup.pipeline import plan
from groundup.recipe import parse_recipe
from groundup.recipe.registry import METHODS
from groundup.run import Run
from groundup.training import pass_flops

BRANCHES = """
[align.toy]
rows = 160
batch_size = 8
eval_every = 5
checkpoint_seconds = 0.0
lr = 0.01

[align.toy-control]
method = "sft"
compute = "toy"
batch_size = 8
examples = 200

[[evaluate.gates]]
metric = "said"
model = "toy"
min = 0.5

[[evaluate.gates]]
metric = "bits_per_byte"
model = "toy"
over = "sft"
min = 0.0
"""


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_run.write_recipe(tmp_path_factory.mktemp("toy"))
    path.write_text(path.read_text() + BRANCHES)
    return path


@pytest.fixture(scope="module")
def run(recipe_file: Path) -> Run:
    """The recipe with two branches and a control, built once; the trunk is that of the finished run."""
    return build_quietly(parse_recipe(recipe_file.read_text(), "tiny.toml"), recipe_file.parent / "run")


def test_a_branch_beside_another_leaves_that_one_as_it_is(run: Run) -> None:
    ours, alone = bits(run), bits(finished_run())
    for name in ("pretrain/model/model.safetensors", "sft/model/model.safetensors", "evaluate/sft/scores.json"):
        assert ours[name] == alone[name]


def test_it_is_scored_gated_and_compared_with_its_control(run: Run) -> None:
    scores = read_json(run.folder("evaluate") / "scores.json")
    assert {row["model"] for row in scores["rows"]} == {"pretrain", "sft", "toy", "toy-control"}
    assert [gate["passed"] for gate in scores["gates"]] == [True, True]
    toy, control = (run.manifest(name) for name in ("toy", "toy-control"))
    assert toy is not None
    assert control is not None
    assert toy.summary["said"] == pytest.approx(scores["gates"][0]["value"])
    # To within the control's last batch, of full rows at most.
    config = load(run.folder("toy-control") / "model").model.config
    a_batch = pass_flops(config, [config.context_length] * 8)
    assert 0 <= control.summary["flops"] - toy.summary["flops"] <= a_batch
    assert "toy-control (control)" in " ".join(row["label"] for row in scores["rows"])


def test_it_is_found_wherever_stages_are_shown(run: Run, recipe_file: Path, groundup: CommandLine) -> None:  # noqa: F811
    shown = groundup("recipe", "show", recipe_file).out
    assert "token = 70" in shown
    assert 'compute = "toy"' in shown
    assert "A model learns to say one token." in groundup("--help").out
    new = recipe_file.parent / "new.toml"
    groundup("recipe", "new", new, "--like", recipe_file, "--all")
    assert "# the token to be said" in new.read_text()
    states = groundup("status", run.root, "--json").json["stages"]
    assert states["toy"]["state"] == states["evaluate/toy"]["state"] == "done"
    page = (run.root / "report.html").read_text()
    assert "Saying one token: toy" in page
    assert "probability of the token" in page
    assert 'id="toy-grad_norm-wide' in page
    again = groundup("toy", recipe_file, "--out", run.root)
    assert again.code == 0
    assert "toy       up to date" in again.err


def test_a_change_of_its_code_redoes_its_branch_only(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_method.Toy, "version", 2)
    due = {item.stage.name for item in plan(run.recipe, run) if item.is_due}
    assert due == {"toy", "toy-control", "evaluate/toy", "evaluate/toy-control"}


def test_killed_and_resumed_it_gives_the_same_bits(
    run: Run,
    recipe_file: Path,
    tmp_path: Path,
    groundup: CommandLine,  # noqa: F811
) -> None:
    killed = copy_of_finished(tmp_path)  # the trunk is there
    command = [sys.executable, toy_method.__file__, "build", str(recipe_file), "--out", str(killed.root)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(killed.root.glob("toy/checkpoints/step-0000000[2-9]")):
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert killed.manifest("toy") is None
    assert "going on from step" in groundup("build", recipe_file, "--out", killed.root).err
    assert bits(killed) == bits(run)


def test_no_method_is_named_outside_its_room_and_the_registry() -> None:
    folder = Path(package.__file__).parent
    found = []
    for name, entry in METHODS.items():
        if not isinstance(entry.where, str):
            continue
        own = Path(entry.where.partition(":")[0].replace(".", "/") + ".py")
        for path in sorted(folder.rglob("*.py")):
            # A room names its files where it gathers what it offers. Within alignment/ methods stand on each other, and
            # some of their names are those of their losses.
            if path.relative_to(folder.parent) in (own, Path("groundup/recipe/registry.py")) or path.stem == "__init__":
                continue
            if path.parent.name == own.parent.name:
                continue
            # A field of a logged line, such as a rollout's reward, is none.
            named = re.compile(rf"""(?<!line\[)(?<!line\.get\()["']{name}["']|align\.{name}\b""", re.IGNORECASE)
            found += [f"{path}: {line}" for line in path.read_text().splitlines() if named.search(line)]
    assert found == []
