"""Tokenizers that come with a model: Hugging Face's ids and texts, through the methods that ours have."""

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
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
from groundup.tokenizer import Message, load_tokenizer, pretrained, render
from groundup.tokenizer import tokenizer as own_tokenizer
from groundup.tokenizer.adversarial import adversarial_texts
from groundup.tokenizer.letters import LETTERS as BYTE_LETTERS
from groundup.tokenizer.pretrained import PretrainedTokenizer
from groundup.tokenizer.split import cut_into_pieces

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
    (tmp_path / "theirs" / "digests.json").unlink()
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


def test_a_pretrained_tokenizer_lays_out_chats_by_its_own_template_or_none(folder: Path) -> None:
    tokenizer = gu.load(folder).tokenizer
    assert tokenizer is not None
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    talk: list[Message] = [{"role": "user", "content": "hello"}]
    if theirs.chat_template is None:
        with pytest.raises(DataError, match="has no chat template"):
            render(tokenizer, talk, add_generation_prompt=True)
    else:
        ids = theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
        assert render(tokenizer, talk, add_generation_prompt=True).ids == ids


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


NOTHING = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
DOUBLING = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}


def doubling(name: str) -> dict[str, object]:
    return {"type": "Sequence", name: [DOUBLING] * 40}


BROKEN = {
    "no JSON": b"{",
    "no model": b"{}",
    "a list": b"[]",
    "two tokens with one id": b'{"model": {"type": "BPE", "vocab": {"a": 0, "</s>": 0}, "merges": []}}',
    "a panic": b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "normalizer": '
    b'{"type": "Precompiled", "precompiled_charsmap": "AAAA"}}',
    "an end of every unknown character": b'{"model": {"type": "WordLevel", "vocab": {"</s>": 0}, "unk_token": "</s>"}}',
    "deep": b'{"normalizer": ' + b'{"type": "Sequence", "normalizers": [' * 500 + b"]}" * 500 + b"}",
    "deeper": b"[" * 100_000,
    "a normalizer that doubles": json.dumps({"model": NOTHING, "normalizer": doubling("normalizers")}).encode(),
    "a decoder that doubles": json.dumps({"model": NOTHING, "decoder": doubling("decoders")}).encode(),
    "a pre-tokenizer that doubles": json.dumps(
        {"model": NOTHING, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTE_LEVEL] * 40}}
    ).encode(),
    "one step that grows": json.dumps({"model": NOTHING, "normalizer": {**DOUBLING, "content": "a" * 5000}}).encode(),
    "ids to the moon": b'{"model": {"type": "BPE", "vocab": {"a": 99999999999}, "merges": []}}',
    "added without an id": b'{"added_tokens": [{}], "model": {"type": "BPE", "vocab": {}, "merges": []}}',
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_damaged_or_unknown_tokenizer_is_an_error_that_names_the_file(fault: str, tmp_path: Path) -> None:
    interop_models.save("Llama 2, grouped", tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(BROKEN[fault])
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        gu.load(tmp_path)


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("model.continuing_subword_prefix", "##", "does not begin with '##'"),
        ("model.vocab.a", 1 << 31, "has the id 2147483648"),
        ("added_tokens.0.id", 1 << 31, "has the id 2147483648"),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": ""}, "is cut off"),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "/wAAAAAA"}, "is cut off"),
        ("pre_tokenizer", {"type": "FixedLength", "length": 0}, "no length"),
    ],
)
@pytest.mark.parametrize("kind", ["own", "pretrained"])
def test_what_would_make_the_library_panic_or_fill_memory_is_named_before(
    kind: str, part: str, value: Any, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    contents = small_tokenizer()._contents if kind == "own" else byte_level().to_str()
    made = json.loads(contents)
    *way, last = (int(step) if step.isdecimal() else step for step in part.split("."))
    place = made
    for step in way:
        place = place[step]
    place[last] = value
    with pytest.raises(ArtifactError) as caught:
        pretrained.read_tokenizer({"tokenizer.json": json.dumps(made).encode()}, "t", {})
    assert kind == "own" or said in str(caught.value)
    assert not capfd.readouterr().err  # a panic of the library is printed, whoever catches it


def test_a_pipe_is_not_read_for_ever(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(ArtifactError, match="not an ordinary file"):
            load_tokenizer(path)


FAILING = {
    "no token for an unknown word": (
        {"model": {"type": "WordLevel", "vocab": {"b": 0}, "unk_token": "[UNK]"}},
        "Missing .UNK.",
    ),
    "a regex that looks back for ever": (
        {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "(?:a|a|aa)+c"},
                "behavior": "Isolated",
                "invert": False,
            }
        },
        "retry-limit",
    ),
}


