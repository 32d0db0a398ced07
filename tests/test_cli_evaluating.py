"""`groundup evaluate MODEL --tasks` and `groundup compare`: results stand where they are said to, by model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command import CommandLine, groundup
from tiny_run import copy_of_finished, finished_run, write_recipe

from groundup.corpus import stream_documents

__all__ = ["groundup"]

FIELDS = 'kind = "choice"\nfiles = "mine.jsonl"\ncontext = "{{ q }}"\nchoices = "answers"\ngold = "{{ right }}"\n'


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "mine.toml").write_text(FIELDS)
    rows = [{"q": f"Which is {n}?", "answers": ["one", f"number {n}"], "right": n % 2} for n in range(6)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "mine.toml"


def test_models_of_anybody_keep_their_scores_apart_and_are_compared(groundup: CommandLine, mine: Path) -> None:
    for name, stage in (("one", "pretrain"), ("two", "sft")):
        shutil.copytree(finished_run().folder(stage) / "model", mine.parent / name)
        done = groundup("evaluate", mine.parent / name, "--tasks", mine, "--data", mine.parent, "--json")
        assert done.code == 0
        assert done.json["tasks"]["mine"]["n"] == 6
        assert (mine.parent / f"{name}-benchmarks" / "scores.json").is_file()
    quiet = groundup("evaluate", mine.parent / "one", "--tasks", mine, "--data", mine.parent, "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    found = groundup("compare", mine.parent / "one-benchmarks", mine.parent / "two-benchmarks", "--json").json
    assert [(one["benchmark"], one["n"]) for one in found] == [("mine", 6)]
    assert "mine" in groundup("compare", mine.parent / "one-benchmarks", mine.parent / "two-benchmarks").out


def test_items_of_the_training_text_are_told(groundup: CommandLine, mine: Path) -> None:
    run = finished_run()
    text = next(document.text for document in stream_documents(run.folder("corpus"), "train"))
    rows = [json.loads(line) for line in mine.with_suffix(".jsonl").read_text().splitlines()]
    rows[2]["q"] = " ".join(text.split()[:40])
    mine.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = ("--tasks", mine, "--data", mine.parent, "--scores", mine.parent / "scores")
    done = groundup("evaluate", run.root, *where, "--contamination", 13)
    assert done.code == 0
    assert "without 1 items" in " ".join(done.out.split())


def test_generated_sets_and_benchmarks_are_asked_in_one_call_of_a_run_a_recipe_or_a_folder(
    groundup: CommandLine, mine: Path
) -> None:
    run = copy_of_finished(mine.parent / "runs")
    asked = ("--tasks", f"groundup:tasks,bits_per_byte,{mine}", "--data", mine.parent, "--limit", "4", "--json")
    first = groundup("evaluate", run.root, *asked)
    assert first.code == 0, first.err
    assert first.json["tasks"].keys() == {"groundup:tasks", "bits_per_byte", "mine"}
    assert "model: " in first.err
    assert "/sft " in first.err  # which can be asked questions
    assert (run.root / "sft" / "benchmarks" / "groundup-tasks.jsonl").is_file()
    recipe = write_recipe(mine.parent, "groundup:classics")
    again = groundup("evaluate", recipe, *asked, "--out", run.root)
    assert again.json == first.json
    # The same model, without the run around it: no validation text.
    folder = Path(shutil.copytree(run.root / "sft" / "model", mine.parent / "own"))
    chat = groundup("evaluate", folder, "--tasks", f"groundup:tasks,{mine}", *asked[2:], "--chat")
    assert chat.json["model"] == first.json["model"]
    assert chat.json["tasks"]["groundup:tasks"] == first.json["tasks"]["groundup:tasks"]
    assert chat.json["tasks"]["mine"]["settings"]["chat"] is True
    refused = groundup("evaluate", folder, *asked)
    assert refused.code != 0
    assert "bits_per_byte: no run with a corpus is around this model" in " ".join(refused.err.split())


def test_a_wrong_task_is_refused_before_a_model_is_read(groundup: CommandLine, mine: Path) -> None:
    (mine.parent / "broken").mkdir()
    for tasks, words in (("groundup:taks", "Did you mean 'groundup:tasks'"), ("piqa", "piqa.jsonl")):
        done = groundup("evaluate", mine.parent / "broken", "--tasks", tasks, "--data", mine.parent)
        assert done.code != 0
        assert words in " ".join(done.err.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--limit", "5"], "--limit: it is about --tasks"),
        (["--tasks", ","], "--tasks ',' names none"),
        (["--tasks", "groundup:tasks", "--samples", "1001"], "equal to 1000"),
        (["--tasks", "groundup:tasks", "--force"], "--force: with --tasks it does nothing"),
        (["--tasks", "groundup:tasks", "--smoke"], "--smoke: with --tasks it does nothing to a folder"),
        (["--tasks", "groundup:tasks", "--samples", "2"], "--samples: does nothing for groundup:tasks"),
        (["--tasks", "groundup:tasks", "--unisolated-code"], "--unisolated-code: does nothing for groundup:tasks"),
        (["--tasks", "groundup:tasks,bits_per_byte", "--shots", "2"], "--shots: does nothing for groundup:tasks, bits"),
        (["--tasks", "groundup:tasks", "--data", "."], "--data: does nothing for groundup:tasks"),
        (["--tasks", "bits_per_byte", "--chat"], "--chat: does nothing for bits_per_byte"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(groundup: CommandLine, options: list[str], words: str) -> None:
    done = groundup("evaluate", finished_run().root, *options)
    assert done.code != 0
    assert words in done.err


def test_of_a_recipe_only_the_name_can_be_set_beside_tasks(groundup: CommandLine, mine: Path) -> None:
    recipe = write_recipe(mine.parent, "groundup:classics")
    done = groundup("evaluate", recipe, "--tasks", mine, "--set", "name=other", "--set", "pretrain.tokens=9000")
    assert done.code != 0
    assert "--set: with --tasks only the recipe's name counts" in done.err
