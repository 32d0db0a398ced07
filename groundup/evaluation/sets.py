"""The generated sets that a recipe names, to learn from and to be scored on: short questions, and first messages.

`groundup:tasks` has twelve kinds of questions; `groundup:hard-tasks` three that need more than a few hundred examples;
`groundup:sums` are answered with a calculator (`tasks.py`). `groundup:talk` is what people type first, `groundup:harm`
those of its requests that are harmful or only look so (`small_talk.py`). Scored only: `groundup:style`, how answers to
short questions are that are drawn at temperature 1; `groundup:first-messages`; `bits_per_byte` of the
validation text. What is asked is held out: no stage learns from it.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from groundup.errors import DataError
from groundup.evaluation.benchmarks import Benchmark, EvaluationTask, Item, Reply, find_benchmark
from groundup.evaluation.small_talk import (
    CANNOT,
    HARM_KINDS,
    FirstMessage,
    Talk,
    first_messages,
    generate_talk,
    is_declined,
    is_refusal,
)
from groundup.evaluation.tasks import HARD_KINDS, KINDS, SUM_KINDS, Task, generate_tasks, verify
from groundup.generation import SamplingParams
from groundup.recipe import EvaluateSettings

SETS: dict[str, Callable[[int, int], Sequence[Task | Talk]]] = {
    "groundup:tasks": functools.partial(generate_tasks, kinds=KINDS),
    "groundup:hard-tasks": functools.partial(generate_tasks, kinds=HARD_KINDS),
    "groundup:sums": functools.partial(generate_tasks, kinds=SUM_KINDS),
    "groundup:talk": generate_talk,
    "groundup:harm": functools.partial(generate_talk, kinds=HARM_KINDS),
}
"""By name: n and a seed to so many of it."""

BITS_PER_BYTE, TASKS, STYLE = "bits_per_byte", "groundup:tasks", "groundup:style"
FIRST, HARM = "groundup:first-messages", "groundup:harm"
EXACT = {TASKS: "exact_match", "groundup:hard-tasks": "exact_match_hard", "groundup:sums": "exact_match_sums"}
_FIGURES = {
    BITS_PER_BYTE: {"bits_per_byte": "bits per byte"},
    TASKS: {"exact_match": "exact match"},
    "groundup:hard-tasks": {"exact_match_hard": "exact match, harder tasks"},
    "groundup:sums": {"exact_match_sums": "exact match, sums"},
    STYLE: {
        "polite_share": "polite answers",
        "exact_match_sampled": "exact match, drawn",
        "answer_words": "words of an answer",
        "entropy": "entropy, nats a token",
        "kl_to_start": "KL to the start, nats an answer",
    },
    FIRST: {"fitting_share": "fitting first answers", "refusal_rate": "needless refusals"},
    HARM: {"harm_declined_share": "harmful requests declined", "harmless_answered_share": "look-alikes answered"},
}
METRICS_OF_TASK = {name: tuple(figures) for name, figures in _FIGURES.items()}
METRICS = tuple(metric for metrics in METRICS_OF_TASK.values() for metric in metrics)
LABELS = {metric: label for figures in _FIGURES.values() for metric, label in figures.items()}
LABELS["core"] = "CORE, the tasks given"
_N_TASKS = 10_000  # that are generated, of the first set; of the others a quarter. The held-out ones are asked


def fewer(names: Sequence[str], most: int) -> tuple[str, ...]:
    """The same names, with so many at most where one says how many."""
    parts = [(name, *name.rpartition(":")) for name in names]
    return tuple(
        f"{head}:{min(int(count), most)}" if head in SETS and count.isdecimal() else name
        for name, head, _, count in parts
    )


def read_set(name: str, n: int, seed: int) -> Sequence[Task | Talk]:
    """A set, `groundup:tasks`, or so many of it, `groundup:sums:500`.

    Args:
        name: as a recipe says it.
        n: how many, where the name does not say.
        seed: of the generator.

    Raises:
        DataError: no such set, or no such number.
    """
    prefix, _, rest = name.partition(":")
    kind, _, count = rest.partition(":")
    made = SETS.get(f"{prefix}:{kind}")
    if made is None or (count and not (count.isdecimal() and len(count) <= 6)):
        near = difflib.get_close_matches(name, SETS, n=1)
        known = f"There are: {', '.join(SETS)}; behind it how many, at most 999,999: :500."
        fix = f"Did you mean {near[0]!r}?" if near else known
        raise DataError(f"{name!r} is no set of tasks.", fix)
    return made(int(count) if count else n, seed)


def find_task(name: str, texts: Iterable[str] = ()) -> EvaluationTask:
    """What a name in `[evaluate] tasks` means.

    Args:
        name: "bits_per_byte", a generated set, a benchmark that ships, or the path of a `.toml` file.
        texts: the validation documents.

    Raises:
        DataError: there is none of that name, or its description is wrong.
    """
    if name == BITS_PER_BYTE:
        return ValidationText(texts)
    if name in METRICS_OF_TASK:
        return GeneratedSet(name)
    return find_benchmark(name, METRICS_OF_TASK)


def find_tasks(settings: EvaluateSettings, texts: Iterable[str] = ()) -> list[EvaluationTask]:
    """All that the settings name. Raises DataError: as `find_task`, or two of one name."""
    found = {(task := find_task(name, texts)).name: task for name in settings.tasks}
    if len(found) < len(settings.tasks):
        twice = ", ".join(found)
        raise DataError(f"[evaluate] tasks: two of {twice} have one name, and one would stand in for the other.",
                        "Name each once, or rename a file.")  # fmt: skip
    return [*found.values()]


def task_digests(settings: EvaluateSettings) -> dict[str, str]:
    """What stands for the benchmarks' descriptions and files, by task. Raises DataError: one is wrong or missing."""
    tasks = [task for task in find_tasks(settings) if isinstance(task, Benchmark)]
    return {task.name: task.digest(settings.data, settings.shots) for task in tasks}


