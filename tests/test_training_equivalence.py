"""What must not change a run: slices of the loss, micro-batches, processes, recomputed activations, compilation."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import train_in
from safetensors.torch import load_file
from test_training_loop import QUIET, make_job, on_two_processes, weights

from groundup.distributed import current_world
from groundup.files import own_folder
from groundup.model import Transformer, preset
from groundup.training import TrainingJob, train
from groundup.training.metrics import read_log

# --- The loss in slices

MEASURE = """
import sys, torch
torch.set_num_threads(1)
from groundup.training import IGNORED, cross_entropy_sum, peak_memory_bytes
from groundup.training.process import keep_freed_memory
keep_freed_memory()
n, vocab, width = 4096 * 4, 32 * 1024, 64

def step(n):
    hidden = torch.randn(n, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    targets = torch.randint(0, vocab, (n,)).masked_fill_(torch.rand(n) < 0.3, IGNORED)
    if sys.argv[1] == "sliced":
        loss = cross_entropy_sum(hidden, weight, targets).objective
    else:
        loss = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORED, reduction="sum")
    loss.backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()

step(16)  # what a first call loads is no part of it
before = peak_memory_bytes()
step(n if sys.argv[1] == "sliced" else n // 32)
print(peak_memory_bytes() - before)
"""


def extra_peak(form: str) -> int:
    """The memory that a forward and a backward pass take at their peak, bytes; measured in a process of its own."""
    done = subprocess.run([sys.executable, "-c", MEASURE, form], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems measure resident memory differently")
def test_a_loss_over_32k_tokens_of_vocabulary_takes_less_than_a_tenth_of_its_logits() -> None:
    full = 4096 * 4 * 32 * 1024 * 4  # bytes of float32 logits
    assert extra_peak("sliced") < full / 10
    # The measure measures: a thirty-second of the rows, all at once, takes its logits and as much for their gradient.
    assert extra_peak("full") > full / 32


# --- Micro-batches and processes


def trained(folder: Path, config: dict[str, object], **options: object) -> tuple[TrainingJob, list[dict[str, float]]]:
    """A job after its run, with its metrics."""
    job = make_job(folder, **options)
    job.modules["model"] = Transformer(preset("ground-nano", vocab_size=64, context_length=16, **config))
    train(job, current_world(), QUIET)
    return job, read_log(folder / "metrics.jsonl")


def assert_close_runs(one: list[dict[str, float]], other: list[dict[str, float]], tolerance: float) -> None:
    assert [line["step"] for line in one] == [line["step"] for line in other]
    for a, b in zip(one, other, strict=True):
        assert a["tokens"] == b["tokens"]
        # Rounding grows from update to update, most in the norm of a gradient; the first step is yet without it.
        growth = 1 if a["step"] <= 1 else 25
        for name, allowed in (("loss", tolerance), ("val_loss", tolerance), ("grad_norm", growth * tolerance)):
            assert a.get(name) == (pytest.approx(b[name], rel=allowed) if name in b else None), (name, a["step"])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_eight_micro_batches_of_one_row_train_as_one_of_eight(tmp_path: Path, micro: int, optimizer: str) -> None:
    """Every row has its own number of targets, so that a mean of means would be another loss."""
    options = {"batch_size": 8, "n_steps": 6, "optimizer": optimizer, "z_loss": 1e-3, "label_smoothing": 0.1}
    whole, whole_lines = trained(tmp_path / "whole", {}, **options)
    parts, parts_lines = trained(tmp_path / "parts", {}, micro_batch_size=micro, **options)
    assert_close_runs(whole_lines, parts_lines, 2e-5)
    before = weights(make_job(tmp_path / "before", **options))
    after = weights(whole)
    for name, value in weights(parts).items():
        moved = (after[name] - before[name]).norm()
        assert (value - after[name]).norm() < 1e-3 * moved, name


def test_a_mean_of_means_would_be_noticed(tmp_path: Path) -> None:
    """The rows of the test above are uneven enough: their counts of targets differ several times over."""
    targets = make_job(tmp_path / "run").source.rows(0, 8)["targets"]
    counts = (targets >= 0).sum(dim=1)
    assert counts.max() > 2 * counts.min()


@pytest.mark.slow
def test_two_processes_of_one_row_each_train_as_one_of_four(tmp_path: Path) -> None:
    """Losses, gradient norms and the trained weights; on two processes every row is a micro-batch of its own."""
    pytest.importorskip("pytorch_optimizer")
    cases: list[dict[str, object]] = [
        {},
        {"optimizer": "lion"},
        {"groups": [{"match": "embed_tokens*", "frozen": True}, {"match": "layers.1.*", "lr_scale": 0.5}]},
    ]
    folders = {n: [tmp_path / f"{n}-{place}" for place in range(len(cases))] for n in (1, 2)}
    for n, micro in ((1, 4), (2, 1)):
        for folder, settings in zip(folders[n], cases, strict=True):
            own_folder(folder)
            (folder / "micro-batch-size").write_text(str(micro))
            (folder / "settings.json").write_text(json.dumps(settings))
    done = on_two_processes(*folders[2])
    assert done.returncode == 0, done.stderr[-3000:]
    for one, two in zip(folders[1], folders[2], strict=True):
        train_in(one, current_world())
        assert_close_runs(*(read_log(folder / "metrics.jsonl") for folder in (one, two)), 2e-5)
        alone, together = (load_file(folder / "weights.safetensors") for folder in (one, two))
        for name, value in alone.items():
            assert (together[name] - value).norm() < 2e-3 * value.norm(), name


# --- Recomputed and compiled


@pytest.mark.parametrize("kind", ["selective", "full"])
@pytest.mark.parametrize("config", [{"dropout": 0.2}, {"n_experts": 4, "experts_per_token": 2, "dropout": 0.1}])
def test_a_run_that_recomputes_activations_gives_the_same_bits(
    tmp_path: Path, kind: str, config: dict[str, object]
) -> None:
    options = {"n_steps": 6, "micro_batch_size": 2}
    plain, plain_lines = trained(tmp_path / "plain", config, **options)
    again, again_lines = trained(tmp_path / "again", config, activation_checkpointing=kind, **options)
    assert plain_lines == again_lines
    assert all(torch.equal(weights(plain)[name], value) for name, value in weights(again).items())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler for torch.compile")
@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({}, {}),
        pytest.param({"n_experts": 4}, {}, marks=pytest.mark.long),
        pytest.param({"attention": ("window", "full"), "window": 4}, {}, marks=pytest.mark.long),
        pytest.param({}, {"activation_checkpointing": "full"}, marks=pytest.mark.long),
        pytest.param({}, {"activation_checkpointing": "selective"}, marks=pytest.mark.long),
    ],
    ids=["plain", "experts", "window", "full recomputation", "selective recomputation"],
)
def test_a_compiled_run_is_an_eager_one_but_for_rounding(
    tmp_path: Path, config: dict[str, object], options: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"n_steps": 6, "optimizer": "adamw", **options}
    eager, eager_lines = trained(tmp_path / "eager", config, **options)
    torch._dynamo.reset()
    compiled, compiled_lines = trained(tmp_path / "compiled", config, compile=True, **options)
    assert "torch.compile failed" not in capsys.readouterr().err
    assert_close_runs(eager_lines, compiled_lines, 1e-4)
    before = dict(Transformer(eager.model.config).named_parameters())
    after = weights(eager)
    for name, value in weights(compiled).items():
        moved = (after[name] - before[name]).norm()
        assert (value - after[name]).norm() < 1e-2 * moved, name
