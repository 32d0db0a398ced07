"""Whom `groundup chat` talks to: a model of this process, or a server's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from groundup.errors import GroundupError
from groundup.generation import Engine, SamplingParams, chat_request
from groundup.serving.feedback import keep
from groundup.tokenizer import Message, Tokenizer


class Partner(Protocol):
    """Somebody to talk to.

    Attributes:
        name: of the model.
        names: of the models to choose among.
        n_tokens: of all answers so far.
    """

    name: str
    names: Sequence[str]
    n_tokens: int

    def stream(
        self, messages: Sequence[Message], params: SamplingParams, on_left_out: Callable[[int], None]
    ) -> Iterator[str]:
        """The answer, piece by piece; `on_left_out` is told how many of the oldest messages did not fit."""
        ...

    def use(self, name: str) -> None:
        """Talk to another model from now on."""
        ...

    def tell(self, messages: Sequence[Message], opinion: Mapping[str, Any]) -> str:
        """Keep what somebody thinks of answers, in the fields of `/feedback`; where it is kept."""
        ...


class Local:
    """Models of this process.

    Args:
        name: of the first.
        engine: with the first; it keeps what it has read of the conversation.
        tokenizer: of the model.
        folder: where feedback goes, a run's or a model's.
        load: gives the engine and tokenizer of another name.
        names: that `load` knows.
    """

    def __init__(
        self, name: str, engine: Engine, tokenizer: Tokenizer, folder: Path | None = None,
        load: Callable[[str], tuple[Engine, Tokenizer]] | None = None, names: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.name, self.engine, self.tokenizer, self.names = name, engine, tokenizer, names
        self.n_tokens, self._folder, self._load = 0, folder, load

    def stream(
        self, messages: Sequence[Message], params: SamplingParams, on_left_out: Callable[[int], None]
    ) -> Iterator[str]:
        """By the engine. Errors as `chat_request`."""
        for chunk in self.engine.stream(chat_request(self.engine.model, self.tokenizer, messages, params, on_left_out)):
            self.n_tokens += len(chunk.ids)
            yield chunk.text

    def use(self, name: str) -> None:
        """Load it."""
        if self._load is None or name not in self.names:
            raise GroundupError(f"/model {name}: there is no such model.", _known(self.names))
        self.engine, self.tokenizer = self._load(name)
        self.name = name

    def tell(self, messages: Sequence[Message], opinion: Mapping[str, Any]) -> str:
        """Into the files of the run."""
        if self._folder is None:
            raise GroundupError("this model has no folder: there is no place for votes.")
        keep(self._folder, self.name, messages, opinion)
        return str(self._folder)


def _known(names: Sequence[str]) -> str:
    return f"There are: {', '.join(names)}." if names else "There is only this one."
