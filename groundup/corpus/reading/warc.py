"""WARC, WET and ARC archives to records of text.

Each page, plain text or WET conversion becomes a `Record`; everything else that was served is set aside: responses,
resources and conversions = records + set aside. Records of other types are only counted.

A response's body is taken as its server meant it: chunks joined, compression undone, within a limit (RFC 9112, section
7.1; RFC 9110, section 8.4). Archives often name a coding that their writer has undone: then it is taken as it stands.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator

from fastwarc.stream_io import BrotliReader
from fastwarc.warc import WarcRecord

from groundup.corpus.document import OnSetAside, Reason, Record, SetAside, excerpt_of
from groundup.corpus.reading.archive import HEAD_BYTES, PLACE, RawRecord, read_records
from groundup.corpus.reading.compressed import BLOCK_BYTES, PACKINGS, open_uncompressed, packing_of
from groundup.corpus.reading.extract_child import in_utf8
from groundup.corpus.reading.intake import limit_bytes, make_record
from groundup.corpus.reading.refusal import RefusedError, fault_of
from groundup.corpus.reading.sources import InputFile
from groundup.recipe import CorpusSettings

HTML_TYPES = frozenset({"text/html", "application/xhtml+xml"})
TEXT_TYPES = frozenset({"text/plain", "text/markdown"})
SILENT_KINDS = frozenset({"warcinfo", "request", "metadata", "revisit"})
"""Records without text of their own; a revisit says that the page is the same as one that is archived elsewhere."""

WRONG_DIGEST = "wrong digest"
_HEAD = b"WARC/1.0\r\nWARC-Type: response\r\nContent-Type: application/http\r\nContent-Length: %d\r\n\r\n"
_CHUNK_HEAD = re.compile(rb"[ \t]*([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\r\n]{0,4096})?\r?\n")
_CODINGS = {"gzip": ".gz", "x-gzip": ".gz", "zstd": ".zst", "deflate": "zlib", "br": "br"}
_CHARSET = re.compile(r"charset\s*=\s*[\"']?([^\s;\"']+)", re.IGNORECASE)
_MARKUP = re.compile(rb"\s*(?:\xef\xbb\xbf)?\s*<[!?A-Za-z]")
Extract = Callable[[bytes, str], str]
"""Takes text out of an HTML page, given the page and its address: `Extractor.extract`."""


def read_warc(
    source: InputFile, settings: CorpusSettings, set_aside: OnSetAside, extract: Extract, counts: Counter[str]
) -> Iterator[Record]:
    """The texts of an archive; every response without one, and every lost stretch, is set aside.

    In `counts` records are counted by their kind ("response", "request", ...), and those whose digest does not fit
    their content under `WRONG_DIGEST`: many archives are full of those, so they are used nevertheless.
    """
    limit = limit_bytes(settings)
    for raw in read_records(source, limit + HEAD_BYTES):
        if isinstance(raw, SetAside):
            set_aside(raw)
            continue
        counts[raw.kind or "unknown"] += 1
        url = raw.fields.get("warc-target-uri", "").strip("<>")
        is_silent = raw.kind in SILENT_KINDS or (raw.kind == "resource" and url.startswith("metadata:"))
        try:
            if raw.fault is not None:
                raise raw.fault
            if is_silent:
                continue
            text = _text_of(raw, url, limit, extract, counts)
        except (RefusedError, UnicodeDecodeError) as error:
            begins = excerpt_of(raw.block)
            set_aside(fault_of(error).of(source.label, PLACE, raw.number, begins, raw.size_bytes, raw.position))
            continue
        key = raw.fields.get("warc-record-id", "")
        yield from make_record(source, text, settings, set_aside, raw.position, PLACE, raw.number, "", url, key)


def _text_of(raw: RawRecord, url: str, limit: int, extract: Extract, counts: Counter[str]) -> str:
    """The text of a record. Raises `RefusedError` or UnicodeDecodeError: there is none that can be used."""
    if raw.kind not in ("response", "resource", "conversion"):
        raise RefusedError(Reason.NOT_TEXT, f"a record of type {raw.kind!r}")
    if len(raw.block) < raw.size_bytes:
        raise RefusedError(Reason.TOO_LONG, f"{raw.size_bytes:,} bytes; the limit is {limit / 2**20:g} MiB")
    media_type, _, parameters = raw.fields.get("content-type", "").partition(";")
    media_type, charset = media_type.strip().lower(), "".join(_CHARSET.findall(parameters)[:1])
    payload = body = raw.block
    if raw.kind == "response" and (media_type == "application/http" or body.startswith(b"HTTP/")):
        status, media_type, charset, payload, body = parse_response(body, limit)
        if status and not 200 <= status < 300:
            raise RefusedError(Reason.NOT_TEXT, f"HTTP status {status}")
    # Writers disagree whether the payload's digest is that of the bytes as sent or as decoded; either will do.
    contents = {"warc-block-digest": (raw.block,), "warc-payload-digest": (payload, body)}
    if not all(_fits(raw.fields.get(name, ""), those) for name, those in contents.items()):
        counts[WRONG_DIGEST] += 1
    if not body:
        raise RefusedError(Reason.EMPTY, "no content")
    beginning = body[:1024]
    media_type = media_type or raw.fields.get("warc-identified-payload-type", "").lower()
    if not media_type and beginning.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html")):
        media_type = "text/html"
    if media_type in HTML_TYPES:
        if b"\0" in beginning and not body.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise RefusedError(Reason.NOT_TEXT, f"{media_type} by its header, but binary")
        return extract(in_utf8(body, charset), url)
    if media_type not in TEXT_TYPES:
        raise RefusedError(Reason.NOT_TEXT, media_type or "no media type")
    return in_utf8(body, charset).decode("utf-8-sig")


def _fits(field: str, contents: tuple[bytes, ...]) -> bool:
    """Whether a digest (in base 32, as the standard recommends, in hex or base 64) is that of one of the contents."""
    algorithm, _, written = (part.strip() for part in field.partition(":"))
    if algorithm.lower() not in ("sha1", "md5", "sha256", "sha512") or not written:
        return True
    digests = [hashlib.new(algorithm.lower(), content).digest() for content in contents]
    forms = (base64.b32encode, base64.b16encode, base64.b64encode, base64.urlsafe_b64encode)
    known = {form(digest).decode().rstrip("=") for digest in digests for form in forms}
    return not known.isdisjoint({written.rstrip("=").upper(), written.rstrip("=")})


def parse_response(block: bytes, limit_bytes: int) -> tuple[int, str, str, bytes, bytes]:
    """An HTTP response's status, media type, charset (0 and "" where it names none), its body as sent and decoded.

    Raises `RefusedError`: it is damaged, cut off, or grows beyond the limit.
    """
    if not block.startswith(b"HTTP/"):  # HTTP 0.9 had no headers
        return 0, "", "", block, block
    try:
        record = WarcRecord.from_bytes(_HEAD % len(block) + block)
        record.parse_http(max_header_len=HEAD_BYTES, quirks_mode=True)
        headers = record.http_headers
        body = payload = record.reader.read()
    except (OSError, ValueError) as error:
        raise RefusedError(Reason.DAMAGED, f"bad HTTP headers: {error}") from error
    named = [*headers.get_multiple("Content-Encoding"), *headers.get_multiple("Transfer-Encoding")]
    for coding in reversed(",".join(named).lower().split(",")):
        body = join_chunks(body) if coding.strip() == "chunked" else _undone(coding.strip(), body, limit_bytes)
        if len(body) > limit_bytes:
            raise RefusedError(Reason.TOO_LONG, f"{len(payload):,} bytes grow beyond {limit_bytes:,}")
    media_type = (headers.get("Content-Type") or "").partition(";")[0].strip().lower()
    return headers.status_code or 0, media_type, record.http_charset or "", payload, body


def join_chunks(data: bytes) -> bytes:
    """A chunked body in one piece; unchanged if it is not chunked. Raises `RefusedError` at damage and cuts."""
    parts, at = list[bytes](), 0
    while head := _CHUNK_HEAD.match(data, at):
        size = int(head.group(1), 16)
        if size == 0:
            return b"".join(parts)
        parts.append(data[head.end() : head.end() + size])
        at = head.end() + size
        if at > len(data) and not (len(parts) == 1 and _MARKUP.match(data)):
            raise RefusedError(Reason.CUT_OFF, f"a chunk of {size:,} bytes lacks {at - len(data):,}")
        at += 2 if data[at : at + 2] == b"\r\n" else 1 if data[at : at + 1] == b"\n" else 0
    if not parts or at > len(data):
        return data
    reason, what = (Reason.DAMAGED, "a bad chunk") if data[at:] else (Reason.CUT_OFF, "the last chunk is missing,")
    raise RefusedError(reason, f"{what} behind {sum(map(len, parts)):,} bytes")


def _undone(coding: str, data: bytes, limit_bytes: int) -> bytes:
    """The data without one compression, to just beyond the limit; unchanged, where that is none or was undone."""
    packing = _CODINGS.get(coding, "")
    if packing == "zlib" and data and not (data[0] & 15 == 8 and int.from_bytes(data[:2]) % 31 == 0):
        packing = "deflate"  # some servers send the zlib format, as they should, others its bare inside
    if not packing or not data or _MARKUP.match(data) or (packing in PACKINGS and packing_of(data) != packing):
        return data
    stored, body = io.BytesIO(data), bytearray()
    read = BrotliReader(stored).read if packing == "br" else open_uncompressed(stored, packing).read1
    try:
        while len(body) <= limit_bytes and (piece := read(BLOCK_BYTES)):
            body += piece
    except RefusedError as error:
        if error.is_within or not body:  # else something stands behind it, which browsers ignore
            raise
    except OSError as error:
        raise RefusedError(Reason.DAMAGED, f"damaged {coding} body: {error}") from error
    return bytes(body)