@pytest.mark.parametrize("fault", FAILING)
def test_what_fails_while_encoding_is_an_error_of_ours(fault: str) -> None:
    changes, said = FAILING[fault]
    contents = json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, **changes}).encode()
    tokenizer = PretrainedTokenizer({"tokenizer.json": contents}, "t", {})
    for encode in (tokenizer.encode_batch, tokenizer.encode_to_arrays):
        with pytest.raises(DataError, match=said):
            encode(["a" * 100])


def test_a_normalizer_that_would_make_an_added_token_fill_memory_is_named() -> None:
    made = json.loads(byte_level().to_str())
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    made["normalizer"] = {"type": "Sequence", "normalizers": [double] * 40}
    made["added_tokens"][-1] |= {"content": "<a>", "normalized": True}
    with pytest.raises(ArtifactError, match="its normalizer can make more than 1024 characters of one"):
        PretrainedTokenizer({"tokenizer.json": json.dumps(made).encode()}, "t", {})


def test_a_tokenizer_larger_than_its_model_is_refused(tmp_path: Path) -> None:
    interop_models.save("Llama 2, grouped", tmp_path)  # 96 tokens
    (tmp_path / "tokenizer.json").write_text(byte_level().to_str())
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: has 301 tokens, the model beside it 96"):
        gu.load(tmp_path)


# --- Text is never a control token


LETTERS = "</s>[SEPabc]|_unk"
BYTES = [f"<0x{value:02X}>" for value in range(256)]
CONTROL = ["<unk>", "<s>", "</s>"]


def special(name: str, index: int, **changes: object) -> dict[str, object]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": name, "special": True, **flags, **changes}


def bpe_that_merges(*control: str, start: list[str], **model: object) -> dict[str, object]:
    """Merges lead to every control token, with and without a space, and beyond it."""
    vocabulary, merges = [*control, *start, *sorted(set(LETTERS) - set(start)), "\u2581"], []
    for name in (*control, *(f"\u2581{name}" for name in control), f"{control[-1]}a"):
        for end in range(2, len(name) + 1):
            if [name[: end - 1], name[end - 1]] not in merges:
                merges.append([name[: end - 1], name[end - 1]])
            if name[:end] not in vocabulary:
                vocabulary.append(name[:end])
    return {"type": "BPE", "vocab": {name: at for at, name in enumerate(vocabulary)}, "merges": merges, **model}


def spec(model: dict[str, object], control: list[str], **parts: object) -> bytes:
    """With a post-processor, cut-offs and paddings that add to and take from every text."""
    template = processors.TemplateProcessing(
        single=f"$A {control[-1]}", special_tokens=[(control[-1], len(control) - 1)]
    )
    return json.dumps(
        {
            "added_tokens": [special(name, at) for at, name in enumerate(control)],
            "post_processor": json.loads(template.__getstate__()),
            "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
            "padding": {
                "strategy": {"Fixed": 9},
                "direction": "Left",
                "pad_to_multiple_of": None,
                "pad_id": 2,
                "pad_type_id": 0,
                "pad_token": control[-1],
            },
            **{name: json.loads(part.__getstate__()) for name, part in parts.items()},
            "model": model,
        }
    ).encode()


def own(kind: str) -> gu.Tokenizer:
    """Ours, but for a post-processor and a pre-tokenizer that leaves names of control tokens whole."""
    made = json.loads(gu.Tokenizer.train([TEXT], kind=kind, vocab_size=600)._contents)
    template = processors.TemplateProcessing(single="$A <|end|>", special_tokens=[("<|end|>", 5)])
    cuts = json.loads(
        pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(use_regex=False, add_prefix_space=False)]).__getstate__()
    )
    made |= {
        "post_processor": json.loads(template.__getstate__()),
        **({"pre_tokenizer": cuts} if kind in ("bpe", "unigram") else {}),
    }
    return gu.Tokenizer(json.dumps(made))


