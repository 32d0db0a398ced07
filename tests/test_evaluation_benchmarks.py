"""Benchmarks from local files to items, records and figures: hand-computed values, and what can go wrong."""

import itertools
import json
import math
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from groundup.errors import ArtifactError, DataError, GroundupError
from groundup.evaluation.benchmarks import Reply, extract_answer, find_benchmark, fingerprint, read_items
from groundup.evaluation.comparison import compare_cards, holm
from groundup.evaluation.contamination import contaminated_items
from groundup.evaluation.measure import (
    _CHUNK,
    Record,
    calibration_error,
    figures_of,
    item_scores,
    measure,
    pass_at_k,
    read_records,
    reliability,
    to_plain,
)
from groundup.evaluation.metrics import bits_per_byte, f1
from groundup.evaluation.sandbox import sandbox_level
from groundup.evaluation.scorecard import Scores, core, read_card, score_model
from groundup.evaluation.sets import check_tasks, task_digests
from groundup.model import ModelConfig, Transformer
from groundup.recipe import EvaluateSettings
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


def scored(
    small: tuple[Transformer, Tokenizer], name: object, data: Path, folder: Path, identity: str = "a", *, seed: int = 1,
    **asked: Any,
) -> Scores:  # fmt: skip
    settings = EvaluateSettings(tasks=(str(name),), data=str(data), **asked)
    return score_model(*small, settings, folder=folder, identity=identity, seed=seed)


def benchmark(folder: Path) -> Any:
    return find_benchmark(str(folder / "mine.toml"))


def test_a_row_becomes_a_context_with_choices(mine: Path) -> None:
    items = read_items(benchmark(mine), mine)
    assert [item.gold for item in items] == [row["right"] for row in ROWS]
    assert items[4].context == "Q: what is 4\nA:"
    assert items[4].choices == (" one", " two", " number 4")


def test_the_data_folder_goes_before_a_file_of_that_name_in_the_current_folder(
    mine: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path_factory.mktemp("here")
    (here / "mine.jsonl").write_text(json.dumps(ROWS[0]))
    monkeypatch.chdir(here)
    assert len(read_items(benchmark(mine), mine)) == 12
    assert len(read_items(benchmark(mine), here / "nothing")) == 1  # a path


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
        ('{"q": "x", "answers": ["a", ""], "right": 0}', "a choice is empty"),
        ('{"q": "x", "answers": ["a", null], "right": 0}', "neither a text nor a number"),
        ('{"q": "\\ud800", "answers": ["a", "b"], "right": 0}', "half a surrogate pair"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(mine: Path, line: str, words: str) -> None:
    path = mine / "mine.jsonl"
    path.write_text(path.read_text().replace(json.dumps(ROWS[3]), line))
    with pytest.raises(DataError, match=words) as caught:
        read_items(benchmark(mine), mine)
    assert "mine.jsonl, line 4: " in str(caught.value)


def test_a_row_of_cells_that_are_too_many_or_too_few_is_named(mine: Path) -> None:
    (mine / "mine.toml").write_text(MINE.replace("mine.jsonl", "mine.csv").replace('"answers"', '["a", "b"]'))
    (mine / "mine.csv").write_text("q,right\nx,0\nx, and more,1\n")
    with pytest.raises(DataError, match="line 3: 3 cells, 2 columns"):
        read_items(benchmark(mine), mine)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('kind = "choice"\nfiles = "a"', "choices, or a continuation"),
        ('kind = "generation"\nfiles = "a"', "has a target"),
        ('kind = "code"\nfiles = "a"', "has a program"),
        ('kind = "generation"\nfiles = "a"\ntarget = "b"\nanswer = ["("]', "no regular expression"),
        ('like = "mine.toml"', "no benchmark that ships"),
        (MINE + 'name = "../mine"', "name: "),
    ],
)
def test_a_description_that_cannot_work_is_refused_before_a_model_does(mine: Path, text: str, words: str) -> None:
    (mine / "mine.toml").write_text(text)
    with pytest.raises(DataError, match=words):
        benchmark(mine)


