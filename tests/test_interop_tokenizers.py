"""Tokenizers that come with a model: Hugging Face's ids and texts, through the methods that ours have."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import interop_models
import pytest
import tokenizers
import torch
from generation_models import TEXT, random_model, small_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import groundup as gu
from groundup.errors import ArtifactError, DataError
from groundup.interop import export_folder, import_folder
from groundup.tokenizer import render
from groundup.tokenizer.pretrained import PretrainedTokenizer

transformers = pytest.importorskip("transformers")

TEXTS = [
    TEXT,
    "",
    " ",
    "  two  spaces ",
    "naïve 東京 🙂\n\n\tx",
    "<|endoftext|> and </s> <s>",
    "1234",
    "\u2581 low",
    "é\x00\x7f",
]


def byte_level() -> tokenizers.Tokenizer:
    """As GPT-2's, with a plain added token."""
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    engine.train_from_iterator([TEXT] * 3, trainer)
    engine.add_tokens(["<tool_call>"])
    engine.post_processor = processors.ByteLevel(trim_offsets=False)
    return engine


def sentencepiece() -> tokenizers.Tokenizer:
    """As Llama 2's and Mistral's: spaces as U+2581, unknown characters as bytes, a token before each text."""
    engine = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    engine.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    engine.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = ["<unk>", "<s>", "</s>"]
    letters = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=[*names, *letters])
    engine.train_from_iterator([TEXT.encode("ascii", "ignore").decode()] * 3, trainer)
    spec = json.loads(engine.to_str())  # the bytes are no control tokens
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in names]
    engine = tokenizers.Tokenizer.from_str(json.dumps(spec))
    engine.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return engine


