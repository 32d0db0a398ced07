"""The frontier: the addresses to fetch, one queue a host, and which host comes next.

At most one request at a time goes to a host, and after each the host rests. A host that rests holds up no other:
who asks for a page gets one of the host that has rested longest.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import xxhash

from groundup.corpus.crawl.urls import host_of

MAX_WAITING = 1_000_000
"""Addresses that may wait at a time; what is found beyond is not followed."""


@dataclass(slots=True)
class Page:
    """An address on its way to an outcome.

    Attributes:
        url: what to ask for next.
        first_url: what was given or found.
        depth: links between it and a given page.
        named: whether the user gave it, not a page or a sitemap.
        sitemap: whether it is a sitemap.
        hops: where redirects led so far.
        attempts: failed requests for `url`.
        claimed: whether it is marked as taken.
    """

    url: str
    first_url: str
    depth: int = 0
    named: bool = False
    sitemap: bool = False
    hops: tuple[str, ...] = ()
    attempts: int = 0
    claimed: bool = False


@dataclass(eq=False)
class Host:
    """One host's queue.

    Attributes:
        name: its name.
        pages: what waits.
        not_before: when it may be asked again, on the clock of `time.monotonic`.
        failures: connections that failed one after the other.
        closed: why it is asked no more in this session, or "".
    """

    name: str
    pages: deque[Page] = field(default_factory=deque)
    not_before: float = 0.0
    failures: int = 0
    closed: str = ""
    busy: bool = False


class Frontier:
    """The addresses that wait, and all that were ever seen.

    Args:
        may_go_on: whether another page may be begun, given how many are in flight; asked before each.
    """

    def __init__(self, may_go_on: Callable[[int], bool]) -> None:
        self.hosts: dict[str, Host] = {}
        self.overflow = 0
        self._may_go_on = may_go_on
        self._known: set[int] = set()
        self._claimed: set[int] = set()
        self._ready: list[tuple[float, int, Host]] = []
        self._order = itertools.count()
        self._changed = asyncio.Event()
        self._in_flight = 0
        self.waiting = 0

    def is_new(self, url: str) -> bool:
        """Whether it was never seen."""
        return _key(url) not in self._known

    def add(self, page: Page) -> bool:
        """Queue a page unless its address was seen before; says whether it did."""
        key = _key(page.url)
        if key in self._known:
            return False
        if self.waiting >= MAX_WAITING:
            self.overflow += 1
            return False
        self._known.add(key)
        self._queue(page, first=False)
        return True

    def mark_done(self, url: str, hops: Iterable[str]) -> None:
        """An address that has its outcome from an earlier session, and where it was redirected to."""
        self._known.add(_key(url))
        self._claimed.update(map(_key, (url, *hops)))

    def claim(self, url: str) -> bool:
        """Mark an address as taken; False if it is taken or done."""
        key = _key(url)
        if key in self._claimed:
            return False
        self._claimed.add(key)
        return True

    def put_back(self, page: Page) -> None:
        """Queue a page again, before the others of its host."""
        self._queue(page, first=True)

    async def take(self) -> tuple[Host, Page] | None:
        """The next page, when its host's turn has come; None when there is nothing left to do.

        Give the host back with `give_back`.
        """
        while True:
            pause: float | None = None
            if not self._may_go_on(self._in_flight):
                if self._in_flight == 0:
                    self._wake()
                    return None
            elif self._ready:
                pause = self._ready[0][0] - time.monotonic()
                if pause <= 0:
                    return self._begin(heapq.heappop(self._ready)[2])
            elif self._in_flight == 0:
                self._wake()
                return None
            self._changed.clear()
            try:
                async with asyncio.timeout(pause):
                    await self._changed.wait()
            except TimeoutError:
                pass

    def give_back(self, host: Host, pause_seconds: float | None) -> None:
        """End a turn.

        Args:
            host: as `take` gave it.
            pause_seconds: how long the host rests; None if it was not asked for anything.
        """
        self._in_flight -= 1
        host.busy = False
        if pause_seconds is not None:
            host.not_before = time.monotonic() + pause_seconds
        self._make_ready(host)
        self._wake()

    def close_host(self, host: Host, why: str) -> None:
        """Ask a host for nothing more in this session; its pages go on waiting."""
        host.closed = why

    def _begin(self, host: Host) -> tuple[Host, Page]:
        host.busy = True
        self._in_flight += 1
        self.waiting -= 1
        return host, host.pages.popleft()

    def _queue(self, page: Page, *, first: bool) -> None:
        name = host_of(page.url)
        host = self.hosts.get(name)
        if host is None:
            host = self.hosts[name] = Host(name)
        if first:
            host.pages.appendleft(page)
        else:
            host.pages.append(page)
        self.waiting += 1
        if len(host.pages) == 1 and not host.busy:
            self._make_ready(host)
            self._wake()

    def _make_ready(self, host: Host) -> None:
        if host.pages and not host.closed:
            heapq.heappush(self._ready, (host.not_before, next(self._order), host))

    def _wake(self) -> None:
        self._changed.set()


def _key(url: str) -> int:
    return xxhash.xxh3_128_intdigest(url.encode())
