"""One session of a crawl, run by Scrapy's engine.

For each page, when its host's turn has come: robots.txt, then one request, then an outcome: stored, redirected (the
target takes its turn as a page of its own), asked for again later, or refused with a reason. Links and sitemaps add
pages. Scrapy drives it: `Frontier` is its scheduler, `Downloader` its download handler, its slots keep the pauses of
each host, and `Robots` is its one middleware.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import xxhash
from protego import Protego
from scrapy import Request, Spider
from scrapy.core.scheduler import BaseScheduler
from scrapy.crawler import AsyncCrawlerRunner, Crawler
from scrapy.http import Response

from groundup.console import Bar, Console, format_bytes
from groundup.corpus.crawl.download import REDIRECTS, Downloader, header
from groundup.corpus.crawl.pages import MAX_SITEMAP_BYTES, extract_links, parse_robots, parse_sitemap
from groundup.corpus.crawl.report import CrawlReport, Planned, Refusal, Refused
from groundup.corpus.crawl.settings import CrawlSettings
from groundup.corpus.crawl.urls import Scope, host_of, normalize_url, origin_of
from groundup.corpus.crawl.warc import Entry, Exchange, WarcFiles, page_records
from groundup.errors import GroundupError

MAX_WAITING = 1_000_000
"""Addresses that may wait at a time; what is found beyond is not followed."""
MAX_HOPS = 5
MAX_SITEMAPS = 1000
MAX_ROBOTS_BYTES = 512 << 10
"""Of a longer robots.txt, the beginning counts (RFC 9309, section 2.5, asks for 500 KiB at least)."""
MAX_ROBOTS_AGE_SECONDS = 24 * 3600.0
"""When it is to be fetched anew (section 2.4)."""
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
    claimed: bool = False  # whether it is marked as taken


@dataclass(eq=False)
class Host:
    """One host's queue; at most one of its pages is under way."""

    name: str
    pages: deque[Page] = field(default_factory=deque)
    failures: int = 0  # connections that failed one after the other
    closed: str = ""  # why it is asked no more in this session
    busy: bool = False


class Frontier(BaseScheduler):
    """The addresses that wait, one queue a host, and all that were ever seen: Scrapy's scheduler.

    A host that rests holds up no other: the next page is one of the host that may be asked first.
    """

    def __init__(self, session: Session) -> None:
        self.hosts: dict[str, Host] = {}
        self.waiting = self.in_flight = self.overflow = 0
        self._session = session
        self._known: set[int] = set()
        self._claimed: set[int] = set()
        self._ready: list[tuple[float, int, Host]] = []
        self._order = itertools.count()

    @classmethod
    def from_crawler(cls, crawler: Crawler) -> Frontier:
        """The session's."""
        spider: Any = crawler.spider
        return spider.session.frontier

    def has_pending_requests(self) -> bool:
        """Whether there is something to begin now."""
        return bool(self._ready) and self._session.may_begin(self.in_flight)

    def enqueue_request(self, request: Request) -> bool:
        """Pages come by `add` alone."""
        return False

    def next_request(self) -> Request | None:
        """The next page's request; its turn ends with `give_back`."""
        if not self.has_pending_requests():
            return None
        host = heapq.heappop(self._ready)[2]
        host.busy = True
        self.in_flight += 1
        self.waiting -= 1
        return self._session.request(host, host.pages.popleft())

    def give_back(self, host: Host, ready_at: float) -> None:
        """End a turn; the host's next page begins not before `ready_at` (of `time.monotonic`)."""
        self.in_flight -= 1
        host.busy = False
        self._make_ready(host, ready_at)

    def is_new(self, url: str) -> bool:
        """Whether it was never seen."""
        return _key(url) not in self._known

    def add(self, page: Page) -> bool:
        """Queue a page unless its address was seen before; says whether it did."""
        if not self.is_new(page.url):
            return False
        if self.waiting >= MAX_WAITING:
            self.overflow += 1
            return False
        self._known.add(_key(page.url))
        self.put_back(page, first=False)
        return True

    def put_back(self, page: Page, *, first: bool = True) -> None:
        """Queue a page, before the others of its host or behind them."""
        name = host_of(page.url)
        host = self.hosts.setdefault(name, Host(name))
        (host.pages.appendleft if first else host.pages.append)(page)
        self.waiting += 1
        if len(host.pages) == 1 and not host.busy:
            self._make_ready(host, 0.0)

    def mark_done(self, url: str, hops: Iterable[str]) -> None:
        """An address that has its outcome from an earlier session, and where it was redirected to."""
        self._known.add(_key(url))
        self._claimed.update(map(_key, (url, *hops)))

    def claim(self, url: str) -> bool:
        """Mark an address as taken; False if it is taken or done."""
        is_free = _key(url) not in self._claimed
        self._claimed.add(_key(url))
        return is_free

    def _make_ready(self, host: Host, ready_at: float) -> None:
        if host.pages and not host.closed:
            heapq.heappush(self._ready, (ready_at, next(self._order), host))


