"""One HTTP request as Scrapy's download handler, with a limit on everything a server can make endless.

Time, headers, body, and what the body unpacks to are bounded; a connection is made only to an address that was looked
at. Out: a response with its body unpacked and whole, or a `Refused` that says why not. Redirects come back as
responses: each hop is checked anew.
"""

from __future__ import annotations

import asyncio
import fnmatch
import gzip
import io
import socket
import zlib
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from scrapy.core.downloader.handlers.base import BaseDownloadHandler
from scrapy.http import Headers, Request, Response
from yarl import URL

from groundup.corpus.crawl import urls
from groundup.corpus.crawl.report import Refusal, Refused

if TYPE_CHECKING:
    from scrapy.crawler import Crawler

REDIRECTS = frozenset({301, 302, 303, 307, 308})
MAX_HOPS = 5


class Fetcher(BaseDownloadHandler):
    """Makes a crawl's requests; their `meta` says how long a body may be (`most`), or is cut, and of which `types`."""

    def __init__(self, crawler: Crawler) -> None:
        super().__init__(crawler)
        spider: Any = crawler.spider
        self._options = spider.session.options
        self._client = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,
                socket_factory=self._socket,
                happy_eyeballs_delay=None,  # one address after the other: a refusal ends the attempt
            ),
            headers={
                "User-Agent": self._options.user_agent,
                "Accept": ", ".join([*self._options.types, "*/*;q=0.1"]),
                "Accept-Encoding": "gzip",
            },
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=15.0),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            response_class=_Answer,
            trust_env=False,  # a proxy of the environment would connect in our place, past the rule on addresses
        )

    async def download_request(self, request: Request) -> Response:
        """Ask for an address; a status that may pass is `Refused` too."""
        try:
            async with asyncio.timeout(self._options.timeout_seconds):
                return await self._get(request)
        except Exception as error:
            raise _refusal(error, answered="answered" in request.flags) from error

    async def close(self) -> None:
        """Let go of all connections."""
        await self._client.close()

    def _socket(self, address_info: Any) -> socket.socket:
        """For a resolved address, a socket or a refusal: a name that resolves anew is looked at anew."""
        family, kind, protocol, _, address = address_info
        if not self._options.allow_private and not urls.is_public(str(address[0])):
            raise Refused(Refusal.PRIVATE, str(address[0]))
        return socket.socket(family, kind, protocol)

    async def _get(self, request: Request) -> Response:
        most, may_be_cut = request.meta["most"], request.meta["may_be_cut"]
        async with self._client.get(URL(request.url, encoded=True), allow_redirects=False) as answer:
            request.flags.append("answered")
            headers, data = Headers(list(answer.raw_headers)), bytearray()
            response = Response(request.url, answer.status, headers, ip_address=getattr(answer, "peer", None))
            if answer.status >= 500 or answer.status in (408, 425, 429):
                wait = retry_after_seconds(header(response, "Retry-After"))
                asks = "" if wait is None else f" asks for a pause of {wait:,.0f} s"
                raise Refused(Refusal.SERVER_ERROR, f"HTTP {answer.status}{asks}", again=True, wait_seconds=wait)
            if not 200 <= answer.status < 300:
                answer.close()  # what is still to come is not read
                return response
            found = header(response, "Content-Type").partition(";")[0].strip().lower()
            if not any(fnmatch.fnmatchcase(found, pattern) for pattern in request.meta["types"]):
                raise Refused(Refusal.TYPE, found[:80] or "none given")
            if (answer.content_length or 0) > most and not may_be_cut:
                raise Refused(Refusal.TOO_LARGE, f"{answer.content_length:,} bytes")
            async for piece in answer.content.iter_any():
                data += piece
                if len(data) > most:
                    answer.close()
                    break
        body = bytes(data)
        if len(body) <= most or may_be_cut:
            body = await asyncio.to_thread(unpacked, body, header(response, "Content-Encoding"), most)
        if len(body) > most and not may_be_cut:
            raise Refused(Refusal.TOO_LARGE, f"more than {most:,} bytes")
        return response.replace(body=body[:most], flags=["cut"] if len(body) > most else [])


class _Answer(aiohttp.ClientResponse):
    """Keeps the address it came from: a short answer's connection is let go before its headers are handed out."""

    async def start(self, connection: Any) -> aiohttp.ClientResponse:
        self.peer = connection.transport.get_extra_info("peername")[0]
        return await super().start(connection)


def header(response: Response, name: str) -> str:
    """A header's values, joined by ", ", each byte as a character; "" without it."""
    return b", ".join(response.headers.getlist(name)).decode("latin-1")


def location(response: Response) -> str | None:
    """Where a response redirects to; lone surrogates stand for raw bytes."""
    written = (response.headers.get("Location") or b"").decode("utf-8", "surrogateescape")
    return urls.normalize_url(written, response.url)


def unpacked(data: bytes, encoding: str, most: int) -> bytes:
    """Undo a Content-Encoding, never further than one byte behind `most`.

    Raises:
        Refused: it is not what its header says, or stops in the middle.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return data
    if encoding not in ("gzip", "x-gzip"):
        raise Refused(Refusal.ENCODING, f"{encoding[:40]!r}, which we did not ask for")
    try:
        return gzip.GzipFile(fileobj=io.BytesIO(data)).read(most + 1)
    except EOFError as error:
        raise Refused(Refusal.CUT_OFF, "the gzip stream stops in the middle", again=True) from error
    except (OSError, zlib.error) as error:
        raise Refused(Refusal.ENCODING, f"broken gzip ({error})"[:120]) from error


def retry_after_seconds(value: str, now: datetime | None = None) -> float | None:
    """The pause a `Retry-After` header asks for (RFC 9110, 10.2.3: seconds, or a date); None if it says nothing."""
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value[:12])
    try:
        date = parsedate_to_datetime(value)
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        return max(0.0, (date - (now or datetime.now(UTC))).total_seconds())
    except (TypeError, ValueError, OverflowError, IndexError):
        return None


def _refusal(error: Exception, *, answered: bool) -> Refused:
    """Whatever a server makes a library throw, in our words."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, TimeoutError):
        # A server that answered and then sent slowly will do so again; one that did not answer may have been busy.
        return Refused(Refusal.TIMEOUT, "not whole in time" if answered else "no answer in time", again=not answered)
    if isinstance(error, aiohttp.ClientPayloadError):
        return Refused(Refusal.CUT_OFF, "the connection ended before the page did", again=True)
    text = str(getattr(error, "message", "") or error or type(error).__name__).strip().partition("\n")[0][:120]
    if isinstance(error, (aiohttp.ClientConnectionError, OSError)) and not isinstance(error, HttpProcessingError):
        return Refused(Refusal.CONNECTION, text, again=True)
    return Refused(Refusal.BAD_RESPONSE, text)