KINDS = {
    "byte level": (byte_level, {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}),
    "sentencepiece": (sentencepiece, {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}),
}


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A Hugging Face folder with a tokenizer."""
    return make_folder(request.param, tmp_path)


def make_folder(kind: str, tmp_path: Path) -> Path:
    make, names = KINDS[kind]
    model = random_model("llama-nano", vocab_size=400)
    gu.save_model(tmp_path / "made", model)
    export_folder(tmp_path / "made", tmp_path / "theirs")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=make(), **names, chat_template="{{ messages }}")
    fast.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def test_ids_and_texts_are_those_of_transformers(folder: Path) -> None:
    ours, theirs = gu.load(folder).tokenizer, transformers.AutoTokenizer.from_pretrained(folder)
    assert isinstance(ours, PretrainedTokenizer)
    assert ours.vocab_size == len(theirs)
    assert ours.special_ids == frozenset(theirs.all_special_ids)
    names = theirs.all_special_tokens
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
        assert ours.encode_batch([text, "x"]) == [ids, ours.encode("x")]
        # Text is never a control token unless it is allowed.
        assert not ours.special_ids & set(ids)
    assert ours.encode(names[0], allowed_special=names[:1]) == [theirs.convert_tokens_to_ids(names[0])]
    flat, lengths = ours.encode_to_arrays(TEXTS)
    assert flat.tolist() == [one for text in TEXTS for one in ours.encode(text)]
    assert lengths.tolist() == [len(ours.encode(text)) for text in TEXTS]
    assert ours.choose_engine() == "huggingface"
    with pytest.raises(DataError, match="token id 9999"):
        ours.decode([9999])


@given(text=st.text())
def test_the_tokens_bytes_are_the_text(text: str) -> None:
    ours = LOADED["byte level"]
    assert b"".join(map(ours.token_bytes, ours.encode(text))) == text.encode()
    spaced = LOADED["sentencepiece"]
    found = b"".join(map(spaced.token_bytes, spaced.encode(text)))
    assert found == (f" {text}" if text else "").replace("\u2581", " ").encode()


def load_alone(kind: str) -> PretrainedTokenizer:
    contents = KINDS[kind][0]().to_str().encode()
    return PretrainedTokenizer({"tokenizer.json": contents}, kind, {})


LOADED = {kind: load_alone(kind) for kind in KINDS}


def test_it_is_imported_exported_and_saved_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    import_folder(folder, tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "again")
    loaded = gu.load(tmp_path / "ours")
    gu.save_model(tmp_path / "saved", loaded.model, loaded.tokenizer)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        for place in ("ours", "again", "saved"):
            assert (tmp_path / place / name).read_bytes() == (folder / name).read_bytes()
    assert gu.load(tmp_path / "saved").tokenizer.fingerprint == loaded.tokenizer.fingerprint
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (
        loaded.tokenizer.end_of_text_id,
        loaded.tokenizer.end_id,
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert theirs.chat_template == "{{ messages }}"


def test_ids_that_stand_for_no_token_are_known() -> None:
    spec = json.loads(byte_level().to_str())
    n = len(spec["model"]["vocab"])
    spec["model"]["vocab"]["zq"] = n + 3  # the added token goes to n + 1
    holed = PretrainedTokenizer({"tokenizer.json": json.dumps(spec).encode()}, "holed", {})
    assert holed.unused_ids(n + 6) == [n, n + 2, n + 4, n + 5]
    assert small_tokenizer().unused_ids(322) == [320, 321]


def test_text_is_generated_with_it(folder: Path) -> None:
    loaded = gu.load(folder)
    ours = gu.generate(loaded.model, loaded.tokenizer, "Once upon", max_tokens=8, temperature=0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[loaded.tokenizer.end_of_text_id, *loaded.tokenizer.encode("Once upon")]])
    unused = [*range(len(transformers.AutoTokenizer.from_pretrained(folder)), loaded.model.config.vocab_size)]
    out = theirs.generate(ids, max_new_tokens=8, do_sample=False, suppress_tokens=unused)[0, ids.shape[1] :].tolist()
    assert ours.ids == out
    assert unused  # rows of the embedding that stand for no token, and are never drawn
    assert "".join(gu.stream(loaded.model, loaded.tokenizer, "Once upon", max_tokens=8, temperature=0)) == ours.text


ENDS: dict[str, Callable[[list[int], list[str]], dict[str, dict[str, Any]]]] = {
    "one id": lambda ids, names: {"config.json": {"eos_token_id": ids[0]}},
    "ids": lambda ids, names: {"config.json": {"eos_token_id": ids}},
    "ids for generation": lambda ids, names: {"generation_config.json": {"eos_token_id": [-1, None, *ids, 10**9]}},
    "a name": lambda ids, names: {"tokenizer_config.json": {"eos_token": names[0]}},
    "names": lambda ids, names: {"tokenizer_config.json": {"eos_token": [{"content": name} for name in names]}},
    "ids of the tokenizer": lambda ids, names: {"tokenizer_config.json": {"eos_token_id": ids}},
    "one in each": lambda ids, names: {
        "config.json": {"eos_token_id": ids[0]},
        "tokenizer_config.json": {"eos_token": names[1]},
    },
}


@pytest.mark.parametrize("said", ENDS)
def test_any_end_token_that_any_file_names_ends_a_text(said: str, tmp_path: Path) -> None:
    folder = make_folder("byte level", tmp_path)
    loaded = gu.load(folder)
    written = gu.generate(loaded.model, loaded.tokenizer, "Once upon", max_tokens=8, temperature=0).ids
    names = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    ends = [written[4], next(index for index in range(50, 90) if index not in written)]
    changes = ENDS[said](ends, [name for index in ends for name, other in names.items() if other == index])
    for name, values in changes.items():
        path = folder / name
        path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))
    import_folder(folder, tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "again")
    ours = gu.load(tmp_path / "ours")
    gu.save_model(tmp_path / "saved", ours.model, ours.tokenizer)
    for place in (folder, tmp_path / "ours", tmp_path / "again", tmp_path / "saved"):
        loaded = gu.load(place)
        assert loaded.tokenizer is not None
        assert loaded.tokenizer.end_ids >= {*ends[: 1 if said.startswith(("one id", "a name")) else 2]}
        found = gu.generate(loaded.model, loaded.tokenizer, "Once upon", max_tokens=8, temperature=0)
        assert (found.ids, found.finish_reason) == (written[:4], "stop")
        if place != folder:
            theirs = transformers.GenerationConfig.from_pretrained(place).eos_token_id
            assert {*ours.tokenizer.special_token_ids["eos"]} == ({*theirs} if isinstance(theirs, list) else {theirs})


def test_a_pretrained_tokenizer_lays_out_no_chat(folder: Path) -> None:
    tokenizer = gu.load(folder).tokenizer
    with pytest.raises(DataError, match="template of its own, which groundup does not run"):
        render(tokenizer, [{"role": "user", "content": "hello"}])


def test_our_own_tokenizer_stays_ours(tmp_path: Path) -> None:
    gu.save_model(tmp_path / "model", random_model(vocab_size=320), small_tokenizer())
    export_folder(tmp_path / "model", tmp_path / "out")
    import_folder(tmp_path / "out", tmp_path / "again")
    tokenizer = gu.load(tmp_path / "again").tokenizer
    assert type(tokenizer) is gu.Tokenizer
    assert tokenizer.fingerprint == small_tokenizer().fingerprint
    messages = [{"role": "user", "content": "A cat?"}, {"role": "assistant", "content": "Yes."}]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.apply_chat_template(messages, return_dict=False) == render(tokenizer, messages).ids
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == [tokenizer.end_id, tokenizer.end_of_text_id]
    assert generation.pad_token_id == tokenizer.pad_id


def test_ids_of_the_configuration_stand_in_where_no_file_names_tokens(tmp_path: Path) -> None:
    files = {"tokenizer.json": byte_level().to_str().encode()}
    named = PretrainedTokenizer(files, "t", {"bos_token_id": None, "eos_token_id": 7, "pad_token_id": 9999})
    assert (named.end_of_text_id, named.end_id, named.pad_id) == (7, 7, 7)
    with pytest.raises(DataError, match="names no token for eos"):
        _ = PretrainedTokenizer(files, "t", {}).end_id


BROKEN = {
    "no JSON": b"{",
    "no model": b"{}",
    "a list": b"[]",
    "another kind": None,
    "ids to the moon": b'{"model": {"type": "BPE", "vocab": {"a": 99999999999}, "merges": []}}',
    "added without an id": b'{"added_tokens": [{}], "model": {"type": "BPE", "vocab": {}, "merges": []}}',
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_damaged_or_unknown_tokenizer_is_an_error_that_names_the_file(fault: str, tmp_path: Path) -> None:
    interop_models.save("Llama 2, grouped", tmp_path)
    contents = BROKEN[fault]
    if contents is None:
        engine = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
        contents = engine.to_str().encode()
    (tmp_path / "tokenizer.json").write_bytes(contents)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        gu.load(tmp_path)


def test_a_tokenizer_larger_than_its_model_is_refused(tmp_path: Path) -> None:
    interop_models.save("Llama 2, grouped", tmp_path)  # 96 tokens
    (tmp_path / "tokenizer.json").write_text(byte_level().to_str())
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: has 301 tokens, the model beside it 96"):
        gu.load(tmp_path)


CONTENTS = {kind: KINDS[kind][0]().to_str().encode() for kind in KINDS}


@given(
    kind=st.sampled_from(sorted(KINDS)),
    place=st.floats(0, 1, exclude_max=True),
    value=st.sampled_from(b'0x",:{}[-\xff'),
)
def test_a_changed_byte_is_another_tokenizer_or_an_error(kind: str, place: float, value: int) -> None:
    contents = bytearray(CONTENTS[kind])
    contents[int(place * len(contents))] = value
    with contextlib.suppress(ArtifactError):
        PretrainedTokenizer({"tokenizer.json": bytes(contents)}, "t", {}).encode("a cat")
