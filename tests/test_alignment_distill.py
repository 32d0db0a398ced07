"""Distillation: the objective against its formula, and a draft that a model is sped up with."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from distill_job import FAST, made_shards, questions, random, run, tokenizer
from tiny_run import build_quietly, tiny_recipe, write_texts

from groundup.alignment import Conversations, SFTSettings, fine_tune
from groundup.alignment.distill import Distillation, DistillSettings, distill
from groundup.errors import DataError, RecipeError
from groundup.generation import Engine, Request, SamplingParams, chat_reply
from groundup.interop import load
from groundup.model import Transformer, preset
from groundup.recipe import parse_recipe
from groundup.stage import default_model
from groundup.tokenizer import render
from groundup.training import IGNORED, pass_flops
from groundup.training.metrics import read_log

WORKER = Path(__file__).with_name("distill_job.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{WORKER.parent}:{WORKER.parents[1]}"}


@pytest.fixture(scope="module", name="tokenizer")
def its_tokenizer():
    return tokenizer()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return made_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """One that says "the mat", whatever it is asked; its shards and some questions lie beside it."""
    folder, answer = tmp_path_factory.mktemp("teacher"), {"role": "assistant", "content": "the mat"}
    talks = [[{"role": "user", "content": f"{n} times?"}, answer] for n in range(60)]
    conversations = Conversations(talks[:50], talks[50:], {})
    tuning = SFTSettings(epochs=14, **FAST)
    fine_tune(random("ground-nano", 1), tokenizer(), tuning, out=folder, conversations=conversations)
    questions(folder / "asked.jsonl", 79), made_shards(folder / "shards")
    return folder


def test_the_loss_is_the_divergence_and_its_gradient_is_the_difference_of_the_laws(tokenizer, monkeypatch):
    monkeypatch.setattr("groundup.alignment.distill._SLICE_LOGITS", 5 * tokenizer.vocab_size)
    teacher, student = random("llama-nano", 1), random("ground-nano", 2)
    ids = torch.randint(0, tokenizer.vocab_size, (2, 12), generator=torch.Generator().manual_seed(3))
    targets = ids.roll(-1, 1)
    targets[0, 7:] = IGNORED
    batch, mask = {"ids": ids, "targets": targets}, targets != IGNORED
    objective = Distillation(teacher.config)
    term = objective.terms({"model": student, "teacher": teacher}, batch)["loss"]
    assert objective.counts(batch) == {"loss": int(mask.sum())}
    p, q = teacher(ids).log_softmax(-1), student(ids).log_softmax(-1)
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)[mask].sum()
    torch.testing.assert_close(term.total, expected)
    found = torch.autograd.grad(term.total, list(student.parameters()), allow_unused=True)
    exact = torch.autograd.grad(expected, list(student.parameters()), allow_unused=True)
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-4)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_student_comes_near_its_teacher_and_takes_up_where_it_was(tokenizer, shards, tmp_path):
    teacher = random("ground-nano", 1)
    options = {"tokens": 40 * 32, "own_tokens": 33 * 20, "batch_size": 4, "compile": False, "eval_tokens": 64}
    student = random("ground-nano", 2)
    given = {"teacher": teacher, "shards": shards}
    trained = distill(student, tokenizer, DistillSettings(**options), out=tmp_path / "a", **given)
    assert trained.summary["own_rows"] == 20
    none = DistillSettings(**{**options, "tokens": 1, "lr": 1e-9, "muon_lr": 1e-9})
    untrained = distill(random("ground-nano", 2), tokenizer, none, out=tmp_path / "b", **given)
    assert trained.summary["acceptance"] > untrained.summary["acceptance"]
    assert trained.summary["val_loss"] < untrained.summary["val_loss"]
    again = distill(random("ground-nano", 2), tokenizer, DistillSettings(**options), out=tmp_path / "c", **given)
    for one, other in zip(trained.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_the_teacher_wrote_is_kept_for_a_run_that_goes_on(tokenizer, shards, tmp_path, monkeypatch):
    teacher, settings = random("ground-nano", 1), {"batch_size": 4, "compile": False, "eval_tokens": 64}

    def own_rows(seed=1, **options):
        student = random("ground-nano", 2)
        options = DistillSettings(tokens=1, **settings, **options)
        made = distill(student, tokenizer, options, out=tmp_path, seed=seed, teacher=teacher, shards=shards)
        return made.summary["own_rows"]

    assert own_rows(own_tokens=33 * 7) == 7
    monkeypatch.setattr("groundup.alignment.distill.Engine.run", None)
    assert own_rows(own_tokens=33 * 7) == 7
    for other in ({"own_tokens": 33 * 8}, {"own_tokens": 33 * 7, "seed": 2}):
        with pytest.raises(TypeError):
            own_rows(**other)
    assert own_rows(own_tokens=32) == own_rows(own_tokens=33 * 9, own_share=0.0) == 0


def test_a_student_learns_the_answers_that_its_teacher_samples(tokenizer, shards, teacher, tmp_path, monkeypatch):
    """And only those: what was asked is not learned, and what did not come to its end is left out."""
    data = tmp_path / "asked.jsonl"
    questions(data, 79)
    with data.open("a") as file:  # a separator of lines for Unicode is none for JSON lines
        file.write(json.dumps({"prompt": "79\u2028times?", "response": "unknown"}) + "\n")
    settings = DistillSettings(
        level="sequence", prompts=(str(data),), own_share=0.8, tokens=8000, temperature=0.7, **FAST
    )  # fmt: skip

    def distilled():
        given = {"teacher": load(teacher / "model").model, "shards": shards}
        return distill(random("ground-nano", 2), tokenizer, settings, out=tmp_path / "student", **given)

    made = distilled()
    (kept,) = (tmp_path / "student").glob("own-text-*.jsonl")
    written = [talk for line in kept.read_bytes().splitlines()[:2] for talk in json.loads(line)]
    answers = Counter(talk[-1]["content"] for talk in written)
    assert answers.most_common(1)[0][0] == "the mat"
    asked = {talk[0]["content"] for talk in written}
    assert {"79\u2028times?"} < asked <= {*(f"{n} times?" for n in range(79)), "79\u2028times?"}
    assert made.summary["own_rows"] >= 30
    assert made.summary["replay_share"] == pytest.approx(0.2, abs=0.1)
    reply = chat_reply(made.model, tokenizer, [{"role": "user", "content": "7 times?"}], SamplingParams(temperature=0))
    assert reply.text == "the mat"
    # Its FLOPs are those of its tokens, and of the teacher's answers, of which a few without an end are not learned.
    said, _, (spent, _) = map(json.loads, kept.read_bytes().splitlines())
    teacher_config, config = load(teacher / "model").model.config, made.model.config
    answering = pass_flops(teacher_config, [len(render(tokenizer, talk).ids) - 1 for talk in said]) / 3
    assert answering <= spent < 1.5 * answering
    row = pass_flops(config, [length := min(config.context_length, teacher_config.context_length)])
    over = made.summary["flops"] - spent - -(-settings.tokens // length) * row
    assert 0 <= over <= settings.batch_size * row
    monkeypatch.setattr("groundup.alignment.distill.Engine.run", None)
    again = distilled()
    assert again.summary["val_loss"] == made.summary["val_loss"]
    assert again.summary["flops"] == made.summary["flops"]
    with pytest.raises(ValueError, match="name prompts"):
        DistillSettings(level="sequence")


def test_what_was_typed_stays_text_and_long_questions_are_left_out(tokenizer, shards, teacher, tmp_path, monkeypatch):
    """In what the teacher is asked there is one user's turn, and the opening of its own."""
    data, typed, asked = tmp_path / "asked.jsonl", "<|end|>5", []
    questions(data, 60)
    with data.open("a") as file:
        for question in (typed, "times " * 40):
            file.write(json.dumps({"prompt": question, "response": "unknown"}) + "\n")
    settings = DistillSettings(level="sequence", prompts=(str(data),), tokens=64, **FAST)

    def noted(self, requests, run=Engine.run, **options):
        asked.extend(request.ids for request in requests)
        return run(self, requests, **options)

    monkeypatch.setattr("groundup.alignment.distill.Engine.run", noted)
    given = {"teacher": load(teacher / "model").model, "shards": shards}
    distill(random("ground-nano", 2), tokenizer, settings, out=tmp_path / "student", **given)
    assert [*tokenizer.encode(typed)] in [ids[1:-2] for ids in asked]
    assert len({tuple(ids) for ids in asked}) == 61
    roles = {tokenizer.role_id(role) for role in ("system", "user", "assistant", "tool")}
    for ids in asked:
        assert [token for token in ids if token in roles] == [ids[0], ids[-1]]
        assert [place for place, token in enumerate(ids) if token == tokenizer.end_id] == [len(ids) - 2]


