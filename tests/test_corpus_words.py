"""Words of many texts at once equal those found one character at a time."""

from __future__ import annotations

import itertools
import unicodedata

import numpy as np
import pytest
import xxhash
from hypothesis import example, given
from hypothesis import strategies as st
from icu4py.breakers import WordBreaker

from groundup.corpus.words import UNSPACED, WORDS_VERSION, split_words, words_of
from groundup.reference import quality

MASK = (1 << 64) - 1
ADVERSARIAL = (
    "aB9 \n\t.,_'-éÉßẞİıΣσςÇЖжΩ中文の野家ｱあ食べるไทยກខ𠮷한😀👍🏽’“—\u200d\u0301\ud800\udfffK𐐀𐐨\x00\x7f\ufeff0٣"
)
text = st.text(alphabet=st.one_of(st.sampled_from(ADVERSARIAL), st.characters()), max_size=80)
texts = st.lists(text, max_size=8)


def kind(character: str) -> str:
    is_word = unicodedata.category(character)[0] in "LMN" and not "\ufe00" <= character <= "\ufe0f"
    if ord(character) < 128:
        is_word = character.isalnum()
    if not is_word:
        return "separator"
    return "unspaced" if any(first <= ord(character) <= last for first, last in UNSPACED) else "word"


def encoded(value: str) -> bytes:
    return value.encode("utf-8", "surrogatepass")


def lower(character: str) -> str:
    small = character.lower()
    return small if len(small) == 1 and len(encoded(small)) == len(encoded(character)) else character


def plain_words(value: str) -> list[tuple[bytes, int, int]]:
    """Each word, lowered, with its begin and end in characters."""
    spans: list[tuple[int, int]] = []
    place = 0
    for what, characters in itertools.groupby(value, kind):
        run = "".join(characters)
        for word in WordBreaker(run, "en") if what == "unspaced" else [run]:
            if what != "separator":
                spans.append((place, place + len(word)))
            place += len(word)
    return [(encoded("".join(map(lower, value[begin:end]))), begin, end) for begin, end in spans]


def plain_hash(word: bytes) -> int:
    if len(word) > 32:
        return xxhash.xxh3_64_intdigest(word)
    value = 0
    for begin in range(0, len(word), 8):
        value ^= int.from_bytes(word[begin : begin + 8], "little")
        value ^= value >> 32
        value = value * 0x9E3779B97F4A7C15 & MASK
        value ^= value >> 29
        value = value * 0xD6E8FEB86659FD93 & MASK
        value ^= value >> 32
    return value


def plain_grams(hashes: list[int], n: int) -> list[int]:
    runs = [hashes[begin : begin + n] for begin in range(max(len(hashes) - n + 1, min(len(hashes), 1)))]
    return [sum(value * 0xA0761D6478BD642F**place for place, value in enumerate(run)) & MASK for run in runs]


@given(texts)
@example(["", "x" * 31, "x" * 32, "x" * 33, "É" * 16, "É" * 17, "K" * 40, " ", "a"])
@example(["中" * 3 + "ab" + "中", "abไทย", "ไ", "İstanbul", "ΟΔΟΣ"])
def test_words_and_their_places(values):
    found = words_of(values)
    assert found.n_texts == len(values)
    assert found.starts[0] == 0
    assert found.starts[-1] == len(found.hashes)
    for number, value in enumerate(values):
        mine = slice(found.starts[number], found.starts[number + 1])
        expected = plain_words(value)
        assert list(zip(found.word_begin[mine], found.word_end[mine], strict=True)) == [(b, e) for _, b, e in expected]
        assert found.hashes[mine].tolist() == [plain_hash(word) for word, _, _ in expected]


@given(texts, st.sampled_from([1, 2, 3, 5, 8, 13, 50]))
def test_grams(values, n):
    words = words_of(values)
    grams, starts = words.ngrams(n)
    assert grams.dtype == np.uint64
    for number in range(len(values)):
        hashes = words.hashes[words.starts[number] : words.starts[number + 1]].tolist()
        assert grams[starts[number] : starts[number + 1]].tolist() == plain_grams(hashes, n)


