"""Plans: bytes against torch's own record of allocations, refusals and ways out, seconds, budgets, expected losses."""

import dataclasses
import json
import math

import pytest
import torch
from allocations import of_a_step
from hypothesis import given
from hypothesis import strategies as st
from pairwise import pairwise
from test_training_loop import QUIET, interrupted_at, make_job, weights

import groundup as gu
from groundup.distributed import current_world
from groundup.errors import DataError, GroundupError, Interrupted
from groundup.model import ModelConfig, activation_bytes, cost, ladder_config, preset
from groundup.recipe import OptimizerSettings, PretrainSettings, parse_recipe
from groundup.training import loop, train
from groundup.training.metrics import read_log
from groundup.training.planning import memory as plan_memory
from groundup.training.planning.device import devices, find_device, table_timings
from groundup.training.planning.memory import DeviceMemory, Step, Workload, device_memory, step_memory
from groundup.training.planning.probe import (
    Timings,
    ValidationPass,
    count_passes,
    measured_timings,
    rows_within,
    run_seconds,
)
from groundup.training.scaling_law import ScalingLaw

MIB, GIB = 2**20, 2**30
BASE = {
    "vocab_size": 512, "context_length": 512, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "head_dim": 32,
    "d_model": 128, "d_ff": 384,
}  # fmt: skip
SHAPES = {
    "qwen3": {},
    "gpt2": {"norm": "layernorm", "position": "learned", "qk_norm": False, "activation": "gelu_tanh", "bias": True},
    "grouped, wide": {"n_kv_heads": 1, "d_ff": 1024},
    "large vocabulary": {"vocab_size": 16_384},
    "windows": {"attention": ("window",), "window": 64},
}
TOML = '[corpus]\ninputs = ["groundup:classics"]\n'


def available(gibibytes: float, device: str = "cpu") -> DeviceMemory:
    return DeviceMemory(int(gibibytes * GIB), "a machine", device, True)


def timings(**changes: float) -> Timings:
    values = {
        "row": 0.01, "update": 0.02, "eval_row": 0.003, "sample_token": 0.001, "save": 0.1, "begin": 1.0, "flops": 1e11,
    }  # fmt: skip
    return Timings(**{**values, **changes}, how="made up", is_measured=False)


@pytest.mark.parametrize(
    ("shape", "dtype", "kind"),
    pairwise(tuple(SHAPES), ("float32", "bfloat16"), ("none", "selective", "full")),
)
def test_the_fullest_moment_is_that_of_torchs_record(shape, dtype, kind):
    config, settings = ModelConfig(**{**BASE, **SHAPES[shape]}), OptimizerSettings(activation_checkpointing=kind)
    rows, length = (4, 192) if dtype == "float32" else (2, 320)
    most, kept = of_a_step(config, settings, rows, rows, length, dtype)
    memory = step_memory(config, settings, Step(rows, rows, length, dtype))
    found = memory.gradients + memory.activations + memory.logits + memory.other
    assert found == pytest.approx(most, rel=0.12, abs=0.5 * MIB)
    masks = 4 * length * length if shape == "windows" else 0  # held by the caller, not by the graph
    counted = sum(activation_bytes(config, rows, length, dtype, kind).values())
    assert counted == pytest.approx(kept, rel=0.01, abs=masks + 64 * 1024)


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "adafactor"])
def test_gradients_of_earlier_micro_batches_are_there(optimizer):
    config, settings = ModelConfig(**BASE), OptimizerSettings(optimizer=optimizer)
    most, _ = of_a_step(config, settings, 4, 1, 192, "float32")
    memory = step_memory(config, settings, Step(4, 1, 192, "float32"))
    assert memory.gradients >= cost.weight_bytes(config)
    found = memory.gradients + memory.activations + memory.logits + memory.other
    assert found == pytest.approx(most, rel=0.12, abs=0.5 * MIB)
    assert memory.optimizer == cost.optimizer_bytes(config, optimizer)


