"""The terminal chat: prompt, stream the answer, keep the conversation.

Ctrl-C stops the answer, not the program; Ctrl-D leaves. Lines that begin with / are commands.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from groundup.errors import GroundupError
from groundup.files import write_json
from groundup.generation import Engine, SamplingParams, stream_chat

if TYPE_CHECKING:
    from groundup.model import Transformer
    from groundup.tokenizer import Message, Tokenizer

_HELP = """/help            this list
/reset           forget the conversation
/undo            take back the last question and answer
/again           answer the last question once more
/temperature T   0: always the most probable token
/save FILE       write the conversation as JSON
/quit            leave (also Ctrl-D)"""


class Chat:
    """One conversation with a model.

    Args:
        model: an assistant.
        tokenizer: of the model.
        params: how tokens are drawn.
        system: the system message, or None.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, params: SamplingParams, *, system: str | None = None
    ) -> None:
        self.model, self.tokenizer, self.params = model, tokenizer, params
        self._engine = Engine(model, tokenizer, slots=1)  # keeps what it has read of the conversation
        self._first: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages: list[Message] = list(self._first)
        self._n_answers = 0
        self._n_left_out = 0
        self._saved: set[str] = set()

    def answer(self, text: str, *, echo: bool = True) -> str:
        """Ask, stream the answer to standard output where `echo` is set, and keep both.

        Raises:
            GroundupError: the question does not fit into the context; it is not kept.
        """
        question: Message = {"role": "user", "content": text}
        pieces: list[str] = []
        # Each answer of a talk has a seed of its own, so that /again can say something else.
        seed = self.params.seed
        params = self.params if seed is None else replace(self.params, seed=seed + self._n_answers)
        try:
            conversation = [*self.messages, question]
            for piece in stream_chat(
                self.model, self.tokenizer, conversation, params, self._left_out, engine=self._engine
            ):
                pieces.append(piece)
                if echo:
                    _write(printable(piece))
        except KeyboardInterrupt:
            if echo:
                _write(" …")
        if echo:
            _write("\n")
        answer = "".join(pieces)
        self._n_answers += 1
        self.messages += [question, {"role": "assistant", "content": answer}]
        return answer

    def run(self, title: str) -> None:
        """Ask for lines until the end of input."""
        _hint(f"Talking to {title}. /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves.")
        ask = _reader()
        while True:
            try:
                line = ask().strip()
            except EOFError:
                break
            except KeyboardInterrupt:
                _hint("Ctrl-D leaves.")
                continue
            if line in ("/quit", "/exit"):
                break
            try:
                if line.startswith("/"):
                    self._obey(*_split(line))
                elif line:
                    self.answer(line)
            except GroundupError as error:
                _hint(str(error))

    def _obey(self, name: str, argument: str) -> None:
        if name == "/help":
            _write(_HELP + "\n")
        elif name == "/reset":
            self.messages = list(self._first)
            _hint("Forgotten.")
        elif name == "/undo":
            if (question := self._take_back()) is not None:
                _hint(f"Taken back: {printable(question)}")
        elif name == "/again":
            if (question := self._take_back()) is not None:
                self.answer(question)
        elif name == "/temperature":
            try:
                self.params = replace(self.params, temperature=float(argument))
            except ValueError as error:
                raise GroundupError(
                    f"/temperature {argument}: not a number.", "For example: /temperature 0.7"
                ) from error
            _hint(f"Temperature {self.params.temperature:g}.")
        elif name == "/save":
            if not argument:
                raise GroundupError("/save needs a file.", "For example: /save talk.json")
            if Path(argument).exists() and argument not in self._saved:
                raise GroundupError(f"{argument}: is there already.", "Save under another name.")
            write_json(Path(argument), self.messages)
            self._saved.add(argument)
            _hint(f"{argument}: written.")
        else:
            _hint(f"{printable(name)}: no such command. /help lists them.")

    def _take_back(self) -> str | None:
        """Remove the last question and its answer, and return the question, if there is one."""
        if len(self.messages) == len(self._first):
            _hint("Nothing was said yet.")
            return None
        question = self.messages[-2]["content"]
        del self.messages[-2:]
        return question

    def _left_out(self, n_messages: int) -> None:
        if n_messages != self._n_left_out:
            _hint(f"(the oldest {n_messages} messages no longer fit into the model's context)")
        self._n_left_out = n_messages


def _split(line: str) -> tuple[str, str]:
    name, _, argument = line.partition(" ")
    return name, argument.strip()


def _reader() -> Callable[[], str]:
    """How a line is asked for: with history and editing on a terminal, plainly elsewhere."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return input
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession()
    return lambda: session.prompt("> ")


def printable(text: str) -> str:
    """Without control characters that would move the cursor or ring the bell."""
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")


def _write(text: str) -> None:
    """What the model says, or what was asked for."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _hint(text: str) -> None:
    """What is said about the talk, to standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
