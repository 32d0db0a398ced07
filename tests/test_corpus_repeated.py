"""Paragraphs, lines and runs of words that stand elsewhere too: found as by comparing all with all, and cut."""

from __future__ import annotations

import itertools
import operator
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lengths import examples
from planted import digests_of, planted_pairs, write_units

from groundup.corpus.dedup.repeats import (
    MIN_CHARACTERS,
    SPAN,
    cut_spans,
    part_spans,
    repeated_parts,
    repeated_substrings,
    union,
)
from groundup.corpus.engine import Engine, LocalPool
from groundup.corpus.words import words_of

MEMORY = 1 << 27
LITTLE = 3_000


def cut(search, texts, ends=(), memory=MEMORY, engine=None, kept=None):
    """The texts with everything cut that the search finds."""
    with tempfile.TemporaryDirectory() as folder:
        units = write_units(Path(folder), texts, list(ends), bands=1, rows=1)
        bounds = np.cumsum([0, *(unit.n for unit in units)])
        everyone = np.ones(len(texts), dtype=bool) if kept is None else np.array(kept)
        masks = [everyone[begin:end] for begin, end in itertools.pairwise(bounds)]
        found = search(units, masks, Path(folder) / "work", engine or Engine(), memory)
        assert not (Path(folder) / "work").exists()
        result = list(texts)
        for first, cuts in zip(bounds, found, strict=False):
            for row, of_row in itertools.groupby(cuts.tolist(), key=operator.itemgetter(0)):
                spans = [(begin, end) for _, begin, end in of_row]
                assert all(one[1] < other[0] for one, other in itertools.pairwise(spans))
                result[first + row] = cut_spans(texts[first + row], spans)
        return result


def lines(units, kept, *work, least=None):
    return repeated_parts(units, kept, "lines", *work, least)


def paragraphs(units, kept, *work):
    return repeated_parts(units, kept, "paragraphs", *work)


def runs_of(n):
    return lambda units, kept, *work: repeated_substrings(units, kept, n, *work)


def in_order_of_ids(texts: list[str]) -> list[int]:
    ids = digests_of(texts).tolist()
    return sorted(range(len(texts)), key=lambda place: (ids[place], place))


LONG = "a line that is long enough to be compared"
LINES = [LONG, LONG + " too", "Home", "Contact us", "```", "首页", "one more line of that kind", f"   {LONG} ", ""]


@settings(max_examples=examples(30))
@given(
    st.lists(st.lists(st.sampled_from(LINES), min_size=1, max_size=6).map("\n".join), min_size=1, max_size=6),
    st.sampled_from([MEMORY, LITTLE]),
    st.sampled_from([None, 1, 5, 20]),
    st.data(),
)
def test_lines(texts, memory, least, data):
    ends = sorted(data.draw(st.lists(st.integers(0, len(texts)), max_size=3)))
    seen: set[str] = set()
    expected = {}
    for place in in_order_of_ids(texts):
        left = []
        for line in texts[place].split("\n"):
            words = " ".join(line.split())
            is_compared = len(words) >= (least or MIN_CHARACTERS["lines"]) and words != "```"
            if not is_compared or words not in seen:
                left.append(line)
            if is_compared:
                seen.add(words)
        expected[place] = [line.rstrip() for line in left if line.strip()]
    found = cut(partial(lines, least=least), texts, ends, memory)
    for place, text in enumerate(found):
        assert [line.rstrip() for line in text.split("\n") if line.strip()] == expected[place]


def test_paragraphs():
    shared = "This paragraph stands\nin both of the documents."
    one = f"The first document, on its own.\n\n{shared}\n\nAnd so it ends, quite alone."
    other = f"Something else begins right here.\n\n\n  {shared} \n \nAnd goes on in another way."
    found = cut(paragraphs, [one, other])
    loser = in_order_of_ids([one, other])[1]
    alone = [
        "The first document, on its own.\n\nAnd so it ends, quite alone.",
        "Something else begins right here.\n\n\nAnd goes on in another way.",
    ]
    assert found[loser] == alone[loser]
    assert found[1 - loser] == [one, other][1 - loser]


def test_headings_stay():
    texts = [f"Contents\n\n{number} is all that there is to say about it" for number in range(5)]
    assert cut(paragraphs, texts) == texts


def test_those_who_do_not_take_part_neither_lose_nor_win():
    texts = [LONG, f"{LONG}\nand more of the same kind", f"{LONG}\nbut something quite different"]
    first = in_order_of_ids(texts)[0]
    found = cut(lines, texts, kept=[place != first for place in range(3)])
    assert found[first] == texts[first]
    assert sum(text != whole for text, whole in zip(found, texts, strict=True)) == 1


@given(st.text(alphabet="ab \n\t", max_size=60), st.sampled_from(["paragraphs", "lines"]))
def test_parts_cover_the_text(text, within):
    place = 0
    for begin, end, behind in part_spans(text, within):
        assert begin == place
        assert begin <= end <= behind
        assert not text[end:behind].strip()
        place = behind
    assert place == len(text)