@pytest.mark.slow
def test_two_processes_distil_answers_as_one_does(teacher, tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER)]
    subprocess.run([sys.executable, *command, str(tmp_path / "two"), str(teacher)], env=ENVIRONMENT, check=True)
    run(tmp_path / "one", teacher)
    (one,), (two,) = ([*(tmp_path / name).glob("own-text-*.jsonl")] for name in ("one", "two"))
    assert one.name == two.name
    assert one.read_bytes() == two.read_bytes()  # which process wrote an answer decides nothing
    logs = [read_log(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) > 10
    for mine, theirs in zip(*logs, strict=True):
        assert mine.keys() == theirs.keys()
        assert {name: value for name, value in mine.items() if "loss" in name} == pytest.approx(
            {name: value for name, value in theirs.items() if "loss" in name}, abs=1e-5
        )


def test_prompts_without_a_question_are_refused(tokenizer, shards, tmp_path):
    data = tmp_path / "answers.jsonl"
    data.write_text('{"messages": [{"role": "assistant", "content": "Yes."}]}\n' * 20)
    given = {"teacher": random("ground-nano", 1), "shards": shards, "out": tmp_path / "out"}
    with pytest.raises(DataError, match=r"0 prompts to answer(.|\n)*with a question"):
        distill(random("ground-nano", 2), tokenizer, DistillSettings(prompts=(str(data),)), **given)


def test_models_of_other_tokens_are_refused(tokenizer, shards, tmp_path):
    other = Transformer(preset("ground-nano", vocab_size=99))
    with pytest.raises(DataError, match="the smaller model has 99 tokens"):
        distill(other, tokenizer, out=tmp_path, teacher=random("ground-nano", 1), shards=shards)


@pytest.mark.slow
def test_a_recipe_makes_a_draft_that_guesses_for_its_model(tmp_path):
    recipe = tiny_recipe(
        write_texts(tmp_path / "texts.jsonl"),
        'align.draft={method="distill", tokens=2000, own_tokens=500, batch_size=4, '
        'model={preset="ground-nano", n_layers=1}}',
    )
    run = build_quietly(recipe, tmp_path / "run")
    assert default_model(run.recipe, to_chat=True)[0] != "draft"
    model, draft = load(run.root, stage="pretrain"), load(run.root, stage="draft")
    assert draft.model.config.n_layers == 1
    request = [Request([1, 2, 3], SamplingParams(temperature=0, max_tokens=20)) for _ in range(2)]
    plain = Engine(model.model).run(request[:1])[0][0].ids
    assert Engine(model.model, draft=draft.model).run(request[1:])[0][0].ids == plain


def test_a_recipe_without_text_and_a_wrong_student_are_refused():
    with pytest.raises(RecipeError, match="n_heads"):
        parse_recipe('[align.draft]\nmethod = "distill"\nstart = "x"\nmodel = {n_heads = "many"}\n', "a.toml")
