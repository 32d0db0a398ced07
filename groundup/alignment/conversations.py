"""Conversations to learn from: the generated tasks, or files of records with a "messages" list.

Files are read as the corpus reads its own: JSON lines, lists of JSON, Parquet, packed or not, folders, globs and
addresses. One conversation in ten is held out (and one at least), chosen by a hash of all that is said in it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from groundup.console import Console
from groundup.corpus.document import OnSetAside, Reason, SetAside
from groundup.corpus.reading.jsonl import Value, parse_json
from groundup.corpus.reading.refusal import RefusedError
from groundup.corpus.reading.sources import InputFiles, find_sources
from groundup.corpus.reading.values import check_writable, read_values
from groundup.errors import DataError
from groundup.evaluation import generate_tasks
from groundup.recipe import CorpusSettings
from groundup.tokenizer import Message
from groundup.tokenizer.special import ROLE_TOKENS

TASKS = "groundup:tasks"
HELD_OUT_SHARE = 10  # one conversation in so many
FIELD = "messages"


@dataclass(frozen=True)
class Conversations:
    """Conversations on both sides of the split, and how many records could not be used, by reason."""

    train: list[list[Message]]
    held_out: list[list[Message]]
    set_aside: dict[str, int]


def load_conversations(
    data: Sequence[str], n_tasks: int, seed: int, section: str, console: Console | None = None
) -> Conversations:
    """Read or generate conversations.

    Args:
        data: files, folders, globs or addresses of records with "messages", or groundup:tasks.
        n_tasks: conversations that groundup:tasks generates.
        seed: of the generator.
        section: of the recipe, in messages.
        console: is told what was set aside.

    Raises:
        DataError: a file is missing, or no conversation is left.
    """
    train: list[list[Message]] = []
    held_out: list[list[Message]] = []
    aside: list[SetAside] = []
    if TASKS in data:
        for task in generate_tasks(n_tasks, seed):
            (train if task.split == "train" else held_out).append(list(task.messages))
    found = _files(data, section)
    for messages in _read(found, aside.append):
        (train if _hash(messages) % HELD_OUT_SHARE else held_out).append(messages)
    if len(train) > 1 and not held_out:
        held_out.append(train.pop(min(range(len(train)), key=lambda place: _hash(train[place]))))
    counts = Counter(str(item.reason) for item in aside)
    if console is not None and (words := found.in_words()):
        console.note(f"[{section}] data: {words}.")
    if console is not None and aside:
        listed = ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())
        console.warn(f"[{section}] data: {len(aside):,} records were set aside ({listed}). The first: {aside[0]}")
    if not train or not held_out:
        first = f" The first that was set aside: {aside[0]}" if aside else ""
        raise DataError(
            f"[{section}] data = {list(data)}: {len(train)} conversations to learn from, {len(held_out)} held out.",
            'Each record needs {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]}; '
            f"a few dozen are the least.{first}",
        )
    return Conversations(train, held_out, dict(counts))


def data_fingerprint(data: Sequence[str], section: str) -> list[str]:
    """What stands for the data in a stage's fingerprint: the generator's name, and the files' digests.

    Raises:
        DataError: a file is missing.
    """
    return [*[TASKS] * (TASKS in data), *(source.digest() for source in _files(data, section).files)]


def _files(data: Sequence[str], section: str) -> InputFiles:
    named = [item for item in data if item != TASKS]
    return find_sources(named, setting=f"[{section}] data")


def _read(found: InputFiles, set_aside: OnSetAside) -> Iterator[list[Message]]:
    settings = CorpusSettings(text_field=FIELD)
    for item in found.aside:
        set_aside(item)
    for source in found.files:
        for value in read_values(source, settings, set_aside):
            try:
                yield _messages(value)
            except RefusedError as refused:
                set_aside(value.aside(source, refused))


def _messages(value: Value) -> list[Message]:
    """A record's conversation.

    Raises:
        RefusedError: there is none that could be learned.
    """
    items: Any = value.data.get(FIELD) if isinstance(value.data, Mapping) else None
    if isinstance(items, str):  # a cell of a table
        items, _ = parse_json(items.encode(errors="surrogatepass"), "", b"")
    if not isinstance(items, list) or not items:
        raise RefusedError(Reason.NO_TEXT, f"no list {FIELD!r}")
    messages: list[Message] = []
    for place, item in enumerate(items, start=1):
        role, content = (item.get("role"), item.get("content")) if isinstance(item, Mapping) else (None, None)
        if isinstance(role, dict | list) or role not in ROLE_TOKENS or not isinstance(content, str):
            raise RefusedError(Reason.NO_TEXT, f"message {place} has no text, or no role of {', '.join(ROLE_TOKENS)}")
        check_writable(content)
        if "\0" in content:
            raise RefusedError(Reason.NUL, f"in message {place}")
        messages.append({"role": role, "content": content})
    if not any(message["role"] == "assistant" and message["content"] for message in messages):
        raise RefusedError(Reason.EMPTY, "no answer in it")
    return messages


def _hash(messages: list[Message]) -> int:
    return xxhash.xxh3_64_intdigest(json.dumps(messages, ensure_ascii=False).encode())
