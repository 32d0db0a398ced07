"""`groundup evaluate MODEL --tasks` and `groundup compare`: results stand where they are said to, by model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command import CommandLine, groundup
from tiny_run import finished_run

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
        assert done.json["benchmarks"]["mine"]["n"] == 6
        assert (mine.parent / f"{name}-benchmarks" / "scores.json").is_file()
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--limit", "5"], "--limit: it is about benchmarks"),
        (["--tasks", "arc_easy", "--force"], "--force: with --tasks it does nothing"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(groundup: CommandLine, options: list[str], words: str) -> None:
    done = groundup("evaluate", finished_run().root, *options)
    assert done.code != 0
    assert words in done.err