def test_what_is_frozen_has_no_gradient_and_no_state():
    config, step = ModelConfig(**BASE), Step(4, 1, 64, "float32")
    groups = [{"match": "layers.*", "frozen": True}]
    memory = step_memory(config, PretrainSettings(groups=groups), step)
    size = 4 * 512 * 128 + 4 * 128  # embedding and last norm
    assert (memory.all_gradients, memory.optimizer) == (size, 2 * size + 2 * 4)


def test_devices_share_weights_gradients_and_state():
    config, settings = preset("gpt2"), OptimizerSettings(optimizer="adamw", ema=0.9)
    one = step_memory(config, settings, Step(8, 8, 1024, "bfloat16", "cuda"))
    many = step_memory(config, settings, Step(8, 8, 1024, "bfloat16", "cuda", 64))
    assert one.optimizer == pytest.approx(64 * many.optimizer, rel=1e-3)
    assert one.average == pytest.approx(64 * many.average, rel=1e-3)
    assert many.activations == one.activations
    block = 4 * sum(math.prod(shape) for name, shape in cost.parameter_shapes(config).items() if "layers.0." in name)
    assert many.weights > one.weights / 64 + 2 * block  # two blocks are whole for a moment


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_a_gpus_peak_is_as_counted(kind):
    """Held to the allocator's peak; has not run where these tests were written."""
    from groundup.model import Transformer
    from groundup.training.compilation import set_checkpointing
    from groundup.training.objective import head_loss

    config = preset("ground-10m")
    model = Transformer(config).cuda().train()
    model.compute_dtype = torch.bfloat16
    set_checkpointing(model, kind)
    ids = torch.zeros((8, 512), dtype=torch.int64, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    model(ids, head=head_loss(ids)).objective.backward()
    settings = OptimizerSettings(activation_checkpointing=kind)
    memory = step_memory(config, settings, Step(8, 8, 512, "bfloat16", "cuda"))
    assert memory.total - memory.optimizer == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)


def test_the_whole_batch_is_kept_wherever_it_fits():
    config, settings = preset("ground-1m"), OptimizerSettings(batch_size=24)
    assert Workload(config, settings, 256, available(8)).micro_batch() == (24, "the batch")
    micro, reason = Workload(config, settings, 256, available(0.75)).micro_batch()
    assert micro in (1, 2, 3, 4, 6, 8, 12)
    assert "fits a machine" in reason
    asked = settings.model_copy(update={"micro_batch_size": 3})
    assert Workload(config, asked, 256, available(0.01)).micro_batch() == (3, "as the recipe says")
    assert Workload(config, settings, 256, available(8), n_devices=4).micro_batch()[0] == 6
    huge = settings.model_copy(update={"batch_size": 2 * 3 * 5 * 10**11})  # no walk over every number up to it
    assert Workload(config, huge, 256, available(0.01)).micro_batch()[0] == 1


@given(gibibytes=st.floats(0.6, 6.0), rows=st.integers(1, 96))
def test_the_micro_batch_is_the_largest_divisor_that_fits(gibibytes, rows):
    work = Workload(preset("ground-1m"), OptimizerSettings(batch_size=rows), 256, available(gibibytes))
    micro, _ = work.micro_batch()
    assert rows % micro == 0
    assert work.fits(micro) or micro == 1
    assert not any(work.fits(more) for more in range(micro + 1, rows + 1) if rows % more == 0)


def test_a_refusal_names_the_parts_and_a_way_out():
    config, settings = ladder_config(size="10b"), OptimizerSettings(batch_size=8)
    with pytest.raises(GroundupError) as refused:
        Workload(config, settings, 2048, available(24)).refuse_what_cannot_fit()
    text = str(refused.value)
    assert "[pretrain]" in text
    assert "a machine is 24.0 GiB" in text
    sizes = [
        float(part.split()[-2]) for part in text.split("24.0 GiB: ")[1].split("\n")[0].split(", ") if "GiB" in part
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) >= 3
    assert "--set model.size=" in text
    Workload(config, settings, 2048, available(400)).refuse_what_cannot_fit()


