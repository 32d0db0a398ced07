"""`groundup build --seeds`: a run for each seed, resumed like any build, and an interval over them by hand."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
from command import CommandLine, groundup, start
from tiny_run import bits, build_quietly, times, write_recipe

from groundup.errors import Interrupted
from groundup.recipe import read_recipe
from groundup.run import Run

__all__ = ["groundup"]

T_OF_ONE = 12.706204736  # Student's t with one degree of freedom, 97.5 %


@pytest.mark.slow
def test_two_seeds_give_means_with_intervals_and_are_done_once(groundup: CommandLine, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, without="align.sft")
    asked = ("build", recipe, "--seeds", "3,5", "--runs", tmp_path, "--set", 'evaluate.tasks=["bits_per_byte"]')
    planned = groundup(*asked, "--dry-run", "--json").json
    assert [Path(one["run"]).name for one in planned] == ["seed-3", "seed-5"]
    assert {state for one in planned for state in one["stages"].values()} == {"missing"}
    done = groundup(*asked, "--json")
    assert done.code == 0
    root = tmp_path / "tiny-seeds"
    assert done.json == json.loads((root / "seeds.json").read_text())
    runs = [Run(root / f"seed-{seed}") for seed in (3, 5)]
    assert [read_recipe(run.root / "recipe.toml").seed for run in runs] == [3, 5]
    for row in done.json["rows"]:
        first, second = row["values"]
        assert row["mean"] == pytest.approx((first + second) / 2)
        reach = T_OF_ONE * statistics.stdev(row["values"]) / math.sqrt(2)
        assert (row["low"], row["high"]) == pytest.approx((row["mean"] - reach, row["mean"] + reach))
    told = {(row["key"], row["model"]): row["values"] for row in done.json["rows"]}
    summaries = [run.manifest("pretrain").summary for run in runs]
    assert told["val_loss", "pretrain"] == [summary["val_loss"] for summary in summaries]
    assert told["bits_per_byte", "pretrain"][0] != told["bits_per_byte", "pretrain"][1]

    before = [times(run) for run in runs]
    again = groundup(*asked)
    assert "bits per byte, pretrain" in again.out
    assert [times(run) for run in runs] == before


@pytest.mark.slow
def test_killed_in_the_second_seed_the_same_command_goes_on_to_its_end(groundup: CommandLine, tmp_path: Path) -> None:
    recipe, scored = write_recipe(tmp_path, without="align.sft"), 'evaluate.tasks=["bits_per_byte"]'
    asked = ("build", recipe, "--seeds", "3,5", "--runs", tmp_path, "--set", scored)
    first, second = (Run(tmp_path / "tiny-seeds" / f"seed-{seed}") for seed in (3, 5))
    with start(*asked) as process:
        while not second.folder("pretrain").is_dir():
            assert process.poll() is None
        process.kill()
    assert first.manifest("evaluate/pretrain") is not None
    assert second.manifest("evaluate/pretrain") is None
    before = times(first)
    done = groundup(*asked, "--json")
    assert done.code == 0, done.err
    assert {len(row["values"]) for row in done.json["rows"]} == {2}
    assert times(first) == before
    assert bits(second) == bits(build_quietly(read_recipe(recipe, [scored, "seed=5"]), tmp_path / "whole"))


def test_what_is_forced_is_forgotten_in_all_seeds_before_the_first(
    groundup: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the command that goes on, which is told without --force, does the later ones again too."""
    asked = ("build", write_recipe(tmp_path), "--seeds", "3,5", "--runs", tmp_path, "--only", "corpus")
    assert groundup(*asked).code == 0
    runs = [Run(tmp_path / "tiny-seeds" / f"seed-{seed}") for seed in (3, 5)]
    assert all(run.manifest("corpus") for run in runs)

    def stop(*arguments: object, **options: object) -> None:
        raise Interrupted("corpus: stopped.")

    monkeypatch.setattr("groundup.pipeline.build", stop)
    stopped = groundup(*asked, "--force")
    assert stopped.code == 130
    assert "--force" not in stopped.err
    assert [run.manifest("corpus") for run in runs] == [None, None]


@pytest.mark.parametrize("seeds", ["1", "1,1", "1,01", "1,two", "1,,2"])
def test_seeds_that_are_none_are_refused(groundup: CommandLine, tmp_path: Path, seeds: str) -> None:
    done = groundup("build", "demo", "--seeds", seeds, "--runs", tmp_path)
    assert done.code == 1
    assert "--seeds 1,2,3" in done.err
    assert not list(tmp_path.iterdir())


def test_a_seed_beside_seeds_is_refused(groundup: CommandLine) -> None:
    done = groundup("build", "demo", "--seeds", "1,2", "--set", "seed=5")
    assert (done.code, "--set seed=5: --seeds 1,2 says which seeds" in done.err) == (1, True)


def test_a_folder_of_somebody_else_is_left_alone(groundup: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "demo-seeds").mkdir()
    (tmp_path / "demo-seeds" / "letters.txt").write_text("mine")
    assert "is left as it is" in groundup("build", "demo", "--seeds", "1,2", "--runs", tmp_path).err
    assert [path.name for path in (tmp_path / "demo-seeds").iterdir()] == ["letters.txt"]
