"""How an assistant talks: what fits a first message, and how drawn answers differ from the start's."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from rl_job import policy, tokenizer

from groundup.evaluation import generate_tasks, score_model
from groundup.evaluation.benchmarks import Item
from groundup.evaluation.measure import figures_of, measure
from groundup.evaluation.metrics import Estimate
from groundup.evaluation.sets import METRICS, METRICS_OF_TASK, STYLE, GeneratedSet
from groundup.evaluation.small_talk import FirstMessage, first_messages, is_refusal
from groundup.model import Transformer
from groundup.recipe import EvaluateSettings

TASKS = generate_tasks(300, 1)[:40]


def test_there_are_200_first_messages_of_ten_kinds():
    assert Counter(message.kind for message in first_messages()).most_common() == [
        (kind, 20) for kind in dict.fromkeys(message.kind for message in first_messages())
    ]
    assert len({message.text for message in first_messages()}) == len(first_messages()) == 200


def message(kind: str, text: str | None = None) -> FirstMessage:
    return next(one for one in first_messages() if one.kind == kind and text in (None, one.text))


@pytest.mark.parametrize(
    ("asked", "answer", "fits"),
    [
        (message("greeting"), "Good day to you!", True),
        (message("greeting"), "It is 35.", False),
        (message("who_are_you"), "I am Groundup, a small assistant.", True),
        (message("who_are_you"), "Dorothy", False),
        (message("thanks"), "You are welcome.", True),
        (message("unknown"), "I do not know that.", True),
        (message("unknown"), "It is five o'clock.", False),
        (message("nonsense"), "I do not understand that. Say it in other words.", True),
        (message("nonsense"), "Paris.", False),
        (message("known", "capital of italy"), "It is Rome.", True),
        (message("known", "capital of italy"), "It is romeo.", False),
        (message("story"), "The dog ran to the wood. " * 8, True),
        (message("story"), "The dog ran.", False),
        (message("story"), "I cannot tell stories. " * 12, False),
    ],
)
def test_what_fits(asked, answer, fits):
    assert asked.is_fitting(answer) is fits


def test_declining_is_seen():
    assert is_refusal("I cannot do that.")
    assert is_refusal("I don't know.")
    assert not is_refusal("It is a can of soup.")


def style(model: Transformer, start: Transformer | None = None) -> dict[str, Estimate]:
    items = [Item(n, task.kind, task.prompt, target=task.answer, row={"asked": task}) for n, task in enumerate(TASKS)]
    settings = EvaluateSettings(max_tokens=4)
    return figures_of(measure(model, tokenizer(), GeneratedSet(STYLE), items, settings=settings, start=start))


def test_the_style_of_drawn_answers_is_an_estimate_of_what_the_model_is():
    model = policy()
    same = style(model, policy())
    assert same["kl_to_start"].value == pytest.approx(0.0, abs=1e-4)
    assert same["entropy"].value == pytest.approx(5.68, abs=0.1)  # nearly even over 300 tokens
    assert same["polite_share"].value == 0.0
    other = policy()
    with torch.no_grad():
        other.embed_tokens.weight.mul_(4)
    moved = style(other, model)
    assert moved["kl_to_start"].value > 3 * moved["kl_to_start"].stderr
    assert moved["entropy"].value < same["entropy"].value
    assert style(model).keys() == same.keys() - {"kl_to_start"}


def test_there_is_a_figure_for_every_task_that_is_asked_for():
    tasks = ("groundup:style", "groundup:first-messages", "groundup:sums", "groundup:hard-tasks")
    scores = score_model(policy(), tokenizer(), EvaluateSettings(tasks=tasks, limit=4, max_tokens=4), start=policy())
    unasked = ("bits_per_byte", "exact_match", *METRICS_OF_TASK["groundup:harm"])
    assert {*scores.figures} == {name for name in METRICS if name not in unasked}
    assert scores.figures["fitting_share"]["n"] == 4
    assert scores.figures["exact_match_sums"]["n"] == 4
    assert {one["settings"]["chat"] for one in scores.card["tasks"].values()} == {True}
    drawn, greedy = (scores.card["tasks"][name]["settings"]["decoding"] for name in tasks[:2])
    assert (drawn["temperature"], drawn["max_tokens"], greedy["temperature"]) == (1.0, 4, 0.0)
