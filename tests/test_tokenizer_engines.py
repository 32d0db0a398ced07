"""Fast engines: equal ids on adversarial texts, a self-test before one is used, and memory that does not grow."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tiktoken
from tokenizers import Tokenizer as HuggingFace

from groundup.console import Console
from groundup.tokenizer import Tokenizer, engines
from groundup.tokenizer.adversarial import adversarial_texts
from groundup.tokenizer.engines import (
    GigatokenEncoder,
    HuggingFaceEncoder,
    TiktokenEncoder,
    choose,
    with_newer_characters,
)
from groundup.tokenizer.special import CONTROL_TOKENS

SPLITS = ["qwen2", "llama3", "gpt2"]
TRAINED = {
    split: Tokenizer.train(
        [*adversarial_texts(1500, seed=5), "the king and the queen " * 50], vocab_size=2000, split=split
    )
    for split in SPLITS
}
EACH_SPLIT = pytest.mark.parametrize("split", SPLITS)


def spec_of(tokenizer: Tokenizer) -> dict[str, Any]:
    return copy.deepcopy(tokenizer._plain)


def engines_of(tokenizer: Tokenizer) -> tuple[HuggingFaceEncoder, TiktokenEncoder, GigatokenEncoder]:
    pytest.importorskip("gigatoken")
    spec = spec_of(tokenizer)
    reference = HuggingFaceEncoder(HuggingFace.from_str(json.dumps(spec)))
    fast = TiktokenEncoder(spec, reference)
    return reference, fast, GigatokenEncoder(spec, fast)


def differing(texts: Sequence[str], found: engines.Arrays, expected: engines.Arrays) -> list[str]:
    rows = [np.split(ids, np.cumsum(lengths)[:-1]) for ids, lengths in (found, expected)]
    return [text for text, a, b in zip(texts, *rows, strict=True) if not np.array_equal(a, b)]


@EACH_SPLIT
def test_twenty_thousand_adversarial_texts_have_equal_ids_in_all_engines(split: str) -> None:
    texts = adversarial_texts(20_000, seed=20_261_121)
    reference, fast, fastest = engines_of(TRAINED[split])
    expected = reference.encode(texts)
    assert differing(texts, fast.encode(texts), expected) == []
    assert differing(texts, fastest.encode(texts), expected) == []
    assert expected[0].min() >= len(CONTROL_TOKENS) + 4  # no control token, though their names are among the texts


def test_the_adversarial_texts_are_adversarial() -> None:
    texts = adversarial_texts(20_000, seed=20_261_121)
    joined = "".join(texts)
    assert {ord(character) >> 16 for character in joined} == set(range(17))  # all planes
    assert {unicodedata.category(character) for character in set(joined)} >= {"Cs", "Cc", "Cf", "Mn", "Nd", "Nl", "Zs"}
    assert all(name in joined for name in CONTROL_TOKENS)
    assert max(map(len, texts)) > 250
    assert "" in texts
    assert adversarial_texts(50, seed=1) == adversarial_texts(50, seed=1) != adversarial_texts(50, seed=2)


@EACH_SPLIT
@pytest.mark.parametrize("run", [" ", "a", "\n", " \n", "!", "7", "中", "\u200d", "ab"])
def test_very_long_runs_have_equal_ids(split: str, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["the king", run * 30_000, "", "the " + run * 5000 + " queen"]
    reference, fast, fastest = engines_of(TRAINED[split])
    expected = reference.encode(texts)
    assert differing(texts, fast.encode(texts), expected) == []
    assert differing(texts, fastest.encode(texts), expected) == []
    # Runs beyond what tiktoken's regex can take go to the engine behind it.
    monkeypatch.setattr(engines, "_LONGEST_PIECE", 4096)
    assert differing(texts, fast.encode(texts), expected) == []


def test_a_million_spaces_do_not_overflow_the_stack_of_the_regex() -> None:
    text = " " * 1_000_000 + "end"
    reference, fast, _ = engines_of(TRAINED["llama3"])
    assert differing([text], fast.encode([text]), reference.encode([text])) == []


def test_every_character_that_engines_class_differently_is_found() -> None:
    """What gigatoken cuts otherwise by itself is never left to it: all characters, alone between letters and digits."""
    gigatoken = pytest.importorskip("gigatoken")
    texts = [f"a{chr(point)}b 1{chr(point)}" for point in range(0x30000) if not 0xD800 <= point <= 0xDFFF]
    tokenizer = TRAINED["llama3"]
    reference = HuggingFaceEncoder(HuggingFace.from_str(json.dumps(spec_of(tokenizer))))
    newer = set(with_newer_characters([text.encode() for text in texts]))
    assert newer == {place for place, text in enumerate(texts) if unicodedata.category(text[1]) == "Cn"}
    alone = gigatoken.Tokenizer.from_json(json.dumps(spec_of(tokenizer)))
    old = [text for place, text in enumerate(texts) if place not in newer]
    expected, lengths = reference.encode(old)
    found = alone.encode_batch_list([text.encode() for text in old])
    rows = np.split(expected, np.cumsum(lengths)[:-1])
    assert [text for text, row, ids in zip(old, rows, found, strict=True) if row.tolist() != ids] == []


def test_newer_characters_are_found_among_others() -> None:
    texts = ["plain", "é", "\u0378", "中\u0378", "🩷", "\U00016d40x", "\U0003ffff", "", "\u00ad"]
    is_new = [any(unicodedata.category(letter) == "Cn" for letter in text) for text in texts]
    found = with_newer_characters([text.encode() for text in texts])
    assert found == [place for place, new in enumerate(is_new) if new]
    assert {2, 3, 6} <= set(found)
    assert not {0, 1, 7, 8} & set(found)


# --- The choice


@EACH_SPLIT
def test_the_fastest_engine_that_passes_is_taken(split: str) -> None:
    pytest.importorskip("gigatoken")
    assert TRAINED[split].choose_engine() == "gigatoken"


@pytest.mark.parametrize(("missing", "left"), [(["gigatoken"], "tiktoken"), (["gigatoken", "tiktoken"], "huggingface")])
def test_missing_engines_are_passed_over_and_named(
    missing: list[str], left: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    tokenizer = Tokenizer(TRAINED["qwen2"]._contents)
    assert tokenizer.choose_engine(Console()) == left
    said = capsys.readouterr().err
    assert all(f"{name} is not installed" in said for name in missing)
    ids, _ = tokenizer.encode_to_arrays(["the king"])
    assert ids.tolist() == tokenizer.encode("the king")


def test_an_engine_that_gives_other_ids_is_not_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gigatoken")
    encode = GigatokenEncoder.encode

    def wrong_on_one_text(self: GigatokenEncoder, texts: Sequence[str]) -> engines.Arrays:
        ids, lengths = encode(self, texts)
        ids[len(ids) // 2] += 1
        return ids, lengths

    monkeypatch.setattr(GigatokenEncoder, "encode", wrong_on_one_text)
    tokenizer = Tokenizer(TRAINED["llama3"]._contents)
    assert tokenizer.choose_engine(Console()) == "tiktoken"
    assert "gigatoken gave other ids in the self-test" in capsys.readouterr().err


def test_a_split_that_no_engine_knows_is_left_to_hugging_face() -> None:
    spec = spec_of(TRAINED["qwen2"])
    spec["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    encoder, passed_over = choose(spec, HuggingFaceEncoder(HuggingFace.from_str(json.dumps(spec))))
    assert encoder.name == "huggingface"
    assert len(passed_over) == 2


def test_ids_out_of_the_order_of_merges_are_not_left_to_ranks() -> None:
    """tiktoken merges by id: a file whose ids say otherwise than its merges would be encoded otherwise."""
    spec = spec_of(TRAINED["qwen2"])
    merges = spec["model"]["merges"]
    merges[0], merges[-1] = merges[-1], merges[0]
    plain = HuggingFace.from_str(json.dumps(spec))
    with pytest.raises(ValueError, match="order"):
        TiktokenEncoder(spec, HuggingFaceEncoder(plain))


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "characters"])
def test_other_kinds_have_one_engine(kind: str) -> None:
    tokenizer = Tokenizer.train(["the king and the queen"], kind=kind, vocab_size=600)
    assert tokenizer.choose_engine() == ("groundup" if kind == "characters" else "huggingface")


def test_one_text_at_a_time_needs_no_fast_engine() -> None:
    """Chat encodes a few words: it must not wait for engines to be loaded and tested."""
    script = """
