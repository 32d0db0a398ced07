"""A web server on 127.0.0.1 that does what web servers do: answer, dawdle, lie, loop and explode."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import socket
import ssl
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

Handler = Callable[["Exchange"], Awaitable[None]]


@dataclass
class Exchange:
    """One request and the way to answer it."""

    path: str
    headers: dict[str, str]
    writer: asyncio.StreamWriter

    async def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()

    async def answer(
        self, body: bytes = b"", status: str = "200 OK", kind: str = "text/html; charset=utf-8", **headers: str | bytes
    ) -> None:
        lines = [b"HTTP/1.1 " + status.encode(), b"Content-Length: %d" % len(body)]
        if kind:
            lines.append(b"Content-Type: " + kind.encode())
        for name, value in headers.items():
            value = value if isinstance(value, bytes) else value.encode()
            lines.append(name.replace("_", "-").encode() + b": " + value)
        await self.send(b"\r\n".join([*lines, b"", b""]) + body)


def page(title: str, *links: str, head: str = "", words: int = 40) -> bytes:
    """An ordinary page."""
    anchors = "".join(f'<li><a href="{link}">{link}</a>' for link in links)
    text = " ".join(f"{title} word{number}" for number in range(words))
    return (
        f"<!DOCTYPE html><html><head><title>{title}</title>{head}</head><body><p>{text}</p><ul>{anchors}</ul>".encode()
    )


class MisbehavingServer:
    """Use as a context manager; `pages` maps paths to handlers or bodies, and more may be added at any time.

    Attributes:
        requests: (time, path) of every request, in their order.
        busiest: the most requests that were open at the same time.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self.requests: list[tuple[float, str]] = []
        self.busiest = 0
        self.robots: bytes | str | Handler | None = None  # a body, a status, a handler, or none (404)
        self.pages: dict[str, bytes | Handler] = {**_BAD_MANNERS}
        self._open = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._started = threading.Event()

    def url(self, path: str = "/", host: str = "127.0.0.1") -> str:
        return f"http{'s' if self._tls else ''}://{host}:{self.port}{path}"

    @property
    def counts(self) -> Counter[str]:
        """How often each path was asked for, robots.txt apart."""
        return Counter(path for _, path in self.requests if path != "/robots.txt")

    def __enter__(self) -> MisbehavingServer:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._loop.close()

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0, ssl=self._tls)
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        async with server:
            await self._stop.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError, asyncio.LimitOverrunError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.split("\r\n")
        path = first.split(" ")[1]
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines if line)}
        self.requests.append((time.monotonic(), path))
        self._open += 1
        self.busiest = max(self.busiest, self._open)
        try:
            exchange = Exchange(path, headers, writer)
            found = self.robots if path == "/robots.txt" else self.pages.get(path) or self.pages.get(path.split("?")[0])
            if found is None:
                await exchange.answer(b"nothing here", "404 Not Found")
            elif isinstance(found, bytes):
                await exchange.answer(found, kind="text/plain" if path == "/robots.txt" else "text/html")
            elif isinstance(found, str):
                await exchange.answer(b"", found)
            else:
                await found(exchange)
                return getattr(found, "keeps_alive", True)
            return True
        finally:
            self._open -= 1


def closing(handler: Handler) -> Handler:
    """A handler after which the connection is closed."""
    handler.keeps_alive = False  # type: ignore[attr-defined]
    return handler


def answering(body: bytes = b"", status: str = "200 OK", kind: str = "text/html", **headers: str | bytes) -> Handler:
    """A handler that gives one answer."""

    async def handler(exchange: Exchange) -> None:
        await exchange.answer(body, status, kind, **headers)

    return handler


def redirect(location: str | bytes, status: str = "302 Found") -> Handler:
    return answering(b"elsewhere", status, Location=location)


def failing_first(times: int, status: str, then: bytes, **headers: str) -> Handler:
    """Refuses some requests, then answers."""
    left = [times]

    async def handler(exchange: Exchange) -> None:
        if left[0]:
            left[0] -= 1
            await exchange.answer(b"", status, **headers)
        else:
            await exchange.answer(then)

    return handler


@closing
async def _silent(exchange: Exchange) -> None:
    await asyncio.sleep(3600)


