"""The pipeline: each stage once, again when it must, the same bits whatever happens on the way."""

from __future__ import annotations

import gc
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_run
import torch
from lengths import N_KILLS
from tiny_run import SCORES, STAGES, bits, build_quietly, copy_of_finished, finished_run, rewritten, times, tiny_recipe

from groundup import read_recipe
from groundup.console import Console
from groundup.errors import ArtifactError, DataError, GateError, RecipeError, RunError
from groundup.pipeline import build, plan
from groundup.preview import check_recipe, derived_values, smoke_profile
from groundup.recipe import Recipe, parse_recipe, recipe_toml
from groundup.run import Run
from groundup.stage import graph, stages_done


def changed(recipe: Recipe, *overrides: str) -> Recipe:
    """The finished run's recipe with other settings."""
    return tiny_recipe(Path(recipe.corpus.inputs[0]), *overrides)


def states(recipe: Recipe, run: Run) -> dict[str, str]:
    return {item.stage.name: item.state for item in plan(recipe, run)}


# --- What a build leaves


def test_every_stage_leaves_its_manifest_and_the_pipeline_its_page() -> None:
    run = finished_run()
    assert states(run.recipe, run) == dict.fromkeys(STAGES, "done")
    for name in STAGES:
        manifest = run.manifest(name)
        assert manifest is not None
        assert manifest.stage == name
        assert manifest.seconds > 0
        assert manifest.environment["torch"] == torch.__version__
    assert (run.root / "report.html").stat().st_size > 10_000
    assert not list(run.root.rglob("*.groundup-partial-*"))
    assert not list(run.root.rglob("started.json"))
    assert not list(run.root.rglob("checkpoints"))


def test_a_recipe_may_end_with_the_base_model(tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_run.write_texts(tmp_path / "texts.jsonl")).model_copy(update={"align": {}})
    assert list(graph(recipe)) == ["corpus", "tokenizer", "shards", "pretrain", *SCORES[:2]]
    run = build_quietly(recipe, tmp_path / "base")
    rows = json.loads((run.root / "evaluate" / "scores.json").read_text())["rows"]
    assert [row["key"] for row in rows] == ["bits_per_byte", "exact_match"]
    with pytest.raises(RunError, match="'sft' is no stage of this recipe"):
        build_quietly(recipe, tmp_path / "base", only=["sft"])


def test_same_recipe_same_bits_other_seed_other_bits(tmp_path: Path) -> None:
    recipe = finished_run().recipe
    again = build_quietly(recipe, tmp_path / "again")
    assert bits(again) == bits(finished_run())
    other = bits(build_quietly(changed(recipe, "seed=2"), tmp_path / "other"))
    for name in ("pretrain/model/model.safetensors", "pretrain/metrics.jsonl", "sft/model/model.safetensors"):
        assert other[name] != bits(again)[name]


