"""Mixing: the shares that were asked for, by the ids alone, with the scarce repeated no more than stated."""

import math
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundup.corpus import curate, stream_documents
from groundup.corpus.mix import MOST_REPEATS, copies_of, plan_mix, plan_tokens
from groundup.errors import DataError
from groundup.recipe import CorpusSettings


def identity(number: int) -> str:
    return f"{random.Random(number).getrandbits(128):032x}"


@pytest.mark.parametrize(
    ("books", "web", "share", "factors"),
    [
        pytest.param(700, 700, 0.7, (1.0, 3 / 7), id="the overfull source is thinned, nothing is repeated"),
        pytest.param(100, 900, 0.5, (2.5, 250 / 900), id="a scarce one is repeated where less than half would stay"),
        pytest.param(1, 10_000, 0.5, (4.0, 4 / 10_000), id="and at most four times"),
    ],
)
def test_the_rule_for_the_total(books: int, web: int, share: float, factors: tuple[float, float]) -> None:
    found = plan_mix({"books": books, "web": web}, {"books": share, "web": 1 - share})
    assert tuple(found.values()) == pytest.approx(factors)


@pytest.mark.parametrize("weights", [{"*": 1}, {"*": 0.2}, {"a*": 2.5, "b*": 7.5}, {"a": 0.25, "b": 0.75, "c*": 0}])
def test_shares_that_are_there_already_change_nothing(weights: dict[str, float]) -> None:
    assert plan_mix({"a": 25, "b": 75}, {k: v for k, v in weights.items() if k != "c*"}) == pytest.approx(
        {"a": 1.0, "b": 1.0}
    )


def test_the_first_pattern_that_fits_counts_and_sources_of_a_pattern_keep_their_proportions() -> None:
    sizes = {"data/books-1.jsonl": 100, "data/books-2.jsonl": 300, "data/web/a.warc": 400, "notes.txt": 50}
    factors = plan_mix(sizes, {"books-2*": 0, "books*": 1, "*.warc": 1, "*": 1})
    assert factors["data/books-2.jsonl"] == 0
    shares = {name: factors[name] * size for name, size in sizes.items() if factors[name]}
    assert len(set(map(round, shares.values()))) == 1
    factors = plan_mix(sizes, {"data/books*": 1, "*": 1})
    assert factors["data/books-1.jsonl"] == factors["data/books-2.jsonl"]
    assert factors["data/web/a.warc"] == factors["notes.txt"]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"books": 1}, r"no share is given for 'web'.*\n.*\"\*\""),
        ({"books": 1, "web": 1, "wiki*": 1}, r"no text comes from 'wiki\*'.*\n.*'books', 'web'"),
        ({"*": 1, "web": 1}, r"no text comes from 'web'"),
        ({"*": 0}, "no share is above 0"),
        ({}, "no share is above 0"),
        ({"*": -1}, r"'\*' = -1: a share is a number of at least 0"),
        ({"*": float("nan")}, "a share is a number"),
    ],
)
def test_what_cannot_be_mixed_is_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        plan_mix({"books": 10, "web": 10}, weights)


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.integers(1, 10**12), st.floats(0.01, 1)), min_size=1),
    st.randoms(),
)
def test_shares_come_out_as_asked_for(sources: dict[str, tuple[int, float]], shuffler: random.Random) -> None:
    sizes = {name: size for name, (size, _) in sources.items()}
    weights = {name: weight for name, (_, weight) in sources.items()}
    factors = plan_mix(sizes, weights)
    total = sum(factors[name] * size for name, size in sizes.items())
    for name, weight in weights.items():
        assert factors[name] * sizes[name] / total == pytest.approx(weight / sum(weights.values()))
    assert max(factors.values()) <= MOST_REPEATS * (1 + 1e-9)
    assert max(factors.values()) >= 1 - 1e-9
    assert total <= sum(sizes.values()) * (1 + 1e-9)
    if 1 + 1e-9 < max(factors.values()) < MOST_REPEATS * (1 - 1e-9):
        assert total == pytest.approx(sum(sizes.values()) / 2)

    def shuffled(values: dict[str, float]) -> dict[str, float]:
        return dict(shuffler.sample(list(values.items()), len(values)))

    assert plan_mix(shuffled(sizes), shuffled(weights)) == pytest.approx(factors)


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.5, 1.0, 1.3, 2.0, 3.75])
def test_as_many_documents_come_as_the_factor_says(factor: float) -> None:
    n = 4000
    copies = [copies_of(identity(number), factor) for number in range(n)]
    assert set(copies) <= {int(factor), int(factor) + 1}
    if factor == int(factor):
        assert set(copies) == {int(factor)}
    assert abs(sum(copies) - factor * n) <= 4 * (n * 0.25) ** 0.5


