"""The crawler's parts on their own: spellings, links, sitemaps, robots.txt, and adversarial forms of each."""

from __future__ import annotations

import gzip
import time
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("scrapy")

from crawl_pages import XMLNS, urlset
from scrapy import Request
from scrapy.http import Response

from groundup.corpus.crawl.fetch import (
    Refused,
    extract_links,
    is_public,
    normalize_url,
    parse_robots,
    parse_sitemap,
    retry_after_seconds,
)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("120", 120.0),
        (" 0 ", 0.0),
        ("Fri, 31 Dec 1999 23:59:59 GMT", 0.0),
        ("Sat, 01 Jan 2000 00:01:00 GMT", 60.0),
        ("", None),
        ("soon", None),
        ("-5", None),
        ("1e9", None),
        ("Sat, 99 Jan 2000", None),
        ("9" * 400, 999_999_999_999.0),
        ("Sat, 01 Jan 9999 00:00:00 -9999", None),
        (f"Sat, 01 Jan {'9' * 400} 00:01:00 GMT", None),
        ("٣", None),
    ],
)
def test_retry_after(value: str, seconds: float | None) -> None:
    assert retry_after_seconds(value, datetime(2000, 1, 1, tzinfo=UTC)) == seconds


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "240.0.0.1",
        "::",
        "::1",
        "::7f00:1",
        "fe80::1%eth0",
        "fc00::1",
        "fec0::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "2002:7f00:1::",
        "2002:a00:1::",
        "64:ff9b::a00:1",
        "64:ff9b:1::1",
        "2001:0:a00:1::1",
        "2001:db8::1",
    ],
)
def test_private_addresses(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    ("written", "spelled"),
    [
        ("HTTP://Example.ORG", "http://example.org/"),
        ("http://example.org:80/a#part", "http://example.org/a"),
        ("https://example.org:443", "https://example.org/"),
        ("https://example.org:8443/", "https://example.org:8443/"),
        ("http://example.org/a/./b/../c", "http://example.org/a/c"),
        ("http://example.org/../../a", "http://example.org/a"),
        ("http://example.org/%7euser/%3f", "http://example.org/~user/%3F"),
        ("http://example.org/a b?c=d e", "http://example.org/a%20b?c=d%20e"),
        ("http://example.org/ü", "http://example.org/%C3%BC"),
        ("http://example.org/100%", "http://example.org/100%25"),
        ("http://example.org/?", "http://example.org/"),
        ("http://bücher.example/", "http://xn--bcher-kva.example/"),
        (" \thttp://exa\nmple.org/ ", "http://example.org/"),
        ("http://example.org./", "http://example.org/"),
        ("http://example.org/?it's", "http://example.org/?it%27s"),
        ("http://[::1]:8080/", "http://[::1]:8080/"),
        ("//example.org/x", None),
        ("example.org", None),
        ("ftp://example.org/", None),
        ("javascript:alert(1)", None),
        ("http://user@example.org/", None),
        ("http://example.org\\@evil.example/", None),
        ("http://example.org:99999/", None),
        ("http://example.org:0/", None),
        ("http://exa mple.org/", None),
        ("http://[::1/", None),
        ("http://@/", None),
        ("http://u@", None),
        ("http://example.org/\udce9", None),
        ("http:///a", None),
        ("http://example.org/" + "a" * 5000, None),
    ],
)
def test_one_spelling(written: str, spelled: str | None) -> None:
    assert normalize_url(written) == spelled


@given(st.text(max_size=60), st.sampled_from(["http://example.org/a/b?c", "https://example.org:81/"]))
def test_the_one_spelling_stays(link: str, base: str) -> None:
    once = normalize_url(link, base)
    if once is not None:
        assert once.isascii()
        assert " " not in once
        assert normalize_url(once) == once == Request(once).url


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"User-agent: a{n}\n" for n in range(15_000)) + "Disallow: /x\n" * 15_000,
        "User-agent: a\n\nUser-agent: g\n#\n" * 8_000 + "Disallow: /x\n" * 15_000,
        "User-agent: *\n" + "Disallow: /" + "*a" * 200_000 + "\n",
        "User-agent: *\n" + "Disallow: /*a*b*c*d*e$\n" * 15_000,
        "User-agent: " + "*" * 400_000 + "\nDisallow: /",
    ],
)
def test_adversarial_robots_txt_is_read_in_time(text: str) -> None:
    begin = time.process_time()
    rules = parse_robots(text.encode(), "groundup")
    rules.can_fetch("http://example.org/" + "abcd" * 1000, "groundup")
    assert time.process_time() - begin < 2


