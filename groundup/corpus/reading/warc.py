"""WARC, WET and ARC archives to records of text.

In: an archive, in whatever state, and a function that takes text out of HTML. Out: a `Record` for each page, plain
text or WET conversion; everything else that was served is set aside, so that responses, resources and conversions =
records + set aside. Requests, metadata and the like are only counted.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from groundup.corpus.document import OnSetAside, Reason, Record, SetAside, excerpt_of
from groundup.corpus.reading.archive import PLACE, RawRecord, read_records
from groundup.corpus.reading.compressed import DamagedStreamError
from groundup.corpus.reading.extract import ExtractionFailure, in_utf8
from groundup.corpus.reading.http_body import parse_response
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
    media_type, charset = media_type.strip().lower(), _charset_of(parameters)
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


def _charset_of(parameters: str) -> str:
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset":
            return value.strip(" \t\"'")
    return ""


def _digests_fit(raw: RawRecord, payload: bytes, body: bytes) -> bool:
    """Whether the record's digests are those of its content.

    Writers disagree whether the payload's is that of the bytes as sent or as decoded; either will do.
    """
    for name, contents in (("warc-block-digest", (raw.block,)), ("warc-payload-digest", (payload, body))):
        algorithm, _, digest = raw.fields.get(name, "").partition(":")
        make = _DIGESTS.get(algorithm.strip().lower())
        if (
            make is not None
            and digest
            and not any(make(content).digest() in _read_digest(digest) for content in contents)
        ):
            return False
    return True


def _read_digest(text: str) -> set[bytes]:
    """What a digest can mean: base 32 as the standard recommends, hex, or base 64."""
    meanings = set()
    text = text.strip()
    padded = text + "=" * (-len(text) % 8)
    with contextlib.suppress(ValueError):
        meanings.add(base64.b32decode(padded, casefold=True))
    with contextlib.suppress(ValueError):
        meanings.add(bytes.fromhex(text))
    with contextlib.suppress(ValueError):
        meanings.add(base64.b64decode(text, altchars=b"-_"))
    return meanings


def _refuse(source: InputFile, set_aside: OnSetAside, raw: RawRecord, reason: Reason, detail: str) -> None:
    set_aside(
        SetAside(source.label, PLACE, raw.number, reason, detail, excerpt_of(raw.block), raw.size_bytes, raw.position)
    )
