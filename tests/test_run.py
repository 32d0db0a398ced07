"""A run knows what is done, keeps what an interrupted stage left, and lets one process at a time write."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundup.errors import ArtifactError, RunError
from groundup.recipe import Recipe
from groundup.run import Manifest, Run, list_runs, stage_fingerprint


def made(run: Run, stage: str, fingerprint: str, **files: str) -> Path:
    """A finished stage with some files."""
    folder = run.begin(stage, fingerprint)
    for name, content in files.items():
        (folder / name).write_text(content)
    run.finish(Manifest(stage, fingerprint, 1.5, {"documents": 3}))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "runs" / "mine")
    run.create(Recipe(name="mine", seed=7))
    return run


# --- The folder and its recipe


def test_a_run_keeps_its_recipe(run: Run) -> None:
    again = Run.existing(run.root)
    assert again.recipe == Recipe(name="mine", seed=7)
    assert again.name == "mine"
    run.create(Recipe(name="mine", seed=8))
    assert again.recipe.seed == 8


def test_the_same_recipe_is_not_written_again(run: Run) -> None:
    path = run.root / "recipe.toml"
    os.utime(path, (1, 1))
    run.create(Recipe(name="mine", seed=7))
    assert path.stat().st_mtime == 1


def test_a_missing_run_is_named_with_those_that_are_there(run: Run) -> None:
    with pytest.raises(RunError, match="no run in this folder") as raised:
        Run.existing(run.root.parent / "other")
    assert "mine" in (raised.value.fix or "")


def test_the_first_run_is_suggested_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(RunError) as raised:
        Run.existing(tmp_path / "nowhere" / "other")
    assert "groundup build demo" in (raised.value.fix or "")


def test_runs_are_listed_newest_first(tmp_path: Path) -> None:
    assert list_runs(tmp_path / "none") == []
    for age, name in ((10, "middle"), (20, "newest"), (1, "oldest")):
        Run(tmp_path / name).create(Recipe())
        os.utime(tmp_path / name / "recipe.toml", (age, age))
    (tmp_path / "no-run").mkdir()
    (tmp_path / "file").write_text("")
    assert [run.name for run in list_runs(tmp_path)] == ["newest", "middle", "oldest"]


# --- What is done


def test_a_stage_is_done_only_when_finished_and_only_for_its_fingerprint(run: Run) -> None:
    assert run.state("corpus", "aa") == "missing"
    folder = run.begin("corpus", "aa")
    (folder / "documents.jsonl").write_text("{}")
    assert run.state("corpus", "aa") == "begun"
    assert run.state("corpus", "bb") == "missing"
    run.finish(Manifest("corpus", "aa", 1.5, {"documents": 3}, {"cores": 2}, {"dedup": "exact"}))
    assert run.state("corpus", "aa") == "done"
    assert run.state("corpus", "bb") == "changed"
    assert run.manifest("corpus") == Manifest("corpus", "aa", 1.5, {"documents": 3}, {"cores": 2}, {"dedup": "exact"})


def test_a_finished_stage_keeps_only_its_result_and_manifest(run: Run) -> None:
    folder = made(run, "corpus", "aa", result="x")
    assert sorted(path.name for path in folder.iterdir()) == [".groundup-folder", "result", "stage.json"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("", "Expecting value"), ("{", "Expecting"), ("[]", "damaged"), ("null", "damaged"), ("[" * 10**5, "recursion"),
        ('{"stage": "corpus"}', "fingerprint: Field required"), ('"seconds": 2.5', "changed by hand"),
    ],
)  # fmt: skip
def test_a_damaged_manifest_is_named_before_its_stage_is_lost(run: Run, damage: str, said: str) -> None:
    path = made(run, "corpus", "aa") / "stage.json"
    path.write_text(damage if damage[:1] != '"' else path.read_text().replace('"seconds": 1.5', damage))
    assert run.manifest("corpus") is None
    with pytest.raises(ArtifactError, match=rf"stage\.json.*{said}") as caught:
        run.state("corpus", "aa")
    assert "--from corpus" in (caught.value.fix or "")


def test_an_interrupted_start_is_gone_on_with(run: Run) -> None:
    folder = run.begin("pretrain", "aa")
    (folder / "checkpoint").write_text("step 100")
    (folder / "model.groundup-partial-0123456789abcdef").write_text("ha")
    again = Run(run.root).begin("pretrain", "aa")
    assert (again / "checkpoint").read_text() == "step 100"
    assert not (again / "model.groundup-partial-0123456789abcdef").exists()


@pytest.mark.parametrize("finished", [True, False])
def test_what_another_fingerprint_left_is_removed(run: Run, finished: bool) -> None:
    folder = made(run, "pretrain", "aa", checkpoint="old") if finished else run.begin("pretrain", "aa")
    (folder / "metrics.jsonl").write_text("old")
    again = run.begin("pretrain", "bb")
    assert not (again / "metrics.jsonl").exists()
    assert run.state("pretrain", "aa") == "missing"
    assert run.state("pretrain", "bb") == "begun"
    (again / "checkpoint").write_text("new")
    assert (run.begin("pretrain", "bb") / "checkpoint").read_text() == "new"


def test_a_finished_stage_that_begins_again_begins_anew(run: Run) -> None:
    made(run, "corpus", "aa", result="old")
    folder = run.begin("corpus", "aa")
    assert not (folder / "result").exists()
    assert run.state("corpus", "aa") == "begun"


def test_a_stage_can_be_forgotten(run: Run) -> None:
    folder = made(run, "corpus", "aa", result="x")
    made(run, "tokenizer", "bb")
    run.forget("corpus")
    run.forget("never-made")
    assert not folder.exists()
    assert run.state("corpus", "aa") == "missing"
    assert run.state("tokenizer", "bb") == "done"


# --- Fingerprints

plain = st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.none(), max_size=4)
inputs = st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3)
ingredients = st.tuples(st.integers(0, 3), plain, inputs)


@given(ingredients, ingredients)
def test_fingerprints_are_equal_exactly_for_equal_ingredients(
    one: tuple[int, dict[str, object], dict[str, str]], other: tuple[int, dict[str, object], dict[str, str]]
) -> None:
    assert stage_fingerprint(*one) == stage_fingerprint(*one)
    assert (stage_fingerprint(*one) == stage_fingerprint(*other)) == (one == other)


@given(ingredients)
def test_each_ingredient_counts_and_key_order_does_not(one: tuple[int, dict[str, object], dict[str, str]]) -> None:
    version, settings, given_inputs = one
    fingerprint = stage_fingerprint(version, settings, given_inputs)
    assert fingerprint == stage_fingerprint(
        version, dict(reversed(settings.items())), dict(reversed(given_inputs.items()))
    )
    assert fingerprint != stage_fingerprint(version + 1, settings, given_inputs)
    assert fingerprint != stage_fingerprint(version, {**settings, "one more": 1}, given_inputs)
    assert fingerprint != stage_fingerprint(version, settings, {**given_inputs, "one more": "aa"})


# --- One process at a time

HOLDER = """
import sys, time
from groundup.run import Run
with Run(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(run: Run) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run.root)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_two_processes_cannot_hold_one_run(run: Run, holder: subprocess.Popen[str]) -> None:
    assert run.is_worked_on()
    with pytest.raises(RunError, match=f"process {holder.pid}"), run.lock():
        pytest.fail("the lock was given twice")
    assert run.is_worked_on(), "the refusal took the lock away"
    for damage in ("", "[1]", '"ab"', "[" * 10**5):
        (run.root / ".groundup" / "holder.json").write_text(damage)
        with pytest.raises(RunError, match=r"process \? on \? is working on this run"), run.lock():
            pytest.fail("the lock was given twice")


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_leaves_no_stale_lock(run: Run, holder: subprocess.Popen[str], end: signal.Signals) -> None:
    holder.send_signal(end)
    holder.wait()
    assert not run.is_worked_on()
    with run.lock():
        assert run.is_worked_on()
    assert not run.is_worked_on()


def test_a_failure_under_the_lock_frees_it(run: Run) -> None:
    with pytest.raises(ZeroDivisionError), run.lock():
        raise ZeroDivisionError
    with run.lock():
        pass


def test_the_lock_makes_the_runs_folder(tmp_path: Path) -> None:
    run = Run(tmp_path / "not" / "yet")
    assert not run.is_worked_on()
    with run.lock():
        assert run.root.is_dir()


def test_a_manifest_is_plain_json(run: Run) -> None:
    folder = made(run, "corpus", "aa")
    written = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
    assert written["stage"] == "corpus"
    assert written["fingerprint"] == "aa"
    assert written["seconds"] == 1.5
    assert written["summary"] == {"documents": 3}
