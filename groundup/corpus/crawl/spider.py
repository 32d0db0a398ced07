"""The spider: a task for each host takes its pages one after the other, and Scrapy's slots keep the pauses between.

For each page: robots.txt, then requests until redirects end, each under the same rules, then an outcome: stored, or
refused with a reason. Links and sitemaps add pages. What an earlier session stored is read from its file instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from protego import Protego
from scrapy import Request, Spider
from scrapy.crawler import AsyncCrawlerRunner
from scrapy.http import Response

from groundup.console import Console, format_bytes
from groundup.corpus.crawl.crawl import CrawlReport
from groundup.corpus.crawl.fetch import Fetcher, Refused, header
from groundup.corpus.crawl.pages import MAX_SITEMAP_BYTES, extract_links, normalize_url, parse_robots, parse_sitemap
from groundup.corpus.crawl.warc import WarcFiles, page_record
from groundup.errors import GroundupError
from groundup.recipe.crawl import CrawlSettings

BACKOFF_SECONDS = 2.0
"""The pause before the first retry; it doubles."""
MAX_HOPS = 5
MAX_WAITING = 1_000_000
"""Addresses that may wait at a time; what is found beyond is not followed in this session."""
_MAX_ROBOTS_BYTES = 512 << 10  # a longer one is none that allows anything (RFC 9309, 2.5: at least 500 KiB)
_MAX_FAILURES = 5  # connections that fail one after the other until a host is left alone
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


@dataclass(slots=True)
class Page:
    """An address on its way to an outcome."""

    url: str  # where it led so far
    sitemap: bool = False
    named: bool = False  # by the user
    depth: int = 0  # links between it and a page that the user named
    hops: int = 0  # redirects that were followed


class PageSpider(Spider):
    """One session of a crawl."""

    name = "groundup"
    options: CrawlSettings
    console: Console
    report: CrawlReport
    files: WarcFiles
    given: list[Page]
    stopping: threading.Event  # ends the session soon; what is in flight is dropped

    async def start(self) -> AsyncIterator[Any]:
        """All of it; the engine only makes the requests, so that whatever happens here is seen (`work`)."""
        with self.console.bar("crawl") as self._bar:
            self.work = asyncio.ensure_future(self._ask_all())
            while not self.work.done():
                if self.stopping.is_set():
                    self.work.cancel()
                await asyncio.wait({self.work}, timeout=0.1)
            if not self.stopping.is_set():
                self._bar.finish(self._words())
        return
        yield

    async def _ask_all(self) -> None:
        self._known = set[str]()  # every address that this session has seen
        self._pages: dict[str, deque[Page]] = {}  # that wait, by host; those that a task asks
        self._failures = Counter[str]()  # connections that failed one after the other, by host
        self._rules: dict[tuple[str, float], Protego | Refused] = {}  # of an origin, on a day
        self._scope = {host.removeprefix("www.") + "/" for host in self.options.hosts}  # host/ or host/folder/
        report = self.report
        report.found = report.stored = len(self.files.stored)
        report.stored_bytes = self.files.stored_bytes
        # No more pages are under way than may still be stored.
        self._budget = asyncio.Semaphore(max(0, self.options.max_pages - report.stored))
        async with asyncio.TaskGroup() as self._tasks:  # an error in one task cancels the others
            for page in self.given:
                self._widen(page.url)
            self._follow(self.given)
            self._check_limits()

    def _follow(self, pages: Iterable[Page]) -> None:
        for page in pages:
            if page.url not in self._known and self.report.waiting < MAX_WAITING:
                self._known.add(page.url)
                self.report.found += page.url not in self.files.stored
                if (host := _host(page.url)) not in self._pages:
                    self._pages[host] = deque()
                    self._tasks.create_task(self._ask_host(host))
                self._pages[host].append(page)

    async def _ask_host(self, host: str) -> None:
        pages = self._pages[host]
        while pages and not self.report.limit and host not in self.report.closed_hosts:
            if (page := pages.popleft()).url in self.files.stored:
                await self._take_in_again(page)
                continue
            await self._budget.acquire()
            if await self._turn(page):
                self._check_limits()
            else:
                self._budget.release()
            found = self.report.found
            self._bar.update(found - self.report.waiting, total=found, note=self._words())
        if not pages:
            del self._pages[host]

    def _check_limits(self) -> None:
        stored_all = self.report.stored >= self.options.max_pages
        if stored_all or self.report.stored_bytes >= self.options.max_megabytes * 10**6:
            self.report.limit = "max_pages" if stored_all else "max_megabytes"
            self.work.cancel()

    async def _turn(self, page: Page) -> bool:
        """A page's turn; whatever is thrown in it is the page's own fault. Returns whether the page was stored."""
        try:
            return await self._take_in(page, await self._fetch(page))
        except GroundupError:  # a full disk
            raise
        except Exception as error:
            refused = error if isinstance(error, Refused) else Refused("not HTTP", f"{type(error).__name__}: {error}")
        host, report = _host(page.url), self.report
        if self._too_long(refused):  # its host is left alone until the next session; the page waits for it
            report.closed_hosts.setdefault(host, str(refused))
            return False
        self._failures[host] += refused.reason == "connection"
        if self._failures[host] >= _MAX_FAILURES:
            report.closed_hosts[host] = f"{self._failures[host]} pages in a row: {refused.detail}"
        report.refused[refused.reason] += 1
        report.examples.setdefault(refused.reason, (page.url, refused.detail))
        return False

    async def _fetch(self, page: Page) -> Response:
        """Follow an address to an answer; each one that it leads to is checked like the first."""
        most = MAX_SITEMAP_BYTES if page.sitemap else int(self.options.max_page_mib * 2**20)
        while True:
            if (host := _host(page.url)) in self.report.closed_hosts:
                raise Refused("left alone", wait=math.inf)
            if not self._within(page.url):
                raise Refused("outside the crawl", page.url)
            await self._check_robots(page.url)
            response = await self._ask(page.url, most, ("*",) if page.sitemap else self.options.types)
            self._failures[host] = 0
            if response.status not in _REDIRECTS:
                return response
            if (target := _location(response)) is None:
                raise Refused("not an http address", f"redirected to {header(response, 'Location')!r}")
            if page.named:  # what the user named may move
                self._widen(target)
            if target in self._known or target in self.files.stored:
                self._follow([replace(page, url=target)])
                raise Refused("already fetched", f"redirected to {target}")
            page.url, page.hops = target, page.hops + 1
            self._known.add(target)
            if page.hops > MAX_HOPS:
                raise Refused("too many redirects", f"more than {MAX_HOPS}")

    async def _check_robots(self, url: str) -> None:
        origin = url[: url.index("/", len("https://"))]
        key = origin, time.monotonic() // 86400  # a day is what RFC 9309, 2.4, allows
        if key not in self._rules:
            self._rules[key] = await self._read_robots(origin)
        rules = self._rules[key]
        if isinstance(rules, Refused):
            raise rules.with_traceback(None)
        if not rules.can_fetch(url, self.options.product):
            raise Refused("robots.txt")

    async def _read_robots(self, origin: str) -> Protego | Refused:
        """An origin's robots.txt (RFC 9309, 2.3.1).

        200: its rules; 4xx, or redirects that lead nowhere: all is allowed; 5xx, 429, no answer or no end: not now.
        """
        options, url = self.options, f"{origin}/robots.txt"
        try:
            for _ in range(MAX_HOPS + 1):
                response = await self._ask(url, _MAX_ROBOTS_BYTES)
                if (target := _location(response)) is None:
                    break
                url = target
            rules = await asyncio.to_thread(parse_robots, response.body, options.product)
            delay = float(rules.crawl_delay(options.product) or 0.0)
        except Exception as error:  # also a file that its reader cannot stand: it is none that allows anything
            private = isinstance(error, Refused) and error.reason == "private address"
            return Refused("private address" if private else "robots.txt unreachable", str(error))
        if delay > max(options.max_wait_seconds, options.delay_seconds):
            return Refused("left alone", f"robots.txt asks for a pause of {delay:,.0f} s", wait=delay)
        if delay > options.delay_seconds:
            downloader, host = self.crawler.engine.downloader, _host(origin)
            downloader.slots[host].delay = delay
            downloader.per_slot_settings[host] = {"delay": delay}  # for a slot that Scrapy makes anew after a while
        return rules

    async def _ask(self, url: str, most: int, types: Sequence[str] = ("*",)) -> Response:
        """Make a request (see `Fetcher`) when its host has rested; after a fault that may pass, again."""
        attempt = 0
        while True:
            last = attempt >= self.options.retries
            backoff = 0.0 if last else BACKOFF_SECONDS * 2.0**attempt
            try:
                request = Request(url, meta={"most": most, "types": types, "backoff": backoff})
                return await self.crawler.engine.download_async(request)
            except Refused as refused:
                if last or not refused.again or self._too_long(refused):
                    raise
            attempt += 1

    def _too_long(self, refused: Refused) -> bool:
        return (refused.wait_seconds or 0.0) > self.options.max_wait_seconds

    async def _take_in(self, page: Page, response: Response) -> bool:
        """What an answer leads to: a sitemap's pages, or a stored page (True) and its links."""
        if response.status != 200:
            raise Refused("status", f"HTTP {response.status}")
        if page.sitemap:
            listed, is_index = await asyncio.to_thread(parse_sitemap, response.body)
            if is_index and not page.named:
                raise Refused("unusable sitemap", "an index in an index")
            found = (normalize_url(location, response.url) for location in listed)
            self.report.listed += 1
            self._follow(Page(url, sitemap=is_index) for url in found if url)
            return False
        noindex, pages = await self._links(page, response)
        if noindex and not page.named:
            self._follow(pages)
            raise Refused("noindex")
        self.files.append(await asyncio.to_thread(page_record, response))
        self.report.stored += 1
        self.report.fetched += 1
        self.report.stored_bytes += len(response.body)
        self._follow(pages)
        return True

    async def _take_in_again(self, page: Page) -> None:
        """Follow the links of a page that an earlier session stored."""
        if page.depth < self.options.depth:
            with contextlib.suppress(OSError, ValueError, StopIteration):
                self._follow((await self._links(page, self.files.read(page.url)))[1])

    async def _links(self, page: Page, response: Response) -> tuple[bool, list[Page]]:
        """Whether a page asks not to be kept, and where it leads within the crawl."""
        found = await asyncio.to_thread(extract_links, response, self.options.product)
        links = found.links if page.depth < self.options.depth else ()
        return found.noindex, [Page(url, depth=page.depth + 1) for url in links if self._within(url)]

    def _widen(self, url: str) -> None:
        folder = _folder(url)
        self._scope.add(folder if self.options.same_path else folder[: folder.index("/") + 1])

    def _within(self, url: str) -> bool:
        """Whether an address belongs to the crawl (`www.` makes no difference)."""
        folder = _folder(url)
        return any(folder[: mark.end()] in self._scope for mark in re.finditer("/", folder))

    def _words(self) -> str:
        stored = f"{self.report.stored:,} pages, {format_bytes(self.report.stored_bytes)}"
        return f"{stored} · {self.report.refused.total():,} refused · {self.report.waiting:,} waiting"


