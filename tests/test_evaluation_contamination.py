"""What a model learned from, wherever it learned it, is found in benchmarks: one pass for all of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_run import build_quietly, copy_of_finished, finished_run, tiny_recipe, write_texts

from groundup.corpus import stream_documents
from groundup.errors import ArtifactError
from groundup.evaluation.benchmarks import Item
from groundup.evaluation.contamination import contaminated_items, training_texts

QUESTION = "where does the quiet river bend beyond the old mill and the road that goes on for ever"


def item(number: int, *texts: str) -> Item:
    return Item(number, "", "", (), (), 0, "", {"question": texts[0], "choices": list(texts[1:])})


def test_one_pass_over_the_texts_serves_all_benchmarks() -> None:
    read = 0

    def texts() -> Iterator[str]:
        nonlocal read
        for place in range(600):
            read += 1
            yield f"Nothing, {place}." if place != 500 else f"So: {QUESTION.upper()}, he said; the sum of one and two."

    others = [item(3, "what is the sum of one and two"), item(8, "a", "b", QUESTION + " and a day")]
    short = [item(0, "one and two")]
    assert contaminated_items([[item(7, QUESTION)], others, short], texts()) == [{7}, {8}, set()]
    assert read == 600


@pytest.mark.parametrize(("ngram", "found"), [(8, {0}), (9, set())])
def test_so_many_words_in_a_row_count_as_the_user_says(ngram: int, found: set[int]) -> None:
    words = QUESTION.split()
    text = " ".join([*words[:8], "otherwise", *words[8:14]])
    assert contaminated_items([[item(0, QUESTION)]], [text], ngram) == [found]


def test_what_a_stage_learned_from_is_read_of_those_models_that_went_through_it(tmp_path: Path) -> None:
    talks = [
        {"messages": [{"role": "user", "content": f"{QUESTION} {n}"}, {"role": "assistant", "content": "There."}]}
        for n in range(40)
    ]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks), encoding="utf-8")
    asked = (
        f"align.sft.data={tmp_path / 'talks.jsonl'}",
        "evaluate.tasks=[]",
        "pretrain.tokens=2_000",
        "model.context_length=256",
    )
    run = build_quietly(tiny_recipe(write_texts(tmp_path / "texts.jsonl"), *asked), tmp_path / "tiny")
    learned = {name: [*training_texts(run.folder(name) / "model")] for name in ("pretrain", "sft")}
    documents = [document.text for document in stream_documents(run.folder("corpus"), "train")]
    assert learned["pretrain"] == documents
    assert learned["sft"][: len(documents)] == documents
    assert len(learned["sft"]) == len(documents) + 40
    items = [item(5, f"{QUESTION} 7")]
    assert [contaminated_items([items], learned[name]) for name in learned] == [[set()], [{5}]]


def test_questions_that_a_distilled_models_teacher_answered_are_read(tmp_path: Path) -> None:
    run = copy_of_finished(tmp_path)
    talk = {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "There."}]}
    (tmp_path / "talks.jsonl").write_text(json.dumps(talk) + "\n", encoding="utf-8")
    asked = f'align.draft={{method="distill", level="sequence", prompts=["{tmp_path / "talks.jsonl"}"]}}'
    run.create(tiny_recipe(write_texts(tmp_path / "texts.jsonl"), asked))
    texts = [*training_texts(run.folder("draft") / "model")]
    assert contaminated_items([[item(5, QUESTION)]], texts) == [{5}]
    assert len(texts) == 1 + len([*stream_documents(run.folder("corpus"), "train")])


def test_of_a_model_without_a_run_it_is_said_that_nobody_knows(tmp_path: Path) -> None:
    assert next(training_texts(finished_run().folder("sft") / "model"))
    with pytest.raises(ArtifactError, match="not known"):
        next(training_texts(tmp_path / "model"))
