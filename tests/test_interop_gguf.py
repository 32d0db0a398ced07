"""GGUF files: transformers reads from them what we compute, token for token, and what does not fit is refused by name.

llama.cpp itself reads them in `make test-interop`.
"""

import dataclasses
import functools
import json
import math
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from generation_models import TEXT, random_model, small_tokenizer
from tokenizers import Regex, normalizers, pre_tokenizers, processors

from groundup.errors import ArtifactError, GroundupError
from groundup.interop import gguf as exporting
from groundup.interop import gguf_tensors
from groundup.interop.gguf import export_gguf
from groundup.model import RopeScaling, Transformer, preset
from groundup.model.positions import rotary_frequencies
from groundup.tokenizer import Tokenizer as OurTokenizer
from groundup.tokenizer import render
from groundup.tokenizer.adversarial import adversarial_texts
from groundup.tokenizer.pretrained import PretrainedTokenizer
from groundup.tokenizer.split import pre_tokenizer as split_of

gguf = pytest.importorskip("gguf")

VOCAB = 320  # as small_tokenizer's
WIDE = {"head_dim": 24}
MOE = {"n_experts": 4, "experts_per_token": 2}


def model_of(name, **overrides):
    return random_model(name, **{"vocab_size": VOCAB, **overrides})


def written(tmp_path, model, tokenizer=None, dtype="f32"):
    told = export_gguf(model, tokenizer, tmp_path / "model.gguf", dtype=dtype)
    return told, gguf.GGUFReader(tmp_path / "model.gguf")


def field(reader, key):
    found = reader.get_field(key)
    return None if found is None else found.contents()


# --- what transformers computes from the file ------------------------------------------------------------------------

# Our preset and what is changed in it; llama.cpp's name; what transformers' reader of GGUF leaves at its default.
SHAPES = {
    "Llama, untied, GQA": ("llama-nano", {}, "llama", {}),
    "Llama, tied, one key head": ("llama-nano", {"tied_embeddings": True, "n_kv_heads": 1}, "llama", {}),
    "Llama, wide heads": ("llama-nano", WIDE, "llama", {}),
    "Llama, biases": ("llama-nano", {"bias": True}, "llama", {"attention_bias": True, "mlp_bias": True}),
    "Llama, another base and eps": ("llama-nano", {"rope_theta": 5e5, "norm_eps": 1e-3}, "llama", {}),
    "Llama, padded vocabulary": ("llama-nano", {"vocab_multiple": 128}, "llama", {}),
    "Mistral, long window": ("llama-nano", {"attention": ("window",), "window": 64}, "llama", {}),
    "Qwen2": ("llama-nano", {"qkv_bias": True}, "qwen2", {}),
    "Qwen3, tied": ("ground-nano", {}, "qwen3", {"head_dim": 16}),
    "Qwen3, untied, wide heads": ("ground-nano", {"tied_embeddings": False, **WIDE}, "qwen3", {"head_dim": 24}),
    "Qwen3, norms without weights": ("ground-nano", {"norm_weight": False}, "qwen3", {"head_dim": 16}),
    "Qwen3, experts": ("ground-nano", MOE, "qwen3moe", {"moe_intermediate_size": 96}),
    "GPT-2": ("gpt2-nano", {}, "gpt2", {"n_positions": 64}),
    "GPT-2, untied": ("gpt2-nano", {"tied_embeddings": False}, "gpt2", {"n_positions": 64}),
    "GPT-2, no biases": ("gpt2-nano", {"bias": False}, "gpt2", {"n_positions": 64}),
    "GPT-2, norms without weights": ("gpt2-nano", {"norm_weight": False}, "gpt2", {"n_positions": 64}),
}


def transformers_reads(folder, **left_out):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(folder, gguf_file="model.gguf")
    for name, value in left_out.items():
        setattr(config, name, value)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="model.gguf", config=config, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()


def differences(model, theirs, length=48):
    """The largest difference of a logit at each position."""
    ids = torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, expected = model(ids), theirs(ids).logits
    assert ours.std() > 0.1
    assert expected.shape == ours.shape
    return (ours - expected).abs().amax(dim=(0, 2))


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_computes_the_same_logits_from_the_file(shape, tmp_path):
    name, overrides, architecture, left_out = SHAPES[shape]
    model = model_of(name, **overrides)
    told, _ = written(tmp_path, model, small_tokenizer())
    assert told["architecture"] == architecture
    assert told["notes"] == []
    found = differences(model, transformers_reads(tmp_path, **left_out))
    # RMSNorm without gradients sums in another order, and transformers' GPT-2 multiplies by transposed weights.
    assert found.max() <= 1e-5


