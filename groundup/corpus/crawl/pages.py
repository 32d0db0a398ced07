"""What a site says: the links and wishes of a page, the addresses of a sitemap.

In: bytes of strangers. Out: addresses, in time linear in the bytes, whatever they are.
"""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

from lxml import etree
from scrapy.http import HtmlResponse
from scrapy.utils.sitemap import Sitemap

from groundup.corpus.crawl.fetch import unpacked
from groundup.corpus.crawl.report import Refusal, Refused
from groundup.corpus.crawl.urls import normalize_url

MAX_LINKS = 20_000
"""Different links that are taken from one page."""
MAX_SITEMAP_BYTES = 50 << 20
MAX_LOCATIONS = 50_000
"""Addresses of one sitemap: the protocol's own limit, as is the one of the bytes."""

_SCAN_BYTES = 2 << 20


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
