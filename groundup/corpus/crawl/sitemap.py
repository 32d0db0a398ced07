"""Sitemaps (sitemaps.org protocol): XML, an index of others, or one address a line, each perhaps gzipped.

In: the body of an untrusted response. Out: the addresses in it, as written. A document type declaration is refused
before anything of it is expanded: a sitemap needs none, and entity bombs need one.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from xml.parsers import expat

MAX_SITEMAP_BYTES = 50 << 20
MAX_LOCATIONS = 50_000
"""Addresses of one sitemap: the protocol's own limit, as is the one of the bytes."""
_MAX_ELEMENT_DEPTH = 32


class BadSitemap(Exception):
    """A sitemap cannot be used; says why."""


@dataclass
class Sitemap:
    """What a sitemap lists: pages, or other sitemaps."""

    pages: list[str] = field(default_factory=list)
    sitemaps: list[str] = field(default_factory=list)


def parse_sitemap(body: bytes) -> Sitemap:
    """Read a sitemap.

    Raises:
        BadSitemap: not well-formed, with a DOCTYPE, too large, broken compression.
    """
    if body.startswith(b"\x1f\x8b"):
        body = _gunzipped(body)
    start = body[:1024].lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith(b"<") or body.startswith((b"\xff\xfe", b"\xfe\xff", b"\x00<", b"<\x00")):
        return _parse_xml(body)
    lines = body.decode("utf-8-sig", "replace").splitlines()
    pages = [line.strip() for line in lines if line.strip()]
    return Sitemap(pages=pages[:MAX_LOCATIONS])


def _gunzipped(body: bytes) -> bytes:
    unpacker = zlib.decompressobj(wbits=31)
    try:
        unpacked = unpacker.decompress(body, MAX_SITEMAP_BYTES + 1)
    except zlib.error as error:
        raise BadSitemap(f"broken gzip ({error})") from error
    if len(unpacked) > MAX_SITEMAP_BYTES:
        raise BadSitemap(f"unpacks to more than {MAX_SITEMAP_BYTES >> 20} MiB")
    if not unpacker.eof:
        raise BadSitemap("gzip is cut off")
    return unpacked


def _parse_xml(body: bytes) -> Sitemap:
    found = Sitemap()
    path: list[str] = []
    text: list[str] = []

    def refuse(*_: object) -> None:
        raise BadSitemap("has a DOCTYPE, which no sitemap needs")

    def begin(name: str, _: object) -> None:
        if len(path) >= _MAX_ELEMENT_DEPTH:
            raise BadSitemap(f"elements nested deeper than {_MAX_ELEMENT_DEPTH}")
        path.append(name.rpartition(" ")[2].lower())
        text.clear()

    def end(_: str) -> None:
        if path[-1] == "loc" and len(path) > 1 and (location := "".join(text).strip()):
            into = {"url": found.pages, "sitemap": found.sitemaps}.get(path[-2])
            if into is not None and len(found.pages) + len(found.sitemaps) < MAX_LOCATIONS:
                into.append(location)
        path.pop()
        text.clear()

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    parser.StartElementHandler = begin
    parser.EndElementHandler = end
    parser.CharacterDataHandler = text.append
    try:
        parser.Parse(body, True)
    except expat.ExpatError as error:
        raise BadSitemap(f"not well-formed XML ({error})") from error
    except (LookupError, ValueError) as error:  # an unknown encoding
        raise BadSitemap(f"unreadable XML ({error})") from error
    return found
