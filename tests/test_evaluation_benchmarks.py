"""Benchmarks from local files to items, records and figures: hand-computed values, and what can go wrong."""

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from groundup.errors import ArtifactError, DataError
from groundup.evaluation.benchmarks import extract_answer, find_benchmark, read_items
from groundup.evaluation.contamination import contaminated_items
from groundup.evaluation.measure import (
    Record,
    calibration_error,
    f1,
    figures_of,
    item_scores,
    pass_at_k,
    read_records,
    reliability,
)
from groundup.evaluation.scorecard import compare_cards, holm, score_benchmarks
from groundup.model import ModelConfig, Transformer
from groundup.tokenizer import Tokenizer

MINE = """
kind = "choice"
files = "mine.jsonl"
context = "Q: {{ q }}\\nA:"
choices = "answers"
gold = "{{ right }}"
unconditional = "A:"
"""
ROWS = [{"q": f"what is {n}", "answers": ["one", "two", f"number {n}"], "right": n % 3} for n in range(12)]


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "mine.toml").write_text(MINE)
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


@pytest.fixture(scope="module")
def small() -> tuple[Transformer, Tokenizer]:
    tokenizer = Tokenizer.train(["what is one two number Q A 1 2 3 4"] * 3, vocab_size=300)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, context_length=128, n_layers=1, d_model=16, n_heads=2, n_kv_heads=1,
        head_dim=8, d_ff=32,
    )  # fmt: skip
    return Transformer(config).eval(), tokenizer


def benchmark(folder: Path) -> Any:
    return find_benchmark(str(folder / "mine.toml"))


def test_a_row_becomes_a_context_with_choices(mine: Path) -> None:
    items = read_items(benchmark(mine), mine)
    assert [item.gold for item in items] == [row["right"] for row in ROWS]
    assert items[4].context == "Q: what is 4\nA:"
    assert items[4].choices == (" one", " two", " number 4")


def test_minimal_pairs_of_sentences_have_no_context(tmp_path: Path) -> None:
    row = {"sentence_good": "Cats sleep.", "sentence_bad": "Cats sleeps.", "UID": "agreement"}
    (tmp_path / "agreement.jsonl").write_text(json.dumps(row) + "\n")
    (item,) = read_items(find_benchmark("blimp"), tmp_path)
    assert item.pairs == [("", "Cats sleep."), ("", "Cats sleeps.")]
    assert (item.gold, item.group) == (0, "agreement")


def test_worked_examples_stand_before_an_item_and_never_are_the_item(mine: Path) -> None:
    items = read_items(benchmark(mine), mine, shots=3)
    for item, row in zip(items, ROWS, strict=True):
        assert item.context.endswith(f"\n\nQ: {row['q']}\nA:")
        assert item.context.count("Q:") == 4
        assert item.context.count(f"Q: {row['q']}\n") == 1
    for shot in items[0].context.split("\n\n")[:3]:
        number = int(shot.split("\n")[0].split()[-1])
        assert shot.endswith(["A: one", "A: two", f"A: number {number}"][number % 3])
    assert [item.context for item in items] == [item.context for item in read_items(benchmark(mine), mine, shots=3)]