@settings(max_examples=examples(40))
@given(
    st.lists(st.lists(st.sampled_from("abc"), max_size=25).map(" ".join), min_size=1, max_size=5),
    st.integers(2, 6),
    st.sampled_from([MEMORY, LITTLE]),
    st.data(),
)
def test_runs_of_words(texts, n, memory, data):
    ends = sorted(data.draw(st.lists(st.integers(0, len(texts)), max_size=3)))
    owner: dict[tuple[str, ...], tuple[int, int]] = {}
    expected = {}
    for place in in_order_of_ids(texts):
        words = texts[place].split()
        goes = [False] * len(words)
        for begin in range(len(words) - n + 1):
            document, word = owner.setdefault(tuple(words[begin : begin + n]), (place, begin))
            if document != place or begin >= word + n:
                goes[begin : begin + n] = [True] * n
        expected[place] = [word for word, gone in zip(words, goes, strict=True) if not gone]
    found = cut(runs_of(n), texts, ends, memory)
    assert [text.split() for text in found] == [expected[place] for place in range(len(texts))]


@pytest.fixture(scope="module")
def copied() -> tuple[list[str], str]:
    """Documents of which some have the same passage in them, in other punctuation and case."""
    texts = [pair.original for pair in planted_pairs(30, seed=2)]
    passage = " ".join(planted_pairs(1, seed=99)[0].original.replace(".", "").lower().split()[:60])
    with_passage = [f"{text} {passage if number % 2 else passage.upper()}! {text[::-1]}" for number, text in
                    enumerate(texts[:10])]  # fmt: skip
    return with_passage + texts[10:], passage


def words_in(text: str) -> list[int]:
    return words_of([text]).hashes.tolist()


def holds(text: str, passage: str) -> bool:
    whole, part = words_in(text), words_in(passage)
    return any(whole[place : place + len(part)] == part for place in range(len(whole) - len(part) + 1))


def test_a_passage_of_many_documents_stays_in_one(copied):
    texts, passage = copied
    found = cut(runs_of(50), texts)
    assert [place for place, text in enumerate(found) if holds(text, passage)] == [
        next(place for place in in_order_of_ids(texts) if place < 10)
    ]
    for text, whole in zip(found, texts, strict=True):
        gone = len(words_in(whole)) - len(words_in(text))
        assert gone in (0, len(words_in(passage)))


def test_the_result_does_not_depend_on_units_memory_or_workers(copied):
    texts, _ = copied
    for search in (runs_of(50), paragraphs, lines):
        whole = cut(search, texts)
        assert cut(search, texts, [3, 3, 17], 40_000) == whole
        assert cut(search, texts[::-1], [5])[::-1] == whole
    with LocalPool(2) as pool, tempfile.TemporaryDirectory() as folder:
        units = write_units(Path(folder), texts, [12], bands=1, rows=1)
        kept = [np.ones(unit.n, dtype=bool) for unit in units]
        work = Path(folder) / "work"
        one = repeated_substrings(units, kept, 50, work, Engine(), MEMORY)
        two = repeated_substrings(units, kept, 50, work, pool, LITTLE * 20)
        assert [cuts.tolist() for cuts in one] == [cuts.tolist() for cuts in two]


def test_nothing_repeated_nothing_cut(tmp_path):
    for search in (runs_of(5), lines, paragraphs):
        assert cut(search, ["one two three four five six", "seven"], [1, 1]) == ["one two three four five six", "seven"]
        assert cut(search, ["", "a"]) == ["", "a"]
        assert search([], [], tmp_path / "work", Engine(), MEMORY) == []


@given(st.text(alphabet="ab \n", max_size=30), st.data())
def test_cut_spans_takes_no_other_letter(text, data):
    place = st.integers(0, len(text))
    spans = data.draw(st.lists(st.tuples(place, place).map(lambda span: tuple(sorted(span))), max_size=4))
    left = cut_spans(text, spans)
    expected = [c for i, c in enumerate(text) if not any(begin <= i < end for begin, end in spans) and not c.isspace()]
    assert [character for character in left if not character.isspace()] == expected
    assert cut_spans(text, []) == text


@pytest.mark.parametrize(
    ("text", "spans", "left"),
    [
        ("one two three", [(4, 7)], "one three"),
        ("one two three", [(0, 3)], "two three"),
        ("one two three", [(8, 13)], "one two"),
        ("one two three", [(4, 7), (2, 5)], "on three"),
        ("one\ntwo\nthree", [(4, 8)], "one\nthree"),
        ("one\n  two", [(0, 4)], "  two"),
        ("one two, three", [(4, 7)], "one , three"),
        ("one", [(0, 3)], ""),
    ],
)
def test_cut_spans(text, spans, left):
    assert cut_spans(text, spans) == left


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 12), st.integers(0, 6)), max_size=12))
def test_union_of_stretches(values):
    spans = np.array(sorted((number, begin, begin + size) for number, begin, size in values), dtype=SPAN)
    inside = {(number, place) for number, begin, size in values for place in range(begin, begin + size)}
    found = union(spans)
    assert {(n, place) for n, begin, end in found.tolist() for place in range(begin, end)} == inside
    for one, other in zip(found.tolist(), found.tolist()[1:], strict=False):
        assert one[0] < other[0] or one[2] < other[1]
