"""One session of a crawl: a task for each host asks for its pages one after the other, on Scrapy's engine.

For each page: robots.txt, then requests until redirects end, each under the same rules, then an outcome: stored, or
refused with a reason. Links and sitemaps add pages.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from scrapy import Request, Spider
from scrapy.core.engine import ExecutionEngine
from scrapy.crawler import AsyncCrawlerRunner
from scrapy.http import Response

from groundup.console import Console, format_bytes
from groundup.corpus.crawl.fetch import MAX_HOPS, REDIRECTS, Fetcher, header, location
from groundup.corpus.crawl.pages import MAX_SITEMAP_BYTES, Robots, extract_links, parse_sitemap
from groundup.corpus.crawl.report import CrawlReport, Planned, Refusal, Refused
from groundup.corpus.crawl.urls import Scope, host_of, normalize_url
from groundup.corpus.crawl.warc import Entry, WarcFiles, page_record
from groundup.errors import GroundupError
from groundup.recipe.crawl import CrawlSettings

MAX_WAITING = 1_000_000
"""Addresses that may wait at a time; what is found beyond is not followed."""
MAX_SITEMAPS = 1000
BACKOFF_SECONDS = 2.0
"""The pause before the first retry; it doubles."""
_MAX_FAILURES = 5  # connections that fail one after the other until a host is left alone
_HTML = frozenset({"text/html", "application/xhtml+xml"})


@dataclass(eq=False)
class Host:
    """What waits for one host, and when it may be asked."""

    pages: deque[Entry] = field(default_factory=deque)
    busy: bool = False  # whether a task asks for its pages
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)  # one request at a time
    asked: float = -math.inf  # when the last one ended (time.monotonic)
    rest: float = 0.0  # seconds that a failure asks for
    delay: float = 0.0  # seconds that its robots.txt asks for
    failures: int = 0  # connections that failed one after the other
    closed: str = ""  # why it is asked no more in this session


class _Spider(Spider):
    name = "groundup"
    session: Session

    async def start(self) -> AsyncIterator[Any]:
        assert self.crawler.engine is not None
        await self.session.work(self.crawler.engine)
        return
        yield


class Session:
    """The work between a start and an end of `crawl`; without `write`, pages are only planned."""

    def __init__(
        self, settings: CrawlSettings, console: Console, report: CrawlReport, files: WarcFiles, *, write: bool = True
    ) -> None:
        self.options, self.report = settings, report
        self._console, self._files, self._write = console, files, write
        self._scope = Scope(settings.hosts, same_path=settings.same_path)
        self._robots = Robots(self)
        self._hosts: dict[str, Host] = {}
        self._known: set[str] = set()  # every address that was ever seen
        self._waiting = self._n_sitemaps = 0
        self._turns = asyncio.Semaphore(settings.concurrency)
        self._tasks: asyncio.TaskGroup | None = None
        self._stopped = False

    async def run(self, given: list[Entry], *, retry_failed: bool) -> None:
        """Do what is to be done, until it is done or `stop` is called.

        Raises:
            GroundupError: the disk is full or not writable.
        """
        report, self._loop = self.report, asyncio.get_running_loop()
        try:
            self._take_up(given, retry_failed)
            self._budget = asyncio.Semaphore(max(0, self.options.max_pages - report.stored))
            with self._console.bar("crawl", total=report.found) as self._bar:
                if not self._at_limit():
                    crawler = AsyncCrawlerRunner(_SCRAPY_SETTINGS).create_crawler(_Spider)
                    await crawler.crawl_async(session=self)
                    with contextlib.suppress(asyncio.CancelledError):  # a limit, or `stop`
                        self._all.result()
                if not self._stopped:
                    self._bar.finish(self._words())
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            report.waiting = report.found - report.stored - report.listed - report.refused.total()
            report.limit = report.limit if report.waiting else ""
            report.closed_hosts = {name: host.closed for name, host in self._hosts.items() if host.closed}

    def stop(self) -> None:
        """End the session soon, from any thread; what is in flight is dropped."""
        self._stopped = True
        with contextlib.suppress(AttributeError, RuntimeError):  # it has not begun, or has ended by itself
            self._loop.call_soon_threadsafe(self._all.cancel)

    async def work(self, engine: ExecutionEngine) -> None:
        """Let all hosts be asked."""
        self._engine, self._all = engine, asyncio.ensure_future(self._ask_all())
        if self._stopped:
            self._all.cancel()
        await asyncio.wait({self._all})

    async def _ask_all(self) -> None:
        async with asyncio.TaskGroup() as self._tasks:  # an error in one task cancels the others
            for host in list(self._hosts.values()):
                self._begin(host)

    def _begin(self, host: Host) -> None:
        if self._tasks is not None and not host.busy and host.pages and not host.closed:
            host.busy = True
            self._tasks.create_task(self._ask_host(host))

    async def _ask_host(self, host: Host) -> None:
        while host.pages and not host.closed:
            await self._budget.acquire()  # no more pages are under way than may still be stored
            if not await self._turn(host.pages.popleft()):
                self._budget.release()
            elif self._at_limit():
                self._all.cancel()
        host.busy = False

    def _at_limit(self) -> bool:
        if self._write and self.report.stored_bytes >= self.options.max_megabytes * 10**6:
            self.report.limit = "max_megabytes"
        elif self._write and self.report.stored >= self.options.max_pages:
            self.report.limit = "max_pages"
        return bool(self.report.limit)

    async def _turn(self, page: Entry) -> bool:
        """A page's turn; whatever is thrown in it is the page's own fault. Returns whether the page was stored."""
        self._waiting -= 1
        try:
            response = await self._fetch(page)
            return response is not None and await self._take_in(page, response)
        except GroundupError:  # a full disk
            raise
        except Refused as refused:
            self._refuse(page, refused)
        except Exception as error:
            self._refuse(page, Refused(Refusal.BAD_RESPONSE, f"{type(error).__name__}: {error}"[:120]))
        return False

    async def _fetch(self, page: Entry) -> Response | None:
        """Follow an address to an answer; None if that is only planned."""
        most = MAX_SITEMAP_BYTES if page.sitemap else int(self.options.max_page_mib * 2**20)
        types = ("*",) if page.sitemap else self.options.types
        while not (host := self.host(page.last_url)).closed:
            await self._robots.check(page.last_url)
            if not self._write and not page.sitemap:
                self.report.planned.append(Planned(page.url))
                return None
            response = await self.ask(page.last_url, most, types)
            host.failures = 0
            if response.status not in REDIRECTS:
                return response
            self._redirect(page, response)
        raise Refused(Refusal.ASKED_TO_WAIT, host.closed, wait_seconds=math.inf)

    def _redirect(self, page: Entry, response: Response) -> None:
        if (target := location(response)) is None:
            raise Refused(Refusal.BAD_URL, f"redirected to {header(response, 'Location')[:200]!r}")
        if target in (page.url, *page.via):
            raise Refused(Refusal.REDIRECT_LOOP, f"back to {target}")
        if len(page.via) >= MAX_HOPS:
            raise Refused(Refusal.TOO_MANY_REDIRECTS, f"more than {MAX_HOPS}")
        if page.url in self._named:
            self._scope.add(target)
        elif not self._scope.has_host(target):
            raise Refused(Refusal.OTHER_HOST, f"redirected to {host_of(target)}")
        page.via += (target,)
        if target in self._known:
            raise Refused(Refusal.DUPLICATE, f"redirected to {target}")
        self._known.add(target)

    async def ask(self, url: str, most: int, types: Sequence[str] = ("*",), *, may_be_cut: bool = False) -> Response:
        """Make a request (see `Fetcher`) when its host has rested and one of `concurrency` may be made.

        After a fault that may pass, again, after the pause that the server asks for, else one that doubles.
        """
        options, host, attempt = self.options, self.host(url), 0
        request = Request(url, meta={"most": most, "types": types, "may_be_cut": may_be_cut})
        while True:
            attempt, rest = attempt + 1, 0.0
            async with host.asking:
                await asyncio.sleep(host.asked + max(host.rest, host.delay, options.delay_seconds) - time.monotonic())
                try:
                    async with self._turns:
                        return await self._engine.download_async(request.copy())
                except Refused as refused:
                    again = refused.again and attempt <= options.retries and not self._too_long(refused)
                    backoff = BACKOFF_SECONDS * 2.0 ** (attempt - 1) if again else 0.0
                    rest = backoff if refused.wait_seconds is None else refused.wait_seconds
                    if not again:
                        raise
                finally:
                    host.asked, host.rest = time.monotonic(), min(rest, options.max_wait_seconds)

    def host(self, url: str) -> Host:
        """The host of an address."""
        return self._hosts.setdefault(host_of(url), Host())

    def _too_long(self, refused: Refused) -> bool:
        return (refused.wait_seconds or 0.0) > self.options.max_wait_seconds

    def _refuse(self, page: Entry, refused: Refused) -> None:
        """Give a page up; or leave its host alone until the next session, for which the page then waits."""
        host = self.host(page.last_url)
        if self._too_long(refused) and self._write:
            host.closed = host.closed or str(refused)
            self._waiting += 1
            return
        host.failures += refused.reason == Refusal.CONNECTION and refused.again
        if host.failures >= _MAX_FAILURES:
            host.closed = f"{host.failures} pages in a row: {refused.detail}"
        self._outcome(page, "refused", reason=refused.reason, detail=refused.detail)

    async def _take_in(self, page: Entry, response: Response) -> bool:
        """What an answer leads to: a sitemap's pages, or a stored page (True) and its links."""
        if not 200 <= response.status < 300 or response.status in (204, 205, 206):
            raise Refused(Refusal.STATUS, f"HTTP {response.status}")
        if page.sitemap:
            listed = await asyncio.to_thread(parse_sitemap, response.body)
            pages, sitemaps = (self._inside(page, locations) for locations in listed)
            self._outcome(page, "listed", links=pages, sitemaps=sitemaps)
            return False
        kind, tag = header(response, "Content-Type"), header(response, "X-Robots-Tag")
        html = response.body if kind.partition(";")[0].strip().lower() in _HTML else b""
        found = await asyncio.to_thread(extract_links, html, response.url, kind, tag, self.options.product)
        links = found.links if page.depth < self.options.depth else ()
        links = tuple(url for url in links if url in self._scope and url not in self._known)
        if found.noindex and page.url not in self._named:
            self._outcome(page, "refused", reason=Refusal.NOINDEX, links=links)
            return False
        record = await asyncio.to_thread(page_record, response)
        self._outcome(page, "stored", record, links=links, size_bytes=len(response.body))
        return True

    def _inside(self, sitemap: Entry, locations: list[str]) -> tuple[str, ...]:
        """The new addresses among those of a sitemap."""
        urls = [normalize_url(location, sitemap.last_url) for location in locations]
        inside = [url for url in urls if url is not None and url in self._scope]
        self.report.elsewhere += len(urls) - len(inside)
        return tuple(url for url in dict.fromkeys(inside) if url not in self._known)

    def _outcome(self, page: Entry, event: Any, record: bytes = b"", **more: Any) -> None:
        """Write an outcome down, then act on it."""
        entry = replace(page, event=event, **more)
        if self._write:
            self._files.append(record + entry.record())
            self.report.fetched += event == "stored"
        elif event == "refused":
            self.report.planned.append(Planned(entry.url, entry.reason, entry.detail))
        self._count(entry)
        self._follow(entry)
        self._bar.update(self.report.found - self._waiting, total=self.report.found, note=self._words())

    def _count(self, entry: Entry) -> None:
        report = self.report
        report.stored += entry.event == "stored"
        report.stored_bytes += entry.size_bytes
        report.listed += entry.event == "listed"
        if entry.event == "refused":
            report.refused[str(entry.reason)] += 1
            report.examples.setdefault(str(entry.reason), (entry.url, entry.detail))

    def _take_up(self, given: list[Entry], retry_failed: bool) -> None:
        """Go on from the files: first what is done, then what waits, in the order in which it was found."""
        before = self._files.entries
        self._named = {entry.url for entry in before if entry.event == "given"}
        new = [entry for entry in given if entry.url not in self._named]
        self._named |= {entry.url for entry in new}
        for entry in {entry.url: entry for entry in before if entry.event != "given"}.values():
            if not (retry_failed and entry.event == "refused" and Refusal(entry.reason).passes):
                self._count(entry)
                self._known.update((entry.url, *entry.via))
                self.report.found += 1
        for entry in (*before, *new):
            self._follow(entry)
        if self._write and new:
            self._files.append(b"".join(entry.record() for entry in new))

    def _follow(self, entry: Entry) -> None:
        """Queue what an entry adds, and widen the scope by what the user named."""
        for url in (entry.url, *entry.via) if entry.url in self._named else ():
            self._scope.add(url)
        depth = entry.depth if entry.event == "listed" else entry.depth + 1
        pages = [entry] if entry.event == "given" else [Entry("found", url, depth=depth) for url in entry.links]
        for page in (*pages, *(Entry("found", url, sitemap=True) for url in entry.sitemaps)):
            if page.url in self._known:
                continue
            if self._waiting >= MAX_WAITING or (page.sitemap and self._n_sitemaps >= MAX_SITEMAPS):
                self.report.overflow += 1
                continue
            self._known.add(page.url)
            self.report.found += 1
            self._n_sitemaps += page.sitemap
            self._waiting += 1
            host = self.host(page.url)
            host.pages.append(page)
            self._begin(host)

    def _words(self) -> str:
        stored = f"{self.report.stored:,} pages, {format_bytes(self.report.stored_bytes)}"
        return f"{stored} · {self.report.refused.total():,} refused · {self._waiting:,} waiting"


_SCRAPY_SETTINGS = {
    "TWISTED_REACTOR_ENABLED": False,
    "DOWNLOAD_HANDLERS": {"http": Fetcher, "https": Fetcher},
    # None of Scrapy's own: no cookies, no telnet console, no suffix lists, no caches, no redirects.
    "DOWNLOAD_HANDLERS_BASE": {}, "DOWNLOADER_MIDDLEWARES_BASE": {}, "SPIDER_MIDDLEWARES_BASE": {},
    "EXTENSIONS_BASE": {}, "ADDONS": {}, "TELNETCONSOLE_ENABLED": False, "COOKIES_ENABLED": False,
    "DOWNLOAD_DELAY": 0,  # `Host` keeps the pauses: they begin when an answer has ended, and depend on it
    "LOG_ENABLED": False,
}  # fmt: skip
