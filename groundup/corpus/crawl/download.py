"""One HTTP request as Scrapy's download handler, with a limit on everything a server can make endless.

Time, headers, body, and what the body unpacks to are bounded; a connection is made only to an address that was looked
at. In: a request with `max_bytes` (and perhaps `types`, `cut`) in its meta. Out: a response whose body is unpacked and
whole, its `Exchange` in the request's meta, or a `Refused` that says why not. Redirects come back as responses: each
hop is a page of its own to the crawl's rules.
"""

from __future__ import annotations

import asyncio
import fnmatch
import socket
import time
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from scrapy.core.downloader.handlers.base import BaseDownloadHandler
from scrapy.http import Headers, Request, Response
from yarl import URL

from groundup.corpus.crawl import urls
from groundup.corpus.crawl.pages import retry_after_seconds
from groundup.corpus.crawl.report import Refusal, Refused
from groundup.corpus.crawl.settings import CrawlSettings
from groundup.corpus.crawl.warc import Exchange

if TYPE_CHECKING:
    from aiohttp.connector import Connection
    from scrapy.crawler import Crawler

REDIRECTS = frozenset({301, 302, 303, 307, 308})
_PASSING_STATUSES = frozenset({408, 425, 429})
_STEP_BYTES = 256 << 10
_CONNECT_SECONDS = 15.0


class _PrivateAddress(OSError):
    """A connection to an address that is not public was refused."""


class _Answer(aiohttp.ClientResponse):
    """Remembers whom it came from: a short one lets go of its connection at once."""

    address = ""

    async def start(self, connection: Connection) -> aiohttp.ClientResponse:
        peer = connection.transport.get_extra_info("peername") if connection.transport is not None else None
        self.address = str(peer[0]) if peer else ""
        return await super().start(connection)


class Downloader(BaseDownloadHandler):
    """Makes the requests of a crawl, and says how long the host rests after each."""

    def __init__(self, crawler: Crawler) -> None:
        super().__init__(crawler)
        spider: Any = crawler.spider
        self._crawl = spider.session
        self._settings: CrawlSettings = self._crawl.settings
        self._turns = asyncio.Semaphore(self._settings.concurrency)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,
                socket_factory=self._socket,
                happy_eyeballs_delay=None,  # one address after the other, so that a refusal keeps its own name
            ),
            headers={
                "User-Agent": self._settings.user_agent,
                "Accept": ", ".join([*self._settings.types, "*/*;q=0.1"]),
                "Accept-Encoding": "gzip, deflate",
            },
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
            response_class=_Answer,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,  # a proxy of the environment would connect in our place, past the rule on addresses
        )

    async def download_request(self, request: Request) -> Response:
        """Ask for an address, when one of the turns is free.

        Raises:
            Refused: no usable answer; any status but 2xx, 3xx redirects and 4xx is a refusal too.
        """
        slot = self.crawler.engine.downloader.slots[request.meta["download_slot"]]
        wait = 0.0
        try:
            async with self._turns:
                return await self._crawl.unless_stopped(self._bounded(request))
        except Refused as refusal:
            wait = self._crawl.pause(refusal, request.meta["attempt"])
            raise
        finally:
            slot.close()  # forgets the pause that it counts from the request's beginning
            slot.lastseen = time.monotonic()
            slot.delay = max(wait, self._crawl.rest(request.meta["address"]))

    async def close(self) -> None:
        """Let go of all connections."""
        await self._session.close()

    def _socket(self, address_info: Any) -> socket.socket:
        """For a resolved address, a socket or a refusal: a name that resolves anew is looked at anew."""
        family, kind, protocol, _, address = address_info
        if not self._settings.allow_private and not urls.is_public(str(address[0])):
            raise _PrivateAddress(address[0])
        return socket.socket(family, kind, protocol)

    async def _bounded(self, request: Request) -> Response:
        seconds = self._settings.timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                return await self._get(request)
        except TimeoutError as error:
            # A server that answered and then sent slowly will do so again; one that did not answer may have been busy.
            answered = "exchange" in request.meta
            what = f"not whole after {seconds:g} s" if answered else "no answer in time"
            raise Refused(Refusal.TIMEOUT, what, again=not answered) from error
        except Refused:
            raise
        except Exception as error:  # whatever else a server makes a library throw
            raise _refusal(error) from error

    async def _get(self, request: Request) -> Response:
        meta = request.meta
        async with self._session.get(URL(meta["address"], encoded=True), allow_redirects=False) as answer:
            headers = Headers(list(answer.raw_headers))
            version, sent = answer.version or aiohttp.HttpVersion11, answer.request_info
            lines = [f"{sent.method} {sent.url.raw_path_qs} HTTP/1.1", *(f"{k}: {v}" for k, v in sent.headers.items())]
            status_line = f"HTTP/{version.major}.{version.minor} {answer.status} {answer.reason or ''}".rstrip()
            meta["exchange"] = Exchange(
                "\r\n".join([*lines, "", ""]).encode("latin-1", "replace"), status_line, answer.raw_headers,
                getattr(answer, "address", ""),
            )  # fmt: skip
            _check_status(answer.status, header(headers, "Retry-After"))
            body, whole = b"", True
            if 200 <= answer.status < 300:
                found = header(headers, "Content-Type").partition(";")[0].strip().lower()
                if "types" in meta and not any(fnmatch.fnmatchcase(found, pattern) for pattern in meta["types"]):
                    raise Refused(Refusal.TYPE, found[:80] or "none given")
                body, whole = await _body(answer, headers, meta["max_bytes"], meta.get("cut", False))
            if not whole or not 200 <= answer.status < 300:
                answer.close()  # what is still to come is not read
            flags = [] if whole else ["cut"]
            return Response(request.url, answer.status, headers=headers, body=body, flags=flags)


