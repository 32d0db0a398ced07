"""The body of an archived HTTP response as its server meant it: chunks joined, compression undone, within a limit.

In: the bytes of a WARC or ARC record. Out: status, media type, charset and body (RFC 9112, section 7.1: chunks;
RFC 9110, section 8.4: encodings). FastWARC parses the headers. Archives often name a chunking or a compression that
their writer has already undone: then the body is taken as it stands.
"""

from __future__ import annotations

import io
import re
import zlib
from dataclasses import dataclass

from groundup.corpus.document import Reason
from groundup.corpus.reading.compressed import DamagedStreamError

HEADER_BYTES = 1 << 16
_HEAD = b"WARC/1.0\r\nWARC-Type: response\r\nContent-Type: application/http\r\nContent-Length: %d\r\n\r\n"
_CHUNK_HEAD = re.compile(rb"[ \t]*([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\r\n]{0,4096})?\r?\n")
_MARKUP = re.compile(rb"\s*(?:\xef\xbb\xbf)?\s*<[!?A-Za-z]")
_GZIP_MAGIC, _ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


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
    from fastwarc.warc import WarcRecord

    if not block.startswith(b"HTTP/"):  # HTTP 0.9 had no headers
        return ArchivedResponse(0, "", "", block, block)
    try:
        record = WarcRecord.from_bytes(_HEAD % len(block) + block)
        record.parse_http(max_header_len=HEADER_BYTES, quirks_mode=True)
        headers = record.http_headers
        payload = record.reader.read()
    except (OSError, ValueError) as error:
        raise DamagedStreamError(Reason.DAMAGED, f"bad HTTP headers: {error}") from error
    codings = [*_listed(headers.get_multiple("Content-Encoding")), *_listed(headers.get_multiple("Transfer-Encoding"))]
    body = payload
    for coding in reversed(codings):
        body = _undone(coding, body, limit_bytes)
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
            if at >= len(data):
                raise DamagedStreamError(
                    Reason.CUT_OFF, f"the last chunk is missing, behind {sum(map(len, parts)):,} bytes"
                )
            raise DamagedStreamError(Reason.DAMAGED, f"a bad chunk behind {sum(map(len, parts)):,} bytes")
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


def _listed(values: tuple[str, ...]) -> list[str]:
    return [name.strip().lower() for value in values for name in value.split(",") if name.strip()]


def _undone(coding: str, data: bytes, limit_bytes: int) -> bytes:
    """The data without one coding, at most one byte longer than the limit.

    Raises:
        DamagedStreamError: see `parse_response`.
    """
    if coding == "chunked":
        return join_chunks(data)
    if not data or _MARKUP.match(data):
        return data  # undone already
    if coding in ("gzip", "x-gzip"):
        body = _inflated(data, 16 + zlib.MAX_WBITS, limit_bytes) if data.startswith(_GZIP_MAGIC) else data
    elif coding == "deflate":
        # Some servers send the zlib format, as they should, others its bare inside.
        is_zlib = len(data) > 1 and data[0] & 0x0F == 8 and (data[0] << 8 | data[1]) % 31 == 0
        body = _inflated(data, zlib.MAX_WBITS if is_zlib else -zlib.MAX_WBITS, limit_bytes)
    elif coding == "br" or (coding == "zstd" and data.startswith(_ZSTD_MAGIC)):
        body = _read_by_library(coding, data, limit_bytes)
    else:
        body = data  # "identity", and names that are none, such as "utf-8"
    if len(body) > limit_bytes:
        raise DamagedStreamError(Reason.TOO_LONG, f"{len(data):,} bytes of {coding} grow beyond {limit_bytes:,}")
    return body


def _inflated(data: bytes, window_bits: int, limit_bytes: int) -> bytes:
    inflater = zlib.decompressobj(wbits=window_bits)
    try:
        body = inflater.decompress(data, limit_bytes + 1)
    except zlib.error as error:
        raise DamagedStreamError(Reason.DAMAGED, f"damaged compressed body: {str(error).split(': ')[-1]}") from error
    if not inflater.eof and len(body) <= limit_bytes:
        raise DamagedStreamError(
            Reason.CUT_OFF, f"the compressed body ends early: {len(body):,} bytes could be unpacked"
        )
    return body


def _read_by_library(coding: str, data: bytes, limit_bytes: int) -> bytes:
    from fastwarc.stream_io import BrotliReader, ZstdReader

    reader = (BrotliReader if coding == "br" else ZstdReader)(io.BytesIO(data))
    try:
        return reader.read(limit_bytes + 1)
    except OSError as error:
        raise DamagedStreamError(Reason.DAMAGED, f"damaged {coding} body: {error}") from error
