"""Conversations: read as the corpus reads its records, split by all that is said, and nothing lost without a word."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from groundup.alignment import Conversations, data_fingerprint, load_conversations
from groundup.console import Console
from groundup.errors import DataError
from groundup.tokenizer import Tokenizer, render


def talk(*said: str, roles: tuple[str, ...] = ("user", "assistant")) -> dict[str, Any]:
    return {"messages": [{"role": roles[n % len(roles)], "content": text} for n, text in enumerate(said)]}


TALKS = [talk(f"What is {n} plus one?", f"It is {n + 1}.") for n in range(60)]


def load(path: Path, console: Console | None = None) -> Conversations:
    return load_conversations([str(path)], 0, 1, "align.sft", console)


def lines(talks: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in talks)


@pytest.mark.parametrize(
    "name",
    ["mark.jsonl", "a.jsonl.gz", "list.json", "a.parquet", "cells.parquet", "cells.csv", "convs.anything", "folder"],
)
def test_every_file_of_records_gives_the_same_conversations(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        (path / "a.jsonl").write_bytes(lines(TALKS[:30]))
        (path / "b.json").write_text(json.dumps(TALKS[30:]))
    elif name.startswith("cells"):
        table = pa.table({"id": [*map(str, range(60))], "messages": [json.dumps(one["messages"]) for one in TALKS]})
        (csv.write_csv if name == "cells.csv" else pq.write_table)(table, path)
    elif name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(TALKS), path)
    else:
        stored = {".json": json.dumps(TALKS).encode(), ".gz": gzip.compress(lines(TALKS))}
        path.write_bytes(stored.get(path.suffix, b"\xef\xbb\xbf" + lines(TALKS)))
    found = load(path)
    assert found.set_aside == {}
    key = str
    assert sorted([*found.train, *found.held_out], key=key) == sorted([one["messages"] for one in TALKS], key=key)
    assert 0 < len(found.held_out) < 20
    assert len(data_fingerprint([str(path), "groundup:tasks"], "align.sft")) == 2 + (name == "folder")


FORMS = {
    "conversations": {"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}]},
    "prompt/response": {"prompt": "Q?", "response": "A."},
    "instruction/output": {"instruction": "Q?", "input": "", "output": "A."},
    "question/answer": {"question": "Q?", "answer": "A."},
    "prompt/completion": {"prompt": [{"role": "user", "content": "Q?"}], "completion": "A."},
}


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_that_people_have_are_found_and_said(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([FORMS[form]] * 20))
    (tmp_path / "b.jsonl").write_bytes(lines([talk("Q?", "A.")] * 9))
    found = load(tmp_path, Console())
    assert found.train[0] == talk("Q?", "A.")["messages"]
    said = " ".join(capsys.readouterr().err.split())
    assert f"a.jsonl: 20 records of {form}; b.jsonl: 9 records of messages." in said


def test_what_a_question_is_about_follows_it(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "Sort.", "input": "3 1", "output": "1 3"}] * 9))
    assert load(tmp_path / "a.json").train[0] == talk("Sort.\n\n3 1", "1 3")["messages"]


def test_a_tool_s_turn_is_a_turn(tmp_path: Path) -> None:
    roles = ("user", "assistant", "tool", "assistant")
    talks = [talk(f"q {n}", '{"look": "thermometer"}', "21", "It is 21.", roles=roles) for n in range(60)]
    (tmp_path / "a.jsonl").write_bytes(lines(talks))
    found = load(tmp_path / "a.jsonl")
    assert found.set_aside == {}
    tokenizer = Tokenizer.train(["It is 21."], vocab_size=300)
    assert tokenizer.role_id("tool") in render(tokenizer, found.train[0]).ids


def test_the_split_is_by_all_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([talk("Hi", "Hello", f"Q{n}", f"A{n}") for n in range(200)]))
    found = load(tmp_path / "a.jsonl")
    assert 10 <= len(found.held_out) <= 30
    assert not [one for one in found.held_out if one in found.train]
    (tmp_path / "a.jsonl").write_bytes(lines(TALKS[:2]))
    found = load(tmp_path / "a.jsonl")
    assert (len(found.train), len(found.held_out)) == (1, 1)


BAD = {
    b'{"messages": [{"role": "user", "content": "cut': "invalid JSON",
    b"[" * 100_000: "invalid JSON",
    b'{"messages": [], "messages": [1]}': "no text field",
    b'{"text": "no messages"}': "no text field",
    b'{"messages": {}}': "no text field",
    b'["messages"]': "no text field",
    b'{"messages": "no JSON"}': "invalid JSON",
    b'{"messages": "half \\ud800"}': "invalid UTF-8",
    json.dumps(talk("Hi", "Hello", roles=("user", "narrator"))).encode(): "no text field",
    b'{"messages": [{"role": "user", "content": null}]}': "no text field",
    b'{"messages": [{"role": ["user"], "content": "Hi"}]}': "no text field",
    b'{"messages": [7]}': "no text field",
    json.dumps(talk("Hi", "")).encode(): "empty",
    json.dumps(talk("Hi", "half \ud800")).encode(): "invalid UTF-8",
    json.dumps(talk("Hi", "a\0b")).encode(): "NUL characters",
}


@pytest.mark.parametrize("line", BAD, ids=[line[:40].decode() for line in BAD])
def test_a_bad_conversation_is_set_aside_counted_and_shown(
    tmp_path: Path, line: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(TALKS[:30]) + line + b"\n" + lines(TALKS[30:]))
    found = load(path, Console())
    assert found.set_aside == {BAD[line]: 1}
    assert len(found.train) + len(found.held_out) == 60
    said = " ".join(capsys.readouterr().err.split())
    assert f"[align.sft] data: 1 records were set aside (1 {BAD[line]})" in said
    assert "line 31" in said


def test_files_without_a_conversation_are_errors_that_say_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such file or folder.*\n.*\[align.sft\] data"):
        data_fingerprint([str(tmp_path / "nowhere")], "align.sft")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    with pytest.raises(DataError, match=r"0 conversations to learn from(.|\n)*no list .messages."):
        load(tmp_path / "a.jsonl")


def test_a_table_of_a_few_bytes_that_grows_without_end_is_not_read(tmp_path: Path) -> None:
    rows = pa.table({"messages": [" " * (130 << 20)]})
    pq.write_table(rows, tmp_path / "a.parquet", compression="zstd", use_dictionary=False, write_statistics=False)
    with pytest.raises(DataError, match="a decompression bomb"):
        load(tmp_path / "a.parquet")