def test_the_caller_keeps_its_number_of_threads(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        build_quietly(finished_run().recipe, tmp_path / "run", only=["corpus"])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# --- What is done again


def test_a_second_build_touches_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = copy_of_finished(tmp_path)
    before = times(run)
    build(run.recipe, run.root, console=Console())
    assert times(run) == before
    assert [line.split() for line in capsys.readouterr().err.splitlines()] == [
        [name, "up", "to", "date"] for name in STAGES
    ]


@pytest.mark.parametrize(
    ("override", "again"),
    [
        ("align.sft.epochs=0.5", {"sft", "evaluate/sft"}),
        ("evaluate.limit=10", set(SCORES)),
        ("generate.temperature=0.1", set()),
        ("pretrain.checkpoint_seconds=7.0", set()),
        ("about=other words", set()),
        ("pretrain.lr=0.001", {"pretrain", "sft", *SCORES[1:]}),
        ("shards.shard_tokens=2000", {"shards", "pretrain", "sft", *SCORES[1:]}),
        ("corpus.min_characters=2", set(STAGES)),
    ],
)
def test_a_changed_setting_is_done_again_with_what_stands_on_it(override: str, again: set[str]) -> None:
    run = finished_run()
    assert {name for name, state in states(changed(run.recipe, override), run).items() if state != "done"} == again


def test_a_changed_branch_redoes_it_and_its_scores_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = copy_of_finished(tmp_path)
    before = times(run)
    build(changed(run.recipe, "align.sft.epochs=0.5"), run.root, console=Console())
    assert rewritten(run, before) == {"sft", "evaluate/sft"}
    assert times(run)["report.html"] > before["report.html"]
    assert "align.sft.epochs: 1.0 -> 0.5" in capsys.readouterr().err


def test_changed_texts_are_noticed_and_touched_ones_are_not(tmp_path: Path) -> None:
    texts = tiny_run.write_texts(tmp_path / "texts.jsonl")
    recipe = tiny_recipe(texts)
    run = build_quietly(recipe, tmp_path / "run", only=["shards"])
    os.utime(texts, (1, 1))
    assert states(recipe, run)["corpus"] == "done"
    texts.write_text(texts.read_text() + '{"text": "One more."}\n')
    assert {name: state for name, state in states(recipe, run).items() if state != "missing"} == dict.fromkeys(
        ("corpus", "tokenizer", "shards"), "changed"
    )


@pytest.mark.parametrize(
    ("options", "again"),
    [
        ({"start_from": "sft"}, {"sft", "evaluate/sft"}),
        ({"only": ["tokenizer"], "force": True}, {"tokenizer"}),
        ({"only": ["evaluate"], "start_from": "evaluate/pretrain"}, {"evaluate/pretrain"}),
        ({"only": ["shards"]}, set()),
    ],
)
def test_what_is_asked_for_is_done_again_with_the_same_bits(
    tmp_path: Path, options: dict[str, object], again: set[str]
) -> None:
    run = copy_of_finished(tmp_path)
    before = times(run)
    build_quietly(run.recipe, run.root, **options)
    assert rewritten(run, before) == again
    assert bits(run) == bits(finished_run())


def test_all_is_done_again_by_force_and_an_interrupted_force_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_of_finished(tmp_path)
    before = times(run)

    def fail(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr("groundup.tokenizer.Tokenizer.train", fail)
        with pytest.raises(ZeroDivisionError):
            build_quietly(run.recipe, run.root, force=True)
    assert states(run.recipe, run) == {
        "corpus": "done", "tokenizer": "begun", **dict.fromkeys(STAGES[2:], "missing")
    }  # fmt: skip
    build_quietly(run.recipe, run.root)
    assert rewritten(run, before) == set(STAGES)
    assert bits(run) == bits(finished_run())


def test_a_lost_stage_is_made_again_and_nothing_else(tmp_path: Path) -> None:
    run = copy_of_finished(tmp_path)
    shutil.rmtree(run.root / "tokenizer")
    (run.root / "shards" / "stage.json").write_text("{")
    before = times(run)
    with pytest.raises(ArtifactError, match=r"shards/stage\.json: .*\n.*--from shards"):
        build_quietly(run.recipe, run.root)
    assert plan(run.recipe, run, strict=False)[2].problem
    assert not rewritten(run, before)
    (run.root / "shards" / "stage.json").unlink()
    build_quietly(run.recipe, run.root)
    assert rewritten(run, before) == {"tokenizer", "shards"}
    assert bits(run) == bits(finished_run())


@pytest.mark.parametrize(
    ("name", "taken_by"),
    [
        ("corpus/documents.jsonl", "shards"), ("tokenizer/tokenizer.json", "shards"),
        ("shards/train-00000.bin", "pretrain"), ("shards/validation-00000.idx", "pretrain"),
        ("pretrain/model/model.safetensors", "evaluate/pretrain"),
    ],
)  # fmt: skip
def test_one_flipped_bit_stops_the_stage_that_takes_the_file(tmp_path: Path, name: str, taken_by: str) -> None:
    run = copy_of_finished(tmp_path)
    content = bytearray((run.root / name).read_bytes())
    content[len(content) // 2] ^= 1
    (run.root / name).write_bytes(content)
    made_by = name.partition("/")[0]
    before = times(run)
    with pytest.raises(ArtifactError, match=rf"{name}: damaged or changed: .*\n.*--from {made_by}"):
        build_quietly(run.recipe, run.root, start_from=taken_by)
    assert not rewritten(run, before)


def test_where_sizes_are_to_be_enough_no_digest_is_compared(tmp_path: Path) -> None:
    run = copy_of_finished(tmp_path)
    path = run.root / "corpus" / "documents.jsonl"
    path.write_bytes(path.read_bytes().replace(b"e", b"a", 1))
    recipe = changed(run.recipe, "verify=false")
    build_quietly(recipe, run.root, only=["shards"], start_from="shards")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"documents\.jsonl: .* bytes instead of"):
        build_quietly(recipe, run.root, only=["shards"], start_from="shards")


def test_an_unknown_stage_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="'pretraining' is no stage") as raised:
        build_quietly(finished_run().recipe, tmp_path / "run", start_from="pretraining")
    assert ", ".join(STAGES) in (raised.value.fix or "")


# --- One process at a time

HOLDER = """
import sys, time
from groundup.run import Run
from groundup.stage import graph, stages_done
with Run(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_run_that_another_process_builds_is_refused_until_that_is_gone(tmp_path: Path) -> None:
    run = copy_of_finished(tmp_path)
    before = times(run)
    command = [sys.executable, "-c", HOLDER, str(run.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(RunError, match=f"process {holder.pid} "):
                build_quietly(run.recipe, run.root, force=True)
            assert times(run) == before
        finally:
            holder.kill()
    build_quietly(run.recipe, run.root)
    assert times(run) == before


# --- Gates and checks before anything runs


def test_a_missed_gate_is_told_after_everything_is_built(tmp_path: Path) -> None:
    run = copy_of_finished(tmp_path)
    fall = '{metric = "bits_per_byte", over = "start", max = -0.01}'
    strict = changed(run.recipe, f'evaluate.gates=[{fall}, {{metric = "exact_match", model = "sft", min = 0.9}}]')
    for _ in range(2):  # building again does not forget it
        with pytest.raises(GateError, match=r"exact match of sft: at least 0\.9, is 0") as raised:
            build_quietly(strict, run.root)
        assert "bits per byte" not in str(raised.value)
        assert set(states(strict, run).values()) == {"done"}
    build_quietly(strict, run.root, only=["sft"])
    build_quietly(changed(run.recipe, f"evaluate.gates=[{fall}]"), run.root)


def test_a_gate_on_a_stages_own_figure_is_held_where_nothing_is_scored(tmp_path: Path) -> None:
    run = copy_of_finished(tmp_path)
    strict = changed(run.recipe, "evaluate.tasks=[]", 'evaluate.gates=[{metric="val_loss", model="sft", max=0.001}]')
    with pytest.raises(GateError, match=r"val_loss of sft: at most 0\.001, is "):
        build_quietly(strict, run.root)


def test_scores_of_other_settings_are_not_taken_for_those_of_now(tmp_path: Path) -> None:
    run = copy_of_finished(tmp_path)
    build_quietly(changed(run.recipe, "align.sft.epochs=0.5"), run.root, only="pretrain")
    scores = json.loads((run.root / "evaluate" / "scores.json").read_text())
    assert {row["model"] for row in scores["rows"]} == {"pretrain"}
    assert "Made with other settings" in (run.root / "report.html").read_text()


@pytest.mark.parametrize(
    ("file", "damaged"),
    [("scores.json", '{"rows": ['), ("sft/scores.json", '{"format": 2, "tasks": {"bits_per_byte": 3}, "core": null}')],
)
def test_damaged_scores_are_made_again(tmp_path: Path, file: str, damaged: str) -> None:
    run = copy_of_finished(tmp_path)
    (run.root / "evaluate" / file).write_text(damaged)
    build_quietly(run.recipe, run.root)
    assert bits(run) == bits(finished_run())


def test_with_another_seed_nothing_of_the_first_is_current(tmp_path: Path) -> None:
    run = copy_of_finished(tmp_path)
    assert stages_done(run) == list(STAGES)
    run.create(changed(run.recipe, "seed=2"))
    assert stages_done(run) == []


def problems_of(recipe: Recipe) -> list[str]:
    with pytest.raises(RecipeError) as raised:
        check_recipe(recipe, "my.toml")
    return [str(problem) for problem in raised.value.problems]


def test_what_only_the_whole_recipe_shows_is_told_at_once(tmp_path: Path) -> None:
    found = problems_of(
        parse_recipe(
            '[corpus]\ninputs = ["no/such.txt"]\nlanguages = ["english"]\n[model]\ncontext_length = 64\n'
            '[pretrain]\nsequence_length = 128\n[align.sft]\ndata = ["no/talks.jsonl"]\n'
            '[evaluate]\ntasks = ["bits_per_bite"]\n',
            "my.toml",
        )
    )
    places = [
        "[corpus] inputs: no/such.txt: no such file or folder",
        "[corpus] languages = 'english': not a code",
        "[pretrain] sequence_length = 128: longer than the model's context of 64.",
        "[align.sft] data: no/talks.jsonl: no such file or folder",
        "[evaluate] tasks: 'bits_per_bite' is no task. Did you mean 'bits_per_byte'?",
    ]
    assert len(found) == len(places)
    for problem, place in zip(found, places, strict=True):
        assert problem.startswith(place)


def test_an_unknown_preset_is_told_with_the_nearest(tmp_path: Path) -> None:
    recipe = parse_recipe('[model]\npreset = "ground-1n"\n', "my.toml")
    assert any("ground-1m" in problem for problem in problems_of(recipe))


def test_a_single_missing_file_is_no_wrong_recipe(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "texts.jsonl")
    with pytest.raises(DataError, match="no such file") as raised:
        build_quietly(recipe, tmp_path / "run")
    assert raised.value.exit_code == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["demo", "demo-full", "shakespeare"])
def test_shipped_recipes_and_their_smoke_profiles_are_sound(name: str) -> None:
    recipe = read_recipe(name)
    check_recipe(recipe, name)
    smoke = smoke_profile(recipe)
    check_recipe(smoke, name)
    assert smoke.name == f"{name}-smoke"
    assert int(smoke.pretrain.tokens) <= 160_000
    assert smoke.corpus == recipe.corpus
    assert smoke.model == recipe.model
    assert parse_recipe(recipe_toml(smoke), name) == smoke


def test_derived_values_say_why() -> None:
    recipe = finished_run().recipe
    derived = {name: (value, reason) for name, value, reason in derived_values(recipe)}
    pretrained = finished_run().manifest("pretrain")
    assert pretrained is not None
    assert derived["pretrain.steps"][0] == str(pretrained.summary["steps"])
    assert derived["model parameters"][0] == f"{pretrained.summary['parameters']:,}"
    assert derived["pretrain.sequence_length"] == ("64", "the model's context")
    assert "model.context_length" not in derived
    assert derived["model.n_layers"] == ("2", "preset ground-nano")
    optimal = {
        name: (value, why) for name, value, why in derived_values(changed(recipe, "pretrain.tokens=compute-optimal"))
    }
    assert optimal["pretrain.tokens"][1].startswith("20 for each of")


@pytest.mark.timeout(60)
def test_values_of_a_batch_without_measure_are_derived_at_once() -> None:
    recipe = changed(finished_run().recipe, "pretrain.batch_size=900_000_000_000")
    assert any(name == "pretrain.steps" for name, _, _ in derived_values(recipe))


def test_a_mark_that_a_kill_left_behind_a_manifest_goes(tmp_path: Path) -> None:
    shutil.copytree(finished_run().root, tmp_path / "tiny")
    run = Run(tmp_path / "tiny")
    marks = [run.folder(stage) / "started.json" for stage in STAGES]
    for mark in marks:
        mark.write_text("{}")
    build_quietly(finished_run().recipe, run.root)
    assert not any(mark.exists() for mark in marks)


# --- Killed anywhere


def build_in_child(recipe: Recipe, root: Path, events_to_live: int | None = None, days_back: int = 0) -> None:
    """Build in this (forked) process; with `events_to_live` it kills itself at that sync to disk or rename.

    Its clock is set back by `days_back`. Nothing is flushed, since what a process has written outlives it, and only its
    own garbage is collected.
    """
    gc.freeze()
    os.fsync = lambda descriptor: None  # type: ignore[assignment]
    now = time.time
    time.time = lambda: now() - 86400 * days_back
    if events_to_live is not None:
        left = iter(range(events_to_live))

        def mortal(act: Callable[..., object]) -> Callable[..., object]:
            def acts(*arguments: object, **options: object) -> object:
                if next(left, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return act(*arguments, **options)

            return acts

        os.fsync = mortal(os.fsync)  # type: ignore[assignment]
        Path.replace = mortal(Path.replace)  # type: ignore[method-assign, assignment]
    torch.set_num_threads(1)
    build_quietly(recipe, root)


def server() -> multiprocessing.context.ForkServerContext:
    """Processes that have imported everything already, so that a kill lands in the work and not in the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["groundup.pipeline", "groundup.report.page", "tiny_run"])
    return context


