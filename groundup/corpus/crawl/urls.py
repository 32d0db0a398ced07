"""Addresses in one spelling, so that nothing is fetched twice, and the rules which of them may be asked for."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from urllib.parse import quote, urljoin, urlsplit

from w3lib.url import safe_url_string
from yarl import URL

MAX_URL_CHARACTERS = 4096
_BLANKS = "".join(map(chr, range(33)))
_TO_QUOTE = re.compile("[\ud800-\udfff ]")
_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST = re.compile(rf"{_LABEL}(\.{_LABEL})*|[0-9a-f:.]*:[0-9a-f:.]*")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_TUNNELS = [*map(ipaddress.IPv6Network, ("::/96", "2001::/32", "2002::/16", "64:ff9b:1::/48", "fec0::/10"))]
"""Deprecated ways to an IPv4 address or a site within IPv6: compatible, Teredo, 6to4, local NAT64, site-local."""


def normalize_url(url: str, base: str | None = None) -> str | None:
    """An http(s) address in its one spelling (RFC 3986, 6.2.2 and 6.2.3; Scrapy's too), ASCII; None if it is not one.

    It may be relative to `base`; lone surrogates stand for raw bytes (`surrogateescape`).
    """
    # As browsers do (WHATWG URL, 4.4): surrounding spaces and control characters go, and tabs and newlines inside.
    url = re.sub(r"[\t\r\n]", "", url.strip(_BLANKS))
    if len(url) > MAX_URL_CHARACTERS:
        return None
    try:
        url = _TO_QUOTE.sub(lambda found: quote(found[0], errors="surrogateescape"), url)
        parsed = URL(url if base is None else urljoin(base, url))
        host = (parsed.raw_host or "").lower().removesuffix(".")
        known = parsed.scheme in ("http", "https") and "@" not in parsed.raw_authority
        if not known or parsed.port == 0 or len(host) > 253 or not _HOST.fullmatch(host):
            return None
        host, port = f"[{host}]" if ":" in host else host, "" if parsed.is_default_port() else f":{parsed.port}"
        return safe_url_string(f"{parsed.scheme}://{host}{port}{parsed.raw_path_qs}")
    except (ValueError, TypeError, LookupError):
        return None


def host_of(url: str) -> str:
    """The host name of a normalized address."""
    return urlsplit(url).hostname or ""


def origin_of(url: str) -> str:
    """Scheme, host and port: what one robots.txt speaks for."""
    return url[: url.index("/", len("https://"))]


def is_public(address: str) -> bool:
    """Whether an IP address (text, perhaps with an IPv6 zone) belongs to the public internet."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped or parsed in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)))
        if any(parsed in network for network in _TUNNELS):
            return False
    return parsed.is_global and not parsed.is_multicast


class Scope:
    """Which of the addresses found on pages and in sitemaps belong to a crawl (`www.` makes no difference)."""

    def __init__(self, hosts: Iterable[str], *, same_path: bool) -> None:
        self._same_path = same_path
        self._hosts = {host.removeprefix("www.") for host in hosts}
        self._given: set[str] = set()  # host/folder/ of what was given, and its host

    def add(self, url: str) -> None:
        """An address that the user gave, or that a given one was redirected to."""
        folder = _folder(url)
        self._given |= {folder, folder.partition("/")[0]}

    def has_host(self, url: str) -> bool:
        """Whether its host is one that may be visited."""
        host = _folder(url).partition("/")[0]
        return host in self._hosts or host in self._given

    def __contains__(self, url: str) -> bool:
        folder = _folder(url)
        if not self._same_path or folder.partition("/")[0] in self._hosts:
            return self.has_host(url)
        # Every folder above the address, not every given page: a list of a million pages is no slower.
        return any(folder[: mark.end()] in self._given for mark in re.finditer("/", folder))


def _folder(url: str) -> str:
    return host_of(url).removeprefix("www.") + urlsplit(url).path.rpartition("/")[0] + "/"
