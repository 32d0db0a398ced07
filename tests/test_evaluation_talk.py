"""How an assistant talks: what fits a first message, and how drawn answers differ from the start's."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from rl_job import policy, tokenizer

from groundup.evaluation import generate_tasks
from groundup.evaluation.harness import METRICS, METRICS_OF_TASK, score_model
from groundup.evaluation.talk import FirstMessage, answers_to, first_messages, is_refusal, score_style
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


def test_the_style_of_drawn_answers_is_an_estimate_of_what_the_model_is():
    model = policy()
    same = score_style(model, tokenizer(), TASKS, start=policy(), max_tokens=4)
    assert same["kl_to_start"].value == pytest.approx(0.0, abs=1e-4)
    assert same["entropy"].value == pytest.approx(5.68, abs=0.1)  # nearly even over 300 tokens
    assert same["polite_share"].value == 0.0
    other = policy()
    with torch.no_grad():
        other.embed_tokens.weight.mul_(4)
    moved = score_style(other, tokenizer(), TASKS, start=model, max_tokens=4)
    assert moved["kl_to_start"].value > 3 * moved["kl_to_start"].stderr
    assert moved["entropy"].value < same["entropy"].value
    assert score_style(model, tokenizer(), TASKS, max_tokens=4).keys() == same.keys() - {"kl_to_start"}


def test_answers_are_greedy_and_end():
    one = answers_to(policy(), tokenizer(), ["a", "b"], 5)
    assert one.texts == answers_to(policy(), tokenizer(), ["a", "b"], 5, seed=2).texts


def test_the_harness_has_a_figure_for_every_task_that_is_asked_for():
    settings = EvaluateSettings(
        tasks=("groundup:style", "groundup:first-messages", "groundup:sums", "groundup:hard-tasks"),
        limit=4,
        max_tokens=4,
    )
    scores = score_model(policy(), tokenizer(), settings=settings, n_tasks=300, start=policy())
    unasked = ("bits_per_byte", "exact_match", *METRICS_OF_TASK["groundup:harm"])
    assert list(scores.figures) == [name for name in METRICS if name not in unasked]
    assert scores.figures["fitting_share"].n == 4
    assert scores.figures["exact_match_sums"].n == 4
