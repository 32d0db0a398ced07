"""What a site says: the links and wishes of a page, the addresses of a sitemap, the rules of a robots.txt.

In: bytes of strangers. Out: addresses and rules, in time linear in the bytes, whatever they are.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from lxml import etree
from scrapy.http import HtmlResponse

from groundup.corpus.crawl.report import Refusal, Refused
from groundup.corpus.crawl.urls import normalize_url

if TYPE_CHECKING:
    from protego import Protego

MAX_LINKS = 20_000
"""Different links that are taken from one page."""
MAX_SITEMAP_BYTES = 50 << 20
MAX_LOCATIONS = 50_000
"""Addresses of one sitemap: the protocol's own limit, as is the one of the bytes."""

_SCAN_BYTES = 2 << 20
_AGENT_LINE = re.compile(r"\s*user-?\s*agent\s*:\s*([^#]*)", re.IGNORECASE)
_NO_ROBOT_NAMES = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")


@dataclass(frozen=True)
class PageLinks:
    """The links of a page: normalized addresses, each once; and whether it may be followed and kept."""

    links: tuple[str, ...] = ()
    nofollow: bool = False
    noindex: bool = False


def extract_links(body: bytes, url: str, headers: Mapping[str, str], product: str) -> PageLinks:
    """The links of an HTML page, `nofollow` ones left out, and what the page says about itself.

    Args:
        body: the page, unpacked.
        url: its address.
        headers: its HTTP headers, names in lower case.
        product: our name, for rules that are given to us alone.
    """
    rules = _header_rules(headers.get("x-robots-tag", ""), product.lower())
    base, written = url, dict[str, None]()
    for element in _root(body[:_SCAN_BYTES], headers.get("content-type", "")).iter("a", "area", "base", "meta"):
        href = (element.get("href") or "").strip()
        if element.tag == "meta" and (element.get("name") or "").strip().lower() in ("robots", product.lower()):
            rules |= set(re.split(r"[\s,]+", (element.get("content") or "").lower()))
        elif element.tag == "base" and href and base == url:
            base = normalize_url(href, url) or url
        elif (
            element.tag in ("a", "area")
            and href
            and not href.startswith("#")
            and "nofollow" not in (element.get("rel") or "").lower().split()
            and len(written) < MAX_LINKS
        ):
            written[href] = None
    nofollow = bool(rules & {"nofollow", "none"})
    found = dict.fromkeys(normalize_url(href, base) for href in (() if nofollow else written))
    return PageLinks(tuple(link for link in found if link), nofollow, bool(rules & {"noindex", "none"}))


def _root(body: bytes, content_type: str) -> etree._Element:
    """The tree; the encoding is the header's, else the page's own, else UTF-8."""
    headers = {"Content-Type": content_type.encode("latin-1", "replace")}
    try:
        return HtmlResponse("http://x/", headers=headers, body=body).selector.root
    except (LookupError, ValueError):  # an encoding that is none of text, or one that knows no "replace"
        return HtmlResponse("http://x/", body=body, encoding="utf-8").selector.root


def _header_rules(value: str, product: str) -> set[str]:
    """X-Robots-Tag: `noindex, nofollow`, each perhaps after the name of the robot it is meant for."""
    rules: set[str] = set()
    ours = True
    for part in value.lower().split(","):
        name, colon, rest = part.partition(":")
        if colon and name.strip() not in _NO_ROBOT_NAMES:
            ours, part = name.strip() in ("robots", "*", product), rest
        if ours:
            rules.add(part.strip())
    return rules


def parse_sitemap(body: bytes) -> tuple[list[str], list[str]]:
    """Read a sitemap (sitemaps.org): XML, an index of others, or one address a line, each perhaps gzipped.

    A document type declaration is refused: a sitemap needs none, and entity bombs need one.

    Returns:
        The pages and the further sitemaps that it lists, as written.

    Raises:
        Refused: not well-formed, with a DOCTYPE, too large, broken compression.
    """
    if body.startswith(b"\x1f\x8b"):
        body = _gunzipped(body)
    start = body[:1024].lstrip(b"\xef\xbb\xbf \t\r\n")
    if not start.startswith((b"<", b"\xff\xfe", b"\xfe\xff", b"\x00<")):
        lines = body.decode("utf-8-sig", "replace").splitlines()
        return [line.strip() for line in lines if line.strip()][:MAX_LOCATIONS], []
    found: dict[str, list[str]] = {"url": [], "sitemap": []}
    entries = etree.iterparse(
        io.BytesIO(body.lstrip()), tag=("{*}url", "{*}sitemap"), resolve_entities=False, no_network=True
    )
    try:
        for _, entry in entries:
            for location in entry.iterchildren("{*}loc"):
                text = "".join(location.itertext()).strip()
                if text and len(found["url"]) + len(found["sitemap"]) < MAX_LOCATIONS:
                    found[etree.QName(entry).localname].append(text)
            entry.clear()
        doctype = entries.root.getroottree().docinfo.internalDTD
    except (etree.XMLSyntaxError, LookupError, ValueError) as error:
        raise Refused(Refusal.BAD_SITEMAP, f"not well-formed XML ({error})") from error
    if doctype is not None:
        raise Refused(Refusal.BAD_SITEMAP, "has a DOCTYPE, which no sitemap needs")
    return found["url"], found["sitemap"]


def _gunzipped(body: bytes) -> bytes:
    unpacker = zlib.decompressobj(wbits=31)
    try:
        unpacked = unpacker.decompress(body, MAX_SITEMAP_BYTES + 1)
    except zlib.error as error:
        raise Refused(Refusal.BAD_SITEMAP, f"broken gzip ({error})") from error
    if len(unpacked) > MAX_SITEMAP_BYTES:
        raise Refused(Refusal.BAD_SITEMAP, f"unpacks to more than {MAX_SITEMAP_BYTES >> 20} MiB")
    if not unpacker.eof:
        raise Refused(Refusal.BAD_SITEMAP, "gzip is cut off")
    return unpacked


def parse_robots(body: bytes, product: str, *, whole: bool = True) -> Protego:
    """Read a robots.txt (RFC 9309).

    Args:
        body: its bytes, or the beginning of them.
        product: our name.
        whole: whether nothing was cut off; a line that was cut off does not count.
    """
    from protego import Protego

    if not whole:
        body = body[: max(body.rfind(b"\n"), body.rfind(b"\r")) + 1]
    # Every other robot under one name: ten thousand names before ten thousand rules cost nothing.
    kept: list[str] = []
    for line in body.decode("utf-8-sig", "replace").replace("\0", "").splitlines():
        if match := _AGENT_LINE.match(line):
            name = match[1].strip().lower()
            if name != "*" and name.replace("*", "") not in product.lower():
                line = "User-agent: another-robot"
            if kept and kept[-1] == line:
                continue
        kept.append(line)
    return Protego.parse("\n".join(kept))


def retry_after_seconds(value: str, now: datetime | None = None) -> float | None:
    """The pause a `Retry-After` header asks for (RFC 9110, 10.2.3: seconds, or a date); None if it says nothing."""
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value[:12])
    try:
        date = parsedate_to_datetime(value)
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        return max(0.0, (date - (now or datetime.now(UTC))).total_seconds())
    except (TypeError, ValueError, OverflowError, IndexError):
        return None
