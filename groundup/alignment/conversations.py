"""Conversations to learn from: the generated tasks, or JSONL files with a "messages" list per line.

Held-out conversations are chosen by a hash of the prompt, so that the same prompt is never on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import xxhash

from groundup.console import Console
from groundup.errors import DataError
from groundup.evaluation import generate_tasks
from groundup.files import file_digest
from groundup.tokenizer import Message

TASKS = "groundup:tasks"
HELD_OUT_SHARE = 10  # one prompt in so many
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Conversations:
    """Conversations on both sides of the split, and how many lines could not be used, by reason."""

    train: list[list[Message]]
    held_out: list[list[Message]]
    set_aside: dict[str, int]


def load_conversations(
    data: Sequence[str], n_tasks: int, seed: int, section: str, console: Console | None = None
) -> Conversations:
    """Read or generate conversations.

    Args:
        data: JSONL files, or groundup:tasks.
        n_tasks: conversations that groundup:tasks generates.
        seed: of the generator.
        section: of the recipe, in messages.
        console: is told what was set aside.

    Raises:
        DataError: a file is missing, or no conversation is left.
    """
    train: list[list[Message]] = []
    held_out: list[list[Message]] = []
    set_aside: dict[str, int] = {}
    for source in data:
        if source == TASKS:
            for task in generate_tasks(n_tasks, seed):
                (train if task.split == "train" else held_out).append(list(task.messages))
            continue
        for messages in _read_jsonl(Path(source), set_aside, section):
            (held_out if _is_held_out(messages) else train).append(messages)
    if set_aside and console is not None:
        listed = ", ".join(f"{count} {reason}" for reason, count in set_aside.items())
        console.warn(f"[{section}] data: set aside {listed}.")
    if not train or not held_out:
        raise DataError(
            f"[{section}] data = {list(data)}: {len(train)} conversations to learn from, {len(held_out)} held out.",
            'Each line needs {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]}; '
            "a few dozen lines are the least.",
        )
    return Conversations(train, held_out, set_aside)


def data_fingerprint(data: Sequence[str], section: str) -> list[str]:
    """What stands for the data in a stage's fingerprint: the generator's name or the file's digest.

    Raises:
        DataError: a file is missing.
    """
    prints = []
    for source in data:
        if source == TASKS:
            prints.append(source)
        elif Path(source).is_file():
            prints.append(file_digest(Path(source)))
        else:
            raise DataError(f"[{section}] data = {source!r}: no such file.", f"Name a JSONL file, or {TASKS}.")
    return prints


def _read_jsonl(path: Path, set_aside: dict[str, int], section: str) -> Iterator[list[Message]]:
    if not path.is_file():
        raise DataError(f"[{section}] data = {str(path)!r}: no such file.", f"Name a JSONL file, or {TASKS}.")
    for line in path.read_bytes().splitlines():
        if not line.strip():
            continue
        try:
            messages, reason = _as_messages(orjson.loads(line))
        except orjson.JSONDecodeError:
            messages, reason = None, "lines that are not JSON"
        if messages is None:
            set_aside[reason] = set_aside.get(reason, 0) + 1
        else:
            yield messages


def _as_messages(value: Any) -> tuple[list[Message] | None, str]:
    """A line's conversation, or None and what is wrong with it."""
    items = value.get("messages") if isinstance(value, Mapping) else None
    if not isinstance(items, list) or not items:
        return None, 'lines without a "messages" list'
    messages: list[Message] = []
    for item in items:
        if not isinstance(item, Mapping) or item.get("role") not in _ROLES or not isinstance(item.get("content"), str):
            return None, "lines with a message that has no known role or no text"
        messages.append({"role": item["role"], "content": item["content"]})
    if not any(message["role"] == "assistant" and message["content"] for message in messages):
        return None, "lines without an answer"
    return messages, ""


def _is_held_out(messages: list[Message]) -> bool:
    prompt = next((message["content"] for message in messages if message["role"] == "user"), "")
    return xxhash.xxh3_64_intdigest(prompt.encode("utf-8", "replace")) % HELD_OUT_SHARE == 0
