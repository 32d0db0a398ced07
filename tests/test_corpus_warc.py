"""WARC, WET and ARC: every record is a text or a counted reason, whatever state the archive is in."""

from __future__ import annotations

import base64
import bz2
import contextlib
import gzip
import hashlib
import lzma
import re
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from groundup.corpus.document import Reason, Record, SetAside
from groundup.corpus.reading.archive import read_records
from groundup.corpus.reading.extract import Extractor
from groundup.corpus.reading.refusal import RefusedError
from groundup.corpus.reading.sources import InputFile
from groundup.corpus.reading.warc import SILENT_KINDS, WRONG_DIGEST, join_chunks, parse_response, read_warc
from groundup.recipe import CorpusSettings

fastwarc = pytest.importorskip("fastwarc.warc")

MIB = 1 << 20


def record_of(
    content: bytes,
    kind: str = "response",
    number: int = 0,
    fields: str = "",
    media: str = "",
    length: int | None = None,
) -> bytes:
    """One WARC record, with the two blank lines behind it."""
    media = media or ("application/http; msgtype=response" if kind == "response" else "text/plain")
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:uuid:{number}>\r\n"
        f"WARC-Target-URI: https://example.org/{number}\r\nContent-Type: {media}\r\n{fields}"
        f"Content-Length: {len(content) if length is None else length}\r\n\r\n"
    )
    return head.encode() + content + b"\r\n\r\n"


def response_of(body: bytes, headers: str = "", media: str = "text/html", status: str = "200 OK") -> bytes:
    named = f"Content-Type: {media}\r\n" if media else ""
    return f"HTTP/1.1 {status}\r\n{named}{headers}\r\n".encode() + body


def page(number: int) -> bytes:
    return response_of(b"<html><p>This is page number %d.</p></html>" % number)


def extract_whole(html: bytes, url: str) -> str:
    """Takes the page itself for its text."""
    return html.decode("utf-8-sig", "replace")


def read_bytes(
    folder: Path, data: bytes, name: str = "x.warc.gz", settings: CorpusSettings | None = None
) -> tuple[list[Record], list[SetAside], Counter[str]]:
    path = folder / name
    path.write_bytes(data)
    aside: list[SetAside] = []
    counts: Counter[str] = Counter()
    source = InputFile(name, path)
    records = list(read_warc(source, settings or CorpusSettings(), aside.append, extract_whole, counts))
    assert len({record.position for record in records}) == len(records)
    assert len({record.number for record in records} | {item.number for item in aside}) == len(records) + len(aside)
    return records, aside, counts