@pytest.mark.parametrize("name", ["llama-nano", "ground-nano", "gpt2-nano"])
def test_another_scale_of_attention_goes_into_the_queries(name, tmp_path):
    model = model_of(name, attention_scale=0.7, bias=name == "gpt2-nano")
    written(tmp_path, model, small_tokenizer())
    left_out = {"ground-nano": {"head_dim": 16}, "gpt2-nano": {"n_positions": 64}}.get(name, {})
    assert differences(model, transformers_reads(tmp_path, **left_out)).max() <= 1e-5


def test_a_short_window_bounds_the_context(tmp_path):
    model = model_of("llama-nano", attention=("window", "full"), window=24)
    told, reader = written(tmp_path, model, small_tokenizer())
    assert told["context_length"] == 24
    assert field(reader, "llama.context_length") == 24
    assert "context_length is 24 instead of 64" in told["notes"][0]
    found = differences(model, transformers_reads(tmp_path))
    assert found[:24].max() <= 1e-6
    assert found[30:].min() > 1e-3  # so the bound is needed


def test_gpt_neo_leaves_as_gpt2_up_to_its_window(tmp_path):
    # Unscaled scores, queries without bias, layers alternately global and local.
    neo = {"attention": ("full", "window"), "window": 32, "attention_scale": 1.0, "qkv_bias": False}
    model = model_of("gpt2-nano", **neo)
    told, reader = written(tmp_path, model, small_tokenizer())
    assert (told["architecture"], told["context_length"]) == ("gpt2", 32)
    assert {one.name: one.shape.tolist() for one in reader.tensors}["position_embd.weight"] == [32, 32]
    assert differences(model, transformers_reads(tmp_path, n_positions=32), length=32).max() <= 1e-5


def test_position_0_alone_would_hide_a_wrong_order_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_tensors, "interleaved", lambda rows, n_heads: rows)
    model = model_of("llama-nano")
    written(tmp_path, model, small_tokenizer())
    found = differences(model, transformers_reads(tmp_path))
    assert found[0] <= 1e-6
    assert found[1:].min() > 1e-3


def test_mixtral_has_all_its_experts(tmp_path):
    model = model_of("llama-nano", **MOE)
    _, reader = written(tmp_path, model, small_tokenizer())
    tensors = {one.name: one for one in reader.tensors}
    mlp = model.layers[1].mlp
    for name, weight in (
        ("ffn_gate_inp", mlp.router.weight),
        ("ffn_gate_exps", mlp.gate_proj.weight),
        ("ffn_up_exps", mlp.up_proj.weight),
        ("ffn_down_exps", mlp.down_proj.weight),
    ):
        found = tensors[f"blk.1.{name}.weight"]
        assert tuple(found.shape[::-1]) == tuple(weight.shape)
        assert np.array_equal(found.data, weight.detach().numpy())
    assert [field(reader, f"llama.{key}") for key in ("expert_count", "expert_used_count")] == [4, 2]
    assert field(reader, "llama.feed_forward_length") == 96


# --- RoPE's scalings -------------------------------------------------------------------------------------------------

SCALINGS = {
    "none": None,
    "linear": RopeScaling(kind="linear", factor=4),
    "ntk": RopeScaling(kind="ntk", factor=3),
    "yarn": RopeScaling(kind="yarn", factor=8, original_context=2048),
    "yarn, own factor": RopeScaling(kind="yarn", factor=8, original_context=2048, attention_factor=1.5),
    "llama3": RopeScaling(kind="llama3", factor=8, original_context=2048),
}


