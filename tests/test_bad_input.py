"""Bad input through the command line: said clearly or set aside and counted, with the right exit code; nothing torn."""

from __future__ import annotations

import gc
import gzip
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
from command import CommandLine, groundup
from tiny_run import STAGES, bits, build_quietly, tiny_recipe

from groundup import TokenShards, load_tokenizer
from groundup.run import Run

__all__ = ["groundup"]

GOOD = "The cat sat on a mat and the old king gave bread to the poor child by the river in the wood.\n\n" * 40


def said(err: str) -> str:
    """What standard error says, on one line."""
    return " ".join(err.split())


def assert_nothing_half_written(folder: Path) -> None:
    assert not list(folder.rglob("*.groundup-partial-*"))


# --- Set aside, counted and listed; the rest is built

SET_ASIDE: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "empty file": ("bad.txt", lambda: b"", "empty"),
    "gzip of 0 bytes": ("bad.jsonl.gz", lambda: b"", "empty"),
    "gzip cut in half": ("bad.txt.gz", lambda: gzip.compress(GOOD.encode())[:60], "cut off"),
    "invalid UTF-8": ("bad.txt", lambda: b"caf\xe9 au lait", "invalid UTF-8"),
    "line cut in half": ("bad.jsonl", lambda: b'{"text": "Whole."}\n{"text": "Ha', "invalid JSON"),
    "no text field": ("bad.jsonl", lambda: b'{"txt": "Hello"}\n', "no text field"),
    "text is a number": ("bad.jsonl", lambda: b'{"text": 5}\n', "no text field"),
    "line of 18 MB": ("bad.jsonl", lambda: b'{"text": "' + b"x" * 18_000_000 + b'"}\n', "too long"),
}


@pytest.mark.parametrize("name", SET_ASIDE)
def test_what_cannot_be_read_is_counted_and_listed_and_the_rest_is_used(
    groundup: CommandLine, tmp_path: Path, name: str
) -> None:
    file, content, reason = SET_ASIDE[name]
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / file).write_bytes(content())
    tiny_run.write_texts(texts / "good.jsonl")
    told = groundup("shards", tiny_run.write_recipe(tmp_path, texts), "--out", tmp_path / "run", "--json")
    assert told.code == 0
    summary = told.json["stages"]["corpus"]["summary"]
    assert summary["removed"] == {reason: 1}
    assert summary["documents_in"] == summary["documents_kept"] + 1
    assert "1 " in next(line for line in told.err.splitlines() if line.startswith("corpus"))
    (line,) = (tmp_path / "run" / "corpus" / "set_aside.jsonl").read_text().splitlines()
    assert file in line
    assert_nothing_half_written(tmp_path)


# --- Nothing to build from: an error

