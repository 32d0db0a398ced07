"""`groundup plan` from outside, and the refusal of what cannot fit before anything of it is made."""

import json
import os
import subprocess
import sys

import pytest
from command import groundup  # noqa: F401
from tiny_run import copy_of_finished, write_recipe

TOO_LARGE = '[corpus]\ninputs = ["groundup:classics"]\n\n[model]\nsize = "10b"\n\n[pretrain]\nbatch_size = 64\n'

REFUSED = """
import json, sys
import groundup as gu
from groundup.console import Console
import groundup.pipeline
from groundup.errors import GroundupError
from groundup.training import peak_memory_bytes

gu.plan(gu.read_recipe("demo"), probe=False)  # so that everything is imported
before = peak_memory_bytes()
try:
    gu.build(gu.read_recipe(sys.argv[1]), sys.argv[2], only=["pretrain"], console=Console(quiet=True))
except GroundupError as error:
    print(json.dumps({"message": str(error), "grown": peak_memory_bytes() - before}))
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_what_a_plan_shows(groundup, tmp_path):  # noqa: F811
    recipe = write_recipe(tmp_path)
    shown = groundup("plan", recipe, "--no-probe")
    assert shown.code == 0
    for word in ("parameters", "tokens", "steps", "micro-batch", "precision", "weights", "activations", "fits:",
                 "validation", "no law yet: groundup scaling"):  # fmt: skip
        assert word in shown.out
    told = groundup("plan", recipe, "--no-probe", "--json").json
    assert told["memory"]["fits"] is True
    assert told["memory"]["suggestions"] == []
    assert told["training"]["steps"] == -(-5000 // (8 * 64))
    assert not (tmp_path / "runs").exists()


def test_a_run_that_is_there_says_how_much_text_there_is(groundup, tmp_path):  # noqa: F811
    run = copy_of_finished(tmp_path)
    manifest = json.loads((run.folder("shards") / "manifest.json").read_text(encoding="utf-8"))
    told = groundup("plan", run.root, "--no-probe", "--json").json
    tokens = manifest["splits"]["train"]["tokens"]
    assert told["training"]["epochs"] == pytest.approx(told["training"]["tokens"] / tokens)
    made = run.manifest("pretrain").summary
    assert told["training"]["steps"] == made["steps"]
    assert told["parameters"]["all"] == made["parameters"]


def test_a_tiny_model_is_probed_whole(groundup, tmp_path):  # noqa: F811
    told = groundup("plan", write_recipe(tmp_path), "--json").json
    assert told["time"]["is_measured"] is True
    assert told["time"]["how"] == "probe: steps of the whole model"
    assert told["time"]["total_seconds"] > 0
    assert told["memory"]["parts"]["process"] > 100 * 2**20  # of this process, which may have run other tests


def test_other_devices_and_budgets(groundup, tmp_path):  # noqa: F811
    recipe = tmp_path / "large.toml"
    recipe.write_text(TOO_LARGE.replace("10b", "1b"), encoding="utf-8")
    shown = groundup("plan", recipe, "--device", "h100x8", "--budget", "300")
    assert shown.code == 0
    for word in ("8 × h100", "assumed, not measured", "$300.00", "best", "FLOPs"):
        assert word in shown.out
    cheap = groundup("plan", recipe, "--device", "h100x8", "--budget", "300", "--price", "1.35", "--json").json
    dear = groundup("plan", recipe, "--device", "h100x8", "--budget", "300", "--json").json
    assert cheap["training"]["tokens"] == pytest.approx(2 * dear["training"]["tokens"], rel=0.02)
    for wrong, said in (
        (("--device", "h10"), "Did you mean h100"),
        (("--budget", "3"), "has no price"),
        (("--hours", "1", "--budget", "3"), "Keep one"),
        (("--device", "t4", "--hours", "0.00001"), "too few"),
    ):
        ended = groundup("plan", recipe, "--no-probe", *wrong)
        assert ended.code == 1
        assert said in ended.err


def test_what_does_not_fit_is_told_with_what_to_change(groundup, tmp_path):  # noqa: F811
    recipe = tmp_path / "large.toml"
    recipe.write_text(TOO_LARGE, encoding="utf-8")
    ended = groundup("plan", recipe, "--device", "l4")
    assert ended.code == 1
    for word in ("does not fit", "to make it fit", "activation_checkpointing=", "model.size=", "devices of this size"):
        assert word in ended.out
    assert "takes" in ended.err
    assert "at least" in ended.err
    told = json.loads(groundup("plan", recipe, "--device", "l4", "--json").out)
    assert told["memory"]["fits"] is False
    assert told["memory"]["suggestions"][-1]["fits"] is True


def test_nothing_is_made_of_what_cannot_fit(tmp_path):
    """In a process of its own: its memory grows by less than a hundredth of the weights, and no stage is begun."""
    recipe = tmp_path / "large.toml"
    recipe.write_text(TOO_LARGE, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, str(recipe), str(tmp_path / "run")],
        capture_output=True, text=True, timeout=120, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    told = json.loads(done.stdout)
    assert "training 10," in told["message"]
    assert "It fits with:" in told["message"]
    assert told["grown"] < 100 * 2**20
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".groundup"]


def test_stages_before_training_are_made_all_the_same(groundup, tmp_path):  # noqa: F811
    recipe = write_recipe(tmp_path)
    recipe.write_text(recipe.read_text(encoding="utf-8").replace('preset = "ground-nano"', 'size = "10b"'), "utf-8")
    ended = groundup("shards", recipe, "--runs", tmp_path / "runs", "--quiet")
    assert ended.code == 0
    refused = groundup("pretrain", recipe, "--runs", tmp_path / "runs", "--quiet")
    assert refused.code == 1
    assert "[pretrain]: training" in refused.err