WORDS = {name: at for at, name in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "##[SEP]", *LETTERS])}
UNIGRAM = [
    *((name, 0.0) for name in CONTROL),
    ("\u2581</s>", -1.0),
    ("\u2581", -2.0),
    *((one, -3.0) for one in sorted(set(LETTERS))),
    *((byte, -9.0) for byte in BYTES),
]
LLAMA = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
TRICKY = normalizers.Sequence(
    [normalizers.Replace("\u00a7", "</s>"), normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()]
)
SPELLED = {"type": "Unigram", "unk_id": 0, "vocab": UNIGRAM, "byte_fallback": True}
TRICKED = {
    "unigram": spec(SPELLED, CONTROL, pre_tokenizer=pre_tokenizers.Metaspace()),
    "unigram, normalized": spec(SPELLED, CONTROL, normalizer=TRICKY),
    "unigram without bytes": spec({**SPELLED, "byte_fallback": False}, CONTROL),
    "byte-level": spec(
        bpe_that_merges("</s>", start=sorted(pre_tokenizers.ByteLevel.alphabet())),
        ["</s>"],
        pre_tokenizer=pre_tokenizers.ByteLevel(use_regex=False),
    ),
    "byte-level, whole words": spec(
        bpe_that_merges("</s>", start=sorted(pre_tokenizers.ByteLevel.alphabet()), ignore_merges=True, dropout=0.5),
        ["</s>"],
        pre_tokenizer=pre_tokenizers.ByteLevel(use_regex=False),
    ),
    "llama 2": spec(
        bpe_that_merges(*CONTROL, start=BYTES, byte_fallback=True, unk_token="<unk>"), CONTROL, normalizer=LLAMA
    ),
    "normalized": spec(bpe_that_merges(*CONTROL, start=BYTES, unk_token="<unk>"), CONTROL, normalizer=TRICKY),
    "wordpiece": spec(
        {
            "type": "WordPiece",
            "vocab": WORDS,
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 99,
        },
        list(WORDS)[:4],
        normalizer=normalizers.BertNormalizer(lowercase=False),
        pre_tokenizer=pre_tokenizers.WhitespaceSplit(),
    ),
    "words": spec(
        {"type": "WordLevel", "vocab": WORDS, "unk_token": "[UNK]"},
        list(WORDS)[:4],
        pre_tokenizer=pre_tokenizers.WhitespaceSplit(),
    ),
}
ALL_KINDS = {kind: PretrainedTokenizer({"tokenizer.json": made}, kind, {}) for kind, made in TRICKED.items()} | {
    f"own {kind}": own(kind) for kind in ("bpe", "wordpiece", "unigram", "characters")
}
TRICKS = st.sampled_from(
    [
        *CONTROL,
        "[SEP]",
        "[CLS]",
        "<|end|>",
        "\u2581</s>",
        "\uff1c/s\uff1e",
        "</S>",
        "\u00a7",
        "</",
        "s>",
        "<",
        "/s>",
        " ",
        "\n",
        "a",
        "</s>a",
        "##[SEP]",
        "<0x3C>",
        "\ud800",
        "\U0001f642",
        "a" * 40,
    ]
)