def header(headers: Headers, name: str) -> str:
    """A header's values, joined by ", ", each byte as a character; "" without it."""
    return b", ".join(headers.getlist(name)).decode("latin-1")


def _check_status(status: int, retry_after: str) -> None:
    if status >= 500 or status in _PASSING_STATUSES:
        wait = retry_after_seconds(retry_after)
        raise Refused(Refusal.SERVER_ERROR, f"HTTP {status}", again=True, wait_seconds=wait)
    if status < 200 or (300 <= status < 400 and status not in REDIRECTS):
        raise Refused(Refusal.STATUS, f"HTTP {status}")


def _refusal(error: Exception) -> Refused:
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, _PrivateAddress):
            return Refused(Refusal.PRIVATE, str(inner.args[0]))
        inner = getattr(inner, "os_error", None) or inner.__cause__
    said = getattr(error, "message", "") or str(error) or type(error).__name__
    text = said.strip().partition("\n")[0][:120]
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return Refused(Refusal.CONNECTION, "the name is not known", again=True)
    if isinstance(error, aiohttp.ClientSSLError):
        return Refused(Refusal.CONNECTION, text)
    if isinstance(error, aiohttp.InvalidURL):
        return Refused(Refusal.BAD_URL, text)
    if isinstance(error, aiohttp.ClientPayloadError):
        return Refused(Refusal.CUT_OFF, "the connection ended before the page did", again=True)
    if isinstance(error, (aiohttp.ClientConnectionError, OSError)) and not isinstance(error, HttpProcessingError):
        return Refused(Refusal.CONNECTION, text, again=True)
    return Refused(Refusal.BAD_RESPONSE, text)


async def _body(answer: aiohttp.ClientResponse, headers: Headers, max_bytes: int, cut: bool) -> tuple[bytes, bool]:
    """The body, unpacked as it arrives and never further than the limit; and whether it is whole."""
    length = header(headers, "Content-Length")
    if not cut and length.isascii() and length.isdigit() and int(length[:18]) > max_bytes:
        raise Refused(Refusal.TOO_LARGE, f"says it has {int(length[:18]):,} bytes")
    unpacker = Unpacker(header(headers, "Content-Encoding"))
    parts: list[bytes] = []
    packed = size = 0
    async for piece in answer.content.iter_chunked(_STEP_BYTES):
        packed += len(piece)
        for part in unpacker.feed(piece):
            parts.append(part)
            size += len(part)
            if size > max_bytes:
                break
        if size > max_bytes or packed > max_bytes + _STEP_BYTES:
            if cut:
                return b"".join(parts)[:max_bytes], False
            raise Refused(Refusal.TOO_LARGE, f"more than {max_bytes:,} bytes")
    unpacker.end()
    return b"".join(parts), True


class Unpacker:
    """Content-Encoding, undone in steps of a bounded size: a decompression bomb is stopped early."""

    def __init__(self, encoding: str) -> None:
        self._name = encoding.strip().lower()
        self._wbits = {"gzip": 31, "x-gzip": 31, "deflate": 15}.get(self._name)
        if self._wbits is None and self._name not in ("", "identity"):
            raise Refused(Refusal.ENCODING, f"{encoding[:40]!r}, which we did not ask for")
        self._stream: Any = None
        self._begun = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Unpack a piece.

        Raises:
            Refused: it is not what its header says.
        """
        if self._wbits is None:
            yield data
            return
        while data:
            if self._stream is None:
                if self._begun and not data.startswith(b"\x1f\x8b"):
                    return  # padding after the last gzip member
                raw_deflate = self._name == "deflate" and data[0] & 0x0F != 8
                self._stream = zlib.decompressobj(-15 if raw_deflate else self._wbits)
                self._begun = True
            try:
                part = self._stream.decompress(data, _STEP_BYTES)
            except zlib.error as error:
                raise Refused(Refusal.ENCODING, f"broken {self._name} ({error})") from error
            if part:
                yield part
            if self._stream.eof:
                data, self._stream = self._stream.unused_data, None
            elif not part and not self._stream.unconsumed_tail:
                return
            else:
                data = self._stream.unconsumed_tail

    def end(self) -> None:
        """Refuse a stream that stops in the middle."""
        if self._stream is not None:
            raise Refused(Refusal.CUT_OFF, f"the {self._name} stream stops in the middle", again=True)
