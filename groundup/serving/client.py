"""A client of OpenAI-compatible servers, ours or others': for `groundup chat --url`, and for judges."""

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
from typing import Any

from groundup.errors import GroundupError
from groundup.generation import SamplingParams
from groundup.tokenizer import Message

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
            for line in _lines(response, end):
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
            raise GroundupError(f"/model {name}: the server has no such model.", f"There are: {', '.join(self.names)}.")
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


def _lines(response: http.client.HTTPResponse, end: float) -> Iterator[bytes]:
    """Lines as they come, up to a moment of `time.monotonic`: bytes that never become a line take no longer.

    Raises:
        TimeoutError: it is past that moment.
    """
    begun = b""
    while read := response.read1():
        if time.monotonic() > end:
            raise TimeoutError
        *lines, begun = (begun + read).split(b"\n")
        yield from lines
    yield begun
