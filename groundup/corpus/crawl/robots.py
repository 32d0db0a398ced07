"""robots.txt (RFC 9309): which pages may be asked for, and how long its host is to rest in between.

2xx: its rules; 4xx, or redirects that lead nowhere: all is allowed; 5xx, 429 or no answer: not now (section 2.3.1).
"""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any

from protego import Protego

from groundup.corpus.crawl.fetch import MAX_HOPS, REDIRECTS, location
from groundup.corpus.crawl.report import Refusal, Refused
from groundup.corpus.crawl.urls import origin_of

MAX_BYTES = 512 << 10
"""Of a longer file, the beginning counts (section 2.5 asks for 500 KiB at least)."""
MAX_AGE_SECONDS = 24 * 3600.0
"""When it is to be fetched anew (section 2.4)."""

_AGENT_LINE = re.compile(r"user-?\s*agent\s*:(.*)", re.IGNORECASE)


class Robots:
    """The rules of each origin, asked for by a `Session`."""

    def __init__(self, session: Any) -> None:
        self._session, self._product = session, session.options.product
        self._rules: dict[str, tuple[float, Protego | Refused]] = {}

    async def check(self, url: str) -> None:
        """Raise `Refused` if an address may not be asked for."""
        origin = origin_of(url)
        read, rules = self._rules.get(origin, (0.0, None))
        if rules is None or time.monotonic() - read > MAX_AGE_SECONDS:
            rules = await self._fetch(origin)
            self._rules[origin] = time.monotonic(), rules
        if isinstance(rules, Refused):
            raise rules.with_traceback(None)
        if not rules.can_fetch(url, self._product):
            raise Refused(Refusal.ROBOTS)

    async def _fetch(self, origin: str) -> Protego | Refused:
        session, options, url = self._session, self._session.options, f"{origin}/robots.txt"
        try:
            for _ in range(MAX_HOPS + 1):
                response = await session.ask(url, MAX_BYTES, may_be_cut=True)
                if response.status not in REDIRECTS or (target := location(response)) is None:
                    break
                url = target
            body = response.body if 200 <= response.status < 300 else b""
            rules = await asyncio.to_thread(parse_robots, body, self._product, whole="cut" not in response.flags)
            delay = float(rules.crawl_delay(self._product) or 0.0)
        except Exception as error:  # also a file that its reader cannot stand: it is none that allows anything
            private = isinstance(error, Refused) and error.reason == Refusal.PRIVATE
            return Refused(Refusal.PRIVATE if private else Refusal.ROBOTS_UNREACHABLE, str(error)[:120])
        if delay > max(options.max_wait_seconds, options.delay_seconds):
            said = f"robots.txt asks for a pause of {delay:,.0f} s"
            return Refused(Refusal.ASKED_TO_WAIT, said, wait_seconds=delay)
        session.host(origin).delay = delay if delay > 0 else 0.0
        return rules


def parse_robots(body: bytes, product: str, *, whole: bool = True) -> Protego:
    """Read a robots.txt for us (`product`); of one that is not whole, the last line does not count."""
    if not whole:
        body = body[: max(body.rfind(b"\n"), body.rfind(b"\r")) + 1]
    # Every other robot under one name, and each name once: ten thousand before ten thousand rules cost nothing.
    kept, agents = list[str](), set[str]()
    for line in body.decode("utf-8-sig", "replace").replace("\0", "").splitlines():
        line = line.partition("#")[0].strip()
        if match := _AGENT_LINE.match(line):
            name = match[1].strip().lower()
            name = name if name == "*" or name.replace("*", "") in product.lower() else "another-robot"
            if name not in agents:
                kept.append(f"User-agent: {name}")
            agents.add(name)
        elif line:
            kept.append(line)
            agents.clear()
    return Protego.parse("\n".join(kept))
