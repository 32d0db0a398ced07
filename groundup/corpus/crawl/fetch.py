"""What strangers send: requests by Scrapy's download handler of a crawl, and what can be read from their answers.

Time, length, type, and what a body unpacks to are bounded; a connection is made only to an address that was looked at.
Out: a response with its body unpacked and whole, or a `Refused` that says why not; links, addresses of sitemaps, rules
of a robots.txt, in time linear in the bytes, whatever they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import gzip
import io
import ipaddress
import itertools
import re
import socket
import time
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urljoin

import aiohttp
from protego import Protego
from scrapy.core.downloader.handlers.base import BaseDownloadHandler
from scrapy.crawler import Crawler
from scrapy.http import Headers, HtmlResponse, Request, Response
from scrapy.utils.sitemap import Sitemap
from w3lib.url import safe_url_string
from yarl import URL

BACKOFF_SECONDS = 2.0
"""The pause before the first retry; it doubles."""
MAX_SITEMAP_BYTES = 50 << 20
_MAX_LOCATIONS = 50_000  # addresses of one sitemap: the protocol's own limit, as is the one of the bytes
_MAX_LINKS = 20_000  # different ones that are taken from one page
_SCAN_BYTES = 2 << 20
_AGENT = re.compile(r"user-?\s*agent\s*:(.*)", re.IGNORECASE)
_FAULTS: dict[type[Exception], str] = {
    TimeoutError: "timeout", aiohttp.ClientPayloadError: "cut off",
    aiohttp.ClientConnectionError: "connection", OSError: "connection",
}  # fmt: skip
_UNICAST, _NAT64 = ipaddress.IPv6Network("2000::/3"), ipaddress.IPv6Network("64:ff9b::/96")


class Refused(Exception):
    """An address is given up; `again`: for a reason that may pass, if there is a pause of `wait` seconds."""

    def __init__(self, reason: str, detail: str = "", *, again: bool = False, wait: float | None = None) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail, self.again, self.wait = reason, detail[:200], again, wait


class Fetcher(BaseDownloadHandler):
    """Makes a crawl's requests; their `meta` says how long a body may be (`most`), and of which `types`."""

    def __init__(self, crawler: Crawler) -> None:
        super().__init__(crawler)
        spider: Any = crawler.spider
        self._options = options = spider.options
        self._turns = asyncio.Semaphore(options.concurrency)
        accept = ", ".join([*options.types, "*/*;q=0.1"])
        self._client = aiohttp.ClientSession(
            # one address after the other: a refusal ends the attempt
            connector=aiohttp.TCPConnector(limit=0, socket_factory=self._socket, happy_eyeballs_delay=None),
            headers={"User-Agent": options.user_agent, "Accept": accept, "Accept-Encoding": "gzip"},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=15.0),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,  # a proxy of the environment would connect in our place, past the rule on addresses
        )

    async def download_request(self, request: Request) -> Response:
        """Ask for an address once. Raises `Refused`, whatever a server makes a library throw."""
        try:
            async with self._turns, asyncio.timeout(self._options.timeout_seconds):
                return await self._get(request)
        except Refused:
            raise
        except Exception as error:
            text = str(getattr(error, "message", "") or error or type(error).__name__).strip().partition("\n")[0]
            reason = next((reason for kind, reason in _FAULTS.items() if isinstance(error, kind)), "not HTTP")
            raise Refused(reason, text, again=reason != "not HTTP") from error
        finally:  # a host rests from now on
            self.crawler.engine.downloader.slots[request.meta["download_slot"]].lastseen = time.monotonic()

    async def close(self) -> None:
        """Let go of all connections."""
        await self._client.close()

    def _socket(self, address_info: Any) -> socket.socket:
        """For a resolved address, a socket or a refusal: a name that resolves anew is looked at anew."""
        family, kind, protocol, _, address = address_info
        if not self._options.allow_private and not is_public(str(address[0])):
            raise Refused("private address", f"{address[0]} (see --allow-private)")
        return socket.socket(family, kind, protocol)

    async def _get(self, request: Request) -> Response:
        most, types = request.meta["most"], request.meta["types"]
        async with self._client.get(URL(request.url, encoded=True), allow_redirects=False) as answer:
            response, data = Response(request.url, answer.status, Headers(list(answer.raw_headers))), bytearray()
            if answer.status >= 500 or answer.status in (408, 425, 429):
                wait = retry_after_seconds(header(response, "Retry-After"))
                asks = "" if wait is None else f" asks for a pause of {wait:,.0f} s"
                raise Refused("server error", f"HTTP {answer.status}{asks}", again=True, wait=wait)
            if answer.status != 200:
                return response  # without what is still to come
            found = header(response, "Content-Type").partition(";")[0].strip().lower()
            if not any(fnmatch.fnmatchcase(found, pattern) for pattern in types):
                raise Refused("content type", found or "none given")
            if (answer.content_length or 0) > most:
                raise Refused("too large", f"{answer.content_length:,} bytes")
            async for piece in answer.content.iter_any():
                data += piece
                if len(data) > most:
                    raise Refused("too large", f"more than {most:,} bytes")
        encoding = header(response, "Content-Encoding").strip().lower()
        return response.replace(body=await asyncio.to_thread(unpacked, bytes(data), encoding, most))


