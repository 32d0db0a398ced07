"""`groundup build --seeds`: a run for each seed, resumed like any build, and an interval over them by hand."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
from command import CommandLine, groundup
from tiny_run import times, write_recipe

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
