"""Tokenizer laws: exact bytes, no control token out of text, long texts as short ones."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Engine

from groundup.corpus import Document
from groundup.errors import DataError
from groundup.tokenizer import Message, Tokenizer, render

TEXTS = [
    'The little girl said: "It\'s a lion!" and 1234 birds flew away.\n\nOnce upon a time, in 1900, there was a king.\n',
    "Ünïcödé — “quotes”, 日本語 and emoji 🙂🙃, don't you'll WE'VE they're\r\n\ttabs   and  spaces\n" * 3,
    "the king and the queen and the lion and the girl " * 20,
]
CONTROL = ["<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|tool|>"]
SPLITS = ["qwen2", "llama3", "gpt2"]

BPE = Tokenizer.train(TEXTS, vocab_size=400, spare_tokens=2)
CHARACTERS = Tokenizer.train(TEXTS, kind="characters", spare_tokens=2)
WORDPIECE = Tokenizer.train(TEXTS, kind="wordpiece", vocab_size=640, spare_tokens=2)
UNIGRAM = Tokenizer.train(TEXTS, kind="unigram", vocab_size=360, spare_tokens=2)
WORDPIECE_FILE = WORDPIECE._contents
EACH_KIND = pytest.mark.parametrize(
    "tokenizer", [BPE, WORDPIECE, UNIGRAM, CHARACTERS], ids=["bpe", "wordpiece", "unigram", "characters"]
)

pieces = st.one_of(
    st.text(),
    st.sampled_from([*CONTROL, "<|spare_0|>", "<|spare_1|>", "<|", "|>", "<|end", "user|>", "\ufffd"]),
    st.sampled_from(TEXTS),
)
wild_text = st.lists(pieces, max_size=6).map("".join)
any_str = st.text(st.characters(categories=None)) | wild_text  # lone surrogates too


def without_surrogates(text: str) -> str:
    return "".join("\ufffd" if 0xD800 <= ord(character) <= 0xDFFF else character for character in text)


SPLITS_OF_KINDS = [(kind, split) for kind in ("bpe", "wordpiece", "unigram") for split in SPLITS]
SPLIT_TOKENIZERS = {
    (kind, split): Tokenizer.train(TEXTS, kind=kind, vocab_size=640, split=split) for kind, split in SPLITS_OF_KINDS
}


@pytest.mark.parametrize("kind_and_split", SPLITS_OF_KINDS, ids=" ".join)
@given(text=any_str)
def test_bytes_of_tokens_are_the_bytes_of_the_text(kind_and_split: tuple[str, str], text: str) -> None:
    tokenizer = SPLIT_TOKENIZERS[kind_and_split]
    ids = tokenizer.encode(text)
    assert b"".join(tokenizer.token_bytes(index) for index in ids) == without_surrogates(text).encode()
    assert tokenizer.decode(ids) == without_surrogates(text)


@pytest.mark.parametrize("run", ["a", "#", "## ", "x#", " ", "\n", "中", "7", "=-", "\u200d"])
@EACH_KIND
def test_long_runs_keep_every_byte(tokenizer: Tokenizer, run: str) -> None:
    text = run * 2000
    ids = tokenizer.encode(text)
    known = set("".join(TEXTS))
    if tokenizer is CHARACTERS:
        text = "".join(letter if letter in known else "\ufffd" for letter in text)
    assert tokenizer.decode(ids) == text


@given(text=wild_text)
def test_wordpiece_takes_the_longest_token_that_fits_and_marks_what_continues_a_word(text: str) -> None:
    spec = json.loads(WORDPIECE_FILE)
    vocabulary = spec["model"]["vocab"]
    words = Engine.from_str(json.dumps({**spec, "added_tokens": []})).pre_tokenizer.pre_tokenize_str(text)
    expected = []
    for word, _ in words:
        begin = 0
        while begin < len(word):
            mark = "##" if begin else ""
            end = next(end for end in range(len(word), begin, -1) if mark + word[begin:end] in vocabulary)
            expected.append(vocabulary[mark + word[begin:end]])
            begin = end
    assert WORDPIECE.encode(text) == expected


@pytest.mark.parametrize("text", ["#", "###", "## the", "#the#", "the##"])
def test_the_mark_of_wordpiece_is_no_text(text: str) -> None:
    ids = WORDPIECE.encode(text)
    assert WORDPIECE.decode(ids) == text
    assert len({index for index in ids if WORDPIECE.token_bytes(index) == b"#"}) == 1


@EACH_KIND
@given(texts=st.lists(any_str, max_size=5))
def test_arrays_and_batches_are_the_texts_one_by_one(tokenizer: Tokenizer, texts: list[str]) -> None:
    ids, lengths = tokenizer.encode_to_arrays(texts)
    expected = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(texts) == expected
    assert (ids.dtype, lengths.dtype) == (np.uint32, np.int64)
    assert ids.tolist() == [index for row in expected for index in row]
    assert lengths.tolist() == [len(row) for row in expected]


@given(any_str)
def test_characters_are_one_token_each_and_unknown_ones_are_replaced(text: str) -> None:
    known = set("".join(TEXTS))
    expected = "".join(character if character in known else "\ufffd" for character in text)
    ids = CHARACTERS.encode(text)
    assert len(ids) == len(text)
    assert CHARACTERS.decode(ids) == expected
    assert b"".join(CHARACTERS.token_bytes(index) for index in ids) == expected.encode()


def test_characters_are_sorted_by_code_point_behind_the_control_tokens() -> None:
    assert Tokenizer.train(["cab\n"], kind="characters", spare_tokens=0).encode("\nabc\ufffd") == [7, 8, 9, 10, 11]


@EACH_KIND
@given(contents=st.lists(any_str, min_size=1, max_size=3))
def test_a_message_cannot_end_itself_or_speak_for_another(tokenizer: Tokenizer, contents: list[str]) -> None:
    roles = ["system", "user", "assistant"]
    messages: list[Message] = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]  # type: ignore[typeddict-item]
    rendered = render(tokenizer, messages)
    openings = [tokenizer.role_id("system"), tokenizer.role_id("user"), tokenizer.role_id("assistant")]
    expected = [index for opening in openings[: len(contents)] for index in (opening, tokenizer.end_id)]
    assert [index for index in rendered.ids if index in tokenizer.special_ids] == expected


@EACH_KIND
@given(parts=st.lists(wild_text, min_size=1, max_size=4))
def test_allowed_names_become_their_ids_and_no_others(tokenizer: Tokenizer, parts: list[str]) -> None:
    clean = [part.replace("<|end|>", "") for part in parts]
    expected = tokenizer.encode(clean[0])
    for part in clean[1:]:
        expected += [tokenizer.end_id, *tokenizer.encode(part)]
    joined = "<|end|>".join(clean)
    # Joining parts may by chance spell the name anew; then there is more to find.
    if joined.count("<|end|>") == len(clean) - 1:
        assert tokenizer.encode(joined, allowed_special={"<|end|>"}) == expected


def test_all_control_tokens_can_be_allowed_and_named() -> None:
    ids = BPE.encode("".join(CONTROL), allowed_special=CONTROL)
    assert ids == list(range(len(CONTROL)))
    assert BPE.decode(ids) == ""
    assert BPE.decode(ids, skip_special=False) == "".join(CONTROL)
    assert [BPE.token_bytes(index) for index in ids] == [b""] * len(CONTROL)
    roles = [BPE.role_id(role) for role in ("system", "user", "assistant")]
    assert [BPE.end_of_text_id, BPE.pad_id, *roles, BPE.end_id] == list(range(6))


def test_an_unknown_name_cannot_be_allowed() -> None:
    with pytest.raises(DataError, match="thought"):
        BPE.encode("x", allowed_special=["<|thought|>"])


@EACH_KIND
@pytest.mark.parametrize("index", [-1, 10**6])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer: Tokenizer, index: int) -> None:
    with pytest.raises(DataError, match="ids 0 to"):
        tokenizer.decode([index])


@pytest.mark.parametrize("split", SPLITS)
def test_a_long_text_is_encoded_as_if_it_were_not_cut(split: str, tmp_path: Path) -> None:
    rng = random.Random(7)
    short = ["a b", " ", "\n", "\r\n", "  x", "it's he", "'s", "1 a 22", "。\n中 文\nа б", "\n\n", ". A", "a\nb"]
    atoms = [*TEXTS, *short]
    text = "".join(rng.choice(atoms) for _ in range(12_000))
    assert len(text) > 300_000
    tokenizer = SPLIT_TOKENIZERS["bpe", split]
    # The engine without our cutting: what is in the file, minus the control tokens it would look for.
    tokenizer.save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    uncut = Engine.from_str(json.dumps({**spec, "added_tokens": []}))
    assert tokenizer.encode(text) == uncut.encode(text).ids


def test_the_longest_tokens_are_the_longest() -> None:
    longest = BPE.longest_tokens(3)
    lengths = [len(BPE.token_bytes(index)) for index in range(BPE.vocab_size)]
    assert [len(token.encode()) for token in longest] == sorted(lengths, reverse=True)[:3]


def test_documents_and_plain_texts_train_the_same() -> None:
    documents = [Document(id=str(place), text=text, source="here") for place, text in enumerate(TEXTS)]
    assert Tokenizer.train(documents, vocab_size=400, spare_tokens=2).fingerprint == BPE.fingerprint
