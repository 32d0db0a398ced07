"""Addresses in one spelling, so that nothing is fetched twice, and the rule which of them belong to a crawl.

The spelling is RFC 3986, section 6.2.2 and 6.2.3: lower-case scheme and host (punycode), no default port, no fragment,
no dot segments, percent-escapes in upper case and only where they are needed.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, urljoin, urlsplit

MAX_URL_CHARACTERS = 4096
_DEFAULT_PORTS = {"http": 80, "https": 443}
_UNRESERVED = frozenset(string.ascii_letters + string.digits + "-._~")
_PATH_SAFE = "!$&'()*+,;=:@/-._~%"
_QUERY_SAFE = _PATH_SAFE + "?[]|"
_ESCAPE = re.compile("%([0-9A-Fa-f]{2})")
_STRAY_PERCENT = re.compile("%(?![0-9A-Fa-f]{2})")
_HOST_NAME = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*\.?")


def normalize_url(url: str, base: str | None = None) -> str | None:
    """An http(s) address in its one spelling, ASCII; None if it is not one.

    Args:
        url: as it was written, with whatever around it; lone surrogates stand for raw bytes (`surrogateescape`).
        base: the page it stands on, if it may be relative to it.
    """
    # As browsers do (WHATWG URL, 4.4): surrounding spaces and control characters go, and tabs and newlines inside.
    url = url.strip("".join(map(chr, range(33)))).replace("\t", "").replace("\r", "").replace("\n", "")
    if len(url) > MAX_URL_CHARACTERS:
        return None
    try:
        parts = urlsplit(urljoin(base, url) if base is not None else url)
        scheme, host, port = parts.scheme.lower(), parts.hostname, parts.port
    except ValueError:
        return None
    if scheme not in _DEFAULT_PORTS or not host or parts.username is not None or port == 0:
        return None
    host = _host(host)
    if host is None:
        return None
    try:
        path, query = _requoted(parts.path, _PATH_SAFE), _requoted(parts.query, _QUERY_SAFE)
    except UnicodeEncodeError:
        return None
    authority = host if port in (None, _DEFAULT_PORTS[scheme]) else f"{host}:{port}"
    spelled = f"{scheme}://{authority}{_without_dots(path)}" + (f"?{query}" if query else "")
    return spelled if len(spelled) <= 3 * MAX_URL_CHARACTERS else None


def host_of(url: str) -> str:
    """The host name of a normalized address."""
    return urlsplit(url).hostname or ""


def origin_of(url: str) -> str:
    """Scheme, host and port: what one robots.txt speaks for."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _host(host: str) -> str | None:
    if ":" in host:  # IPv6; urlsplit took the brackets off
        return f"[{host.lower()}]" if re.fullmatch(r"[0-9A-Fa-f:.]+", host) else None
    try:
        name = host.encode("idna").decode("ascii").lower() if not host.isascii() else host.lower()
    except UnicodeError:
        return None
    name = name.removesuffix(".")
    return name if len(name) <= 253 and _HOST_NAME.fullmatch(name) else None


def _requoted(text: str, safe: str) -> str:
    """Escapes only where needed, in upper case."""

    def plain_or_upper(match: re.Match[str]) -> str:
        character = chr(int(match[1], 16))
        return character if character in _UNRESERVED else match[0].upper()

    text = _STRAY_PERCENT.sub("%25", text)
    return quote(_ESCAPE.sub(plain_or_upper, text), safe=safe, errors="surrogateescape")


def _without_dots(path: str) -> str:
    """RFC 3986, 5.2.4; an empty path is "/"."""
    kept: list[str] = []
    segments = path.split("/")[1:] if path.startswith("/") else path.split("/")
    for place, segment in enumerate(segments):
        if segment not in (".", ".."):
            kept.append(segment)
            continue
        if segment == ".." and kept:
            kept.pop()
        if place == len(segments) - 1:
            kept.append("")
    return "/" + "/".join(kept)


@dataclass(frozen=True)
class _HostFolder:
    host: str
    folder: str


class Scope:
    """Which of the addresses found on pages and in sitemaps belong to a crawl.

    Args:
        same_path: whether the folder must be that of a given page.
        hosts: hosts that belong to it in any case.
    """

    def __init__(self, *, same_path: bool, hosts: Iterable[str]) -> None:
        self._same_path = same_path
        self._hosts = {_bare(host) for host in hosts}
        self._host_folders: set[_HostFolder] = set()
        self._hosts_of_places: set[str] = set()

    def add(self, url: str) -> None:
        """An address that the user gave, or that a given one was redirected to."""
        parts = urlsplit(url)
        self._hosts_of_places.add(_bare(parts.hostname or ""))
        if self._same_path:
            self._host_folders.add(_HostFolder(_bare(parts.hostname or ""), _folder(parts)))

    def has_host(self, url: str) -> bool:
        """Whether its host is one that may be visited (`www.` before a name makes no difference)."""
        host = _bare(host_of(url))
        return host in self._hosts or host in self._hosts_of_places

    def __contains__(self, url: str) -> bool:
        parts = urlsplit(url)
        host = _bare(parts.hostname or "")
        if not self._same_path or host in self._hosts:
            return self.has_host(url)
        # Every folder above the address, not every given page: a list of a million pages is no slower.
        folder = _folder(parts)
        while True:
            if _HostFolder(host, folder) in self._host_folders:
                return True
            if folder == "/":
                return False
            folder = folder[:-1].rpartition("/")[0] + "/"


def _bare(host: str) -> str:
    return host.strip().lower().removeprefix("www.")


def _folder(parts: SplitResult) -> str:
    return parts.path.rpartition("/")[0] + "/"
