"""One session of a crawl, run by Scrapy's engine.

For each page, when its host's turn has come: robots.txt, then one request, then an outcome: stored, redirected (the
target takes its turn as a page of its own), asked for again later, or refused with a reason. Links and sitemaps add
pages. `Session` is Scrapy's spider, `Frontier` its scheduler, `Robots` its middleware, `Fetcher` its download handler.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from scrapy import Request, Spider
from scrapy.core.scheduler import BaseScheduler
from scrapy.crawler import AsyncCrawlerRunner, Crawler
from scrapy.http import Response

from groundup.console import Bar, Console, format_bytes
from groundup.corpus.crawl.fetch import MAX_HOPS, REDIRECTS, Fetcher, header, location
from groundup.corpus.crawl.pages import extract_links, parse_sitemap
from groundup.corpus.crawl.report import CrawlReport, NoOutcome, Planned, Refusal, Refused
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
    """One host's queue; at most one of its pages is under way."""

    pages: deque[Page] = field(default_factory=deque)
    failures: int = 0  # connections that failed one after the other
    closed: str = ""  # why it is asked no more in this session
    busy: bool = False


class Frontier(BaseScheduler):
    """The addresses that wait, one queue a host, and all that were ever seen: Scrapy's scheduler."""

    def __init__(self, session: Session) -> None:
        self.hosts: dict[str, Host] = {}
        self.waiting = self.in_flight = 0
        self.known: set[str] = set()
        self._session = session
        self._ready: deque[Host] = deque()

    @classmethod
    def from_crawler(cls, crawler: Crawler) -> Frontier:
        """The session's."""
        session: Any = crawler.spider
        return session.frontier

    def has_pending_requests(self) -> bool:
        """Whether there is something to begin now."""
        return bool(self._ready) and self._session.may_begin()

    def enqueue_request(self, request: Request) -> bool:
        """Pages come by `put` alone."""
        return False

    def next_request(self) -> Request | None:
        """The next page's request; its turn ends with `give_back`."""
        if not self.has_pending_requests():
            return None
        host = self._ready.popleft()
        host.busy, page = True, host.pages.popleft()
        self.in_flight += 1
        self.waiting -= 1
        meta = {"page": page, "host": host, "attempt": page.attempts + 1}
        return Request(page.url, callback=self._session.answered, errback=self._session.failed, meta=meta)

    def give_back(self, host: Host) -> None:
        """End a turn."""
        self.in_flight -= 1
        host.busy = False
        if host.pages and not host.closed:
            self._ready.append(host)

    def put(self, page: Page, *, first: bool = False) -> None:
        """Queue a page, before the others of its host or behind them."""
        host = self.hosts.setdefault(host_of(page.url), Host())
        (host.pages.appendleft if first else host.pages.append)(page)
        self.waiting += 1
        if len(host.pages) == 1 and not host.busy and not host.closed:
            self._ready.append(host)


