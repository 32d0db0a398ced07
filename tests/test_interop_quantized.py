"""Quantized models in folders and GGUF files: the same numbers everywhere, and damage has a name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_models import random_model, small_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import groundup as gu
from groundup.errors import ArtifactError, GroundupError
from groundup.generation.quantize import Quantization, Quantized, quantization_of, quantize
from groundup.interop import export_folder
from groundup.interop.gguf import export_gguf
from groundup.interop.start import start_config, start_model
from groundup.model import Transformer

VOCAB = 320
KINDS = {
    "int8": Quantization(8),
    "int8, groups": Quantization(8, 32),
    "int8, activations too": Quantization(8, activations="int8"),
    "int4": Quantization(4),
    "int4, groups of 64": Quantization(4, 64),
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama, untied": ("llama-nano", {"d_model": 64, "d_ff": 96, "vocab_multiple": 128}),
    "Qwen3, tied": ("ground-nano", {"d_model": 64}),
    "GPT-2": ("gpt2-nano", {"d_model": 64, "d_ff": 128}),
    "experts": ("ground-nano", {"d_model": 64, "n_experts": 4, "experts_per_token": 2}),
}


def _quantized(shape: str = "Qwen3, tied", quantization: Quantization | None = None) -> Transformer:
    name, changes = SHAPES[shape]
    return quantize(random_model(name, vocab_size=VOCAB, **changes), quantization)


def _ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_folder_loads_without_the_original(shape: str, kind: str, tmp_path: Path) -> None:
    model = _quantized(shape, KINDS[kind])
    gu.save_model(tmp_path / "model", model, small_tokenizer())
    loaded = gu.load(tmp_path / "model")
    assert quantization_of(loaded.model) == KINDS[kind]
    assert torch.equal(loaded.model(_ids()), model(_ids()))
    for name, module in loaded.model.named_modules():
        assert isinstance(module, Quantized) == isinstance(model.get_submodule(name), Quantized)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    text = gu.generate(loaded.model, small_tokenizer(), "Once", max_tokens=8, temperature=0).text
    assert text == gu.generate(model, small_tokenizer(), "Once", max_tokens=8, temperature=0).text


def test_a_folder_is_as_small_as_its_bits(tmp_path: Path) -> None:
    name, changes = SHAPES["Qwen3, tied"]
    gu.save_model(tmp_path / "float", random_model(name, vocab_size=VOCAB, **changes))
    for bits, most in ((8, 0.30), (4, 0.22)):
        gu.save_model(tmp_path / str(bits), _quantized("Qwen3, tied", Quantization(bits)))  # type: ignore[arg-type]
        files = [tmp_path / folder / "model.safetensors" for folder in (str(bits), "float")]
        assert files[0].stat().st_size < most * files[1].stat().st_size


def test_transformers_refuses_it_loudly(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    gu.save_model(tmp_path, _quantized())
    with pytest.raises(ValueError, match="model_type"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for architecture in ("Qwen3ForCausalLM", "LlamaForCausalLM"):  # before it allocates what they have by default
        with pytest.raises(ValueError, match="quantization config"):
            getattr(transformers, architecture).from_pretrained(tmp_path)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "experts"])
def test_it_leaves_as_floats_for_transformers(shape: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = _quantized(shape, Quantization(4))
    gu.save_model(tmp_path / "model", model)
    assert export_folder(tmp_path / "model", tmp_path / "out")["dtype"] == "float32"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(_ids()).logits, model(_ids()), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "int8, groups", "int4", "int4, groups of 64"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gguf_holds_exactly_its_numbers(shape: str, kind: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    model = _quantized(shape, KINDS[kind])
    told = export_gguf(model, small_tokenizer(), tmp_path / "model.gguf")
    assert told["dtype"] == ("q8_0" if KINDS[kind].bits == 8 else "q4_0")
    floats = export_gguf(model, small_tokenizer(), tmp_path / "floats.gguf", dtype="f32")
    assert told["bytes"] < floats["bytes"]
    exact = {one.name: one for one in gguf.GGUFReader(tmp_path / "floats.gguf").tensors}
    types = set()
    for one in gguf.GGUFReader(tmp_path / "model.gguf").tensors:
        types.add(one.tensor_type.name)
        theirs = torch.from_numpy(gguf.dequantize(one.data, one.tensor_type).copy())
        assert torch.equal(theirs.flatten(), torch.from_numpy(exact[one.name].data.copy()).flatten()), one.name
    assert types == {"F32", "Q8_0", *(("Q4_0",) if KINDS[kind].bits == 4 else ())}


@pytest.mark.parametrize("bits", [8, 4])
def test_transformers_reads_the_gguf_file(bits: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = _quantized("Llama, untied", Quantization(bits))
    export_gguf(model, small_tokenizer(), tmp_path / "model.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    with torch.no_grad():
        assert (theirs(_ids()).logits - model(_ids())).abs().max() <= 1e-6


def test_no_stage_starts_from_it(tmp_path: Path) -> None:
    gu.save_model(tmp_path, _quantized())
    for attempt in (lambda: start_config(tmp_path), lambda: start_model(tmp_path)):
        with pytest.raises(ArtifactError, match=r"have 8 bits, and no stage can start"):
            attempt()
    with pytest.raises(GroundupError, match="quantized already"):
        quantize(gu.load(tmp_path).model)


NAME = "model.layers.0.mlp.up_proj"
DAMAGE: dict[str, tuple[Any, str]] = {
    "no scales": (lambda w: w.pop(f"{NAME}.scales"), rf"{NAME}.scales missing"),
    "a weight beside": (lambda w: w.update({f"{NAME}.weight": torch.ones(96, 64)}), rf"{NAME}.weight left over"),
    "longer groups": (lambda w: w.update({f"{NAME}.scales": w[f"{NAME}.scales"][:, :1].contiguous()}), "has shape"),
    "another dtype": (lambda w: w.update({f"{NAME}.packed": w[f"{NAME}.packed"].view(torch.int8)}), "has dtype"),
    "wide scales": (lambda w: w.update({f"{NAME}.scales": w[f"{NAME}.scales"].float()}), "has dtype"),
    "a packed norm": (lambda w: w.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}), "has dtype I8"),
    "the half": (lambda w: w.update({f"{NAME}.packed": w[f"{NAME}.packed"][:, :16].contiguous()}), "has shape"),
}
CONFIGS: dict[str, tuple[Any, str]] = {
    "other bits": (lambda c: c["quantization_config"].update(bits=3), "quantization_config"),
    "bits as text": (lambda c: c["quantization_config"].update(bits="4"), "quantization_config"),
    "short groups": (lambda c: c["quantization_config"].update(group_size=8), "must be a multiple of 32"),
    "unknown": (lambda c: c["quantization_config"].update(zero_point=True), "quantization_config.*zero_point"),
    "another method": (lambda c: c["quantization_config"].update(format="awq"), "only what it quantized itself"),
    "no object": (lambda c: c.update(quantization_config=[4]), "only what it quantized itself"),
    "none": (lambda c: c.pop("quantization_config"), "missing"),
    "8 bits": (lambda c: c["quantization_config"].update(bits=8, group_size=None), "has shape|has dtype"),
}


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder without digests."""
    folder = tmp_path_factory.mktemp("int4") / "model"
    gu.save_model(folder, _quantized("Qwen3, tied", Quantization(4)))
    (folder / "digests.json").unlink()
    return folder