def test_a_limit_takes_the_same_items_with_their_own_numbers(mine: Path) -> None:
    whole = {item.number: item.context for item in read_items(benchmark(mine), mine)}
    some = read_items(benchmark(mine), mine, limit=5, seed=3)
    assert len(some) == 5
    assert all(whole[item.number] == item.context for item in some)
    assert some == read_items(benchmark(mine), mine, limit=5, seed=3)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"q": "x", "answers": ["a", "b"], "right": 2}', "none of the numbers 0 to 1"),
        ('{"q": "x", "answers": ["a", "b"], "right": "zero"}', "none of the numbers"),
        ('{"q": "x", "answers": "a", "right": 0}', "'answers' is no list"),
        ('{"q": "x", "right": 0}', "'answers' is no list"),
        ('{"answers": ["a", "b"], "right": 0}', "'q' is undefined"),
        ('{"q": "x", "answers": ["a", "b"], "right": 0', "mine.jsonl"),
        ("[1, 2]", "no object"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(mine: Path, line: str, words: str) -> None:
    path = mine / "mine.jsonl"
    path.write_text(path.read_text().replace(json.dumps(ROWS[3]), line))
    with pytest.raises(DataError, match=words) as caught:
        read_items(benchmark(mine), mine)
    assert re.search(r"mine\.jsonl[:,] line 4", str(caught.value))


def test_what_is_no_benchmark_is_refused_by_name(mine: Path) -> None:
    with pytest.raises(DataError, match="Did you mean 'arc_easy'"):
        find_benchmark("arc_eazy")
    for wrong, words in (("nested = " + "[" * 5000, "recursion"), (f'like = "{mine}/mine.toml"\n', "recursion")):
        (mine / "mine.toml").write_text(MINE + wrong)
        with pytest.raises(DataError, match=rf"mine\.toml: cannot be read \(.*{words}"):
            benchmark(mine)
    (mine / "mine.toml").write_text(MINE + 'colour = "red"\n')
    with pytest.raises(DataError, match="colour"):
        benchmark(mine)
    (mine / "mine.toml").write_text("kind = ")
    with pytest.raises(DataError, match="described in TOML"):
        benchmark(mine)


def test_the_template_of_a_description_cannot_reach_out(mine: Path) -> None:
    (mine / "mine.toml").write_text(MINE.replace("{{ q }}", "{{ q.__class__.__mro__[1].__subclasses__() }}"))
    with pytest.raises(DataError, match="cannot be filled"):
        read_items(benchmark(mine), mine)


def test_answers_are_taken_from_what_was_written() -> None:
    gsm = find_benchmark("gsm8k")
    assert extract_answer(gsm, "so 3 + 4 = 7.\n#### 1,234.", is_flexible=False) == "1234"
    assert extract_answer(gsm, "it is $1,234.", is_flexible=False) == ""
    assert extract_answer(gsm, "it is $1,234.", is_flexible=True) == "1234"
    assert extract_answer(gsm, "none", is_flexible=True) == ""


def choice(gold: int, logprob: list[float], **more: Any) -> Record:
    sizes = {"tokens": [1] * len(logprob), "characters": [1] * len(logprob), "bytes": [1] * len(logprob)}
    return {"item": 0, "group": "", "gold": gold, "logprob": logprob, "greedy": [False] * len(logprob), **sizes, **more}


def test_accuracies_by_hand() -> None:
    records = [
        choice(0, [-1.0, -2.0], unconditional=[-0.5, -3.0]),  # right, but not by PMI
        choice(1, [-4.0, -6.0], characters=[2, 6], bytes=[2, 6], tokens=[1, 2], unconditional=[-1.0, -9.0]),
    ]
    figures = figures_of(records)
    assert figures["accuracy"].value == 0.5
    assert figures["accuracy_characters"].value == figures["accuracy_bytes"].value == 1.0  # −2 against −1
    assert figures["accuracy_tokens"].value == 1.0  # −4 against −3
    assert figures["accuracy_pmi"].value == 0.5  # −0.5 against 1, and −3 against 3
    assert figures["accuracy_centered"].value == 0.0  # chance of two choices
    p = [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2))]  # of the first choice
    assert figures["brier"].value == pytest.approx(np.mean([2 * (1 - p[0]) ** 2, 2 * p[1] ** 2]))
    assert figures["calibration_error"].value == pytest.approx((abs(1 - p[0]) + abs(0 - p[1])) / 2)


def test_one_continuation_is_right_when_every_token_is_the_likeliest() -> None:
    records = [choice(0, [-1.0]) | {"greedy": [True]}, choice(0, [-3.0])]
    assert figures_of(records)["accuracy"].value == 0.5
    assert figures_of(records)["perplexity"].value == pytest.approx(math.exp(2))


def test_calibration_by_hand() -> None:
    confidence, is_right = np.array([0.95, 0.91, 0.55, 1.0]), np.array([1, 0, 1, 1])
    assert reliability(confidence, is_right) == [
        (0.5, 0.55, 1.0, 1),
        (0.9, pytest.approx((0.95 + 0.91 + 1.0) / 3), pytest.approx(2 / 3), 3),
    ]
    wanted = (abs(1 - 0.55) + 3 * abs(2 / 3 - (0.95 + 0.91 + 1.0) / 3)) / 4
    assert calibration_error(confidence, is_right) == pytest.approx(wanted)


@pytest.mark.parametrize(("n", "passed", "k"), [(5, 0, 2), (5, 2, 1), (5, 2, 3), (6, 3, 4), (4, 4, 1)])
def test_pass_at_k_is_the_share_of_all_draws(n: int, passed: int, k: int) -> None:
    draws = list(itertools.combinations([True] * passed + [False] * (n - passed), k))
    assert pass_at_k(n, passed, k) == pytest.approx(sum(any(draw) for draw in draws) / len(draws))


def test_f1_of_words_by_hand() -> None:
    assert f1("The cat sat.", "a cat slept") == pytest.approx(0.5)
    assert f1("", "cat") == 0.0
    assert f1("", "") == 1.0


