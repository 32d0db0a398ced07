"""The crawler against a server that misbehaves: nothing endless, nothing twice, nothing private."""

from __future__ import annotations

import base64
import gzip
import hashlib
import itertools
import json
import random
import socket
import ssl
import sys
import time
import tracemalloc
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from misbehaving_server import MisbehavingServer, answering, closing, failing_first, page, redirect

pytest.importorskip("scrapy")

from crawl_pages import check_law, files_of, index, only_reason, pages_of, quick, records_of, refused, urlset

from groundup.corpus.crawl import CrawlReport, CrawlSettings, crawl, fetch, warc
from groundup.errors import GroundupError


@pytest.fixture
def server() -> Iterator[MisbehavingServer]:
    with MisbehavingServer() as started:
        yield started


@pytest.fixture
def as_if_public(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's address counts as public, every other private one as private."""
    is_public = fetch.is_public
    monkeypatch.setattr(fetch, "is_public", lambda address: address == "127.0.0.1" or is_public(address))


# What is stored


def test_a_page_is_stored_as_any_warc_reader_expects(server: MisbehavingServer, tmp_path: Path) -> None:
    server.pages["/a"] = body = page("a")
    crawl([server.url("/a")], tmp_path / "out", quick(user_agent="tester/1 (me@example.org)"))
    info, response = records_of(tmp_path / "out")
    assert info[0] == "warcinfo"
    assert b"tester/1 (me@example.org)" in info[3]
    assert response[0] == "response"
    assert response[1] == server.url("/a")
    assert response[3] == body
    (path,) = files_of(tmp_path / "out")
    text = gzip.decompress(path.read_bytes())
    digest = base64.b32encode(hashlib.sha1(body).digest())
    assert b"WARC-Payload-Digest: sha1:" + digest in text
    summary = json.loads((tmp_path / "out" / "crawl.json").read_text())
    assert summary["outcomes"]["stored"] == 1
    assert summary["settings"]["user_agent"] == "tester/1 (me@example.org)"


def test_the_corpus_reads_what_was_crawled(server: MisbehavingServer, tmp_path: Path) -> None:
    pytest.importorskip("resiliparse")
    from groundup.corpus import read
    from groundup.recipe import CorpusSettings

    words = " ".join(f"The {n}. sentence of a page that somebody wrote by hand." for n in range(30))
    server.pages["/a"] = f"<html><body><article><h1>Title</h1><p>{words}</p></article></body></html>".encode()
    server.pages["/b"] = redirect("/a")
    crawl([server.url("/b")], tmp_path / "out", quick())
    (document,) = read(tmp_path / "out", settings=CorpusSettings(extractor="resiliparse"))
    assert "The 29. sentence" in document.text
    assert document.url == server.url("/a")


@pytest.mark.parametrize("path", ["/gzip", "/gzip-twice", "/chunked", "/more-than-said"])
def test_bodies_are_stored_unpacked_and_headers_tell_the_truth(
    server: MisbehavingServer, tmp_path: Path, path: str
) -> None:
    crawl([server.url(path)], tmp_path, quick())
    (headers, body), *more = [(headers, body) for kind, _, headers, body in records_of(tmp_path) if kind == "response"]
    assert not more
    assert body.startswith(page(path.strip("/").replace("-twice", "").replace("-", " "))[:60])
    assert int(headers["content-length"]) == len(body)
    assert "content-encoding" not in headers
    assert "transfer-encoding" not in headers
    assert b"smuggled" not in body


def test_files_rotate_and_nothing_is_split(
    server: MisbehavingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warc, "FILE_BYTES", 100_000)
    noise = random.Random(1)
    for number in range(8):
        server.pages[f"/{number}"] = b"<p>" + noise.randbytes(30_000)
    crawl([server.url(f"/{number}") for number in range(8)], tmp_path, quick())
    assert [path.name for path in files_of(tmp_path)] == [f"pages-{number:05d}.warc.gz" for number in range(3)]
    assert all(path.stat().st_size < 110_000 for path in files_of(tmp_path))
    assert pages_of(tmp_path) == {server.url(f"/{number}"): server.pages[f"/{number}"] for number in range(8)}


def test_a_proxy_of_the_environment_is_not_asked(
    server: MisbehavingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would connect in our place, past the rule on addresses."""
    with MisbehavingServer() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url())
        assert crawl([server.url("/gzip")], tmp_path, quick()).stored == 1
        assert proxy.requests == []


def test_nothing_of_scrapy_asks_the_network_or_keeps_cookies(server: MisbehavingServer, tmp_path: Path) -> None:
    asked: list[dict[str, str]] = []

    async def handler(exchange: Any) -> None:
        asked.append(exchange.headers)
        await exchange.answer(page("x"), Set_Cookie="a=1")

    server.pages["/a"] = server.pages["/b"] = handler
    crawl([server.url("/a"), server.url("/b")], tmp_path, quick())
    assert [sorted(headers) for headers in asked] == [["accept", "accept-encoding", "host", "user-agent"]] * 2
    never = {
        "tldextract",
        "scrapy.extensions.telnet",
        "scrapy.downloadermiddlewares.cookies",
        "twisted.internet.reactor",
    }
    assert not never & set(sys.modules)


# What is refused


def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path: Path) -> None:
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    begin, end = datetime(2020, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)
    certificate = x509.CertificateBuilder(name, name, key.public_key(), 1, begin, end).sign(key, hashes.SHA256())
    pem, encoding = tmp_path / "pem", serialization.Encoding.PEM
    secret = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    pem.write_bytes(secret + certificate.public_bytes(encoding))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(pem)
    with MisbehavingServer(tls) as server:
        report = crawl([server.url("/gzip")], tmp_path / "out", quick(retries=0))
        assert only_reason(report) == "robots.txt unreachable"
        assert "SSLCertVerificationError" in report.examples["robots.txt unreachable"]
        assert server.requests == []


MISBEHAVIOUR = {
    "/silent": "timeout",
    "/drip": "timeout",
    "/drip-of-headers": "timeout",
    "/for-ever-continue": "timeout",
    "/endless": "too large",
    "/endless-chunks": "too large",
    "/endless-nothing": "too large",
    "/bomb": "too large",
    "/long": "too large",
    "/short": "cut off",
    "/reset": "cut off",
    "/half-gzip": "cut off",
    "/not-gzip": "content encoding",
    "/brotli": "content encoding",
    "/deflate": "content encoding",
    "/many-headers": "not HTTP",
    "/long-header": "not HTTP",
    "/garbage": "not HTTP",
    "/down": "server error",
    "/loop/a": "already fetched",
    "/itself": "already fetched",
    "/hops/6": "too many redirects",
    "/pdf": "content type",
    "/untyped": "content type",
    "/nothing": "status",
    "/not-there": "status",
}


@pytest.mark.parametrize("path", MISBEHAVIOUR)
def test_misbehaviour_ends_in_its_reason_and_costs_no_other_page(
    server: MisbehavingServer, tmp_path: Path, path: str
) -> None:
    server.pages["/good"] = page("good")
    begin = time.monotonic()
    timeout = 0.3 if MISBEHAVIOUR[path] == "timeout" else 10.0
    report = crawl([server.url(path), server.url("/good")], tmp_path, quick(timeout_seconds=timeout))
    assert time.monotonic() - begin < 5
    check_law(report)
    assert refused(report) == {MISBEHAVIOUR[path]: 1}
    assert list(pages_of(tmp_path)) == [server.url("/good")]


NINES = "9" * 400
ODD_PAGES = {
    "charset": (answering(page("x"), kind="", Content_Type=b"text/html; charset=\xff"), "stored"),
    "charset of no text": (answering(page("x"), kind="text/html; charset=zlib"), "stored"),
    "type": (answering(page("x"), kind="", Content_Type=b"text/\xff\xfe"), "content type"),
    "encoding": (answering(page("x"), Content_Encoding=b"\xff"), "content encoding"),
    "location": (redirect(b"http://\xff\xfe/\x80"), "not an http address"),
    "robots header": (answering(page("x"), X_Robots_Tag=b"\xff: \xfe,:,,"), "stored"),
    "pause": (answering(b"", "503 Busy", Retry_After=NINES), "waiting"),
    "date": (answering(b"", "503 Busy", Retry_After=f"Fri, 31 Dec {NINES} 23:59:59 GMT"), "server error"),
    "length": (answering(page("x"), Content_Length=NINES), "not HTTP"),
    "bug": (answering(page("a bug of ours")), "not HTTP"),
}


@pytest.mark.parametrize("what", ODD_PAGES)
def test_whatever_a_page_does_is_its_own_fault(
    server: MisbehavingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Also what our own code does not expect: the page is counted, and the crawl goes on, now and the next time."""
    extract_links = fetch.extract_links

    def with_a_bug(response: Any, product: str) -> Any:
        return [][1] if b"a bug of ours" in response.body else extract_links(response, product)

    monkeypatch.setattr(fetch, "extract_links", with_a_bug)
    server.pages["/odd"], outcome = ODD_PAGES[what]
    server.pages["/good"] = page("good")
    urls = [server.url("/odd"), server.url("/good", "localhost")]
    report = crawl(urls, tmp_path, quick(retries=0))
    check_law(report)
    again = crawl(urls, tmp_path, quick(retries=0))
    assert again.outcomes.total() + again.waiting == 2
    assert server.url("/good", "localhost") in pages_of(tmp_path)
    assert report.waiting == (outcome == "waiting")
    assert report.stored == 1 + (outcome == "stored")
    assert refused(report) == ({} if outcome in ("stored", "waiting") else {outcome: 1})


def test_a_bomb_costs_no_memory(server: MisbehavingServer, tmp_path: Path) -> None:
    crawl([server.url("/gzip")], tmp_path / "imports", quick())
    tracemalloc.start()
    try:
        assert only_reason(crawl([server.url("/bomb")], tmp_path / "bomb", quick())) == "too large"
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()


def test_passing_faults_are_asked_for_again_with_growing_pauses(
    server: MisbehavingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "BACKOFF_SECONDS", 0.05)
    server.pages["/flaky"] = failing_first(3, "503 Service Unavailable", page("flaky"))
    report = crawl([server.url("/flaky")], tmp_path, quick(retries=3))
    assert report.stored == 1
    times = [at for at, path in server.requests if path == "/flaky"]
    first, second, third = (after - before for before, after in itertools.pairwise(times))
    assert first >= 0.05
    assert second >= 0.1
    assert third >= 0.2
    assert server.counts["/flaky"] == 4


def test_retry_after_is_obeyed(server: MisbehavingServer, tmp_path: Path) -> None:
    server.pages["/busy"] = failing_first(1, "429 Too Many Requests", page("busy"), Retry_After="1")
    server.pages["/other"] = page("other")
    report = crawl([server.url("/busy"), server.url("/other")], tmp_path, quick())
    assert report.stored == 2
    before, again, other = [at for at, path in server.requests if path != "/robots.txt"]
    assert 1.0 <= again - before < 1.8
    assert 1.0 <= other - before < 1.8, "the whole host is left in peace, once"


def test_a_host_rests_also_behind_its_last_answer_and_nobody_waits_for_the_end(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    server.pages["/busy"] = failing_first(9, "503 Service Unavailable", b"", Retry_After="1")
    server.pages["/other"] = page("other")
    assert crawl([server.url("/busy"), server.url("/other")], tmp_path / "1", quick(retries=0)).stored == 1
    _, before, after = [at for at, _ in server.requests]
    assert 1.0 <= after - before < 1.8
    server.pages["/busy"] = failing_first(9, "503 Service Unavailable", b"", Retry_After="60")
    begin = time.monotonic()
    assert only_reason(crawl([server.url("/busy")], tmp_path / "2", quick(retries=0))) == "server error"
    assert time.monotonic() - begin < 20


def test_a_host_that_asks_for_too_long_a_pause_is_left_alone_and_its_pages_wait(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    server.pages["/busy"] = failing_first(1, "429 Too Many Requests", page("busy"), Retry_After="86400")
    server.pages["/other"] = page("other")
    urls = [server.url("/busy"), server.url("/other")]
    report = crawl(urls, tmp_path, quick())
    assert (report.stored, report.waiting, server.counts.total()) == (0, 2, 1)
    assert "86,400 s" in report.closed_hosts["127.0.0.1"]
    assert crawl(urls, tmp_path, quick()).stored == 2


def test_a_dead_host_is_not_asked_for_ever(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        report = crawl([f"http://127.0.0.1:{port}/{n}" for n in range(50)], tmp_path, quick())
    assert only_reason(report) == "robots.txt unreachable"
    assert sum(refused(report).values()) == 50


def test_a_host_that_dies_is_left_alone(server: MisbehavingServer, tmp_path: Path) -> None:
    @closing
    async def dying(exchange: Any) -> None:
        exchange.writer.transport.abort()

    for number in range(20):
        server.pages[f"/{number}"] = dying
    report = crawl([server.url(f"/{number}") for number in range(20)], tmp_path, quick(retries=0))
    assert refused(report) == {"connection": 5}
    assert report.waiting == 15
    assert "disconnected" in report.closed_hosts["127.0.0.1"]


def test_what_is_stored_is_not_asked_for_again_and_what_is_not_is(server: MisbehavingServer, tmp_path: Path) -> None:
    server.pages["/good"] = page("good")
    urls = [server.url(path) for path in ("/good", "/down", "/pdf")]
    assert refused(crawl(urls, tmp_path, quick())) == {"server error": 1, "content type": 1}
    server.pages["/down"] = page("up again")
    report = crawl(urls, tmp_path, quick())
    check_law(report)
    assert (report.stored, report.fetched, refused(report)) == (2, 1, {"content type": 1})
    assert server.counts["/good"] == 1


# Addresses


def test_without_leave_nothing_private_is_asked(
    server: MisbehavingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _names(monkeypatch, {"public.example": ["127.0.0.1"]})
    hosts = ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "2130706433", "127.1", "0x7f.1"]
    urls = [server.url("/gzip", host) for host in (*hosts, "public.example")]
    report = crawl(urls, tmp_path, quick(allow_private=False))
    check_law(report)
    assert report.stored == 0
    assert server.requests == []
    assert refused(report)["private address"] >= 6


def _names(monkeypatch: pytest.MonkeyPatch, answers: dict[str, list[str]]) -> None:
    """Names that resolve to one address after the other, the last one again and again."""
    real = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        if host in answers:
            address = answers[host].pop(0) if len(answers[host]) > 1 else answers[host][0]
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]
        return real(host, port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@pytest.mark.usefixtures("as_if_public")
def test_a_name_that_changes_its_address_gets_nowhere(
    server: MisbehavingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MisbehavingServer() as inside:
        inside.pages["/secret"] = page("secret")
        server.pages["/a"] = redirect(f"http://rebind.example:{inside.port}/secret")
        _names(monkeypatch, {"rebind.example": ["127.0.0.1", "127.0.0.2"]})
        report = crawl([server.url("/a", "rebind.example")], tmp_path, quick(allow_private=False))
        assert only_reason(report) == "private address"
        assert server.counts == {"/a": 1}
        assert inside.requests == []


@pytest.mark.usefixtures("as_if_public")
@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("http://127.0.0.2:{port}/gzip", "private address"),
        ("http://[::ffff:127.0.0.2]:{port}/gzip", "private address"),
        ("http://10.0.0.1/", "private address"),
        ("http://169.254.169.254/latest/meta-data/", "private address"),
        ("file:///etc/passwd", "not an http address"),
        ("gopher://127.0.0.1/", "not an http address"),
        ("http://user:word@127.0.0.1:{port}/gzip", "not an http address"),
        ("http://[nowhere/", "not an http address"),
    ],
)
def test_redirects_lead_nowhere_else(server: MisbehavingServer, tmp_path: Path, target: str, reason: str) -> None:
    server.pages["/away"] = redirect(target.format(port=server.port))
    report = crawl([server.url("/away")], tmp_path, quick(allow_private=False))
    assert only_reason(report) == reason
    assert server.counts == {"/away": 1}


@pytest.mark.usefixtures("as_if_public")
def test_robots_txt_leads_nowhere_else(server: MisbehavingServer, tmp_path: Path) -> None:
    server.robots = redirect("http://127.0.0.2/robots.txt")
    server.pages["/a"] = page("a")
    assert only_reason(crawl([server.url("/a")], tmp_path, quick(allow_private=False))) == "private address"
    assert server.counts == {}


def test_what_is_given_must_be_addresses(tmp_path: Path) -> None:
    with pytest.raises(GroundupError, match=r"2 of 3 addresses given.*file:.*\n.*http"):
        crawl(["file:///etc/passwd", "example.org", "http://example.org/"], tmp_path / "out", quick())
    assert not (tmp_path / "out").exists()
    with pytest.raises(GroundupError, match="No address was given"):
        crawl([], tmp_path / "out", quick())


# Manners


def test_robots_txt_is_obeyed(server: MisbehavingServer, tmp_path: Path) -> None:
    server.robots = b"User-agent: *\nDisallow: /closed\nAllow: /closed/but\nDisallow: /*.cgi$\n"
    for path in ("/open", "/closed/a", "/closed/but", "/x.cgi"):
        server.pages[path] = page(path)
    server.pages["/sly"] = redirect("/closed/sly")
    report = crawl(
        [server.url(path) for path in ("/open", "/closed/a", "/closed/but", "/x.cgi", "/sly")], tmp_path, quick()
    )
    assert set(pages_of(tmp_path)) == {server.url("/open"), server.url("/closed/but")}
    assert refused(report) == {"robots.txt": 3}
    assert set(server.counts) == {"/open", "/closed/but", "/sly"}
    assert sum(path == "/robots.txt" for _, path in server.requests) == 1


def test_rules_for_us_by_name(server: MisbehavingServer, tmp_path: Path) -> None:
    server.robots = b"User-agent: gro\nDisallow: /\n\nUser-agent: groundup\nDisallow: /a\n\nUser-agent: *\nDisallow: /"
    server.pages["/a"] = server.pages["/b"] = page("x")
    crawl([server.url("/a"), server.url("/b")], tmp_path / "1", quick())
    assert set(pages_of(tmp_path / "1")) == {server.url("/b")}
    report = crawl([server.url("/a"), server.url("/b")], tmp_path / "2", quick(user_agent="another/2.0"))
    assert report.stored == 0


@pytest.mark.parametrize(
    ("robots", "stored"),
    [
        ("404 Not Found", 1),
        ("403 Forbidden", 1),
        ("410 Gone", 1),
        ("500 Internal Server Error", 0),
        ("503 Service Unavailable", 0),
        ("429 Too Many Requests", 0),
        (b"<html>not a robots.txt", 1),
        (b"\xff\xfe\x00\x00", 1),
        (b"", 1),
        (b"\xef\xbb\xbfUser-agent: *\nDisallow: /", 0),
        (b"User-agent: *\nCrawl-delay: nan\nCrawl-delay: -1\nDisallow: [*$\xff", 1),
        (redirect("/other-robots.txt"), 0),
        (redirect("/loop/a"), 1),
        (redirect("file:///etc/passwd"), 1),
        (answering(gzip.compress(b"User-agent: *\nDisallow: /"), Content_Encoding="gzip"), 0),
        *((path, 0) for path in ("/drip", "/short", "/garbage", "/silent", "/many-headers")),
    ],
)
def test_robots_txt_by_answer(server: MisbehavingServer, tmp_path: Path, robots: Any, stored: int) -> None:
    server.robots = server.pages.get(robots, robots) if isinstance(robots, str) else robots
    server.pages["/a"] = page("a")
    server.pages["/other-robots.txt"] = answering(b"User-agent: *\nDisallow: /", kind="text/plain")
    report = crawl([server.url("/a")], tmp_path, quick(timeout_seconds=10.0 if stored else 0.3))
    check_law(report)
    assert report.stored == stored
    assert server.counts["/a"] == stored


def test_a_robots_txt_that_its_reader_cannot_stand(
    server: MisbehavingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "parse_robots", lambda *_, **__: [][1])
    server.robots, server.pages["/a"], server.pages["/b"] = b"User-agent: *\nAllow: /", page("a"), page("b")
    assert only_reason(crawl([server.url("/a"), server.url("/b")], tmp_path, quick())) == "robots.txt unreachable"
    assert [path for _, path in server.requests] == ["/robots.txt"]


def test_an_endless_robots_txt_allows_nothing(server: MisbehavingServer, tmp_path: Path) -> None:
    server.robots, server.pages["/a"] = server.pages["/endless"], page("a")
    assert only_reason(crawl([server.url("/a")], tmp_path, quick())) == "robots.txt unreachable"
    assert server.counts == {}


def test_one_request_at_a_time_and_pauses_between_them(server: MisbehavingServer, tmp_path: Path) -> None:
    """Also before a retry that the server would have at once."""
    for number in range(4):
        server.pages[f"/{number}"] = page(str(number))
    server.pages["/busy"] = failing_first(2, "503 Service Unavailable", page("busy"), Retry_After="0")
    urls = [server.url("/busy"), *(server.url(f"/{number}") for number in range(4))]
    assert crawl(urls, tmp_path, quick(delay_seconds=0.1, retries=2)).stored == 5
    times = [at for at, _ in server.requests]
    assert len(times) == 8
    assert min(after - before for before, after in itertools.pairwise(times)) >= 0.1
    assert server.busiest == 1


def test_a_host_rests_also_between_its_own_pages_and_those_that_others_redirect_to(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    asked: list[float] = []

    async def target(exchange: Any) -> None:
        asked.append(time.monotonic())
        await exchange.answer(page(exchange.path))

    for number in range(4):
        server.pages |= {f"/own/{number}": target, f"/target/{number}": target}
        server.pages[f"/away/{number}"] = redirect(server.url(f"/target/{number}"))
    own = [server.url(f"/own/{number}") for number in range(4)]
    away = [server.url(f"/away/{number}", "localhost") for number in range(4)]
    assert crawl([*own, *away], tmp_path, quick(delay_seconds=0.1)).stored == 8
    assert min(after - before for before, after in itertools.pairwise(asked)) >= 0.1


def test_a_longer_crawl_delay_is_obeyed(server: MisbehavingServer, tmp_path: Path) -> None:
    server.robots = b"User-agent: *\nCrawl-delay: 0.2\n"
    server.pages["/a"] = server.pages["/b"] = page("x")
    assert crawl([server.url("/a"), server.url("/b")], tmp_path / "1", quick()).stored == 2
    times = [at for at, _ in server.requests]
    assert min(after - before for before, after in itertools.pairwise(times)) >= 0.2
    server.robots = b"User-agent: *\nCrawl-delay: 100000\n"
    report = crawl([server.url("/a"), server.url("/b")], tmp_path / "2", quick(max_wait_seconds=0.0))
    assert (report.stored, report.waiting) == (0, 2)
    assert "100,000 s" in report.closed_hosts["127.0.0.1"]


def test_a_host_that_rests_holds_up_no_other(server: MisbehavingServer, tmp_path: Path) -> None:
    paths = {host: [f"/hops/0?{host}{number}" for number in range(4)] for host in ("127.0.0.1", "localhost")}
    urls = [server.url(path, host) for host, given in paths.items() for path in given]
    for concurrency in (1, 2):
        server.requests.clear()
        folder = tmp_path / str(concurrency)
        assert crawl(urls, folder, quick(delay_seconds=0.1, concurrency=concurrency)).stored == 8
        times = {host: [at for at, path in server.requests if path in given] for host, given in paths.items()}
        assert max(host[0] for host in times.values()) < min(host[-1] for host in times.values())


def test_a_page_that_hangs_holds_up_no_other_host(server: MisbehavingServer, tmp_path: Path) -> None:
    urls = [server.url("/silent"), *(server.url(f"/hops/0?{number}", "localhost") for number in range(5))]
    assert crawl(urls, tmp_path, quick(timeout_seconds=1.5, retries=0, concurrency=2)).stored == 5
    (hung,) = [at for at, path in server.requests if path == "/silent"]
    assert max(at for at, _ in server.requests) < hung + 1.5


# Following


def test_links_are_followed_to_the_depth_asked_for(server: MisbehavingServer, tmp_path: Path) -> None:
    server.pages |= {
        "/": page("0", "/a", "b?x=1&amp;y=2", "/a#top", "//127.0.0.2/", "mailto:x@y", "http://example.org/", "/"),
        "/a": page("a", "/a/deep", "/"),
        "/b": page("b"),
        "/a/deep": page("deep", "/a/deeper"),
    }
    expected = {0: {"/"}, 1: {"/", "/a", "/b?x=1&y=2"}, 2: {"/", "/a", "/b?x=1&y=2", "/a/deep"}}
    for depth, paths in expected.items():
        report = crawl([server.url()], tmp_path / str(depth), quick(depth=depth))
        check_law(report)
        assert set(pages_of(tmp_path / str(depth))) == {server.url(path) for path in paths}
        assert refused(report) == {}


def test_scope(server: MisbehavingServer, tmp_path: Path) -> None:
    server.pages |= {
        "/docs/": page("docs", "a", "/docs/b/c", "/blog", "/docsx", server.url("/x", "localhost")),
        "/docs/a": page("a"),
        "/docs/b/c": page("c"),
        "/blog": page("blog"),
        "/x": page("x"),
    }
    crawl([server.url("/docs/")], tmp_path / "1", quick(depth=2, same_path=True))
    assert set(server.counts) == {"/docs/", "/docs/a", "/docs/b/c"}
    crawl([server.url("/docs/")], tmp_path / "2", quick(depth=1, same_path=True, hosts=("localhost",)))
    assert server.url("/x", "localhost") in pages_of(tmp_path / "2")


def test_redirects_are_followed_once_and_may_not_leave(server: MisbehavingServer, tmp_path: Path) -> None:
    server.pages |= {
        "/": page("hub", "/one", "/two", "/target", "/out"),
        "/one": redirect("/target"),
        "/two": redirect("/target"),
        "/target": page("target"),
        "/out": redirect(server.url("/away", "localhost")),
        "/away": page("away"),
        "/moved": redirect(server.url("/new", "localhost")),
        "/new": page("new", "/more"),
        "/more": page("more"),
    }
    report = crawl([server.url()], tmp_path / "1", quick(depth=1))
    check_law(report)
    assert set(pages_of(tmp_path / "1")) == {server.url("/"), server.url("/target")}
    assert refused(report) == {"already fetched": 2, "outside the crawl": 1}
    assert server.counts["/target"] == 1
    assert server.counts["/away"] == 0
    # What the user named may move to another host, and its links are then that host's.
    crawl([server.url("/moved")], tmp_path / "2", quick(depth=1))
    assert set(pages_of(tmp_path / "2")) == {server.url("/new", "localhost"), server.url("/more", "localhost")}


def test_pages_are_asked_whether_they_may_be_kept_and_followed(server: MisbehavingServer, tmp_path: Path) -> None:
    nofollow = '<META NAME="Robots" CONTENT="NoFollow">'
    server.pages |= {
        "/": page("hub", "/nofollow", "/noindex", "/header", "/ours", "/others"),
        "/nofollow": page("nofollow", "/1", head=nofollow),
        "/noindex": page("noindex", "/2", head='<meta content="noindex, follow" name=robots>'),
        "/header": answering(page("header", "/3"), X_Robots_Tag="none"),
        "/ours": answering(page("ours", "/4"), X_Robots_Tag="groundup: noindex"),
        "/others": answering(page("others", "/5"), X_Robots_Tag="otherbot: noindex, nofollow"),
        **{f"/{number}": page(str(number)) for number in range(1, 6)},
    }
    report = crawl([server.url()], tmp_path, quick(depth=3))
    kept = {url.removeprefix(server.url("")) for url in pages_of(tmp_path)}
    assert kept == {"/", "/nofollow", "/2", "/4"}
    assert refused(report) == {"noindex": 4}
    assert crawl([server.url("/noindex")], tmp_path / "named", quick()).stored == 1, "the user asked for this one"


def test_links_with_bytes_that_are_no_text(server: MisbehavingServer, tmp_path: Path) -> None:
    server.pages |= {
        "/": b'<meta charset=latin-1><a href="/caf\xe9">x</a><a href="/m\xf6v\xe9d?q=%E9">y</a>',
        "/caf%C3%A9": page("cafe"),
        "/m%C3%B6v%C3%A9d": redirect(b"/raw\xe9\xff"),
        "/raw%E9%FF": page("raw"),
        "/nul": b"<p>a\0b</p>\0",
    }
    crawl([server.url(), server.url("/nul")], tmp_path, quick(depth=1))
    found = pages_of(tmp_path)
    assert {url.removeprefix(server.url("")) for url in found} == {"/", "/caf%C3%A9", "/raw%E9%FF", "/nul"}
    assert found[server.url("/nul")] == b"<p>a\0b</p>\0"


# Sitemaps, plans, surroundings


def test_sitemaps_lead_to_their_pages(server: MisbehavingServer, tmp_path: Path) -> None:
    packed = urlset(server.url("/c"), server.url("/a"), "http://elsewhere.example/")
    server.pages |= {
        "/sitemap.xml": answering(
            index(server.url("/1.xml"), server.url("/2.xml.gz"), server.url("/sitemap.xml"), server.url("/bad.xml")),
            kind="application/xml",
        ),
        "/1.xml": answering(urlset(server.url("/a"), server.url("/b?x=1&amp;y=2")), kind="application/xml"),
        "/2.xml.gz": answering(gzip.compress(packed), kind="application/gzip"),
        "/bad.xml": answering(b"<html>", kind="application/xml"),
        "/urls.txt": answering(f"{server.url('/d')}\n\n{server.url('/a')}\n".encode(), kind="text/plain"),
        **{path: page(path) for path in ("/a", "/b", "/c", "/d")},
    }
    sitemaps = [server.url("/sitemap.xml"), server.url("/urls.txt")]
    report = crawl([], tmp_path, quick(), sitemaps=sitemaps)
    check_law(report)
    assert set(pages_of(tmp_path)) == {server.url(path) for path in ("/a", "/b?x=1&y=2", "/c", "/d")}
    assert (report.outcomes["sitemap"], refused(report)) == (4, {"unusable sitemap": 1, "outside the crawl": 1})
    assert set(server.counts.values()) == {1}
    assert crawl([], tmp_path, quick(), sitemaps=sitemaps).fetched == 0
    assert server.counts["/a"] == server.counts["/d"] == 1


def test_within_a_running_event_loop(server: MisbehavingServer, tmp_path: Path) -> None:
    import asyncio

    async def notebook() -> CrawlReport:
        return crawl([server.url("/gzip")], tmp_path, quick())

    assert asyncio.run(notebook()).stored == 1


def test_without_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("groundup.corpus.crawl")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "scrapy", None)
    with pytest.raises(GroundupError, match=r"scrapy.*\n.*groundup\[crawl\]"):
        import_module("groundup.corpus.crawl")


# The command


def _command(*arguments: str) -> Any:
    from typer.testing import CliRunner

    from groundup.cli.data import corpus_app as app

    return CliRunner().invoke(app, list(arguments))


def test_the_command(server: MisbehavingServer, tmp_path: Path) -> None:
    server.pages |= {"/": page("hub", "/3", "/4"), **{f"/{number}": page(str(number)) for number in range(1, 5)}}
    server.robots = b"User-agent: *\nDisallow: /2"
    (tmp_path / "list.txt").write_text(f"# pages\n\n{server.url('/1')}\n{server.url('/2')}\n{server.url('/pdf')}\n")
    quickly = ["--delay", "0", "--allow-private", "--out", str(tmp_path / "out")]
    given = [server.url(), "--urls", str(tmp_path / "list.txt"), "--depth", "1"]
    first = _command(*given, *quickly, "--max-pages", "2", "--json")
    assert first.exit_code == 0
    report = json.loads(first.stdout)
    assert (report["outcomes"]["stored"], report["limit"]) == (2, "max_pages")
    second = _command(*given, *quickly, "--max-pages", "100")
    assert second.exit_code == 0
    for words in ("stored", "robots.txt", "content type", "application/pdf"):
        assert words in second.stdout
    assert set(server.counts.values()) <= {1}


def test_every_setting_is_an_option() -> None:
    listed = _command("--help").stdout
    for name in CrawlSettings.model_fields:
        assert f"--{name.removesuffix('_seconds').replace('_', '-')} " in listed


def test_the_command_says_all_that_is_wrong_at_once() -> None:
    wrong = _command("http://example.org/", "--depth", "-1", "--delay", "-2", "--user-agent", "ü")
    problems = str(wrong.exception)
    assert wrong.exception.exit_code == 2
    assert all(name in problems for name in ("--depth -1", "--delay -2", "--user-agent ü"))


def test_a_crawl_that_stores_nothing_exits_with_1(server: MisbehavingServer, tmp_path: Path) -> None:
    ended = _command(server.url("/gzip"), "--delay", "0", "--retries", "0", "--out", str(tmp_path / "out"))
    assert ended.exit_code == 1
    assert "private address" in ended.stdout
    assert server.requests == []
