"""What the loop trains beside next-token prediction: on-policy rows, several terms, several modules, frozen ones."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from policy_job import EVERY, N_TOKENS, Draws, policy_job, run
from safetensors.torch import load_file
from torch import Tensor, nn
from training_rows import RandomRows

from groundup.console import Console
from groundup.distributed import World, current_world
from groundup.errors import GroundupError, Interrupted
from groundup.model import ModelConfig, Transformer, preset
from groundup.recipe import OptimizerSettings
from groundup.training import IGNORED, Batch, Term, TrainingJob, loop, pass_flops, train
from groundup.training.checkpoint import complete_checkpoints
from groundup.training.metrics import read_log
from groundup.training.planning import memory
from groundup.training.process import limited_threads

QUIET = Console(quiet=True)
WORKER = Path(__file__).with_name("policy_job.py")
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}",
}


def rewards(folder: Path) -> list[float]:
    return [line["reward"] for line in read_log(folder / "metrics.jsonl")]


def parameters(job: TrainingJob) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in job.trained.named_parameters()}


def one_thread(folder: Path) -> dict[str, Any]:
    """Run the job to its end as the worker does."""
    with limited_threads(1):
        return run(folder, current_world())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainingJob, dict[str, Any]]:
    """The job in one go."""
    folder = tmp_path_factory.mktemp("whole")
    summary = one_thread(folder)
    return folder, summary.pop("job"), summary


def test_a_policy_learns_what_is_rewarded(whole):
    folder, _, summary = whole
    found = rewards(folder)
    assert sum(found[:EVERY]) / EVERY < 0.2  # chance: one of sixteen
    assert sum(found[-4:]) / 4 > 0.8
    assert summary["final_reward"] == pytest.approx(sum(found[-2:]) / 2)
    assert summary["val_loss"] is None  # nothing is held out


def test_flops_of_the_summary_count_rollouts_too(whole):
    _, job, summary = whole
    config, steps = job.model.config, job.n_steps
    drawn = 32 * pass_flops(config, range(1, N_TOKENS + 1)) / 3
    assert summary["flops"] == pytest.approx(steps * pass_flops(config, [N_TOKENS] * 16) + steps / EVERY * drawn)


def test_killed_and_resumed_gives_the_same_bits(whole, tmp_path):
    folder, job, _ = whole
    after_a_buffer, while_one_is_made = ("train", 6 * EVERY + 1), ("collect", 5 * N_TOKENS + 3)
    anywhere = ("train", random.Random(os.urandom(8)).randrange(1, 20))
    for kind, number in (after_a_buffer, random.choice([while_one_is_made, anywhere])):
        done = subprocess.run(
            [sys.executable, str(WORKER), str(tmp_path), "kill", kind, str(number)], env=ENVIRONMENT, timeout=200
        )
        assert done.returncode == -signal.SIGKILL, (kind, number)
        (newest, *_) = complete_checkpoints(tmp_path / "checkpoints")
        assert "buffer.safetensors" in {path.name for path in newest.iterdir()}
    one_thread(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()
    (last, *_), (expected, *_) = (complete_checkpoints(part / "checkpoints") for part in (tmp_path, folder))
    assert (last / "weights.safetensors").read_bytes() == (expected / "weights.safetensors").read_bytes()
    assert all(torch.equal(load_file(last / "weights.safetensors")[name], p) for name, p in parameters(job).items())


def test_a_buffer_that_was_made_is_not_made_again(tmp_path, monkeypatch):
    """Asked to stop while the model draws: the buffer is kept, and a resumed run begins with its first step."""
    made: list[int] = []
    collect = Draws.collect

    def noted(
        self: Draws, modules: Mapping[str, nn.Module], place: int, rows: slice, last: Batch
    ) -> tuple[Batch, float]:
        made.append(place)
        if made == [0, EVERY]:
            os.kill(os.getpid(), signal.SIGTERM)
        return collect(self, modules, place, rows, last)

    monkeypatch.setattr(Draws, "collect", noted)
    with pytest.raises(Interrupted):
        run(tmp_path, current_world())
    run(tmp_path, current_world())
    assert made == list(range(0, 40, EVERY))


@pytest.mark.slow
def test_two_processes_do_what_one_does_and_one_takes_over(whole, tmp_path):
    folder, _, _ = whole
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER)]
    folders = [str(tmp_path / name) for name in ("two", "begun")]  # one after the other; the second is killed
    assert subprocess.run([*launch, *folders, "kill", "train", "15"], env=ENVIRONMENT, capture_output=True).returncode
    assert rewards(tmp_path / "two") == pytest.approx(rewards(folder), abs=1e-6)
    one_thread(tmp_path / "begun")
    assert rewards(tmp_path / "begun") == pytest.approx(rewards(folder), abs=1e-6)


class TokensAndRows:
    """Cross-entropy per token, and half of the square of a head's score per row: two denominators."""

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"loss": int((batch["targets"] != IGNORED).sum()), "score": len(batch["ids"])}

    def terms(self, modules: Mapping[str, nn.Module], batch: Batch) -> dict[str, Term]:
        hidden = modules["model"](batch["ids"], head=lambda hidden, output: hidden)
        logits = modules["reference"](batch["ids"]) + modules["model"](batch["ids"])
        nats = nn.functional.cross_entropy(logits.mT, batch["targets"], ignore_index=IGNORED, reduction="sum")
        square = (modules["head"](hidden[:, -1]) - 1).square().sum()
        return {"loss": Term(nats, nats.detach()), "score": Term(square, square.detach(), weight=0.5)}

    def flops(self, config: ModelConfig, lengths: Sequence[int]) -> float:
        return 2 * pass_flops(config, lengths)