def test_only_what_is_certain_is_refused():
    """At the edge: a byte less than one row at a time takes is refused, so many bytes are not."""
    config, settings = preset("ground-10m"), OptimizerSettings(batch_size=8, compile=False)
    place = available(1)
    least = step_memory(config, settings, Workload(config, settings, 512, place).step(1)).total
    Workload(config, settings, 512, dataclasses.replace(place, total=least)).refuse_what_cannot_fit()
    with pytest.raises(GroundupError, match="at least"):
        Workload(config, settings, 512, dataclasses.replace(place, total=least - 1)).refuse_what_cannot_fit()


@pytest.mark.parametrize("size", ["30m", "100m", "1b", "10b"])
def test_remedies_add_up_and_end_with_one_that_is_enough(size):
    config = ladder_config(size=size)
    settings = OptimizerSettings(batch_size=16, micro_batch_size=16, optimizer="adamw", precision="float32", ema=0.99)
    length, place = config.context_length, available(2)
    work = Workload(config, settings, length, place)
    found, before = work.suggestions(), work.memory().total
    if before <= place.usable:
        assert not found
        return
    assert found[-1].fits
    assert found[-1].total <= place.usable
    for one in found:
        assert one.saves > 0
        if one.setting.startswith("pretrain."):
            assert one.total == before - one.saves
            before = one.total
    order = [one.setting.split("=")[0] for one in found]
    assert order[0] == "pretrain.micro_batch_size"
    assert all(not one.fits for one in found[:-1] if one.setting.startswith("pretrain."))


def test_an_unset_micro_batch_is_what_memory_allows_and_resumes_anywhere(tmp_path, monkeypatch):
    """Four rows do not fit, two do: the same bits as with micro_batch_size = 2; the fingerprint does not know of it."""
    explicit = make_job(tmp_path / "explicit", micro_batch_size=2)
    train(explicit, current_world(), QUIET)
    small = make_job(tmp_path / "small")
    config, settings = small.model.config, small.settings
    wanted = Workload(config, settings, 16, device_memory(current_world())).memory(2).total
    tight = DeviceMemory(int(wanted / plan_memory.USABLE_SHARE) + 1, "a small machine", "cpu", False)
    assert Workload(config, settings, 16, tight).micro_batch()[0] == 2
    whole = make_job(tmp_path / "whole").fingerprint
    assert small.fingerprint == whole != explicit.fingerprint
    monkeypatch.setattr(loop, "device_memory", lambda world: tight)
    with pytest.raises(Interrupted):
        train(interrupted_at(9, small), current_world(), QUIET)
    again = make_job(tmp_path / "small")
    train(again, current_world(), QUIET)
    assert again.micro_rows == 2
    assert all(torch.equal(weights(explicit)[name], value) for name, value in weights(again).items())


def test_validation_takes_no_more_rows_at_once_than_training(tmp_path):
    seen = {}
    for micro in (1, 4):
        job = make_job(tmp_path / str(micro), n_steps=2, micro_batch_size=micro)
        rows = []
        job.model.register_forward_pre_hook(lambda model, arguments, rows=rows: rows.append(len(arguments[0])))
        train(job, current_world(), QUIET)
        assert max(rows) == micro
        seen[micro] = [line["val_loss"] for line in read_log(job.folder / "metrics.jsonl") if "val_loss" in line]
    assert seen[1][0] == pytest.approx(seen[4][0], rel=1e-6)  # before dropout has drawn other rows


@pytest.mark.parametrize("every", [None, 1, 5, 12, 100])
def test_validation_passes_are_counted_as_the_loop_makes_them(tmp_path, every):
    job = make_job(tmp_path / "run", eval_every=every)
    train(job, current_world(), QUIET)
    made = sum("val_loss" in line for line in read_log(tmp_path / "run" / "metrics.jsonl"))
    assert count_passes(job.settings, job.n_steps) == made


