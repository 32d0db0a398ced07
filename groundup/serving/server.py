"""The process: a socket that is ours before any model is read, and uvicorn on it until it is told to stop."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import socket
from collections.abc import Sequence
from typing import Any

import uvicorn
from starlette.routing import BaseRoute
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from groundup.errors import GroundupError
from groundup.serving.app import make_app
from groundup.serving.protocol import APIError
from groundup.serving.state import State

_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; font-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # a browser asks again, lest it mix two versions of the page
}
_MOST_HEADER_BYTES = 65_536


def listen(host: str, port: int) -> socket.socket:
    """A socket that nobody else has; `port` 0: any that is free.

    Raises:
        GroundupError: the address is in use, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise GroundupError(
                f"port {port} of {host} is taken, perhaps by another groundup serve.",
                f"Take another: --port {port + 1}, or stop the program that has it.",
            ) from None
        reason = getattr(error, "strerror", None) or error
        raise GroundupError(f"--host {host} --port {port}: cannot listen there ({reason}).") from None


def make_server(state: State, pages: Sequence[BaseRoute] = (), *, drain_seconds: float = 30) -> uvicorn.Server:
    """A server for `server.run(sockets=[listen(…)])`.

    At SIGTERM or Ctrl-C it takes no more connections and finishes what it has begun, for `drain_seconds`; then streams
    end with an error. A second signal stops it at once.
    """
    _Protocol.seconds = state.limits.body_seconds
    config = uvicorn.Config(
        make_app(state, pages), http=_Protocol, ws="none", lifespan="on", log_config=None, access_log=False,
        headers=[*_HEADERS.items()], proxy_headers=False, server_header=False,
        timeout_graceful_shutdown=math.ceil(drain_seconds),
    )  # fmt: skip
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)  # it would show what stands behind a "?"
    return uvicorn.Server(config)


class _Protocol(HttpToolsProtocol):
    """uvicorn's, with an end to the wait for a request's headers, and to their size."""

    seconds = 30.0

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._n_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect()

    def on_headers_complete(self) -> None:
        self._stop()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._timer is not None:
            self._n_bytes += len(data)
            if self._n_bytes > _MOST_HEADER_BYTES:
                self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP has an error of the same shape as all others."""
        answer = APIError(400, msg, "invalid_http", connection="close").response
        headers = [*self.server_state.default_headers, *answer.raw_headers]
        lines = [b"HTTP/1.1 400 Bad Request", *map(b": ".join, headers), b"", bytes(answer.body)]
        self.transport.write(b"\r\n".join(lines))
        self.transport.close()

    def _expect(self) -> None:
        self._stop()
        self._n_bytes, self._timer = 0, self.loop.call_later(self.seconds, self.timeout_keep_alive_handler)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
