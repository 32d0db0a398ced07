"""Generated sets: answers, their grading, and what is scored of a model."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from generation_models import random_model

from groundup.errors import DataError
from groundup.evaluation import bits_per_byte, generate_tasks, score_model, verify
from groundup.evaluation.benchmarks import Item
from groundup.evaluation.measure import figures_of, kept_records, measure
from groundup.evaluation.sets import TASKS as SHORT_QUESTIONS
from groundup.evaluation.sets import GeneratedSet, task_digests
from groundup.evaluation.tasks import Task
from groundup.generation import Generation
from groundup.generation.calculator import write_call
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


def asked(model, tokenizer, tasks: list[Task], **settings):
    """The share of right answers to these tasks, and the records."""
    items = [Item(n, task.kind, task.prompt, target=task.answer, row={"asked": task}) for n, task in enumerate(tasks)]
    of_set = GeneratedSet(SHORT_QUESTIONS)
    records = measure(model, tokenizer, of_set, items, settings=EvaluateSettings(**settings))
    return figures_of(records)["exact_match"], records


def rights(records):
    return [record["outcomes"]["exact_match"] for record in records]


def test_right_answers_are_counted_in_the_tasks_order(parrot, tokenizer):
    estimate, records = asked(parrot, tokenizer, TASKS)
    assert (estimate.value, estimate.n, estimate.unit) == (1.0, 4, "prompts")
    assert [record["prompt"] for record in records] == [task.prompt for task in TASKS]
    assert [record["reply"] for record in records] == [task.expected for task in TASKS]
    assert [record["tokens"] for record in records] == [len(tokenizer.encode(task.expected)) + 1 for task in TASKS]


def test_wrong_answers_are_told_from_right_ones(parrot, tokenizer):
    swapped = [dataclasses.replace(task, answer="nonsense") for task in TASKS[:1]] + TASKS[1:]
    estimate, records = asked(parrot, tokenizer, swapped)
    assert estimate.value == 0.75
    assert rights(records) == [False, True, True, True]
    assert (records[0]["target"], records[0]["reply"]) == ("nonsense", TASKS[0].expected)


def test_an_answer_that_does_not_end_is_wrong(parrot, tokenizer):
    most = max(len(tokenizer.encode(task.expected)) for task in TASKS)
    cut_off = [task for task in TASKS if len(tokenizer.encode(task.expected)) == most]
    estimate, records = asked(parrot, tokenizer, cut_off, max_tokens=most)
    assert all(verify(task, record["reply"]) for task, record in zip(cut_off, records, strict=True))
    assert estimate.value == 0.0
    assert asked(parrot, tokenizer, cut_off, max_tokens=most + 1)[0].value == 1.0


def test_a_batch_is_answered_as_one_by_one(tokenizer):
    model = random_model(vocab_size=tokenizer.vocab_size, context_length=96)
    together = [record["reply"] for record in asked(model, tokenizer, ALL[:12])[1]]
    assert together == [asked(model, tokenizer, [task])[1][0]["reply"] for task in ALL[:12]]
    assert len(set(together)) > 3


def test_a_call_of_the_calculator_is_followed_by_its_result_and_the_answer(tokenizer, monkeypatch):
    said = {}

    def write(model, tokenizer, prompts, params, seeds=None):
        said.setdefault("prompts", []).append([tokenizer.decode(ids) for ids in prompts])
        text = write_call("3 * 4") if seeds is not None else "12"
        ids = tokenizer.encode(text)
        return [Generation(ids, "stop", text, end_id=tokenizer.end_id) for _ in prompts]

    monkeypatch.setattr("groundup.evaluation.measure.generate_batch", write)
    task = Task("sum", "How much is 3 * 4?", "3 * 4", "12", "It is {}.", "plain", ("13",))
    model = random_model(vocab_size=tokenizer.vocab_size, context_length=96)
    estimate, (record,) = asked(model, tokenizer, [task])
    assert (estimate.value, record["reply"]) == (1.0, "12")
    first, second = said["prompts"]
    assert second[0].startswith(first[0] + write_call("3 * 4"))
    assert "12" in second[0].removeprefix(first[0])
    assert record["tokens"] == len(tokenizer.encode(write_call("3 * 4"))) + len(tokenizer.encode("12")) + 2


def test_answers_are_kept_every_32_items(tokenizer, tmp_path, monkeypatch):
    def write(model, tokenizer, prompts, params, seeds=None):
        if 0 < len(prompts) < 32:
            raise MemoryError
        return [Generation([], "stop", "1", end_id=tokenizer.end_id) for _ in prompts]

    monkeypatch.setattr("groundup.evaluation.measure.generate_batch", write)
    items = [Item(n, "sum", task.prompt, row={"asked": task}) for n, task in enumerate(ALL[:70])]
    model = random_model(vocab_size=tokenizer.vocab_size, context_length=96)
    with pytest.raises(MemoryError):
        measure(model, tokenizer, GeneratedSet(SHORT_QUESTIONS), items, kept=tmp_path / "kept.jsonl")
    assert len(kept_records(tmp_path / "kept.jsonl", "")) == 64


TEXTS = [" ".join(task.prompt for task in ALL[:30])]


def test_what_is_asked_for_is_scored_and_only_that(parrot, tokenizer):
    text_only = score_model(parrot, tokenizer, EvaluateSettings(), texts=TEXTS)
    assert text_only.figures == {"bits_per_byte": dataclasses.asdict(bits_per_byte(parrot, TEXTS, tokenizer))}
    assert text_only.generation_tokens_per_second is None
    scores = score_model(parrot, tokenizer, EvaluateSettings(tasks=("groundup:tasks",), limit=20))
    held_out = [task for task in generate_tasks(10_000, 1) if task.split == "held_out"][:20]
    assert list(scores.figures) == ["exact_match"]
    assert [record["prompt"] for record in scores.records["groundup:tasks"]] == [task.prompt for task in held_out]
    exact = scores.figures["exact_match"]
    groups = scores.card["tasks"]["groundup:tasks"]["groups"]
    assert exact["n"] == sum(figures["exact_match"]["n"] for figures in groups.values()) == 20
    assert exact["value"] * 20 == pytest.approx(sum(rights(scores.records["groundup:tasks"])))


def test_scores_are_the_same_every_time_but_for_the_clock(tokenizer):
    model = random_model(vocab_size=tokenizer.vocab_size, context_length=96)
    settings = EvaluateSettings(tasks=("bits_per_byte", "groundup:tasks"), limit=10)
    one, two = (score_model(model, tokenizer, settings, texts=TEXTS) for _ in range(2))
    assert (one.card, one.records) == (two.card, two.records)
    other = score_model(model, tokenizer, settings, texts=TEXTS, seed=2)
    assert other.figures["bits_per_byte"] == one.figures["bits_per_byte"]
    prompts = [[record["prompt"] for record in found.records["groundup:tasks"]] for found in (one, other)]
    assert prompts[0] != prompts[1]


def test_the_speed_is_that_of_what_was_written_in_this_call(tokenizer, tmp_path, monkeypatch):
    model = random_model(vocab_size=tokenizer.vocab_size, context_length=96)
    settings, kept = EvaluateSettings(tasks=("groundup:tasks",), limit=6), tmp_path / "groundup-tasks.jsonl"
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)  # one second passes between two looks
    monkeypatch.setattr("groundup.evaluation.scorecard.time", clock)
    whole = score_model(model, tokenizer, settings, folder=tmp_path)
    n_tokens = [record["tokens"] for record in whole.records["groundup:tasks"]]
    assert whole.generation_tokens_per_second == sum(n_tokens)
    kept.write_text("".join(kept.read_text().splitlines(keepends=True)[:5]))
    assert score_model(model, tokenizer, settings, folder=tmp_path).generation_tokens_per_second == sum(n_tokens[4:])
    assert score_model(model, tokenizer, settings, folder=tmp_path).generation_tokens_per_second is None


def test_bits_per_byte_without_a_text_are_refused(parrot, tokenizer):
    with pytest.raises(DataError, match="needs a validation text"):
        score_model(parrot, tokenizer, EvaluateSettings())


def test_an_unknown_task_is_named_with_the_nearest_one():
    with pytest.raises(DataError, match=r"'bits_per_bite' is no task[\s\S]*Did you mean 'bits_per_byte'"):
        task_digests(EvaluateSettings(tasks=("groundup:tasks", "bits_per_bite")))
