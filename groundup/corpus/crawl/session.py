"""One session of a crawl.

For each page, when its host's turn has come: robots.txt, then one request, then an outcome: stored, redirected (the
target takes its turn as a page of its own), asked for again later, or refused with a reason. Links and sitemaps add
pages. Everything that has an outcome is in the journal, so that a killed crawl goes on where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from groundup.console import Bar, Console, format_bytes
from groundup.corpus.crawl.fetch import REDIRECTS, Fetcher, Response
from groundup.corpus.crawl.frontier import Frontier, Host, Page
from groundup.corpus.crawl.journal import Entry, Store
from groundup.corpus.crawl.links import PageLinks, extract_links
from groundup.corpus.crawl.report import CrawlReport
from groundup.corpus.crawl.robots import MAX_AGE_SECONDS, MAX_ROBOTS_BYTES, Robots, parse_robots
from groundup.corpus.crawl.settings import CrawlSettings, Refusal, Refused
from groundup.corpus.crawl.sitemap import MAX_SITEMAP_BYTES, BadSitemap, parse_sitemap
from groundup.corpus.crawl.urls import Scope, host_of, normalize_url, origin_of
from groundup.corpus.crawl.warc import page_records

MAX_HOPS = 5
MAX_SITEMAPS = 1000
_MAX_FAILURES = 5  # connections that fail one after the other until a host is left alone
_LONGEST_BACKOFF_SECONDS = 600.0
_HTML = frozenset({"text/html", "application/xhtml+xml"})


@dataclass(frozen=True)
class Planned:
    """What a crawl would do with an address: fetch it (no reason), or not."""

    url: str
    reason: str = ""
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class Session:
    """The work between a start and an end of `crawl`.

    Args:
        settings: scope, limits, politeness.
        console: where progress is shown.
        fetcher: makes the requests.
        report: what is counted.
        store: where pages go; None to plan only: robots.txt and sitemaps are fetched, pages are not.
        retry_failed: ask again for what earlier sessions gave up for a passing reason.
        before: the journal, where there is no store.
    """

    def __init__(
        self,
        settings: CrawlSettings,
        console: Console,
        fetcher: Fetcher,
        report: CrawlReport,
        store: Store | None,
        *,
        retry_failed: bool = False,
        before: Sequence[Entry] = (),
    ) -> None:
        self.report = report
        self.planned: list[Planned] = []
        self._settings, self._console, self._fetcher, self._store = settings, console, fetcher, store
        self._retry_failed, self._before = retry_failed, before
        self._scope = Scope(same_path=settings.same_path, hosts=settings.hosts)
        self._frontier = Frontier(self._may_go_on)
        self._robots: dict[str, Robots] = {}
        self._robots_attempts: dict[str, int] = {}
        self._bar: Bar | None = None
        self._n_sitemaps = 0

    async def run(self, given: list[Entry]) -> None:
        """Do what is to be done; on a stop, what is in flight is dropped."""
        begin = time.perf_counter()
        task = asyncio.current_task()
        assert task is not None
        with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):  # not Unix, or not the main thread
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        self._take_up(given)
        report = self.report
        try:
            with self._console.bar("crawl", total=report.found) as self._bar:
                async with self._fetcher, asyncio.TaskGroup() as workers:
                    for _ in range(self._settings.concurrency):
                        workers.create_task(self._work())
                self._bar.finish(self._words())
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            report.waiting = report.found - report.stored - report.listed - report.refused.total()
            report.limit = report.limit if report.waiting else ""
            report.overflow = self._frontier.overflow
            report.closed_hosts = {host.name: host.closed for host in self._frontier.hosts.values() if host.closed}
            if self._store is None:
                for host in self._frontier.hosts.values():
                    self.planned += [Planned(page.first_url, Refusal.ASKED_TO_WAIT, host.closed) for page in host.pages]
            report.seconds = time.perf_counter() - begin

    def _take_up(self, given: list[Entry]) -> None:
        """Replay the journal: first what is done, then what waits, in the order in which it was found."""
        named: set[str] = set()
        failed: dict[str, Refusal] = {}  # by address; a later outcome of the same address takes its place
        for entry in self._entries():
            if entry.event == "given":
                named.add(entry.url)
                continue
            if entry.url in failed:
                self.report.discount(entry.url, failed.pop(entry.url))
            if entry.event == "refused" and (reason := Refusal(entry.reason)).passes:
                failed[entry.url] = reason
            self.report.count(entry)
        again = failed if self._retry_failed else {}
        for url, reason in again.items():
            self.report.discount(url, reason)
        for entry in self._entries():
            if entry.event != "given" and entry.url not in again:
                self._frontier.mark_done(entry.url, entry.hops)
        self.report.found = self.report.stored + self.report.listed + self.report.refused.total()
        new = [entry for entry in given if entry.url not in named]
        for entry in self._entries():
            self._follow(entry, named)
        for entry in new:
            self._follow(entry, named)
        if self._store is not None and new:
            self._store.note(*new)

    def _entries(self) -> Iterable[Entry]:
        return self._store.entries() if self._store is not None else self._before

    def _follow(self, entry: Entry, named: set[str]) -> None:
        """Queue what an entry adds, and widen the scope by what the user named."""
        if entry.event == "given":
            self._scope.add(entry.url)
            self._add(Page(entry.url, entry.url, named=True, sitemap=entry.sitemap))
        elif entry.url in named:
            for hop in entry.hops:
                self._scope.add(hop)
        deeper = entry.depth if entry.event == "listed" else entry.depth + 1
        for url in entry.links:
            self._add(Page(url, url, depth=deeper))
        for url in entry.sitemaps:
            self._add(Page(url, url, sitemap=True))

    def _add(self, page: Page) -> None:
        if self._frontier.add(page):
            self.report.found += 1
            self._n_sitemaps += page.sitemap

    def _may_go_on(self, in_flight: int) -> bool:
        if self._store is None:
            return True
        if self.report.stored_bytes >= self._settings.max_bytes:
            self.report.limit = "max_megabytes"
        elif self.report.stored >= self._settings.max_pages:
            self.report.limit = "max_pages"
        else:
            return self.report.stored + in_flight < self._settings.max_pages
        return False

    async def _work(self) -> None:
        while (turn := await self._frontier.take()) is not None:
            host, page = turn
            pause: float | None = None
            try:
                pause = await self._visit(host, page)
            finally:
                self._frontier.give_back(host, pause)

    async def _visit(self, host: Host, page: Page) -> float | None:
        """Bring a page one step further.

        Returns:
            How long the host is to rest, in seconds; None if it was not asked for anything.
        """
        if not page.claimed and not self._frontier.claim(page.url):
            self._refuse(page, Refused(Refusal.DUPLICATE, "another address was redirected to it"))
            return None
        page.claimed = True
        origin = origin_of(page.url)
        robots = self._robots.get(origin)
        if robots is None or time.monotonic() - robots.fetched > MAX_AGE_SECONDS:
            self._frontier.put_back(page)
            return await self._visit_robots(host, origin)
        try:
            robots.check(page.url)
        except Refused as refusal:
            self._refuse(page, refusal)
            return None
        if self._store is None and not page.sitemap:
            self.planned.append(Planned(page.first_url))
            return None
        rest = max(self._settings.delay_seconds, robots.delay_seconds)
        try:
            response = await self._get(page)
            host.failures = 0
            await self._take_in(page, response)
        except Refused as refusal:
            return max(rest, self._after(host, page, refusal))
        return rest

    async def _visit_robots(self, host: Host, origin: str) -> float:
        """Fetch an origin's robots.txt; the page that needs it comes again after the pause."""
        product = self._settings.product
        rest = self._settings.delay_seconds
        try:
            response = await self._get_robots(f"{origin}/robots.txt")
        except Refused as refusal:
            attempts = self._robots_attempts[origin] = self._robots_attempts.get(origin, 0) + 1
            wait = self._wait(refusal, attempts)
            if refusal.again and attempts <= self._settings.retries and wait <= self._settings.max_wait_seconds:
                return max(rest, wait)
            if refusal.reason != Refusal.PRIVATE:
                refusal = Refused(Refusal.ROBOTS_UNREACHABLE, str(refusal))
            self._robots[origin] = Robots(product, refusal=refusal, fetched=time.monotonic())
            return rest
        self._robots_attempts.pop(origin, None)
        rules = None
        if 200 <= response.status < 300:
            rules = await asyncio.to_thread(parse_robots, response.body, product, whole=response.whole)
        robots = self._robots[origin] = Robots(product, rules=rules, fetched=time.monotonic())
        if robots.delay_seconds > max(self._settings.max_wait_seconds, rest):
            why = f"its robots.txt asks for a pause of {robots.delay_seconds:,.0f} s"
            self._frontier.close_host(host, why)
            return rest
        return max(rest, robots.delay_seconds)

    async def _get_robots(self, url: str) -> Response:
        """robots.txt, through at most five redirects (RFC 9309, 2.3.1.2)."""
        for _ in range(MAX_HOPS + 1):
            response = await self._fetcher.get(url, max_bytes=MAX_ROBOTS_BYTES, cut=True)
            if response.status not in REDIRECTS:
                return response
            target = normalize_url(response.headers.get("location", ""), url)
            if target is None:
                break
            url = target
        return replace(response, status=404, body=b"")  # no such file, for all we can tell

    async def _get(self, page: Page) -> Response:
        if page.sitemap:
            return await self._fetcher.get(page.url, max_bytes=MAX_SITEMAP_BYTES)
        return await self._fetcher.get(page.url, max_bytes=self._settings.max_page_bytes, accept=self._check_type)

    def _check_type(self, headers: Mapping[str, str]) -> None:
        found = headers.get("content-type", "").partition(";")[0].strip().lower()
        if not any(fnmatch.fnmatchcase(found, pattern) for pattern in self._settings.types):
            raise Refused(Refusal.TYPE, found[:80] or "none given")

    def _after(self, host: Host, page: Page, refusal: Refused) -> float:
        """Ask again later, leave the host alone, or give the page up; returns the pause, in seconds."""
        page.attempts += 1
        wait = self._wait(refusal, page.attempts)
        if refusal.wait_seconds is not None and refusal.wait_seconds > self._settings.max_wait_seconds:
            self._frontier.close_host(host, f"it asks for a pause of {refusal.wait_seconds:,.0f} s")
            self._frontier.put_back(page)
            return 0.0
        if refusal.again and page.attempts <= self._settings.retries:
            self._frontier.put_back(page)
            return wait
        if refusal.reason == Refusal.CONNECTION and refusal.again:
            host.failures += 1
            if host.failures >= _MAX_FAILURES:
                self._frontier.close_host(host, f"{host.failures} pages in a row: {refusal.detail}")
        self._refuse(page, refusal)
        return 0.0

    def _wait(self, refusal: Refused, attempts: int) -> float:
        """The pause before the next attempt: what the server asks for, else doubling from `backoff_seconds`."""
        if not refusal.again:
            return 0.0
        doubling = self._settings.backoff_seconds * 2.0 ** (attempts - 1)
        return refusal.wait_seconds if refusal.wait_seconds is not None else min(doubling, _LONGEST_BACKOFF_SECONDS)

    async def _take_in(self, page: Page, response: Response) -> None:
        """What an answer leads to: a redirect's target, a sitemap's pages, or a stored page and its links."""
        if response.status in REDIRECTS:
            self._redirect(page, response.headers.get("location", ""))
            return
        if not 200 <= response.status < 300 or response.status in (204, 205, 206):
            raise Refused(Refusal.STATUS, f"HTTP {response.status}")
        if page.sitemap:
            self._outcome(await self._listed(page, response))
            return
        found, records = await asyncio.to_thread(self._prepared, page, response)
        unwanted = found.noindex and not page.named
        entry = Entry(
            "refused" if unwanted else "stored", page.first_url, depth=page.depth, hops=page.hops,
            links=self._new_links(page, found), reason=Refusal.NOINDEX if unwanted else "",
            size_bytes=0 if unwanted else len(response.body),
        )  # fmt: skip
        self._outcome(entry, None if unwanted else records)

    def _prepared(self, page: Page, response: Response) -> tuple[PageLinks, bytes]:
        body = response.body if response.content_type in _HTML else b""
        found = extract_links(body, response.url, response.headers, self._settings.product)
        hops = (page.first_url, *page.hops[:-1]) if page.hops else ()
        return found, page_records(response, hops)

    def _new_links(self, page: Page, found: PageLinks) -> list[str]:
        if page.depth >= self._settings.depth:
            return []
        return [url for url in found.links if url in self._scope and self._frontier.is_new(url)]

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
        if not self._frontier.claim(target):
            raise Refused(Refusal.DUPLICATE, f"redirected to {target}")
        self._frontier.put_back(replace(page, url=target, hops=(*page.hops, target), attempts=0))

    async def _listed(self, page: Page, response: Response) -> Entry:
        try:
            sitemap = await asyncio.to_thread(parse_sitemap, response.body)
        except BadSitemap as error:
            raise Refused(Refusal.BAD_SITEMAP, str(error)) from error
        links, sitemaps = dict[str, None](), dict[str, None]()
        for locations, into in ((sitemap.pages, links), (sitemap.sitemaps, sitemaps)):
            for location in locations:
                url = normalize_url(location, page.url)
                if url is None or url not in self._scope:
                    self.report.elsewhere += 1
                elif self._frontier.is_new(url):
                    into[url] = None
        room = max(0, MAX_SITEMAPS - self._n_sitemaps)
        self._frontier.overflow += max(0, len(sitemaps) - room)
        return Entry(
            "listed", page.first_url, sitemap=True, hops=page.hops,
            links=list(links), sitemaps=list(sitemaps)[:room],
        )  # fmt: skip

    def _refuse(self, page: Page, refusal: Refused) -> None:
        self._outcome(
            Entry(
                "refused", page.first_url, sitemap=page.sitemap, depth=page.depth, hops=page.hops,
                reason=refusal.reason, detail=refusal.detail,
            )
        )  # fmt: skip

    def _outcome(self, entry: Entry, records: bytes | None = None) -> None:
        """Write an outcome down, then act on it."""
        if self._store is None:
            if entry.event == "refused":
                self.planned.append(Planned(entry.url, entry.reason, entry.detail))
        elif records is not None:
            self._store.store(entry, records)
            self.report.fetched += 1
        else:
            self._store.note(entry)
        self.report.count(entry)
        self._follow(entry, set())
        if self._bar is not None:
            done = self.report.found - self._frontier.waiting
            self._bar.update(done, total=self.report.found, note=self._words())

    def _words(self) -> str:
        report = self.report
        return (
            f"{report.stored:,} pages, {format_bytes(report.stored_bytes)} · {report.refused.total():,} refused · "
            f"{self._frontier.waiting:,} waiting"
        )
