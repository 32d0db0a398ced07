"""Whom `groundup chat` talks to: a model of this process, or a server's."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
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


# Of an answer that breaks off, or of a server that speaks otherwise.
_NOT_UNDERSTOOD = (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError)


class Remote:
    """A server's models, over HTTP.

    Args:
        url: of the server, with or without /v1.
        key: that it wants.
        name: of the model; None: its first.
        seconds: that an answer may take; None: any time.

    Raises:
        GroundupError: no server answers there, it wants another key, or has no such model.
    """

    def __init__(self, url: str, key: str | None = None, name: str | None = None, seconds: float | None = None) -> None:
        self._url, self._key, self._seconds = url.rstrip("/").removesuffix("/v1"), key, seconds
        self.n_tokens = 0
        try:
            with self._open("/v1/models") as response:
                self.names: Sequence[str] = [one["id"] for one in json.load(response)["data"]]
        except _NOT_UNDERSTOOD:
            raise GroundupError(f"{url}: what answers there is no server of models.") from None
        if not self.names:
            raise GroundupError(f"{url}: this server has no model that is finished.")
        self.name = self.names[0]
        if name is not None:
            self.use(name)

    def stream(
        self, messages: Sequence[Message], params: SamplingParams, on_left_out: Callable[[int], None]
    ) -> Iterator[str]:
        """By the server; what does not fit it refuses, so nothing is left out."""
        body = {"model": self.name, "messages": messages, "stream": True, "stream_options": {"include_usage": True}}
        plain = SamplingParams()
        given = {one.name: getattr(params, one.name) for one in fields(params)}
        body |= {name: value for name, value in given.items() if value != getattr(plain, name)}
        body["max_tokens"] = params.max_tokens
        end = math.inf if self._seconds is None else time.monotonic() + self._seconds
        with contextlib.suppress(*_NOT_UNDERSTOOD), self._open("/v1/chat/completions", body) as response:
            for line in response:
                if time.monotonic() > end:
                    raise TimeoutError
                data = line.decode().removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                if not line.startswith(b"data:"):
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise GroundupError(event["error"]["message"])
                self.n_tokens += (event.get("usage") or {}).get("completion_tokens", 0)
                for choice in event["choices"]:
                    yield choice["delta"].get("content") or ""
        raise GroundupError("the connection broke while the answer was written.", "Ask again.")

    def use(self, name: str) -> None:
        """From the next question on."""
        if name not in self.names:
            raise GroundupError(f"/model {name}: the server has no such model.", _known(self.names))
        self.name = name

    def tell(self, messages: Sequence[Message], opinion: Mapping[str, Any]) -> str:
        """To the server, which keeps it beside its run."""
        with self._open("/feedback", {"model": self.name, "messages": messages, **opinion}) as response:
            return str(json.load(response)["folder"])

    def _open(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        try:
            data = None if body is None else json.dumps(body).encode()
            return urllib.request.urlopen(
                urllib.request.Request(self._url + path, data, headers), timeout=self._seconds
            )
        except urllib.error.HTTPError as error:
            try:
                message = str(json.load(error)["error"]["message"])
            except (ValueError, KeyError, TypeError):
                message = f"status {error.code}."
            fix = "Give it in GROUNDUP_API_KEY." if error.code == 401 else None
            raise GroundupError(f"{self._url}: {message}", fix) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            fix = "Start one: groundup serve runs/demo"
            raise GroundupError(f"{self._url}: no server answers there ({reason}).", fix) from None


def _known(names: Sequence[str]) -> str:
    return f"There are: {', '.join(names)}." if names else "There is only this one."
