"""Exact match and the harness: answers, their grading, and the rows of the closing table."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from generation_models import random_model

from groundup.corpus import Document
from groundup.errors import ArtifactError, DataError
from groundup.evaluation import (
    Answer,
    check_tasks,
    compare,
    exact_match,
    generate_tasks,
    score_model,
    verify,
)
from groundup.model import Transformer, preset
from groundup.recipe import EvaluateSettings
from groundup.shards import write_shards
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


@pytest.fixture(scope="module")
def shards_folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    text = " ".join(task.prompt for task in ALL[:30])
    documents = [Document(split, text, "test", split=split) for split in ("train", "validation")]
    write_shards(documents, tokenizer, folder)
    return folder


def test_the_harness_scores_what_is_asked_for_and_only_that(parrot, tokenizer, shards_folder):
    text_only = score_model(parrot, tokenizer, settings=EvaluateSettings(), shards_folder=shards_folder)
    assert text_only.bits_per_byte is not None
    assert (text_only.exact_match, text_only.answers, text_only.generation_tokens_per_second) == (None, [], None)
    settings = EvaluateSettings(tasks=("groundup:tasks",), limit=20)
    scores = score_model(parrot, tokenizer, settings=settings, n_tasks=400, tasks_seed=1)
    held_out = [task for task in generate_tasks(400, 1) if task.split == "held_out"][:20]
    assert scores.bits_per_byte is None
    assert [answer.prompt for answer in scores.answers] == [task.prompt for task in held_out]
    assert scores.exact_match is not None
    assert scores.exact_match.n == sum(estimate.n for estimate in scores.by_kind.values()) == 20
    assert scores.exact_match.value * 20 == pytest.approx(sum(answer.correct for answer in scores.answers))


def test_scores_are_the_same_every_time_but_for_the_clock(tokenizer, shards_folder):
    model = random_model(vocab_size=tokenizer.vocab_size, context_length=96)
    settings = EvaluateSettings(tasks=("bits_per_byte", "groundup:tasks"), limit=10)
    one, two = (
        dataclasses.replace(
            score_model(model, tokenizer, settings=settings, shards_folder=shards_folder, n_tasks=200),
            generation_tokens_per_second=None,
        )
        for _ in range(2)
    )
    assert one == two


def test_shards_of_another_tokenizer_are_refused(parrot, shards_folder):
    other = Tokenizer.train(["another text"], vocab_size=300)
    with pytest.raises(ArtifactError, match="another tokenizer"):
        score_model(parrot, other, settings=EvaluateSettings(), shards_folder=shards_folder)


def test_an_unknown_task_is_named_with_the_nearest_one():
    with pytest.raises(DataError, match=r"'bits_per_bite' is not known[\s\S]*Did you mean 'bits_per_byte'"):
        check_tasks(["groundup:tasks", "bits_per_bite"])


def test_the_closing_rows_say_before_after_n_error_and_gate(parrot, tokenizer, shards_folder):
    fresh = Transformer(parrot.config).eval()
    settings = EvaluateSettings(
        tasks=("bits_per_byte", "groundup:tasks"),
        limit=10,
        gates={"min_bits_per_byte_drop": 50.0, "max_exact_match_before": 0.05},
    )
    models = {"initial": fresh, "base": fresh, "assistant": parrot}
    scores, summary = compare(models, tokenizer, settings=settings, shards_folder=shards_folder, n_tasks=200, seed=1)
    rows = {row["key"]: row for row in scores["rows"]}
    bits = rows["bits_per_byte"]
    assert bits["before"] == bits["after"]
    assert bits["gate"] == {"text": "falls by at least 50", "passed": False}
    assert rows["bits_per_byte_sft"]["before"] == bits["after"]
    assert rows["exact_match"]["gate"]["passed"]
    for row in rows.values():
        assert set(row["after"]) == {"value", "stderr", "n"}
    assert sum(kind["after"]["n"] for kind in scores["by_kind"].values()) == 10
    assert all(set(answer) == {field.name for field in dataclasses.fields(Answer)} for answer in scores["answers"])
    # Wall-clock figures are kept out of the scores, which must be the same on every run.
    assert "generation_tokens_per_second" not in scores
    assert summary["generation_tokens_per_second"] > 0