@given(texts, text)
def test_a_text_has_the_same_words_whatever_stands_beside_it(values, value):
    alone, among = words_of([value]), words_of([*values, value, *values])
    mine = slice(among.starts[len(values)], among.starts[len(values) + 1])
    assert alone.hashes.tolist() == among.hashes[mine].tolist()
    assert alone.word_end.tolist() == among.word_end[mine].tolist()


def test_numbers_of_old_stay():
    """Stored hashes are compared with new ones: another hash needs another WORDS_VERSION."""
    words = words_of(["Hello, world! Straße; internationalization of 数据"])
    grams, _ = words.ngrams(5)
    assert [f"{value:016x}" for value in (*words.hashes[:4], grams[0])] == [
        "d198c717980f9086",
        "04d85217528def24",
        "c96af947399df432",
        "349aa45a1ec82193",
        "2e12395841c9f9eb",
    ]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("don't stop_here", ["don", "t", "stop", "here"]),
        ("“Hello” — world…", ["hello", "world"]),
        ("It’s 3.14", ["it", "s", "3", "14"]),
        ("Ça va, ÉTÉ?", ["ça", "va", "été"]),
        ("ПРИВЕТ, Мир", ["привет", "мир"]),
        ("我能吞下玻璃。", ["我能", "吞下", "玻璃"]),
        ("東京タワー、2020年", ["東京タワー", "2020", "年"]),
        ("𠮷野家で食べるPython", ["𠮷", "野家", "で", "食べる", "python"]),
        ("สวัสดีชาวโลก", ["สวัสดี", "ชาว", "โลก"]),
        ("ຂ້ອຍກິນແກ້ວໄດ້", ["ຂ້ອຍ", "ກິນ", "ແກ້ວ", "ໄດ້"]),
        ("ខ្ញុំអាចញុំកញ្ចក់", ["ខ្ញុំ", "អាច", "ញុំ", "កញ្ចក់"]),
        ("안녕하세요 세계", ["안녕하세요", "세계"]),
        ("हिन्दी भाषा।", ["हिन्दी", "भाषा"]),
        ("مرحبا، العالم؟", ["مرحبا", "العالم"]),
        ("ok👍🏽ok 👍️", ["ok", "ok"]),
        ("cafe\u0301 x", ["cafe\u0301", "x"]),
        ("***", []),
        ("", []),
    ],
)
def test_what_a_word_is(value, words):
    found = words_of([value])
    spans = zip(found.word_begin, found.word_end, strict=True)
    assert [value[begin:end].lower() for begin, end in spans] == words


def test_the_reference_has_the_same_scripts_without_spaces():
    assert quality.UNSPACED == UNSPACED
    assert "ICU" in WORDS_VERSION, "other dictionaries find other words"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("我用(Python)写，“他说”。「好」 don't中", "我|用|(Python)|写，|“他|说”。|「好」|don't|中"),
        ("東京タワー、2020年。", "東京タワー、|2020|年。"),
        ("สวัสดีชาวโลก (โลก)", "สวัสดี|ชาว|โลก|(โลก)"),
        ("Plain “English” and Русский", "Plain|“English”|and|Русский"),
    ],
)
def test_what_the_rules_count_keeps_its_punctuation(value, words):
    assert split_words(value) == quality.words_of(value) == words.split("|")


def test_hashes_are_spread():
    """One bit in two changes with any bit of a word, and no two words of 200,000 meet."""
    found = words_of([" ".join(f"w{number}" for number in range(200_000))])
    assert len(np.unique(found.hashes)) == 200_000
    assert len(np.unique(found.hashes >> np.uint64(32))) > 200_000 * (1 - 200_000 / 2**32)  # the expected, roughly
    share = np.array([((found.hashes >> np.uint64(bit)) & np.uint64(1)).mean() for bit in range(64)])
    assert np.abs(share - 0.5).max() < 0.006  # five standard errors


def test_one_word_of_a_million_characters():
    found = words_of(["a" * 1_000_000 + " b", "中" * 100_000])
    assert found.counts.tolist() == [2, 100_000]
    assert found.word_end[0] == 1_000_000