def _copy(source: Path, out: Path) -> Path:
    out.mkdir(exist_ok=True)
    for path in source.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return out


@pytest.mark.parametrize("damage", DAMAGE)
def test_other_tensors_are_refused_by_name(int4: Path, damage: str, tmp_path: Path) -> None:
    folder = _copy(int4, tmp_path / "model")
    change, message = DAMAGE[damage]
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ArtifactError, match=message) as error:
        gu.load(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("damage", CONFIGS)
def test_other_configurations_are_refused_by_name(int4: Path, damage: str, tmp_path: Path) -> None:
    folder = _copy(int4, tmp_path / "model")
    change, message = CONFIGS[damage]
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match=message) as error:
        gu.load(folder)
    assert str(folder) in str(error.value)


@given(st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_end_in_named_errors(int4: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Any bytes changed or cut off: an error that names the folder, or (values only) a model of the same shape."""
    folder = _copy(int4, tmp_path / "model")
    path = folder / data.draw(st.sampled_from(["config.json", "model.safetensors"]))
    contents = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del contents[data.draw(st.integers(0, len(contents) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            contents[data.draw(st.integers(0, min(len(contents) - 1, 4000)))] = data.draw(st.integers(0, 255))
    path.write_bytes(contents)
    model, message = None, ""
    try:
        model = gu.load(folder).model
    except ArtifactError as error:
        message = str(error)
    assert str(folder) in message or model is not None
    if model is not None:
        assert model(torch.zeros(1, 2, dtype=torch.int64)).shape[:2] == (1, 2)
