"""Import and export: bytes, memory, dtypes, several files, what is replaced and what is not, and the commands."""

import json
import subprocess
import sys
from pathlib import Path

import interop_models
import pytest
import torch
from command import CommandLine, groundup
from generation_models import random_model, small_tokenizer
from interop_models import LLAMA, some_ids
from safetensors.torch import load_file, save_file

import groundup as gu
from groundup.errors import ArtifactError, GroundupError
from groundup.interop import export_folder, import_folder
from groundup.interop.read_weights import open_weights
from groundup.interop.write_weights import TensorSpec, write_weights

transformers = pytest.importorskip("transformers")

__all__ = ["groundup"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of groundup's."""
    gu.save_model(tmp_path / "model", random_model("llama-nano", vocab_size=320), small_tokenizer())
    return tmp_path / "model"


def test_the_bytes_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "b.é": torch.randn(3, 5, generator=generator),
        "a": torch.randn(7, generator=generator).bfloat16(),
        "c": torch.randn(2, 2, 2, generator=generator).half(),
        "empty": torch.zeros(0, 3),
        'quoted "name"': torch.randn(1, generator=generator),
    }
    specs = [TensorSpec(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()]
    written = write_weights(tmp_path, specs, tensors.__getitem__)
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    assert written == sum(value.nbytes for value in tensors.values())
    stored = open_weights(tmp_path)
    for name, value in tensors.items():
        assert torch.equal(stored.read(name), value)
        assert stored.dtype(name) == value.dtype


def test_without_a_folder_the_same_tensors_are_asked_for_in_the_same_order(tmp_path: Path) -> None:
    tensors = {name: torch.ones(4) for name in "cab"}
    specs = [TensorSpec(name, torch.float32, (4,)) for name in tensors]
    orders: list[list[str]] = []
    for place in (tmp_path, None):
        asked: list[str] = []
        write_weights(place, specs, lambda name, asked=asked: (asked.append(name), tensors[name])[1], most_bytes=20)
        orders.append(asked)
    assert orders == [["a", "b", "c"]] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_import_keeps_the_dtype_and_a_load_computes_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    for variant in ("Mixtral", "GPT-2"):
        theirs, ours = tmp_path / f"{variant}-theirs", tmp_path / f"{variant}-ours"
        interop_models.make(variant).to(dtype).save_pretrained(theirs)
        summary = import_folder(theirs, ours)
        assert summary["dtype"] == str(dtype).removeprefix("torch.")
        assert summary["bytes"] == 2 * summary["parameters"]
        before, after = load_file(theirs / "model.safetensors"), load_file(ours / "model.safetensors")
        assert all(after[name].dtype == dtype and torch.equal(after[name], before[name]) for name in before)
        loaded = gu.load(ours).model
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
        again = transformers.AutoModelForCausalLM.from_pretrained(ours)
        assert again.dtype == dtype
        with torch.no_grad():
            torch.testing.assert_close(loaded(some_ids()), again.float()(some_ids()).logits, atol=1e-4, rtol=1e-3)


def test_an_export_can_change_the_dtype_and_says_what_does_not_fit(folder: Path, tmp_path: Path) -> None:
    wide = load_file(folder / "model.safetensors")
    for name, dtype in {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}.items():
        summary = export_folder(folder, tmp_path / name, dtype=name)
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == summary["dtype"]
        for tensor, value in load_file(tmp_path / name / "model.safetensors").items():
            assert torch.equal(value, wide[tensor].to(dtype))
            assert value.dtype == dtype
    wide["lm_head.weight"][3, 4] = 70_000
    save_file(wide, folder / "model.safetensors")
    (folder / "digests.json").unlink()
    with pytest.raises(ArtifactError, match=r"lm_head\.weight has a value of 7e\+04, which float16 cannot hold"):
        export_folder(folder, tmp_path / "f16", dtype="f16", force=True)
    assert not torch.isinf(load_file(tmp_path / "f16" / "model.safetensors")["lm_head.weight"]).any()
    with pytest.raises(GroundupError, match="dtype = 'int3': is not one of f32, f16, bf16"):
        export_folder(folder, tmp_path / "odd", dtype="int3")


def test_several_files_hold_the_same_model(folder: Path, tmp_path: Path) -> None:
    export_folder(folder, tmp_path / "sharded", most_bytes=50_000)
    sizes = [path.stat().st_size for path in (tmp_path / "sharded").glob("model-*.safetensors")]
    largest = max(value.nbytes for value in load_file(folder / "model.safetensors").values())
    assert len(sizes) > 2
    assert max(sizes) < max(50_000, largest) + 5_000
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sharded", dtype=torch.float32)
    ours = gu.load(folder).model
    with torch.no_grad():
        torch.testing.assert_close(theirs(some_ids()).logits, ours(some_ids()), atol=1e-5, rtol=1e-5)
    import_folder(tmp_path / "sharded", tmp_path / "one")
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_folders_sharded_by_transformers_are_read(tmp_path: Path) -> None:
    for variant in ("GPT-2", "Mixtral"):
        theirs = interop_models.save(variant, tmp_path / variant, max_shard_size="40KB")
        assert (tmp_path / variant / "model.safetensors.index.json").is_file()
        with torch.no_grad():
            ours = gu.load(tmp_path / variant).model(some_ids())
            torch.testing.assert_close(ours, theirs(some_ids()).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("place", ["model", "another"])
@pytest.mark.parametrize("name", ["llama-nano", "gpt2-nano"])
def test_a_model_of_ours_that_transformers_has_changed_is_read_as_any_other(
    name: str, place: str, tmp_path: Path
) -> None:
    model = random_model(name, vocab_size=320, dropout=0.1)
    gu.save_model(tmp_path / "model", model, small_tokenizer())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_tokens(["<think>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>"]})
    theirs.resize_token_embeddings(len(tokenizer) + 3)
    theirs.save_pretrained(tmp_path / place)
    tokenizer.save_pretrained(tmp_path / place)
    import_folder(tmp_path / place, tmp_path / "out")
    ids = torch.tensor([tokenizer.encode("A <think>cat")])
    assert len(tokenizer) > 320
    for folder in (tmp_path / place, tmp_path / "out"):
        loaded = gu.load(folder)
        assert loaded.tokenizer is not None
        assert loaded.tokenizer.encode("A <think>cat") == ids[0].tolist()
        assert loaded.tokenizer.end_ids == small_tokenizer().end_ids
        assert loaded.model.config.vocab_size == len(tokenizer) + 3
        assert loaded.model.config.dropout == 0.1  # which theirs cannot say
        with torch.no_grad():
            torch.testing.assert_close(loaded.model(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)


def test_models_saved_without_their_output_layer_are_read(tmp_path: Path) -> None:
    theirs = interop_models.make("GPT-2")
    theirs.transformer.save_pretrained(tmp_path)  # names without "transformer."
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["GPT2Model"]
    with torch.no_grad():
        torch.testing.assert_close(gu.load(tmp_path).model(some_ids()), theirs(some_ids()).logits, atol=1e-5, rtol=1e-5)


def test_weights_of_several_dtypes_become_the_wider_one_where_they_are_joined(tmp_path: Path) -> None:
    interop_models.save("Mixtral", tmp_path / "mixed")
    weights = load_file(tmp_path / "mixed" / "model.safetensors")
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    weights[name] = weights[name].bfloat16()
    save_file(weights, tmp_path / "mixed" / "model.safetensors", metadata={"format": "pt"})
    import_folder(tmp_path / "mixed", tmp_path / "ours")
    after = load_file(tmp_path / "ours" / "model.safetensors")
    assert all(torch.equal(after[tensor].float(), value.float()) for tensor, value in weights.items())


def test_filling_rows_stay_inside(tmp_path: Path) -> None:
    for name in ("llama-nano", "gpt2-nano"):
        plain = random_model(name, vocab_size=100)
        filled = gu.Transformer(gu.preset(name, vocab_size=100, vocab_multiple=64)).eval()
        with torch.no_grad():
            for one, other in zip(filled.parameters(), plain.parameters(), strict=True):
                one.zero_()[: len(other)] = other
        gu.save_model(tmp_path / f"{name}-filled", filled)
        gu.save_model(tmp_path / name, plain)
        stored = [(tmp_path / place / "model.safetensors").read_bytes() for place in (f"{name}-filled", name)]
        assert stored[0] == stored[1]
        again = gu.load(tmp_path / f"{name}-filled").model
        assert again.embed_tokens.weight.shape[0] == 128
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), filled.parameters(), strict=True))


