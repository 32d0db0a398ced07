"""`crawl`: addresses to WARC files, by a Scrapy spider.

A host's pages have their turn one after the other; Scrapy's slots keep the pauses between. In its turn: robots.txt, a
request, then an outcome: stored, or refused with a reason, or a turn at the address that it was redirected to, under
the same rules. Links and sitemaps add pages. What an earlier session stored is read from its file instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout
from protego import Protego
from scrapy import Request, Spider
from scrapy.crawler import AsyncCrawlerRunner
from scrapy.http import Response

from groundup.console import Console, format_bytes
from groundup.corpus.crawl import fetch
from groundup.corpus.crawl.fetch import Refused, normalize_url
from groundup.corpus.crawl.warc import WarcFiles, page_record
from groundup.errors import GroundupError, Interrupted, RunError
from groundup.files import own_folder, remove_partials, write_json
from groundup.recipe.crawl import CrawlSettings

_MAX_WAITING = 500_000  # addresses at a time; what is found beyond is not followed in this session
_MAX_HOPS = 5
_MAX_FAILURES = 5  # connections that fail one after the other until a host is left alone
_MAX_ROBOTS_BYTES = 512 << 10  # a longer one is none that allows anything (RFC 9309, 2.5: at least 500 KiB)
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_SCRAPY = {
    "TWISTED_REACTOR_ENABLED": False, "LOG_ENABLED": False,
    "DOWNLOAD_HANDLERS": {"http": fetch.Fetcher, "https": fetch.Fetcher}, "DOWNLOAD_HANDLERS_BASE": {},
    # None of Scrapy's own: no cookies, no telnet console, no suffix lists, no caches, no redirects.
    "DOWNLOADER_MIDDLEWARES_BASE": {}, "SPIDER_MIDDLEWARES_BASE": {}, "EXTENSIONS_BASE": {},
    "CONCURRENT_REQUESTS_PER_DOMAIN": 1, "DOWNLOAD_DELAY_JITTER": 0.0,
}  # fmt: skip


@dataclass
class CrawlReport:
    """The state of a crawl's folder after a session."""

    outcomes: Counter[str] = field(default_factory=Counter)  # "stored", "sitemap", and why addresses were given up
    examples: dict[str, str] = field(default_factory=dict)  # the first address of each outcome in this session
    waiting: int = 0  # addresses without an outcome
    fetched: int = 0  # pages stored in this session
    stored_bytes: int = 0  # of the bodies of all stored pages
    closed_hosts: dict[str, str] = field(default_factory=dict)  # left alone until the next session, and why
    limit: str = ""  # the setting that ended this session

    @property
    def stored(self) -> int:
        """Pages in the WARC files."""
        return self.outcomes["stored"]


@dataclass(slots=True)
class Page:
    """An address on its way to an outcome."""

    url: str  # where it led so far
    sitemap: bool = False
    named: bool = False  # by the user
    depth: int = 0  # links between it and a page that the user named
    hops: int = 0  # redirects so far


