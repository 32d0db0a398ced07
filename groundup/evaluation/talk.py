"""How an assistant talks: what fits a first message, what declines, what is polite.

`groundup:first-messages` asks 200 things that people type first (`data/first_messages.toml`): a greeting, who are you,
a story, what it cannot know, nonsense. An answer fits if it says what such an answer must say, by patterns; declining
what can be answered is counted by itself.
"""

from __future__ import annotations

import functools
import re
import tomllib
from dataclasses import dataclass
from importlib import resources

from groundup.evaluation.tasks import Task

CANNOT = ("unknown", "nonsense")
"""Kinds of first messages that may be declined."""


@dataclass(frozen=True)
class FirstMessage:
    """Something that people type first.

    Attributes:
        kind: of message, "greeting".
        text: what they type.
        fits: patterns, of which one must be found in an answer.
        least_words: that an answer must have.
    """

    kind: str
    text: str
    fits: tuple[str, ...]
    least_words: int

    def is_fitting(self, answer: str) -> bool:
        """Whether an answer says what it must; a story is none if it is declined."""
        if len(answer.split()) < self.least_words or (self.least_words and is_refusal(answer)):
            return False
        return any(re.search(pattern, answer, re.IGNORECASE) for pattern in self.fits)


@functools.cache
def first_messages() -> tuple[FirstMessage, ...]:
    """All of them."""
    found = []
    for kind, group in _lists().items():
        if isinstance(group, dict):
            for message in group["messages"]:
                text, fits = (message, group["fits"]) if isinstance(message, str) else (message[0], [message[1]])
                found.append(FirstMessage(kind, text, tuple(fits), group.get("least_words", 0)))
    return tuple(found)


def is_refusal(answer: str) -> bool:
    """Whether an answer declines."""
    return re.search(_lists()["refusal"], answer, re.IGNORECASE) is not None


@functools.cache
def _lists() -> dict:  # type: ignore[type-arg]
    text = (resources.files("groundup") / "data" / "first_messages.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def is_polite(task: Task, answer: str) -> bool:
    """Whether an answer is in a task's polite style, right or not."""
    before, _, after = task.form.partition("{}")
    said = answer.strip()
    return said.startswith(before) and said.endswith(after) and len(said) > len(before) + len(after)
