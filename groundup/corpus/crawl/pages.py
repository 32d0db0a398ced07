"""What a site says: the links and wishes of a page, the addresses of a sitemap, the rules of a robots.txt.

In: bytes of strangers. Out: addresses and rules, in time linear in the bytes, whatever they are.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from typing import Any, NamedTuple

from lxml import etree
from protego import Protego
from scrapy.http import HtmlResponse
from scrapy.utils.sitemap import Sitemap

from groundup.corpus.crawl.fetch import MAX_HOPS, REDIRECTS, location, unpacked
from groundup.corpus.crawl.report import Refusal, Refused
from groundup.corpus.crawl.urls import normalize_url, origin_of

MAX_LINKS = 20_000
"""Different links that are taken from one page."""
MAX_SITEMAP_BYTES = 50 << 20
MAX_LOCATIONS = 50_000
"""Addresses of one sitemap: the protocol's own limit, as is the one of the bytes."""
MAX_ROBOTS_BYTES = 512 << 10
"""Of a longer robots.txt, the beginning counts (RFC 9309, section 2.5, asks for 500 KiB at least)."""

_ROBOTS_SECONDS = 24 * 3600.0  # when it is to be fetched anew (section 2.4)
_SCAN_BYTES = 2 << 20
_AGENT_LINE = re.compile(r"user-?\s*agent\s*:(.*)", re.IGNORECASE)


class PageLinks(NamedTuple):
    """The links of a page: normalized addresses, each once; and whether it may be kept."""

    links: tuple[str, ...] = ()
    noindex: bool = False


def extract_links(body: bytes, url: str, content_type: str, robots_tag: str, product: str) -> PageLinks:
    """The links of an HTML page, unless it or they say `nofollow`, to us (`product`) or all.

    An X-Robots-Tag (`robots_tag`) is obeyed whomever it names.
    """
    rules = set(re.split(r"[\s,:]+", robots_tag.lower()))
    base, written = url, dict[str, None]()
    for element in _root(body[:_SCAN_BYTES], content_type).iter("a", "area", "base", "meta"):
        href = (element.get("href") or "").strip()
        if element.tag == "meta":
            if (element.get("name") or "").strip().lower() in ("robots", product.lower()):
                rules |= set(re.split(r"[\s,]+", (element.get("content") or "").lower()))
        elif element.tag == "base":
            base = normalize_url(href, url) or url if href and base == url else base
        elif href and len(written) < MAX_LINKS and "nofollow" not in (element.get("rel") or "").lower().split():
            written[href] = None
    nofollow = rules & {"nofollow", "none"}
    found = dict.fromkeys(normalize_url(href, base) for href in written if not nofollow and href[0] != "#")
    return PageLinks(tuple(link for link in found if link), bool(rules & {"noindex", "none"}))


def _root(body: bytes, content_type: str) -> etree._Element:
    """The tree; the encoding is the header's, else the page's own, else UTF-8."""
    headers = {"Content-Type": content_type.encode("latin-1", "replace")}
    try:
        return HtmlResponse("http://x/", headers=headers, body=body).selector.root
    except (LookupError, ValueError):  # an encoding that is none of text, or one that knows no "replace"
        return HtmlResponse("http://x/", body=body, encoding="utf-8").selector.root


def parse_sitemap(body: bytes) -> tuple[list[str], list[str]]:
    """Read a sitemap (sitemaps.org): XML, an index of others, or one address a line, each perhaps gzipped.

    Returns:
        The pages and the further sitemaps that it lists, as written.

    Raises:
        Refused: not a sitemap, too large, broken compression.
    """
    if body.startswith(b"\x1f\x8b"):
        body = unpacked(body, "gzip", MAX_SITEMAP_BYTES)
        if len(body) > MAX_SITEMAP_BYTES:
            raise Refused(Refusal.BAD_SITEMAP, f"unpacks to more than {MAX_SITEMAP_BYTES >> 20} MiB")
    if not body[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"<", b"\xff\xfe", b"\xfe\xff", b"\x00<")):
        lines = body.decode("utf-8-sig", "replace").splitlines()
        return [line.strip() for line in lines if line.strip()][:MAX_LOCATIONS], []
    try:
        sitemap = Sitemap(body.strip())
        found = [entry["loc"] for entry in itertools.islice(sitemap, MAX_LOCATIONS) if entry["loc"]]
    except Exception as error:
        raise Refused(Refusal.BAD_SITEMAP, f"not XML ({error})"[:120]) from error
    if sitemap.type not in ("urlset", "sitemapindex"):
        raise Refused(Refusal.BAD_SITEMAP, f"the XML is a {sitemap.type[:40]}")
    return ([], found) if sitemap.type == "sitemapindex" else (found, [])


class Robots:
    """The robots.txt (RFC 9309) of each origin, asked for by a `Session`.

    2xx: its rules; 4xx, or redirects that lead nowhere: all is allowed; 5xx, 429 or no answer: not now (section 2.3.1).
    """

    def __init__(self, session: Any) -> None:
        self._session, self._product = session, session.options.product
        self._rules: dict[str, tuple[float, Protego | Refused]] = {}

    async def check(self, url: str) -> None:
        """Raise `Refused` if an address may not be asked for."""
        origin = origin_of(url)
        read, rules = self._rules.get(origin, (0.0, None))
        if rules is None or time.monotonic() - read > _ROBOTS_SECONDS:
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
                response = await session.ask(url, MAX_ROBOTS_BYTES, may_be_cut=True)
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
