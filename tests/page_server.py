"""A server with the page on a free port of this machine, which can die and come back, and a browser to open it with."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from generation_models import random_model, small_tokenizer

from groundup.generation import Engine
from groundup.serving.page import routes
from groundup.serving.server import listen, make_server
from groundup.serving.state import ServedModel, State

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Slow(Engine):
    """An engine whose every step takes a while, so that something can happen between two."""

    seconds = 0.0

    def step(self) -> bool:
        time.sleep(self.seconds)
        return super().step()


class PageServer:
    """The real server in a thread.

    Args:
        names: of its models: random ones, different from each other.
        run: the run it serves, or the folder for votes.
        draft: of the engines.
        keys: of the API.
    """

    def __init__(
        self, names: tuple[str, ...] = ("tiny",), run: Path | None = None, draft: Any = None, keys: tuple[str, ...] = ()
    ) -> None:
        tokenizer = small_tokenizer()
        self.engines = {
            name: Slow(random_model(seed=seed, context_length=256), tokenizer, slots=4, draft=draft)
            for seed, name in enumerate(names)
        }
        self.run, self.keys, self.port = run, keys, 0
        self._server: Any = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> PageServer:
        state = State(
            [ServedModel(name, engine) for name, engine in self.engines.items()], run=self.run, keys=self.keys
        )
        socket = listen("127.0.0.1", self.port)
        self.port = socket.getsockname()[1]
        self._server = make_server(state, routes(), drain_seconds=0)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [socket]})
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def die(self) -> None:
        """As a kill would have it: open connections are cut."""
        self._server.force_exit = self._server.should_exit = True
        for connection in list(self._server.server_state.connections):
            connection.loop.call_soon_threadsafe(connection.transport.abort)
        self._thread.join(20)

    def __enter__(self) -> PageServer:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.die()


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser of this machine, without its sandbox where root runs the tests."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here: make chromium (or: sudo apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is in groundup[test]")
    with playwright.sync_playwright() as made:
        arguments = ["--no-sandbox"] if os.getuid() == 0 else []
        browser = made.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()
