"""Conversations to learn from: the generated tasks, or files of records in the forms that people have.

A record has a list of "messages", of "conversations" (ShareGPT), or a question and an answer in fields of their own
(prompt and response, instruction, input and output, question and answer). Files are read as the corpus reads its own:
JSON lines, lists of JSON, Parquet, CSV, packed or not, folders, globs and addresses. One conversation in ten is held
out (and one at least), chosen by a hash of all that is said in it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, TypeVar

import xxhash

from groundup.console import Console
from groundup.corpus.document import Reason, SetAside
from groundup.corpus.reading.jsonl import parse_json
from groundup.corpus.reading.refusal import RefusedError
from groundup.corpus.reading.sources import find_sources
from groundup.corpus.reading.values import check_writable, read_values
from groundup.errors import DataError
from groundup.evaluation.sets import fewer, read_set
from groundup.recipe import CorpusSettings
from groundup.tokenizer import Message
from groundup.tokenizer.special import ROLE_TOKENS

GENERATED = "groundup:"
HELD_OUT_SHARE = 10  # one conversation in so many
_MOST_LISTED = 8  # files whose forms are said
Parsed = TypeVar("Parsed")
_QUESTIONS = ("prompt", "instruction", "question", "query")
_MORE = ("input", "context")  # what a question is about, where it stands in a field of its own
_ANSWERS = ("response", "completion", "output", "answer")
_ROLES = {
    "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "function": "tool", "observation": "tool", **{role: role for role in ROLE_TOKENS},
}  # fmt: skip


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
        data: files, folders, globs or addresses of conversations, or sets of tasks (groundup:tasks, groundup:sums:500).
        n_tasks: conversations that a set without a number generates.
        seed: of the generator.
        section: of the recipe, in messages.
        console: is told what was set aside.

    Raises:
        DataError: a file is missing, or no conversation is left.
    """
    train: list[list[Message]] = []
    held_out: list[list[Message]] = []
    for name in data:
        for task in read_set(name, n_tasks, seed) if name.startswith(GENERATED) else ():
            (train if task.split == "train" else held_out).append(list(task.messages))
    read, aside = read_data(data, section, conversation_of, console)

    def digest(messages: list[Message]) -> int:
        return xxhash.xxh3_64_intdigest(json.dumps(messages, ensure_ascii=False).encode())

    for _, (_, messages) in read:
        (train if digest(messages) % HELD_OUT_SHARE else held_out).append(messages)
    if read and console is not None:
        forms = Counter((PurePath(name).name, form) for name, (form, _) in read).most_common()
        listed = [f"{name}: {n:,} records of {form}" for (name, form), n in forms[:_MOST_LISTED]]
        more = [f"and {len(forms) - _MOST_LISTED:,} more"] if len(forms) > _MOST_LISTED else []
        console.note(f"[{section}] data: {'; '.join(listed + more)}.")
    if len(train) > 1 and not held_out:
        held_out.append(train.pop(min(range(len(train)), key=lambda place: digest(train[place]))))
    if not train or not held_out:
        what = f"{len(train)} conversations to learn from, {len(held_out)} held out"
        needs = '{"messages": [{"role": "user", "content": …}, {"role": "assistant", …}]}, or a prompt and a response'
        raise too_little(data, section, what, needs, aside)
    return Conversations(train, held_out, count_reasons(aside))


def data_fingerprint(data: Sequence[str], section: str) -> list[str]:
    """What stands for the data in a stage's fingerprint: the generator's name, and the files' digests.

    Raises:
        DataError: a file is missing.
    """
    made = [name for name in data if name.startswith(GENERATED)]
    for name in fewer(made, 1):
        read_set(name, 1, 1)
    named = [name for name in data if name not in made]
    return [*made, *(source.digest() for source in find_sources(named, setting=f"[{section}] data").files)]


