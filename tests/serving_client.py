"""A server in a thread of this process, and the smallest client: bytes to a socket, bytes back."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import uvicorn
from generation_models import random_model, small_tokenizer
from starlette.routing import BaseRoute

from groundup.generation import Engine
from groundup.model import Transformer
from groundup.serving.server import listen, make_server
from groundup.serving.state import ServedModel, State

JSON = {"Content-Type": "application/json"}


@functools.cache
def small_model(seed: int = 0) -> Transformer:
    """Random, with a row for each token of `small_tokenizer` and no other."""
    return random_model(seed=seed, vocab_size=small_tokenizer().vocab_size, context_length=1024)


def small_state(*names: str, slots: int = 4, **more: Any) -> State:
    """Models of these names (default: "small"), each other weights."""
    engines = [Engine(small_model(seed), small_tokenizer(), slots=slots) for seed in range(len(names) or 1)]
    return State([ServedModel(*pair) for pair in zip(names or ("small",), engines, strict=True)], **more)


@dataclass
class Served:
    """A running server.

    Attributes:
        state: what it serves.
        port: on 127.0.0.1.
        server: uvicorn's.
    """

    state: State
    port: int
    server: uvicorn.Server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def engine(self) -> Engine:
        return self.state.find(None).engine

    def ask(
        self, path: str, body: Any = None, *, method: str | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, what the JSON holds (else bytes) and headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        sent = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        try:
            connection.request(method or ("GET" if body is None else "POST"), path, sent, {**JSON, **(headers or {})})
            answer = connection.getresponse()
            contents = answer.read()
        finally:
            connection.close()
        found = {name.lower(): value for name, value in answer.getheaders()}
        is_json = found.get("content-type") == "application/json"
        return answer.status, json.loads(contents) if is_json else contents, found

    def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """What a stream told, "[DONE]" among it."""
        status, contents, headers = self.ask(path, {**body, "stream": True})
        assert (status, headers["content-type"]) == (200, "text/event-stream"), contents
        lines = contents.decode().split("\n\n")
        assert lines.pop() == ""
        values = [line.removeprefix("data: ") for line in lines]
        return [value if value == "[DONE]" else json.loads(value) for value in values]

    def connect(self) -> socket.socket:
        """For what no library does."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def post(self, path: str, body: dict[str, Any]) -> socket.socket:
        """A connection on which a request was sent, and nothing read."""
        connection = self.connect()
        connection.sendall(request_bytes(path, body))
        return connection


def request_bytes(path: str, body: dict[str, Any]) -> bytes:
    """What a client sends."""
    contents = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(contents)}\r\n\r\n".encode() + contents


@contextlib.contextmanager
def serving(
    state: State, pages: Sequence[BaseRoute] = (), *, drain_seconds: float = 5, send_buffer: int | None = None
) -> Iterator[Served]:
    """The server runs within; `send_buffer`: bytes that the kernel keeps for a client that does not read."""
    listener = listen("127.0.0.1", 0)
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    server = make_server(state, pages, drain_seconds=drain_seconds)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield Served(state, listener.getsockname()[1], server)
    finally:
        server.should_exit = True
        thread.join()


def wait_until(holds: Callable[[], object], seconds: float = 20) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never became true"
        time.sleep(0.005)


def slow_down(engine: Engine, seconds: float = 0.02) -> None:
    """Each of its steps takes so much longer."""
    step = engine.step

    def slower() -> bool:
        time.sleep(seconds if engine.n_running + engine.n_waiting else 0)
        return step()

    engine.step = slower  # type: ignore[method-assign]
