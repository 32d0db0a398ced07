"""Tokenizer files: deterministic training, damage, and equality with transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from groundup.console import Console
from groundup.errors import ArtifactError, DataError, RecipeError
from groundup.tokenizer import Message, Tokenizer, load_tokenizer, render

TEXTS = [
    'The little girl said: "It\'s a lion!" and 1234 birds flew away.\n\nOnce upon a time, in 1900, there was a king.\n',
    "Ünïcödé — “quotes”, 日本語 and emoji 🙂🙃, don't you'll WE'VE they're\r\n\ttabs   and  spaces\n" * 3,
    "the king and the queen and the lion and the girl " * 20,
]
SIZES = {"bpe": 340, "wordpiece": 620, "unigram": 340, "characters": 340}
KINDS = list(SIZES)
EACH_KIND = pytest.mark.parametrize("kind", KINDS)
TRAINED = {kind: Tokenizer.train(TEXTS, kind=kind, vocab_size=size) for kind, size in SIZES.items()}

TRAIN_IN_A_PROCESS = """
import sys
from groundup.tokenizer import Tokenizer
# Many pairs of equal frequency: ties everywhere.
texts = [" ".join(chr(97 + (i * j) % 26) + chr(97 + (i + j) % 26) for j in range(60)) for i in range(300)]
for kind in ("bpe", "wordpiece", "unigram", "characters"):
    Tokenizer.train(texts, kind=kind, vocab_size=900).save(sys.argv[1] + "/" + kind)
"""


def test_training_gives_the_same_bits_with_any_number_of_threads(tmp_path: Path) -> None:
    written = []
    for threads, hash_seed in (("1", "0"), ("2", "1"), ("7", "2")):
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": hash_seed}
        folder = tmp_path / threads
        subprocess.run([sys.executable, "-c", TRAIN_IN_A_PROCESS, str(folder)], env=environment, check=True)
        written.append({kind: (folder / kind / "tokenizer.json").read_bytes() for kind in KINDS})
    assert written[0] == written[1] == written[2]


@EACH_KIND
def test_a_saved_tokenizer_is_the_same_when_loaded(kind: str, tmp_path: Path) -> None:
    TRAINED[kind].save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert loaded.fingerprint == TRAINED[kind].fingerprint
        assert loaded.kind == kind
        assert loaded.encode(TEXTS[1]) == TRAINED[kind].encode(TEXTS[1])
    again = tmp_path / "again"
    loaded.save(again)
    assert (again / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_fingerprints_tell_tokenizers_apart() -> None:
    others = [
        Tokenizer.train(TEXTS, vocab_size=339),
        Tokenizer.train(TEXTS, vocab_size=340, split="llama3"),
        Tokenizer.train(TEXTS, vocab_size=340, spare_tokens=3),
        Tokenizer.train([*TEXTS, "the queen the queen"], vocab_size=340),
        *TRAINED.values(),
    ]
    assert len({tokenizer.fingerprint for tokenizer in others}) == len(others)


NO_REGEX = {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
TEXT_FAULTS = {"not JSON": '{"model": {', "empty": "", "a list": "[]"}
PART_FAULTS = {
    "no model": {"model": None}, "no control tokens": {"added_tokens": []}, "split regex": {"pre_tokenizer": NO_REGEX},
    "a normalizer": {"normalizer": {"type": "Lowercase"}},
}  # fmt: skip
VOCABULARY_FAULTS = ["moved control token", "a token twice", "lost token", "an id that is no number"]
FAULTS = [*TEXT_FAULTS, *PART_FAULTS, *VOCABULARY_FAULTS, "another model", "renamed control token"]


def change(contents: dict[str, Any], fault: str) -> str:
    model = contents["model"]
    if fault in TEXT_FAULTS:
        return TEXT_FAULTS[fault]
    if fault == "another model":
        model["type"] = "BPE" if model["type"] == "Unigram" else "Unigram"
    elif fault == "renamed control token":
        contents["added_tokens"][5]["content"] = "<|im_end|>"
    elif fault in VOCABULARY_FAULTS:
        is_list = isinstance(model["vocab"], list)  # of tokens and scores: Unigram's
        entries = [list(entry) for entry in (model["vocab"] if is_list else model["vocab"].items())]
        place = [token for token, _ in entries].index("a")
        if fault == "moved control token":
            entries[1][0], entries[5][0] = entries[5][0], entries[1][0]
        elif fault == "a token twice":
            entries[-1][0] = "a"
        elif fault == "lost token":
            del entries[place]
        else:
            entries[place][1] = "seven"
        model["vocab"] = entries if is_list else dict(entries)
    return json.dumps({**contents, **PART_FAULTS.get(fault, {})})


@EACH_KIND
@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_named(kind: str, fault: str, tmp_path: Path) -> None:
    TRAINED[kind].save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(change(json.loads(file.read_text(encoding="utf-8")), fault), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("contents", [None, b"\xff\xfe\x00"])
def test_a_missing_or_binary_file_is_named(contents: bytes | None, tmp_path: Path) -> None:
    if contents is not None:
        (tmp_path / "tokenizer.json").write_bytes(contents)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_too_small_a_text_keeps_the_smaller_vocabulary_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    small = Tokenizer.train(["the king the king"], vocab_size=2048, console=Console())
    assert 267 < small.vocab_size < 300
    assert "2,048" in capsys.readouterr().err
    assert small.decode(small.encode("any other text")) == "any other text"
    Tokenizer.train(TEXTS, vocab_size=300, console=Console())
    assert capsys.readouterr().err == ""


@EACH_KIND
@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_no_text_is_an_error(kind: str, texts: list[str]) -> None:
    with pytest.raises(DataError, match="no text"):
        Tokenizer.train(texts, kind=kind)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"vocab_size": 300, "spare_tokens": 100}, "363"),
        ({"split": "cl100k"}, "cl100k"),
        ({"kind": "sentencepiece"}, "sentencepiece"),
        ({"kind": "wordpiece", "vocab_size": 518}, "519"),
        ({"kind": "unigram", "vocab_size": 262}, "263"),
        ({"trainer": "sentencepiece"}, "sentencepiece"),
        ({"kind": "unigram", "trainer": "rustbpe"}, "rustbpe"),
    ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        Tokenizer.train(TEXTS, **{"spare_tokens": 0, **settings})


def test_lone_surrogates_in_training_texts_count_as_replacements() -> None:
    for kind in KINDS:
        broken = Tokenizer.train(["a\ud800b" * 9], kind=kind)
        assert broken.fingerprint == Tokenizer.train(["a\ufffdb" * 9], kind=kind).fingerprint


# --- transformers -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with each kind alone, and beside the `config.json` of a model."""
    made: dict[str, Path] = {}
    for kind in KINDS:
        for model_type in ("", "llama", "qwen3", "gpt2"):
            folder = tmp_path_factory.mktemp(f"{kind}{model_type}")
            TRAINED[kind].save(folder)
            if model_type:
                (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
            made[kind + model_type] = folder
    return made


@pytest.fixture(
    scope="module",
    params=[*KINDS, "bpellama", "bpeqwen3", "bpegpt2", "charactersllama", "unigramllama", "wordpieceqwen3"],
)
def pair(request: pytest.FixtureRequest, folders: dict[str, Path]) -> tuple[Tokenizer, Any]:
    """Ours, and what AutoTokenizer makes of its folder."""
    folder = folders[request.param]
    return load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


def test_transformers_knows_the_same_tokens(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    assert len(theirs) == ours.vocab_size
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.end_id, ours.pad_id)
    assert theirs.bos_token is None
    assert set(ours.special_ids) <= set(theirs.added_tokens_decoder)
    assert all(theirs.added_tokens_decoder[index].special for index in ours.special_ids)


def test_transformers_gives_equal_ids_and_texts(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    for text in [*TEXTS, "", " ", "\n\n", "  two  spaces ", "it's 12345 — ok\r\n", "unseen: ß Ж 漢字 \u200b", "\ufffd"]:
        ids = ours.encode(text)
        assert theirs.encode(text) == ids
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)


@EACH_KIND
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_transformers_gives_equal_ids_on_any_text(kind: str, folders: dict[str, Path], text: str) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folders[kind] / "tokenizer.json"))
    ids = TRAINED[kind].encode(text)
    assert theirs.encode(text) == ids
    assert theirs.decode(ids) == TRAINED[kind].decode(ids)


