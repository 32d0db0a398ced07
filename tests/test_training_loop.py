"""The loop: resumed equals uninterrupted, damaged checkpoints are passed over, two processes equal one."""

import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import train_in
from training_rows import RandomRows

from groundup.console import Console
from groundup.distributed import current_world
from groundup.errors import GroundupError, Interrupted
from groundup.files import own_folder
from groundup.model import Transformer, preset
from groundup.recipe import OptimizerSettings
from groundup.training import NextToken, TrainingJob, forget_checkpoints, train
from groundup.training.metrics import read_log

QUIET = Console(quiet=True)


def make_job(folder: Path, *, n_steps=12, source=None, **settings) -> TrainingJob:
    folder.mkdir(exist_ok=True)
    settings = {"batch_size": 4, "precision": "float32", "eval_every": 5, "checkpoint_seconds": 0.0} | settings
    return TrainingJob(
        name="test",
        modules={"model": Transformer(preset("ground-nano", vocab_size=64, context_length=16, dropout=0.1))},
        objective=NextToken(settings.get("label_smoothing", 0.0), settings.get("z_loss", 0.0)),
        source=source or RandomRows(),
        settings=OptimizerSettings(**settings),
        n_rows=n_steps * settings["batch_size"],
        folder=folder,
    )


def weights(job: TrainingJob) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in job.model.named_parameters()}


def interrupted_at(step: int, job: TrainingJob, number: int = signal.SIGINT) -> TrainingJob:
    """The job, whose process is asked to stop while it computes the given step."""
    passes = itertools.count()

    def ask(model, arguments):
        if model.training and next(passes) == step:
            os.kill(os.getpid(), number)

    job.model.register_forward_pre_hook(ask)
    return job


@pytest.mark.parametrize("stop_at", [0, 3, 4, 9, 10])
def test_interrupted_and_resumed_is_bit_identical(tmp_path, stop_at):
    whole = make_job(tmp_path / "whole")
    train(whole, current_world(), QUIET)
    with pytest.raises(Interrupted, match=f"stopped at step {stop_at + 1} of 12"):
        train(interrupted_at(stop_at, make_job(tmp_path / "parts")), current_world(), QUIET)
    parts = make_job(tmp_path / "parts")
    train(parts, current_world(), QUIET)
    expected = weights(whole)
    assert all(torch.equal(expected[name], value) for name, value in weights(parts).items())
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    forget_checkpoints(parts, current_world())
    assert not (tmp_path / "parts" / "checkpoints").exists()


def test_metrics_say_what_happened(tmp_path):
    job = make_job(tmp_path / "run")
    summary = train(job, current_world(), QUIET)
    lines = read_log(tmp_path / "run" / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    targets = sum(int((RandomRows().rows(4 * step, 4 * step + 4)["targets"] >= 0).sum()) for step in range(12))
    assert steps[-1]["tokens"] == summary["tokens"] == targets
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 5, 10, 12]
    assert summary["final_loss"] < summary["initial_loss"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "not json"])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, damage, capsys):
    whole = make_job(tmp_path / "whole")
    train(whole, current_world(), QUIET)
    with pytest.raises(Interrupted):
        train(interrupted_at(6, make_job(tmp_path / "parts")), current_world(), QUIET)
    newest = sorted((tmp_path / "parts" / "checkpoints").iterdir())[-1]
    assert newest.name == "step-00000007"
    victim = newest / "weights.safetensors"
    content = bytearray(victim.read_bytes())
    if damage == "flip":
        content[-5] ^= 1
        victim.write_bytes(content)
    elif damage == "truncate":
        victim.write_bytes(content[:-100])
    elif damage == "missing":
        victim.unlink()
    else:
        (newest / "state.json").write_text("{")
    parts = make_job(tmp_path / "parts")
    train(parts, current_world(), QUIET)
    assert "step-00000007" in capsys.readouterr().err
    expected = weights(whole)
    assert all(torch.equal(expected[name], value) for name, value in weights(parts).items())


def test_a_checkpoint_of_other_settings_is_not_resumed(tmp_path):
    with pytest.raises(Interrupted):
        train(interrupted_at(6, make_job(tmp_path / "run")), current_world(), QUIET)
    other = make_job(tmp_path / "run", lr=1e-4)
    train(other, current_world(), QUIET)
    fresh = make_job(tmp_path / "fresh", lr=1e-4)
    train(fresh, current_world(), QUIET)
    expected = weights(fresh)
    assert all(torch.equal(expected[name], value) for name, value in weights(other).items())


def test_micro_batches_change_nothing_but_rounding(tmp_path):
    whole, parts = make_job(tmp_path / "a"), make_job(tmp_path / "b", micro_batch_size=1)
    for job in (whole, parts):
        job.modules["model"] = Transformer(preset("ground-nano", vocab_size=64, context_length=16))
        train(job, current_world(), QUIET)
    losses = [[line.get("loss", 0) for line in read_log(tmp_path / name / "metrics.jsonl")] for name in "ab"]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_a_loss_that_is_not_finite_stops_with_likely_causes(tmp_path):
    job = make_job(tmp_path / "run", max_grad_norm=0.0)
    with torch.no_grad():
        job.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(GroundupError, match=r"not finite.*\n.*learning rate"):
        train(job, current_world(), QUIET)


def test_a_wrong_initial_loss_is_said(tmp_path, capsys):
    job = make_job(tmp_path / "run", n_steps=1)
    job.expected_initial_loss = 3.0
    train(job, current_world(), QUIET)
    assert re.search(r"first loss is 4\.\d+, but .* gives 3\.000", capsys.readouterr().err)


def test_another_thread_count_is_said(tmp_path, capsys):
    before = torch.get_num_threads()
    with pytest.raises(Interrupted):
        train(interrupted_at(6, make_job(tmp_path / "run")), current_world(), QUIET)
    try:
        torch.set_num_threads(before + 1)
        train(make_job(tmp_path / "run"), current_world(), QUIET)
    finally:
        torch.set_num_threads(before)
    assert "the same bits cannot be promised" in capsys.readouterr().err


def on_two_processes(*folders: Path) -> subprocess.CompletedProcess[str]:
    """`train_in` each folder, one after the other, on two processes."""
    script, launcher = Path(__file__).with_name("distributed_worker.py"), "torch.distributed.run"
    command = [sys.executable, "-m", launcher, "--standalone", "--nproc-per-node=2", str(script), *map(str, folders)]
    path = os.pathsep.join([str(script.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)


@pytest.mark.slow
def test_begun_on_two_processes_finished_on_one(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    own_folder(parts)
    (parts / "stop-at").write_text("5")
    assert "Interrupted" in on_two_processes(parts).stderr
    assert len(read_log(parts / "metrics.jsonl")) < 20
    (parts / "stop-at").unlink()
    for folder in (whole, parts):
        train_in(folder, current_world())
    losses = [[line.get("loss", 0) for line in read_log(folder / "metrics.jsonl")] for folder in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-6)