def numbers_in(records: list[Record]) -> list[int]:
    return [int(found.group(1)) for record in records if (found := re.search(r"page number (\d+)", record.text))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("archives")


def test_record_says_where_it_came_from(folder: Path) -> None:
    first = record_of(b"software: x\r\n", "warcinfo")
    records, aside, counts = read_bytes(folder, gzip.compress(first) + gzip.compress(record_of(page(7), number=7)))
    assert records == [
        Record(
            "<html><p>This is page number 7.</p></html>", len(first), "record", 2, "", "https://example.org/7",
            "<urn:uuid:7>",
        )
    ]  # fmt: skip
    assert aside == []
    assert counts == {"warcinfo": 1, "response": 1}


PAGES = [record_of(page(number), number=number) for number in range(6)]
MEMBERS = [gzip.compress(record, mtime=0) for record in PAGES]


def packings() -> Iterator[tuple[str, str, bytes]]:
    plain = b"".join(PAGES)
    yield "members", "x.warc.gz", b"".join(MEMBERS)
    yield "one member", "x.warc.gz", gzip.compress(plain)
    cut = [gzip.compress(plain[at : at + 100]) for at in range(0, len(plain), 100)]
    yield "members cut anywhere", "x.warc.gz", b"".join(cut)
    yield "padded", "x.warc.gz", b"\0\0".join(MEMBERS) + b"\0" * 700
    yield "named plain", "x.warc", b"".join(MEMBERS)
    yield "plain", "x.warc", plain
    yield "plain with more blanks", "x.warc", b"\r\n\n".join(PAGES) + b"\r\n\r\n\r\n"
    yield "plain without blanks", "x.warc", b"".join(record.removesuffix(b"\r\n\r\n") for record in PAGES)
    yield "line feeds only", "x.warc", b"".join(
        record.partition(b"\r\n\r\n")[0].replace(b"\r\n", b"\n") + b"\n\n" + record.partition(b"\r\n\r\n")[2]
        for record in PAGES
    )  # fmt: skip
    yield "zstandard", "x.warc.zst", b"".join(zstandard.compress(record) for record in PAGES)
    yield "bzip2", "x.warc.bz2", bz2.compress(plain)
    yield "xz", "x.warc.xz", lzma.compress(plain)


@pytest.mark.parametrize(("name", "data"), [pytest.param(n, d, id=i) for i, n, d in packings()])
def test_same_records_in_every_packing(folder: Path, name: str, data: bytes) -> None:
    records, aside, counts = read_bytes(folder, data, name)
    assert numbers_in(records) == list(range(6))
    assert aside == []
    assert counts == {"response": 6}


def ends_of(parts: list[bytes]) -> list[int]:
    ends, at = [], 0
    for part in parts:
        at += len(part)
        ends.append(at)
    return ends


def test_truncation_at_every_byte_is_told(scratch: Path) -> None:
    data, ends = b"".join(MEMBERS), ends_of(MEMBERS)
    for size in range(1, len(data)):
        records, aside, _ = read_bytes(scratch, data[:size])
        n_whole = sum(end <= size for end in ends)
        assert numbers_in(records) == list(range(n_whole)), size
        if size in ends:  # nothing in the format tells that more was meant to come
            assert aside == []
        else:
            assert len(aside) == 1, size
            assert aside[0].reason in (Reason.CUT_OFF, Reason.DAMAGED)
            assert aside[0].number == n_whole + 1


def test_truncation_of_a_plain_archive_is_told(scratch: Path) -> None:
    data, ends = b"".join(PAGES), ends_of(PAGES)
    for size in range(1, len(data)):
        records, aside, _ = read_bytes(scratch, data[:size], "x.warc")
        n_whole = sum(end - 4 <= size for end in ends)  # the blank lines may be missing
        assert numbers_in(records) == list(range(n_whole)), size
        is_at_end = any(end - 4 <= size <= end for end in ends)
        assert len(aside) == (0 if is_at_end else 1), size


def test_truncation_says_after_what(folder: Path) -> None:
    _, aside, _ = read_bytes(folder, b"".join(MEMBERS)[:-30])
    assert str(aside[0]).startswith("x.warc.gz, record 6: cut off: ")
    assert "cut off before its end" in aside[0].detail


@given(at=st.integers(0, sum(map(len, MEMBERS)) - 1), value=st.integers(1, 255))
def test_a_flipped_byte_costs_one_record_and_is_told(scratch: Path, at: int, value: int) -> None:
    data = bytearray(b"".join(MEMBERS))
    data[at] ^= value
    records, aside, _ = read_bytes(scratch, bytes(data))
    hurt = sum(end <= at for end in ends_of(MEMBERS))
    # Some bytes of a gzip header mean nothing (its time, its system): then all records are whole.
    assert numbers_in(records) in (list(range(6)), [number for number in range(6) if number != hurt])
    assert len(records) == 6 or len(aside) == 1
    if hurt == 0 and at < 3:
        assert len(aside) == 1


@given(at=st.integers(0, sum(map(len, PAGES)) - 1), value=st.integers(1, 255))
def test_a_flipped_byte_in_a_plain_archive_hurts_no_other(scratch: Path, at: int, value: int) -> None:
    data = bytearray(b"".join(PAGES))
    data[at] ^= value
    records, aside, _ = read_bytes(scratch, bytes(data), "x.warc")
    hurt = sum(end <= at for end in ends_of(PAGES))
    found = {record.key for record in records}
    # The blank lines behind a record show where the next one begins.
    lost = {hurt, hurt + 1} if at >= ends_of(PAGES)[hurt] - 4 else {hurt}
    assert {f"<urn:uuid:{number}>" for number in range(6) if number not in lost} <= found
    assert len(records) + len(aside) >= 5


@given(st.binary(max_size=300), st.sampled_from([b"", b"WARC/1.0\r\n", b"\x1f\x8b\x08", MEMBERS[0], PAGES[0]]))
def test_any_bytes_are_records_or_a_reason(scratch: Path, data: bytes, beginning: bytes) -> None:
    records, aside, counts = read_bytes(scratch, beginning + data)
    assert records or aside or counts


def test_damage_in_the_middle_costs_its_member_only(folder: Path) -> None:
    data = MEMBERS.copy()
    data[2] = data[2][:40] + b"\xff\xff\xff\xff" + data[2][44:]
    records, aside, _ = read_bytes(folder, b"".join(data))
    assert numbers_in(records) == [0, 1, 3, 4, 5]
    assert [(item.reason, item.number) for item in aside] == [(Reason.DAMAGED, 3)]
    assert f"{len(data[2]):,} bytes up to the next whole member are lost" in aside[0].detail


@pytest.mark.parametrize("rest", [b"something else", b"\x1f\x8b\x08 no gzip", b"\x1f\x8b"])
def test_something_else_between_members_and_behind_them(folder: Path, rest: bytes) -> None:
    records, aside, _ = read_bytes(folder, b"".join([*MEMBERS[:3], rest, *MEMBERS[3:]]) + rest)
    assert numbers_in(records) == list(range(6))
    assert len(aside) == 2
    assert {item.reason for item in aside} <= {Reason.DAMAGED, Reason.CUT_OFF}


@pytest.mark.parametrize("name", ["x.warc", "x.warc.gz"])
@pytest.mark.parametrize("wrong", [-20, 5, 20, 150, 100_000, 10**15])
def test_wrong_length_swallows_no_other_record(folder: Path, name: str, wrong: int) -> None:
    content = page(1)
    parts = [*PAGES[:1], record_of(content, number=1, length=len(content) + wrong), *PAGES[2:]]
    data = b"".join(parts) if name == "x.warc" else b"".join(map(gzip.compress, parts))
    records, aside, _ = read_bytes(folder, data, name)
    assert numbers_in(records) == [0, 2, 3, 4, 5]
    assert [(item.reason, item.number) for item in aside] == [(Reason.DAMAGED, 2)]
    assert f"its length says {len(content) + wrong:,} bytes" in aside[0].detail


@pytest.mark.parametrize(
    "piece",
    [
        pytest.param(b"WARC/1.0\r\n", id="heads"),
        pytest.param(record_of(b"x", length=10**7) + b"\r\n", id="lengths"),
        pytest.param(b"\r\n", id="blanks"),
        pytest.param(b"\x1f\x8b\x08\0", id="members"),
    ],
)
def test_a_hundred_thousand_beginnings_take_linear_time(folder: Path, piece: bytes) -> None:
    begin = time.process_time()
    _, aside, _ = read_bytes(folder, piece * (1_000_000 // len(piece)), "x.warc")
    assert time.process_time() - begin < 20  # minutes, where each one has all that follows copied
    assert aside


@pytest.mark.parametrize("length", ["", "-1", "abc", "1e3", "9" * 30])
def test_no_length(folder: Path, length: str) -> None:
    broken = PAGES[1].replace(b"Content-Length: %d" % len(page(1)), b"Content-Length: " + length.encode())
    records, aside, _ = read_bytes(folder, PAGES[0] + broken + PAGES[2], "x.warc")
    assert numbers_in(records) == [0, 2]
    assert [(item.reason, item.number) for item in aside] == [(Reason.DAMAGED, 2)]


def test_what_is_no_archive(folder: Path) -> None:
    for data in (b"<html>no archive</html>\n" * 50, b"{}\n", b"\xff" * 5000, b"\n\nno archive"):
        records, aside, _ = read_bytes(folder, data, "x.warc")
        assert (len(records), [item.reason for item in aside]) == (0, [Reason.DAMAGED])
    for name, data in (("x.warc", b""), ("x.warc", b"\r\n\r\n"), ("x.warc.gz", gzip.compress(b""))):
        records, aside, _ = read_bytes(folder, data, name)
        assert (records, [item.reason for item in aside]) == ([], [Reason.EMPTY])


def test_file_that_cannot_be_read(folder: Path) -> None:
    aside: list[SetAside] = []
    source = InputFile("x.warc", folder / "missing.warc")
    assert list(read_warc(source, CorpusSettings(), aside.append, extract_whole, Counter())) == []
    assert [item.reason for item in aside] == [Reason.UNREADABLE]


BODY = b"<html><p>" + b"This is the body of a page. " * 40 + b"</p></html>"


def deflated(window_bits: int) -> bytes:
    deflater = zlib.compressobj(wbits=window_bits)
    return deflater.compress(BODY) + deflater.flush()


def chunked(data: bytes, size: int = 50) -> bytes:
    cut = [data[at : at + size] for at in range(0, len(data), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in cut) + b"0\r\n\r\n"


def brotli_of(data: bytes) -> bytes:
    return pytest.importorskip("brotli").compress(data)


@pytest.mark.parametrize(
    ("headers", "payload"),
    [
        pytest.param("", BODY, id="plain"),
        pytest.param("Content-Encoding: gzip", gzip.compress(BODY), id="gzip"),
        pytest.param("content-encoding: X-GZIP", gzip.compress(BODY), id="x-gzip"),
        pytest.param("Content-Encoding: gzip", gzip.compress(BODY) + b"behind it", id="gzip and more"),
        pytest.param("Content-Encoding: deflate", deflated(15), id="deflate"),
        pytest.param("Content-Encoding: deflate", deflated(-15), id="raw deflate"),
        pytest.param("Content-Encoding: zstd", zstandard.compress(BODY), id="zstd"),
        pytest.param("Content-Encoding: gzip, deflate", zlib.compress(gzip.compress(BODY)), id="two"),
        pytest.param("Content-Encoding: identity", BODY, id="identity"),
        pytest.param("Content-Encoding: utf-8", BODY, id="no encoding"),
        pytest.param("Content-Encoding: gzip", BODY, id="undone gzip"),
        pytest.param("Content-Encoding: br", BODY, id="undone br"),
        pytest.param("Content-Encoding: deflate", BODY, id="undone deflate"),
        pytest.param("Transfer-Encoding: chunked", chunked(BODY), id="chunked"),
        pytest.param(
            "Transfer-Encoding: chunked", chunked(BODY).replace(b"32\r\n", b"0032;name=value\r\n"), id="extended"
        ),
        pytest.param("Transfer-Encoding: chunked", chunked(BODY).replace(b"\r\n", b"\n"), id="line feeds"),
        pytest.param("Transfer-Encoding: chunked", chunked(BODY) + b"Trailer: x\r\n", id="trailer"),
        pytest.param("Transfer-Encoding: chunked", BODY, id="undone chunks"),
        pytest.param("Transfer-Encoding: chunked\r\nContent-Encoding: gzip", chunked(gzip.compress(BODY)), id="both"),
        pytest.param("Transfer-Encoding: chunked\r\nContent-Encoding: gzip", gzip.compress(BODY), id="chunks undone"),
        pytest.param("Transfer-Encoding: chunked\r\nContent-Encoding: gzip", BODY, id="both undone"),
        pytest.param("Transfer-Encoding: gzip", gzip.compress(BODY), id="transfer gzip"),
    ],
)
def test_body_as_its_server_meant_it(headers: str, payload: bytes) -> None:
    response = parse_response(response_of(payload, f"{headers}\r\n" if headers else ""), MIB)
    assert response == (200, "text/html", "", payload, BODY)


def test_brotli() -> None:
    assert parse_response(response_of(brotli_of(BODY), "Content-Encoding: br\r\n"), MIB)[-1] == BODY
    with pytest.raises(RefusedError):
        parse_response(response_of(brotli_of(BODY)[:-3], "Content-Encoding: br\r\n"), MIB)


@pytest.mark.parametrize(
    ("headers", "payload", "reason"),
    [
        pytest.param("Content-Encoding: gzip", gzip.compress(BODY)[:-9], Reason.CUT_OFF, id="gzip cut"),
        pytest.param("Content-Encoding: gzip", gzip.compress(BODY)[:-8] + b"12345678", Reason.DAMAGED, id="checksum"),
        pytest.param("Content-Encoding: deflate", deflated(15)[:-9], Reason.CUT_OFF, id="deflate cut"),
        pytest.param("Content-Encoding: zstd", zstandard.compress(BODY)[:-2], Reason.CUT_OFF, id="zstd cut"),
        pytest.param("Content-Encoding: gzip", gzip.compress(b"x" * 40 * MIB), Reason.TOO_LONG, id="gzip bomb"),
        pytest.param("Content-Encoding: zstd", zstandard.compress(b"x" * 40 * MIB), Reason.TOO_LONG, id="zstd bomb"),
        pytest.param(
            "Content-Encoding: gzip, gzip", gzip.compress(gzip.compress(b"x" * 40 * MIB)), Reason.TOO_LONG, id="nested"
        ),
        pytest.param("Transfer-Encoding: chunked", chunked(BODY)[:200], Reason.CUT_OFF, id="chunk cut"),
        pytest.param("Transfer-Encoding: chunked", chunked(BODY)[:-5], Reason.CUT_OFF, id="last chunk missing"),
        pytest.param("Transfer-Encoding: chunked", b"5\r\nhello\r\nzz\r\nworld\r\n", Reason.DAMAGED, id="bad chunk"),
        pytest.param("Transfer-Encoding: chunked", b"ffffffffffffffff\r\nhello\r\n", Reason.CUT_OFF, id="huge chunk"),
    ],
)
def test_body_that_cannot_be_decoded(folder: Path, headers: str, payload: bytes, reason: Reason) -> None:
    begin = time.process_time()
    content = response_of(payload, f"{headers}\r\n")
    with pytest.raises(RefusedError) as caught:
        parse_response(content, MIB)
    assert caught.value.reason == reason
    assert time.process_time() - begin < 1.0
    records, aside, _ = read_bytes(
        folder, PAGES[0] + record_of(content) + PAGES[2], "x.warc", CorpusSettings(max_document_mib=1.0)
    )
    assert numbers_in(records) == [0, 2]
    assert [(item.reason, item.number) for item in aside] == [(reason, 2)]


@given(st.binary(max_size=200), st.integers(1, 60))
def test_chunks_come_together_again(data: bytes, size: int) -> None:
    assert join_chunks(chunked(data, size)) == data


@given(st.binary(max_size=300), st.sampled_from(["gzip", "deflate", "br", "zstd", "chunked", "x"]))
def test_any_body_is_one_or_refused(data: bytes, coding: str) -> None:
    name = "Transfer-Encoding" if coding == "chunked" else "Content-Encoding"
    for content in (response_of(data, f"{name}: {coding}\r\n"), b"HTTP/1.1 " + data, data):
        with contextlib.suppress(RefusedError):
            assert len(parse_response(content, 10_000)[-1]) <= 10_000


def test_long_records(folder: Path) -> None:
    settings = CorpusSettings(max_document_mib=0.01)
    limit = int(0.01 * MIB)
    for size, n_kept in ((limit, 1), (limit + 1, 0), (50 * limit, 0)):
        body = b"<p>" + b"x" * (size - 3)
        data = record_of(response_of(body)) + PAGES[3]
        records, aside, _ = read_bytes(folder, data, "x.warc", settings)
        assert numbers_in(records) == [3]
        assert len(records) == n_kept + 1
        assert [item.reason for item in aside] == [Reason.TOO_LONG] * (1 - n_kept)


def test_what_is_text_and_what_is_not(folder: Path) -> None:
    html = b"<p>page number 1</p>"
    cases: list[tuple[bytes, str | Reason]] = [
        (record_of(response_of(html, media="text/html; charset=utf-8")), "page"),
        (record_of(response_of(html, media="application/xhtml+xml")), "page"),
        (record_of(response_of(b"plain", media="text/plain")), "plain"),
        (record_of(response_of(b"# mark", media="TEXT/MARKDOWN")), "mark"),
        (record_of(response_of(b"<!DOCTYPE html><p>typeless", media="")), "typeless"),
        (record_of(response_of(b"{}", media="application/json")), Reason.NOT_TEXT),
        (record_of(response_of(b"\x89PNG\r\n\x1a\n\0\0", media="image/png")), Reason.NOT_TEXT),
        (record_of(response_of(b"\x89PNG\r\n\x1a\n\0\0", media="text/html")), Reason.NOT_TEXT),
        (record_of(response_of(b"no type", media="")), Reason.NOT_TEXT),
        (record_of(response_of(html, status="404 Not Found")), Reason.NOT_TEXT),
        (record_of(response_of(b"", "Location: /\r\n", status="302 Found")), Reason.NOT_TEXT),
        (record_of(response_of(html, status="203 Non-Authoritative")), "page"),
        (record_of(response_of(b"")), Reason.EMPTY),
        (record_of(response_of(b" \r\n ")), Reason.EMPTY),
        (record_of(response_of(b"caf\xc3\xa9", media="text/plain")), "café"),
        (record_of(response_of(b"caf\xe9", media="text/plain; charset=iso-8859-1")), "café"),
        (record_of(response_of(b"caf\xe9", media="text/plain")), Reason.INVALID_UTF8),
        (record_of(response_of(b"a\0b", media="text/plain")), Reason.NUL),
        (record_of(b"of a crawl", "conversion"), "of a crawl"),
        (record_of(b"a resource", "resource"), "a resource"),
        (record_of(html, "resource", media="text/html"), "page"),
        (record_of(b"%PDF", "resource", media="application/pdf"), Reason.NOT_TEXT),
        (record_of(html, "response", media="text/html"), "page"),
        (record_of(b"20090101000000\nexample.org. 60 IN A 1.2.3.4\n", "response", media="text/dns"), Reason.NOT_TEXT),
        (record_of(b"more of it", "continuation"), Reason.NOT_TEXT),
        (record_of(b"?", "something-new"), Reason.NOT_TEXT),
        (record_of(b"HTTP/1.1 nonsense without an end", "response"), Reason.EMPTY),
    ]
    records, aside, _ = read_bytes(folder, b"".join(data for data, _ in cases), "x.warc")
    found = {record.number: record.text for record in records}
    refused = {item.number: item for item in aside}
    for number, (_, expected) in enumerate(cases, start=1):
        if isinstance(expected, Reason):
            assert refused[number].reason == expected, (number, refused[number])
        else:
            assert expected in found[number], number
    assert len(found) + len(refused) == len(cases)


def test_silent_records_are_counted(folder: Path) -> None:
    kinds = ["warcinfo", "request", "metadata", "revisit"]
    data = b"".join(record_of(b"x: y\r\n", kind) for kind in kinds)
    data += record_of(b"log", "resource").replace(b"https://example.org/0", b"<metadata://x/wget.log>")
    records, aside, counts = read_bytes(folder, data, "x.warc")
    assert records == aside == []
    assert counts == dict.fromkeys([*kinds, "resource"], 1)


def test_charset_that_the_server_names(folder: Path) -> None:
    russian = "Река начинается в холмах"
    content = response_of(f"<meta charset=utf-8><p>{russian}</p>".encode("koi8-r"), media="text/html; charset=KOI8-R")
    records, _, _ = read_bytes(folder, record_of(content), "x.warc")
    assert russian in records[0].text


def test_failure_of_the_extractor_is_the_records_reason(folder: Path) -> None:
    def refuse(html: bytes, url: str) -> str:
        raise RefusedError(Reason.TIMEOUT, "more than 1 s")

    (folder / "x.warc").write_bytes(PAGES[0] + PAGES[1])
    aside: list[SetAside] = []
    assert (
        list(read_warc(InputFile("x.warc", folder / "x.warc"), CorpusSettings(), aside.append, refuse, Counter())) == []
    )
    assert [(item.reason, item.detail) for item in aside] == [(Reason.TIMEOUT, "more than 1 s")] * 2
    assert [item.position for item in aside] == [0, len(PAGES[0])]


def test_digests_are_checked_and_wrong_ones_counted(folder: Path) -> None:
    content = page(1)
    sha1 = hashlib.sha1(content).digest()
    body = content.partition(b"\r\n\r\n")[2]
    fits = [
        "WARC-Block-Digest: sha1:" + base64.b32encode(sha1).decode(),
        "WARC-Block-Digest: sha1:" + base64.b32encode(sha1).decode().lower(),
        "WARC-Block-Digest: SHA1:" + sha1.hex(),
        "WARC-Block-Digest: sha1:" + base64.b64encode(sha1).decode(),
        "WARC-Block-Digest: sha1:" + base64.urlsafe_b64encode(sha1).decode(),
        "WARC-Block-Digest: sha256:" + hashlib.sha256(content).hexdigest(),
        "WARC-Payload-Digest: md5:" + hashlib.md5(body).hexdigest(),
        "WARC-Payload-Digest: unknown:abc",
    ]
    wrong = [
        "WARC-Block-Digest: sha1:" + base64.b32encode(hashlib.sha1(b"other").digest()).decode(),
        "WARC-Payload-Digest: md5:" + hashlib.md5(content).hexdigest(),
        "WARC-Block-Digest: sha1:no digest at all",
    ]
    for lines, n_wrong in ((fits, 0), (wrong, len(wrong))):
        data = b"".join(record_of(content, fields=line + "\r\n") for line in lines)
        records, aside, counts = read_bytes(folder, data, "x.warc")
        assert (len(records), aside, counts[WRONG_DIGEST]) == (len(lines), [], n_wrong)


ARC_FIELDS = b"URL IP-address Archive-date Content-type %sArchive-length\n"


def arc_head(block: bytes) -> bytes:
    return b"filedesc://x.arc 0.0.0.0 20140101000000 text/plain %d\n%s\n" % (len(block), block)


def arc_record(number: int) -> bytes:
    return b"http://example.org/%d 1.2.3.4 20140101000000 text/html %d\n%s\n" % (
        number,
        len(page(number)),
        page(number),
    )


@pytest.mark.parametrize("is_packed", [False, True])
def test_arc(folder: Path, is_packed: bool) -> None:
    parts = [arc_head(b"1 0 Crawler\n" + ARC_FIELDS % b""), *map(arc_record, range(4))]
    parts[3] = parts[3].replace(b"html %d" % len(page(2)), b"html -1")
    records, aside, counts = read_bytes(folder, b"".join(map(gzip.compress, parts) if is_packed else parts), "x.arc")
    assert numbers_in(records) == [0, 1, 3]
    assert [record.url for record in records] == [f"http://example.org/{number}" for number in (0, 1, 3)]
    assert [(item.reason, item.number) for item in aside] == [(Reason.DAMAGED, 4)]
    assert counts == {"warcinfo": 1, "response": 3}


def test_arc_version_2(folder: Path) -> None:
    head = arc_head(b"2 0 Crawler\n" + ARC_FIELDS % b"Result-code Checksum Location Offset Filename ")
    line = b"http://example.org/a b 1.2.3.4 20140101000000 text/html 200 - - 150 x.arc %d\n%s\n" % (
        len(page(1)),
        page(1),
    )
    records, aside, _ = read_bytes(folder, head + line, "x.arc")
    assert (numbers_in(records), [record.url for record in records], aside) == ([1], ["http://example.org/a b"], [])


# Every file: texts, set aside by reason, counts by kind of record and of wrong digests.
FILES: dict[str, tuple[int, dict[str, int], dict[str, int]]] = {
    "aut/example.warc.gz": (
        128,
        {"not a text record": 169, "no content extracted": 1, "empty": 1},
        {"warcinfo": 1, "response": 299, "request": 261, "metadata": 261},
    ),
    "aut/issue-493.warc": (
        3,
        {"not a text record": 6, "no content extracted": 1},
        {"warcinfo": 2, "response": 10, "request": 15, "revisit": 5},
    ),
    "aut/issue-514.warc": (
        1,
        {"not a text record": 1},
        {"warcinfo": 1, "request": 2, "response": 2, "metadata": 1, "resource": 2},
    ),
    "dolma/sample-0000.warc.gz": (22, {}, {"warcinfo": 1, "request": 22, "response": 22, "metadata": 1, "resource": 2}),
    "dolma/sample-0001.warc.gz": (15, {}, {"warcinfo": 1, "request": 15, "response": 15, "metadata": 1, "resource": 2}),
    "resiliparse/block-sized-records.warc": (0, {"not a text record": 3}, {"unknown": 3}),
    "resiliparse/block-sized-records.warc.gz": (0, {"not a text record": 3}, {"unknown": 3}),
    "resiliparse/clipped.warc.gz": (0, {"cut off": 1}, {"response": 1}),
    "resiliparse/clueweb-quirk.warc.gz": (29, {}, {"warcinfo": 1, "response": 29, "wrong digest": 29}),
    "resiliparse/warcfile.warc": (16, {}, {"warcinfo": 1, "request": 17, "response": 16, "metadata": 16}),
    "resiliparse/warcfile.warc.gz": (16, {}, {"warcinfo": 1, "request": 17, "response": 16, "metadata": 16}),
    "warcio/bad.arc": (0, {"damaged file": 3, "empty": 1}, {"response": 1}),
    "warcio/example-bad-non-chunked.warc.gz": (1, {}, {"warcinfo": 2, "response": 1, "request": 2, "revisit": 1}),
    "warcio/example-bad.warc.gz.bad": (
        1,
        {"not a text record": 1},
        {"warcinfo": 1, "response": 2, "request": 2, "revisit": 1},
    ),
    "warcio/example-digest.warc": (0, {}, {"request": 4}),
    "warcio/example-iana.org-chunked.warc": (1, {}, {"warcinfo": 1, "response": 1, "request": 1}),
    "warcio/example-resource.warc.gz": (1, {}, {"warcinfo": 2, "resource": 1}),
    "warcio/example-space-in-target-uri.warc.gz": (0, {"not a text record": 1}, {"warcinfo": 1, "resource": 1}),
    "warcio/example-space-in-url.arc": (0, {"cut off": 1}, {"warcinfo": 1, "response": 1}),
    "warcio/example-trunc.warc": (0, {"damaged file": 1}, {"warcinfo": 2, "response": 1, "request": 1}),
    "warcio/example-wget-bad-target-uri.warc.gz": (
        1,
        {},
        {"warcinfo": 1, "request": 1, "response": 1, "metadata": 1, "resource": 2},
    ),
    "warcio/example-wrong-chunks.warc.gz": (1, {}, {"response": 1, "wrong digest": 1, "request": 1}),
    "warcio/example.arc": (1, {}, {"warcinfo": 1, "response": 1}),
    "warcio/example.arc.gz": (1, {}, {"warcinfo": 1, "response": 1}),
    "warcio/example.warc": (1, {}, {"warcinfo": 2, "response": 1, "request": 2, "revisit": 1}),
    "warcio/example.warc.gz": (1, {}, {"warcinfo": 2, "response": 1, "request": 2, "revisit": 1}),
    "warcio/post-test.warc.gz": (0, {"not a text record": 3}, {"response": 3, "request": 3}),
    "whirlwind_cc/CC-MAIN-2024-22.warc.paths.gz": (0, {"damaged file": 1}, {}),
    "whirlwind_cc/whirlwind.warc": (1, {}, {"warcinfo": 1, "request": 1, "response": 1, "metadata": 1}),
    "whirlwind_cc/whirlwind.warc.gz": (1, {}, {"warcinfo": 1, "request": 1, "response": 1, "metadata": 1}),
    "whirlwind_cc/whirlwind.warc.wat": (0, {}, {"warcinfo": 1, "metadata": 1}),
    "whirlwind_cc/whirlwind.warc.wat.gz": (0, {}, {"warcinfo": 1, "metadata": 1}),
    "whirlwind_cc/whirlwind.warc.wet": (1, {}, {"warcinfo": 1, "conversion": 1}),
    "whirlwind_cc/whirlwind.warc.wet.gz": (1, {}, {"warcinfo": 1, "conversion": 1}),
}


def all_files(shared_data: Path) -> list[Path]:
    return sorted(path for path in (shared_data / "warc").glob("*/*") if path.name != "LICENSE")


def test_every_file_ends_in_texts_or_reasons(shared_data: Path) -> None:
    found = {}
    with Extractor("resiliparse", 20.0) as extractor:
        for path in all_files(shared_data):
            aside: list[SetAside] = []
            counts: Counter[str] = Counter()
            source = InputFile(path.name, path)
            records = list(read_warc(source, CorpusSettings(), aside.append, extractor.extract, counts))
            reasons = Counter(str(item.reason) for item in aside)
            name = f"{path.parent.name}/{path.name}"
            found[name] = (len(records), dict(reasons), dict(counts))
    assert found == FILES


def is_notes(fields: dict[str, str]) -> bool:
    return fields.get("warc-target-uri", "").strip("<>").startswith("metadata:")


def test_every_record_of_every_file_is_accounted_for(shared_data: Path) -> None:
    for path in all_files(shared_data):
        aside: list[SetAside] = []
        kept = list(read_warc(InputFile(path.name, path), CorpusSettings(), aside.append, extract_whole, Counter()))
        raw = list(read_records(InputFile(path.name, path), 16 * MIB))
        n_losses = sum(isinstance(item, SetAside) for item in raw)
        with_text = [
            item for item in raw if not isinstance(item, SetAside)
            and item.kind not in SILENT_KINDS and not (item.kind == "resource" and is_notes(item.fields))
        ]  # fmt: skip
        assert len(kept) + len(aside) == len(with_text) + n_losses, path.name


BROKEN = {"clipped.warc.gz", "example-trunc.warc", "CC-MAIN-2024-22.warc.paths.gz"}


def test_same_records_as_an_independent_reader(shared_data: Path) -> None:
    n_compared = 0
    for path in all_files(shared_data):
        ours = [item for item in read_records(InputFile(path.name, path), 16 * MIB) if not isinstance(item, SetAside)]
        if ".arc" in path.name:
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            lines = re.findall(rb"(?m)^[a-z]+://\S.* [\d.]+ \d{14,} \S+ \d+$", data)
            assert len(ours) == len(lines), path.name
        elif path.name not in BROKEN:
            with path.open("rb") as handle:
                theirs = [
                    (str(record.record_type), record.record_id, hashlib.sha1(record.reader.read()).digest())
                    for record in fastwarc.ArchiveIterator(handle, parse_http=False)
                ]
            mine = [
                (item.kind, item.fields.get("warc-record-id"), hashlib.sha1(item.block).digest()) for item in ours
            ]  # fmt: skip
            assert mine == theirs, path.name
            n_compared += 1
    assert n_compared == 27


def test_japanese_pages_of_a_crawl(shared_data: Path) -> None:
    path = shared_data / "warc" / "resiliparse" / "clueweb-quirk.warc.gz"
    with Extractor("resiliparse", 20.0) as extractor:
        records = list(
            read_warc(InputFile("x", path), CorpusSettings(), lambda item: None, extractor.extract, Counter())
        )
    assert len(records) == 29
    text = "".join(record.text for record in records)
    assert len(re.findall(r"[\u3040-\u30ff\u4e00-\u9fff]", text)) > 0.5 * len(re.findall(r"\w", text))
    assert "\ufffd" not in text