def test_contexts_are_as_many_as_choices_and_no_text_or_answer_is_empty(tmp_path: Path) -> None:
    path, described = tmp_path / "a.jsonl", tmp_path / "a.toml"
    for fields, row, words in (
        ('kind = "choice"\ncontexts = "a"\nchoices = "b"', {"a": ["1", "2", "3"], "b": ["1", "2"]}, "3 contexts and 2"),
        ('kind = "text"', {"text": " "}, "text is empty"),
        ('kind = "text"', {"other": "a"}, "no field 'text'"),
        ('kind = "generation"\ntarget = "{{ a }}"', {"a": ""}, "right answer is empty"),
    ):
        described.write_text(f'files = "a.jsonl"\n{fields}')
        path.write_text(json.dumps(row))
        with pytest.raises(DataError, match=words) as caught:
            read_items(find_benchmark(str(described)), tmp_path)
        assert "a.jsonl, line 1: " in str(caught.value)


def test_tasks_are_checked_before_a_model_is_read(mine: Path) -> None:
    (mine / "other").mkdir()
    (mine / "other" / "mine.toml").write_text(MINE)
    own = str(mine / "mine.toml")
    for names, words in (
        ((own, str(mine / "other" / "mine.toml")), "two of mine have one name"),
        ((own, "arc_eazy"), "'arc_eazy' is no task"),
        ((own, "groundup:taks"), "Did you mean 'groundup:tasks'"),
        ((own, "piqa"), "piqa.jsonl"),
    ):
        with pytest.raises(DataError, match=words):
            task_digests(EvaluateSettings(tasks=names, data=str(mine)))


def test_examples_are_found_however_often_an_item_is_repeated(mine: Path) -> None:
    (mine / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [ROWS[0]] * 30 + ROWS[1:3]))
    items = read_items(benchmark(mine), mine, shots=2)
    assert all(item.context.split("\n\n")[:2].count("Q: what is 0\nA: one") == 0 for item in items[:30])


def test_what_is_no_benchmark_is_refused_by_name(mine: Path) -> None:
    with pytest.raises(DataError, match="Did you mean 'arc_easy'"):
        find_benchmark("arc_eazy")
    (mine / "mine.toml").write_text(MINE + "nested = " + "[" * 5000)
    with pytest.raises(DataError, match=r"mine\.toml: cannot be read \(.*recursion"):
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


@pytest.mark.parametrize(
    ("reply", "strict", "flexible"),
    [
        ("#### 18", "18", "18"),
        ("#### -18", "-18", "-18"),
        ("#### 18.", "18", "18"),
        ("#### 1,800", "1800", "1800"),
        ("#### 18.50", "18.50", "18.50"),
        ("####18", "", "18"),
        ("#### $18", "", "18"),
        ("#### 18 dollars", "18", "18"),
        ("9 + 9 = 18\n#### 18\n", "18", "18"),
        ("#### 17\nNo:\n#### 18", "18", "18"),
        ("The answer is 18", "", "18"),
        ("The answer is 18.", "", "18"),
        ("The answer is $18.", "", "18"),
        ("The answer is $1,800", "", "1800"),
        ("It is 17, or 18", "", "18"),
        ("It is 7", "", "7"),
        ("It is -7", "", "-7"),
        ("It is seven", "", ""),
        ("", "", ""),
        ("\\boxed{18}", "", "18"),
    ],
)
def test_answers_of_gsm8k_strict_and_flexible(reply: str, strict: str, flexible: str) -> None:
    gsm = find_benchmark("gsm8k")
    assert extract_answer(gsm, reply, is_flexible=False) == strict
    assert extract_answer(gsm, reply, is_flexible=True) == flexible


def test_a_reply_without_an_answer_is_wrong_whatever_the_target_looks_like(
    tmp_path: Path, small: tuple[Transformer, Tokenizer]
) -> None:
    fields = 'kind = "generation"\nfiles = "a.jsonl"\ncontext = "Q"\ntarget = "{{ a }}"\nanswer = ["#### (.+)"]\n'
    (tmp_path / "a.toml").write_text(fields + "max_tokens = 4")
    (tmp_path / "a.jsonl").write_text('{"a": "18"}\n{"a": "#### 19"}\n')
    several, chosen = EvaluateSettings(samples=3), find_benchmark(str(tmp_path / "a.toml"))
    records = measure(*small, chosen, read_items(chosen, tmp_path), settings=several)
    assert [record["target"] for record in records] == ["18", "19"]
    assert not any(record["outcomes"]["exact_match_flexible"] for record in records)
    assert [*figures_of(records)] == ["exact_match", "exact_match_flexible", "f1"]
    assert records == measure(*small, chosen, read_items(chosen, tmp_path))  # samples are of programs