class Session(Spider):
    """The work between a start and an end of `crawl`; without `files`, pages are only planned."""

    name = "groundup"

    def __init__(
        self, settings: CrawlSettings, console: Console, report: CrawlReport, before: list[Entry],
        files: WarcFiles | None, *, retry_failed: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.options, self.report = settings, report
        self.frontier = Frontier(self)
        self.delays: dict[str, float] = {}  # the pause that a host's robots.txt asks for
        self.requests: set[asyncio.Task[Response]] = set()
        self.stopping = False
        self._console, self._before, self._files, self._retry_failed = console, before, files, retry_failed
        self._scope = Scope(settings.hosts, same_path=settings.same_path)
        self._bar: Bar | None = None
        self._n_sitemaps = 0
        self._error: GroundupError | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    def from_crawler(cls, crawler: Crawler, *_: Any, session: Session, **__: Any) -> Session:
        """Make a session the crawler's spider."""
        session._set_crawler(crawler)
        return session

    async def start(self) -> AsyncIterator[Any]:
        """Nothing: the frontier is filled before."""
        return
        yield

    def stop(self, error: GroundupError | None = None) -> None:
        """End the session soon, from any thread; what is in flight is dropped."""
        self._error = self._error or error
        self.stopping = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in self.requests])

    async def run(self, given: list[Entry]) -> None:
        """Do what is to be done, until it is done or `stop` is called.

        Raises:
            GroundupError: the disk is full or not writable.
        """
        begin, report, hosts = time.perf_counter(), self.report, self.frontier.hosts
        self._loop = asyncio.get_running_loop()
        try:
            self._take_up(given)
            with self._console.bar("crawl", total=report.found) as self._bar:
                if not self.stopping:
                    await AsyncCrawlerRunner(_SCRAPY_SETTINGS).create_crawler(Session).crawl_async(session=self)
                if not self.stopping:
                    self._bar.finish(self._words())
        finally:
            report.waiting = report.found - report.stored - report.listed - report.refused.total()
            report.limit = report.limit if report.waiting else ""
            report.closed_hosts = {name: host.closed for name, host in hosts.items() if host.closed}
            report.seconds = round(time.perf_counter() - begin, 3)
        if self._error is not None:
            raise self._error

    # What Scrapy's parts ask

    def may_begin(self) -> bool:
        """Whether another page may be begun."""
        report, options = self.report, self.options
        if self.stopping or self._files is None:
            return not self.stopping
        if report.stored_bytes >= options.max_megabytes * 10**6:
            report.limit = "max_megabytes"
        elif report.stored >= options.max_pages:
            report.limit = "max_pages"
        else:
            return report.stored + self.frontier.in_flight < options.max_pages
        return False

    def may_fetch(self, page: Page) -> None:
        """End the turn of a page that is only planned."""
        if self._files is None and not page.sitemap:
            self.report.planned.append(Planned(page.first_url))
            raise NoOutcome

    def may_retry(self, refusal: Refused, attempt: int) -> bool:
        """Whether to ask again in this session."""
        wait = refusal.wait_seconds or 0.0
        return refusal.again and attempt <= self.options.retries and wait <= self.options.max_wait_seconds

    def pause(self, refusal: Refused, attempt: int) -> float:
        """How long the host rests after a failure: as the server asks, else doubling from `backoff_seconds`."""
        if refusal.wait_seconds is not None:
            return min(refusal.wait_seconds, self.options.max_wait_seconds)
        if not self.may_retry(refusal, attempt):
            return 0.0
        return min(self.options.backoff_seconds * 2.0 ** (attempt - 1), _LONGEST_BACKOFF_SECONDS)

    async def answered(self, response: Response) -> None:
        """Take in an answer, whatever it is, and end the page's turn."""
        response.meta["host"].failures = 0
        try:
            await self._take_in(response.meta["page"], response)
        except Exception as error:
            self._end(response.meta, error)
        else:
            self.frontier.give_back(response.meta["host"])

    def failed(self, failure: Any) -> None:
        """End the turn of a page without an answer."""
        self._end(failure.request.meta, failure.value)

    # What becomes of a page

    def _end(self, meta: dict[str, Any], error: BaseException) -> None:
        """End a page's turn. Whatever it threw is its own fault; but a full disk ends the session."""
        if not isinstance(error, (Refused, NoOutcome, GroundupError)):
            error = Refused(Refusal.BAD_RESPONSE, f"{type(error).__name__}: {error}"[:120])
        try:
            if isinstance(error, Refused):
                self._after(meta["host"], meta["page"], error)
        except GroundupError as fatal:
            error = fatal
        if isinstance(error, GroundupError):
            self.stop(error)
        self.frontier.give_back(meta["host"])

    def _after(self, host: Host, page: Page, refusal: Refused) -> None:
        """Ask again later, leave the host alone, or give the page up."""
        page.attempts += 1
        too_long = (refusal.wait_seconds or 0.0) > self.options.max_wait_seconds and self._files is not None
        if too_long or self.may_retry(refusal, page.attempts):
            host.closed = str(refusal) if too_long else ""
            self.frontier.put(page, first=True)
            return
        host.failures += refusal.reason == Refusal.CONNECTION and refusal.again
        if host.failures >= _MAX_FAILURES:
            host.closed = f"{host.failures} pages in a row: {refusal.detail}"
        self._outcome("refused", page, reason=refusal.reason, detail=refusal.detail)

    async def _take_in(self, page: Page, response: Response) -> None:
        """What an answer leads to: a redirect's target, a sitemap's pages, or a stored page and its links."""
        if response.status in REDIRECTS:
            self._redirect(page, response)
            return
        if not 200 <= response.status < 300 or response.status in (204, 205, 206):
            raise Refused(Refusal.STATUS, f"HTTP {response.status}")
        if page.sitemap:
            self._listed(page, *await asyncio.to_thread(parse_sitemap, response.body))
            return
        kind, tag = header(response, "Content-Type"), header(response, "X-Robots-Tag")
        html = response.body if kind.partition(";")[0].strip().lower() in _HTML else b""
        found = await asyncio.to_thread(extract_links, html, page.url, kind, tag, self.options.product)
        links = found.links if page.depth < self.options.depth else ()
        links = tuple(url for url in links if url in self._scope and url not in self.frontier.known)
        if found.noindex and not page.named:
            self._outcome("refused", page, reason=Refusal.NOINDEX, links=links)
            return
        record = await asyncio.to_thread(page_record, response)
        self._outcome("stored", page, record, links=links, size_bytes=len(response.body))

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
        if target in self.frontier.known:
            raise Refused(Refusal.DUPLICATE, f"redirected to {target}")
        self.frontier.known.add(target)
        self.frontier.put(page, first=True)

    def _listed(self, page: Page, pages: list[str], others: list[str]) -> None:
        links, sitemaps = dict[str, None](), dict[str, None]()
        for locations, into in ((pages, links), (others, sitemaps)):
            for written in locations:
                url = normalize_url(written, page.url)
                if url is None or url not in self._scope:
                    self.report.elsewhere += 1
                elif url not in self.frontier.known:
                    into[url] = None
        self._outcome("listed", page, links=tuple(links), sitemaps=tuple(sitemaps))

    def _outcome(self, event: Any, page: Page, record: bytes = b"", **more: Any) -> None:
        """Write an outcome down, then act on it."""
        entry = Entry(event, page.first_url, sitemap=page.sitemap, depth=page.depth, via=page.hops, **more)
        if self._files is not None:
            self._files.append(record + entry.record())
            self.report.fetched += entry.event == "stored"
        elif entry.event == "refused":
            self.report.planned.append(Planned(entry.url, entry.reason, entry.detail))
        self._count(entry)
        self._follow(entry, set())
        if self._bar is not None:
            done = self.report.found - self.frontier.waiting
            self._bar.update(done, total=self.report.found, note=self._words())

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
        named = {entry.url for entry in self._before if entry.event == "given"}
        for entry in {entry.url: entry for entry in self._before if entry.event != "given"}.values():
            if not (self._retry_failed and entry.event == "refused" and Refusal(entry.reason).passes):
                self._count(entry)
                self.frontier.known.update((entry.url, *entry.via))
                self.report.found += 1
        new = [entry for entry in given if entry.url not in named]
        for entry in (*self._before, *new):
            self._follow(entry, named)
        if self._files is not None and new:
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
        if page.url in self.frontier.known:
            return
        if self.frontier.waiting >= MAX_WAITING or (page.sitemap and self._n_sitemaps >= MAX_SITEMAPS):
            self.report.overflow += 1
            return
        self.frontier.known.add(page.url)
        self.frontier.put(page)
        self.report.found += 1
        self._n_sitemaps += page.sitemap

    def _words(self) -> str:
        report = self.report
        return (
            f"{report.stored:,} pages, {format_bytes(report.stored_bytes)} · {report.refused.total():,} refused · "
            f"{self.frontier.waiting:,} waiting"
        )


_SCRAPY_SETTINGS = {
    "TWISTED_REACTOR_ENABLED": False,
    "SCHEDULER": Frontier,
    "DOWNLOAD_HANDLERS": {"http": Fetcher, "https": Fetcher},
    "DOWNLOADER_MIDDLEWARES": {Robots: 100},
    # None of Scrapy's own: no cookies, no telnet console, no suffix lists, no caches, no redirects.
    "DOWNLOAD_HANDLERS_BASE": {}, "DOWNLOADER_MIDDLEWARES_BASE": {}, "SPIDER_MIDDLEWARES_BASE": {},
    "EXTENSIONS_BASE": {}, "ADDONS": {}, "TELNETCONSOLE_ENABLED": False, "COOKIES_ENABLED": False,
    "CONCURRENT_REQUESTS": 4096,  # most of them wait for their host; `concurrency` of them transfer: see Fetcher
    "CONCURRENT_REQUESTS_PER_DOMAIN": 1,
    "DOWNLOAD_DELAY": 0,  # Fetcher's: it depends on what the host answers
    "LOG_ENABLED": False,
}  # fmt: skip
