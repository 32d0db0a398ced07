"""robots.txt (RFC 9309) as Scrapy's middleware before each request of a page.

2xx: its rules; 4xx, or redirects that lead nowhere: all is allowed; 5xx, 429 or no answer: not now (section 2.3.1).
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from protego import Protego
from scrapy import Request

from groundup.corpus.crawl.fetch import MAX_HOPS, REDIRECTS, location
from groundup.corpus.crawl.pages import parse_robots
from groundup.corpus.crawl.report import NoOutcome, Refusal, Refused
from groundup.corpus.crawl.urls import host_of, origin_of

if TYPE_CHECKING:
    from scrapy.crawler import Crawler

MAX_AGE_SECONDS = 24 * 3600.0
"""When it is to be fetched anew (section 2.4)."""


class Robots:
    """The rules of each origin, and the pause that they ask for."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._rules: dict[str, tuple[float, Protego | Refused]] = {}

    @classmethod
    def from_crawler(cls, crawler: Crawler) -> Robots:
        """Of the crawler's session."""
        return cls(crawler.spider)

    async def process_request(self, request: Request) -> None:
        """Raise `Refused` if a page may not be asked for."""
        if (page := request.meta.get("page")) is None:
            return
        origin = origin_of(request.url)
        read, rules = self._rules.get(origin, (0.0, None))
        if rules is None or time.monotonic() - read > MAX_AGE_SECONDS:
            rules = await self._fetch(origin)
            self._rules[origin] = time.monotonic(), rules
        if isinstance(rules, Refused):
            raise rules.with_traceback(None)
        if not rules.can_fetch(request.url, self._session.options.product):
            raise Refused(Refusal.ROBOTS)
        self._session.may_fetch(page)

    async def _fetch(self, origin: str) -> Protego | Refused:
        session, options, product = self._session, self._session.options, self._session.options.product
        url: str | None = f"{origin}/robots.txt"
        hops, attempt = 0, 1
        while url is not None and hops <= MAX_HOPS:
            try:
                response = await session.crawler.engine.download_async(Request(url, meta={"attempt": attempt}))
                if response.status in REDIRECTS:
                    url, hops = location(response), hops + 1
                    continue
                body = response.body if 200 <= response.status < 300 else b""
                rules = await asyncio.to_thread(parse_robots, body, product, whole="cut" not in response.flags)
                delay = float(rules.crawl_delay(product) or 0.0)
            except NoOutcome:
                raise
            except Exception as error:  # also a file that its reader cannot stand: it is none that allows anything
                if isinstance(error, Refused) and session.may_retry(error, attempt):
                    attempt += 1
                    continue
                if isinstance(error, Refused) and error.reason == Refusal.PRIVATE:
                    return error
                return Refused(Refusal.ROBOTS_UNREACHABLE, str(error)[:120])
            if delay > max(options.max_wait_seconds, options.delay_seconds):
                said = f"robots.txt asks for a pause of {delay:,.0f} s"
                return Refused(Refusal.ASKED_TO_WAIT, said, wait_seconds=delay)
            session.delays[host_of(origin)] = delay if delay > 0 else 0.0
            return rules
        return Protego.parse("")
