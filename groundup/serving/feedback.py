"""What people think of answers, kept as data to learn from.

In: votes, rankings and corrections, from the page and from the terminal. Out, in a run's folder:

    preferences.jsonl     {"prompt": [messages], "chosen": "…", "rejected": "…"}     of two ranked answers, a correction
                          {"prompt": [messages], "ranking": ["best", …, "worst"]}    of more than two
                          {"prompt": [messages], "completion": "…", "label": true}   of one vote, up or down
    conversations.jsonl   {"messages": [messages, the answer]}                       of an up-vote, a correction

Every line also has "model" and "time". Fine-tuning reads conversations; the reward model and DPO read preferences.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
from filelock import FileLock

from groundup.errors import DataError
from groundup.files import write_error
from groundup.run import OWN_FOLDER

PREFERENCES, CONVERSATIONS = "preferences.jsonl", "conversations.jsonl"


class Feedback:
    """The two files of a folder; any number of programs may add to them at the same time.

    Args:
        folder: of a run, or of a model.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def take(self, model: str, messages: Sequence[Mapping[str, Any]], opinion: Mapping[str, Any]) -> None:
        """An opinion in the fields of `/feedback`: "vote" or "correction" with "answer", or "ranking"."""
        if "ranking" in opinion:
            self.rank(model, messages, opinion["ranking"])
        elif "correction" in opinion:
            self.correct(model, messages, opinion["answer"], opinion["correction"])
        else:
            self.vote(model, messages, opinion["answer"], is_good=opinion["vote"] == "up")

    def vote(self, model: str, messages: Sequence[Mapping[str, Any]], answer: str, *, is_good: bool) -> None:
        """One answer was good, or was not."""
        label = {"prompt": messages, "completion": answer, "label": is_good}
        self._add(model, [(PREFERENCES, label), *([(CONVERSATIONS, _said(messages, answer))] if is_good else [])])

    def rank(self, model: str, messages: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> None:
        """Answers to one prompt, best first.

        Raises:
            DataError: there are not two different ones.
        """
        answers = list(dict.fromkeys(answers))
        if len(answers) < 2:
            raise DataError("a ranking needs two different answers.")
        pair = {"chosen": answers[0], "rejected": answers[1]}
        self._add(model, [(PREFERENCES, {"prompt": messages, **(pair if len(answers) == 2 else {"ranking": answers})})])

    def correct(self, model: str, messages: Sequence[Mapping[str, Any]], answer: str, better: str) -> None:
        """What the answer should have been.

        Raises:
            DataError: the same, or nothing.
        """
        if not better.strip() or better == answer:
            raise DataError("a correction must say something else.")
        pair = {"prompt": messages, "chosen": better, "rejected": answer}
        self._add(model, [(PREFERENCES, pair), (CONVERSATIONS, _said(messages, better))])

    def _add(self, model: str, lines: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        seen = {"model": model, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        try:
            (self.folder / OWN_FOLDER).mkdir(exist_ok=True)
            with FileLock(self.folder / OWN_FOLDER / "feedback.lock"):
                for name, values in lines:
                    _append(self.folder / name, orjson.dumps({**values, **seen}) + b"\n")
        except OSError as error:
            raise write_error(self.folder / lines[0][0], error) from error


def _append(path: Path, line: bytes) -> None:
    """One whole line, behind whole lines: what a full disk or a kill left of the last one is ended first."""
    with path.open("a+b") as handle:
        size = handle.seek(0, os.SEEK_END)
        if size:
            handle.seek(size - 1)
            line = line if handle.read(1) == b"\n" else b"\n" + line
        handle.write(line)
        handle.flush()
        os.fsync(handle.fileno())


def _said(messages: Sequence[Mapping[str, Any]], answer: str) -> dict[str, Any]:
    return {"messages": [*messages, {"role": "assistant", "content": answer}]}
