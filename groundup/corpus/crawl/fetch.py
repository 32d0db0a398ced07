"""One HTTP request as Scrapy's download handler, with a limit on everything a server can make endless.

In: a request when its host's turn has come; the pause that the host is due is slept here. Time, headers, body, and what
the body unpacks to are bounded; a connection is made only to an address that was looked at. Out: a response with its
body unpacked and whole, or a `Refused` that says why not. Redirects come back as responses: each hop is checked anew.
"""

from __future__ import annotations

import asyncio
import fnmatch
import math
import socket
import time
from typing import TYPE_CHECKING, Any

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from scrapy.core.downloader.handlers.base import BaseDownloadHandler
from scrapy.http import Headers, Request, Response
from yarl import URL

from groundup.corpus.crawl import urls
from groundup.corpus.crawl.pages import MAX_SITEMAP_BYTES, retry_after_seconds, unpacked
from groundup.corpus.crawl.report import NoOutcome, Refusal, Refused

if TYPE_CHECKING:
    from scrapy.crawler import Crawler

REDIRECTS = frozenset({301, 302, 303, 307, 308})
MAX_HOPS = 5
MAX_ROBOTS_BYTES = 512 << 10
"""Of a longer robots.txt, the beginning counts (RFC 9309, section 2.5, asks for 500 KiB at least)."""


class Fetcher(BaseDownloadHandler):
    """Makes the requests of a crawl: one at a time to a host, with its pauses; `concurrency` in all."""

    def __init__(self, crawler: Crawler) -> None:
        super().__init__(crawler)
        session: Any = crawler.spider
        self._session, self._options = session, session.options
        self._turns = asyncio.Semaphore(self._options.concurrency)
        self._rests: dict[str, tuple[float, float]] = {}  # when a host was asked last, and the pause that it needs
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
            trust_env=False,  # a proxy of the environment would connect in our place, past the rule on addresses
        )

    async def download_request(self, request: Request) -> Response:
        """Ask for an address; any status but 2xx, redirects and 4xx is `Refused` too."""
        task = asyncio.ensure_future(self._in_turn(request))
        self._session.requests.add(task)
        try:
            return await task
        except asyncio.CancelledError as error:
            raise NoOutcome from error
        finally:
            self._session.requests.discard(task)

    async def close(self) -> None:
        """Let go of all connections."""
        await self._client.close()

    def _socket(self, address_info: Any) -> socket.socket:
        """For a resolved address, a socket or a refusal: a name that resolves anew is looked at anew."""
        family, kind, protocol, _, address = address_info
        if not self._options.allow_private and not urls.is_public(str(address[0])):
            raise Refused(Refusal.PRIVATE, str(address[0]))
        return socket.socket(family, kind, protocol)

    async def _in_turn(self, request: Request) -> Response:
        if self._session.stopping:
            raise NoOutcome
        options, host, pause = self._options, urls.host_of(request.url), 0.0
        last, rest = self._rests.get(host, (-math.inf, 0.0))
        rest = max(rest, options.delay_seconds, self._session.delays.get(host, 0.0))
        await asyncio.sleep(last + rest - time.monotonic())
        try:
            async with self._turns, asyncio.timeout(options.timeout_seconds):
                return await self._get(request)
        except Exception as error:
            refusal = _refusal(error, answered="answered" in request.flags)
            pause = self._session.pause(refusal, request.meta["attempt"])
            raise refusal from error
        finally:
            self._rests[host] = (time.monotonic(), pause)

    async def _get(self, request: Request) -> Response:
        page, options = request.meta.get("page"), self._options
        async with self._client.get(URL(request.url, encoded=True), allow_redirects=False) as answer:
            request.flags.append("answered")
            response = Response(request.url, answer.status, Headers(list(answer.raw_headers)))
            _check_status(response)
            if not 200 <= answer.status < 300:
                answer.close()  # what is still to come is not read
                return response
            if page is None:
                most = MAX_ROBOTS_BYTES
            elif page.sitemap:
                most = MAX_SITEMAP_BYTES
            else:
                most = int(options.max_page_mib * 2**20)
                found = header(response, "Content-Type").partition(";")[0].strip().lower()
                if not any(fnmatch.fnmatchcase(found, pattern) for pattern in options.types):
                    raise Refused(Refusal.TYPE, found[:80] or "none given")
            data = bytearray()
            async for piece in answer.content.iter_any():
                data += piece
                if len(data) > most:
                    answer.close()
                    break
        body = bytes(data)
        if len(body) <= most or page is None:
            body = await asyncio.to_thread(unpacked, body, header(response, "Content-Encoding"), most)
        if len(body) > most and page is not None:
            raise Refused(Refusal.TOO_LARGE, f"more than {most:,} bytes")
        return response.replace(body=body[:most], flags=["cut"] if len(body) > most else [])


def header(response: Response, name: str) -> str:
    """A header's values, joined by ", ", each byte as a character; "" without it."""
    return b", ".join(response.headers.getlist(name)).decode("latin-1")


def location(response: Response) -> str | None:
    """Where a response redirects to; lone surrogates stand for raw bytes."""
    written = (response.headers.get("Location") or b"").decode("utf-8", "surrogateescape")
    return urls.normalize_url(written, response.url)


def _check_status(response: Response) -> None:
    status = response.status
    if status >= 500 or status in (408, 425, 429):
        wait = retry_after_seconds(header(response, "Retry-After"))
        what = f"HTTP {status}" if wait is None else f"HTTP {status} asks for a pause of {wait:,.0f} s"
        raise Refused(Refusal.SERVER_ERROR, what, again=True, wait_seconds=wait)
    if status < 200 or (300 <= status < 400 and status not in REDIRECTS):
        raise Refused(Refusal.STATUS, f"HTTP {status}")


def _refusal(error: Exception, *, answered: bool) -> Refused:
    """Whatever a server makes a library throw, in our words."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, TimeoutError):
        # A server that answered and then sent slowly will do so again; one that did not answer may have been busy.
        return Refused(Refusal.TIMEOUT, "not whole in time" if answered else "no answer in time", again=not answered)
    said = getattr(error, "message", "") or str(error) or type(error).__name__
    text = said.strip().partition("\n")[0][:120]
    if isinstance(error, aiohttp.ClientPayloadError):
        return Refused(Refusal.CUT_OFF, "the connection ended before the page did", again=True)
    if isinstance(error, (aiohttp.ClientConnectionError, OSError)) and not isinstance(error, HttpProcessingError):
        return Refused(Refusal.CONNECTION, text, again=True)
    return Refused(Refusal.BAD_RESPONSE, text)
