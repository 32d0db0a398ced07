"""The terminal chat: prompt, stream the answer, keep the conversation and what was thought of it.

Ctrl-C stops the answer, not the program; Ctrl-D leaves. Lines that begin with / are commands.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from groundup.errors import GroundupError
from groundup.files import write_json
from groundup.generation import Engine, SamplingParams, chat_request
from groundup.generation.calculator import with_calculator
from groundup.measured import cache_root
from groundup.serving.feedback import keep

if TYPE_CHECKING:
    from groundup.serving.client import Remote
    from groundup.tokenizer import Message

_HELP = """A line that ends with \\ goes on in the next; on a terminal Alt-Enter does the same.
/help            this list
/reset           forget the conversation
/undo            take back the last question and answer
/again           answer the last question once more
/temperature T   0: always the most probable token
/settings        how tokens are drawn
/set NAME VALUE  change it: /set top_p 0.9
/system TEXT     what the assistant is told first; begins the conversation anew
/model [NAME]    the models there are, or talk to another
/good  /bad      what you think of the last answer
/better [TEXT]   TEXT is what it should have been; without TEXT: it is better than the one before /again
/save FILE       write the conversation as JSON
/quit            leave (also Ctrl-D)"""
_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens", "seed")


class Chat:
    """One conversation with a model.

    Args:
        partner: who answers.
        params: how tokens are drawn.
        system: the system message, or None.
    """

    def __init__(self, partner: Local | Remote, params: SamplingParams, *, system: str | None = None) -> None:
        self.partner, self.params = partner, params
        self._first: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages: list[Message] = list(self._first)
        self._n_answers = 0
        self._n_left_out = 0
        self._saved: set[str] = set()
        self._before_again: list[Message] = []  # the answer to the same question before this one

    def answer(self, text: str, *, echo: bool = True) -> str:
        """Ask, stream the answer to standard output where `echo` is set, and keep both.

        Raises:
            GroundupError: the question does not fit into the context, or the server fails; it is not kept.
        """
        turns: list[Message] = [*self.messages, {"role": "user", "content": text}]
        pieces: list[str] = []
        # Each answer of a talk has a seed of its own, so that /again can say something else.
        seed = self.params.seed
        params = self.params if seed is None else replace(self.params, seed=seed + self._n_answers)
        begin, before = 0.0, self.partner.n_tokens
        try:
            for piece in with_calculator(lambda said: self.partner.stream(said, params, self._left_out), turns):
                begin = begin or time.perf_counter()
                pieces.append(piece)
                if echo:
                    _write(printable(piece))
        except KeyboardInterrupt:
            if echo:
                _write(" …")
        if echo:
            _write("\n")
            seconds, n_tokens = time.perf_counter() - begin, self.partner.n_tokens - before
            if n_tokens > 1 and sys.stderr.isatty():
                _hint(f"({n_tokens} tokens, {(n_tokens - 1) / seconds:,.0f} tokens/s)")
        self._n_answers += 1
        self._before_again, self.messages = [], turns
        return "".join(pieces)

    def run(self) -> None:
        """Ask for lines until the end of input."""
        _hint(f"Talking to {self.partner.name}. /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves.")
        ask = reader()
        while True:
            try:
                line = ask().strip()
                while line.endswith("\\"):
                    line = f"{line[:-1].rstrip()}\n{ask().strip()}"
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
            typer.echo(_HELP)
        elif name == "/reset":
            self.messages = list(self._first)
            _hint("Forgotten.")
        elif name == "/system":
            self._first = [{"role": "system", "content": argument}] if argument else []
            self.messages = list(self._first)
            _hint("The conversation begins anew.")
        elif name == "/undo":
            if (taken := self._take_back()) is not None:
                _hint(f"Taken back: {printable(taken[0]['content'])}")
        elif name == "/again":
            if (taken := self._take_back()) is not None:
                self.answer(taken[0]["content"])
                self._before_again = taken[1:]
        elif name == "/temperature":
            self._set("temperature", argument)
            _hint(f"Temperature {self.params.temperature:g}.")
        elif name == "/set":
            self._set(*_split(argument))
        elif name == "/settings":
            typer.echo("\n".join(f"{one} {getattr(self.params, one)}" for one in _SETTINGS))
        elif name == "/model":
            if argument:
                self.partner.use(argument)
            listed = self.partner.names or [self.partner.name]
            _hint("\n".join(f"{'*' if one == self.partner.name else ' '} {one}" for one in listed))
        elif name in ("/good", "/bad"):
            self._tell({"vote": "up" if name == "/good" else "down"})
        elif name == "/better":
            self._better(argument)
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

    def _set(self, name: str, text: str) -> None:
        if name not in _SETTINGS:
            raise GroundupError(f"/set {printable(name)}: no such setting.", f"There are: {', '.join(_SETTINGS)}.")
        try:
            value = float(text) if isinstance(getattr(SamplingParams(), name), float) else int(text)
        except ValueError as error:
            raise GroundupError(f"{name} {text}: not a number.", "For example: /temperature 0.7") from error
        self.params = replace(self.params, **{name: value})  # type: ignore[arg-type]

    def _better(self, text: str) -> None:
        """A correction, or the verdict on two answers to the same question."""
        if text:
            self._tell({"correction": text})
            self.messages[-1] = {"role": "assistant", "content": text}
        elif not self._before_again:
            raise GroundupError("/better: there is one answer.", "Say what it should have been, or /again first.")
        elif self._before_again[:-1] != self._last_turn()[1:-1]:
            raise GroundupError("/better: the two called the calculator differently.", "Say what it should have been.")
        else:
            self._tell({"ranking": [self.messages[-1]["content"], self._before_again[-1]["content"]]})

    def _tell(self, opinion: Mapping[str, Any]) -> None:
        if len(self.messages) == len(self._first):
            raise GroundupError("nothing was said yet.")
        answer = {} if "ranking" in opinion else {"answer": self.messages[-1]["content"]}
        _hint(f"Kept in {self.partner.tell(self.messages[:-1], {**answer, **opinion})}.")

    def _take_back(self) -> list[Message] | None:
        """Remove the last question and its answer, and return them, if there are."""
        if len(self.messages) == len(self._first):
            _hint("Nothing was said yet.")
            return None
        taken = self._last_turn()
        del self.messages[-len(taken) :]
        return taken

    def _last_turn(self) -> list[Message]:
        """The last question, perhaps a call and its result, and the answer."""
        return self.messages[max(at for at, one in enumerate(self.messages) if one["role"] == "user") :]

    def _left_out(self, n_messages: int) -> None:
        if n_messages != self._n_left_out:
            _hint(f"(the oldest {n_messages} messages no longer fit into the model's context)")
        self._n_left_out = n_messages


class Local:
    """Models of this process, as `groundup.serving.client.Remote` has a server's.

    Args:
        name: of the first.
        engine: with the first, and its tokenizer; it keeps what it has read of the conversation.
        folder: where feedback goes, a run's or a model's.
        load: gives the engine of another name.
        names: that `load` knows.
    """

    def __init__(
        self, name: str, engine: Engine, folder: Path, load: Callable[[str], Engine], names: Sequence[str] = ()
    ) -> None:
        self.name, self.engine, self.names = name, engine, names
        self.n_tokens, self._folder, self._load = 0, folder, load

    def stream(
        self, messages: Sequence[Message], params: SamplingParams, on_left_out: Callable[[int], None]
    ) -> Iterator[str]:
        """The answer, piece by piece; `on_left_out` is told how many of the oldest messages did not fit.

        Errors are those of `chat_request`.
        """
        tokenizer = self.engine.tokenizer
        assert tokenizer is not None, "a chat's engine has one"
        for chunk in self.engine.stream(chat_request(self.engine.model, tokenizer, messages, params, on_left_out)):
            self.n_tokens += len(chunk.ids)
            yield chunk.text

    def use(self, name: str) -> None:
        """Talk to another model from now on."""
        if name not in self.names:
            known = f"There are: {', '.join(self.names)}." if self.names else "There is only this one."
            raise GroundupError(f"/model {name}: there is no such model.", known)
        self.engine, self.name = self._load(name), name

    def tell(self, messages: Sequence[Message], opinion: Mapping[str, Any]) -> str:
        """Keep what somebody thinks of answers, in the fields of `/feedback`; where it is kept."""
        keep(self._folder, self.name, messages, opinion)
        return str(self._folder)


def _split(line: str) -> tuple[str, str]:
    name, _, argument = line.partition(" ")
    return name, argument.strip()


def reader() -> Callable[[], str]:
    """How a line is asked for: with history and editing on a terminal, plainly elsewhere."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return input
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    cache_root().mkdir(parents=True, exist_ok=True)
    history = FileHistory(str(cache_root() / "chat_history"))
    session: PromptSession[str] = PromptSession(history=history, key_bindings=keys)
    return lambda: session.prompt("> ")


def printable(text: str) -> str:
    """Without control characters that would move the cursor or ring the bell."""
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _hint(text: str) -> None:
    """What is said about the talk, to standard error; what the model says goes to standard output."""
    typer.echo(text, err=True)
