"""Every figure that a run shows or writes, against a value computed by hand; and what becomes of it on the way."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_training_loop import QUIET, make_job
from training_rows import RandomRows

from groundup.console import Console
from groundup.distributed import current_world
from groundup.measured import machine
from groundup.model import ModelConfig, Transformer, preset
from groundup.training import NextToken, TrainingJob, peak_memory_bytes, throughput, train
from groundup.training.metrics import live_line, read_log, summary_line
from groundup.training.throughput import Throughput, ThroughputMeter, peak_matmul_flops

CPU = torch.device("cpu")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing was measured on this machine before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def plain_job(folder: Path, **settings: Any) -> TrainingJob:
    """A job whose model has no dropout, so that its first step can be computed again."""
    job = make_job(folder, **settings)
    job.modules["model"] = Transformer(preset("ground-nano", vocab_size=64, context_length=16))
    return job


# --- What the recipe and the seed decide


def test_the_figures_of_a_step_are_those_computed_by_hand(tmp_path):
    job = plain_job(
        tmp_path / "run", n_steps=4, schedule="linear", warmup_share=0.5, lr=0.004, muon_lr=0.02, max_grad_norm=0.5
    )
    job.bytes_per_token, job.train_bytes_per_token = 2.5, 4.0
    ids, targets = job.source.rows(0, 4).values()
    model = Transformer(job.model.config)
    loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=-100)
    loss.backward()
    norm = math.sqrt(sum(float(parameter.grad.double().square().sum()) for parameter in model.parameters()))
    assert norm > 0.5  # it is the norm before clipping that is written
    train(job, current_world(), QUIET)
    lines = read_log(tmp_path / "run" / "metrics.jsonl")
    step = next(line for line in lines if "loss" in line)
    assert list(step) == ["step", "tokens", "loss", "bits_per_byte", "lr", "muon_lr", "grad_norm"]
    assert step["tokens"] == int((targets != -100).sum())
    assert step["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert step["bits_per_byte"] == pytest.approx(loss.item() / 0.6931471805599453 / 4.0, rel=1e-5)
    assert step["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert (step["lr"], step["muon_lr"]) == (0.002, 0.01)  # the first of two steps of warm-up
    watched = [line for line in lines if "val_loss" in line][-1]
    assert watched["val_bits_per_byte"] == pytest.approx(watched["val_loss"] / 0.6931471805599453 / 2.5)


def test_figures_that_do_not_exist_are_left_out(tmp_path):
    train(plain_job(tmp_path / "run", n_steps=1, optimizer="adamw"), current_world(), QUIET)
    step = next(line for line in read_log(tmp_path / "run" / "metrics.jsonl") if "loss" in line)
    assert list(step) == ["step", "tokens", "loss", "lr", "grad_norm"]


def test_boards_get_every_figure(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    job = plain_job(tmp_path / "run", track=["tensorboard"], n_steps=2, log_every=1)
    job.train_bytes_per_token = 4.0
    train(job, current_world(), QUIET)
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    wanted = {"loss", "bits_per_byte", "lr", "muon_lr", "grad_norm", "tokens_per_second", "peak_memory_bytes"}
    assert wanted <= set(events.Tags()["scalars"])


# --- Throughput


def flops_by_hand(config: ModelConfig, length: int) -> int:
    """Forward and backward of one row of a model with a gate, untied or not: two for each multiply-add."""
    width, inner = config.d_model, config.n_heads * config.head_dim
    matrices = 2 * width * inner + 2 * width * config.n_kv_heads * config.head_dim + 3 * width * config.d_ff
    pairs = length * (length + 1) // 2
    block = 2 * matrices * length + 2 * 2 * inner * pairs
    return 3 * (config.n_layers * block + 2 * width * config.padded_vocab_size * length)


def test_utilization_is_flops_over_what_the_processes_could_do(monkeypatch):
    monkeypatch.setattr(throughput, "peak_matmul_flops", lambda dtype, device: {torch.bfloat16: 5e11}[dtype])
    config = preset("ground-nano")
    meter = ThroughputMeter(torch.bfloat16, CPU, n_processes=2)
    flops = NextToken().flops(config, [32] * 8)
    assert flops == 8 * flops_by_hand(config, 32)
    meter.add(4.0, 700, flops)
    assert meter.overall() == Throughput(175.0, None)  # too short to be worth measuring
    assert meter.lately() == Throughput(175.0, None)
    meter.add(2.0, 100, 3e12)
    assert meter.lately() == Throughput(50.0, pytest.approx(3e12 / 2.0 / (2 * 5e11)))
    assert meter.overall() == Throughput(pytest.approx(800 / 6), pytest.approx((flops + 3e12) / 6.0 / 1e12))
    assert meter.lately() == Throughput(0.0, None)
    other = ThroughputMeter(torch.bfloat16, CPU, n_processes=2, measures=False)
    other.add(6.0, 60, flops)
    assert other.overall() == Throughput(10.0, None)


def test_a_run_counts_all_tokens_and_the_time_of_its_steps_alone(tmp_path, monkeypatch, own_cache):
    """Rows have masked targets: tokens are those that are predicted, FLOPs those of every token."""
    added: list[tuple[float, float, float]] = []
    add = ThroughputMeter.add

    def noted(self: ThroughputMeter, seconds: float, tokens: float, flops: float) -> None:
        added.append((seconds, tokens, flops))
        add(self, seconds, tokens, flops)

    monkeypatch.setattr(ThroughputMeter, "add", noted)
    monkeypatch.setattr(throughput, "MEASURED_AFTER_SECONDS", 0.0)
    job = plain_job(tmp_path / "run", n_steps=6, log_every=3, precision="float32")
    summary = train(job, current_world(), QUIET)
    assert [flops for _, _, flops in added] == [4 * flops_by_hand(job.model.config, RandomRows().length)] * 6
    assert sum(tokens for _, tokens, _ in added) == summary["tokens"]
    best = peak_matmul_flops(torch.float32, CPU)
    timings = read_log(tmp_path / "run" / "timings.jsonl")
    assert [line["step"] for line in timings] == [3, 6]
    for line, steps in zip(timings, (added[:3], added[3:]), strict=True):
        seconds, tokens, flops = map(sum, zip(*steps, strict=True))
        assert line["tokens_per_second"] == pytest.approx(tokens / seconds)
        assert line["mfu"] == pytest.approx(flops / seconds / best)
        assert line["peak_memory_bytes"] > 1e6
    seconds, _, flops = map(sum, zip(*added, strict=True))
    assert summary["mfu"] == pytest.approx(flops / seconds / best)
    assert f" · mfu {summary['mfu']:.0%}" in summary_line(summary)
    assert seconds < timings[-1]["seconds"]  # validation and checkpoints have their own time
    assert all("mfu" not in line for line in read_log(tmp_path / "run" / "metrics.jsonl"))


def test_a_short_run_is_not_made_to_wait_for_the_peak_matmul_rate(tmp_path, monkeypatch):
    def measure(dtype: torch.dtype, device: torch.device) -> float:
        raise AssertionError("measured for a run of less than five seconds")

    monkeypatch.setattr(throughput, "peak_matmul_flops", measure)
    summary = train(plain_job(tmp_path / "run", n_steps=2), current_world(), QUIET)
    assert summary["mfu"] is None
    assert "mfu" not in summary_line(summary)
    assert all("mfu" not in line for line in read_log(tmp_path / "run" / "timings.jsonl"))


def test_the_peak_matmul_rate_is_measured_once(monkeypatch, own_cache):
    before = torch.random.get_rng_state()
    first = peak_matmul_flops(torch.float32, CPU)
    assert torch.equal(before, torch.random.get_rng_state())
    assert first > 1e8
    monkeypatch.setattr(throughput, "_best_rate", lambda dtype, device, sizes: 1.0)
    assert peak_matmul_flops(torch.float32, CPU) == first
    assert peak_matmul_flops(torch.bfloat16, CPU) == 1.0  # of another dtype nothing is known
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert peak_matmul_flops(torch.float32, CPU) == 1.0
    finally:
        torch.set_num_threads(threads)


def test_peak_memory_is_at_least_what_is_held_now():
    held = torch.ones(1 << 22)
    assert peak_memory_bytes(held.device) >= 0.98 * psutil.Process().memory_info().rss
    assert peak_memory_bytes() >= held.nbytes


def test_a_rate_measured_with_fewer_vector_units_is_not_taken_for_the_whole_machine_s(monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    whole = machine(CPU)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert machine(CPU) != whole


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="elsewhere a peak begins with the parent's")
def test_peak_memory_is_not_that_of_the_process_that_started_this_one():
    held = torch.ones(1 << 28)  # 1 GiB
    line = "from groundup.training import peak_memory_bytes; print(peak_memory_bytes())"
    done = subprocess.run([sys.executable, "-c", line], check=True, capture_output=True, text=True)
    assert 1 << 26 < int(done.stdout) < held.nbytes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_peak_memory_of_a_gpu_is_its_allocator_s():
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.ones(1 << 22, device=device)
    assert held.nbytes <= peak_memory_bytes(device) < 2 * held.nbytes + torch.cuda.memory_allocated(device)


# --- The live line

FIELDS = {"step": "120/2000", "loss": 2.914, "lr": 3e-4, "muon_lr": 0.02, "grad_norm": 0.81}


def test_the_live_line_is_in_the_grammar_of_log_lines():
    line = live_line(FIELDS, Throughput(18_420.4, 0.412), 130.0, 1_288_490_189, width=200)
    assert line == (
        "step=120/2000 loss=2.914 lr=3.0e-04 muon_lr=2.0e-02 grad_norm=0.810 tok/s=18,420 mfu=41% mem=1.2GiB eta=2m10s"
    )


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.2, "0s"), (59.4, "59s"), (130, "2m10s"), (3720, "1h02m"), (90_000, "25h00m")]
)
def test_the_time_that_is_left_is_short(seconds, shown):
    assert live_line(FIELDS, Throughput(1.0, None), seconds, 1, 200).endswith(f" eta={shown}")


@given(width=st.integers(20, 200), has_mfu=st.booleans())
def test_on_a_narrow_terminal_the_least_missed_goes_first(width, has_mfu):
    line = live_line(FIELDS, Throughput(18_420.4, 0.41 if has_mfu else None), 130.0, 1 << 30, width)
    names = [field.split("=")[0] for field in line.split()]
    assert [name for name in names if name in ("step", "loss", "tok/s", "eta")] == ["step", "loss", "tok/s", "eta"]
    least_missed_first = ["mem", "muon_lr", "grad_norm", "lr", *["mfu"] * has_mfu]
    left = [name for name in least_missed_first if name in names]
    assert left == least_missed_first[len(least_missed_first) - len(left) :]
    assert len(line) <= width - 34 or not left


def test_a_terminal_is_shown_the_line_while_it_trains(tmp_path, monkeypatch):
    notes: list[str] = []
    console = Console(quiet=True)
    bar = console.bar("test")
    monkeypatch.setattr(bar, "update", lambda completed, total=None, note=None: notes.append(note))
    monkeypatch.setattr(console, "bar", lambda name, total=None: bar)
    train(plain_job(tmp_path / "run", n_steps=2, log_every=1), current_world(), console)
    assert len(notes) == 2
    assert notes[0].startswith("step=1/2 loss=4.")
    assert " eta=" in notes[1]