def test_many_comparisons_are_corrected() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_finished_items_are_not_scored_again(
    mine: Path, small: tuple[Transformer, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = small
    monkeypatch.setattr("groundup.evaluation.measure._CHUNK", 5)
    name, folder = str(mine / "mine.toml"), mine / "scores"
    whole = score_benchmarks(model, tokenizer, [name], mine, folder=folder, identity="a")
    assert whole["benchmarks"]["mine"]["n"] == 12
    kept = folder / "mine.jsonl"
    contents = kept.read_bytes()
    kept.write_bytes(contents[: int(len(contents) * 0.7)])  # stopped in the middle of a line
    calls: list[int] = []
    score = __import__("groundup.evaluation.measure", fromlist=["log_likelihoods"]).log_likelihoods

    def counted(model: Transformer, tokenizer: Tokenizer, pairs: list[Any]) -> Any:
        calls.append(len(pairs))
        return score(model, tokenizer, pairs)

    monkeypatch.setattr("groundup.evaluation.measure.log_likelihoods", counted)
    again = score_benchmarks(model, tokenizer, [name], mine, folder=folder, identity="a")
    assert again == whole
    assert kept.read_bytes() == contents
    assert 0 < sum(calls) < 12 * 6
    score_benchmarks(model, tokenizer, [name], mine, folder=folder, identity="another model")
    assert sum(calls) >= 12 * 6


def test_two_models_are_compared_item_by_item(mine: Path, small: tuple[Transformer, Tokenizer]) -> None:
    model, tokenizer = small
    name = str(mine / "mine.toml")
    for folder in ("a", "b"):
        score_benchmarks(model, tokenizer, [name], mine, folder=mine / folder, identity=folder)
    (same,) = compare_cards(mine / "a", mine / "b")
    assert (same.value, same.p, same.n) == (0.0, 1.0, 12)
    assert "no difference shown" in same.verdict
    # The second gets every item right, the first none.
    for folder, is_right in (("a", False), ("b", True)):
        path = mine / folder / "mine.jsonl"
        head, *lines = path.read_text().splitlines()
        told = [json.loads(line) for line in lines]
        for record in told:
            record["logprob"] = [0.0 if (place == record["gold"]) == is_right else -9.0 for place in range(3)]
        path.write_text("\n".join([head, *map(json.dumps, told), ""]))
    assert set(item_scores(read_records(mine / "b" / "mine.jsonl")).values()) == {1.0}
    (other,) = compare_cards(mine / "a", mine / "b")
    assert (other.first, other.second, other.low, other.high) == (0.0, 1.0, 1.0, 1.0)
    assert other.verdict == "the second is better by 100.0%"
    score_benchmarks(model, tokenizer, [name], mine, folder=mine / "c", identity="c", limit=5)
    with pytest.raises(DataError, match="share no benchmark"):
        compare_cards(mine / "a", mine / "c")
    (mine / "b" / "mine.jsonl").write_text('{"identity": "b"}\n[1]\n')
    with pytest.raises(ArtifactError, match=r"b/mine\.jsonl: cannot be read"):
        compare_cards(mine / "a", mine / "b")


def test_items_that_were_trained_on_are_counted_and_scored_without(
    mine: Path, small: tuple[Transformer, Tokenizer]
) -> None:
    model, tokenizer = small
    long = "where the quiet river bends beyond the mill and the old road goes on to number"
    rows = [{**row, "q": f"{long} {row['q'].split()[-1]} for ever and a day"} for row in ROWS]
    (mine / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = ["Nothing of it.", f"Before. {rows[4]['q'].upper()}! After.", "the quiet river bends beyond the mill"]
    name = str(mine / "mine.toml")
    card = score_benchmarks(
        model, tokenizer, [name], mine, folder=mine / "s", identity="a", trained_on=lambda: iter(texts)
    )["benchmarks"]["mine"]
    assert card["n_contaminated"] == 1
    assert card["clean"]["accuracy"]["n"] == 11
    items = read_items(benchmark(mine), mine, shots=2)
    assert contaminated_items(items, texts, ngram=13) == {4}
    assert contaminated_items(items, texts[:1]) == set()
    assert contaminated_items(items, texts, ngram=8) == {4}  # a phrase of all of them is the task's own wording
    with pytest.raises(DataError, match="8 to 13"):
        contaminated_items(items, texts, ngram=3)


@pytest.mark.parametrize(
    ("name", "folder", "n"),
    [("arc_easy", "multiple_choice", 2376), ("winogrande", "multiple_choice", 1267), ("gsm8k", "gsm8k", 1319),
     ("lambada", "multiple_choice", 5153), ("mmlu", "mmlu", 14042), ("humaneval", "humaneval", 164)],
)  # fmt: skip
def test_the_files_of_the_field_are_read_whole(shared_data: Path, name: str, folder: str, n: int) -> None:
    shots = 2 if name in ("mmlu", "gsm8k") else 0
    items = read_items(find_benchmark(name), shared_data / "evaluation" / folder, shots=shots)
    assert len(items) == n
    assert all(item.context.strip() for item in items if not item.contexts)
