"""The sweep: from a recipe to a law, once, killed or not; and what the command says."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import CommandLine, groundup, start
from tiny_run import build_quietly, tiny_recipe, write_recipe, write_texts

import groundup as gu
from groundup.console import Bar, Console
from groundup.errors import DataError, GroundupError, Interrupted, RecipeError
from groundup.files import own_folder
from groundup.model import count_parameters, training_flops_per_token
from groundup.model.ladder import shape_on_line
from groundup.recipe import Recipe
from groundup.training import scaling_sweep as scaling_sweeps
from groundup.training.scaling_sweep import default_tokens, plan_sweep, seconds_of, sweep_runs, tokens_for

__all__ = ["groundup"]

SIZES = ("200k", "400k", "800k")
TOKENS = [512, 1_024, 2_048]
ASKED: dict[str, Any] = {"sizes": SIZES, "tokens": TOKENS}
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.toml, its shards in runs/tiny, and a finished sweep in runs/scaling."""
    folder = tmp_path_factory.mktemp("sweep")
    write_recipe(folder)
    run = build_quietly(recipe_in(folder), folder / "runs" / "tiny", only=["shards"])
    gu.scaling_sweep(
        recipe_in(folder), run.folder("shards"), out=folder / "runs" / "scaling", console=QUIET, **ASKED
    )  # fmt: skip
    return folder


def recipe_in(folder: Path, *overrides: str) -> Recipe:
    return gu.read_recipe(folder / "tiny.toml", overrides)


def shards(folder: Path) -> Path:
    return folder / "runs" / "tiny" / "shards"


def decided(out: Path) -> dict[str, bytes]:
    """What a sweep leaves that nothing but its question decides."""
    return {name: (out / name).read_bytes() for name in ("law.json", "points.jsonl", "scaling.svg")}


# --- What a sweep leaves


