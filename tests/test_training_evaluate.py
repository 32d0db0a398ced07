"""What a model is asked while it trains: it changes no weight, and whatever fails there costs the run nothing."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_worker import train_in
from generation_models import small_tokenizer
from safetensors.torch import load_file
from test_training_faults import Listening, bits
from test_training_loop import QUIET, interrupted_at, make_job, on_two_processes, weights
from tiny_run import build_quietly, times, tiny_recipe, write_texts

from groundup.distributed import current_world
from groundup.errors import GroundupError, Interrupted
from groundup.evaluation.benchmarks import EvaluationTask, Item
from groundup.evaluation.during import scores_during
from groundup.evaluation.measure import Record, measure
from groundup.evaluation.scorecard import score_model
from groundup.files import own_folder
from groundup.model import Transformer, preset
from groundup.recipe import EvaluateSettings
from groundup.tokenizer import Tokenizer
from groundup.training import TrainingJob, train
from groundup.training.metrics import read_log

ROWS = [{"q": f"{n} and", "a": ["one", "two", "three"], "right": n % 3} for n in range(9)]


@pytest.fixture
def benchmark(tmp_path: Path) -> str:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    described = '''kind = "choice"\nfiles = "rows.jsonl"\ncontext = "{{ q }}"\nchoices = "a"\ngold = "{{ right }}"'''
    (tmp_path / "mine.toml").write_text(described, encoding="utf-8")
    return str(tmp_path / "mine.toml")


def job(folder: Path, *tasks: str, data: Path | None = None, **settings: object) -> TrainingJob:
    """Twelve steps with passes at 0, 5, 10 and 12, and these tasks after every second of them, and the last."""
    asked = {"tasks": tasks, "data": str(data or folder.parent), "limit": 6, "every": 2} if tasks else None
    made = make_job(folder, evaluate=asked, **settings)
    shape = preset("ground-nano", vocab_size=small_tokenizer().vocab_size, context_length=128, dropout=0.1)
    made.modules["model"] = Transformer(shape)
    made.score = scores_during(made.settings.evaluate, small_tokenizer())
    return made


def noted(made: TrainingJob) -> dict[int, dict[str, object]]:
    """What stands of the tasks in the metrics, by step."""
    lines = read_log(made.folder / "metrics.jsonl")
    asked = {line["step"]: {name: line[name] for name in line if name.startswith("val_")} for line in lines}
    return {step: line for step, line in asked.items() if len(line) > 1}


def test_scores_stand_in_the_metrics_and_are_those_of_the_command(tmp_path: Path, benchmark: str) -> None:
    made = job(tmp_path / "run", benchmark, "groundup:tasks")
    summary = train(made, current_world(), QUIET)
    found = noted(made)
    assert [*found] == [0, 10, 12]
    assert {"val_loss", "val_mine_accuracy", "val_mine_accuracy_stderr", "val_tasks_exact_match_n"} <= found[12].keys()
    settings = EvaluateSettings(tasks=(benchmark,), data=str(tmp_path), limit=6)
    wanted = score_model(made.model, small_tokenizer(), settings).card["tasks"]["mine"]["figures"]["accuracy"]
    assert [found[12][f"val_mine_accuracy{end}"] for end in ("", "_stderr", "_n")] == [
        wanted["value"], wanted["stderr"], 6
    ]  # fmt: skip
    assert summary["val_mine_accuracy"] == wanted["value"]
    assert summary["val_loss"] == found[12]["val_loss"]


def test_it_changes_no_weight_and_resumed_is_bit_identical(tmp_path: Path, benchmark: str) -> None:
    plain = job(tmp_path / "plain", ema=0.9)
    train(plain, current_world(), QUIET)
    whole = job(tmp_path / "whole", benchmark, "groundup:tasks", ema=0.9)
    train(whole, current_world(), QUIET)
    assert all(torch.equal(weights(plain)[name], value) for name, value in weights(whole).items())
    with pytest.raises(Interrupted):
        train(interrupted_at(9, job(tmp_path / "parts", benchmark, "groundup:tasks", ema=0.9)), current_world(), QUIET)
    parts = job(tmp_path / "parts", benchmark, "groundup:tasks", ema=0.9)
    train(parts, current_world(), QUIET)
    assert bits(whole.folder) == bits(parts.folder)
    assert len(noted(whole)) == 3


def test_whatever_fails_there_is_a_warning_and_the_run_goes_on(
    tmp_path: Path, benchmark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(
        model: Transformer, tokenizer: Tokenizer, task: EvaluationTask, items: list[Item], **more: Any
    ) -> list[Record]:
        if task.name == "groundup:tasks":
            raise MemoryError("no room for a cache")
        return measure(model, tokenizer, task, items, **more)

    plain = job(tmp_path / "plain")
    train(plain, current_world(), QUIET)
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1])[:20], encoding="utf-8")
    monkeypatch.setattr("groundup.evaluation.during.measure", no_memory)
    console, made = Listening(), job(tmp_path / "run", benchmark, "groundup:tasks", "nobodys")
    train(made, current_world(), console)
    assert all(torch.equal(weights(plain)[name], value) for name, value in weights(made).items())
    for line in noted(made).values():
        assert "rows.jsonl" in str(line[f"val_{benchmark}_error"])
        assert "line 2" in str(line[f"val_{benchmark}_error"])
        assert line["val_groundup:tasks_error"] == "MemoryError: no room for a cache"
        assert "is no task" in str(line["val_nobodys_error"])
        assert line["val_loss"]
    assert len(console.warnings) == 9


@pytest.mark.slow
def test_what_fails_in_one_of_two_processes_leaves_neither_waiting(tmp_path: Path) -> None:
    """In the midst of a forward pass, which the processes make together where a model is sharded."""
    failing = {"none": 2, "first": 0, "second": 1, "alone": 2}  # the second process is not asked
    for name, rank in failing.items():
        own_folder(tmp_path / name)
        (tmp_path / name / "fails-on").write_text(str(rank))
        (tmp_path / name / "settings.json").write_text('{"ema": 0.9, "evaluate": {"tasks": ["mine"], "every": 2}}')
    own_folder(tmp_path / "plain")
    (tmp_path / "plain" / "settings.json").write_text('{"ema": 0.9}')
    done = on_two_processes(*(tmp_path / name for name in ("plain", "none", "first", "second")))
    assert done.returncode == 0, done.stderr
    train_in(tmp_path / "alone", current_world())
    plain = load_file(tmp_path / "plain" / "weights.safetensors")
    lines = {name: read_log(tmp_path / name / "metrics.jsonl") for name in failing}
    for name in ("none", "first", "second"):
        found = load_file(tmp_path / name / "weights.safetensors")
        assert all(torch.equal(value, found[key]) for key, value in plain.items())
        warned = [(tmp_path / name / f"warnings-{rank}") for rank in (0, 1)]
        if name == "first":
            assert [line["step"] for line in lines[name] if "no memory" in line.get("val_mine_error", "")] == [
                0,
                10,
                20,
            ]
            assert all(path.read_text().count("was not scored: MemoryError") == 3 for path in warned)
        else:
            assert not any(path.exists() for path in warned)
    for name in ("none", "second"):  # and the copy that is asked is the model that is trained, with averaged weights
        told = [[line["val_probe"] for line in lines[one] if "val_probe" in line] for one in (name, "alone")]
        assert len(told[0]) == 3
        assert told[0][0] == pytest.approx(told[1][0], rel=1e-5)
        assert told[0] == pytest.approx(told[1], rel=0.01)  # two processes round otherwise; a pass changes it by 6 %


def test_asked_to_stop_between_two_tasks_it_is_done_again(tmp_path: Path, benchmark: str) -> None:
    asks = []
    made = job(tmp_path / "run", benchmark, "groundup:tasks")
    score = made.score
    assert score is not None

    def stopped(model: Transformer, name: str) -> dict[str, float]:
        asks.append(name)
        if len(asks) == 3:  # the first of the second time
            os.kill(os.getpid(), signal.SIGTERM)
        return score(model, name)

    made.score = stopped
    with pytest.raises(Interrupted, match="step 10"):
        train(made, current_world(), QUIET)
    assert [*noted(made)] == [0]
    again = job(tmp_path / "run", benchmark, "groundup:tasks")
    train(again, current_world(), QUIET)
    assert [*noted(again)] == [0, 10, 12]


def test_a_recipe_asks_for_it_and_changing_it_trains_nothing_again(tmp_path: Path, benchmark: str) -> None:
    texts = write_texts(tmp_path / "texts.jsonl")
    asked = [f'pretrain.evaluate.tasks=["{benchmark}"]', f'pretrain.evaluate.data="{tmp_path}"', "evaluate.tasks=[]"]
    sft = ["align.sft.evaluate.tasks=groundup:tasks", "align.sft.evaluate.limit=4"]
    run = build_quietly(tiny_recipe(texts, *asked, *sft), tmp_path / "tiny")
    for stage, name in (("pretrain", "mine_accuracy"), ("sft", "tasks_exact_match")):
        manifest = run.manifest(stage)
        assert manifest is not None
        assert 0 <= manifest.summary[f"val_{name}"] <= 1
        assert f"{stage}-val_{name}" in (run.root / "report.html").read_text(encoding="utf-8")
    before = times(run)
    build_quietly(tiny_recipe(texts, *asked), tmp_path / "tiny")
    weight = "pretrain/model/model.safetensors"
    assert times(run)[weight] == before[weight]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [("arc_eassy", "Did you mean"), ("bits_per_byte", "every validation pass"), ("piqa", "piqa.jsonl")],
)
def test_a_recipe_that_asks_for_what_there_is_not_is_refused_before_it_runs(
    tmp_path: Path, tasks: str, message: str
) -> None:
    recipe = tiny_recipe(write_texts(tmp_path / "texts.jsonl"), f"pretrain.evaluate.tasks={tasks}")
    with pytest.raises(GroundupError, match=message) as error:
        build_quietly(recipe, tmp_path / "tiny")
    assert "[pretrain.evaluate]" in str(error.value)
    assert not (tmp_path / "tiny" / "pretrain").exists()
