"""Scrapy's download handler of a crawl, with a limit on everything that a server can make endless.

Time, length, type, and what a body unpacks to are bounded; a connection is made only to an address that was looked at.
Out: a response with its body unpacked and whole, or a `Refused` that says why not. Redirects come back as responses.
"""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import gzip
import io
import ipaddress
import socket
import time
import zlib
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
from scrapy.core.downloader.handlers.base import BaseDownloadHandler
from scrapy.crawler import Crawler
from scrapy.http import Headers, Request, Response
from yarl import URL

BACKOFF_SECONDS = 2.0
"""The pause before the first retry; it doubles."""
_UNICAST, _NAT64 = ipaddress.IPv6Network("2000::/3"), ipaddress.IPv6Network("64:ff9b::/96")


class Refused(Exception):
    """An address is given up; `again`: for a reason that may pass, if there is a pause of `wait` seconds."""

    def __init__(self, reason: str, detail: str = "", *, again: bool = False, wait: float | None = None) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail, self.again, self.wait = reason, detail[:200], again, wait


class Fetcher(BaseDownloadHandler):
    """Makes a crawl's requests; their `meta` says how long a body may be (`most`), and of which `types`."""

    def __init__(self, crawler: Crawler) -> None:
        super().__init__(crawler)
        spider: Any = crawler.spider
        self._options = options = spider.options
        self._turns = asyncio.Semaphore(options.concurrency)
        accept = ", ".join([*options.types, "*/*;q=0.1"])
        self._client = aiohttp.ClientSession(
            # one address after the other: a refusal ends the attempt
            connector=aiohttp.TCPConnector(limit=0, socket_factory=self._socket, happy_eyeballs_delay=None),
            headers={"User-Agent": options.user_agent, "Accept": accept, "Accept-Encoding": "gzip"},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=15.0),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            response_class=_Answer,
            trust_env=False,  # a proxy of the environment would connect in our place, past the rule on addresses
        )

    async def download_request(self, request: Request) -> Response:
        """Ask for an address, after a fault that may pass again; then its host rests, as long as it asks for."""
        options, slot, attempt = self._options, self.crawler.engine.downloader.slots[request.meta["download_slot"]], 0
        try:
            while True:
                pause = 0.0
                try:
                    async with self._turns, asyncio.timeout(options.timeout_seconds):
                        return await self._get(request)
                except Exception as error:
                    refused, last = _refusal(error), attempt >= options.retries
                    backoff = BACKOFF_SECONDS * 2.0**attempt if refused.again and not last else 0.0
                    pause = backoff if refused.wait is None else min(refused.wait, options.max_wait_seconds)
                    if (refused.wait or 0.0) > options.max_wait_seconds:
                        raise Refused("left alone", str(refused)) from error
                    if last or not refused.again:
                        raise refused from error
                await asyncio.sleep(max(slot.delay, pause))
                attempt += 1
        finally:
            slot.lastseen = time.monotonic() + max(0.0, pause - slot.delay)  # Scrapy adds the delay to it

    async def close(self) -> None:
        """Let go of all connections."""
        await self._client.close()

    def _socket(self, address_info: Any) -> socket.socket:
        """For a resolved address, a socket or a refusal: a name that resolves anew is looked at anew."""
        family, kind, protocol, _, address = address_info
        if not self._options.allow_private and not is_public(str(address[0])):
            raise Refused("private address", str(address[0]))
        return socket.socket(family, kind, protocol)

    async def _get(self, request: Request) -> Response:
        most, types = request.meta["most"], request.meta["types"]
        async with self._client.get(URL(request.url, encoded=True), allow_redirects=False) as answer:
            headers, data = Headers(list(answer.raw_headers)), bytearray()
            response = Response(request.url, answer.status, headers, ip_address=getattr(answer, "peer", None))
            if answer.status >= 500 or answer.status in (408, 425, 429):
                wait = retry_after_seconds(header(response, "Retry-After"))
                asks = "" if wait is None else f" asks for a pause of {wait:,.0f} s"
                raise Refused("server error", f"HTTP {answer.status}{asks}", again=True, wait=wait)
            if answer.status != 200:
                return response  # without what is still to come
            found = header(response, "Content-Type").partition(";")[0].strip().lower()
            if not any(fnmatch.fnmatchcase(found, pattern) for pattern in types):
                raise Refused("content type", found or "none given")
            if (answer.content_length or 0) > most:
                raise Refused("too large", f"{answer.content_length:,} bytes")
            async for piece in answer.content.iter_any():
                data += piece
                if len(data) > most:
                    raise Refused("too large", f"more than {most:,} bytes")
        encoding = header(response, "Content-Encoding").strip().lower()
        return response.replace(body=await asyncio.to_thread(unpacked, bytes(data), encoding, most))


class _Answer(aiohttp.ClientResponse):
    """Keeps the address it came from: a short answer's connection is let go before its headers are handed out."""

    async def start(self, connection: Any) -> aiohttp.ClientResponse:
        self.peer = connection.transport.get_extra_info("peername")[0]
        return await super().start(connection)


def header(response: Response, name: str) -> str:
    """A header's values, joined by ", ", each byte as a character; "" without it."""
    return b", ".join(response.headers.getlist(name)).decode("latin-1")


def is_public(address: str) -> bool:
    """Whether an IP address (text, perhaps with an IPv6 zone) belongs to the public internet."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv4Address):
        return parsed.is_global and not parsed.is_multicast
    if parsed.ipv4_mapped or parsed in _NAT64:
        return is_public(str(ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)))
    return parsed.is_global and parsed in _UNICAST and parsed.sixtofour is None


def unpacked(data: bytes, encoding: str, most: int) -> bytes:
    """Undo a Content-Encoding.

    Raises:
        Refused: it is not what its header says, stops in the middle, or unpacks to more than `most` bytes.
    """
    if encoding in ("", "identity"):
        return data
    if encoding not in ("gzip", "x-gzip"):
        raise Refused("content encoding", f"{encoding[:40]!r}, which we did not ask for")
    try:
        body = gzip.GzipFile(fileobj=io.BytesIO(data)).read(most + 1)
    except EOFError as error:
        raise Refused("cut off", "the gzip stream stops in the middle", again=True) from error
    except (OSError, zlib.error) as error:
        raise Refused("content encoding", f"broken gzip ({error})") from error
    if len(body) > most:
        raise Refused("too large", f"unpacks to more than {most:,} bytes")
    return body


def retry_after_seconds(value: str, now: datetime | None = None) -> float | None:
    """The pause a `Retry-After` header asks for (RFC 9110, 10.2.3: seconds, or a date); None if it says nothing."""
    if value.isascii() and value.strip().isdigit():
        return float(value.strip()[:12])
    with contextlib.suppress(TypeError, ValueError, OverflowError, IndexError):
        date = parsedate_to_datetime(value)
        return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - (now or datetime.now(UTC))).total_seconds())
    return None


def _refusal(error: Exception) -> Refused:
    """Whatever a server makes a library throw, in our words."""
    if isinstance(error, Refused):
        return error
    text = str(getattr(error, "message", "") or error or type(error).__name__).strip().partition("\n")[0]
    for kind, reason in (
        (TimeoutError, "timeout"),
        (aiohttp.ClientPayloadError, "cut off"),
        ((aiohttp.ClientConnectionError, OSError), "connection"),
    ):
        if isinstance(error, kind):
            return Refused(reason, text, again=True)
    return Refused("not HTTP", text)
