"""LoRA: at first the model as it was, trained alone, merged the same, and PEFT's files both ways."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_parts import random_model, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor

from groundup.alignment import SFTSettings, fine_tune, load_conversations
from groundup.alignment.lora import (
    LoraSettings,
    adapters,
    adapters_off,
    add_adapters,
    load_adapter,
    merge,
    merged,
    save_adapter,
)
from groundup.alignment.method import sized
from groundup.console import Console
from groundup.distributed import empty_copy, fill_copy
from groundup.errors import ArtifactError, GroundupError
from groundup.generation import generate
from groundup.generation.quantize import Quantized, quantization_of
from groundup.interop import load_model, save_model
from groundup.model import ModelConfig, Transformer, preset
from groundup.model.linear import Linear
from groundup.tokenizer import Tokenizer
from groundup.training.compilation import set_checkpointing
from groundup.training.metrics import read_log
from groundup.training.planning.memory import Step, step_memory

KINDS: dict[str, dict[str, Any]] = {
    "lora": {}, "dora": {"dora": True}, "two": {"targets": ["q_proj", "v_proj"], "rank": 2, "alpha": 3.0},
    "qlora": {"base_bits": 8}, "qdora": {"base_bits": 4, "dora": True},
}  # fmt: skip


def config(**overrides: Any) -> ModelConfig:
    return preset("ground-nano", **{"vocab_size": 320, "context_length": 64, "n_layers": 2, **overrides})


def adapted(seed: int = 5, *, moved: bool = True, shape: ModelConfig | None = None, **settings: Any) -> Transformer:
    """A random model with adapters, as if they had been trained for a while."""
    model = random_model(shape or config()).requires_grad_(True)
    add_adapters(model, LoraSettings(**settings), seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapters(model).values() if moved else ():
            layer.lora_B.copy_(0.1 * torch.randn(layer.lora_B.shape, generator=draw))
            if layer.magnitude is not None:
                layer.magnitude.mul_(1 + 0.1 * torch.randn(layer.magnitude.shape, generator=draw))
    return model


IDS = tokens(config(), 2, 12)


@torch.no_grad()
def logits(model: Transformer) -> Tensor:
    return model(IDS)


@pytest.mark.parametrize("kind", ["lora", "dora", "two"])
def test_at_first_and_switched_off_it_is_the_model_as_it_was(kind: str) -> None:
    before = logits(random_model(config()))
    assert torch.equal(logits(adapted(moved=False, **KINDS[kind])), before)
    model = adapted(**KINDS[kind])
    assert not torch.allclose(logits(model), before, atol=1e-3)
    with adapters_off(model):
        assert torch.equal(logits(model), before)
    assert not torch.allclose(logits(model), before, atol=1e-3)


def test_adapters_alone_are_trained() -> None:
    model = adapted(moved=False, dora=True).train()
    model(IDS).square().mean().backward()
    names = {name.rpartition(".")[2] for name, parameter in model.named_parameters()}
    assert names == {"lora_A", "lora_B", "magnitude"}
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all((layer.lora_A.grad == 0).all() for layer in adapters(model).values())  # B is 0 at first
    assert any((layer.lora_B.grad != 0).any() for layer in adapters(model).values())
    assert sum(p.numel() for p in adapted(targets="q_proj", rank=1).parameters()) == 2 * 2 * config().d_model


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_unmerged(kind: str) -> None:
    model = adapted(**KINDS[kind])
    before = logits(model)
    with merged(model):
        assert not adapters(model)
        torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(model), before)
    merge(model)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    assert quantization_of(model) is None
    assert {*dict(model.named_parameters())} == {*dict(Transformer(config()).named_parameters())}
    assert all(type(p) is torch.nn.Parameter for p in model.parameters())
    assert not [*model.buffers()]


def test_a_merged_model_is_saved_like_any_other(tmp_path: Path) -> None:
    model = adapted(base_bits=8)
    merge(model)
    save_model(tmp_path / "model", model)
    assert torch.equal(logits(load_model(tmp_path / "model")[0]), logits(model))


def test_a_copy_of_a_model_with_a_quantized_base_is_filled() -> None:
    model = adapted(base_bits=8).eval()
    whole = empty_copy(model).to_empty(device="cpu")
    fill_copy(model, whole)
    assert torch.equal(logits(whole), logits(model))


def test_at_full_rank_a_step_of_b_is_a_step_of_the_matrix() -> None:
    whole = random_model(config(n_layers=1)).requires_grad_(True)
    model = copy.deepcopy(whole)
    width = config().d_model
    add_adapters(model, LoraSettings(rank=width, alpha=width, targets=["q_proj", "o_proj", "up_proj"]))
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_A.copy_(torch.eye(width))
    for one in (whole, model):
        one(IDS).square().mean().backward()
    for name, layer in adapters(model).items():
        gradient = whole.get_parameter(f"{name}.weight").grad
        assert layer.lora_B.grad is not None
        assert gradient is not None
        torch.testing.assert_close(layer.lora_B.grad, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_pass_through_a_quantized_base(bits: int) -> None:
    """They are those of the same adapters beside the dequantized matrices."""
    model = adapted(base_bits=bits).train()
    plain = adapted()
    matrices = {f"{name}.weight": module.weight for name, module in model.named_modules() if hasattr(module, "packed")}
    others = {name: value for name, value in model.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict(others | matrices)
    for one in (model, plain):
        one(IDS).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_no_copy_of_a_frozen_matrix_is_kept_for_the_backward_pass(kind: str) -> None:
    model, kept = adapted(**KINDS[kind]).train(), list[Tensor]()
    model.compute_dtype = torch.bfloat16
    copies = {module.weight.shape for module in model.modules() if isinstance(module, Linear | Quantized)}
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model(IDS).square().mean().backward()
    assert kept
    assert not copies & {shape for tensor in kept for shape in (tensor.shape, tensor.shape[::-1])}


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_arithmetic_in_bfloat16_is_that_of_a_cast_matrix(kind: str) -> None:
    """To the bit: gradients of what is frozen but not kept, beside those of matrices that take gradients."""
    model = adapted(**KINDS[kind]).train()
    model.compute_dtype = torch.bfloat16
    plain = copy.deepcopy(model)
    for layer in adapters(plain).values():
        layer.base = Linear(*reversed(layer.base.weight.shape), bias=False).requires_grad_(True)
    for one, other in zip(adapters(model).values(), adapters(plain).values(), strict=True):
        other.base.weight.data = one.base.weight.clone()
    for one in (model, plain):
        one(IDS).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, plain.get_parameter(name).grad)


def test_checkpointing_keeps_nothing_that_adapters_add() -> None:
    """Selective: as much as without adapters, and the gradients are those of a pass that keeps everything."""
    from torch.profiler import ProfilerActivity, profile

    ids, gradients, kept = tokens(config(), 4, 64), [], {}
    for name, kind in (("whole", "selective"), ("adapters", "selective"), ("all", "none")):
        model = random_model(config()).requires_grad_(True) if name == "whole" else adapted(rank=4)
        set_checkpointing(model.train(), kind)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            loss = model(ids).square().mean()
        events = recorded.profiler.kineto_results.events()
        kept[name] = sum(event.nbytes() for event in events if event.name() == "[memory]")
        loss.backward()
        gradients += [[parameter.grad for parameter in model.parameters()]] if name != "whole" else []
    assert kept["adapters"] < 1.05 * kept["whole"] < kept["all"]
    assert all(map(torch.equal, *gradients))


def test_text_is_the_merged_models() -> None:
    words = Tokenizer.train(["the cat sat on the mat"] * 4, vocab_size=320)
    model = adapted(shape=config(vocab_size=words.vocab_size))
    options: Any = {"max_tokens": 12, "temperature": 0.0}
    text = generate(model, words, "the cat", **options).text
    with merged(model):
        assert generate(model, words, "the cat", **options).text == text
    with adapters_off(model):
        assert generate(model, words, "the cat", **options).text != text


def test_dropout_is_of_adapters_and_of_training() -> None:
    model = adapted(dropout=0.5)
    still = logits(model)
    assert torch.equal(logits(model), still)
    model.train()
    assert not torch.equal(logits(model), logits(model))
    with adapters_off(model):
        assert torch.equal(logits(model), logits(model))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(GroundupError, match="q_projj") as error:
        adapted(targets=["q_projj"])
    assert "Did you mean 'q_proj'" in str(error.value.fix)
    with pytest.raises(GroundupError, match="adapters already"):
        add_adapters(adapted(), LoraSettings())
    experts = Transformer(config(n_experts=4, experts_per_token=2))
    with pytest.raises(GroundupError, match="float base"):
        add_adapters(experts, LoraSettings(base_bits=8))
    add_adapters(experts, LoraSettings())
    assert {name.rpartition(".")[2] for name in adapters(experts)} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_memory_is_that_of_frozen_matrices() -> None:
    """Estimates with adapters have gradients and moments of next to nothing."""
    shape = preset("ground-1m", vocab_size=2048, context_length=128)
    full = SFTSettings(optimizer="adamw", batch_size=4)
    lean = sized(full.model_copy(update={"lora": LoraSettings()}), shape)
    step = Step(rows=4, micro=4, length=128, dtype="float32")
    whole, part = step_memory(shape, full, step), step_memory(shape, lean, step)
    assert part.optimizer < whole.optimizer / 50
    assert part.all_gradients < whole.all_gradients / 50
    assert part.weights == whole.weights
    assert sized(full, shape) is full


def test_a_stage_leaves_the_adapter_and_the_merged_model(tmp_path: Path) -> None:
    talks = load_conversations(["groundup:tasks"], 150, 1, "align.sft")
    words = Tokenizer.train([one["content"] for talk in talks.train for one in talk], vocab_size=400)
    model = random_model(config(vocab_size=words.vocab_size)).requires_grad_(True)
    before = model.get_parameter("layers.0.mlp.up_proj.weight").detach().clone()
    settings: Any = SFTSettings(lora={"rank": 2}, batch_size=4, epochs=1.0, precision="float32", optimizer="adamw")
    trained = fine_tune(model, words, settings, out=tmp_path / "sft", conversations=talks, console=Console(quiet=True))
    losses = [line["loss"] for line in read_log(tmp_path / "sft" / "metrics.jsonl") if "lr" in line]
    assert losses[-1] < losses[0]
    merged_model = load_model(tmp_path / "sft" / "model")[0]
    assert torch.equal(logits(merged_model), logits(trained.model.eval()))
    again = random_model(config(vocab_size=words.vocab_size))
    load_adapter(tmp_path / "sft" / "adapter", again)
    assert torch.equal(adapters(again)["layers.0.mlp.up_proj"].base.weight, before)  # type: ignore[arg-type]
    torch.testing.assert_close(logits(again), logits(merged_model), atol=1e-5, rtol=1e-5)


# PEFT


def test_adapters_come_back(tmp_path: Path) -> None:
    for kind in ("lora", "dora", "two"):
        settings = LoraSettings(**KINDS[kind])
        model = adapted(**KINDS[kind])
        save_adapter(tmp_path / kind, model, settings)
        again = random_model(config())
        found = load_adapter(tmp_path / kind, again)
        assert (found.rank, found.alpha, found.dora) == (settings.rank, settings.alpha, settings.dora)
        assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("damage", ["bias", "rank", "name", "missing", "pattern"])
def test_a_strange_adapter_is_refused(tmp_path: Path, damage: str) -> None:
    model = adapted()
    save_adapter(tmp_path / "a", model, LoraSettings())
    values = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    first = next(iter(tensors))
    if damage == "name":
        tensors["base_model.model.lm_head.lora_A.weight"] = tensors.pop(first)
    elif damage == "missing":
        del tensors[first]
    else:
        values |= {"bias": {"bias": "all"}, "rank": {"r": 3}, "pattern": {"rank_pattern": {"q_proj": 2}}}[damage]
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match="adapter_"):
        load_adapter(tmp_path / "a", random_model(config()))


@pytest.mark.parametrize("kind", ["lora", "dora", "two"])
def test_peft_loads_ours_and_we_load_pefts(tmp_path: Path, kind: str) -> None:
    peft = pytest.importorskip("peft", reason="needs peft (pip install 'groundup[oracle]')")
    from transformers import AutoModelForCausalLM

    plain = random_model(config())
    save_model(tmp_path / "model", plain)
    model = adapted(**KINDS[kind])
    save_adapter(tmp_path / "ours", model, LoraSettings(**KINDS[kind]), str(tmp_path / "model"))
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "ours"
    ).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, logits(model), atol=2e-4, rtol=1e-4)

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], use_rslora=kind == "two", use_dora=kind == "dora",
        init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(0)
    made = peft.get_peft_model(base, settings).eval()
    made.save_pretrained(tmp_path / "theirs")
    again = random_model(config())
    load_adapter(tmp_path / "theirs", again)
    with torch.no_grad():
        torch.testing.assert_close(logits(again), made(IDS).logits, atol=2e-4, rtol=1e-4)