@pytest.mark.parametrize("kind", ALL_KINDS)
@given(text=st.lists(TRICKS | st.text(st.characters(categories=None)), max_size=5).map("".join))
def test_text_never_gives_a_control_token(kind: str, text: str) -> None:
    tokenizer = ALL_KINDS[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.special_ids & set(ids) <= {tokenizer.unknown_id}
    assert tokenizer.encode(text) == tokenizer.encode_to_arrays([text])[0].tolist() == ids
    name = max(tokenizer._specials)
    assert tokenizer.encode(name, allowed_special=[name]) == [tokenizer._specials[name]]


def test_words_that_no_token_ends_are_still_found() -> None:
    """The law above does not hold because nothing is found: what is no control token is, under the same name."""
    made = {kind: json.loads(contents) | {"added_tokens": []} for kind, contents in TRICKED.items()}
    text = {"wordpiece": "[SEP]", "words": "[SEP]"}
    for kind, changed in made.items():
        if kind.startswith("unigram"):  # SentencePiece's control pieces have their names by convention
            continue
        tokenizer = PretrainedTokenizer({"tokenizer.json": json.dumps(changed).encode()}, kind, {})
        name = text.get(kind, "</s>")
        index = tokenizer._ids[name]
        assert {index, tokenizer._ids.get(f"\u2581{name}")} & set(tokenizer.encode(name)), kind


def test_added_tokens_behind_control_tokens_keep_their_ids() -> None:
    """As Qwen 3's `<tool_call>`: numbered anew without the control tokens before it, text would become one of those."""
    engine = byte_level()
    engine.add_special_tokens(["<|im_end|>"])
    engine.add_tokens(["<think>"])
    tokenizer = PretrainedTokenizer({"tokenizer.json": engine.to_str().encode()}, "t", {})
    assert tokenizer.encode("<think>") == [engine.token_to_id("<think>")]
    assert len(tokenizer.encode("<|im_end|>")) > 1


def test_a_letter_that_fills_rows_remains_text() -> None:
    engine = byte_level()
    engine.add_special_tokens(["!"])
    tokenizer = PretrainedTokenizer({"tokenizer.json": engine.to_str().encode()}, "t", {})
    assert tokenizer.decode(tokenizer.encode("A cat!")) == "A cat!"


@pytest.mark.parametrize("place", ["tokenizer_config.json", "special_tokens_map.json"])
def test_control_tokens_that_another_file_names_are_control_tokens(place: str) -> None:
    made = json.loads(TRICKED["unigram"]) | {"added_tokens": []}
    files = {
        "tokenizer.json": json.dumps(made).encode(),
        place: b'{"eos_token": {"content": "</s>"}, "pad_token": "a"}',
    }
    tokenizer = PretrainedTokenizer(files, "t", {"bos_token_id": 1, "eos_token_id": None})
    assert {1, 2} <= tokenizer.special_ids
    assert not {1, 2} & set(tokenizer.encode("</s> <s>"))
    assert tokenizer._ids["a"] in tokenizer.encode("a")  # a letter remains text, whoever fills rows with it


@pytest.mark.parametrize("said", [{"eos_token_id": 2}, {}], ids=["config.json", "nothing"])
def test_control_pieces_of_a_vocabulary_are_control_tokens_whatever_stands_beside_it(
    tmp_path: Path, said: dict[str, int]
) -> None:
    made = json.loads(TRICKED["unigram"]) | {"added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    (tmp_path / "config.json").write_text(json.dumps(said))
    tokenizer = load_tokenizer(tmp_path)
    assert not {1, 2} & set(tokenizer.encode("x</s> <s>"))
    assert not said or tokenizer.end_id == 2


def test_a_word_that_ends_a_text_by_what_its_files_say_is_no_text() -> None:
    made = json.loads(TRICKED["words"]) | {"added_tokens": [], "post_processor": None}
    made["model"]["vocab"] = {"[UNK]": 0, "hello": 1, "EOS": 2}
    files = {"tokenizer.json": json.dumps(made).encode(), "tokenizer_config.json": b'{"eos_token": "EOS"}'}
    tokenizer = PretrainedTokenizer(files, "t", {})
    assert tokenizer.end_ids <= set(tokenizer.special_ids)
    assert 2 not in tokenizer.encode("hello EOS")


@pytest.mark.parametrize(
    "said",
    [
        {"bos_token": "BOS"},  # also what would end a text, as nothing else does
        {"bos_token": "BOS", "eos_token": "EOS"},
        {"bos_token_id": 3, "eos_token_id": [2, 9]},
        {"eos_token": "EOS", "bos_token": None},
        {"bos_token": "h", "eos_token": "EOS"},
    ],
)
def test_what_may_begin_or_end_a_text_is_a_control_token(said: dict[str, Any]) -> None:
    made = json.loads(TRICKED["words"]) | {"added_tokens": [], "post_processor": None}
    made["model"]["vocab"] = {"[UNK]": 0, "hello": 1, "EOS": 2, "BOS": 3, "h": 4}
    files = {"tokenizer.json": json.dumps(made).encode(), "tokenizer_config.json": json.dumps(said).encode()}
    tokenizer = PretrainedTokenizer(files, "t", {})
    structure = {*tokenizer.end_ids, tokenizer.end_of_text_id, tokenizer.end_id}
    assert structure <= tokenizer.special_ids
    assert not structure & set(tokenizer.encode("hello EOS BOS h"))
    for name, index in tokenizer._specials.items():
        assert tokenizer.encode(f"hello {name}", allowed_special=[name])[-1] == index


def test_a_token_for_the_unknown_that_ends_a_text_is_refused() -> None:
    made = json.loads(TRICKED["words"]) | {"added_tokens": [], "post_processor": None}
    made["model"]["vocab"] = {"[UNK]": 0, "hello": 1, "EOS": 2}
    said = b'{"eos_token": "EOS", "bos_token": "EOS", "eos_token_id": 0}'
    with pytest.raises(ArtifactError, match="does not know would end a text"):
        PretrainedTokenizer({"tokenizer.json": json.dumps(made).encode(), "tokenizer_config.json": said}, "t", {})


def test_of_two_names_that_begin_alike_the_longer_one_is_meant() -> None:
    made = {"added_tokens": [special(name, at + 1) for at, name in enumerate(["<a", "<a>", "<a>>"])], "model": NOTHING}
    tokenizer = PretrainedTokenizer({"tokenizer.json": json.dumps(made).encode()}, "t", {})
    for names in itertools.permutations(["<a", "<a>", "<a>>"]):
        assert tokenizer.encode("<a><a<a>>", allowed_special=names) == [2, 1, 3]


# --- Long texts


def short(text: str, characters: int = 50, *, drop_space: bool = False) -> Iterator[str]:
    return cut_into_pieces(text, characters, drop_space=drop_space)


@pytest.mark.parametrize(
    "kind", ["byte level", "llama 2", "unigram", "wordpiece", "words", "own bpe", "own characters"]
)
def test_a_long_text_has_the_same_ids_in_pieces_and_as_a_stream(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = LOADED.get(kind) or ALL_KINDS[kind]
    text = " ".join([*adversarial_texts(300, seed=2), "abc ab\nabc", TEXT])
    whole = tokenizer.encode(text)
    for module in (pretrained, own_tokenizer):
        monkeypatch.setattr(module, "PIECE_CHARACTERS", 50)
        monkeypatch.setattr(module, "cut_into_pieces", short)
    assert len(list(tokenizer._cut(text))) > 20
    assert tokenizer.encode(text) == whole
    parts = [text[at : at + 7] for at in range(0, len(text), 7)]
    stream = tokenizer.encode_iterable(iter(parts))
    assert list(stream) == whole


def test_a_tokenizer_that_merges_across_spaces_is_not_cut_and_does_not_stream() -> None:
    made = json.loads(TRICKED["llama 2"])
    made["model"]["vocab"]["a\u2581a"] = len(made["model"]["vocab"])
    tokenizer = PretrainedTokenizer({"tokenizer.json": json.dumps(made).encode()}, "t", {})
    assert len(list(tokenizer._cut("a a " * 50_000))) == 1
    with pytest.raises(DataError, match="other ids than the whole"):
        tokenizer.encode_iterable(["a a"])


# --- vocab.json and merges.txt


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2TokenizerFast", None])
def test_a_vocabulary_and_merges_are_a_tokenizer(name: str | None, tmp_path: Path) -> None:
    spec = json.loads(byte_level().to_str())
    (tmp_path / "vocab.json").write_text(json.dumps(spec["model"]["vocab"]))
    merges = [" ".join(pair) for pair in spec["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    if name is not None:
        config = {"tokenizer_class": name, "added_tokens_decoder": {"300": {"content": "<x>", "special": True}}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(tmp_path)
    theirs = (
        transformers.Qwen2TokenizerFast if name == "Qwen2TokenizerFast" else transformers.GPT2TokenizerFast
    ).from_pretrained(tmp_path)
    for text in [*TEXTS, "1234 it's e\u0301 <x>"]:
        assert ours.encode(text) == theirs.encode(text, split_special_tokens=True)
    assert ours.special_ids == ({0} if name is None else {0, 300})
    assert [left + right for left, right in ours.merges()] == [ours.vocab()[257 + at] for at in range(len(merges))]
    (tmp_path / "saved").mkdir()
    ours.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == ours.fingerprint


@pytest.mark.parametrize(
    ("changes", "vocabulary", "said"),
    [
        ({"tokenizer_class": "CLIPTokenizer"}, {"a": 0}, "CLIPTokenizer"),
        ({}, {"a": 0}, "not byte-level"),
        *(
            ({}, dict.fromkeys(BYTE_LETTERS, 0) | {"ab": wrong}, "'ab' has the id")
            for wrong in (2**31, -1, "7", True, None)
        ),
    ],
)
def test_vocabularies_of_another_kind_are_refused_by_name(
    changes: dict[str, str], vocabulary: dict[str, object], said: str, tmp_path: Path
) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(changes))
    with pytest.raises(ArtifactError, match=said):
        load_tokenizer(tmp_path)


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