def test_a_training_checkpoint_with_its_configuration_is_a_model(tmp_path: Path) -> None:
    model = random_model("gpt2-nano")
    save_file({name: value.detach() for name, value in model.named_parameters()}, tmp_path / "weights.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"groundup": model.config.to_dict()}))
    again = gu.load(tmp_path).model
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_nothing_but_a_model_is_replaced_and_only_if_forced(folder: Path, tmp_path: Path) -> None:
    export_folder(folder, tmp_path / "out")
    with pytest.raises(GroundupError, match="holds a model already"):
        export_folder(folder, tmp_path / "out")
    export_folder(folder, tmp_path / "out", dtype="bf16", force=True)
    (tmp_path / "out" / "README.md").write_text("My model card")
    with pytest.raises(GroundupError, match=r"README\.md: was not written by groundup"):
        export_folder(folder, tmp_path / "out", force=True)
    (tmp_path / "out" / "README.md").rename(tmp_path / "out" / "notes.md")
    with pytest.raises(GroundupError, match=r"also holds notes\.md"):
        export_folder(folder, tmp_path / "out", force=True)
    (tmp_path / "papers").mkdir()
    export_folder(folder, tmp_path / "papers")  # an empty folder is no loss
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("Dear reader")
    for force in (False, True):
        with pytest.raises(GroundupError, match="holds files that groundup did not make"):
            import_folder(tmp_path / "out", tmp_path / "letters", force=force)
        for place in (folder, folder / "inside", tmp_path):
            with pytest.raises(GroundupError, match="is the folder that is read, or one inside or around it"):
                export_folder(folder, place, force=force)
    assert (tmp_path / "letters" / "dear.txt").read_text() == "Dear reader"


# --- memory

MEASURED = """
import sys
from groundup.interop import import_folder

def peak() -> int:
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

before = peak()
import_folder(sys.argv[1], sys.argv[2])
print(before, peak())
"""


def large_model(folder: Path, d_ff: int, dtype: torch.dtype) -> int:
    """A Llama of 12 layers whose weights are zeros; returns their bytes."""
    config = {**LLAMA, "hidden_size": 256, "intermediate_size": d_ff, "num_hidden_layers": 12, "model_type": "llama"}
    made = transformers.LlamaConfig(**{name: value for name, value in config.items() if name != "model_type"})
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(made)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    specs = [TensorSpec(name, dtype, shape) for name, shape in shapes.items()]
    return write_weights(folder, specs, lambda name: torch.zeros(shapes[name], dtype=dtype), most_bytes=400_000_000)


def measured_import(source: Path, out: Path) -> tuple[int, int]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(source), str(out)], capture_output=True, text=True, check=True, timeout=250
    )
    before, after = map(int, done.stdout.split())
    return before, after


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


