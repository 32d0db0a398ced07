"""The batched signals equal their plain definitions, on anything, and whatever else is in the batch."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundup.corpus.quality import repetition, textbatch
from groundup.corpus.quality import signals as signals_module
from groundup.corpus.quality.signals import SIGNALS, signals, toxic_share
from groundup.reference.quality import quality_signals, words_of

# Few words, so that lines and n-grams repeat; every kind of white space, and what the rules look for.
PIECES = [
    "a", "b", "of", "the", "The", "THE", "and", "that", "with", "have", "naïve", "Ünder", "漢字", "слово", "слово.",
    "e\u0301", "😀", "😀😀", "\x00", "\x1b", "12", "3.5", "٣", "Ⅷ", "#", "##", "...", "…", "....", "......", "-", "•",
    "* b", "{", "}", "lorem ipsum", "LOREM Ipsum", "end.", "end.”", 'end."', "end.)))", "end.))))", "end?!", "。", "」",
    "http://x.org", "HTTPS://x", "www.a", "https:/", "eightcha", "ninechars", "sixteencharacter", "sixteencharacter!",
    "x" * 257, "é" * 130, "ü" * 9, "\ud800", "K", "ſ", " ", " ", " ", "\n", "\n", "\n\n", "\n \n", "\r\n",
    *"\t\x0b\x0c\x1c\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000\u200b\ufeff",
]  # fmt: skip
TEXTS = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=60).map("".join),
    st.lists(st.sampled_from(["a", "b", "c", "dd", "naïve", "漢"]), max_size=80).map(" ".join),
    st.lists(st.sampled_from(["one two", "three.", "one  two", "", " ", "four five six"]), max_size=30).map("\n".join),
    st.text(max_size=60),
    st.text(st.characters(), max_size=60),
)


def assert_as_defined(texts: Sequence[str], names: Sequence[str] | None = None) -> None:
    found, wanted = signals(texts, names), [quality_signals(text) for text in texts]
    for name, column in found.items():
        assert column.dtype == np.float32
        np.testing.assert_allclose(column, [one[name] for one in wanted], rtol=1e-6, atol=1e-9, err_msg=name)


@given(st.lists(TEXTS, max_size=8))
def test_every_signal_is_as_defined(texts: list[str]) -> None:
    assert_as_defined(texts)


@given(st.lists(TEXTS, min_size=1, max_size=6), st.integers(1, 200))
def test_a_text_is_measured_alike_in_any_company(texts: list[str], batch_characters: int) -> None:
    together = signals(texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signals_module, "BATCH_CHARACTERS", batch_characters)
        apart = signals(texts)
    for name in SIGNALS:
        alone = np.concatenate([signals([text])[name] for text in texts])
        assert np.array_equal(together[name], alone), name
        assert np.array_equal(together[name], apart[name]), name


@given(st.lists(TEXTS, max_size=4), st.lists(st.sampled_from(sorted(SIGNALS)), max_size=5, unique=True))
def test_a_signal_is_the_same_whatever_else_is_asked_for(texts: list[str], names: list[str]) -> None:
    everything, some = signals(texts), signals(texts, names)
    assert list(some) == names
    assert all(np.array_equal(some[name], everything[name]) for name in names)


def test_real_texts_in_many_languages(shared_data: Path) -> None:
    with (shared_data / "raw_web" / "raw-small.jsonl").open(encoding="utf-8") as handle:
        texts = [json.loads(line)["text"] for line in handle][::40]
    assert len(texts) > 40
    assert_as_defined(texts)


def test_no_text_and_no_words() -> None:
    assert all(len(column) == 0 for column in signals([]).values())
    assert signals(["a"], []) == {}
    assert_as_defined(["", " \n ", "\u3000", "word", ""])
    with pytest.raises(AssertionError, match="no such signals"):
        signals(["a"], ["wrds"])


def test_every_character_is_classed_as_python_does() -> None:
    everything = "".join(map(chr, range(0x110000)))
    space = "".join(character for character in everything if character.isspace())
    for texts in ([everything], [f"a{character}b" for character in space], [chr(code) for code in range(0x3100)]):
        found = signals(texts, ["words", "alphabetic_words"])
        words = [words_of(text) for text in texts]
        assert found["words"].tolist() == list(map(len, words))
        wanted = [sum(any(map(str.isalpha, word)) for word in some) / max(1, len(some)) for some in words]
        np.testing.assert_allclose(found["alphabetic_words"], wanted, rtol=1e-6)


def test_huge_words_and_endless_repetition_end_soon() -> None:
    texts = ["x" * 3_000_000, "a " * 300_000, "漢" * 500_000, "\n" * 500_000, '"' * 300_000, "... " * 100_000]
    found = signals(texts)
    assert found["mean_word_length"].tolist() == [3_000_000, 1, 1, 0, 300_000, 3]
    assert found["duplicate_10gram_characters"][1] == pytest.approx(1, abs=1e-4)
    assert found["top_2gram_characters"][1] == pytest.approx(2, abs=1e-4)


@pytest.mark.parametrize("difference", [7, 8, 9, 15, 16, 17, 200, 255, 256, 257, 400])
@pytest.mark.parametrize("letter", ["x", "é", "漢", "😀"])
def test_words_that_differ_in_one_character_are_not_equal(difference: int, letter: str) -> None:
    word = letter * difference
    texts = [f"{word}y\n{word}z", f"{word}y\n{word}y", f"{word}\n{word}y", f"y{word}\nz{word}"]
    assert signals(texts, ["duplicate_lines"])["duplicate_lines"].tolist() == [0, 0.5, 0, 0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("naïve", "naéve"),
        ("\U0001f600", "\uf600"),
        ("a\U0001f600b", "a\uf600b"),
        ("xé", "xè"),
        ("é", "ÿ"),
        ("a漢", "b漢"),
    ],
)
def test_characters_beyond_ascii_are_told_apart_wherever_they_stand(one: str, other: str) -> None:
    texts = [f"{one}\n{other}", f"{one}\n{one}", f"{one}\u3000x\n{one} x"]
    assert signals(texts, ["duplicate_lines"])["duplicate_lines"].tolist() == [0, 0.5, 0.5]


def test_up_to_three_closing_signs_follow_a_sentence() -> None:
    texts = ["End. x", "End.) x", 'End."”) x', "End.)))) x", "End) x", "... x", ")))) x", "x. y! z?"]
    assert signals(texts, ["sentences"])["sentences"].tolist() == [2, 2, 2, 1, 1, 2, 1, 3]


def test_the_order_of_words_counts() -> None:
    texts = ["one two\ntwo one", "one two\none two", "a b c\na c b", "a b\nab"]
    assert signals(texts, ["duplicate_lines"])["duplicate_lines"].tolist() == [0, 0.5, 0, 0]


@given(st.lists(st.integers(0, 5), max_size=40), st.booleans())
def test_equal_keys_are_found_also_where_cut_keys_collide(keys: list[int], exact: bool) -> None:
    # Keys that differ only in what the packed sort cuts off after spreading: it must compare them whole.
    inverse = pow(int(repetition._SPREAD), -1, 1 << 64)
    array = np.array([key if exact else key * inverse % (1 << 64) for key in keys], dtype=np.uint64)
    groups = repetition._groups(array, exact_bits=3 if exact else 64)
    found: dict[int, list[int]] = {}
    for place, group in zip(groups.places.tolist(), groups.group.tolist(), strict=True):
        found.setdefault(group, []).append(place)
    wanted = [[at for at, key in enumerate(keys) if key == one] for one in set(keys)]
    assert sorted(found.values()) == sorted(places for places in wanted if len(places) > 1)
    assert sorted(groups.places[groups.first].tolist()) == sorted(places[0] for places in found.values())


def test_the_sets_of_signs_are_those_of_the_definition() -> None:
    from groundup.reference import quality

    assert set(textbatch.SENTENCE_ENDS) == set(quality.SENTENCE_ENDS)
    assert set(textbatch.LINE_ENDS) == set(quality.LINE_ENDS)
    assert set(textbatch.CLOSERS) == set(quality.CLOSERS)
    assert set(textbatch.BULLETS) == set(quality.BULLETS)
    assert set(signals_module.STOP_WORDS) == quality.STOP_WORDS


def test_toxic_words_are_whole_words_without_case() -> None:
    words = frozenset({"bad", "very mean", "Straße", "!!"})
    texts = ["Bad badly BAD good", "very, mean man", "mean very", "STRASSE", "", "good", "bad very mean"]
    assert toxic_share(texts, words).tolist() == pytest.approx([2 / 4, 2 / 3, 0, 1, 0, 0, 1])
    assert toxic_share(texts, frozenset()).tolist() == [0] * len(texts)


def test_toxic_entries_that_overlap_count_each_word_once() -> None:
    assert toxic_share(["a b c d"], frozenset({"a b", "b c", "b"})).tolist() == [0.75]
