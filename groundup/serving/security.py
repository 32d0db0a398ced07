"""What stands between the network and the API: who may ask, how much, and how long.

Each rule answers something that has happened to servers like this one: a web page elsewhere that calls a server on its
visitor's own machine (by its address, or by a name that it points there: DNS rebinding), a body or a header without
end, a connection that never says anything, one client that takes everything.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import logging
import time
import traceback
from collections import OrderedDict
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from groundup.serving.protocol import APIError, api_error
from groundup.serving.state import State

log = logging.getLogger("groundup.serving")

_MOST_CLIENTS = 10_000  # whose requests are counted


class Protection:
    """An ASGI application in front of another one."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self._app, self._state = app, state
        self._keys = [hashlib.sha256(key.encode()).digest() for key in state.keys]
        self._n_running = 0
        self._counts: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client: requests left, and when

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, count, pass on, and write one line of the log, without what was said."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)  # its start and end: uvicorn lets no other kind in
            return
        begin, status = time.perf_counter(), 0
        scope["app"] = self  # of which Starlette's routes ask that there be one

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        self._n_running += 1
        try:
            receive = await self._checked(scope, receive)
            await self._app(scope, receive, watched)
        except Exception as error:
            answer = api_error(error)
            if answer.status == 500:  # the message may hold what somebody said
                last = traceback.extract_tb(error.__traceback__)[-1]
                log.error("%s in %s:%d", type(error).__name__, Path(last.filename).name, last.lineno or 0)
            if not status:
                await answer.response(scope, receive, watched)
        finally:
            self._n_running -= 1
            seconds = time.perf_counter() - begin
            route = getattr(scope.get("route"), "path", "other")
            self._state.metrics.requests.labels(route, status).inc()
            self._state.metrics.seconds.labels(route).observe(seconds)
            log.info("%s %s status=%d seconds=%.3f", scope["method"], route, status, seconds)

    async def _checked(self, scope: Scope, receive: Receive) -> Receive:
        """What is left to receive of a request that may be answered."""
        headers, path, limits = Headers(scope=scope), scope["path"], self._state.limits
        self._check_browser(headers)
        is_public = path in ("/", "/health", "/ready", "/openapi.json") or path.startswith("/page/")
        client = (scope.get("client") or ["local"])[0]
        if not is_public:
            if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
                raise APIError(403, "other sites may not use this server.", "cross_origin")
            client = self._check_key(headers) or client
            self._count(client)
            if self._n_running > limits.requests:
                raise APIError(503, f"{limits.requests} requests are being answered.", "overloaded", retry_after="1")
        scope.setdefault("state", {})["client"] = client
        return await self._received(headers, receive) if scope["method"] == "POST" else receive

    def _check_browser(self, headers: Headers) -> None:
        """Refuse names that somebody else could point here, and pages that came from elsewhere."""
        hosts = headers.getlist("host")
        name = ""
        with contextlib.suppress(ValueError):  # of brackets that are no address
            name = urlsplit(f"//{hosts[0]}").hostname or "" if len(hosts) == 1 else ""
        if not (name == "localhost" or name in self._state.hosts or _is_address(name)):
            raise APIError(421, "this server has no such name; --allow-host NAME adds one.", "unknown_host")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != hosts[0]:
            raise APIError(403, "other sites may not use this server.", "cross_origin")

    def _check_key(self, headers: Headers) -> str | None:
        """Whose key it is, in a few letters; None: there are no keys."""
        if not self._keys:
            return None
        kind, _, given = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(given.strip().encode()).digest()
        fits = [hmac.compare_digest(digest, key) for key in self._keys]  # all, whichever fits
        if kind.lower() != "bearer" or not any(fits):
            raise APIError(401, "a key is needed: Authorization: Bearer KEY.", "invalid_api_key",
                           www_authenticate="Bearer")  # fmt: skip
        return digest.hex()[:16]

    def _count(self, client: str) -> None:
        """A bucket of requests that fills up again evenly over a minute."""
        most, now = self._state.limits.per_minute, time.monotonic()
        if most is None:
            return
        left, then = self._counts.pop(client, (float(most), now))
        left = min(float(most), left + (now - then) * most / 60)
        self._counts[client] = (max(0.0, left - 1), now)
        while len(self._counts) > _MOST_CLIENTS:
            self._counts.popitem(last=False)
        if left < 1:
            seconds = str(int((1 - left) * 60 / most) + 1)
            raise APIError(429, f"{most} requests a minute are allowed.", "rate_limit_exceeded", retry_after=seconds)

    async def _received(self, headers: Headers, receive: Receive) -> Receive:
        """The whole body, read before anybody waits for a model; then what the client does next."""
        most, seconds = self._state.limits.body_bytes, self._state.limits.body_seconds
        size, parts = 0, []
        too_large = APIError(413, f"a request has at most {most} bytes.", "too_large", connection="close")
        # Who sends a little too much is heard to the end: else it may never read why it was refused.
        most_read = most if "expect" in headers else 4 * most
        if int(headers.get("content-length") or 0) > most_read:
            raise too_large
        try:
            async with asyncio.timeout(seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise APIError(400, "the client left in the middle of its request.", "incomplete")
                    size += len(message.get("body", b""))
                    if size > most_read:
                        raise too_large
                    parts += [message.get("body", b"")] if size <= most else []
                    more = message.get("more_body", False)
        except TimeoutError:
            raise APIError(408, f"the body did not come within {seconds:g} s.", "timeout", connection="close") from None
        if size > most:
            raise too_large
        body: list[Message] = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]

        async def again() -> Message:
            return body.pop() if body else await receive()

        return again


def _is_address(name: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return False