@closing
async def _drip(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 100000\r\n\r\n")
    for _ in range(100_000):
        await exchange.send(b"x")
        await asyncio.sleep(0.05)


@closing
async def _drip_of_headers(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\n")
    for number in range(100_000):
        await exchange.send(b"X-%d: x\r\n" % number)
        await asyncio.sleep(0.05)


@closing
async def _endless(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n")
    while True:
        await exchange.send(b"and on and on " * 5000)


@closing
async def _endless_chunks(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        await exchange.send(b"10000\r\n" + b"y" * 0x10000 + b"\r\n")


@closing
async def _endless_nothing(exchange: Exchange) -> None:
    """A gzip stream that goes on for ever and holds nothing."""
    await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Encoding: gzip\r\n\r\n")
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    await exchange.send(packer.compress(b"") + packer.flush(zlib.Z_SYNC_FLUSH))
    while True:
        await exchange.send(b"\x00\x00\x00\xff\xff" * 20_000)  # empty stored blocks


@closing
async def _long(exchange: Exchange) -> None:
    """Says how long it is, and sends nothing of it."""
    await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 99999999999\r\n\r\n")
    await asyncio.sleep(3600)


@closing
async def _short(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 5000\r\n\r\n<p>and then")


@closing
async def _reset(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 5000\r\n\r\n<p>and then")
    await asyncio.sleep(0.02)
    reset = struct.pack("ii", 1, 0)
    exchange.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
    exchange.writer.transport.abort()


@closing
async def _many_headers(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\n", *(b"X-%d: %s\r\n" % (n, b"z" * 4000) for n in range(5000)), b"\r\nx")


@closing
async def _long_header(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\nX-Long: ", *(b"z" * 100_000 for _ in range(100)), b"\r\n\r\nx")


@closing
async def _garbage(exchange: Exchange) -> None:
    await exchange.send(bytes(range(256)) * 10)


@closing
async def _for_ever_continue(exchange: Exchange) -> None:
    while True:
        await exchange.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        await asyncio.sleep(0.01)


@closing
async def _more_than_said(exchange: Exchange) -> None:
    body = page("more than said")
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n" % len(body)
    await exchange.send(head + body + b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nsmuggled")


@closing
async def _chunked(exchange: Exchange) -> None:
    body = gzip.compress(page("chunked"))
    await exchange.send(
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n",
        *(b"%x\r\n%s\r\n" % (len(body[at : at + 50]), body[at : at + 50]) for at in range(0, len(body), 50)),
        b"0\r\n\r\n",
    )


def _bomb() -> bytes:
    """100 MB in 100 kB."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    return b"".join([*(packer.compress(bytes(1 << 20)) for _ in range(100)), packer.flush()])


async def _bombing(exchange: Exchange) -> None:
    await exchange.answer(_BOMB, Content_Encoding="gzip")


_BOMB = _bomb()
_BAD_MANNERS: dict[str, bytes | Handler] = {
    "/silent": _silent,
    "/drip": _drip,
    "/drip-of-headers": _drip_of_headers,
    "/endless": _endless,
    "/endless-chunks": _endless_chunks,
    "/endless-nothing": _endless_nothing,
    "/long": _long,
    "/short": _short,
    "/reset": _reset,
    "/many-headers": _many_headers,
    "/long-header": _long_header,
    "/garbage": _garbage,
    "/for-ever-continue": _for_ever_continue,
    "/more-than-said": _more_than_said,
    "/chunked": _chunked,
    "/bomb": _bombing,
    "/down": answering(b"", "500 Internal Server Error"),
    "/loop/a": redirect("/loop/b"),
    "/loop/b": redirect("/loop/a"),
    "/itself": redirect("/itself"),
    **{f"/hops/{number}": redirect(f"/hops/{number - 1}") for number in range(1, 10)},
    "/hops/0": page("after hops"),
    "/pdf": answering(b"%PDF-1.7", kind="application/pdf"),
    "/untyped": answering(b"<html>", kind=""),
    "/gzip": answering(gzip.compress(page("gzip")), Content_Encoding="gzip"),
    "/gzip-twice": answering(gzip.compress(page("gzip")) + gzip.compress(b"<p>more"), Content_Encoding="gzip"),
    "/deflate": answering(zlib.compress(page("deflate")), Content_Encoding="deflate"),
    "/half-gzip": answering(gzip.compress(page("half"))[:-20], Content_Encoding="gzip"),
    "/not-gzip": answering(page("not gzip"), Content_Encoding="gzip"),
    "/brotli": answering(b"\x1b\x00", Content_Encoding="br"),
    "/nothing": answering(b"", "204 No Content"),
}
