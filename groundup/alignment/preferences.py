"""Preferences to learn from: pairs and rankings of answers to one prompt, or single answers that are good or bad.

Each record is one of these; answers and prompts are strings or lists of messages:

    {"prompt" | "messages" | "instruction" (+ "input"): …, "chosen": …, "rejected": …}         a pair
    {"chosen": …, "rejected": …}     two whole conversations, or transcripts "\\n\\nHuman: … \\n\\nAssistant: …"
    {"prompt" | "messages": …, "ranking": [best, …, worst]}                                    a ranking
    {"prompt" | "messages": …, "completion": …, "label": true | false}                         one answer, judged

In a cell of a table, lists of messages are JSON text and labels "true" or "false". Files are read as the corpus reads
its own. One prompt in ten is held out with all that was said of it, chosen by a hash. A row of training is a record:
its answers side by side, as (rows, answers, seq).
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash

from groundup.alignment.conversations import (
    GENERATED,
    HELD_OUT_SHARE,
    count_reasons,
    messages_of,
    read_data,
    too_little,
)
from groundup.alignment.method import Inputs, RecordRows, RecordsSettings
from groundup.alignment.packing import COLUMNS, Text
from groundup.console import Console
from groundup.corpus.document import Reason
from groundup.corpus.reading.refusal import RefusedError
from groundup.errors import DataError
from groundup.evaluation.sets import read_set
from groundup.files import value_digest
from groundup.recipe import Texts, setting
from groundup.tokenizer import Message, Tokenizer, render
from groundup.training import IGNORED, Batch

_CELL = re.compile(r'\s*\[\s*\{\s*"(role|from|content|value)"\s*:')  # messages as JSON text, in a cell of a table
_TURN = re.compile(r"\n\n(Human|Assistant):[ \t]?")
FACTS = (
    ("preferences", "{preferences_train:,}"),
    ("held out", "{preferences_held_out:,}"),
    ("set aside", "{preferences_set_aside:,}"),
)
"""Of every method that learns them, in the report."""


class PreferenceSettings(RecordsSettings):
    """What every method can be told that learns preferences."""

    data: Texts = setting(
        ("groundup:tasks",),
        "preferences: files (JSON lines, JSON, Parquet, CSV, also packed) of pairs, rankings, or judged answers, or "
        "groundup:tasks",
        min_length=1,
    )
    examples: int = setting(6_000, "pairs that groundup:tasks generates", ge=100, le=10_000_000)


class Preference(NamedTuple):
    """What somebody preferred."""

    prompt: list[Message]  # the conversation so far
    answers: list[list[Message]]  # how it goes on, the best first; each ends with what the assistant says
    is_good: bool | None = None  # of a single answer, whether it is; None: there are several


@dataclass(frozen=True)
class Preferences:
    """Preferences on both sides of the split, and how many records could not be used, by reason."""

    train: list[Preference]
    held_out: list[Preference]
    set_aside: dict[str, int]

    def pairs(self) -> Preferences:
        """Every ranking as the pairs that it is made of, the better answer first; judged answers are left out."""
        return self.ranked().each(
            lambda one: [Preference(one.prompt, [*pair]) for pair in itertools.combinations(one.answers, 2)]
        )

    def ranked(self) -> Preferences:
        """Without the judged answers."""
        return self.each(lambda one: [one] if one.is_good is None else [])

    def judged(self) -> Preferences:
        """Every answer by itself: of pairs and rankings the best is good and the worst is bad."""

        def alone(one: Preference) -> list[Preference]:
            if one.is_good is not None:
                return [one]
            return [Preference(one.prompt, [one.answers[at]], is_good) for at, is_good in ((0, True), (-1, False))]

        return self.each(alone)

    def each(self, parts: Callable[[Preference], list[Preference]]) -> Preferences:
        """What a function makes of each of them."""
        train, held_out = ([part for one in side for part in parts(one)] for side in (self.train, self.held_out))
        return Preferences(train, held_out, self.set_aside)


def load_preferences(
    data: Sequence[str], section: str, console: Console | None = None,
    *, n_tasks: int = 6_000, seed: int = 1, limit: int | None = None,
) -> Preferences:  # fmt: skip
    """Read or generate preferences.

    Args:
        data: files, folders, globs or addresses of records, or sets (groundup:tasks, groundup:talk).
        section: of the recipe, in messages.
        console: is told what was set aside.
        n_tasks: pairs that groundup:tasks generates.
        seed: of the generator.
        limit: most to learn from.

    Raises:
        DataError: a file is missing, or one side of the split is empty.
    """
    read, aside = read_data(data, section, _preference, console)
    parsed = [one for _, one in read]
    prompts = [xxhash.xxh3_64_intdigest(json.dumps(one.prompt, ensure_ascii=False).encode()) for one in parsed]
    held_out = {prompt for prompt in prompts if prompt % HELD_OUT_SHARE == 0} or {min(prompts, default=0)}
    sides: list[list[Preference]] = [[], []]
    for prompt, one in zip(prompts, parsed, strict=True):
        sides[prompt in held_out].append(one)
    made = [task for name in data if name.startswith(GENERATED) for task in read_set(name, n_tasks, seed) if task.wrong]
    for number, task in enumerate(made):
        better, worse = task.pair(random.Random(f"{seed}/{number}"))
        asked = max(place for place, message in enumerate(task.messages) if message["role"] == "user")
        # A sum's right answer calls the calculator first: or what is preferred would be to guess.
        answers: list[list[Message]] = [
            [*task.messages[asked + 1 : -1], {"role": "assistant", "content": better}],
            [{"role": "assistant", "content": worse}],
        ]
        sides[task.split != "train"].append(Preference([{"role": "user", "content": task.prompt}], answers))
    if not all(sides):
        needs = '{"prompt": …, "chosen": …, "rejected": …}, a "ranking", or a "label"'
        what = f"{len(sides[0])} preferences to learn from, {len(sides[1])} held out"
        raise too_little(data, section, what, needs, aside)
    return Preferences(sides[0][:limit], sides[1], count_reasons(aside))


def _preference(data: Any) -> Preference:
    """A record as a preference.

    Raises:
        RefusedError: there is none that could be learned.
    """
    if not isinstance(data, Mapping):
        raise RefusedError(Reason.NO_TEXT, "no object")
    ranking, sides = data.get("ranking"), [data.get("chosen"), data.get("rejected")]
    is_good: bool | None = None
    if isinstance(ranking, list) and ranking:
        said = ranking
    elif sides != [None, None]:
        said = sides
    elif (is_good := {"true": True, "false": False}.get(str(data.get("label")).strip().lower())) is not None:
        said = [data.get("completion")]
    else:
        what = 'neither "chosen" and "rejected", nor "ranking", nor "completion" and "label"'
        raise RefusedError(Reason.NO_TEXT, what)
    prompt = _prompt(data)
    answers = [_said(value, "assistant") for value in said]
    if prompt is None or all(answer[0]["role"] != "assistant" for answer in answers):
        # Whole conversations: the prompt is what they have in common, the last turn never.
        turns = zip(*(answer[:-1] for answer in answers), strict=False)
        prompt = [one[0] for one in itertools.takewhile(lambda one: one.count(one[0]) == len(one), turns)]
        if not prompt:
            raise RefusedError(Reason.NO_TEXT, "no prompt, and the answers do not begin with the same turn")
        answers = [answer[len(prompt) :] for answer in answers]
    for answer in answers:
        if not answer or answer[-1]["role"] != "assistant" or not answer[-1]["content"].strip():
            raise RefusedError(Reason.EMPTY, "an answer in which the assistant says nothing")
    if len({json.dumps(answer) for answer in answers}) < len(answers):
        raise RefusedError(Reason.DUPLICATE, "two answers are the same, so neither is the better one")
    if len(answers) < 2 and is_good is None:
        raise RefusedError(Reason.EMPTY, "a ranking of fewer than two answers")
    return Preference(prompt, answers, is_good)


def _prompt(data: Mapping[str, Any]) -> list[Message] | None:
    """The conversation so far, if the record has it apart from the answers."""
    value = data.get("messages") if data.get("messages") is not None else data.get("prompt")
    if value is None and isinstance(value := data.get("instruction"), str) and isinstance(data.get("input"), str):
        value = f"{value}\n\n{data['input']}".strip()
    if value is None:
        return None
    messages = _said(value, "user")
    if len(messages) > 1 and messages[-1] == {"role": "assistant", "content": ""}:  # a transcript that asks for more
        messages.pop()
    return messages


def _said(value: Any, role: str) -> list[Message]:
    """A part of a conversation: messages, or JSON of such; "\\n\\nHuman: …\\n\\nAssistant: …"; or what `role` says."""
    if not isinstance(value, str) or _CELL.match(value):
        return messages_of([value] if isinstance(value, Mapping) else value)
    before, *parts = _TURN.split(value)
    if not parts or before.strip():
        return messages_of(value, role)
    who = ("user" if name == "Human" else "assistant" for name in parts[::2])
    return messages_of([{"role": role, "content": said.strip()} for role, said in zip(who, parts[1::2], strict=True)])


# Rows


@dataclass(frozen=True)
class Encoded:
    """A preference in tokens."""

    texts: list[Text]  # each prompt with one of its answers, whose tokens are the targets; the best first
    is_good: bool | None = None  # of a single answer
    # Of each text, what the model to start from gives for its answer: a sum of log-probabilities
    reference: np.ndarray | None = None


class PreferenceRows(RecordRows[Encoded]):
    """Rows of preferences.

    A batch has `ids` and `targets` (rows, answers, seq), padded on the right; where rankings differ in length, rows
    without a target stand for what is missing; `is_good` (rows,), and `reference` (rows, answers).

    For scores, texts are whole, with the end token, and `ends` (rows, answers) says where each ends (−1: there is none)
    in the place of `targets`.

    Args:
        preferences: both sides of the split.
        tokenizer: of the model.
        context_length: of the model. The oldest turns of a prompt are left out so that the longest answer fits; a
            preference of which not even that makes room is left out.
        seed: of the order.
        section: of the recipe, in messages.
        for_scores: answers are scored as wholes.

    Attributes:
        train, held_out: the preferences in tokens.
        shortened: how many lost turns of their prompt.
        left_out: how many did not fit.

    Raises:
        DataError: nothing fits.
    """

    def __init__(
        self, preferences: Preferences, tokenizer: Tokenizer, context_length: int, seed: int,
        section: str = "align", *, for_scores: bool = False,
    ) -> None:  # fmt: skip
        self.shortened = self.left_out = 0
        self.refused = []
        self.seed, self.set_aside = seed, sum(preferences.set_aside.values())
        self._tokenizer, self._most, self._for_scores = tokenizer, context_length, for_scores
        self.train, self.held_out = (
            [found for one in side if (found := self._encode(one)) is not None]
            for side in (preferences.train, preferences.held_out)
        )
        self.check_sides(
            f"[{section}]: of {self.left_out} preferences no answer fits into the model's context.",
            f"Raise [model] context_length = {context_length}, or use shorter answers.",
        )
        digest = xxhash.xxh3_128()
        for one in self.train:
            digest.update(str(one.is_good).encode())
            for part in itertools.chain.from_iterable(one.texts):
                digest.update(part.tobytes())
        self.fingerprint = value_digest([tokenizer.fingerprint, context_length, seed, for_scores, digest.hexdigest()])

    @classmethod
    def of_stage(
        cls, inputs: Inputs, preferences: Preferences | None, form: Callable[[Preferences], Preferences],
        *, for_scores: bool = False,
    ) -> PreferenceRows:  # fmt: skip
        """The rows of a stage, in a form: as pairs, as they are ranked, or judged one by one.

        Without preferences those that `settings.data` names.
        """
        settings, console, length = inputs.settings, inputs.console, inputs.model.config.context_length
        preferences = preferences or load_preferences(
            settings.data, inputs.section, console, n_tasks=settings.examples, seed=inputs.seed, limit=settings.limit
        )
        rows = cls(form(preferences), inputs.tokenizer, length, inputs.seed, inputs.section, for_scores=for_scores)
        if rows.left_out or rows.shortened:
            console.warn(
                f"{inputs.name}: {rows.left_out} preferences are longer than the context of {length} tokens and are "
                f"left out; {rows.shortened} lost their oldest turns."
            )
        rows.warn_of_refused(inputs, "preferences")
        return rows

    @property
    def most_answers(self) -> int:
        """Of one prompt."""
        return max(len(one.texts) for one in self.train)

    def length(self, one: Encoded) -> int:
        """Tokens of all its texts."""
        return sum(len(ids) for ids, _ in one.texts)

    def lay_out(self, chosen: Sequence[Encoded], n_rows: int | None = None) -> Batch:
        """Preferences as a batch, with empty rows up to `n_rows`."""
        n_rows, n_answers = n_rows or len(chosen), max(len(one.texts) for one in chosen)
        length = max(len(ids) for one in chosen for ids, _ in one.texts)
        length = max(length, min(-(-length // COLUMNS) * COLUMNS, self._most))
        ids = torch.full((n_rows, n_answers, length), self._tokenizer.pad_id)
        targets, ends = torch.full_like(ids, IGNORED), torch.full((n_rows, n_answers), -1)
        is_good, reference = torch.zeros(n_rows, dtype=torch.bool), torch.zeros(n_rows, n_answers)
        for row, one in enumerate(chosen):
            is_good[row] = bool(one.is_good)
            if one.reference is not None:
                reference[row] = torch.from_numpy(one.reference)
            for place, (own_ids, own_targets) in enumerate(one.texts):
                ends[row, place] = len(own_ids) - 1
                ids[row, place, : len(own_ids)] = torch.from_numpy(own_ids)
                targets[row, place, : len(own_ids)] = torch.from_numpy(own_targets)
        if self._for_scores:
            return {"ids": ids, "ends": ends}
        return {"ids": ids, "targets": targets, "is_good": is_good, "reference": reference}

    def figures(self) -> dict[str, float]:
        """What there is to learn from."""
        return {
            "preferences_train": len(self.train),
            "preferences_held_out": len(self.held_out),
            "preferences_shortened": self.shortened,
            "preferences_left_out": self.left_out,
            "preferences_set_aside": self.set_aside,
        }

    def _encode(self, one: Preference) -> Encoded | None:
        prompt = one.prompt
        while True:
            try:
                texts = [
                    encode_answer(self._tokenizer, prompt, said, for_scores=self._for_scores) for said in one.answers
                ]
            except DataError as error:
                self.refused.append(error)
                return None
            if max(len(ids) for ids, _ in texts) <= self._most:
                break
            if len(prompt) < 2:
                self.left_out += 1
                return None
            # What the system says stays, and a question goes with its answer.
            keep = prompt[:1] if prompt[0]["role"] == "system" and len(prompt) > 2 else []
            prompt = [*keep, *prompt[len(keep) + 1 :]]
            while len(prompt) > len(keep) + 1 and prompt[len(keep)]["role"] != "user":
                del prompt[len(keep)]
        self.shortened += len(prompt) < len(one.prompt)
        return Encoded(texts, one.is_good)


def encode_answer(
    tokenizer: Tokenizer, prompt: Sequence[Message], answer: Sequence[Message], *, for_scores: bool = False
) -> Text:
    """A prompt and its answer, of which what the assistant says is the targets; the end token is the last of them.

    For scores the last token is an input, too.
    """
    rendered = render(tokenizer, [*prompt, *answer], learned_from=len(prompt))
    ids = np.array(rendered.ids[: rendered.n_answered], dtype=np.int64)
    mask = np.array(rendered.loss_mask[: rendered.n_answered], dtype=bool)
    targets = np.where(mask, ids, IGNORED)[1:]
    return (ids, np.append(targets, IGNORED)) if for_scores else (ids[:-1], targets)
