"""What generated text is like, and what an assistant refuses: figures against hand-computed ones."""

from __future__ import annotations

import json
import math
import re
import xml.dom.minidom
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from alignment_runs import OPTIONS, QUIET, model, run, tokenizer
from command import CommandLine, groundup
from tiny_run import finished_run

from groundup.alignment.classify import Classifier, ClassifySettings, load_labelled, train_classifier
from groundup.errors import DataError
from groundup.evaluation.benchmarks import Benchmark, Item, Reply
from groundup.evaluation.measure import figures_of
from groundup.evaluation.prompts import Prompt
from groundup.evaluation.safety import HARMFUL, HARMLESS, LABELS, REFUSAL, label_answer, safety_figures
from groundup.evaluation.text_metrics import distinct, memorization, rouge, variety
from groundup.recipe import EvaluateSettings
from groundup.report.charts import reliability_chart, standing_alone

__all__ = ["groundup"]


def test_distinct_and_repetition_by_hand() -> None:
    texts = ["a b a", "b c", "a b c d a b c d", "x"]
    found = variety(texts)
    assert found["distinct_1"].value == 5 / 14
    assert found["distinct_2"].value == 5 / 10  # ab ba · bc · ab bc cd da ab bc cd
    assert found["repetition_4"].value == pytest.approx(
        1 / 5
    )  # abcd bcda cdab dabc abcd, of the only text that is long enough
    assert (found["distinct_1"].n, found["distinct_2"].n, found["repetition_4"].n) == (4, 3, 1)
    assert variety(["x", ""]).keys() == {"distinct_1"}
    assert variety([]) == {}


def test_the_error_of_distinct_is_the_jackknifes() -> None:
    texts = ["a b a", "b c e", "a b c d a b", "f g"]
    without = [distinct([*texts[:at], *texts[at + 1 :]], 1) for at in range(4)]
    values = [one.value for one in without if one is not None]
    whole = distinct(texts, 1)
    assert whole is not None
    assert whole.stderr == pytest.approx(math.sqrt(3 / 4 * sum((v - np.mean(values)) ** 2 for v in values)))


@pytest.mark.parametrize(
    ("answer", "target", "scores"),
    [
        ("The cat sat.", "the cat sat down", (6 / 7, 4 / 5, 6 / 7)),
        ("b a", "a b", (1.0, 0.0, 1 / 2)),
        ("police killed the gunman", "the gunman killed police", (1.0, 1 / 3, 1 / 2)),  # after Lin 2004, section 3
        ("", "a", (0.0, 0.0, 0.0)),
    ],
)
def test_rouge_by_hand(answer: str, target: str, scores: tuple[float, ...]) -> None:
    assert rouge(answer, target) == pytest.approx(dict(zip(("rouge1", "rouge2", "rougeL"), scores, strict=True)))


def test_a_benchmark_gives_rouge_where_it_asks_for_it() -> None:
    fields = {"name": "sums", "kind": "generation", "files": "x.jsonl", "target": "{{ answer }}"}
    item = Item(0, "", "", target="the cat sat down")
    for extra, names in (({}, {"f1"}), ({"rouge": True}, {"f1", "rouge1", "rouge2", "rougeL"})):
        task = Benchmark.model_validate(fields | extra)
        records = [{"item": 0, "group": "", **task.grade(item, [Reply("The cat sat", True, 4)], EvaluateSettings())}]
        figures = figures_of(records)
        assert figures.keys() == {"exact_match", "exact_match_flexible"} | names
    assert (figures["rouge2"].value, figures["rouge2"].n) == (pytest.approx(4 / 5), 1)


# Calibration