def header(response: Response, name: str) -> str:
    """A header's values, joined by ", ", each byte as a character; "" without it."""
    return b", ".join(response.headers.getlist(name)).decode("latin-1")


def is_public(address: str) -> bool:
    """Whether an IP address (text, perhaps with an IPv6 zone) belongs to the public internet."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv4Address):
        return parsed.is_global and not parsed.is_multicast
    if parsed.ipv4_mapped or parsed in _NAT64:
        return is_public(str(ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)))
    return parsed.is_global and parsed in _UNICAST and parsed.sixtofour is None


def unpacked(data: bytes, encoding: str, most: int) -> bytes:
    """Undo a Content-Encoding; `Refused` if it is unknown, stops in the middle, or unpacks to over `most` bytes."""
    if encoding in ("", "identity"):
        return data
    if encoding not in ("gzip", "x-gzip"):
        raise Refused("content encoding", f"{encoding[:40]!r}, which we did not ask for")
    try:
        body = gzip.GzipFile(fileobj=io.BytesIO(data)).read(most + 1)
    except EOFError as error:
        raise Refused("cut off", "the gzip stream stops in the middle", again=True) from error
    except (OSError, zlib.error) as error:
        raise Refused("content encoding", f"broken gzip ({error})") from error
    if len(body) > most:
        raise Refused("too large", f"unpacks to more than {most:,} bytes")
    return body


def retry_after_seconds(value: str, now: datetime | None = None) -> float | None:
    """The pause a `Retry-After` header asks for (RFC 9110, 10.2.3: seconds, or a date); None if it says nothing."""
    if value.isascii() and value.strip().isdigit():
        return float(value.strip()[:12])
    with contextlib.suppress(TypeError, ValueError, OverflowError, IndexError):
        date = parsedate_to_datetime(value)
        return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - (now or datetime.now(UTC))).total_seconds())
    return None


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
    """Whether a page says `noindex`, to us (`product`) or all, and its links, unless it or they say `nofollow`."""
    rules = set(re.split(r"[\s,:]+", header(page, "X-Robots-Tag").lower()))  # obeyed whomever it names
    base, written = page.url, dict[str, None]()
    for element in _elements(page):
        href = (element.get("href") or "").strip()
        if element.tag == "meta":
            if (element.get("name") or "").strip().lower() in ("robots", product.lower()):
                rules |= set(re.split(r"[\s,]+", (element.get("content") or "").lower()))
        elif element.tag == "base":
            base = normalize_url(href, page.url) or base if href and base == page.url else base
        elif href and len(written) < _MAX_LINKS and "nofollow" not in (element.get("rel") or "").lower().split():
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
    """The addresses in a sitemap (sitemaps.org: XML or one a line, perhaps gzipped), and whether they are of sitemaps.

    Raises:
        Refused: not a sitemap, too large, broken compression.
    """
    body = unpacked(body, "gzip" if body.startswith(b"\x1f\x8b") else "", MAX_SITEMAP_BYTES)
    if not body[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"<", b"\xff\xfe", b"\xfe\xff", b"\x00<")):
        return body.decode("utf-8-sig", "replace").split()[:_MAX_LOCATIONS], False
    try:
        sitemap = Sitemap(body.strip())
        found = [entry["loc"] for entry in itertools.islice(sitemap, _MAX_LOCATIONS) if entry["loc"]]
    except Exception as error:
        raise Refused("unusable sitemap", f"not XML ({error})") from error
    if sitemap.type not in ("urlset", "sitemapindex"):
        raise Refused("unusable sitemap", f"the XML is a {sitemap.type[:40]}")
    return found, sitemap.type == "sitemapindex"


def parse_robots(body: bytes, product: str) -> Protego:
    """Read a robots.txt for us (`product`)."""
    kept, names = list[str](), set[str]()  # other robots are one, and each is there once: ten thousand cost nothing
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