def crawl(
    urls: Sequence[str],
    out: str | Path,
    settings: CrawlSettings | None = None,
    console: Console | None = None,
    *,
    sitemaps: Sequence[str] = (),
) -> CrawlReport:
    """Fetch pages and those that sitemaps list, follow their links, and store them as WARC files in the folder `out`.

    Called again, it goes on with what is not stored.

    Raises:
        GroundupError: an address is not http(s), none was given, or the disk is full.
        RunError: another process works in the folder, or it is not ours.
        Interrupted: Ctrl-C; everything fetched is stored.
    """
    options, console, out = settings or CrawlSettings(), console or Console(quiet=True), Path(out)
    written = [*urls, *sitemaps]
    pages = [Page(normalize_url(url) or "", at >= len(urls), named=True) for at, url in enumerate(written)]
    wrong = [url for url, page in zip(written, pages, strict=True) if not page.url]
    if wrong or not written:
        what = f"{len(wrong):,} of {len(written):,} addresses given cannot be fetched: {', '.join(wrong[:10])}."
        fix = "Give addresses that begin with http:// or https://, name a host and carry no password."
        raise GroundupError(what if written else "No address was given.", fix)
    own_folder(out)
    try:
        with FileLock(out / ".lock", timeout=0.5):
            remove_partials(out)
            files = WarcFiles(out, options.user_agent)
            report = CrawlReport(Counter(stored=len(files.stored)), stored_bytes=files.stored_bytes)
            try:
                _run_session(console, options=options, report=report, files=files, given=pages)
            except KeyboardInterrupt as error:
                raise Interrupted(f"Stopped. {report.stored:,} pages are stored in {out}.") from error
            finally:
                files.close()
                write_json(out / "crawl.json", {"settings": options.model_dump(mode="json"), **vars(report)})
    except Timeout as error:
        what = f"{out}: another process crawls into this folder."
        raise RunError(what, "Wait for it, or choose another folder with --out.") from error
    return report


def _run_session(console: Console, report: CrawlReport, options: CrawlSettings, **job: Any) -> None:
    logging.getLogger("scrapy").addHandler(logging.NullHandler())  # else Python shows its warnings
    stopping = threading.Event()

    async def run() -> None:
        settings = _SCRAPY | {"DOWNLOAD_DELAY": max(options.delay_seconds, 1e-6)}  # with 0 Scrapy never looks at a slot
        crawler = AsyncCrawlerRunner(settings).create_crawler(_Spider)
        await crawler.crawl_async(options=options, report=report, stopping=stopping, **job)
        spider: Any = crawler.spider
        with contextlib.suppress(asyncio.CancelledError):  # a limit, or stopped
            spider.work.result()

    with console.bar("crawl") as bar, ThreadPoolExecutor(1) as pool:
        session, is_done = pool.submit(asyncio.run, run()), False  # an event loop of its own: a notebook has one too
        try:
            while not is_done:  # a signal that another thread gets is seen between two waits
                is_done = bool(wait([session], timeout=0.2).done)
                done, words = report.outcomes.total(), f"{report.stored:,} pages, {format_bytes(report.stored_bytes)}"
                words += f" · {done - report.stored:,} not kept · {report.waiting:,} waiting"
                bar.update(done, total=done + report.waiting, note=words)
            bar.finish(words)
        finally:
            stopping.set()
        if isinstance(error := session.exception(), ExceptionGroup):
            raise error.exceptions[0] from None
        session.result()