def read_data(
    data: Sequence[str], section: str, parse: Callable[[Any], Parsed], console: Console | None = None
) -> tuple[list[tuple[str, Parsed]], list[SetAside]]:
    """Every record of some files, with its file's name and as `parse` has it, and those that were set aside.

    Args:
        data: files, folders, globs or addresses; generated sets are passed over.
        section: of the recipe, in messages.
        parse: a record as it stands in its file, rows of CSV as objects; raises `RefusedError`.
        console: is told what was set aside.

    Raises:
        DataError: a file is missing.
    """
    named = [name for name in data if not name.startswith(GENERATED)]
    found, read = find_sources(named, setting=f"[{section}] data"), list[tuple[str, Parsed]]()
    aside = [*found.aside]
    for source in found.files:
        names: list[str] | None = None
        for value in read_values(source, CorpusSettings(text_field=""), aside.append):
            if source.kind == "separated":
                if names is None:
                    names = value.data
                    continue
                value = value._replace(data=dict(zip(names, value.data, strict=False)))
            try:
                read.append((source.label, parse(value.data)))
            except RefusedError as refused:
                aside.append(value.aside(source, refused))
    if console is not None and (words := found.in_words()):
        console.note(f"[{section}] data: {words}.")
    if console is not None and aside:
        listed = ", ".join(f"{n:,} {reason}" for reason, n in Counter(count_reasons(aside)).most_common())
        console.warn(f"[{section}] data: {len(aside):,} records were set aside ({listed}). The first: {aside[0]}")
    return read, aside


def count_reasons(aside: Sequence[SetAside]) -> dict[str, int]:
    """How many records were set aside, by reason."""
    return dict(Counter(str(item.reason) for item in aside))


def too_little(data: Sequence[str], section: str, what: str, needs: str, aside: Sequence[SetAside]) -> DataError:
    """The error of data in which there is too little to learn from and to hold out."""
    first = f" The first that was set aside: {aside[0]}" if aside else ""
    return DataError(
        f"[{section}] data = {list(data)}: {what}.", f"Each record needs {needs}; a few dozen are the least.{first}"
    )


def conversation_of(record: Any) -> tuple[str, list[Message]]:
    """The form of a record, and the conversation in it.

    Raises:
        RefusedError: there is none that could be learned.
    """
    record = record if isinstance(record, Mapping) else {}
    question, answer = (next((name for name in names if name in record), "") for names in (_QUESTIONS, _ANSWERS))
    if record.get("messages") is not None or record.get("conversations") is not None:
        form = "messages" if record.get("messages") is not None else "conversations"
        messages = messages_of(record[form])
    elif question and answer:
        about = next((name for name in _MORE if record.get(name)), "")
        form = "/".join(filter(None, (question, about, answer)))
        messages = messages_of(record[question], "user")
        if about:
            messages[-1]["content"] += f"\n\n{messages_of(record[about], 'user')[0]['content']}"
        messages += messages_of(record[answer], "assistant")
    else:
        raise RefusedError(Reason.NO_TEXT, 'no list "messages" or "conversations", and no prompt with a response')
    if not any(message["role"] == "assistant" and message["content"] for message in messages):
        raise RefusedError(Reason.EMPTY, "no answer in it")
    return form, messages


def messages_of(items: Any, role: str = "") -> list[Message]:
    """A list of messages, also of ShareGPT's; or the one message of a role that a text is.

    Raises:
        RefusedError: no messages, or what cannot be written.
    """
    if isinstance(items, str) and role:
        items = [{"role": role, "content": items}]
    elif isinstance(items, str):  # a cell of a table
        items, _ = parse_json(items.encode(errors="surrogatepass"), "", b"")
    if not isinstance(items, list) or not items:
        raise RefusedError(Reason.NO_TEXT, "no list of messages")
    messages: list[Message] = []
    for place, item in enumerate(items, start=1):
        fields = item if isinstance(item, Mapping) else {}
        said, content = fields.get("role", fields.get("from")), fields.get("content", fields.get("value"))
        known = _ROLES.get(said) if isinstance(said, str) else None
        if known is None or not isinstance(content, str):
            raise RefusedError(Reason.NO_TEXT, f"message {place} has no text, or no role of {', '.join(ROLE_TOKENS)}")
        check_writable(content)
        if "\0" in content:
            raise RefusedError(Reason.NUL, f"in message {place}")
        messages.append({"role": known, "content": content})  # type: ignore[typeddict-item]
    return messages