CHATS: list[list[Message]] = [
    [{"role": "user", "content": "the king?"}],
    [{"role": "user", "content": "the king?"}, {"role": "assistant", "content": "The queen and 12 lions."}],
    [
        {"role": "user", "content": "how warm?"},
        {"role": "assistant", "content": "look"},
        {"role": "tool", "content": "21 °C"},
        {"role": "assistant", "content": "It is 21."},
    ],
    [
        {"role": "system", "content": "  Be kind.\n"},
        {"role": "user", "content": "{{ x }} {% y %} <b> 日本語"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "\n"},
        {"role": "assistant", "content": " leading space, trailing newline\n"},
    ],
    [],
]


@pytest.mark.parametrize("chat", CHATS, ids=len)
def test_the_saved_chat_template_is_render(pair: tuple[Tokenizer, Any], chat: list[Message]) -> None:
    ours, theirs = pair
    if chat:
        rendered = render(ours, chat)
        made = theirs.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        assert made["input_ids"] == rendered.ids
        assert made["assistant_masks"] == [int(flag) for flag in rendered.loss_mask]
    prompted = render(ours, chat, add_generation_prompt=True)
    if chat:
        assert theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == prompted.ids
    assert prompted.ids[-1] == ours.role_id("assistant")
    assert prompted.loss_mask[-1] is False


@pytest.mark.parametrize("place", range(3))
def test_the_mask_is_the_answers_and_their_ends(place: int) -> None:
    ours = TRAINED["bpe"]
    answers = ["the king", "", "lion"]
    chat: list[Message] = []
    for answer in answers[: place + 1]:
        chat += [{"role": "user", "content": "who?"}, {"role": "assistant", "content": answer}]
    rendered = render(ours, chat)
    assert len(rendered.ids) == len(rendered.loss_mask)
    learned = [index for index, flag in zip(rendered.ids, rendered.loss_mask, strict=True) if flag]
    assert learned == [index for answer in answers[: place + 1] for index in [*ours.encode(answer), ours.end_id]]


@pytest.mark.parametrize(
    "message", [{"role": "robot", "content": "x"}, {"role": "user"}, {"content": "x"}, {"role": "user", "content": 3}]
)
def test_what_is_no_message_is_refused(message: Any) -> None:
    with pytest.raises(DataError, match="message 1 of 2"):
        render(TRAINED["bpe"], [{"role": "user", "content": "ok"}, message])