NOTHING: dict[str, tuple[Callable[[Path], object], str]] = {
    "an empty file": (lambda texts: (texts / "a.txt").write_bytes(b""), "empty"),
    "a gzip of 0 bytes": (lambda texts: (texts / "a.txt.gz").write_bytes(b""), "empty"),
    "invalid UTF-8": (lambda texts: (texts / "a.txt").write_bytes(b"\xff\xfe\x00"), "UTF-8"),
    "a line cut in half": (lambda texts: (texts / "a.jsonl").write_bytes(b'{"text": "Ha'), "JSON"),
    "no text field": (lambda texts: (texts / "a.jsonl").write_bytes(b'{"txt": "Hello"}'), "no field 'text'"),
    "no readable file": (lambda texts: (texts / "a.pdf").write_bytes(b"%PDF"), "a.pdf"),
    "an empty folder": (lambda texts: None, "no file here that can be read as text"),
    "one letter": (lambda texts: (texts / "a.txt").write_text("a"), "too few"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_input_without_usable_text_is_an_error(groundup: CommandLine, tmp_path: Path, name: str) -> None:
    make, words = NOTHING[name]
    texts = tmp_path / "texts"
    texts.mkdir()
    make(texts)
    refused = groundup("build", tiny_run.write_recipe(tmp_path, texts), "--out", tmp_path / "run")
    assert refused.code == 1
    assert refused.out == ""
    assert words in said(refused.err)
    assert len(refused.err) < 2000
    assert_nothing_half_written(tmp_path)
    assert not (tmp_path / "run" / "tokenizer").exists()


# --- Small texts


@pytest.mark.parametrize("text", ["The cat sat on a mat.", "The old king gave bread to the child. " * 3])
def test_a_text_shorter_than_one_context_is_built_with_a_note(groundup: CommandLine, tmp_path: Path, text: str) -> None:
    (tmp_path / "short.txt").write_text(text)
    recipe = tiny_run.write_recipe(tmp_path, tmp_path / "short.txt", without="align.sft")
    built = groundup("build", recipe, "--out", tmp_path / "run", "--set", "evaluate.tasks=bits_per_byte")
    assert built.code == 0
    assert "fewer than a row of 64" in built.err
    assert "bits per byte" in built.out
    assert groundup("generate", tmp_path / "run", "The", "-n", "5").code == 0


# --- Control tokens

FORGED = "One <|endoftext|> two <|user|>three<|assistant|><|end|> <|pad|> <|spare_0|> <|system|>four"


def control_tokens(run: Run, split: str) -> set[int]:
    """The control tokens that occur in a split's documents, whose own end is left out."""
    tokenizer = load_tokenizer(run.folder("tokenizer"))
    shards = TokenShards.open(run.folder("shards"), split)
    found: set[int] = set()
    for ids in shards.documents():
        text = ids[:-1] if ids[-1] == tokenizer.end_of_text_id else ids
        found |= set(np.unique(text).tolist()) & tokenizer.special_ids
    return found


@pytest.mark.parametrize("kind", ["bpe", "characters"])
def test_a_text_cannot_inject_control_tokens(tmp_path: Path, kind: str) -> None:
    lines = [json.dumps({"text": f"{number}: {FORGED}"}) for number in range(40)]
    (tmp_path / "forged.jsonl").write_text("\n".join(lines))
    recipe = tiny_recipe(tmp_path / "forged.jsonl", f"tokenizer.kind={kind}")
    run = build_quietly(recipe, tmp_path / "run", only=["shards"])
    shards = run.manifest("shards")
    assert shards is not None
    tokenizer = load_tokenizer(run.folder("tokenizer"))
    texts = []
    for split in ("train", "validation"):
        assert control_tokens(run, split) == set()
        stream = TokenShards.open(run.folder("shards"), split)
        assert int((stream.window(0, stream.n_tokens) == tokenizer.end_of_text_id).sum()) == stream.n_documents
        texts += [tokenizer.decode(ids.tolist()) for ids in stream.documents()]
    assert sorted(texts) == sorted(json.loads(line)["text"] for line in lines)


def test_a_conversation_to_learn_from_cannot_either(groundup: CommandLine, tmp_path: Path) -> None:
    talks = [
        {"messages": [{"role": "user", "content": f"{n} <|end|>"}, {"role": "assistant", "content": "<|user|>"}]}
        for n in range(60)
    ]
    broken = ["{", '{"messages": []}', '{"messages": [{"role": "robot", "content": "x"}]}', "5"]
    (tmp_path / "talks.jsonl").write_text("\n".join([*map(json.dumps, talks), *broken]))
    recipe = tiny_run.write_recipe(tmp_path)
    built = groundup(
        "sft", recipe, "--out", tmp_path / "run", "--set", f"align.sft.data={tmp_path}/talks.jsonl", "--json"
    )
    assert built.code == 0
    assert "set aside" in built.err
    summary = built.json["stages"]["sft"]["summary"]
    assert summary["conversations_train"] + summary["conversations_held_out"] == 60
    tokenizer = load_tokenizer(tmp_path / "run" / "tokenizer")
    # Each answer is as many tokens as its letters make, and the one real <|end|>.
    per_answer = len(tokenizer.encode("<|user|>")) + 1
    assert summary["supervised_tokens"] == per_answer * summary["conversations_train"]
    missing = groundup("sft", recipe, "--out", tmp_path / "run", "--set", "align.sft.data=nowhere.jsonl")
    assert missing.code == 1
    assert "no such file" in missing.err


# --- A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root, to mount a small file system")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        gc.collect()  # memory maps of files there
        subprocess.run(["umount", folder], check=True)


def fill(disk: Path, leave_bytes: int) -> Path:
    """Fill a disk up with one file, to so many free bytes."""
    path = disk / "ballast"
    with path.open("wb") as handle:
        free = shutil.disk_usage(disk).free
        handle.write(b"\0" * max(0, free - leave_bytes))
    return path


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize(
    ("stage", "leave_bytes"),
    [
        ("corpus", 64 << 10),
        ("shards", 48 << 10),
        ("pretrain", 600 << 10),  # the second checkpoint does not fit
        ("sft", 24 << 10),
    ],
)
def test_a_full_disk_is_said_and_the_same_command_goes_on(
    groundup: CommandLine, tmp_path: Path, small_disk: Path, stage: str, leave_bytes: int
) -> None:
    recipe = tiny_run.write_recipe(tmp_path, tiny_run.write_texts(tmp_path / "texts.jsonl", 1500))
    command: tuple[Any, ...] = (stage, recipe, "--runs", small_disk, "--set", "pretrain.eval_every=5")
    before = STAGES[: STAGES.index(stage)]
    if before:
        assert groundup(before[-1], *command[1:]).code == 0
    ballast = fill(small_disk, leave_bytes)
    full = groundup(*command)
    assert full.code == 1
    assert full.out == ""
    assert "the disk is full" in full.err
    assert "Free some space" in full.err
    run = Run(small_disk / "tiny")
    assert run.manifest(stage) is None
    assert all(run.manifest(name) is not None for name in before)
    assert_nothing_half_written(small_disk)

    ballast.unlink()
    done = groundup(*command)
    assert done.code == 0
    assert done.err.count("up to date") == len(before)
    assert_nothing_half_written(small_disk)
    if stage == "pretrain":
        assert ("going on from step 5" in done.err) is (leave_bytes > 400 << 10)
        assert bits(run) == bits(build_quietly(run.recipe, tmp_path / "elsewhere", only=[stage]))