def _key(url: str) -> int:
    return xxhash.xxh3_128_intdigest(url.encode())


@dataclass(frozen=True)
class Rules:
    """The rules of one origin for us: the parsed file (None: there is none), or why nothing may be fetched."""

    file: Protego | None
    refusal: Refused | None
    delay_seconds: float
    fetched: float


class Robots:
    """Scrapy's middleware before each request of a page."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @classmethod
    def from_crawler(cls, crawler: Crawler) -> Robots:
        """Of the crawler's session."""
        spider: Any = crawler.spider
        return cls(spider.session)

    async def process_request(self, request: Request) -> None:
        """Raise `Refused` if the page may not be asked for."""
        if "page" in request.meta:
            await self._session.check(request.meta["page"])


class _CrawlSpider(Spider):
    name = "groundup"

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    async def start(self) -> AsyncIterator[Any]:
        """Nothing: the session has filled the frontier."""
        return
        yield


class Session:
    """The work between a start and an end of `crawl`.

    Args:
        settings: scope, limits, politeness.
        console: where progress is shown.
        report: what is counted.
        before: what earlier sessions wrote.
        files: where pages go; None to plan only: robots.txt and sitemaps are fetched, pages are not.
        retry_failed: ask again for what earlier sessions gave up for a passing reason.
    """

    def __init__(
        self, settings: CrawlSettings, console: Console, report: CrawlReport, before: list[Entry],
        files: WarcFiles | None, *, retry_failed: bool = False,
    ) -> None:  # fmt: skip
        self.settings, self.report = settings, report
        self.planned: list[Planned] = []
        self.frontier = Frontier(self)
        self._console, self._before, self._files, self._retry_failed = console, before, files, retry_failed
        self._scope = Scope(same_path=settings.same_path, hosts=settings.hosts)
        self._rules: dict[str, Rules] = {}
        self._bar: Bar | None = None
        self._n_sitemaps = 0
        self._error: GroundupError | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.stopping = False
        self._crawler = AsyncCrawlerRunner(
            {
                "TWISTED_REACTOR_ENABLED": False,
                "SCHEDULER": Frontier,
                "DOWNLOAD_HANDLERS": {"http": Downloader, "https": Downloader},
                "DOWNLOADER_MIDDLEWARES": {Robots: 100},
                # None of Scrapy's own: no cookies, no telnet console, no suffix lists, no caches, no redirects.
                "DOWNLOAD_HANDLERS_BASE": {}, "DOWNLOADER_MIDDLEWARES_BASE": {}, "SPIDER_MIDDLEWARES_BASE": {},
                "EXTENSIONS_BASE": {}, "ADDONS": {}, "TELNETCONSOLE_ENABLED": False, "COOKIES_ENABLED": False,
                "CONCURRENT_REQUESTS": 1000,  # most of them wait for their host; `concurrency` transfer: see Downloader
                "CONCURRENT_REQUESTS_PER_DOMAIN": 1,
                "DOWNLOAD_DELAY": settings.delay_seconds,
                "DOWNLOAD_DELAY_JITTER": 0,
                "LOG_ENABLED": False,
            }
        ).create_crawler(_CrawlSpider)  # fmt: skip

    def stop(self, error: GroundupError | None = None) -> None:
        """End the session soon, from any thread; what is in flight is dropped."""
        self._error = self._error or error
        self.stopping = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stopped.cancel)

    async def run(self, given: list[Entry]) -> None:
        """Do what is to be done, until it is done or `stop` is called.

        Raises:
            GroundupError: the disk is full or not writable.
        """
        begin, report = time.perf_counter(), self.report
        self._loop = asyncio.get_running_loop()
        self._stopped = self._loop.create_future()
        try:
            self._take_up(given)
            with self._console.bar("crawl", total=report.found) as self._bar:
                if self.stopping:
                    return
                work = asyncio.ensure_future(self._crawler.crawl_async(session=self))
                await asyncio.wait([work, self._stopped], return_when=asyncio.FIRST_COMPLETED)
                while self.stopping and not work.done():
                    self._release()
                    await asyncio.wait([work], timeout=0.05)
                await work
                if not self.stopping:
                    self._bar.finish(self._words())
        finally:
            report.waiting = report.found - report.stored - report.listed - report.refused.total()
            report.limit = report.limit if report.waiting else ""
            report.overflow = self.frontier.overflow
            hosts = self.frontier.hosts.values()
            report.closed_hosts = {host.name: host.closed for host in hosts if host.closed}
            if self._files is None:
                asked = [
                    Planned(page.first_url, Refusal.ASKED_TO_WAIT, host.closed) for host in hosts for page in host.pages
                ]
                self.planned += asked
            report.seconds = time.perf_counter() - begin
        if self._error is not None:
            raise self._error

    def _release(self) -> None:
        """Let go of the requests that wait for their host's pause to end."""
        for slot in self._crawler.engine.downloader.slots.values():
            slot.close()
            while slot.queue:
                slot.queue.popleft()[1].errback(_NoOutcome())

    async def unless_stopped(self, work: Coroutine[Any, Any, Response]) -> Response:
        """The work's result; dropped when the session stops."""
        task = asyncio.ensure_future(work)
        await asyncio.wait([task, self._stopped], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.wait([task])
            raise _NoOutcome()
        return task.result()

    # What Scrapy's parts ask

    def may_begin(self, in_flight: int) -> bool:
        """Whether another page may be begun, given how many are in flight."""
        report, settings = self.report, self.settings
        if self.stopping or self._files is None:
            return not self.stopping
        if report.stored_bytes >= settings.max_bytes:
            report.limit = "max_megabytes"
        elif report.stored >= settings.max_pages:
            report.limit = "max_pages"
        else:
            return report.stored + in_flight < settings.max_pages
        return False

    def request(self, host: Host, page: Page) -> Request:
        """A page's request."""
        meta: dict[str, Any] = {"page": page, "host": host, "max_bytes": self.settings.max_page_bytes}
        if page.sitemap:
            meta["max_bytes"] = MAX_SITEMAP_BYTES
        else:
            meta["types"] = self.settings.types
        return self._request(page.url, page.attempts + 1, meta)

    def _request(self, url: str, attempt: int, meta: dict[str, Any]) -> Request:
        # The address apart, in our spelling: Scrapy's own differs, and throws at some addresses.
        meta |= {"address": url, "attempt": attempt}
        return Request(origin_of(url), callback=self._answered, errback=self._failed, meta=meta)

    def rest(self, url: str) -> float:
        """How long the host rests after a request, in seconds."""
        rules = self._rules.get(origin_of(url))
        return max(self.settings.delay_seconds, rules.delay_seconds if rules is not None else 0.0)

    def pause(self, refusal: Refused, attempt: int) -> float:
        """How long the host rests after a failure: as the server asks, else doubling from `backoff_seconds`."""
        if refusal.wait_seconds is not None:
            return refusal.wait_seconds if refusal.wait_seconds <= self.settings.max_wait_seconds else 0.0
        if not refusal.again or attempt > self.settings.retries:
            return 0.0
        return min(self.settings.backoff_seconds * 2.0 ** (attempt - 1), _LONGEST_BACKOFF_SECONDS)

    async def check(self, page: Page) -> None:
        """Raise `Refused` unless a page may be asked for: its address is free, and robots.txt allows it."""
        if not page.claimed and not self.frontier.claim(page.url):
            raise Refused(Refusal.DUPLICATE, "another address was redirected to it")
        page.claimed = True
        origin = origin_of(page.url)
        rules = self._rules.get(origin)
        if rules is None or time.monotonic() - rules.fetched > MAX_ROBOTS_AGE_SECONDS:
            rules = self._rules[origin] = await self._fetch_rules(origin)
            if slot := self._crawler.engine.downloader.slots.get(host_of(page.url)):
                slot.delay = max(slot.delay, rules.delay_seconds)
        if (why := rules.refusal) is not None:
            raise Refused(why.reason, why.detail, wait_seconds=why.wait_seconds)
        if rules.file is not None and not rules.file.can_fetch(page.url, self.settings.product):
            raise Refused(Refusal.ROBOTS)
        if self._files is None and not page.sitemap:
            self.planned.append(Planned(page.first_url))
            raise _NoOutcome()

    async def _fetch_rules(self, origin: str) -> Rules:
        """robots.txt. 2xx: its rules; 4xx: all is allowed; 5xx, 429 or no answer: nothing is (RFC 9309, 2.3.1)."""
        product, settings = self.settings.product, self.settings
        for attempt in itertools.count(1):
            try:
                response = await self._fetch_robots(f"{origin}/robots.txt", attempt)
                break
            except Refused as refusal:
                wait = refusal.wait_seconds or 0.0
                if refusal.again and attempt <= settings.retries and wait <= settings.max_wait_seconds:
                    continue
                if refusal.reason != Refusal.PRIVATE:
                    refusal = Refused(Refusal.ROBOTS_UNREACHABLE, str(refusal))
                return Rules(None, refusal, 0.0, time.monotonic())
        if response is None or not 200 <= response.status < 300:
            return Rules(None, None, 0.0, time.monotonic())
        try:
            file = await asyncio.to_thread(parse_robots, response.body, product, whole="cut" not in response.flags)
            delay = float(file.crawl_delay(product) or 0.0)
        except Exception as error:  # a file that its reader cannot stand is none that allows anything
            return Rules(
                None, Refused(Refusal.ROBOTS_UNREACHABLE, f"unreadable ({error})"[:120]), 0.0, time.monotonic()
            )
        if delay > max(settings.max_wait_seconds, settings.delay_seconds):
            why = f"its robots.txt asks for a pause of {delay:,.0f} s"
            return Rules(None, Refused(Refusal.ASKED_TO_WAIT, why, wait_seconds=delay), 0.0, time.monotonic())
        return Rules(file, None, delay if delay > 0 else 0.0, time.monotonic())

    async def _fetch_robots(self, url: str, attempt: int) -> Response | None:
        """robots.txt, through at most five redirects (RFC 9309, 2.3.1.2); None where they lead nowhere."""
        for _ in range(MAX_HOPS + 1):
            request = self._request(url, attempt, {"max_bytes": MAX_ROBOTS_BYTES, "cut": True})
            response = await self._crawler.engine.download_async(request)
            if response.status not in REDIRECTS:
                return response
            target = normalize_url(_location(response), url)
            if target is None:
                break
            url = target
        return None

    # What becomes of a page

    async def _answered(self, response: Response) -> None:
        page, host = response.meta["page"], response.meta["host"]
        host.failures = 0
        try:
            await self._take_in(page, response)
        except Exception as error:
            self._end(host, page, error)
        else:
            self._end(host, page, None)

    def _failed(self, failure: Any) -> None:
        meta = failure.request.meta
        self._end(meta["host"], meta["page"], failure.value)

    def _end(self, host: Host, page: Page, error: BaseException | None) -> None:
        """End a page's turn. Whatever it threw is its own fault; but a full disk ends the session."""
        try:
            if isinstance(error, GroundupError):
                raise error
            if error is not None and not isinstance(error, _NoOutcome):
                if not isinstance(error, Refused):
                    error = Refused(Refusal.BAD_RESPONSE, f"{type(error).__name__}: {error}"[:120])
                self._after(host, page, error)
        except GroundupError as fatal:
            self.stop(fatal)
        finally:
            slot = self._crawler.engine.downloader.slots.get(host.name)
            self.frontier.give_back(host, slot.lastseen + slot.delay if slot is not None else 0.0)

    def _after(self, host: Host, page: Page, refusal: Refused) -> None:
        """Ask again later, leave the host alone, or give the page up."""
        page.attempts += 1
        wait = refusal.wait_seconds
        if wait is not None and wait > self.settings.max_wait_seconds:
            asked = refusal.reason == Refusal.ASKED_TO_WAIT
            host.closed = refusal.detail if asked else f"it asks for a pause of {wait:,.0f} s"
            self.frontier.put_back(page)
            return
        if refusal.again and page.attempts <= self.settings.retries:
            self.frontier.put_back(page)
            return
        if refusal.reason == Refusal.CONNECTION and refusal.again:
            host.failures += 1
            if host.failures >= _MAX_FAILURES:
                host.closed = f"{host.failures} pages in a row: {refusal.detail}"
        self._refuse(page, refusal)

    async def _take_in(self, page: Page, response: Response) -> None:
        """What an answer leads to: a redirect's target, a sitemap's pages, or a stored page and its links."""
        if response.status in REDIRECTS:
            self._redirect(page, _location(response))
            return
        if not 200 <= response.status < 300 or response.status in (204, 205, 206):
            raise Refused(Refusal.STATUS, f"HTTP {response.status}")
        if page.sitemap:
            self._outcome(await self._listed(page, response.body))
            return
        exchange: Exchange = response.meta["exchange"]
        headers = {name: header(response.headers, name) for name in ("content-type", "x-robots-tag")}
        html = headers["content-type"].partition(";")[0].strip().lower() in _HTML
        body = response.body
        found = await asyncio.to_thread(extract_links, body if html else b"", page.url, headers, self.settings.product)
        links = found.links if page.depth < self.settings.depth else ()
        links = tuple(url for url in links if url in self._scope and self.frontier.is_new(url))
        if found.noindex and not page.named:
            self._refuse(page, Refused(Refusal.NOINDEX), links)
            return
        records = await asyncio.to_thread(page_records, page.url, exchange, body)
        via, size = page.hops, len(body)
        entry = Entry("stored", page.first_url, depth=page.depth, via=via, links=links, size_bytes=size)
        self._outcome(entry, records)

    def _redirect(self, page: Page, location: str) -> None:
        target = normalize_url(location, page.url)
        if target is None:
            raise Refused(Refusal.BAD_URL, f"redirected to {location[:200]!r}")
        if target in (page.first_url, *page.hops):
            raise Refused(Refusal.REDIRECT_LOOP, f"back to {target}")
        if len(page.hops) >= MAX_HOPS:
            raise Refused(Refusal.TOO_MANY_REDIRECTS, f"more than {MAX_HOPS}")
        if page.named:
            self._scope.add(target)
        elif not self._scope.has_host(target):
            raise Refused(Refusal.OTHER_HOST, f"redirected to {host_of(target)}")
        if not self.frontier.claim(target):
            raise Refused(Refusal.DUPLICATE, f"redirected to {target}")
        self.frontier.put_back(replace(page, url=target, hops=(*page.hops, target), attempts=0))

    async def _listed(self, page: Page, body: bytes) -> Entry:
        pages, others = await asyncio.to_thread(parse_sitemap, body)
        links, sitemaps = dict[str, None](), dict[str, None]()
        for locations, into in ((pages, links), (others, sitemaps)):
            for location in locations:
                url = normalize_url(location, page.url)
                if url is None or url not in self._scope:
                    self.report.elsewhere += 1
                elif self.frontier.is_new(url):
                    into[url] = None
        room = max(0, MAX_SITEMAPS - self._n_sitemaps)
        self.frontier.overflow += max(0, len(sitemaps) - room)
        kept = list(sitemaps)[:room]
        return Entry("listed", page.first_url, sitemap=True, via=page.hops, links=list(links), sitemaps=kept)

    def _refuse(self, page: Page, refusal: Refused, links: Sequence[str] = ()) -> None:
        self._outcome(
            Entry(
                "refused", page.first_url, sitemap=page.sitemap, depth=page.depth, via=page.hops, links=links,
                reason=refusal.reason, detail=refusal.detail,
            )
        )  # fmt: skip

    def _outcome(self, entry: Entry, records: bytes = b"") -> None:
        """Write an outcome down, then act on it."""
        if self._files is not None:
            self._files.append(records + entry.record())
            self.report.fetched += entry.event == "stored"
        elif entry.event == "refused":
            self.planned.append(Planned(entry.url, entry.reason, entry.detail))
        self._count(entry)
        self._follow(entry, set())
        if self._bar is not None:
            done = self.report.found - self.frontier.waiting
            self._bar.update(done, total=self.report.found, note=self._words())

    def _count(self, entry: Entry) -> None:
        if entry.event == "refused":
            self.report.refuse(entry.url, entry.reason, entry.detail)
        elif entry.event == "listed":
            self.report.listed += 1
        else:
            self.report.stored += 1
            self.report.stored_bytes += entry.size_bytes

    def _take_up(self, given: list[Entry]) -> None:
        """Go on from the files: first what is done, then what waits, in the order in which it was found."""
        named = {entry.url for entry in self._before if entry.event == "given"}
        outcomes = {entry.url: entry for entry in self._before if entry.event != "given"}
        for entry in outcomes.values():
            if self._retry_failed and entry.event == "refused" and Refusal(entry.reason).passes:
                continue
            self._count(entry)
            self.frontier.mark_done(entry.url, entry.via)
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
        if self.frontier.add(page):
            self.report.found += 1
            self._n_sitemaps += page.sitemap

    def _words(self) -> str:
        report = self.report
        return (
            f"{report.stored:,} pages, {format_bytes(report.stored_bytes)} · {report.refused.total():,} refused · "
            f"{self.frontier.waiting:,} waiting"
        )


def _location(response: Response) -> str:
    """The last Location header; lone surrogates stand for raw bytes."""
    return (response.headers.get("Location") or b"").decode("utf-8", "surrogateescape")


class _NoOutcome(Exception):
    """A page's turn ends without an outcome."""