def links_of(body: bytes, url: str = "http://example.org/") -> list[str]:
    response = Response(url, headers={"Content-Type": "text/html"}, body=body)
    return extract_links(response, "groundup")[1]


@pytest.mark.parametrize(
    ("body", "links"),
    [
        (b"<a href=x>", ["x"]),
        (b"<A\nHREF = 'x' >", ["x"]),
        (b'<a title="a > b" href="x?a=1&amp;b=2">', ["x?a=1&b=2"]),
        (b'<a href="x" rel="external NoFollow">', []),
        (b"<area href=x><abbr href=y><a/href=z>", ["x", "z"]),
        (b"<!-- <a href=x> --><a href=y>", ["y"]),
        (b"<script>'<a href=x>'</script><a href=y>", ["y"]),
        (b"<script><a href=x>", []),
        (b"<base href='/base/'><base href=/no/><a href=x>", ["/base/x"]),
        (b"<a href='#part'><a href=''><a href=' '><a>", []),
        (b"<a href=x><a href=x#y>", ["x"]),
        (b'<a href="never closed', []),
        (b"<a href=javascript:x()><a href=http://[bad>", []),
        ("\ufeff<a href='ü'>".encode("utf-16"), ["%C3%BC"]),
        (b"<meta charset=no-such><a href=x>", ["x"]),
        (b"<meta charset=zlib><a href=x>", ["x"]),
        (b"<meta charset=idna><a href=x>", ["x"]),
        (b"", []),
        (bytes(range(256)) * 3, []),
    ],
)
def test_links_of_a_page(body: bytes, links: list[str]) -> None:
    base = "http://example.org/d/"
    assert links_of(body, base) == [normalize_url(link, base) for link in links]


@given(st.binary(max_size=300))
def test_any_bytes_have_links(body: bytes) -> None:
    for link in links_of(b"<a href=" + body):
        assert normalize_url(link) == link


@pytest.mark.parametrize(
    "piece", [b"<a ", b"<a href='", b'<a "', b"<!--", b"<script>", b"<a x=y ", b"<", b"&amp;", b"<a href=x>", b"<meta "]
)
def test_adversarial_pages_are_scanned_in_linear_time(piece: bytes) -> None:
    begin = time.process_time()
    links_of(piece * (1_000_000 // len(piece)))
    assert time.process_time() - begin < 2


LAUGHS = (
    '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "ha">'
    + "".join(f'<!ENTITY {chr(98 + n)} "{f"&{chr(97 + n)};" * 10}">' for n in range(9))
    + "]><urlset><url><loc>&j;</loc></url></urlset>"
)


@pytest.mark.parametrize(
    ("body", "pages"),
    [
        (LAUGHS.encode(), []),
        (LAUGHS.encode("utf-16"), []),
        (gzip.compress(LAUGHS.encode()), []),
        (b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><urlset><url><loc>&e;</loc></url></urlset>', []),
        (b"<a>" * 100_000, None),
        (b"<html>", None),
        (b"<urlset><url><loc>whole</loc></url><url><loc>to", ["whole", "to"]),
        (b'<?xml version="1.0" encoding="no-such"?><x/>', None),
        (gzip.compress(urlset("http://example.org/"))[:-9], None),
        (b"\x1f\x8b rubbish", None),
        (gzip.compress(bytes(60 << 20), 1), None),
        (f'<urlset {XMLNS} xmlns:i="i"><url><loc>p</loc><i:i><i:loc>q</i:loc></i:i></url></urlset>'.encode(), ["p"]),
        (b"<urlset><url><loc>a<![CDATA[&]]>b</loc></url></urlset>", ["a&b"]),
        (b"\xef\xbb\xbfhttp://a/\r\nhttp://b/", ["http://a/", "http://b/"]),
        (b"", []),
        (urlset(*["u"] * 60_000), ["u"] * 50_000),
    ],
)
def test_sitemaps(body: bytes, pages: list[str] | None) -> None:
    """None: refused."""
    begin = time.process_time()
    try:
        assert parse_sitemap(body) == (pages, False)
    except Refused:
        assert pages is None
    assert time.process_time() - begin < 2