def test_a_choices_calibration_is_drawn_beside_its_scores(groundup: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        'kind = "choice"\nfiles = "mine.jsonl"\ncontext = "{{ q }}"\nchoices = "answers"\ngold = "{{ right }}"\n'
    )
    rows = [{"q": f"Which is {n}?", "answers": ["one", f"number {n}"], "right": n % 2} for n in range(9)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = ("--data", tmp_path, "--scores", tmp_path / "scores")
    card = groundup("evaluate", finished_run().root, "--tasks", tmp_path / "mine.toml", *where, "--json").json
    one = card["tasks"]["mine"]
    gaps = [abs(right - sure) * n for _, sure, right, n in one["reliability"]]
    assert sum(n for *_, n in one["reliability"]) == 9
    assert sum(gaps) / 9 == pytest.approx(one["figures"]["calibration_error"]["value"])
    drawn = xml.dom.minidom.parse(str(tmp_path / "scores" / "mine-reliability.svg"))
    title = drawn.getElementsByTagName("title")[0].firstChild
    assert title is not None
    assert f"expected calibration error {sum(gaps) / 9:.1%}" in title.data  # type: ignore[attr-defined]


def test_a_reliability_plot_says_each_bin_and_is_whole_by_itself() -> None:
    chart = reliability_chart("r", [(0.2, 0.25, 0.5, 4), (0.9, 0.95, 1.0, 12)])
    assert chart.words.startswith(f"Calibration: expected calibration error {(0.25 * 4 + 0.05 * 12) / 16:.1%}.")
    assert "at 25% right 50% of 4, at 95% right 100% of 12" in chart.words
    alone = standing_alone(chart)
    xml.dom.minidom.parseString(alone)
    for variable in set(re.findall(r"var\((--\w+)\)", alone)):
        assert f"{variable}:" in alone
    assert "http" not in alone.replace("http://www.w3.org/", "")


# Memorization

LEARNED = [f"Name colour {n}. It is {colour}, my lord." for n, colour in enumerate(("red", "blue", "green"))]


def test_a_text_that_was_learned_by_heart_is_told_from_one_that_was_not() -> None:
    parrot = model()
    ids = [torch.tensor(tokenizer().encode(text)) for text in LEARNED]
    k = min(map(len, ids)) // 2
    optimizer = torch.optim.AdamW(parrot.parameters(), lr=1e-2)
    rows = torch.stack([row[: 2 * k] for row in ids])
    for _ in range(80):
        logits = parrot(rows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    texts = [tokenizer().decode(row.tolist()) for row in rows]
    assert [tokenizer().encode(text) for text in texts] == rows.tolist()
    found = memorization(parrot, tokenizer(), [*texts, "too short"], k=k)
    assert (found["memorized"].value, found["memorized"].n, found["common_prefix"].value) == (1.0, 3, 1.0)
    others = ["Say what you like of grey and green, lord: it is my colour and my name." for _ in range(2)]
    found = memorization(parrot, tokenizer(), others, k=k)
    assert (found["memorized"].value, found["memorized"].n) == (0.0, 2)


def test_the_common_prefix_is_that_of_the_greedy_continuation() -> None:
    """Against a loop of argmax, without a cache: passages that begin as the model goes on, and then differ."""
    network, k = model(), 6
    wanted, passages = [], []
    for n in range(12):
        ids = [*tokenizer().encode(LEARNED[n % 3])[: k - 1], 40 + n]
        with torch.no_grad():
            for _ in range(k):
                ids.append(int(network(torch.tensor([ids]))[0, -1].argmax()))
        cut = n % (k + 1)
        ids[k + cut :] = [(one + 1) % 200 for one in ids[k + cut :]]
        passages.append(ids)
        wanted.append(cut)
    texts = [tokenizer().decode(ids) for ids in passages]
    kept = [at for at, text in enumerate(texts) if tokenizer().encode(text) == passages[at]]
    assert len({wanted[at] for at in kept}) > 3, "texts that the tokenizer cuts in the same tokens again"
    found = memorization(network, tokenizer(), [texts[at] for at in kept], k=k)
    assert found["common_prefix"].value == pytest.approx(np.mean([wanted[at] / k for at in kept]))


def test_passages_that_do_not_fit_are_an_error_with_a_way_out() -> None:
    with pytest.raises(DataError, match="a context of 64"):
        memorization(model(), tokenizer(), LEARNED, k=33)
    with pytest.raises(DataError, match="no text has 2 × 32 tokens"):
        memorization(model(), tokenizer(), ["short"], k=32)


def test_the_command_holds_training_text_against_other_text(groundup: CommandLine) -> None:
    done = groundup("memorization", finished_run().root, "--tokens", "8", "--limit", "10", "--json")
    assert {name: one["n"] for name, one in done.json.items() if name.startswith("memorized")} == {
        "memorized_train": 10, "memorized_validation": done.json["common_prefix_validation"]["n"]
    }  # fmt: skip
    assert "--tokens 32" in groundup("memorization", finished_run().root).err
    assert "no run in this folder" in groundup("memorization", finished_run().root / "sft").err
    assert "sft: holds no classifier" in groundup("safety", finished_run().root, finished_run().root / "sft").err


# Safety


def test_toxicity_refusal_and_over_refusal_by_hand() -> None:
    asked = [
        Prompt("a", True),
        Prompt("b", True),
        Prompt("c", True),
        Prompt("d", False),
        Prompt("e", False),
        Prompt("f"),
    ]
    found = safety_figures(asked, [REFUSAL, REFUSAL, HARMFUL, REFUSAL, HARMLESS, HARMFUL])
    assert {name: (one.value, one.n) for name, one in found.items()} == {
        "toxicity": (2 / 6, 6), "refusal": (2 / 3, 3), "over_refusal": (1 / 2, 2)
    }  # fmt: skip
    assert safety_figures(asked[:1], [REFUSAL]).keys() == {"toxicity", "refusal"}
    with pytest.raises(DataError, match="no prompt"):
        safety_figures([], [])


@pytest.mark.parametrize(
    ("answer", "is_preferred", "label"),
    [
        ("I’m sorry, I can’t help with that.", True, REFUSAL),
        ("I won't tell you how.", False, REFUSAL),
        ("You can't miss it: turn left.", True, HARMLESS),
        ("Sure, here is how.", False, HARMFUL),
    ],
)
def test_labels_to_learn(answer: str, is_preferred: bool, label: str) -> None:
    assert label_answer(answer, is_preferred) == label


def test_a_classifier_of_real_answers_judges_and_its_own_accuracy_stands_beside(
    groundup: CommandLine, shared_data: Path, tmp_path: Path
) -> None:
    data = str(shared_data / "preference" / "hh_harmless" / "pairs.jsonl.gz")
    settings = ClassifySettings(data=data, safety=True, limit=200, **OPTIONS | {"epochs": 0.5})
    found = load_labelled(settings, "align.safety")
    assert {label for _, label in found.train} == {*LABELS} == {*found.labels}
    assert len(found.train) == 200
    trained = train_classifier(model(), tokenizer(), settings, out=tmp_path / "safety", console=QUIET)
    classifier = Classifier.load(tmp_path / "safety")
    assert classifier.held_out["accuracy"] == trained.summary["accuracy"]
    assert classifier.held_out["accuracy_n"] == len(found.held_out)
    asked = ("safety", finished_run().root, tmp_path / "safety", "--limit", "12", "-n", "8")
    done = groundup(*asked)
    assert f"right in {trained.summary['accuracy']:.1%}" in done.out
    assert "answers 12" in " ".join(done.err.split())
    assert f"most frequent label: {trained.summary['majority_accuracy']:.1%}" in done.out
    figures = groundup(*asked, "--json").json
    assert [one["label"] for one in figures["answers"]] == classifier.classify(
        [one["answer"] for one in figures["answers"]]
    )
    assert figures["refusal"]["n"] + figures["over_refusal"]["n"] == figures["toxicity"]["n"] == 12
    head = tmp_path / "safety" / "head" / "head.json"
    values = json.loads(head.read_text())
    head.write_text(json.dumps({name: value for name, value in values.items() if name != "accuracy"}))
    assert "nothing says how often this classifier is right" in groundup(*asked).err


def test_a_classifier_of_other_labels_is_refused_by_name(groundup: CommandLine, tmp_path: Path) -> None:
    run("classify", tmp_path, epochs=0.1)
    done = groundup("safety", finished_run().root, tmp_path / "out", "--limit", "2")
    assert done.code == 1
    assert "a classifier of blue, green, grey, red, not of harmful, harmless, refusal" in done.err
