"""Preferences: every format that people have, split by prompt, nothing lost without a word; the rows made of them."""

from __future__ import annotations

import functools
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import csv

from groundup.alignment.conversations import data_fingerprint
from groundup.alignment.preferences import Preference, PreferenceRows, Preferences, encode_answer, load_preferences
from groundup.console import Console
from groundup.errors import DataError
from groundup.evaluation.small_talk import generate_talk
from groundup.tokenizer import Tokenizer, render
from groundup.training import IGNORED

RECORDS = [{"prompt": f"What is {n} plus one?", "chosen": f"It is {n + 1}.", "rejected": "No."} for n in range(60)]


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def load(path: Path, console: Console | None = None, **options: Any) -> Preferences:
    return load_preferences([str(path)], "align.dpo", console, **options)


def written(path: Path, records: list[Any]) -> Path:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in records), "utf-8")
    return path


def everything(found: Preferences) -> list[Preference]:
    return sorted([*found.train, *found.held_out], key=str)


WANTED = sorted(
    (
        Preference([said("user", one["prompt"])], [[said("assistant", one[side])] for side in ("chosen", "rejected")])
        for one in RECORDS
    ),
    key=str,
)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "list.json", "a.parquet", "cells.csv"])
def test_every_file_gives_the_same_pairs(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    lines = b"".join(json.dumps(one).encode() + b"\n" for one in RECORDS)
    if name.endswith(("parquet", "csv")):
        (pq.write_table if name == "a.parquet" else csv.write_csv)(pa.Table.from_pylist(RECORDS), path)
    else:
        stored = {".json": json.dumps(RECORDS).encode(), ".gz": gzip.compress(lines)}
        path.write_bytes(stored.get(path.suffix, lines))
    found = load(path)
    assert found.set_aside == {}
    assert everything(found) == WANTED
    assert 0 < len(found.held_out) < 20
    assert data_fingerprint([str(path)], "align.dpo")


USER, GOOD, BAD = said("user", "Hi"), said("assistant", "Hello!"), said("assistant", "Go away.")
PAIR = Preference([USER], [[GOOD], [BAD]])
FORMATS = {
    "strings": {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go away."},
    "messages": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "messages in cells": {"prompt": json.dumps([USER]), "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])},
    "one message": {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
    "whole conversations": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "both": {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 3},
    "a vote": {"messages": [USER], "chosen": "Hello!", "rejected": "Go away."},
    "a ranking of two": {"messages": [USER], "ranking": ["Hello!", "Go away."]},
    "instructions": {"instruction": "Hi", "input": "", "output": "?", "chosen": "Hello!", "rejected": "Go away."},
    "transcripts": {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: Go away."},
    "a transcript that asks for more": {
        "prompt": "\n\nHuman: Hi\n\nAssistant:",
        "chosen": "Hello!",
        "rejected": "Go away.",
    },
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_that_people_have(tmp_path: Path, name: str) -> None:
    found = load(written(tmp_path / "a.jsonl", [*RECORDS, FORMATS[name]]))
    assert PAIR in everything(found)
    assert found.set_aside == {}


def test_rankings_judged_answers_and_what_is_made_of_them(tmp_path: Path) -> None:
    ranking = {"messages": [USER], "ranking": ["a", "b", "c"]}
    judged = [
        {"prompt": "Hi", "completion": text, "label": label}
        for text, label in (("Hello!", "true"), ("Go away.", False))
    ]
    found = load(written(tmp_path / "a.jsonl", [*RECORDS, ranking, *judged]))
    [one] = [one for one in everything(found) if len(one.answers) == 3]
    assert [answer[0]["content"] for answer in one.answers] == ["a", "b", "c"]
    pairs = [one for one in everything(found.pairs()) if one.prompt == [USER]]
    assert [[answer[0]["content"] for answer in one.answers] for one in pairs] == [["a", "b"], ["a", "c"], ["b", "c"]]
    single = [one for one in everything(found.judged()) if one.prompt == [USER]]
    assert {(one.answers[0][0]["content"], one.is_good) for one in single} == {
        ("a", True), ("c", False), ("Hello!", True), ("Go away.", False)
    }  # fmt: skip


def test_answers_differ_where_conversations_part(tmp_path: Path) -> None:
    talks = [[USER, GOOD, said("user", "More"), said("assistant", text)] for text in ("Yes", "No")]
    found = load(written(tmp_path / "a.jsonl", [*RECORDS, {"chosen": talks[0], "rejected": talks[1]}]))
    assert Preference(talks[0][:3], [[talk[3]] for talk in talks]) in everything(found)


BAD_RECORDS = {
    "duplicate": {"prompt": "Hi", "chosen": "a", "rejected": "a"},
    "empty": {"prompt": "Hi", "chosen": " ", "rejected": "a"},
    "empty ": {"messages": [USER], "ranking": ["a"]},
    "invalid JSON": '{"prompt": "Hi", "chosen": "a", "rej',
    "no text field": {"prompt": "Hi", "chosen": "a"},
    "no text field ": {"prompt": "Hi", "text": "a"},
    "no text field  ": [1, 2],
    "no text field   ": {"prompt": [{"role": "robot", "content": "Hi"}], "chosen": "a", "rejected": "b"},
    "no text field    ": {"chosen": "a", "rejected": "b"},
    "no text field     ": {"prompt": "Hi", "ranking": "[" * 100_000},
    "invalid JSON ": {"prompt": "Hi", "chosen": '[{"role": "assistant", "content": "a', "rejected": "b"},
    "empty  ": {"prompt": "Hi", "chosen": "[" * 100_000, "rejected": ""},
    "NUL characters": {"prompt": "Hi\0", "chosen": "a", "rejected": "b"},
}


@pytest.mark.parametrize("reason", BAD_RECORDS)
def test_a_bad_record_is_set_aside_counted_and_shown(
    tmp_path: Path, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "a.jsonl", [*RECORDS[:30], BAD_RECORDS[reason], *RECORDS[30:]])
    found = load(path, Console())
    assert found.set_aside == {reason.strip(): 1}
    assert everything(found) == WANTED
    assert f"1 {reason.strip()}" in " ".join(capsys.readouterr().err.split())


def test_nothing_to_learn_from(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="0 preferences to learn from"):
        load(written(tmp_path / "a.jsonl", [BAD_RECORDS["duplicate"]]))
    with pytest.raises(DataError, match="no such file"):
        load(tmp_path / "missing.jsonl")


def test_all_that_is_said_of_a_prompt_is_on_one_side(tmp_path: Path) -> None:
    records = [{**one, "rejected": text} for one in RECORDS for text in ("No.", "Never.", "What?")]
    found = load(written(tmp_path / "a.jsonl", records))
    sides = [{json.dumps(one.prompt) for one in side} for side in (found.train, found.held_out)]
    assert not sides[0] & sides[1]
    assert everything(load(written(tmp_path / "b.jsonl", records[::-1]))) == everything(found)
    assert len(load(tmp_path / "a.jsonl", limit=5).train) == 5


def test_generated_pairs() -> None:
    found = load_preferences(["groundup:tasks"], "align.dpo", n_tasks=300, seed=2)
    assert found == load_preferences(["groundup:tasks"], "align.dpo", n_tasks=300, seed=2)
    assert found != load_preferences(["groundup:tasks"], "align.dpo", n_tasks=300, seed=3)
    assert len(everything(found)) == 300
    assert 10 < len(found.held_out) < 60
    assert all(one.answers[0] != one.answers[1] for one in everything(found))


# Rows


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train([" ".join(one.values()) for one in RECORDS] * 3, vocab_size=320)


def test_targets_are_the_answers_and_their_end(tmp_path: Path) -> None:
    words = tokenizer()
    rows = PreferenceRows(load(written(tmp_path / "a.jsonl", RECORDS)), words, 96, seed=3)
    batch = rows.rows(0, 4)
    assert batch["ids"].shape == batch["targets"].shape == (4, 2, batch["ids"].shape[2])
    for row in range(4):
        for side in range(2):
            targets = batch["targets"][row, side]
            ids = targets[targets != IGNORED].tolist()
            assert ids[-1] == words.end_id
            assert words.decode(ids[:-1]) in ("No.", *(one["chosen"] for one in RECORDS))
            where = (targets != IGNORED).nonzero()[:, 0]
            assert batch["ids"][row, side, where[0]] == words.role_id("assistant")
            assert torch.equal(batch["ids"][row, side, where[1:]], targets[where[:-1]])
    prompt = [said("user", "Hi there")]
    whole = render(words, [*prompt, GOOD]).ids
    assert whole == [*render(words, prompt).ids, *render(words, [GOOD]).ids]


def test_rows_are_a_function_of_their_place(tmp_path: Path) -> None:
    rows = PreferenceRows(load(written(tmp_path / "a.jsonl", RECORDS)), tokenizer(), 96, seed=3)
    n = len(rows.train)
    whole = rows.rows(0, 2 * n)
    seen = {tuple(ids.tolist()) for ids in whole["ids"][:n, 0]}
    assert len(seen) == n == len({tuple(ids.tolist()) for ids in whole["ids"][n:, 0]})
    assert not torch.equal(whole["ids"][:n], whole["ids"][n:])
    part = rows.rows(n - 2, n + 3)
    width = part["ids"].shape[2]
    assert torch.equal(part["ids"], whole["ids"][n - 2 : n + 3, :, :width])
    held_out = list(rows.validation(4, None))
    assert sum(int((batch["targets"] != IGNORED).any(-1).all(-1).sum()) for batch in held_out) == len(rows.held_out)
    assert all(len(batch["ids"]) == 4 for batch in held_out)
    assert sum(len(batch["ids"]) for batch in rows.validation(4, 1)) == 4


def test_long_prompts_lose_their_oldest_turns(tmp_path: Path) -> None:
    long = [said("system", "Be kind."), said("user", "old " * 20), said("assistant", "gone " * 9), said("user", "Now?")]
    records = [{"messages": long, "chosen": "Yes.", "rejected": "No."}, {**RECORDS[0], "chosen": "word " * 80}]
    found = load(written(tmp_path / "a.jsonl", [*RECORDS, *records]))
    rows = PreferenceRows(found, tokenizer(), 64, seed=1)
    assert (rows.shortened, rows.left_out) == (1, 1)
    wanted = [*render(tokenizer(), [long[0], long[3], said("assistant", "Yes.")]).ids[:-1]]
    assert wanted in [one.texts[0][0].tolist() for one in (*rows.train, *rows.held_out)]
    with pytest.raises(DataError, match="no answer fits"):
        PreferenceRows(found, tokenizer(), 4, seed=1)


def test_real_data(shared_data: Path) -> None:
    pairs = load(shared_data / "preference" / "hh_harmless" / "pairs.jsonl.gz")
    assert len(everything(pairs)) > 1_100
    assert all(one.prompt[0]["role"] == "user" and len(one.answers) == 2 for one in pairs.train)
    ranked = load(shared_data / "instruct" / "oasst_sample" / "oasst_ranked_pairs.jsonl")
    assert len(everything(ranked)) > 700
    taught = load(shared_data / "instruct" / "llms_from_scratch" / "instruction-data-with-preference.json")
    assert len(everything(taught)) > 900
    assert (pairs.set_aside, ranked.set_aside, taught.set_aside) == ({"empty": 2}, {}, {"duplicate": 6})


def test_pairs_are_made_of_tasks():
    found = load_preferences(["groundup:tasks:200"], "align.dpo")
    assert len(found.train) + len(found.held_out) == 200
    assert not found.set_aside
    for one in found.train:
        better, worse = ([message["content"] for message in answer] for answer in one.answers)
        assert better != worse
        assert one.prompt[0]["role"] == "user"


def test_the_preferred_answer_to_a_sum_calls_the_calculator():
    tool = Tokenizer.train(["What is 3 * 4? It is 12. I do not know."] * 9, vocab_size=300)
    asked = {talk.prompt: talk for talk in generate_talk(1500, 1) if talk.before}
    found = [
        one for one in everything(load_preferences(["groundup:talk:1500"], "align.dpo")) if len(one.answers[0]) > 1
    ]
    assert {one.prompt[0]["content"] for one in found} == asked.keys() != set()
    for one in found:
        better, worse = one.answers
        assert better == [*asked[one.prompt[0]["content"]].before, better[-1]]
        assert [message["role"] for message in worse] == ["assistant"]
        _, targets = encode_answer(tool, one.prompt, better)
        learned = tool.decode([token for token in targets if token != IGNORED])
        assert learned == better[0]["content"] + better[-1]["content"]  # and not what the calculator says
