"""8-bit products: who is refused and why, which layers take part, and an emulated run of them."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from test_training_loop import QUIET, interrupted_at, make_job, weights
from tiny_run import finished_run

from groundup.distributed import current_world
from groundup.errors import GroundupError, Interrupted, RecipeError
from groundup.model import Transformer, preset
from groundup.preview import check_recipe
from groundup.recipe import PretrainSettings, parse_recipe
from groundup.training import choose_precision, head_loss, precision, pretrain, train
from groundup.training.metrics import read_log
from groundup.training.precision import check_precision, float8_layers, float8_products

WIDE = {"d_model": 32, "n_heads": 2, "n_kv_heads": 1, "head_dim": 16, "d_ff": 48}
PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def small(**over: object) -> Transformer:
    return Transformer(preset("ground-nano", vocab_size=64, context_length=16, n_layers=2, **WIDE | over))


# --- Refusals


def test_a_machine_without_a_gpu_is_refused_before_any_work(tmp_path):
    job = make_job(tmp_path / "run", precision="float8")
    with pytest.raises(GroundupError, match=r'\[test\] precision = "float8": needs an NVIDIA GPU.*is a cpu\.\n.*auto'):
        train(job, current_world(), QUIET)
    assert list((tmp_path / "run").iterdir()) == []
    recipe = parse_recipe('[pretrain]\nprecision = "float8"\n[align.sft]\nprecision = "float8"', "mine.toml")
    with pytest.raises(RecipeError) as raised:
        check_recipe(recipe, "mine.toml")
    assert [problem.where for problem in raised.value.problems] == [
        f'[{stage}] precision = "float8"' for stage in ("pretrain", "align.sft")
    ]


@pytest.mark.parametrize(
    ("capability", "has_torchao", "words"),
    [((8, 0), True, "needs compute capability 8.9; Some GPU has 8.0"), ((9, 0), False, "torchao is not installed")],
)
def test_a_gpu_that_is_too_old_or_has_no_library_is_refused_by_name(monkeypatch, capability, has_torchao, words):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "Some GPU")
    library = SimpleNamespace(find_spec=lambda name: object() if has_torchao else None)
    monkeypatch.setattr(precision.importlib, "util", library)
    with pytest.raises(GroundupError) as raised:
        check_precision("float8", "cuda")
    assert words in str(raised.value)


def test_other_precisions_are_not_refused():
    for setting in ("auto", "float32", "bfloat16", "float16"):
        check_precision(setting, "cpu")


def test_around_8_bits_the_arithmetic_is_bfloat16_with_a_reason():
    assert choose_precision("float8", "cpu") == (
        torch.bfloat16, "float8 in the blocks' linear layers, as the recipe says"
    )  # fmt: skip


def test_the_precision_is_said_with_its_reason(tmp_path, capsys):
    settings = PretrainSettings(tokens=600, batch_size=4, sequence_length=16, sample_tokens=0, eval_tokens=200)
    shards = finished_run().folder("shards")
    model = Transformer(preset("ground-nano", vocab_size=320, context_length=16))
    summary = pretrain(model, shards, settings, out=tmp_path / "out").summary
    assert f"pretrain: {summary['precision']} ({summary['precision_reason']})" in capsys.readouterr().err


# --- Which layers


def test_the_blocks_linear_layers_take_part_and_nothing_else():
    expected = {
        f"layers.{layer}.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}"
        for layer in range(2)
        for name in PRODUCTS
    }
    assert set(float8_layers(small(tied_embeddings=False))) == expected


def test_layers_with_odd_sides_and_routers_keep_bfloat16():
    names = float8_layers(small(d_ff=40))
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    names = float8_layers(small(n_experts=16, experts_per_token=2))
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj"}


# --- Emulated

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


@pytest.fixture
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_EMULATED", True)


@needs_torchao
@pytest.mark.usefixtures("_emulated")
def test_a_model_without_such_layers_is_refused():
    model = small(d_model=24, head_dim=12, d_ff=40)
    with pytest.raises(GroundupError, match="sides in multiples of 16"), float8_products(model):
        pass


@needs_torchao
@pytest.mark.usefixtures("_emulated")
@pytest.mark.parametrize("over", [{}, {"qkv_bias": True, "ff_bias": True}, {"n_experts": 4}])
def test_products_are_rounded_and_the_model_is_given_back(over):
    model, plain = small(**over), small(**over)
    for one in (model, plain):
        one.compute_dtype = torch.bfloat16
        for place, parameter in enumerate(one.parameters()):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(place))
    ids = torch.arange(26).view(2, 13) % 64  # 26 tokens: no multiple of 16
    before, modules = dict(model.named_parameters()), dict(model.named_modules())
    with float8_products(model) as names:
        assert dict(model.named_parameters()).keys() == before.keys()
        assert all(parameter is before[name] for name, parameter in model.named_parameters())
        assert all(model.get_submodule(name) is not modules[name] for name in names)
        loss = model(ids, head=head_loss(ids)).nats
        model(ids, head=head_loss(ids)).objective.backward()
    expected = plain(ids, head=head_loss(ids))
    expected.objective.backward()
    assert loss.item() != expected.nats.item()
    assert loss.item() == pytest.approx(expected.nats.item(), rel=0.02)
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - other.grad).norm() < 0.3 * other.grad.norm(), name
    assert dict(model.named_modules()) == modules
    torch.testing.assert_close(model(ids), plain(ids))


@needs_torchao
@pytest.mark.usefixtures("_emulated")
def test_a_run_in_8_bits_learns_and_resumes_to_the_same_bits(tmp_path):
    def job_in(name: str):
        job = make_job(tmp_path / name, precision="float8", n_steps=10)
        job.modules["model"] = small()
        return job

    whole = job_in("whole")
    summary = train(whole, current_world(), QUIET)
    assert summary["precision"] == "float8"
    assert summary["final_loss"] < summary["initial_loss"]
    with pytest.raises(Interrupted):
        train(interrupted_at(4, job_in("parts")), current_world(), QUIET)
    parts = job_in("parts")
    train(parts, current_world(), QUIET)
    assert all(torch.equal(weights(whole)[name], value) for name, value in weights(parts).items())
    plain = make_job(tmp_path / "plain", precision="bfloat16", n_steps=10)
    plain.modules["model"] = small()
    train(plain, current_world(), QUIET)
    ours, theirs = (
        [line["loss"] for line in read_log(tmp_path / name / "metrics.jsonl") if "loss" in line]
        for name in ("whole", "plain")
    )
    assert ours != theirs
    assert ours == pytest.approx(theirs, rel=0.02)
