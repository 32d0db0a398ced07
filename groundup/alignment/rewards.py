"""What an answer is worth: prompts to answer, and the rewards of `reward = …` in a recipe.

    "groundup:verify"        1 if the answer is right, else 0: equal to the known one, or ending in the same number
                             where that is marked with "####" (GSM8K)
    "my_reward.py:score"     score(messages, answer, known) of the user's own; a number
    "reward"                 a stage that makes a reward model

A function that raises, hangs or returns no number has no reward for that answer (NaN), and is counted.
"""

from __future__ import annotations

import math
import multiprocessing
import re
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from groundup.alignment.conversations import GENERATED, load_conversations
from groundup.console import Console
from groundup.errors import DataError
from groundup.evaluation.sets import read_set
from groundup.tokenizer import Message, Tokenizer, render
from groundup.user_code import answer_calls, in_words, load_function

VERIFY = "groundup:verify"
VERIFIER_VERSION = 1
"""Of `is_right`: raised when it finds other answers right. Stages with rewards are then done again."""
_MARK = "####"
_NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")
_EXAMPLE = "def {name}(messages, answer, known): return 1.0 if answer == known else 0.0"


@dataclass(frozen=True)
class Prompt:
    """What is to be answered."""

    messages: list[Message]  # the conversation so far
    ids: list[int]  # the same, with what opens the answer
    known: tuple[str, ...]  # right answers, the one to learn from first; none where nobody knows


@dataclass(frozen=True)
class Prompts:
    """Prompts on both sides of the split, and how many have no room in the model's context."""

    train: list[Prompt]
    held_out: list[Prompt]
    too_long: int


def load_prompts(
    data: Sequence[str], n_tasks: int, seed: int, tokenizer: Tokenizer, room: int, section: str,
    console: Console | None = None,
) -> Prompts:  # fmt: skip
    """Prompts of conversations, whose last answers are the known ones.

    Args:
        data: files as for fine-tuning, or sets of tasks.
        n_tasks: that a set without a number generates.
        seed: of the generator.
        tokenizer: of the model.
        room: most tokens of a prompt.
        section: of the recipe, in messages.
        console: is told what was set aside.

    Raises:
        DataError: no prompt is left.
    """
    sides: tuple[list[Prompt], list[Prompt]] = ([], [])
    refused: list[DataError] = []
    too_long = 0

    def add(side: int, messages: Sequence[Message], known: tuple[str, ...]) -> None:
        nonlocal too_long
        try:
            ids = render(tokenizer, messages, add_generation_prompt=True).ids
        except DataError as error:  # the chat template of an imported model does not take it
            refused.append(error)
            return
        if len(ids) > room:
            too_long += 1
        else:
            sides[side].append(Prompt([*messages], ids, known))

    for name in data:
        for task in read_set(name, n_tasks, seed) if name.startswith(GENERATED) else ():
            add(task.split == "held_out", [{"role": "user", "content": task.prompt}], task.known)
    if files := [name for name in data if not name.startswith(GENERATED)]:
        found = load_conversations(files, 0, seed, section, console)
        for side, conversations in enumerate((found.train, found.held_out)):
            for messages in conversations:
                last = max(place for place, message in enumerate(messages) if message["role"] == "assistant")
                if last:
                    add(side, messages[:last], (messages[last]["content"],))
    if console is not None and too_long:
        console.warn(f"[{section}] data: {too_long:,} prompts have more than {room} tokens and were left out.")
    if console is not None and refused:
        console.warn(
            f"[{section}] data: {len(refused):,} prompts cannot be laid out and were dropped. The first: {refused[0]}"
        )
    if not all(sides):
        if refused:
            raise refused[0]
        raise DataError(
            f"[{section}] data = {list(data)}: {len(sides[0])} prompts to answer, {len(sides[1])} held out"
            + (f", {too_long:,} longer than {room} tokens." if too_long else "."),
            "Give conversations with a question, shorter ones, lower max_tokens, or raise the model's context_length.",
        )
    return Prompts(*sides, too_long)


def is_right(prompt: Prompt, answer: str) -> bool:
    """Whether an answer is one of the known ones; of a known one with a marked result, whether it ends in that."""

    def result(text: str) -> list[float]:
        """The last number, of what stands behind the mark if there is one."""
        numbers = _NUMBER.findall(text.rpartition(_MARK)[2])[-1:]
        return [float(number.replace(",", "").rstrip(".")) for number in numbers]

    for known in prompt.known:
        if _MARK in known and (wanted := result(known)):
            if result(answer.strip()) == wanted:
                return True
        elif answer.strip() == known.strip():
            return True
    return False


class FunctionReward:
    """The user's function, guarded.

    Args:
        spec: `file.py:function`; `groundup:verify` is `is_right`.
        where: in the recipe, for messages.
        seconds: that it may take for an answer; then it has failed.
        own_process: call it in a process of its own, which is ended if it hangs or dies.

    Attributes:
        is_verification: it is `is_right`.
        failures: of the last call, in words.

    Raises:
        DataError: there is no such function, or its file is not trusted.
    """

    def __init__(self, spec: str, where: str, *, seconds: float = 10.0, own_process: bool = False) -> None:
        self._spec, self.where, self._seconds = spec, where, seconds
        self.is_verification = spec == VERIFY
        self._function = None if self.is_verification else load_function(spec, where, _EXAMPLE)
        self._own_process = own_process and not self.is_verification
        self._worker: Any = None
        self.failures: list[str] = []

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        """The rewards; NaN where the function failed. `failures` says how."""
        self.failures = []
        return [self._one(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]

    def all_failed(self) -> DataError:
        """The error of a pass in which no answer has a reward."""
        first = "".join(f"; the first: {failure}" for failure in self.failures[:1])
        return DataError(f"{self.where}: it fails for all answers{first}.")

    def close(self) -> None:
        """End the process."""
        if self._worker is not None:
            process, pipe = self._worker
            process.kill()
            process.join()
            pipe.close()
            self._worker = None

    def _one(self, prompt: Prompt, answer: str) -> float:
        if self._function is None:
            return float(is_right(prompt, answer))
        arguments = prompt.messages, answer, prompt.known[0] if prompt.known else ""
        try:
            value = self._ask(arguments) if self._own_process else _in_time(self._seconds, self._function, arguments)
            reward = float(value) if not isinstance(value, str | bytes) else math.nan
        except (Exception, SystemExit) as error:
            self.failures.append(in_words(error))
            return math.nan
        if not math.isfinite(reward):
            self.failures.append(f"it returns {value!r:.80}, not a finite number")
            return math.nan
        return reward

    def _ask(self, arguments: tuple[Any, ...]) -> Any:
        if self._worker is None:
            context = multiprocessing.get_context("spawn")
            pipe, theirs = context.Pipe()
            process = context.Process(target=answer_calls, args=(self._spec, self.where, theirs), daemon=True)
            process.start()
            theirs.close()
            self._worker = process, pipe
            pipe.recv()  # its imports do not count
        _, pipe = self._worker
        try:
            pipe.send(arguments)
            if not pipe.poll(self._seconds):
                raise TimeoutError(f"no answer in {self._seconds:g} s")
            failed, value = pipe.recv()
        except (EOFError, OSError) as error:  # a TimeoutError is one of the latter
            self.close()
            raise RuntimeError(str(error) or "its process ended") from error
        if failed:
            raise RuntimeError(value)
        return value


def _in_time(seconds: float, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """What it returns, or TimeoutError after so long; only the main thread can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        return function(*arguments)

    def ring(*_: object) -> None:
        raise TimeoutError(f"no answer in {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return function(*arguments)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
