"""WARC, WET and ARC archives to records of text.

In: an archive, in whatever state, and a function that takes text out of HTML. Out: a `Record` for each page, plain
text or WET conversion; everything else that was served is set aside, so that responses, resources and conversions =
records + set aside. Requests, metadata and the like are only counted.

The body of a response is taken as its server meant it: chunks joined, compression undone, within a limit (RFC 9112,
section 7.1; RFC 9110, section 8.4). FastWARC parses the headers. Archives often name a chunking or a compression that
their writer has already undone: then the body is taken as it stands.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastwarc.stream_io import BrotliReader, ZstdReader
from fastwarc.warc import WarcRecord

from groundup.corpus.document import OnSetAside, Reason, Record, SetAside, excerpt_of
from groundup.corpus.reading.archive import PLACE, RawRecord, read_records
from groundup.corpus.reading.compressed import DamagedStreamError
from groundup.corpus.reading.extract import ExtractionFailure, in_utf8
from groundup.corpus.reading.intake import limit_bytes, make_record

if TYPE_CHECKING:
    from groundup.corpus.reading.sources import InputFile
    from groundup.recipe import CorpusSettings

HTML_TYPES = frozenset({"text/html", "application/xhtml+xml"})
TEXT_TYPES = frozenset({"text/plain", "text/markdown"})
SILENT_KINDS = frozenset({"warcinfo", "request", "metadata", "revisit"})
"""Records without text of their own; a revisit says that the page is the same as one that is archived elsewhere."""

WRONG_DIGEST = "wrong digest"
_DIGESTS = {"sha1": hashlib.sha1, "md5": hashlib.md5, "sha256": hashlib.sha256, "sha512": hashlib.sha512}
_SNIFFED_BYTES = 1024
_HTTP_OVERHEAD_BYTES = 1 << 16
HEADER_BYTES = 1 << 16
_HEAD = b"WARC/1.0\r\nWARC-Type: response\r\nContent-Type: application/http\r\nContent-Length: %d\r\n\r\n"
_CHUNK_HEAD = re.compile(rb"[ \t]*([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\r\n]{0,4096})?\r?\n")
_URL_SAFE = str.maketrans("-_", "+/")
_CHARSET = re.compile(r"charset\s*=\s*[\"']?([^\s;\"']+)", re.IGNORECASE)
_MARKUP = re.compile(rb"\s*(?:\xef\xbb\xbf)?\s*<[!?A-Za-z]")
_GZIP_MAGIC, _ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


def read_warc(
    source: InputFile,
    settings: CorpusSettings,
    set_aside: OnSetAside,
    extract: Callable[[bytes, str], str | ExtractionFailure],
    counts: Counter[str] | None = None,
) -> Iterator[Record]:
    """The texts of an archive.

    Args:
        source: the file: .warc, .wet or .arc, plain or compressed.
        settings: for the normal form and the longest document.
        set_aside: called with every response without a text, and every lost stretch.
        extract: takes text out of an HTML page, given the page and its address (`Extractor.extract`).
        counts: if given, counts records by their kind ("response", "request", ...), and those whose digest does not
            fit their content under `WRONG_DIGEST`: many archives are full of those, so they are used nevertheless.
    """
    limit = limit_bytes(settings)
    is_empty = True
    for raw in read_records(source, limit + _HTTP_OVERHEAD_BYTES):
        is_empty = False
        if isinstance(raw, SetAside):
            set_aside(raw)
            continue
        kind = raw.kind or "unknown"
        if counts is not None:
            counts[kind] += 1
        url = raw.fields.get("warc-target-uri", "").strip("<>")
        if kind in SILENT_KINDS or (kind == "resource" and url.startswith("metadata:")):
            if raw.fault is not None:
                _refuse(source, set_aside, raw, raw.fault.reason, f"{kind}: {raw.fault.detail}")
            continue
        try:
            text = _text_of(raw, url, limit, extract, counts)
        except DamagedStreamError as error:
            text = ExtractionFailure(error.reason, error.detail)
        if isinstance(text, ExtractionFailure):
            _refuse(source, set_aside, raw, text.reason, text.detail)
            continue
        key = raw.fields.get("warc-record-id", "")
        record = make_record(source, text, settings, set_aside, raw.position, PLACE, raw.number, url=url, key=key)
        if record is not None:
            yield record
    if is_empty:
        set_aside(SetAside(source.label, "", 0, Reason.EMPTY, "no record in the file"))


def _text_of(
    raw: RawRecord,
    url: str,
    limit: int,
    extract: Callable[[bytes, str], str | ExtractionFailure],
    counts: Counter[str] | None,
) -> str | ExtractionFailure:
    """The text of a record that may have one, or why it has none.

    Raises:
        DamagedStreamError: its content is damaged, cut off or too long.
    """
    if raw.fault is not None:
        raise DamagedStreamError(raw.fault.reason, raw.fault.detail)
    if raw.kind not in ("response", "resource", "conversion"):
        return ExtractionFailure(Reason.NOT_TEXT, f"a record of type {raw.kind!r}")
    if len(raw.block) < raw.size_bytes:
        raise DamagedStreamError(Reason.TOO_LONG, f"{raw.size_bytes:,} bytes; the limit is {limit / 2**20:g} MiB")
    media_type, _, parameters = raw.fields.get("content-type", "").partition(";")
    media_type, charset = media_type.strip().lower(), "".join(_CHARSET.findall(parameters)[:1])
    payload = body = raw.block
    if raw.kind == "response" and (media_type == "application/http" or body.startswith(b"HTTP/")):
        response = parse_response(body, limit)
        if response.status and not 200 <= response.status < 300:
            return ExtractionFailure(Reason.NOT_TEXT, f"HTTP status {response.status}")
        media_type, charset, payload, body = response.media_type, response.charset, response.payload, response.body
    if counts is not None and not _digests_fit(raw, payload, body):
        counts[WRONG_DIGEST] += 1
    if len(body) > limit:
        raise DamagedStreamError(Reason.TOO_LONG, f"{len(body):,} bytes; the limit is {limit / 2**20:g} MiB")
    if not body:
        return ExtractionFailure(Reason.EMPTY, "no content")
    return _decoded(body, media_type or _sniffed(raw, body), charset, url, extract)


def _decoded(
    body: bytes, media_type: str, charset: str, url: str, extract: Callable[[bytes, str], str | ExtractionFailure]
) -> str | ExtractionFailure:
    if media_type in HTML_TYPES:
        if b"\0" in body[:_SNIFFED_BYTES] and not body.startswith((b"\xff\xfe", b"\xfe\xff")):
            return ExtractionFailure(Reason.NOT_TEXT, f"{media_type} by its header, but binary")
        return extract(in_utf8(body, charset), url)
    if media_type not in TEXT_TYPES:
        return ExtractionFailure(Reason.NOT_TEXT, media_type or "no media type")
    try:
        return in_utf8(body, charset).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return ExtractionFailure(Reason.INVALID_UTF8, f"byte {error.start} ({error.reason}); no charset fits")


def _sniffed(raw: RawRecord, body: bytes) -> str:
    """The media type of what came without one."""
    named = raw.fields.get("warc-identified-payload-type", "").lower()
    beginning = body[:_SNIFFED_BYTES].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return named or ("text/html" if beginning.startswith((b"<!doctype html", b"<html")) else "")


def _digests_fit(raw: RawRecord, payload: bytes, body: bytes) -> bool:
    """Whether the record's digests are those of its content.

    Writers disagree whether the payload's is that of the bytes as sent or as decoded; either will do.
    """
    for name, contents in (("warc-block-digest", (raw.block,)), ("warc-payload-digest", (payload, body))):
        algorithm, _, written = (part.strip() for part in raw.fields.get(name, "").partition(":"))
        make = _DIGESTS.get(algorithm.lower())
        if make and written and not any(_is_digest(written, make(content).digest()) for content in contents):
            return False
    return True


def _is_digest(written: str, digest: bytes) -> bool:
    """Whether this is the digest in base 32, as the standard recommends, in hex or base 64."""
    written, in_base32 = written.rstrip("="), base64.b32encode(digest).decode().rstrip("=")
    in_base64 = base64.b64encode(digest).decode().rstrip("=")
    return written.upper() in (in_base32, digest.hex().upper()) or written.translate(_URL_SAFE) == in_base64


def _refuse(source: InputFile, set_aside: OnSetAside, raw: RawRecord, reason: Reason, detail: str) -> None:
    set_aside(
        SetAside(source.label, PLACE, raw.number, reason, detail, excerpt_of(raw.block), raw.size_bytes, raw.position)
    )


@dataclass(frozen=True, slots=True)
class ArchivedResponse:
    """An HTTP response.

    Attributes:
        status: its code, such as 200; 0 where it has none.
        media_type: such as "text/html"; "" where it has none.
        charset: as its server named it, or "".
        payload: what follows the headers, as it was sent.
        body: the same, decoded.
    """

    status: int
    media_type: str
    charset: str
    payload: bytes
    body: bytes


def parse_response(block: bytes, limit_bytes: int) -> ArchivedResponse:
    """Parse a response and decode its body.

    Args:
        block: headers and body.
        limit_bytes: a body that grows beyond this is refused, and never held.

    Raises:
        DamagedStreamError: it is damaged, cut off or too long.
    """
    if not block.startswith(b"HTTP/"):  # HTTP 0.9 had no headers
        return ArchivedResponse(0, "", "", block, block)
    try:
        record = WarcRecord.from_bytes(_HEAD % len(block) + block)
        record.parse_http(max_header_len=HEADER_BYTES, quirks_mode=True)
        headers = record.http_headers
        payload = record.reader.read()
    except (OSError, ValueError) as error:
        raise DamagedStreamError(Reason.DAMAGED, f"bad HTTP headers: {error}") from error
    named = [*headers.get_multiple("Content-Encoding"), *headers.get_multiple("Transfer-Encoding")]
    body = payload
    for coding in reversed(",".join(named).split(",")):
        body = _undone(coding.strip().lower(), body, limit_bytes)
    if len(body) > limit_bytes:
        raise DamagedStreamError(Reason.TOO_LONG, f"{len(body):,} bytes")
    media_type = (headers.get("Content-Type") or "").partition(";")[0].strip().lower()
    return ArchivedResponse(headers.status_code or 0, media_type, record.http_charset or "", payload, body)


def join_chunks(data: bytes) -> bytes:
    """A chunked body in one piece; unchanged if it is not chunked.

    Raises:
        DamagedStreamError: a chunk is damaged or missing.
    """
    parts: list[bytes] = []
    at = 0
    while True:
        head = _CHUNK_HEAD.match(data, at)
        if head is None:
            if not parts:
                return data
            behind = f"behind {sum(map(len, parts)):,} bytes"
            if at >= len(data):
                raise DamagedStreamError(Reason.CUT_OFF, f"the last chunk is missing, {behind}")
            raise DamagedStreamError(Reason.DAMAGED, f"a bad chunk {behind}")
        size = int(head.group(1), 16)
        if size == 0:
            return b"".join(parts)
        part = data[head.end() : head.end() + size]
        if len(part) < size:
            if not parts and _MARKUP.match(data):
                return data
            raise DamagedStreamError(Reason.CUT_OFF, f"a chunk of {size:,} bytes, of which {len(part):,} are there")
        parts.append(part)
        at = head.end() + size
        at += 2 if data[at : at + 2] == b"\r\n" else 1 if data[at : at + 1] == b"\n" else 0


def _undone(coding: str, data: bytes, limit_bytes: int) -> bytes:
    """The data without one coding; unchanged, if that is none, such as "utf-8", or has been undone already.

    Raises:
        DamagedStreamError: see `parse_response`.
    """
    if coding == "chunked":
        return join_chunks(data)
    window_bits = 0
    if not data or _MARKUP.match(data):
        return data
    if coding in ("gzip", "x-gzip") and data.startswith(_GZIP_MAGIC):
        window_bits = 16 + zlib.MAX_WBITS
    elif coding == "deflate":  # some servers send the zlib format, as they should, others its bare inside
        is_zlib = len(data) > 1 and data[0] & 0x0F == 8 and (data[0] << 8 | data[1]) % 31 == 0
        window_bits = zlib.MAX_WBITS if is_zlib else -zlib.MAX_WBITS
    elif coding != "br" and not (coding == "zstd" and data.startswith(_ZSTD_MAGIC)):
        return data
    try:
        if window_bits:
            inflater = zlib.decompressobj(wbits=window_bits)
            body = inflater.decompress(data, limit_bytes + 1)
            is_whole = inflater.eof
        else:
            reader = (BrotliReader if coding == "br" else ZstdReader)(io.BytesIO(data))
            body, is_whole = reader.read(limit_bytes + 1), True
    except (OSError, zlib.error) as error:
        raise DamagedStreamError(Reason.DAMAGED, f"damaged {coding} body: {str(error).split(': ')[-1]}") from error
    if len(body) > limit_bytes:
        raise DamagedStreamError(Reason.TOO_LONG, f"{len(data):,} bytes of {coding} grow beyond {limit_bytes:,}")
    if not is_whole:
        raise DamagedStreamError(Reason.CUT_OFF, f"the {coding} body ends behind {len(body):,} bytes of text")
    return body
