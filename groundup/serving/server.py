"""The process: a socket that is ours before any model is read, and uvicorn on it until it is told to stop."""

from __future__ import annotations

import errno
import logging
import math
import socket
from collections.abc import Sequence

import uvicorn
from starlette.routing import BaseRoute

from groundup.errors import GroundupError
from groundup.serving.app import make_app
from groundup.serving.security import Protocol
from groundup.serving.state import State


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

    At SIGTERM or Ctrl-C it takes no more connections and finishes what it has begun; a second one stops it at once.

    Args:
        state: its models and limits.
        pages: further routes.
        drain_seconds: for what has begun; then streams end with an error.
    """
    Protocol.seconds = state.limits.body_seconds
    config = uvicorn.Config(
        make_app(state, pages), http=Protocol, ws="none", lifespan="on", log_config=None, access_log=False,
        proxy_headers=False, server_header=False, timeout_graceful_shutdown=math.ceil(drain_seconds),
    )  # fmt: skip
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)  # it would show what stands behind a "?"
    return uvicorn.Server(config)
