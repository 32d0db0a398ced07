"""One session of a crawl: a task for each host asks for its pages one after the other, on Scrapy's engine.

For each page: robots.txt, then one request, then an outcome: stored, redirected (the target takes its turn as a page of
its own), asked for again later, or refused with a reason. Links and sitemaps add pages.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from scrapy import Request, Spider
from scrapy.core.engine import ExecutionEngine
from scrapy.crawler import AsyncCrawlerRunner
from scrapy.http import Response

from groundup.console import Bar, Console, format_bytes
from groundup.corpus.crawl.fetch import MAX_HOPS, REDIRECTS, Fetcher, header, location
from groundup.corpus.crawl.pages import MAX_SITEMAP_BYTES, extract_links, parse_sitemap
from groundup.corpus.crawl.report import CrawlReport, Planned, Refusal, Refused
from groundup.corpus.crawl.robots import Robots
from groundup.corpus.crawl.settings import CrawlSettings
from groundup.corpus.crawl.urls import Scope, host_of, normalize_url
from groundup.corpus.crawl.warc import Entry, WarcFiles, page_record
from groundup.errors import GroundupError

MAX_WAITING = 1_000_000
"""Addresses that may wait at a time; what is found beyond is not followed."""
MAX_SITEMAPS = 1000
_MAX_FAILURES = 5  # connections that fail one after the other until a host is left alone
_LONGEST_BACKOFF_SECONDS = 600.0
_HTML = frozenset({"text/html", "application/xhtml+xml"})


@dataclass(slots=True)
class Page:
    """An address on its way to an outcome."""

    url: str  # what to ask for next
    first_url: str  # what was given or found
    depth: int = 0  # links between it and a given page
    named: bool = False  # whether the user gave it, not a page or a sitemap
    sitemap: bool = False
    hops: tuple[str, ...] = ()  # where redirects led so far
    attempts: int = 0  # failed requests for `url`


@dataclass(eq=False)
class Host:
    """What waits for one host, and when it may be asked."""

    pages: deque[Page] = field(default_factory=deque)
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)  # one request at a time
    asked: float = -math.inf  # when the last one ended (time.monotonic)
    rest: float = 0.0  # seconds that a failure asks for
    delay: float = 0.0  # seconds that its robots.txt asks for
    failures: int = 0  # connections that failed one after the other
    closed: str = ""  # why it is asked no more in this session
    busy: bool = False  # whether a task asks for its pages


class _Spider(Spider):
    name = "groundup"
    options: CrawlSettings
    session: Session

    async def start(self) -> AsyncIterator[Any]:
        assert self.crawler.engine is not None
        await self.session.work(self.crawler.engine)
        return
        yield


class Session:
    """The work between a start and an end of `crawl`; without `write`, pages are only planned."""

    def __init__(
        self, settings: CrawlSettings, console: Console, report: CrawlReport, files: WarcFiles,
        *, write: bool, retry_failed: bool,
    ) -> None:  # fmt: skip
        self.options, self.report = settings, report
        self._console, self._files, self._write, self._retry_failed = console, files, write, retry_failed
        self._scope = Scope(settings.hosts, same_path=settings.same_path)
        self._robots = Robots(self)
        self._hosts: dict[str, Host] = {}
        self._known: set[str] = set()  # every address that was ever seen
        self._waiting = self._n_sitemaps = 0
        self._turns = asyncio.Semaphore(settings.concurrency)
        self._bar: Bar | None = None
        self._stopped = False
        self._error: GroundupError | None = None

    async def run(self, given: list[Entry]) -> None:
        """Do what is to be done, until it is done or `stop` is called.

        Raises:
            GroundupError: the disk is full or not writable.
        """
        begin, report = time.perf_counter(), self.report
        self._loop = asyncio.get_running_loop()
        try:
            self._take_up(given)
            self._budget = asyncio.Semaphore(max(0, self.options.max_pages - report.stored))
            with self._console.bar("crawl", total=report.found) as self._bar:
                if not self._at_limit():
                    crawler = AsyncCrawlerRunner(_SCRAPY_SETTINGS).create_crawler(_Spider)
                    await crawler.crawl_async(session=self, options=self.options)
                if not self._stopped and self._error is None:
                    self._bar.finish(self._words())
        finally:
            report.waiting = report.found - report.stored - report.listed - report.refused.total()
            report.limit = report.limit if report.waiting else ""
            report.closed_hosts = {name: host.closed for name, host in self._hosts.items() if host.closed}
            report.seconds = round(time.perf_counter() - begin, 3)
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End the session soon, from any thread; what is in flight is dropped."""
        self._stopped = True
        with contextlib.suppress(AttributeError, RuntimeError):  # it has not begun, or has ended by itself
            self._loop.call_soon_threadsafe(self._all.cancel)

    async def work(self, engine: ExecutionEngine) -> None:
        """Let all hosts be asked."""
        self._engine = engine
        self._all = asyncio.ensure_future(self._ask_all())
        if self._stopped:
            self._all.cancel()
        await asyncio.wait({self._all})

    async def _ask_all(self) -> None:
        try:
            async with asyncio.TaskGroup() as self._tasks:
                for host in self._hosts.values():
                    self._begin(host)
        except* GroundupError as errors:  # of one task; the others are cancelled
            (self._error,) = errors.exceptions[:1]

    def _begin(self, host: Host) -> None:
        if not host.busy and host.pages and not host.closed:
            host.busy = True
            self._tasks.create_task(self._ask_host(host))

    async def _ask_host(self, host: Host) -> None:
        while host.pages and not host.closed:
            await self._budget.acquire()  # no more pages are under way than may still be stored
            if not await self._turn(host, host.pages.popleft()):
                self._budget.release()
            elif self._at_limit():
                self._all.cancel()
        host.busy = False

    def _at_limit(self) -> bool:
        report, options = self.report, self.options
        if self._write and report.stored_bytes >= options.max_megabytes * 10**6:
            report.limit = "max_megabytes"
        elif self._write and report.stored >= options.max_pages:
            report.limit = "max_pages"
        return bool(report.limit)

    async def _turn(self, host: Host, page: Page) -> bool:
        """A page's turn; whatever is thrown in it is the page's own fault. Returns whether the page was stored."""
        self._waiting -= 1
        try:
            await self._robots.check(page.url)
            if not self._write and not page.sitemap:
                self.report.planned.append(Planned(page.first_url))
                return False
            limits = {"most": MAX_SITEMAP_BYTES} if page.sitemap else {
                "most": int(self.options.max_page_mib * 2**20), "types": self.options.types}  # fmt: skip
            response = await self.ask(page.url, page.attempts + 1, **limits)
            host.failures = 0
            return await self._take_in(page, response)
        except GroundupError:  # a full disk
            raise
        except Refused as error:
            refusal = error
        except Exception as error:
            refusal = Refused(Refusal.BAD_RESPONSE, f"{type(error).__name__}: {error}"[:120])
        self._after(host, page, refusal)
        return False

    def host(self, url: str) -> Host:
        """The host of an address."""
        return self._hosts.setdefault(host_of(url), Host())

    async def ask(self, url: str, attempt: int, **meta: Any) -> Response:
        """Make a request when the host has rested and one of `concurrency` may be made; for `meta` see `Fetcher`."""
        host, rest = self.host(url), 0.0
        async with host.asking:
            await asyncio.sleep(host.asked + max(host.rest, host.delay, self.options.delay_seconds) - time.monotonic())
            try:
                async with self._turns:
                    return await self._engine.download_async(Request(url, meta=meta))
            except Refused as refusal:
                rest = self._rest_after(refusal, attempt)
                raise
            finally:
                host.asked, host.rest = time.monotonic(), rest

    def may_retry(self, refusal: Refused, attempt: int) -> bool:
        """Whether to ask again in this session."""
        wait = refusal.wait_seconds or 0.0
        return refusal.again and attempt <= self.options.retries and wait <= self.options.max_wait_seconds

    def _rest_after(self, refusal: Refused, attempt: int) -> float:
        """How long the host rests after a failure: as the server asks, else doubling from `backoff_seconds`."""
        if refusal.wait_seconds is not None:
            return min(refusal.wait_seconds, self.options.max_wait_seconds)
        if not self.may_retry(refusal, attempt):
            return 0.0
        return min(self.options.backoff_seconds * 2.0 ** (attempt - 1), _LONGEST_BACKOFF_SECONDS)

    def _after(self, host: Host, page: Page, refusal: Refused) -> None:
        """Ask again later, leave the host alone, or give the page up."""
        page.attempts += 1
        too_long = (refusal.wait_seconds or 0.0) > self.options.max_wait_seconds and self._write
        if too_long or self.may_retry(refusal, page.attempts):
            host.closed = str(refusal) if too_long else ""
            self._put(page, first=True)
            return
        host.failures += refusal.reason == Refusal.CONNECTION and refusal.again
        if host.failures >= _MAX_FAILURES:
            host.closed = f"{host.failures} pages in a row: {refusal.detail}"
        self._outcome("refused", page, reason=refusal.reason, detail=refusal.detail)

    async def _take_in(self, page: Page, response: Response) -> bool:
        """What an answer leads to: a redirect's target, a sitemap's pages, or a stored page (True) and its links."""
        if response.status in REDIRECTS:
            self._redirect(page, response)
            return False
        if not 200 <= response.status < 300 or response.status in (204, 205, 206):
            raise Refused(Refusal.STATUS, f"HTTP {response.status}")
        if page.sitemap:
            self._listed(page, *await asyncio.to_thread(parse_sitemap, response.body))
            return False
        kind, tag = header(response, "Content-Type"), header(response, "X-Robots-Tag")
        html = response.body if kind.partition(";")[0].strip().lower() in _HTML else b""
        found = await asyncio.to_thread(extract_links, html, page.url, kind, tag, self.options.product)
        links = found.links if page.depth < self.options.depth else ()
        links = tuple(url for url in links if url in self._scope and url not in self._known)
        if found.noindex and not page.named:
            self._outcome("refused", page, reason=Refusal.NOINDEX, links=links)
            return False
        record = await asyncio.to_thread(page_record, response)
        self._outcome("stored", page, record, links=links, size_bytes=len(response.body))
        return True

    def _redirect(self, page: Page, response: Response) -> None:
        if (target := location(response)) is None:
            raise Refused(Refusal.BAD_URL, f"redirected to {header(response, 'Location')[:200]!r}")
        if target in (page.first_url, *page.hops):
            raise Refused(Refusal.REDIRECT_LOOP, f"back to {target}")
        if len(page.hops) >= MAX_HOPS:
            raise Refused(Refusal.TOO_MANY_REDIRECTS, f"more than {MAX_HOPS}")
        if page.named:
            self._scope.add(target)
        elif not self._scope.has_host(target):
            raise Refused(Refusal.OTHER_HOST, f"redirected to {host_of(target)}")
        page.url, page.hops, page.attempts = target, (*page.hops, target), 0
        if target in self._known:
            raise Refused(Refusal.DUPLICATE, f"redirected to {target}")
        self._known.add(target)
        self._put(page, first=True)

    def _listed(self, page: Page, pages: list[str], others: list[str]) -> None:
        links, sitemaps = dict[str, None](), dict[str, None]()
        for locations, into in ((pages, links), (others, sitemaps)):
            for written in locations:
                url = normalize_url(written, page.url)
                if url is None or url not in self._scope:
                    self.report.elsewhere += 1
                elif url not in self._known:
                    into[url] = None
        self._outcome("listed", page, links=tuple(links), sitemaps=tuple(sitemaps))

    def _outcome(self, event: Any, page: Page, record: bytes = b"", **more: Any) -> None:
        """Write an outcome down, then act on it."""
        entry = Entry(event, page.first_url, sitemap=page.sitemap, depth=page.depth, via=page.hops, **more)
        if self._write:
            self._files.append(record + entry.record())
            self.report.fetched += entry.event == "stored"
        elif entry.event == "refused":
            self.report.planned.append(Planned(entry.url, entry.reason, entry.detail))
        self._count(entry)
        self._follow(entry, set())
        if self._bar is not None:
            self._bar.update(self.report.found - self._waiting, total=self.report.found, note=self._words())

    def _count(self, entry: Entry) -> None:
        report = self.report
        report.stored += entry.event == "stored"
        report.stored_bytes += entry.size_bytes
        report.listed += entry.event == "listed"
        if entry.event == "refused":
            report.refused[str(entry.reason)] += 1
            report.examples.setdefault(str(entry.reason), (entry.url, entry.detail))

    def _take_up(self, given: list[Entry]) -> None:
        """Go on from the files: first what is done, then what waits, in the order in which it was found."""
        before = self._files.entries
        named = {entry.url for entry in before if entry.event == "given"}
        for entry in {entry.url: entry for entry in before if entry.event != "given"}.values():
            if not (self._retry_failed and entry.event == "refused" and Refusal(entry.reason).passes):
                self._count(entry)
                self._known.update((entry.url, *entry.via))
                self.report.found += 1
        new = [entry for entry in given if entry.url not in named]
        for entry in (*before, *new):
            self._follow(entry, named)
        if self._write and new:
            self._files.append(b"".join(entry.record() for entry in new))

    def _follow(self, entry: Entry, named: set[str]) -> None:
        """Queue what an entry adds, and widen the scope by what the user named."""
        if entry.event == "given":
            self._scope.add(entry.url)
            self._add(Page(entry.url, entry.url, named=True, sitemap=entry.sitemap))
        elif entry.url in named:
            for hop in entry.via:
                self._scope.add(hop)
        deeper = entry.depth if entry.event == "listed" else entry.depth + 1
        for url in entry.links:
            self._add(Page(url, url, depth=deeper))
        for url in entry.sitemaps:
            self._add(Page(url, url, sitemap=True))

    def _add(self, page: Page) -> None:
        if page.url in self._known:
            return
        if self._waiting >= MAX_WAITING or (page.sitemap and self._n_sitemaps >= MAX_SITEMAPS):
            self.report.overflow += 1
            return
        self._known.add(page.url)
        self.report.found += 1
        self._n_sitemaps += page.sitemap
        self._put(page)

    def _put(self, page: Page, *, first: bool = False) -> None:
        """Queue a page, before the others of its host or behind them."""
        host = self.host(page.url)
        (host.pages.appendleft if first else host.pages.append)(page)
        self._waiting += 1
        if self._bar is not None:
            self._begin(host)

    def _words(self) -> str:
        report = self.report
        stored = f"{report.stored:,} pages, {format_bytes(report.stored_bytes)}"
        return f"{stored} · {report.refused.total():,} refused · {self._waiting:,} waiting"


_SCRAPY_SETTINGS = {
    "TWISTED_REACTOR_ENABLED": False,
    "DOWNLOAD_HANDLERS": {"http": Fetcher, "https": Fetcher},
    # None of Scrapy's own: no cookies, no telnet console, no suffix lists, no caches, no redirects.
    "DOWNLOAD_HANDLERS_BASE": {}, "DOWNLOADER_MIDDLEWARES_BASE": {}, "SPIDER_MIDDLEWARES_BASE": {},
    "EXTENSIONS_BASE": {}, "ADDONS": {}, "TELNETCONSOLE_ENABLED": False, "COOKIES_ENABLED": False,
    "DOWNLOAD_DELAY": 0,  # `Host` keeps the pauses: they begin when an answer has ended, and depend on it
    "LOG_ENABLED": False,
}  # fmt: skip