import sys
from groundup.tokenizer import Tokenizer, render
tokenizer = Tokenizer.train(["the king and the queen " * 9], vocab_size=300)
render(tokenizer, [{"role": "user", "content": "the king"}])
assert tokenizer.decode(tokenizer.encode("the queen")) == "the queen"
assert not {"tiktoken", "gigatoken", "awkward", "rustbpe"} & set(sys.modules), sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("threads", ["1", "2"])
def test_the_number_of_threads_changes_nothing(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYON_NUM_THREADS", threads)
    assert engines._threads() == int(threads)
    texts = adversarial_texts(300, seed=3)
    tokenizer = TRAINED["qwen2"]
    ids, lengths = tokenizer.encode_to_arrays(texts)
    rows = tokenizer.encode_batch(texts)
    assert ids.tolist() == [index for row in rows for index in row]
    assert lengths.tolist() == [len(row) for row in rows]


def test_a_worker_process_takes_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYON_NUM_THREADS", raising=False)
    monkeypatch.setattr(engines.multiprocessing, "parent_process", object)
    assert engines._threads() == 1


def test_what_an_engine_keeps_is_forgotten_before_it_is_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_LOOKED_AFTER_BYTES", 1000)
    grown = iter(range(0, 10**12, engines._MOST_GROWTH_BYTES + 1))
    monkeypatch.setattr(engines, "_memory_bytes", lambda: next(grown))
    reference, _, fastest = engines_of(TRAINED["llama3"])
    first = fastest._tokenizer
    texts = adversarial_texts(200, seed=4)
    assert differing(texts, fastest.encode(texts), reference.encode(texts)) == []
    assert fastest._tokenizer is not first
    assert differing(texts, fastest.encode(texts), reference.encode(texts)) == []


def test_tiktoken_is_given_no_control_token() -> None:
    _, fast, _ = engines_of(TRAINED["qwen2"])
    assert isinstance(fast._encoding, tiktoken.Encoding)
    assert fast._encoding.special_tokens_set == set()
    tokens = {value for value in TRAINED["qwen2"].vocab().values() if isinstance(value, bytes)}
    assert set(fast._encoding.token_byte_values()) == tokens