def test_seconds_by_hand():
    settings = PretrainSettings(batch_size=8, eval_every=50, checkpoint_seconds=1e9)
    parts = run_seconds(timings(), settings, 800, ValidationPass(16, 2, 10))
    assert parts == pytest.approx({
        "begin": 1.0,
        "training": 800 * 0.01 + 100 * 0.02,
        "validation": 3 * 16 * 0.003,
        "samples": 3 * 2 * 10 * 0.001,
        "checkpoints": 2 * 0.1,
    })  # fmt: skip
    often = run_seconds(timings(), settings.model_copy(update={"checkpoint_seconds": 0.5}), 800, ValidationPass(16))
    assert often["checkpoints"] == pytest.approx(20 * 0.1)


@given(
    seconds=st.floats(1.0, 2e3), row=st.floats(1e-3, 1.0), rows=st.integers(1, 64), ramp=st.booleans(),
    every=st.none() | st.integers(1, 50),
)  # fmt: skip
def test_a_budget_is_spent_and_not_exceeded(seconds, row, rows, ramp, every):
    settings = PretrainSettings(batch_size=rows, batch_warmup_from=1 if ramp else None, eval_every=every)
    watch, speed = ValidationPass(2 * rows, 1, 16), timings(row=row)
    found = rows_within(seconds, speed, settings, watch)
    assert found % rows == 0
    if found:
        assert sum(run_seconds(speed, settings, found, watch).values()) <= seconds
    # Validation at every n-th step makes small steps in the time: one batch more may just fit, two do not.
    assert sum(run_seconds(speed, settings, found + 2 * rows, watch).values()) > seconds * 0.98


def test_names_of_devices():
    assert find_device("h100x8") == (devices()["h100"], 8)
    assert find_device("RTX4090") == (devices()["rtx4090"], 1)
    assert find_device("a100-80x64")[1] == 64
    for wrong, meant in (("h10", "h100"), ("rtx409", "rtx4090"), ("a100", "a100-80")):
        with pytest.raises(GroundupError, match=meant):
            find_device(wrong)
    with pytest.raises(GroundupError, match="0 devices"):
        find_device("h100x0")
    for one in devices().values():
        assert 0.2 <= one.mfu <= 0.6
        assert one.peak("bfloat16") >= one.float32
        assert min(one.memory, one.bandwidth, one.link, one.price) > 0


def test_the_table_by_hand():
    """GPT-2 XL's size on one A100: bound by arithmetic, so FLOPs over assumed rate; and on many bound by links."""
    config, settings = preset("gpt2-xl"), OptimizerSettings(batch_size=16, optimizer="adamw")
    device = devices()["a100-80"]
    one = table_timings(config, settings, Step(16, 16, 1024, "bfloat16", "cuda"), device)
    flops = cost.training_flops(config, 1024)
    assert one.row == pytest.approx(flops / (3.12e14 * device.mfu))
    assert one.update == pytest.approx(7 * cost.weight_bytes(config) / 2.04e12)
    assert "assumed" in one.how
    many = table_timings(config, settings, Step(1, 1, 1024, "bfloat16", "cuda", 64), device)
    gathered = 3 * cost.weight_bytes(config) * 63 / 64 / 5e10
    assert many.row == pytest.approx(gathered / 64)
    assert "moving weights" in many.how
    small = table_timings(preset("ground-1m"), settings, Step(8, 8, 256, "bfloat16", "cuda"), device)
    assert "starting kernels" in small.how
    assert small.flops < 0.1 * one.flops


def test_a_probe_measures_and_says_what_it_carried_on(tmp_path):
    settings, place = PretrainSettings(batch_size=4), available(8)
    config = preset("ground-nano", context_length=64)
    work = Workload(config, settings, 64, place)
    found = measured_timings(work, work.step(), current_world(), seconds=2.0, folder=tmp_path)
    assert found.is_measured
    assert found.how == "probe: steps of the whole model"
    assert all(value > 0 for value in (found.row, found.update, found.eval_row, found.sample_token, found.save))
    assert found.flops == pytest.approx(cost.training_flops(config, 64) / found.row)
    assert not list(tmp_path.iterdir())
    deep = ModelConfig(**{**BASE, "n_layers": 40, "context_length": 2048})
    work = Workload(deep, settings, 2048, place)
    rough = measured_timings(work, work.step(), current_world(), seconds=0.5)
    assert "of 40 blocks" in rough.how or "of 2048 tokens" in rough.how or "not probed" in rough.how
    assert rough.row > found.row
    assert "not probed" in measured_timings(work, work.step(), current_world(), seconds=0.0).how