def assert_whole(run: Run, uninterrupted: Run) -> None:
    """After all kills: the same bits as an uninterrupted run's, and nothing left lying about."""
    assert bits(run) == bits(uninterrupted)
    assert not list(run.root.rglob("*.groundup-partial-*"))
    names = {path.name for path in run.root.iterdir() if not path.name.startswith(".")}
    assert names == {*STAGES[:5], "evaluate", "recipe.toml", "report.html"}


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    # As the finished run, but with a checkpoint after every step.
    recipe = changed(finished_run().recipe, "pretrain.checkpoint_seconds=0.0", "align.sft.checkpoint_seconds=0.0")
    context, draw, days = server(), random.Random(5), itertools.count()  # each process finds its clock set back

    def start(run: Run) -> multiprocessing.process.BaseProcess:
        """A child that has just taken the run's lock."""
        (run.root / ".groundup/holder.json").unlink(missing_ok=True)
        process = context.Process(target=build_in_child, args=(recipe, run.root, None, next(days)))
        process.start()
        while process.is_alive() and not (run.root / ".groundup/holder.json").exists():
            time.sleep(0.001)
        return process

    uninterrupted = Run(tmp_path / "uninterrupted")
    whole = start(uninterrupted)
    whole.join()
    assert whole.exitcode == 0
    seconds = {name: manifest.seconds for name in STAGES if (manifest := uninterrupted.manifest(name))}

    # Each at a random time in a stage, so that every stage is hit however fast this machine is.
    run = Run(tmp_path / "tiny")
    for target in itertools.islice(itertools.cycle(("corpus", "shards", "pretrain", "sft", "evaluate/sft")), N_KILLS):
        killed = False
        while not killed:
            if run.manifest(target) is not None:
                run.forget(target)  # it was over before the kill: once more
            process = start(run)
            while process.is_alive() and not (run.root / target / "started.json").exists():
                time.sleep(0.001)
            process.join(draw.uniform(0, seconds[target]))
            process.kill()
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL)
            killed = process.exitcode == -signal.SIGKILL
    last = start(run)
    assert last.pid is not None
    os.kill(last.pid, signal.SIGSTOP)
    time.sleep(0.1)
    os.kill(last.pid, signal.SIGCONT)
    last.join()
    assert last.exitcode == 0
    assert_whole(run, uninterrupted)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_smoke_recipe_killed_at_random_moments_ends_with_the_same_bits(tmp_path: Path) -> None:
    recipe = smoke_profile(read_recipe("demo", ["threads=1"]))
    context, draw = server(), random.Random(11)

    def build_for(seconds: float | None, run: Run) -> int | None:
        process = context.Process(target=build_in_child, args=(recipe, run.root))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        return process.exitcode

    uninterrupted, run = Run(tmp_path / "uninterrupted"), Run(tmp_path / "killed")
    began = time.perf_counter()
    assert build_for(None, uninterrupted) == 0
    whole = time.perf_counter() - began
    ends = [build_for(draw.uniform(0, 0.8 * whole / N_KILLS), run) for _ in range(N_KILLS)]
    assert ends == [-signal.SIGKILL] * N_KILLS
    assert build_for(None, run) == 0
    assert_whole(run, uninterrupted)


@pytest.mark.slow
def test_killed_at_any_write_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    recipe = finished_run().recipe
    run, context, draw = Run(tmp_path / "tiny"), server(), random.Random(7)
    kills = 0
    for _ in range(100):
        process = context.Process(target=build_in_child, args=(recipe, run.root, draw.randint(0, 110)))
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0:
            break
        kills += 1
    assert process.exitcode == 0
    assert kills >= 4
    assert_whole(run, finished_run())


def test_a_stage_killed_while_it_is_removed_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage half removed by --force must not be gone on with."""
    run = copy_of_finished(tmp_path)
    fingerprint = plan(run.recipe, run)[3].fingerprint
    run.forget("pretrain")
    run.begin("pretrain", fingerprint)
    (run.root / "pretrain" / "metrics.jsonl").write_text('{"step": 1, "loss": 0.0, "tokens": 1}\n')
    (run.root / "pretrain" / "checkpoints").mkdir()

    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            build_quietly(run.recipe, run.root, only=["pretrain"], force=True)
    assert states(run.recipe, run)["pretrain"] == "missing"
    build_quietly(run.recipe, run.root)
    assert bits(run) == bits(finished_run())