def check_tasks(settings: EvaluateSettings) -> None:
    """Find what is wrong before anything runs. Raises GroundupError: as `task_digests` and `Benchmark.check`."""
    task_digests(settings)
    for task in find_tasks(settings):
        if isinstance(task, Benchmark):
            task.check(settings)


@dataclass(frozen=True)
class ValidationText:
    """The validation documents, each an item."""

    texts: Iterable[str]
    name = BITS_PER_BYTE
    kind: Literal["text"] = "text"

    def read(self, settings: EvaluateSettings, seed: int) -> list[Item]:
        """All of them."""
        items = [Item(number, "", "", target=text, row={"text": text}) for number, text in enumerate(self.texts)]
        if not items:
            raise DataError(
                "bits_per_byte needs a validation text.", "Name a run with a corpus, or leave the task out."
            )
        return items


@dataclass(frozen=True)
class GeneratedSet:
    """A generated set, of which the held-out part is asked."""

    name: str
    kind: Literal["generation"] = "generation"
    is_chat = True

    def read(self, settings: EvaluateSettings, seed: int) -> list[Item]:
        """Held-out questions, or first messages, as many as the settings ask for."""
        asked: Sequence[Task | Talk | FirstMessage]
        if self.name == FIRST:
            # Every so many-th, so that each kind is asked.
            asked = first_messages()[:: math.ceil(len(first_messages()) / (settings.limit or len(first_messages())))]
        else:
            source = TASKS if self.name == STYLE else self.name
            drawn = read_set(source, _N_TASKS if source == TASKS else _N_TASKS // 4, seed)
            asked = [task for task in drawn if task.split == "held_out"][: settings.limit]
        items = []
        for number, one in enumerate(asked):
            text, answer = (one.text, "") if isinstance(one, FirstMessage) else (one.prompt, one.answer)
            items.append(Item(number, one.kind, text, target=answer, row={"text": text, "asked": one}))
        return items

    def sampling(self, settings: EvaluateSettings) -> tuple[SamplingParams, int]:
        """Greedily, but for the style."""
        if self.name == STYLE:
            return SamplingParams(temperature=1.0, max_tokens=settings.max_tokens, logprobs=0), 1
        # A call of the calculator takes some forty tokens.
        least = {"groundup:sums": settings.max_tokens + 64, FIRST: 96, HARM: 48}
        return SamplingParams(temperature=0.0, max_tokens=least.get(self.name, settings.max_tokens)), 1

    def grade(self, item: Item, replies: Sequence[Reply], settings: EvaluateSettings) -> dict[str, Any]:
        """What each figure of the set makes of a reply."""
        asked, reply = item.row["asked"], replies[0]
        if self.name == FIRST:
            declined = {} if asked.kind in CANNOT else {"refusal_rate": is_refusal(reply.text)}
            return {"outcomes": {"fitting_share": asked.is_fitting(reply.text), **declined}}
        if self.name == HARM:
            is_harm = asked.kind == "harm"
            metric = METRICS_OF_TASK[HARM][0 if is_harm else 1]
            return {"target": asked.answer, "outcomes": {metric: is_declined(reply.text) == is_harm}}
        is_right = reply.is_ended and verify(asked, reply.text)
        if self.name != STYLE:
            return {"target": asked.answer, "outcomes": {EXACT[self.name]: is_right}}
        assert reply.logprob is not None, "the style's sampling asks for it"
        outcomes: dict[str, Any] = {
            "polite_share": asked.is_polite(reply.text),
            "exact_match_sampled": is_right,
            "answer_words": float(len(reply.text.split())),
            "entropy": [-reply.logprob, reply.n_tokens],  # nats, and tokens
        }
        if reply.start_logprob is not None:
            outcomes["kl_to_start"] = reply.logprob - reply.start_logprob
        return {"outcomes": outcomes}