@given(st.integers(0, 10**9), st.floats(0, 5), st.floats(0, 5))
def test_a_larger_factor_never_takes_a_document_away(number: int, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert copies_of(identity(number), low) <= copies_of(identity(number), high)
    assert copies_of(identity(number), low) == copies_of(identity(number), low)


def test_thinning_says_nothing_about_the_split() -> None:
    from groundup.corpus.holdout import Holdout
    from groundup.recipe import CorpusSettings

    ids = [identity(number) for number in range(4000)]
    holdout = Holdout(CorpusSettings(validation_share=0.5, validation_by="document"))
    for one in ids:
        holdout.see(one)
    kept = [one for one in ids if copies_of(one, 0.5)]
    n_held_out = sum(holdout.split_of(one) == "validation" for one in kept)
    assert abs(n_held_out - len(kept) / 2) < 4 * (len(kept) / 4) ** 0.5


def test_tokens_are_estimated_from_bytes_and_all_is_what_there_is() -> None:
    sizes = {"books-1": 600, "books-2": 200, "web": 1000, "spam": 50}
    factors = plan_tokens(sizes, {"books*": 100, "spam": 0, "*": "all"}, bytes_per_token=4.0)
    assert factors == pytest.approx({"books-1": 0.5, "books-2": 0.5, "web": 1.0, "spam": 0.0})
    assert plan_tokens({"a": 400}, {"a": 300}, bytes_per_token=2.0) == pytest.approx({"a": 1.5})


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"a": 401.0}, r"'a' = 401, but its text has about 100 tokens.*at most 400"),
        ({"b": 5.0, "*": 1.0}, "no text comes from 'b'"),
        ({"b": 5.0}, "no share is given for 'a'"),
        ({"a": -1.0}, "a count of tokens is a number of at least 0"),
        ({"a": math.nan}, "a count of tokens is a number of at least 0"),
        ({"a": 0.0}, "no count of tokens is above 0"),
    ],
)
def test_what_cannot_be_taken_is_refused(tokens: dict[str, float], message: str) -> None:
    with pytest.raises(DataError) as refusal:
        plan_tokens({"a": 400}, tokens, bytes_per_token=4.0)
    assert re.search(message, str(refusal.value.message) + " " + str(refusal.value.fix), re.IGNORECASE)


def test_a_corpus_of_so_many_tokens(tmp_path: Path) -> None:
    for source in ("book", "web"):
        (tmp_path / source).mkdir()
        for number in range(200):
            text = " ".join(identity(200 * len(source) + number) for _ in range(10))
            (tmp_path / source / f"{number}.txt").write_text(f"{source} {number} {text}", encoding="utf-8")
    settings = CorpusSettings(
        inputs=(str(tmp_path / "book"), str(tmp_path / "web")), languages=(), dedup="none",
        mix_tokens={"*/book/*": 8000, "*": "all"},
    )  # fmt: skip
    curate(settings, tmp_path / "out")
    sizes = {"book": 0, "web": 0}
    for document in stream_documents(tmp_path / "out"):
        sizes[document.text.split()[0]] += len(document.text.encode())
    assert sizes["book"] / settings.bytes_per_token == pytest.approx(8000, rel=0.2)
    assert sizes["web"] > 60_000  # all of it
    with pytest.raises(ValueError, match="leave one of them out"):
        CorpusSettings(mix={"*": 1.0}, mix_tokens={"*": 1.0})
