"""What a site says: the links and wishes of a page, the addresses of a sitemap, the rules of a robots.txt.

In: bytes of strangers. Out: addresses and rules, in time linear in the bytes, whatever they are.
"""

from __future__ import annotations

import gzip
import io
import itertools
import re
import zlib
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import NamedTuple

from lxml import etree
from protego import Protego
from scrapy.http import HtmlResponse
from scrapy.utils.sitemap import Sitemap

from groundup.corpus.crawl.report import Refusal, Refused
from groundup.corpus.crawl.urls import normalize_url

MAX_LINKS = 20_000
"""Different links that are taken from one page."""
MAX_SITEMAP_BYTES = 50 << 20
MAX_LOCATIONS = 50_000
"""Addresses of one sitemap: the protocol's own limit, as is the one of the bytes."""

_SCAN_BYTES = 2 << 20
_AGENT_LINE = re.compile(r"user-?\s*agent\s*:(.*)", re.IGNORECASE)


def unpacked(data: bytes, encoding: str, most: int) -> bytes:
    """Undo a Content-Encoding, never further than one byte behind `most`.

    Raises:
        Refused: it is not what its header says, or stops in the middle.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return data
    if encoding not in ("gzip", "x-gzip"):
        raise Refused(Refusal.ENCODING, f"{encoding[:40]!r}, which we did not ask for")
    try:
        return gzip.GzipFile(fileobj=io.BytesIO(data)).read(most + 1)
    except EOFError as error:
        raise Refused(Refusal.CUT_OFF, "the gzip stream stops in the middle", again=True) from error
    except (OSError, zlib.error) as error:
        raise Refused(Refusal.ENCODING, f"broken gzip ({error})"[:120]) from error


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


def parse_robots(body: bytes, product: str, *, whole: bool = True) -> Protego:
    """Read a robots.txt (RFC 9309) for us (`product`); of one that is not whole, the last line does not count."""
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
