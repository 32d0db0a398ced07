"""Exact match and the harness: answers, their grading, and what is scored of a model."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from generation_models import random_model

from groundup.errors import DataError
from groundup.evaluation import (
    Answer,
    bits_per_byte,
    check_tasks,
    exact_match,
    generate_tasks,
    score_model,
    verify,
)
from groundup.model import Transformer, preset
from groundup.recipe import EvaluateSettings
from groundup.tokenizer import Tokenizer, render

ALL = generate_tasks(120, seed=1)
TASKS = [next(task for task in ALL if task.kind == kind) for kind in ("capital", "larger", "repeat", "first_word")]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([message["content"] for task in ALL for message in task.messages], vocab_size=400)


@pytest.fixture(scope="module")
def parrot(tokenizer):
    """A model that has learned the answers to `TASKS` by heart."""
    model = Transformer(preset("ground-nano", vocab_size=tokenizer.vocab_size, context_length=96))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = [render(tokenizer, task.messages) for task in TASKS]
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in rows])
    learned = torch.tensor([row.loss_mask + [False] * (width - len(row.ids)) for row in rows])
    targets = ids.masked_fill(~learned, -100)[:, 1:]
    for _ in range(80):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    return model


def test_right_answers_are_counted_in_the_tasks_order(parrot, tokenizer):
    estimate, answers, tokens_per_second = exact_match(parrot, tokenizer, TASKS)
    assert estimate.value == 1.0
    assert (estimate.n, estimate.unit) == (4, "prompts")
    assert [answer.prompt for answer in answers] == [task.prompt for task in TASKS]
    assert [answer.reply for answer in answers] == [task.expected for task in TASKS]
    assert tokens_per_second > 0


def test_wrong_answers_are_told_from_right_ones(parrot, tokenizer):
    swapped = [dataclasses.replace(task, answer="nonsense") for task in TASKS[:1]] + TASKS[1:]
    estimate, answers, _ = exact_match(parrot, tokenizer, swapped)
    assert estimate.value == 0.75
    assert [answer.correct for answer in answers] == [False, True, True, True]
    assert answers[0] == Answer(TASKS[0].kind, TASKS[0].prompt, "nonsense", TASKS[0].expected, correct=False)


def test_an_answer_that_does_not_end_is_wrong(parrot, tokenizer):
    most = max(len(tokenizer.encode(task.expected)) for task in TASKS)
    cut_off = [task for task in TASKS if len(tokenizer.encode(task.expected)) == most]
    estimate, answers, _ = exact_match(parrot, tokenizer, cut_off, max_tokens=most)
    assert all(verify(task, answer.reply) for task, answer in zip(cut_off, answers, strict=True))
    assert estimate.value == 0.0
    assert exact_match(parrot, tokenizer, cut_off, max_tokens=most + 1)[0].value == 1.0


def test_a_batch_is_answered_as_one_by_one(tokenizer):
    model = random_model(vocab_size=tokenizer.vocab_size, context_length=96)
    together = exact_match(model, tokenizer, ALL[:12])[1]
    assert together == [exact_match(model, tokenizer, [task])[1][0] for task in ALL[:12]]
    assert len({answer.reply for answer in together}) > 3


def test_no_task_is_an_error(parrot, tokenizer):
    with pytest.raises(DataError, match="no held-out task"):
        exact_match(parrot, tokenizer, [])


TEXTS = [" ".join(task.prompt for task in ALL[:30])]


def test_the_harness_scores_what_is_asked_for_and_only_that(parrot, tokenizer):
    text_only = score_model(parrot, tokenizer, settings=EvaluateSettings(), texts=TEXTS)
    assert text_only.figures == {"bits_per_byte": bits_per_byte(parrot, TEXTS, tokenizer)}
    assert (text_only.answers, text_only.generation_tokens_per_second) == ([], None)
    settings = EvaluateSettings(tasks=("groundup:tasks",), limit=20)
    scores = score_model(parrot, tokenizer, settings=settings, n_tasks=400, seed=1)
    held_out = [task for task in generate_tasks(400, 1) if task.split == "held_out"][:20]
    assert list(scores.figures) == ["exact_match"]
    assert [answer.prompt for answer in scores.answers] == [task.prompt for task in held_out]
    exact = scores.figures["exact_match"]
    assert exact.n == sum(estimate.n for estimate in scores.by_kind.values()) == 20
    assert exact.value * 20 == pytest.approx(sum(answer.correct for answer in scores.answers))


def test_scores_are_the_same_every_time_but_for_the_clock(tokenizer):
    model = random_model(vocab_size=tokenizer.vocab_size, context_length=96)
    settings = EvaluateSettings(tasks=("bits_per_byte", "groundup:tasks"), limit=10)
    one, two = (
        dataclasses.replace(
            score_model(model, tokenizer, settings=settings, texts=TEXTS, n_tasks=200),
            generation_tokens_per_second=None,
        )
        for _ in range(2)
    )
    assert one == two
    other = score_model(model, tokenizer, settings=settings, texts=TEXTS, n_tasks=200, seed=2)
    assert other.figures["bits_per_byte"] == one.figures["bits_per_byte"]
    assert [answer.prompt for answer in other.answers] != [answer.prompt for answer in one.answers]


def test_bits_per_byte_without_a_text_are_refused(parrot, tokenizer):
    with pytest.raises(DataError, match="needs a validation text"):
        score_model(parrot, tokenizer, settings=EvaluateSettings())


def test_an_unknown_task_is_named_with_the_nearest_one():
    with pytest.raises(DataError, match=r"'bits_per_bite' is not known[\s\S]*Did you mean 'bits_per_byte'"):
        check_tasks(["groundup:tasks", "bits_per_bite"])