def _host(url: str) -> str:
    return urlsplit(url).hostname or ""


def _folder(url: str) -> str:
    return _host(url).removeprefix("www.") + urlsplit(url).path.rpartition("/")[0] + "/"


def _location(response: Response) -> str | None:
    """Where a response redirects to; a byte that is no ASCII is quoted as it is."""
    written = "".join(chr(byte) if byte < 128 else f"%{byte:02X}" for byte in response.headers.get("Location") or b"")
    return normalize_url(written, response.url) if response.status in _REDIRECTS else None


async def run(options: CrawlSettings, **job: Any) -> None:
    """Run a session (`PageSpider`) until all is done, a limit is reached, or it is stopped.

    Raises:
        GroundupError: the disk is full or not writable.
    """
    settings = {
        "TWISTED_REACTOR_ENABLED": False,
        "DOWNLOAD_HANDLERS": {"http": Fetcher, "https": Fetcher},
        # None of Scrapy's own: no cookies, no telnet console, no suffix lists, no caches, no redirects.
        "DOWNLOAD_HANDLERS_BASE": {}, "DOWNLOADER_MIDDLEWARES_BASE": {}, "SPIDER_MIDDLEWARES_BASE": {},
        "EXTENSIONS_BASE": {}, "ADDONS": {}, "TELNETCONSOLE_ENABLED": False, "COOKIES_ENABLED": False,
        "CONCURRENT_REQUESTS_PER_DOMAIN": 1, "DOWNLOAD_DELAY_JITTER": 0.0, "LOG_ENABLED": False,
        "DOWNLOAD_DELAY": max(options.delay_seconds, 1e-6),  # Scrapy looks at the clock only if there is a delay
    }  # fmt: skip
    crawler = AsyncCrawlerRunner(settings).create_crawler(PageSpider)
    await crawler.crawl_async(options=options, **job)
    spider: Any = crawler.spider
    try:
        with contextlib.suppress(asyncio.CancelledError):  # a limit, or stopped
            spider.work.result()
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