def test_every_run_is_a_point_and_the_law_is_theirs(folder: Path) -> None:
    out = folder / "runs" / "scaling"
    rows = [json.loads(line) for line in (out / "points.jsonl").read_text(encoding="utf-8").splitlines()]
    runs, _ = sweep_runs(recipe_in(folder), SIZES, TOKENS, 320)
    assert len(rows) == len(runs) == 9
    for row, run in zip(rows, runs, strict=True):
        assert row["n_parameters"] == count_parameters(run.config) == run.n_parameters
        assert row["n_non_embedding"] == row["n_parameters"] - 320 * run.config.d_model
        assert 0.9 * run.tokens < row["n_tokens"] < run.tokens + run.settings.batch_size * 64
        assert row["flops"] == pytest.approx(row["n_tokens"] * training_flops_per_token(run.config, 64))
        assert row["steps"] == -(-run.tokens // 64 // run.settings.batch_size) or row["steps"] > 0
    for size in {row["n_parameters"] for row in rows}:
        losses = [row["loss"] for row in rows if row["n_parameters"] == size]
        assert losses == sorted(losses, reverse=True)
    law = gu.ScalingLaw.load(out)
    assert [point.loss for point in law.points] == [row["loss"] for row in rows]
    assert law.data is not None
    assert law.data.recipe == "tiny"
    opened = gu.TokenShards.open(shards(folder), "train")
    assert law.other_data(tokenizer=opened.tokenizer_fingerprint, train=opened.fingerprint) is None
    picture = (out / "scaling.svg").read_text(encoding="utf-8")
    assert all(f'id="curve-{row["n_parameters"]}"' in picture for row in rows)


def test_each_run_is_a_whole_one_with_its_own_schedule(folder: Path) -> None:
    for point in (folder / "runs" / "scaling" / "points").iterdir():
        steps = [json.loads(line) for line in (point / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        rates = [line["lr"] for line in steps if "lr" in line]
        figures = json.loads((point / "point.json").read_text(encoding="utf-8"))
        assert len(rates) == figures["steps"]
        if len(rates) > 4:
            assert rates[-1] < max(rates)  # decayed to its end
        assert steps[-1]["val_loss"] == figures["loss"]
        assert not (point / "checkpoints").exists()
        assert gu.load(point).model.n_parameters == figures["n_parameters"]


def test_a_second_sweep_trains_nothing_and_says_the_same(folder: Path, tmp_path: Path) -> None:
    out = shutil.copytree(folder / "runs" / "scaling", tmp_path / "scaling")
    before = {path: path.stat().st_mtime_ns for path in (out / "points").rglob("*") if path.is_file()}
    gu.scaling_sweep(recipe_in(folder), shards(folder), out=out, console=QUIET, **ASKED)
    assert {path: path.stat().st_mtime_ns for path in (out / "points").rglob("*") if path.is_file()} == before
    assert decided(out) == decided(folder / "runs" / "scaling")


@pytest.mark.parametrize(
    ("override", "finished"),
    [
        ("pretrain.log_every=3", 9),  # changes no result
        ("pretrain.lr=0.01", 9),  # the ladder decides it for each run
        ("seed=2", 0),
        ("pretrain.weight_decay=0.2", 0),
        ("model.dropout=0.1", 0),
    ],
)
def test_only_runs_of_the_same_question_count(folder: Path, override: str, finished: int) -> None:
    sweep = plan_sweep(recipe_in(folder, override), shards(folder), out=folder / "runs" / "scaling", **ASKED)
    assert sum(sweep.finished(run) is not None for run in sweep.runs) == finished


def test_a_damaged_point_is_trained_again(folder: Path, tmp_path: Path) -> None:
    out = shutil.copytree(folder / "runs" / "scaling", tmp_path / "scaling")
    sweep = plan_sweep(recipe_in(folder), shards(folder), out=out, **ASKED)
    (sweep.folder(sweep.runs[0]) / "point.json").write_text("{", encoding="utf-8")
    gu.scaling_sweep(recipe_in(folder), shards(folder), out=out, console=QUIET, **ASKED)
    assert decided(out) == decided(folder / "runs" / "scaling")


# --- Interrupted


class StoppedAt(Console):
    """Presses Ctrl-C once, when the sweep's bar says a certain thing."""

    def __init__(self, when: str) -> None:
        super().__init__(quiet=True)
        self.when: str | None = when

    def bar(self, name: str, total: float | None = None) -> Bar:
        outer = self

        class Watched(Bar):
            def update(self, completed: float, total: float | None = None, note: str | None = None) -> None:
                if outer.when is not None and outer.when in (note or ""):
                    outer.when = None
                    os.kill(os.getpid(), signal.SIGINT)

        return Watched(self, name, total)


def test_stopped_inside_a_run_and_resumed_gives_the_same_law(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "scaling"
    often = recipe_in(folder, "pretrain.log_every=1")
    with pytest.raises(Interrupted, match="stopped in run 5 of 9"):
        gu.scaling_sweep(often, shards(folder), out=out, console=StoppedAt("run 5/9"), **ASKED)
    assert len(list(out.glob("points/*/point.json"))) == 4
    assert len(list(out.glob("points/*/checkpoints/step-*"))) == 1
    assert not (out / "law.json").exists()
    gu.scaling_sweep(recipe_in(folder), shards(folder), out=out, console=QUIET, **ASKED)
    assert decided(out) == decided(folder / "runs" / "scaling")


@pytest.mark.slow
def test_killed_anywhere_and_given_again_the_command_ends_with_the_same_law(
    groundup: CommandLine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    out = Path("killed")
    command = ("scaling", "tiny.toml", "--sizes", ",".join(SIZES), "--tokens", "512,1024,2048", "--out", out)
    for number, code, n_points in ((signal.SIGTERM, 130, 2), (signal.SIGKILL, -signal.SIGKILL, 4)):
        with start(*command) as process:
            end = time.monotonic() + 120
            while len(list(out.glob("points/*/point.json"))) < n_points and time.monotonic() < end:
                time.sleep(0.01)
            process.send_signal(number)
            _, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        assert ("Go on:" in err) is (number == signal.SIGTERM)
        assert not (out / "law.json").exists()
    assert groundup(*command).code == 0
    assert decided(out) == decided(folder / "runs" / "scaling")


# --- The grid


def test_sizes_lie_on_one_line_of_shapes() -> None:
    shapes = [shape_on_line(size, 2_048) for size in (200_000, 500_000, 1_000_000, 2_000_000, 20_000_000, 10**9)]
    assert [(shape["n_layers"], shape["d_model"]) for shape in shapes[:4]] == [(2, 64), (3, 96), (4, 128), (5, 160)]
    assert all(32 <= shape["d_model"] / shape["n_layers"] <= 64 for shape in shapes)


def test_runs_keep_the_recipe_s_architecture_and_follow_the_ladder(folder: Path) -> None:
    recipe = recipe_in(
        folder, "model.activation=gelu", "model.dropout=0.1", "pretrain.max_grad_norm=0.5", "pretrain.ema=0.9"
    )
    runs, notes = sweep_runs(recipe, SIZES, TOKENS, 320)
    assert notes == []
    assert [run.flops for run in runs] == sorted(run.flops for run in runs)
    for run in runs:
        assert (run.config.activation, run.config.dropout, run.config.context_length) == ("gelu", 0.1, 64)
        assert (run.settings.max_grad_norm, run.settings.ema, run.settings.tokens) == (0.5, 0.9, run.tokens)
    rates = {run.config.d_model: run.settings.lr for run in runs}
    assert rates[64] > rates[96] > rates[128]


def test_default_budgets_pass_over_the_text_four_times_at_most(folder: Path) -> None:
    recipe = recipe_in(folder)
    assert max(default_tokens(recipe, SIZES, 320, 10_000)) == 40_000
    plenty = default_tokens(recipe, SIZES, 320, 10**9)
    assert plenty == sorted(plenty)
    assert plenty == default_tokens(recipe, SIZES, 320, 10**10)


def test_sizes_that_fall_together_are_said_in_the_refusal(folder: Path) -> None:
    with pytest.raises(DataError, match=r"6 runs of 2 sizes.*Size 210k is .* as another"):
        plan_sweep(recipe_in(folder), shards(folder), sizes=("200k", "210k", "800k"), tokens=TOKENS)


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({"sizes": ("200k", "400k", "1")}, RecipeError, "no number of parameters"),
        ({"tokens": [0, 2_000, 4_000]}, DataError, "no budget"),
        ({"tokens": []}, DataError, "0 runs"),
        ({"sizes": []}, DataError, "0 runs"),
        ({"tokens": TOKENS, "minutes": 3.0}, DataError, "both given"),
        ({"minutes": -1.0}, DataError, "no time"),
        ({"minutes": float("nan")}, DataError, "no time"),
        ({"minutes": 0.001}, DataError, "smallest budget would be"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(
    folder: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], error: type[GroundupError], said: str
) -> None:
    monkeypatch.setattr(scaling_sweeps, "PROBE_SECONDS", 0.01)
    with pytest.raises(error, match=said) as raised:
        plan_sweep(recipe_in(folder), shards(folder), **{"sizes": SIZES, **asked})
    assert len(str(raised.value).splitlines()) >= 2  # with a way out


# --- Time


def test_budgets_for_a_time_take_about_that_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling_sweeps, "PROBE_SECONDS", 0.05)
    # The clock is the machine's: here each model runs at a speed that is given.
    monkeypatch.setattr(scaling_sweeps, "training_speed", lambda run: 1e10 / run.n_parameters)
    recipe = recipe_in(folder, "pretrain.eval_tokens=1000")
    budgets = tokens_for(10.0, recipe, SIZES, 320, 10**12)
    runs, _ = sweep_runs(recipe, SIZES, budgets, 320)
    assert sum(seconds_of(runs)) == pytest.approx(600, rel=0.05)  # budgets have two digits
    assert [later / budget for budget, later in itertools.pairwise(budgets)] == pytest.approx([2.0] * 3, rel=0.05)
    assert max(tokens_for(10.0, recipe, SIZES, 320, 100_000)) == 400_000


def test_the_probe_measures_real_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling_sweeps, "PROBE_SECONDS", 0.05)
    runs, _ = sweep_runs(recipe_in(folder), ("200k",), [2_000, 8_000], 320)
    short, long = seconds_of(runs)
    assert 0 < short < long


def test_budgets_chosen_for_a_time_stay(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speed = [1e5]
    monkeypatch.setattr(scaling_sweeps, "training_speed", lambda run: speed[0])
    monkeypatch.setattr(scaling_sweeps, "MOST_EPOCHS", 10**6)
    recipe, asked = recipe_in(folder, "pretrain.eval_tokens=100"), {"sizes": SIZES, "minutes": 2.0}
    first = plan_sweep(recipe, shards(folder), out=tmp_path, **asked)
    budgets = sorted({run.tokens for run in first.runs})
    kept = {"question": first.question, "tokens": budgets}
    (tmp_path / "budget.json").write_text(json.dumps(kept), encoding="utf-8")
    speed[0] = 1e6  # another machine goes on
    again = plan_sweep(recipe, shards(folder), out=tmp_path, **asked)
    assert sorted({run.tokens for run in again.runs}) == budgets
    other = plan_sweep(recipe, shards(folder), out=tmp_path, sizes=SIZES, minutes=3.0)
    assert max(run.tokens for run in other.runs) > 10 * max(budgets)


# --- The command


def scaling(groundup: CommandLine, folder: Path, *arguments: str) -> Any:
    asked = ("--sizes", ",".join(SIZES), "--tokens", "512,1_024,2048", "--runs", folder / "runs")
    return groundup("scaling", folder / "tiny.toml", *asked, *arguments)


def test_the_command_ends_with_the_law_and_what_it_promises(groundup: CommandLine, folder: Path) -> None:
    ended = scaling(groundup, folder)
    assert ended.code == 0
    law = gu.ScalingLaw.load(folder / "runs" / "scaling")
    low, high = law.intervals()["alpha"]
    assert f"{law.alpha:.3g}" in ended.out
    assert f"{low:.3g} to {high:.3g}" in ended.out
    assert "n = 9 runs" in ended.out
    assert "extrapolated: 100× the compute of the largest run" in ended.out
    assert "9 runs, 9 of them there already" in ended.err


def test_in_json_it_is_the_law(groundup: CommandLine, folder: Path) -> None:
    told = scaling(groundup, folder, "--json").json
    law = gu.ScalingLaw.load(folder / "runs" / "scaling")
    assert told["alpha"] == law.alpha
    assert [row["beyond"] for row in told["compute_optimal"]] == pytest.approx([1.0, 10.0, 100.0])


def test_a_dry_run_says_what_it_would_cost(
    groundup: CommandLine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling_sweeps, "PROBE_SECONDS", 0.05)
    out = tmp_path / "new"
    told = scaling(groundup, folder, "--dry-run", "--json", "--out", str(out)).json
    assert [row["done"] for row in told["runs"]] == [False] * 9
    assert told["seconds"] == pytest.approx(sum(row["seconds"] for row in told["runs"]))
    shown = scaling(groundup, folder, "--dry-run", "--out", str(out))
    assert "9 runs" in shown.out
    assert "4 × 128" in shown.out
    assert not out.exists()
    done = scaling(groundup, folder, "--dry-run", "--json").json
    assert done["seconds"] == 0
    assert all(row["done"] for row in done["runs"])


def test_a_dry_run_without_shards_says_what_comes_first(groundup: CommandLine, tmp_path: Path) -> None:
    write_recipe(tmp_path)
    ended = scaling(groundup, tmp_path, "--dry-run")
    assert ended.code == 0
    assert "corpus, tokenizer, shards would be done first" in ended.out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (lambda folder: ("--tokens", "many"), 2, "is no list of numbers"),
        (lambda folder: ("--set", f"pretrain.init={folder / 'runs'}"), 1, "models that begin fresh"),
        (lambda folder: ("--out", folder / "runs" / "tiny"), 1, "a run's folder"),
        (lambda folder: ("--minutes", "2"), 1, "both given"),
    ],
)
def test_wrong_questions_are_answered_in_words(
    groundup: CommandLine, folder: Path, change: Callable[[Path], tuple[Any, ...]], code: int, said: str
) -> None:
    ended = scaling(groundup, folder, *map(str, change(folder)))
    assert ended.code == code
    assert said in " ".join(ended.err.split())


@pytest.mark.parametrize(
    ("asked", "code", "said"),
    [
        (("--minutes", "0"), 1, "no time"),
        (("--sizes", "200k,400k,banana"), 2, "no number of parameters"),
        (("--tokens", "5000"), 1, "too few for a law"),
    ],
)
def test_wrong_questions_are_answered_before_the_text_is_read(
    groundup: CommandLine, tmp_path: Path, asked: tuple[str, str], code: int, said: str
) -> None:
    ended = groundup("scaling", "demo", "--runs", str(tmp_path / "runs"), *asked)
    assert ended.code == code
    assert said in " ".join(ended.err.split())
    assert not (tmp_path / "runs").exists()


def test_losses_without_a_law_are_refused_but_kept(tmp_path: Path) -> None:
    # Taught that every token is about as probable as any other, no model learns, whatever its size.
    recipe = tiny_recipe(write_texts(tmp_path / "texts.jsonl"), "pretrain.label_smoothing=0.999")
    run = build_quietly(recipe, tmp_path / "tiny", only=["shards"])
    own_folder(tmp_path / "s")
    (tmp_path / "s" / "law.json").write_text("an earlier sweep's", encoding="utf-8")
    with pytest.raises(DataError, match="do not fall"):
        gu.scaling_sweep(recipe, run.folder("shards"), out=tmp_path / "s", console=QUIET, **ASKED)
    assert not (tmp_path / "s" / "law.json").exists()
    assert len((tmp_path / "s" / "points.jsonl").read_text(encoding="utf-8").splitlines()) == 9