@needs_proc
def test_an_import_holds_a_few_tensors_not_a_model(tmp_path: Path) -> None:
    size = large_model(tmp_path / "theirs", d_ff=10_000, dtype=torch.bfloat16)
    assert size > 180e6
    before, after = measured_import(tmp_path / "theirs", tmp_path / "ours")
    assert after - before < 0.3 * size


@needs_proc
@pytest.mark.long
def test_a_gigabyte_is_imported_in_less_than_one_point_three_of_its_size(tmp_path: Path) -> None:
    size = large_model(tmp_path / "theirs", d_ff=28_000, dtype=torch.float32)
    assert size > 1e9
    before, after = measured_import(tmp_path / "theirs", tmp_path / "ours")
    assert after < 1.3 * size  # the interpreter and torch included
    assert after - before < 0.15 * size


# --- the commands


def test_the_commands_import_export_and_generate(groundup: CommandLine, folder: Path, tmp_path: Path) -> None:
    out = groundup("export", folder, tmp_path / "hf", "--to", "hf", "--dtype", "bf16", "--json")
    assert out.code == 0, out.err
    assert out.json["family"] == "llama"
    assert out.json["dtype"] == "bfloat16"
    assert out.json["tokenizer"]
    said = groundup("import", tmp_path / "hf", tmp_path / "ours")
    assert said.code == 0
    assert "family: llama" in said.out
    assert f"parameters: {out.json['parameters']:,}" in said.out
    text = groundup("generate", tmp_path / "hf", "Once", "--max-tokens", "4", "-t", "0", "--json")
    assert text.json == {**groundup("generate", tmp_path / "ours", "Once", "-n", "4", "-t", "0", "--json").json,
                         "model": str(tmp_path / "hf")}  # fmt: skip


def test_the_commands_errors_are_words(groundup: CommandLine, folder: Path, tmp_path: Path) -> None:
    again = groundup("import", folder, folder)
    assert again.code == 1
    assert "is the folder that is read" in again.err
    assert (
        groundup("export", folder, tmp_path / "x", "--to", "hf", "--dtype", "q8_0").err.count("is for --to gguf") == 1
    )
    assert groundup("export", folder, tmp_path / "x", "--to", "onnx").code == 2
    (tmp_path / "x.gguf").write_text("mine")
    assert "is there already" in groundup("export", folder, tmp_path / "x.gguf", "--to", "gguf").err
    assert (tmp_path / "x.gguf").read_text() == "mine"
    missing = groundup("import", tmp_path / "nowhere", tmp_path / "x")
    assert missing.code == 1
    assert "config.json: not found" in missing.err


def test_the_command_writes_gguf(groundup: CommandLine, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    out = groundup("export", folder, tmp_path / "model.gguf", "--to", "gguf", "--dtype", "f32", "--json")
    assert out.code == 0, out.err
    assert out.json["file"] == str(tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize("variant", interop_models.ONE_OF_EACH)
def test_each_family_leaves_for_gguf(variant: str, groundup: CommandLine, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    interop_models.save(variant, tmp_path / "theirs")
    out = groundup("export", tmp_path / "theirs", tmp_path / "model.gguf", "--to", "gguf", "--dtype", "f32")
    assert out.code == 0, out.err
    assert (tmp_path / "model.gguf").stat().st_size > 100_000


def test_the_manuals_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[1] / "manual" / "06-formats.md").read_text(encoding="utf-8")
    example = page.split("```python\n")[1].split("```")[0]
    interop_models.save("Llama 3.1", tmp_path / "downloads" / "theirs")
    monkeypatch.chdir(tmp_path)
    names = {"ids": some_ids()}
    exec(example, names)
    assert names["logits"].shape == (2, 24, 96)
    assert names["logits"].dtype == torch.float32
    assert json.loads((tmp_path / "for-them" / "config.json").read_text())["model_type"] == "llama"