class _Spider(Spider):
    name = "groundup"
    options: CrawlSettings
    report: CrawlReport
    files: WarcFiles
    given: list[Page]
    stopping: threading.Event  # ends the session soon; what is in flight is dropped

    async def start(self) -> AsyncIterator[Any]:
        """Does all of it and yields nothing, so that whatever happens is seen: the engine makes the requests."""
        self.work = asyncio.ensure_future(self._ask_all())
        while not self.work.done():
            if self.stopping.is_set():
                self.work.cancel()
            await asyncio.wait({self.work}, timeout=0.1)
        return
        yield

    async def _ask_all(self) -> None:
        self._known = set[str]()  # every address that this session has seen
        self._hosts = defaultdict[str, asyncio.Lock](asyncio.Lock)  # one page at a time, in their order
        self._failures = Counter[str]()  # connections that failed one after the other, by host
        self._rules: dict[tuple[str, float], Protego | Refused] = {}  # of an origin, on a day
        self._scope = {host.removeprefix("www.") + "/" for host in self.options.hosts}  # host/ or host/folder/
        async with asyncio.TaskGroup() as self._tasks:  # an error in one task cancels the others
            for page in self.given:
                self._widen(page.url)
            self._check_limits()
            self._follow(self.given)

    def _follow(self, pages: Iterable[Page]) -> None:
        for page in pages:
            if page.url in self._known:
                continue
            if self.report.waiting >= _MAX_WAITING:
                self.report.outcomes["not followed"] += 1
                continue
            self._known.add(page.url)
            self.report.waiting += page.url not in self.files.stored
            self._tasks.create_task(self._turn(page))

    def _check_limits(self) -> None:
        all_stored = self.report.stored >= self.options.max_pages
        if all_stored or self.report.stored_bytes >= self.options.max_megabytes * 10**6:
            self.report.limit = "max_pages" if all_stored else "max_megabytes"
            self.stopping.set()

    async def _turn(self, page: Page) -> None:
        """A page comes to an outcome, or waits for the next session; where it is redirected it has another turn."""
        report, is_known, outcome = self.report, page.url in self.files.stored, ""
        while not outcome:
            async with self._hosts[host := _host(page.url)]:
                try:
                    outcome, detail = "waiting" if report.limit else await self._take(page), ""
                except GroundupError:  # a full disk
                    raise
                except Exception as error:  # whatever is thrown in its turn is the page's own fault
                    refused = error if isinstance(error, Refused) else Refused("not HTTP", repr(error))
                    outcome, detail = refused.reason, refused.detail
                self._failures[host] = self._failures[host] + 1 if outcome == "connection" else 0
                if outcome == "left alone" or self._failures[host] >= _MAX_FAILURES:
                    report.closed_hosts.setdefault(host, detail)
                if outcome not in ("", "waiting", "left alone") and not is_known:
                    report.waiting -= 1
                    report.outcomes[outcome] += 1
                    report.examples.setdefault(outcome, f"{page.url} {detail}".strip())
                    self._check_limits()

    async def _take(self, page: Page) -> str:
        """What comes of an address; "" if it leads elsewhere."""
        if page.url in self.files.stored:
            self._follow((await self._links(page, self.files.read(page.url)))[1])
            return "stored"
        if _host(page.url) in self.report.closed_hosts:
            raise Refused("left alone")
        if not self._within(page.url):
            raise Refused("outside the crawl")
        await self._check_robots(page.url)
        if page.sitemap:
            response = await self._ask(page.url, fetch.MAX_SITEMAP_BYTES)
        else:
            response = await self._ask(page.url, int(self.options.max_page_mib * 2**20), self.options.types)
        if response.status in _REDIRECTS:
            self._redirect(page, response)
            return ""
        if response.status != 200:
            raise Refused("status", f"HTTP {response.status}")
        if page.sitemap:
            listed, is_index = await asyncio.to_thread(fetch.parse_sitemap, response.body)
            if is_index and not page.named:
                raise Refused("unusable sitemap", "an index in an index")
            found = (normalize_url(location, response.url) for location in listed)
            self._follow(Page(url, sitemap=is_index) for url in found if url)
            return "sitemap"
        noindex, pages = await self._links(page, response)
        record = await asyncio.to_thread(page_record, response)
        if self.report.limit:
            return "waiting"
        self._follow(pages)
        if noindex and not page.named:
            raise Refused("noindex")
        self.files.append(record)
        self.report.fetched += 1
        self.report.stored_bytes += len(response.body)
        return "stored"

    def _redirect(self, page: Page, response: Response) -> None:
        if (target := _location(response)) is None:
            raise Refused("not an http address", f"redirected to {fetch.header(response, 'Location')!r}")
        if page.hops == _MAX_HOPS:
            raise Refused("too many redirects", f"more than {_MAX_HOPS}")
        if page.named:  # what the user named may move
            self._widen(target)
        if target in self._known or target in self.files.stored:
            self._follow([replace(page, url=target)])
            raise Refused("already fetched", f"redirected to {target}")
        page.url, page.hops = target, page.hops + 1
        self._known.add(target)

    async def _links(self, page: Page, response: Response) -> tuple[bool, list[Page]]:
        """Whether a page asks not to be kept, and where it leads within the crawl."""
        noindex, links = await asyncio.to_thread(fetch.extract_links, response, self.options.product)
        links = links if page.depth < self.options.depth else []
        return noindex, [Page(url, depth=page.depth + 1) for url in links if self._within(url)]

    async def _check_robots(self, url: str) -> None:
        origin = url[: url.index("/", len("https://"))]
        key = origin, time.monotonic() // 86400  # a day is what RFC 9309, 2.4, allows
        if key not in self._rules:
            try:
                self._rules[key] = await self._read_robots(origin)
            except Exception as error:  # also a file that its reader cannot stand: it is none that allows anything
                self._rules[key] = Refused("robots.txt unreachable", str(error))
                if isinstance(error, Refused) and error.reason in ("private address", "left alone"):
                    self._rules[key] = error
        rules = self._rules[key]
        if isinstance(rules, Refused):
            raise rules.with_traceback(None)
        if not rules.can_fetch(url, self.options.product):
            raise Refused("robots.txt")

    async def _read_robots(self, origin: str) -> Protego:
        """An origin's robots.txt (RFC 9309, 2.3.1).

        200: its rules; 4xx, or redirects that lead nowhere: all is allowed; 5xx, 429, no answer or no end: not now.
        """
        options, url = self.options, f"{origin}/robots.txt"
        for _ in range(_MAX_HOPS + 1):
            response = await self._ask(url, _MAX_ROBOTS_BYTES)
            if (target := _location(response)) is None:
                break
            url = target
        rules = await asyncio.to_thread(fetch.parse_robots, response.body, options.product)
        delay = float(rules.crawl_delay(options.product) or 0.0)
        if delay > max(options.max_wait_seconds, options.delay_seconds):
            raise Refused("left alone", f"robots.txt asks for a pause of {delay:,.0f} s")
        if delay > options.delay_seconds:
            downloader, host = self.crawler.engine.downloader, _host(origin)
            downloader.slots[host].delay = delay
            downloader.per_slot_settings[host] = {"delay": delay}  # for a slot that Scrapy makes anew after a while
        return rules

    async def _ask(self, url: str, most: int, types: Sequence[str] = ("*",)) -> Response:
        """Ask for an address, after a fault that may pass again; meanwhile its host rests, as long as it asks for."""
        attempt = 0
        while True:
            try:
                return await self.crawler.engine.download_async(Request(url, meta={"most": most, "types": types}))
            except Refused as refused:
                if (refused.wait or 0.0) > self.options.max_wait_seconds:
                    raise Refused("left alone", str(refused)) from refused
                if not refused.again or attempt >= self.options.retries:
                    self.crawler.engine.downloader.slots[_host(url)].lastseen += refused.wait or 0.0  # it rests so long
                    raise
                await asyncio.sleep(fetch.BACKOFF_SECONDS * 2.0**attempt if refused.wait is None else refused.wait)
                attempt += 1

    def _widen(self, url: str) -> None:
        folder = _folder(url)
        self._scope.add(folder if self.options.same_path else folder[: folder.index("/") + 1])

    def _within(self, url: str) -> bool:
        """Whether an address belongs to the crawl (`www.` makes no difference)."""
        folder = _folder(url)
        return any(folder[: mark.end()] in self._scope for mark in re.finditer("/", folder))


def _host(url: str) -> str:
    return urlsplit(url).hostname or ""


def _folder(url: str) -> str:
    return _host(url).removeprefix("www.") + urlsplit(url).path.rpartition("/")[0] + "/"


def _location(response: Response) -> str | None:
    """Where a response redirects to; a byte that is no ASCII is quoted as it is."""
    written = "".join(chr(byte) if byte < 128 else f"%{byte:02X}" for byte in response.headers.get("Location") or b"")
    return normalize_url(written, response.url) if response.status in _REDIRECTS else None