def frequencies_in_llama_cpp(reader, arch):
    """What ggml makes of the keys (`rope_yarn` and `ggml_rope_yarn_corr_dims`), in float64."""
    dim, base = field(reader, f"{arch}.rope.dimension_count"), field(reader, f"{arch}.rope.freq_base")
    factors = {one.name: one.data for one in reader.tensors}.get("rope_freqs.weight", 1.0)
    plain = base ** (-np.arange(0, dim, 2) / dim) / factors
    kind = field(reader, f"{arch}.rope.scaling.type")
    scale = 1 / (field(reader, f"{arch}.rope.scaling.factor") or 1.0)
    magnitude = field(reader, f"{arch}.rope.scaling.attn_factor") or 1.0
    if kind != "yarn":
        return plain * scale, magnitude
    context = field(reader, f"{arch}.rope.scaling.original_context_length")

    def turning(times):
        return dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(0, math.floor(turning(32))), min(dim - 1, math.ceil(turning(1)))
    kept = 1 - np.clip((np.arange(dim // 2) - low) / max(0.001, high - low), 0, 1)
    return plain * scale * (1 - kept) + plain * kept, magnitude * (1 + 0.1 * math.log(1 / scale))


@pytest.mark.parametrize("name", ["llama-nano", "ground-nano"])
@pytest.mark.parametrize("scaling", [name for name in SCALINGS if name != "llama3"])
def test_llama_cpp_turns_by_our_angles(scaling, name, tmp_path):
    check_angles(SCALINGS[scaling], name, tmp_path)


def test_llama_3s_scaling_is_a_tensor(tmp_path):
    reader = check_angles(SCALINGS["llama3"], "llama-nano", tmp_path)
    factors = {one.name: one.data for one in reader.tensors}["rope_freqs.weight"]
    assert factors[0] == 1
    assert factors[-1] == 8
    assert field(reader, "llama.rope.scaling.type") is None


def check_angles(scaling, name, tmp_path):
    model = model_of(name, rope_scaling=scaling, head_dim=64, context_length=4096)
    told, reader = written(tmp_path, model)
    found, magnitude = frequencies_in_llama_cpp(reader, told["architecture"])
    expected, factor = rotary_frequencies(64, 10_000.0, scaling)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)
    assert magnitude == pytest.approx(factor, rel=1e-6)
    return reader


# --- types -----------------------------------------------------------------------------------------------------------


def error_bound(kind, row):
    """Of each value of a row: half a step of its type, or a whole one at the end that q4_0 lacks."""
    if kind == "F16":
        return np.abs(row) * 2.0**-11 + 2.0**-25
    if kind == "BF16":
        return np.abs(row) * 2.0**-8
    largest = np.abs(row.reshape(-1, 32)).max(axis=1, keepdims=True).repeat(32, axis=1).reshape(row.shape)
    step = largest / (127 if kind == "Q8_0" else 8)
    return step * (0.5 if kind == "Q8_0" else 1.0) + largest * 2.0**-10


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("tied", [True, False])
def test_each_type_keeps_its_precision(dtype, tied, tmp_path):
    model = model_of("ground-nano", tied_embeddings=tied)
    told, reader = written(tmp_path, model, small_tokenizer(), dtype)
    exact = {piece.name: piece.make().detach().numpy() for piece in gguf_tensors.tensors_of(model, _qwen3(model))}
    assert exact.keys() == {one.name for one in reader.tensors}
    for one in reader.tensors:
        name, kind = one.name, one.tensor_type.name
        is_output = name == "output.weight" or (tied and name == "token_embd.weight")
        is_norm = "norm" in name
        assert kind == ("F32" if is_norm else "Q8_0" if dtype == "q4_0" and is_output else dtype.upper())
        values = gguf.dequantize(one.data, one.tensor_type).reshape(exact[name].shape)
        if is_norm:
            assert np.array_equal(values, exact[name])
        else:
            assert (np.abs(values - exact[name]) <= error_bound(kind, exact[name])).all()
            assert not np.array_equal(values, exact[name])
    assert told["types"][dtype.upper()] >= 14


def _qwen3(model):
    return exporting.architecture_of(model.config, None)


@pytest.mark.parametrize(("dtype", "bound"), [("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 2e-2), ("q4_0", 0.3)])
def test_fewer_bits_change_logits_a_little(dtype, bound, tmp_path):
    model = model_of("llama-nano", d_model=64, d_ff=128)
    written(tmp_path, model, small_tokenizer(), dtype)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        ours, theirs = model(ids), transformers_reads(tmp_path)(ids).logits
    assert 0 < (ours - theirs).norm() / ours.norm() < bound


def test_rows_of_odd_lengths_stay_in_f16(tmp_path):
    model = model_of("llama-nano", d_ff=80)
    told, reader = written(tmp_path, model, dtype="q8_0")
    kinds = {one.name: one.tensor_type.name for one in reader.tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"
    assert "2 matrices stay in f16" in told["notes"][0]


def test_slices_are_the_whole(tmp_path, monkeypatch):
    model = model_of("llama-nano", **MOE)
    for dtype in ("f32", "q4_0"):
        export_gguf(model, small_tokenizer(), tmp_path / "model.gguf", dtype=dtype)
        whole = (tmp_path / "model.gguf").read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(exporting, "_SLICE_VALUES", 100)
            told = export_gguf(model, small_tokenizer(), tmp_path / "model.gguf", dtype=dtype)
        assert (tmp_path / "model.gguf").read_bytes() == whole  # which also says: the same bytes each time
        assert told["bytes"] == len(whole)


def test_a_value_beyond_float16_is_refused(tmp_path):
    model = model_of("llama-nano")
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight[3, 3] = 1e5
    with pytest.raises(ArtifactError, match=r"blk\.0\.ffn_up\.weight has the value 100000, which f16 cannot hold"):
        export_gguf(model, None, tmp_path / "model.gguf", dtype="f16")
    assert list(tmp_path.iterdir()) == []
    export_gguf(model, None, tmp_path / "model.gguf", dtype="bf16")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_model_is_refused_and_the_old_file_stays(value, tmp_path):
    model = model_of("llama-nano")
    export_gguf(model, None, tmp_path / "model.gguf", dtype="f32")
    before = (tmp_path / "model.gguf").read_bytes()
    with torch.no_grad():
        model.layers[1].input_layernorm.weight[0] = value
    with pytest.raises(ArtifactError, match=r"blk\.1\.attn_norm\.weight has the value .*\n.*damaged"):
        export_gguf(model, None, tmp_path / "model.gguf", dtype="f32")
    assert (tmp_path / "model.gguf").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


# --- tokenizers ------------------------------------------------------------------------------------------------------


@functools.cache
def tokenizer_with(split):
    return OurTokenizer.train([TEXT] * 3, vocab_size=400, split=split, spare_tokens=2)


SPLITS = {"qwen2": "qwen2", "llama3": "smaug-bpe", "gpt2": "gpt-2"}


@pytest.mark.parametrize("split", SPLITS)
def test_transformers_tokenizes_the_same_from_the_file(split, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = tokenizer_with(split)
    _, reader = written(tmp_path, model_of("ground-nano", vocab_size=tokenizer.vocab_size), tokenizer)
    assert field(reader, "tokenizer.ggml.pre") == SPLITS[split]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    # Transformers takes names of control tokens in a text for the tokens; we never do.
    texts = [text for text in adversarial_texts(400, seed=3) if "<|" not in text and text.isprintable()]
    assert len(texts) > 100
    for text in [TEXT, *texts]:
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Where is\nthe cat?"}]
    talk += [{"role": "assistant", "content": "Here."}, {"role": "user", "content": "12 cats?"}]
    rendered = theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    assert rendered == render(tokenizer, talk, add_generation_prompt=True).ids


def test_control_tokens_are_control_tokens_and_rows_without_one_are_unused(tmp_path):
    tokenizer = small_tokenizer()
    _, reader = written(tmp_path, model_of("ground-nano", vocab_size=VOCAB + 5, vocab_multiple=64), tokenizer)
    tokens, types = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    kind = gguf.TokenType
    assert len(tokens) == len(set(tokens)) == VOCAB + 5
    n_control = len(tokenizer.special_ids)
    assert types == [kind.CONTROL] * n_control + [kind.NORMAL] * (VOCAB - n_control) + [kind.UNUSED] * 5
    assert tokens[tokenizer.end_id] == "<|end|>"
    assert tokens[tokenizer.encode(" ")[0]] == "Ġ"
    assert field(reader, "tokenizer.ggml.eos_token_id") == tokenizer.end_id
    assert field(reader, "tokenizer.ggml.bos_token_id") == tokenizer.end_of_text_id
    assert field(reader, "tokenizer.ggml.padding_token_id") == tokenizer.pad_id
    assert field(reader, "tokenizer.ggml.add_bos_token") is False
    assert {one.name: one.shape.tolist() for one in reader.tensors}["token_embd.weight"] == [32, VOCAB + 5]


def test_a_model_without_a_tokenizer_says_so(tmp_path):
    _, reader = written(tmp_path, model_of("ground-nano"))
    assert field(reader, "tokenizer.ggml.model") == "none"
    assert field(reader, "qwen3.vocab_size") == VOCAB
    assert field(reader, "tokenizer.ggml.tokens") is None


def pretrained(config=None, **changes):
    """A pretrained tokenizer: ours, but for some parts of its files."""
    spec = {**json.loads(own_contents()), **changes}
    files = {"tokenizer.json": json.dumps(spec).encode(), "tokenizer_config.json": json.dumps(config or {}).encode()}
    return PretrainedTokenizer(files, "tokenizer.json", {"eos_token_id": 5})


@functools.cache
def own_contents():
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_with("llama3").save(folder)
        return (Path(folder) / "tokenizer.json").read_text()


def with_model(**changes):
    return {"model": {**json.loads(own_contents())["model"], **changes}}


def part(made):
    return json.loads(made.__getstate__())


def test_llama_3s_tokenizer_takes_whole_words_and_begins_with_bos(tmp_path):
    bos = {"content": "<|endoftext|>"}
    template = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    files = pretrained(
        {"bos_token": bos, "eos_token": "<|end|>", "chat_template": [{"name": "default", "template": "hello"}]},
        post_processor=part(template),
        **with_model(ignore_merges=True),
    )
    _, reader = written(tmp_path, model_of("llama-nano", vocab_size=400), files)
    assert field(reader, "tokenizer.ggml.pre") == "llama-bpe"
    assert field(reader, "tokenizer.ggml.add_bos_token") is True
    assert field(reader, "tokenizer.ggml.add_eos_token") is False
    assert field(reader, "tokenizer.chat_template") == "hello"
    assert field(reader, "tokenizer.ggml.padding_token_id") is None


def test_tokens_added_for_users_are_no_control_tokens(tmp_path):
    spec = json.loads(own_contents())
    n, first = len(spec["model"]["vocab"]), spec["added_tokens"][0]
    added = [*spec["added_tokens"], {**first, "id": n, "content": "<think>", "special": False}]
    _, reader = written(tmp_path, model_of("llama-nano", vocab_size=n + 2), pretrained(added_tokens=added))
    tokens, types = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    assert tokens[n:] == ["<think>", f"[PAD{n + 1}]"]
    assert types[n:] == [gguf.TokenType.USER_DEFINED, gguf.TokenType.UNUSED]


FOREIGN = {
    "another split": (
        {"pre_tokenizer": part(pre_tokenizers.Split(Regex(r"\p{N}{1,2}"), "isolated"))},
        "pre_tokenizer: neither qwen2",
    ),
    "a prefix space": (
        {"pre_tokenizer": part(pre_tokenizers.ByteLevel(add_prefix_space=True))},
        "pre_tokenizer: neither",
    ),
    "no split": ({"pre_tokenizer": None}, "pre_tokenizer: neither qwen2"),
    "lower case": ({"normalizer": part(normalizers.Lowercase())}, "normalizer: Lowercase"),
    "bytes as fallback": (with_model(byte_fallback=True), "model.byte_fallback = True"),
    "marks of words": (with_model(end_of_word_suffix="</w>"), "model.end_of_word_suffix = '</w>'"),
    "dropped merges": (with_model(dropout=0.1), "model.dropout = 0.1"),
    "whole words with another split": (
        {"pre_tokenizer": part(split_of("gpt2")), **with_model(ignore_merges=True)},
        "model.ignore_merges = True with the split of gpt2",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_tokenizer_that_llama_cpp_would_take_for_another_is_refused(case, tmp_path):
    changes, reason = FOREIGN[case]
    with pytest.raises(ArtifactError, match=re.escape(reason)):
        export_gguf(model_of("llama-nano", vocab_size=400), pretrained(**changes), tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_unicode_normal_form_is_no_obstacle(tmp_path):
    # Qwen's own tokenizers have it. llama.cpp does without, and everybody's Qwen files too.
    written(tmp_path, model_of("llama-nano", vocab_size=400), pretrained(normalizer=part(normalizers.NFC())))


@pytest.mark.parametrize(("kind", "name"), [("wordpiece", "WordPiece"), ("unigram", "Unigram"), ("characters", "Word")])
def test_other_kinds_of_tokenizers_are_refused(kind, name, tmp_path):
    tokenizer = OurTokenizer.train([TEXT] * 3, kind=kind, vocab_size=620 if kind == "wordpiece" else 320)
    with pytest.raises(ArtifactError, match=f"a {name}.* tokenizer has no place in a GGUF file"):
        export_gguf(model_of("llama-nano", vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "model.gguf")


def test_a_vocabulary_larger_than_the_model_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="the tokenizer has 320 tokens, the model 300"):
        export_gguf(model_of("llama-nano", vocab_size=300), small_tokenizer(), tmp_path / "model.gguf")


# --- models that do not fit ------------------------------------------------------------------------------------------

REFUSED = {
    "post-norm": ("llama-nano", {"norm_placement": "post"}, ['norm_placement = "post"']),
    "strided": ("llama-nano", {"attention": ("full", "strided"), "stride": 8}, ['attention = "strided"']),
    "fixed": ("gpt2-nano", {"attention": ("fixed",), "stride": 8}, ['attention = "fixed"']),
    "soft caps": (
        "ground-nano",
        {"attention_softcap": 50.0, "logit_softcap": 30.0},
        ["attention_softcap = 50", "logit_softcap = 30"],
    ),
    "ALiBi": ("llama-nano", {"position": "alibi"}, ['position = "alibi"']),
    "no positions": ("ground-nano", {"position": "none"}, ['position = "none"']),
    "sinusoids": ("gpt2-nano", {"position": "sinusoidal"}, ['position = "sinusoidal"']),
    "GeGLU": ("llama-nano", {"activation": "geglu"}, ['activation = "geglu"']),
    "squared ReLU": ("ground-nano", {"activation": "relu2"}, ['activation = "relu2"']),
    "exact GELU": ("gpt2-nano", {"activation": "gelu"}, ['activation = "gelu"']),
    "partial RoPE": ("llama-nano", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor = 0.5"]),
    "llama3 scaling with QK-norm": (
        "ground-nano",
        {"rope_scaling": RopeScaling(kind="llama3", factor=8, original_context=64)},
        ['rope_scaling = {"kind": "llama3"'],
    ),
    "another ramp": (
        "llama-nano",
        {"rope_scaling": RopeScaling(kind="yarn", factor=8, original_context=64, beta_fast=16)},
        ["rope_scaling.beta_fast = 16"],
    ),
    "QK-norm with biases": ("ground-nano", {"qkv_bias": True, "ff_bias": True}, ["qkv_bias", "ff_bias"]),
    "experts with biases": ("llama-nano", {**MOE, "ff_bias": True}, ["ff_bias = true"]),
    "LayerNorm with RoPE": ("llama-nano", {"norm": "layernorm"}, ['position = "rope"', 'activation = "swiglu"']),
    "learned positions with RMSNorm": ("gpt2-nano", {"norm": "rmsnorm"}, ['norm = "rmsnorm"']),
    "GPT-2 with wide heads": ("gpt2-nano", WIDE, ["head_dim = 24: is 16.0 there"]),
    "GPT-2 with QK-norm": ("gpt2-nano", {"qk_norm": True}, ["qk_norm = true"]),
    "GPT-2 with experts": ("gpt2-nano", MOE, ["n_experts = 4"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_does_not_compute_is_refused_by_name(case, tmp_path):
    name, overrides, reasons = REFUSED[case]
    model = Transformer(preset(name, **overrides), device="meta")
    with pytest.raises(ArtifactError) as error:
        export_gguf(model, None, tmp_path / "model.gguf")
    lines = error.value.message.splitlines()[1:]
    assert len(lines) == len(reasons)
    assert all(reason in line for reason, line in zip(reasons, lines, strict=True))
    assert list(tmp_path.iterdir()) == []


def test_every_field_of_a_model_is_told_or_refused():
    # A new field of ModelConfig must be thought of here: told to llama.cpp, refused, or known to change nothing.
    told = {
        "vocab_size", "context_length", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_model", "d_ff", "norm_eps",
        "rope_theta", "rope_scaling", "window", "sink_tokens", "n_experts", "experts_per_token", "norm_weight", "bias",
        "qkv_bias", "o_bias", "ff_bias", "norm_bias", "attention_scale", "tied_embeddings", "qk_norm",
    }  # fmt: skip
    refused = {
        "norm", "norm_placement", "position", "partial_rotary_factor", "attention", "stride", "summary",
        "attention_softcap", "logit_softcap", "activation",
    }  # fmt: skip
    changes_nothing = {"router_aux_loss_coef", "vocab_multiple", "dropout", "initialization"}
    fields = {one.name for one in dataclasses.fields(preset("llama-nano"))}
    assert fields == told | refused | changes_nothing


def test_an_unknown_type_and_a_missing_package_are_errors_with_a_way_out(tmp_path, monkeypatch):
    with pytest.raises(GroundupError, match="dtype = 'q2_k': is not one of f32, f16"):
        export_gguf(model_of("llama-nano"), None, tmp_path / "model.gguf", dtype="q2_k")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(GroundupError, match=r"pip install 'groundup\[gguf\]'"):
        export_gguf(model_of("llama-nano"), None, tmp_path / "model.gguf")
