"""Links of a page, and what it says about following them.

A scan of the tags, not a parse of the tree: one pass, linear in the page's length for any input, and nothing is
executed. In: the body's bytes. Out: addresses as written, `nofollow` ones left out, and two flags.
"""

from __future__ import annotations

import codecs
import html
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from groundup.corpus.crawl.urls import normalize_url

MAX_LINKS = 20_000
"""Different links that are taken from one page."""

_SCAN_BYTES = 2 << 20
_TAG_CHARACTERS = 8192  # a tag that does not end within this is skipped: no quote can make the scan quadratic

_TAG = re.compile(r"<(?:!--|(a|area|base|meta|script|style|textarea|template)(?=[\s/>]))", re.IGNORECASE)
_ATTRIBUTE = re.compile(r"""[\s/]*([^\s"'<>/=]+)(?:\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'>]+)))?""")
_END = {name: re.compile(f"</{name}", re.IGNORECASE) for name in ("script", "style", "textarea", "template")}
_CHARSET = re.compile(rb"""charset\s*=\s*["']?([\w.:-]{1,40})""", re.IGNORECASE)


@dataclass(frozen=True)
class PageLinks:
    """The links of a page.

    Attributes:
        links: normalized addresses, each once, in the page's order.
        nofollow: the page asks that its links are not followed.
        noindex: the page asks not to be kept.
    """

    links: tuple[str, ...] = ()
    nofollow: bool = False
    noindex: bool = False


def extract_links(body: bytes, url: str, headers: Mapping[str, str], product: str) -> PageLinks:
    """The links of an HTML page, and whether they may be followed.

    Args:
        body: the page, unpacked.
        url: its address.
        headers: its HTTP headers, names in lower case.
        product: our name, for rules that are given to us alone.
    """
    text = _decoded(body[:_SCAN_BYTES], headers.get("content-type", ""))
    rules = _header_rules(headers.get("x-robots-tag", ""), product)
    names = {"robots", product.lower()}
    base, written = url, dict[str, None]()
    for tag, attributes in _tags(text):
        if tag == "meta" and attributes.get("name", "").strip().lower() in names:
            rules |= _words(attributes.get("content", ""))
        elif tag == "base" and "href" in attributes and base == url:
            base = normalize_url(attributes["href"], url) or url
        elif (
            tag in ("a", "area")
            and not (href := attributes.get("href", "").strip()).startswith("#")
            and href
            and "nofollow" not in attributes.get("rel", "").lower().split()
            and len(written) < MAX_LINKS
        ):
            written[href] = None
    nofollow = bool(rules & {"nofollow", "none"})
    found = dict.fromkeys(normalize_url(href, base) for href in (() if nofollow else written))
    return PageLinks(tuple(link for link in found if link is not None), nofollow, bool(rules & {"noindex", "none"}))


def _tags(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Names (lower case) and attributes of the tags that matter; comments, scripts and the like are skipped."""
    at = 0
    while match := _TAG.search(text, at):
        at = match.end()
        if match[1] is None:
            at = text.find("-->", at)
            if at < 0:
                return
            continue
        name = match[1].lower()
        attributes, at = _attributes(text, at)
        if name in _END:
            end = _END[name].search(text, at)
            if end is None:
                return
            at = end.end()
        else:
            yield name, attributes


def _attributes(text: str, at: int) -> tuple[dict[str, str], int]:
    """The attributes from `at` on, and where the tag ends."""
    tag = text[at : at + _TAG_CHARACTERS]
    found: dict[str, str] = {}
    inside = 0
    while match := _ATTRIBUTE.match(tag, inside):
        value = match[2] or match[3] or match[4] or ""
        found.setdefault(match[1].lower(), html.unescape(value))
        inside = match.end()
    end = tag.find(">", inside)
    if end < 0:
        return {}, at + len(tag)
    # Between the last attribute and the end stand only spaces and slashes, or else a quote was never closed.
    return (found if not tag[inside:end].strip(" \t\r\n\f/") else {}), at + end + 1


def _decoded(body: bytes, content_type: str) -> str:
    """As the header or the page itself names the encoding, else UTF-8; what does not fit is replaced."""
    named = _CHARSET.search(content_type.encode("utf-8", "replace")) or _CHARSET.search(body[:2048])
    encoding = named[1].decode("ascii", "replace") if named is not None else "utf-8"
    if body.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    try:
        return body.decode(encoding, "replace")
    except (LookupError, ValueError):  # no such encoding, not one of text, or one that knows no "replace"
        return body.decode("utf-8", "replace")


def _header_rules(value: str, product: str) -> set[str]:
    """X-Robots-Tag: `noindex, nofollow`, each perhaps after the name of the robot it is meant for."""
    rules: set[str] = set()
    ours = True
    for part in value.lower().split(","):
        name, colon, rest = part.partition(":")
        if colon and name.strip() not in ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"):
            ours, part = name.strip() in ("robots", "*", product.lower()), rest
        if ours:
            rules.add(part.strip())
    return rules


def _words(content: str) -> set[str]:
    return {word for word in re.split(r"[\s,]+", content.lower()) if word}
