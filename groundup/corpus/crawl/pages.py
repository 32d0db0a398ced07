"""What a site says: addresses in one spelling, the links and wishes of a page, sitemaps, the rules of a robots.txt.

In: bytes of strangers. Out: addresses and rules, in time linear in the bytes, whatever they are.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urljoin

from protego import Protego
from scrapy.http import HtmlResponse, Response
from scrapy.utils.sitemap import Sitemap
from w3lib.url import safe_url_string
from yarl import URL

from groundup.corpus.crawl.fetch import Refused, header, unpacked

MAX_LINKS = 20_000
"""Different links that are taken from one page."""
MAX_SITEMAP_BYTES = 50 << 20
MAX_LOCATIONS = 50_000
"""Addresses of one sitemap: the protocol's own limit, as is the one of the bytes."""

_SCAN_BYTES = 2 << 20
_AGENT = re.compile(r"user-?\s*agent\s*:(.*)", re.IGNORECASE)


def normalize_url(url: str, base: str = "") -> str | None:
    """An http(s) address in its one spelling (RFC 3986, 6.2.2 and 6.2.3; Scrapy's too), ASCII; None if it is none."""
    with contextlib.suppress(ValueError, TypeError, LookupError):
        url = re.sub(r"[\t\r\n]", "", url.strip()).replace(" ", "%20")  # as browsers do (WHATWG URL, 4.4)
        parsed = URL(urljoin(base, url))
        host, port = (parsed.raw_host or "").removesuffix("."), "" if parsed.is_default_port() else f":{parsed.port}"
        known = parsed.scheme in ("http", "https") and "@" not in parsed.raw_authority and parsed.port != 0
        if known and re.fullmatch(r"[\w.:-]{1,253}", host) and len(url.encode()) <= 4096:
            host = f"[{host}]" if ":" in host else host
            return safe_url_string(f"{parsed.scheme}://{host}{port}{parsed.raw_path_qs}")
    return None


def extract_links(page: Response, product: str) -> tuple[bool, list[str]]:
    """Whether a page says `noindex`, to us (`product`) or all, and its links if it is HTML, unless one says `nofollow`.

    An X-Robots-Tag is obeyed whomever it names.
    """
    rules = set(re.split(r"[\s,:]+", header(page, "X-Robots-Tag").lower()))
    base, written = page.url, dict[str, None]()
    for element in _elements(page):
        href = (element.get("href") or "").strip()
        if element.tag == "meta":
            if (element.get("name") or "").strip().lower() in ("robots", product.lower()):
                rules |= set(re.split(r"[\s,]+", (element.get("content") or "").lower()))
        elif element.tag == "base":
            base = normalize_url(href, page.url) or base if href and base == page.url else base
        elif href and len(written) < MAX_LINKS and "nofollow" not in (element.get("rel") or "").lower().split():
            written[href] = None
    nofollow = rules & {"nofollow", "none"}
    found = dict.fromkeys(normalize_url(href, base) for href in written if not nofollow and href[0] != "#")
    return bool(rules & {"noindex", "none"}), [link for link in found if link]


def _elements(page: Response) -> Iterator[Any]:
    """Of interest here; the encoding is the header's, else the page's own, else UTF-8."""
    kind, body = header(page, "Content-Type"), page.body[:_SCAN_BYTES]
    if kind.partition(";")[0].strip().lower() not in ("text/html", "application/xhtml+xml"):
        return iter(())
    try:
        root = HtmlResponse("http://x/", headers={"Content-Type": kind}, body=body).selector.root
    except (LookupError, ValueError):  # an encoding that is none of text, or one that knows no "replace"
        root = HtmlResponse("http://x/", body=body, encoding="utf-8").selector.root
    return root.iter("a", "area", "base", "meta")


def parse_sitemap(body: bytes) -> tuple[list[str], bool]:
    """Read a sitemap (sitemaps.org): XML, an index of others, or one address a line, each perhaps gzipped.

    Returns:
        The addresses that it lists, as written, and whether they are of further sitemaps.

    Raises:
        Refused: not a sitemap, too large, broken compression.
    """
    if body.startswith(b"\x1f\x8b"):
        body = unpacked(body, "gzip", MAX_SITEMAP_BYTES)
    if not body[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"<", b"\xff\xfe", b"\xfe\xff", b"\x00<")):
        lines = body.decode("utf-8-sig", "replace").split()
        return lines[:MAX_LOCATIONS], False
    try:
        sitemap = Sitemap(body.strip())
        found = [entry["loc"] for entry in itertools.islice(sitemap, MAX_LOCATIONS) if entry["loc"]]
    except Exception as error:
        raise Refused("unusable sitemap", f"not XML ({error})") from error
    if sitemap.type not in ("urlset", "sitemapindex"):
        raise Refused("unusable sitemap", f"the XML is a {sitemap.type[:40]}")
    return found, sitemap.type == "sitemapindex"


def parse_robots(body: bytes, product: str) -> Protego:
    """Read a robots.txt for us (`product`).

    Of the names before a group those that are not ours are one, and each is there once: ten thousand cost nothing.
    """
    kept, names = list[str](), set[str]()
    for line in body.decode("utf-8-sig", "replace").replace("\0", "").splitlines():
        line = line.partition("#")[0].strip()
        if match := _AGENT.match(line):
            name = match[1].strip().lower()
            name = name if name == "*" or name.replace("*", "") in product.lower() else "another-robot"
            kept += [] if name in names else [f"User-agent: {name}"]
            names.add(name)
        elif line:
            kept.append(line)
            names.clear()
    return Protego.parse("\n".join(kept))
