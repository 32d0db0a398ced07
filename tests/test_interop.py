"""Model folders: transformers computes what we compute, and nothing damaged or half-written is loaded."""

import json
import os
import signal

import pytest
import torch
from generation_models import NANO, TEXT, random_model, small_tokenizer
from safetensors.torch import load_file, save_file

import groundup as gu
import groundup.errors
import groundup.tokenizer
from groundup.errors import ArtifactError
from groundup.generation import SamplingParams, generate_batch
from groundup.recipe import parse_recipe

transformers = pytest.importorskip("transformers")

SHAPES = {
    "Qwen3, tied": ("ground-nano", {}),
    "Qwen3, untied, GQA": ("ground-nano", {"tied_embeddings": False, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8}),
    "Qwen3, wide heads": ("ground-nano", {"head_dim": 24}),
    "Llama, untied, GQA": ("llama-nano", {}),
    "Llama, tied, one key head": ("llama-nano", {"tied_embeddings": True, "n_kv_heads": 1}),
    "Llama, biases": ("llama-nano", {"bias": True}),
    "Llama, another rope": ("llama-nano", {"rope_theta": 500_000.0, "norm_eps": 1e-3}),
}


@pytest.fixture
def folder(tmp_path):
    """A whole model folder."""
    gu.save_model(tmp_path / "model", random_model(), small_tokenizer())
    (tmp_path / "model" / "digests.json").unlink()
    return tmp_path / "model"


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_computes_the_same_logits(shape, tmp_path):
    name, overrides = SHAPES[shape]
    model = random_model(name, **overrides)
    gu.save_model(tmp_path, model)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert type(theirs).__name__.startswith(shape.split(",")[0])
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(0, 512, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, expected = model(ids), theirs.eval()(ids).logits
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_transformers_writes_the_same_tokens(tmp_path):
    model, tokenizer = random_model(), small_tokenizer()
    gu.save_model(tmp_path, model, tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    prompt = tokenizer.encode("Once upon a time")
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
    ours = generate_batch(model, None, [prompt], SamplingParams(temperature=0, max_tokens=12))[0].ids
    assert ours == expected
    ends = {tokenizer.end_id, tokenizer.end_of_text_id}
    assert set(theirs.generation_config.eos_token_id) == ends
    assert theirs.generation_config.pad_token_id == tokenizer.pad_id


@pytest.mark.parametrize("kind", ["bpe", "characters"])
def test_transformers_tokenizer_gives_the_same_ids(kind, tmp_path):
    tokenizer = small_tokenizer(kind)
    gu.save_model(tmp_path, random_model(), tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (TEXT, "", " ", "The cat sat.\n\n  And sat", "cafe 東京 ☃"):
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Where is the cat?"}]
    rendered = theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    assert rendered == gu.tokenizer.render(tokenizer, talk, add_generation_prompt=True).ids


@pytest.mark.parametrize("name", NANO)
def test_a_model_comes_back_bit_for_bit(name, tmp_path):
    model, tokenizer = random_model(name), small_tokenizer()
    gu.save_model(tmp_path / "model", model, tokenizer)
    again, its_tokenizer = gu.load_model(tmp_path / "model")
    assert again.config == model.config
    assert its_tokenizer.fingerprint == tokenizer.fingerprint
    weights = dict(again.named_parameters())
    assert weights.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())
    assert all(parameter.requires_grad for parameter in weights.values())
    assert not again.training
    ids = torch.arange(10)[None]
    assert torch.equal(again(ids), model(ids))


def test_a_saved_folder_has_the_same_bytes_each_time(tmp_path):
    for place in ("a", "b"):
        gu.save_model(tmp_path / place, random_model(), small_tokenizer())
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(names)
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


def test_a_model_can_do_without_a_tokenizer(tmp_path):
    gu.save_model(tmp_path / "model", random_model())
    assert gu.load_model(tmp_path / "model")[1] is None


def test_a_folder_from_transformers_in_bfloat16_is_read_as_float32(folder):
    weights = load_file(folder / "model.safetensors")
    halved = {name: tensor.bfloat16() for name, tensor in weights.items()}
    save_file(halved, folder / "model.safetensors")
    model, _ = gu.load_model(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.embed_tokens.weight, halved["model.embed_tokens.weight"].float())


def test_a_saved_model_is_not_tied_to_its_file(folder):
    model, _ = gu.load_model(folder)
    before = model.norm.weight.detach().clone()
    gu.save_model(folder, random_model(seed=9))
    with torch.no_grad():
        model.embed_tokens.weight.add_(1)  # neither written to the file nor read from the new one
    assert torch.equal(model.norm.weight, before)
    assert torch.equal(gu.load_model(folder)[0].embed_tokens.weight, random_model(seed=9).embed_tokens.weight)


def test_load_finds_the_model_of_a_run_a_stage_and_a_folder(tmp_path):
    base, assistant = random_model(seed=1), random_model(seed=2)
    gu.save_model(tmp_path / "pretrain" / "model", base)
    with pytest.raises(ArtifactError, match="no model here"):
        gu.load(tmp_path)  # no run: it has no recipe
    gu.Run(tmp_path).create(parse_recipe("[align.sft]", "my.toml"))
    assert gu.load(tmp_path).folder == tmp_path / "pretrain" / "model"
    gu.save_model(tmp_path / "sft" / "model", assistant)

    def weight(*args, **options):
        return gu.load(*args, **options).model.embed_tokens.weight

    for path in (tmp_path, tmp_path / "sft", str(tmp_path / "sft" / "model")):
        assert torch.equal(weight(path), assistant.embed_tokens.weight)
    assert torch.equal(weight(tmp_path / "pretrain"), base.embed_tokens.weight)
    assert torch.equal(weight(tmp_path, stage="pretrain"), base.embed_tokens.weight)
    with pytest.raises(ArtifactError, match="no stage 'dpo' here that makes a model"):
        gu.load(tmp_path, stage="dpo")
    with pytest.raises(ArtifactError, match="nowhere: no model here"):
        gu.load(tmp_path / "nowhere")
    # Of a recipe that cannot be read any more, the newest.
    (tmp_path / "recipe.toml").write_text("[sft]\n")
    assert torch.equal(weight(tmp_path), assistant.embed_tokens.weight)


def config_with(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["groundup"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


FAULTS = {
    "no configuration": (lambda f: (f / "config.json").unlink(), "config.json: not found"),
    "another program's": (
        lambda f: (f / "config.json").write_text('{"model_type": "llama"}'),
        "hidden_size: is missing",
    ),
    "a missing field": (lambda f: (f / "config.json").write_text('{"groundup": {"n_layers": 2}}'), "config.json.*req"),
    "an unknown field": (lambda f: config_with(f, n_wheels=8), r"config.json: .*does not know \(n_wheels\)"),
    "a text for a number": (lambda f: config_with(f, n_layers="two"), "config.json: n_layers = 'two'"),
    "half a layer": (lambda f: config_with(f, n_layers=2.5), "config.json: n_layers = 2.5"),
    "an unknown part": (lambda f: config_with(f, norm="batchnorm"), "config.json: norm = 'batchnorm'"),
    "no heads": (lambda f: config_with(f, n_heads=0), "config.json: .*n_heads = 0"),
    "another width": (lambda f: config_with(f, d_ff=64), r"model.safetensors: model.layers.0.mlp.* not \("),
    "more layers": (lambda f: config_with(f, n_layers=3), "model.safetensors: not the weights .*layers.2"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: cannot be read"),
    "half a tokenizer": (lambda f: cut_short(f / "tokenizer.json"), "tokenizer.json: damaged"),
    "a larger tokenizer": (
        lambda f: gu.Tokenizer.train([TEXT], vocab_size=600, spare_tokens=250).save(f),
        "tokenizer.json: has 5.. tokens, the model beside it 512",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_an_error_that_names_the_file(fault, folder):
    damage, message = FAULTS[fault]
    damage(folder)
    with pytest.raises(ArtifactError, match=message) as error:
        gu.load_model(folder)
    assert str(folder) in str(error.value)


def test_a_failed_save_leaves_the_old_folder(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def disk_full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("groundup.interop.folder.write_json", disk_full)
    with pytest.raises(gu.errors.GroundupError, match="disk is full"):
        gu.save_model(folder, random_model(seed=9), small_tokenizer())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("is_replaced", [False, True], ids=["new", "replaced"])
def test_killed_at_any_moment_a_folder_is_whole_or_not_there(is_replaced, tmp_path):
    target, old, new = tmp_path / "model", random_model(seed=1), random_model(seed=2)
    if is_replaced:
        gu.save_model(target, old, small_tokenizer())
    found = []
    for moment in range(1, 40):  # killed when the so-manieth file or folder is flushed
        child = os.fork()
        if child == 0:
            save_and_die(moment, target, new)
        was_killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        if target.exists():
            model, tokenizer = gu.load_model(target)
            assert tokenizer.fingerprint == small_tokenizer().fingerprint
            found.append("new" if torch.equal(model.norm.weight, new.norm.weight) else "old")
            assert found[-1] == "new" or torch.equal(model.norm.weight, old.norm.weight)
        else:
            found.append("none")
        if not was_killed:
            break
    assert not was_killed
    assert found[0] == ("old" if is_replaced else "none")
    assert found[-1] == "new"
    assert len(found) > 5


def save_and_die(moment, target, model):
    """In a forked process: save, and be killed at a moment."""
    flush, n_flushed = os.fsync, 0

    def fsync(descriptor):
        nonlocal n_flushed
        n_flushed += 1
        if n_flushed == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(descriptor)

    os.fsync = fsync
    try:
        gu.save_model(target, model, small_tokenizer())
    finally:
        os._exit(0)


def test_the_configuration_for_transformers_is_left_out_where_it_has_no_such_model(tmp_path):
    model = random_model("gpt2-nano", position="alibi")
    gu.save_model(tmp_path / "model", model)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config == {"groundup": model.config.to_dict()}