def choice(gold: int, logprob: list[float], **more: Any) -> Record:
    sizes = {"tokens": [1] * len(logprob), "characters": [1] * len(logprob), "bytes": [1] * len(logprob)}
    return {
        "item": 0,
        "group": "",
        "gold": gold,
        "logprob": logprob,
        "greedy": [False] * len(logprob),
        **sizes,
        "chance": 1 / len(logprob),
        **more,
    }


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
    assert figures["accuracy_centered"].value == 1.0  # by tokens
    p = [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2))]  # of the first choice
    assert figures["brier"].value == pytest.approx(np.mean([2 * (1 - p[0]) ** 2, 2 * p[1] ** 2]))
    assert figures["calibration_error"].value == pytest.approx((abs(1 - p[0]) + abs(0 - p[1])) / 2)


UNITS = ("", "_characters", "_bytes", "_tokens")


def test_each_normalization_may_choose_otherwise() -> None:
    sizes = {"characters": [1, 8, 4, 6], "bytes": [1, 8, 4, 24], "tokens": [1, 1, 6, 1]}
    for unit, gold in (("", 0), ("_characters", 1), ("_tokens", 2), ("_bytes", 3)):
        record = choice(gold, [-5.0, -7.0, -6.0, -6.5], **sizes)
        figures = figures_of([record])
        assert {name for name in UNITS if figures[f"accuracy{name}"].value == 1.0} == {unit}


def test_all_programs_wrong_is_no_certainty() -> None:
    records = [{"item": n, "group": "", "reply": "", "passed": [False], "reasons": [""]} for n in range(6)]
    assert figures_of(records)["pass@1"].stderr == pytest.approx(1 / 14)  # Wilson


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


@pytest.mark.parametrize(("n", "passed", "k"), [(5, 0, 2), (5, 2, 1), (5, 2, 3), (6, 3, 4), (4, 4, 1), (8, 1, 4)])
def test_pass_at_k_is_the_share_of_all_draws(n: int, passed: int, k: int) -> None:
    draws = list(itertools.combinations([True] * passed + [False] * (n - passed), k))
    assert pass_at_k(n, passed, k) == pytest.approx(sum(any(draw) for draw in draws) / len(draws))


def test_programs_are_graded_by_running_them(tmp_path: Path) -> None:
    row = {"prompt": "def double(n):\n", "test": "def check(f):\n    assert f(2) == 4", "entry_point": "double"}
    (tmp_path / "HumanEval.jsonl").write_text(json.dumps(row))
    task = find_benchmark("humaneval")
    (item,) = read_items(task, tmp_path)
    replies = [Reply(f"    {body}\n") for body in ("return 2 * n", "return n", "raise SystemExit(0)", "return 4")]
    graded = task.grade(item, replies, EvaluateSettings(unisolated_code=True))
    assert graded["passed"] == [True, False, False, True]
    assert figures_of([{"item": 0, "group": "", **graded}])["pass@2"].value == pytest.approx(1 - 1 / 6)
    (tmp_path / "HumanEval.jsonl").write_text(json.dumps({**row, "test": "def check(f):\n    pass"}))
    assert fingerprint(task, [item]) != fingerprint(task, read_items(task, tmp_path))  # another program judges