def heads_job(folder: Path, **settings: object) -> TrainingJob:
    folder.mkdir(exist_ok=True)
    config = preset("ground-nano", n_layers=1, vocab_size=64, context_length=16)
    head = nn.Linear(config.d_model, 1)
    with torch.no_grad():
        head.weight.fill_(0.1)
        head.bias.zero_()
    options = {"batch_size": 4, "precision": "float32", "checkpoint_seconds": 0.0, "ema": 0.5} | settings
    return TrainingJob(
        name="heads",
        modules={"model": Transformer(config), "head": head},
        frozen={"reference": Transformer(config, seed=2)},
        objective=TokensAndRows(),
        source=RandomRows(),
        settings=OptimizerSettings(**options),
        n_rows=4 * 6,
        folder=folder,
    )


def test_each_term_has_its_own_denominator_in_micro_batches_and_whole(tmp_path):
    lines = {}
    for name, rows in (("whole", 4), ("pieces", 1)):
        job = heads_job(tmp_path / name, micro_batch_size=rows)
        by_hand = heads_job(tmp_path / "by hand")
        summary = train(job, current_world(), QUIET)
        lines[name] = read_log(tmp_path / name / "metrics.jsonl")
        assert summary["final_score"] == pytest.approx(lines[name][-2]["score"])
    batch = by_hand.source.rows(0, 4)
    terms, counts = by_hand.objective.terms(by_hand.all_modules, batch), by_hand.objective.counts(batch)
    loss = terms["loss"].total / counts["loss"] + 0.5 * terms["score"].total / counts["score"]
    loss.backward()
    norm = sum(p.grad.square().sum() for p in by_hand.trained.parameters()).sqrt()
    for found in lines.values():
        first = next(line for line in found if line["step"] == 1)
        assert first["loss"] == pytest.approx(terms["loss"].reported.item() / counts["loss"], rel=1e-5)
        assert first["score"] == pytest.approx(terms["score"].reported.item() / 4, rel=1e-5)
        assert first["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    for one, other in zip(*lines.values(), strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    assert {"val_loss", "val_score"} <= lines["whole"][0].keys()


def test_several_modules_are_saved_and_resumed_and_frozen_ones_stay_as_they_are(tmp_path):
    whole, parts = heads_job(tmp_path / "whole"), heads_job(tmp_path / "parts")
    summary = train(whole, current_world(), QUIET)
    assert summary["parameters"] == whole.model.n_parameters + whole.model.config.d_model + 1
    passes = iter(range(100))
    hook = parts.modules["head"].register_forward_pre_hook(
        lambda module, arguments: os.kill(os.getpid(), signal.SIGTERM) if next(passes) == 3 else None
    )
    with pytest.raises(Interrupted):
        train(parts, current_world(), QUIET)
    hook.remove()
    saved = load_file(complete_checkpoints(tmp_path / "parts" / "checkpoints")[0] / "weights.safetensors")
    assert {name.partition(".")[0] for name in saved} == {"model", "head"}
    parts = heads_job(tmp_path / "parts")
    train(parts, current_world(), QUIET)
    expected = parameters(whole)
    assert all(torch.equal(expected[name], value) for name, value in parameters(parts).items())
    reference, untouched = parts.frozen["reference"], heads_job(tmp_path / "other").frozen["reference"]
    for kept, before in zip(reference.parameters(), untouched.parameters(), strict=True):
        assert kept.grad is None
        assert torch.equal(kept, before)
    head = heads_job(tmp_path / "other").modules["head"]
    assert not torch.equal(parts.modules["head"].weight, head.weight)


def test_groups_reach_the_parameters_of_every_module(tmp_path):
    job = heads_job(tmp_path / "run", groups=[{"match": "model.*", "frozen": True}], ema=0.0)
    before = {name: value.clone() for name, value in parameters(job).items()}
    train(job, current_world(), QUIET)
    changed = {name for name, value in parameters(job).items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}


def test_an_axis_that_a_job_does_not_allow_is_refused_by_name(tmp_path):
    job = policy_job(tmp_path)
    job.axes = frozenset({"replicate"})
    with pytest.raises(GroundupError, match=r"policy: cannot be trained over the \[parallel\] axes shard"):
        train(job, World(rank=0, size=2, device=torch.device("cpu"), mesh=None), QUIET)


def test_a_frozen_copy_counts_in_memory(tmp_path, monkeypatch):
    """Where the model alone fits, the model beside a frozen copy is refused."""
    job = heads_job(tmp_path)
    config, settings = job.model.config, job.settings
    least = memory.step_memory(config, settings, memory.Step(1, 1, 16, "float32")).total
    tight = memory.DeviceMemory(least + 1000, "a small machine", "cpu", False)
    monkeypatch.setattr(loop, "device_memory", lambda world: tight)
    assert memory.Workload(config, settings, 16, tight).check(QUIET) == 1
    with pytest.raises(GroundupError, match="a small machine"):
        train(job, current_world(), QUIET)