def test_a_plan_without_a_probe_is_arithmetic():
    recipe = parse_recipe(TOML, "r.toml", ["model.size=10m", "pretrain.tokens=compute-optimal"])
    found = gu.plan(recipe, probe=False)
    assert found.parameters["all"] == cost.count_parameters(found.config)
    assert found.amount.tokens >= 20 * found.parameters["all"]
    assert found.amount.tokens - 20 * found.parameters["all"] < found.settings.batch_size * found.fit.step.length
    assert found.amount.steps * found.settings.batch_size == found.amount.rows
    assert found.flops == found.amount.rows * cost.training_flops(found.config, found.fit.step.length)
    assert found.fits
    assert found.fit.suggestions == []
    assert found.dollars is None
    assert "groundup scaling" in found.expected.why
    told = json.loads(json.dumps(found.to_dict()))
    assert sum(told["memory"]["parts"].values()) == told["memory"]["total"]
    assert sum(told["time"]["seconds"].values()) == pytest.approx(told["time"]["total_seconds"])


@pytest.mark.parametrize("asked", [{"hours": 24.0}, {"budget": 500.0}])
def test_a_budget_buys_tokens_and_the_best_size(asked):
    recipe = parse_recipe(TOML, "r.toml", ["model.size=300m"])
    found = gu.plan(recipe, device="h100x8", **asked)
    spent = found.total_seconds / 3600 if "hours" in asked else found.dollars
    assert 0.98 * next(iter(asked.values())) < spent <= next(iter(asked.values()))
    assert found.best in found.sizes
    assert 8 < found.best.tokens_per_parameter < 50  # without a law: near to 20, on a coarse ladder
    twice = gu.plan(recipe, device="h100x8", **{name: 8 * value for name, value in asked.items()})
    assert twice.amount.tokens == pytest.approx(8 * found.amount.tokens, rel=0.05)
    assert twice.best.parameters > found.best.parameters


def test_budgets_that_are_none_are_refused():
    recipe = parse_recipe(TOML, "r.toml", [])
    for wrong in ({"hours": -1.0}, {"hours": 1.0, "budget": 1.0}, {"budget": 5.0}, {"hours": math.nan}):
        with pytest.raises(DataError):
            gu.plan(recipe, probe=False, **wrong)
    with pytest.raises(DataError, match="too few"):
        gu.plan(recipe, device="t4", hours=1e-4)
    assert gu.plan(recipe, probe=False, hours=2.0, price=0.5).dollars == pytest.approx(1.0, rel=0.02)


def test_a_law_tells_the_loss_and_the_size(tmp_path):
    law = ScalingLaw(e=1.7, a=400.0, alpha=0.34, b=410.0, beta=0.28)
    law.save(tmp_path / "law.json")
    recipe = parse_recipe(TOML, "r.toml", ["model.size=300m"])
    found = gu.plan(recipe, device="h100", hours=10, law=tmp_path / "law.json")
    n, d = found.parameters["all"], found.amount.tokens
    assert found.expected.loss == pytest.approx(1.7 + 400 / n**0.34 + 410 / d**0.28)
    assert all(one.loss >= found.best.loss for one in found.sizes)
    assert found.best.loss == pytest.approx(law.loss(found.best.parameters, found.best.tokens))


def test_a_recipe_without_pretraining_has_no_plan():
    recipe = parse_recipe('[align.sft]\nstart = "somewhere"\n', "r.toml")
    with pytest.raises(GroundupError, match="nothing to pretrain"):
        gu.plan(recipe, probe=False)