def test_what_cannot_be_asked_or_graded_is_refused_before_anything_is_written(
    tmp_path: Path, small: tuple[Transformer, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_rouge() -> None:
        raise GroundupError("ROUGE needs rouge-score.")

    monkeypatch.setattr("groundup.evaluation.sandbox.sandbox_level", lambda: "none")
    monkeypatch.setattr("groundup.evaluation.benchmarks.rouge_scorer", no_rouge)
    monkeypatch.setattr("groundup.evaluation.measure.generate_batch", lambda *given, **more: pytest.fail("it writes"))
    (tmp_path / "a.jsonl").write_text("{}\n")
    for shots, fields, words in (
        (0, 'kind = "code"\nprogram = "{{ completion }}"', "no namespaces to isolate it"),
        (0, 'kind = "generation"\ntarget = "1"\nrouge = true', "ROUGE needs rouge-score"),
        (2, 'kind = "code"\nprogram = "{{ completion }}"', 'benchmark a: kind = "code" has no worked examples'),
        (2, 'kind = "text"', 'benchmark a: kind = "text" has no worked examples'),
    ):
        (tmp_path / "a.toml").write_text(f'files = "a.jsonl"\ncontext = "Q"\n{fields}')
        for check in (check_tasks, partial(score_model, *small)):
            with pytest.raises(GroundupError, match=words):
                check(EvaluateSettings(tasks=(str(tmp_path / "a.toml"),), data=str(tmp_path), shots=shots))


def test_scores_of_programs_say_what_isolated_them(tmp_path: Path, small: tuple[Transformer, Tokenizer]) -> None:
    fields = 'kind = "code"\nfiles = "a.jsonl"\ncontext = "Q"\nprogram = "{{ completion }}"\nmax_tokens = 3'
    (tmp_path / "a.toml").write_text(fields)
    (tmp_path / "a.jsonl").write_text("{}\n")
    found = scored(small, tmp_path / "a.toml", tmp_path, tmp_path / "s", unisolated_code=True)
    assert found.card["tasks"]["a"]["sandbox"] == sandbox_level()


@pytest.mark.parametrize("n_texts", [3, 30])
def test_a_texts_figures_are_those_of_all_its_tokens(
    n_texts: int, tmp_path: Path, small: tuple[Transformer, Tokenizer]
) -> None:
    (tmp_path / "text.toml").write_text('kind = "text"\nfiles = "text.jsonl"')
    texts = [f"number {n} is two " * (40 + n) for n in range(n_texts)]  # of several windows
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = scored(small, tmp_path / "text.toml", tmp_path, tmp_path / "s").figures
    wanted = bits_per_byte(small[0], texts, small[1])
    assert found["text.bits_per_byte"] == pytest.approx(asdict(wanted))
    n_tokens = sum(len(small[1].encode(text)) for text in texts)
    assert found["text.perplexity"]["n"] == n_tokens
    assert found["text.perplexity"]["value"] == pytest.approx(2 ** (wanted.value * wanted.n / n_tokens))


def test_f1_of_words_by_hand() -> None:
    assert f1("The cat sat.", "a cat slept") == pytest.approx(0.5)
    assert f1("", "cat") == 0.0
    assert f1("", "") == 1.0


def test_many_comparisons_are_corrected() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_finished_items_are_not_scored_again(
    mine: Path, small: tuple[Transformer, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_CHUNK, "choice", 5)
    name, folder = mine / "mine.toml", mine / "scores"
    whole = scored(small, name, mine, folder).card
    assert whole["tasks"]["mine"]["n"] == 12
    kept = folder / "mine.jsonl"
    contents = kept.read_bytes()
    kept.write_bytes(contents[: int(len(contents) * 0.7)])  # stopped in the middle of a line
    calls: list[int] = []
    score = __import__("groundup.evaluation.measure", fromlist=["score_ids"]).score_ids

    def counted(model: Transformer, requests: list[Any]) -> Any:
        calls.append(len(requests))
        return score(model, requests)

    monkeypatch.setattr("groundup.evaluation.measure.score_ids", counted)
    assert scored(small, name, mine, folder).card == whole
    assert kept.read_bytes() == contents
    assert 0 < sum(calls) < 12 * 6
    scored(small, name, mine, folder, "another model")
    assert sum(calls) >= 12 * 6


def test_scores_of_an_earlier_form_are_refused_and_made_again(mine: Path, small: tuple[Transformer, Tokenizer]) -> None:
    earlier = {"model": "a", "benchmarks": {"mine": {"fingerprint": "f", "figures": {}}}, "aggregate": None}
    (mine / "scores").mkdir()
    (mine / "scores" / "scores.json").write_text(json.dumps(earlier))
    with pytest.raises(ArtifactError, match=r"of another version, or no scores[\s\S]*groundup evaluate"):
        compare_cards(mine / "scores", mine / "scores")
    assert scored(small, mine / "mine.toml", mine, mine / "scores").card["tasks"].keys() == {"mine"}


def test_two_models_are_compared_item_by_item(mine: Path, small: tuple[Transformer, Tokenizer]) -> None:
    name = mine / "mine.toml"
    for folder in ("a", "b"):
        scored(small, name, mine, mine / folder, folder)
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
    identity = read_card(mine / "b")["tasks"]["mine"]["identity"]
    assert set(item_scores(read_records(mine / "b" / "mine.jsonl", identity)).values()) == {1.0}
    (other,) = compare_cards(mine / "a", mine / "b")
    assert (other.first, other.second, other.low, other.high) == (0.0, 1.0, 1.0, 1.0)
    assert other.verdict == "the second is better by 100 points"
    scored(small, name, mine, mine / "c", "c", limit=5)
    with pytest.raises(DataError, match="share no benchmark"):
        compare_cards(mine / "a", mine / "c")
    with pytest.raises(ArtifactError, match=r"not found.*\n.*groundup evaluate"):
        compare_cards(mine / "a", mine / "nowhere")
    # Records of another run of the command, stopped before it wrote its scores, are not those of the scores.
    path = mine / "a" / "mine.jsonl"
    path.write_text(path.read_text().replace(path.read_text().splitlines()[0], '{"identity": "another"}'))
    with pytest.raises(ArtifactError, match="no records of these scores"):
        compare_cards(mine / "a", mine / "b")


def test_texts_are_compared_in_bits_per_byte(mine: Path, small: tuple[Transformer, Tokenizer]) -> None:
    (mine / "text.toml").write_text('kind = "text"\nfiles = "text.jsonl"')
    (mine / "text.jsonl").write_text("".join(json.dumps({"text": f"number {n} two"}) + "\n" for n in range(9)))
    for folder in ("a", "b"):
        card = scored(small, mine / "text.toml", mine, mine / folder, folder).card
    (same,) = compare_cards(mine / "a", mine / "b")
    assert same.verdict.endswith("where one of 0.02 bits per byte would have been seen")
    path = mine / "b" / "text.jsonl"
    head, *lines = path.read_text().splitlines()
    told = [json.loads(line) for line in lines]
    for record in told:
        record["bits"][0][0] += sum(map(sum, record["bytes"])) / 2
    path.write_text("\n".join([head, *map(json.dumps, told), ""]))
    (other,) = compare_cards(mine / "a", mine / "b")
    assert other.verdict == "the first is better by 0.5 bits per byte"
    assert card["tasks"]["text"]["figures"]["bits_per_byte"]["unit"] == "bytes"


def test_a_result_says_what_it_was_measured_with(mine: Path, small: tuple[Transformer, Tokenizer]) -> None:
    scored(small, mine / "mine.toml", mine, mine / "scores", shots=1, limit=9, seed=5)
    card = json.loads((mine / "scores" / "scores.json").read_text())
    one = card["tasks"]["mine"]
    assert (card["model"], card["tokenizer"], one["n"]) == ("a", small[1].fingerprint, 9)
    assert len(card["template"]) == len(card["tokenizer"])
    assert {*card["versions"]} == {"torch", "python"}
    asked = {"shots": 1, "limit": 9, "seed": 5, "dtype": "torch.float32", "chat": False}
    assert one["settings"] == asked
    assert all({*figure} == {"value", "stderr", "n", "unit"} for figure in one["figures"].values())
    assert one["fingerprint"] != one["identity"]


def test_every_setting_of_sampling_stands_in_the_result(tmp_path: Path, small: tuple[Transformer, Tokenizer]) -> None:
    fields = 'kind = "generation"\nfiles = "a.jsonl"\ncontext = "Q"\ntarget = "1"\nmax_tokens = 3\nstop = ["Q"]'
    (tmp_path / "a.toml").write_text(fields)
    (tmp_path / "a.jsonl").write_text("{}\n")
    one = scored(small, tmp_path / "a.toml", tmp_path, tmp_path / "s").card["tasks"]["a"]
    decoding = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 3, "stop": ("Q",)}
    assert decoding.items() <= one["settings"]["decoding"].items()
    assert one["settings"]["samples"] == 1


def test_items_that_were_trained_on_are_counted_and_scored_without(
    mine: Path, small: tuple[Transformer, Tokenizer]
) -> None:
    long = "where the quiet river bends beyond the mill and the old road goes on to number"
    rows = [{**row, "q": f"{long} {row['q'].split()[-1]} for ever and a day"} for row in ROWS]
    (mine / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = ["Nothing of it.", f"Before. {rows[4]['q'].upper()}! After.", "the quiet river bends beyond the mill"]
    settings = EvaluateSettings(tasks=(str(mine / "mine.toml"),), data=str(mine))
    card = score_model(*small, settings, trained_on=iter(texts)).card["tasks"]["mine"]
    assert card["n_contaminated"] == 1
    assert card["clean"]["accuracy"]["n"] == 11
    items = read_items(benchmark(mine), mine, shots=2)
    assert contaminated_items([items], texts, ngram=13) == [{4}]
    assert contaminated_items([items], texts[:1]) == [set()]
    assert contaminated_items([items], texts, ngram=8) == [{4}]  # a phrase of all of them is the task's own wording
    with pytest.raises(DataError, match="8 to 13"):
        contaminated_items([items], texts, ngram=3)


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


def choices_of(tokens: list[int], logprob: list[float], gold: int, chance: float) -> Record:
    return choice(gold, logprob) | {"tokens": tokens, "chance": chance}


def test_core_is_the_mean_of_centered_accuracies_of_its_tasks() -> None:
    # Chosen by the mean of the tokens: −2 against −1.5, so the second; by the sum it would be the first.
    second = [choices_of([1, 2], [-2.0, -3.0], gold, 0.62) for gold in (1, 1, 1, 0)]
    boolq = figures_of(second)
    assert (boolq["accuracy"].value, boolq["accuracy_tokens"].value) == (0.25, 0.75)
    assert boolq["accuracy_centered"].value == pytest.approx((0.75 - 0.62) / 0.38)
    whole = figures_of([choice(0, [-1.0]) | {"greedy": [n < 1]} for n in range(4)])  # LAMBADA: 1 of 4
    copa = figures_of([choices_of([1, 1], [-1.0, -2.0], gold, 0.5) for gold in (0, 1, 1, 1)])  # (1/4 − 1/2) / (1/2)
    tasks = {
        "boolq": {"core_shots": 10, "settings": {"shots": 0}, "figures": to_plain(boolq)},
        "lambada": {"core_shots": 0, "settings": {"shots": 0}, "figures": to_plain(whole)},
        "copa": {"core_shots": 0, "settings": {"shots": 0}, "figures": to_plain(copa)},
        "mmlu": {"core_shots": None, "settings": {"shots": 0}, "figures": to_plain(boolq)},
    }
    found = core(tasks)
    assert found is not None
    assert found["value"] == pytest.approx((0.13 / 0.38 + 0.25 - 0.5) / 3)
    one = [boolq["accuracy_tokens"].stderr / 0.38, whole["accuracy"].stderr, copa["accuracy_tokens"].stderr / 0.5]
    assert found["stderr"] == pytest.approx(math.hypot(*one) / 3)
    assert (found["tasks"], found["n"], found["of"]) == (["boolq", "lambada", "copa"], 3, 22)
    assert found["other_shots"] == ["boolq"]
    assert core({"mmlu": tasks["mmlu"]}) is None


def test_another_task_of_the_same_form_is_no_part_of_core(mine: Path) -> None:
    (mine / "mine.toml").write_text('like = "boolq"\nfiles = "mine.jsonl"')
    assert (find_benchmark("boolq").chance, find_benchmark("boolq").core_shots) == (0.62, 10)
    assert (benchmark(mine).chance, benchmark(mine).core_shots) == (None, None)
    assert find_benchmark("simple_arithmetic").core_shots is None


@pytest.mark.parametrize("name", ["boolq", "commonsense_qa", "arc_easy", "piqa", "winogrande"])
def test_chance_is_what_the_commonest_answer_gets(shared_data: Path, name: str) -> None:
    task = find_benchmark(name)
    items = read_items(task, shared_data / "evaluation" / "multiple_choice")
    golds = [item.gold for item in items]
    commonest = max(map(golds.count, set(golds))) / len(golds)
    chance = task.chance or 1 / len(items[0].choices)
    assert chance == pytest.approx(commonest, abs=0.005 if task.chance else 0.02)
    assert commonest - 1 / len(items[0].choices) > 0.1 or task.chance is None
