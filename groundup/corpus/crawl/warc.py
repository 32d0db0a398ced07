"""The WARC files of a crawl (ISO 28500), which are its journal too: a killed crawl goes on from what they hold.

A page is a response record; every outcome, and every address that the user gave, is a metadata record with an `Entry`
as JSON, a page's behind its response. Each record is a gzip member of its own. A file grows under `NAME.open`, and gets
its name when it is full or the crawl stops; what a kill left behind the last whole entry is cut off at the next start.

Bodies are stored unpacked and in one piece. Headers that speak of the packed or chunked form they had on the wire keep
their values under an `X-Crawl-` name, as Common Crawl does it: a reader that follows the headers reads correctly.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from http.client import responses
from pathlib import Path
from typing import IO, Literal

from fastwarc.stream_io import GzipWriter
from fastwarc.warc import WarcRecord, WarcRecordType
from pydantic import TypeAdapter
from scrapy.http import Response

from groundup.corpus.crawl.report import Refusal
from groundup.environment import version_of
from groundup.errors import ArtifactError
from groundup.files import sync, write_error
from groundup.untrusted import ordinary_file

_OF_THE_WIRE = frozenset({b"content-encoding", b"transfer-encoding", b"content-length"})
_MAX_HEAD_BYTES = 24 << 10  # readers of WARC files give up on longer ones
FILE_BYTES = 256 << 20
"""After which a new file is begun."""
FIX = "Put it back as it was, or begin a new crawl in another folder with --out."


@dataclass(slots=True)
class Entry:
    """What a metadata record says; also an address on its way to an outcome ("found", which is not written down)."""

    event: Literal["given", "found", "stored", "listed", "refused"]  # given: by the user; listed: a sitemap was read
    url: str  # as it was given or found
    sitemap: bool = False
    depth: int = 0  # links between it and a given page
    via: tuple[str, ...] = ()  # where it was redirected to, in their order; the last one is what was stored
    links: tuple[str, ...] = ()  # new addresses that it led to; those of a sitemap are no deeper than it
    sitemaps: tuple[str, ...] = ()  # new sitemaps that it led to
    reason: Refusal | Literal[""] = ""
    detail: str = ""
    size_bytes: int = 0  # of the stored body

    @property
    def last_url(self) -> str:
        """Where it led so far."""
        return self.via[-1] if self.via else self.url

    def record(self) -> bytes:
        """As a metadata record."""
        text = json.dumps({name: value for name, value in asdict(self).items() if value}, ensure_ascii=False)
        block, headers = text.encode("utf-8", "replace"), {"WARC-Target-URI": self.url}
        return _record(WarcRecordType.metadata, "application/json", block, headers)


_ENTRY = TypeAdapter(Entry)


def page_record(response: Response) -> bytes:
    """A page as a response record."""
    head = f"HTTP/1.1 {response.status} {responses.get(response.status, '')}".rstrip().encode() + b"\r\n"
    for name in response.headers:
        for value in response.headers.getlist(name):
            kept = b"X-Crawl-" + name if name.lower() in _OF_THE_WIRE else name
            line = kept + b": " + re.sub(rb"[\r\n]", b" ", value) + b"\r\n"
            head += line if len(head) + len(line) <= _MAX_HEAD_BYTES else b""
    block = head + b"Content-Length: %d\r\n\r\n" % len(response.body) + response.body
    digest = hashlib.sha1(response.body, usedforsecurity=False).digest()
    headers = {"WARC-Target-URI": response.url, "WARC-IP-Address": str(response.ip_address or "")}
    return _record(WarcRecordType.response, "application/http; msgtype=response", block, headers, digest)


def _record(
    kind: WarcRecordType, content_type: str, block: bytes, headers: Mapping[str, str], digest: bytes | None = None
) -> bytes:
    record, packed = WarcRecord(), io.BytesIO()
    record.init_headers(kind, content_length=len(block))
    for name, value in {**headers, "Content-Type": content_type}.items():
        if value:
            record.headers[name] = value
    record.set_bytes_content(block)
    with GzipWriter(packed, 6) as writer:
        record.write(writer, checksum_data=True, payload_digest=digest)
    return packed.getvalue()


class WarcFiles:
    """The numbered files of a crawl's folder, and what they hold (`entries`); the last one may be growing.

    Raises:
        ArtifactError: a finished file is missing or damaged.
    """

    def __init__(self, folder: Path, user_agent: str = "") -> None:
        self._folder, self._user_agent = folder, user_agent
        self._handle: IO[bytes] | None = None
        self._number = 0
        self.entries: list[Entry] = []
        for path in sorted(folder.glob("pages-*.warc.gz")):
            if path != self._path:
                raise ArtifactError(f"{self._path}: is gone, and later files are there.", FIX)
            if (end := self._read(path)) != (size := path.stat().st_size):
                raise ArtifactError(f"{path}: is damaged behind byte {end:,} of {size:,}.", FIX)
            self._number += 1
        self._end = self._read(self._growing) if self._growing.exists() else 0  # the byte behind the last whole entry

    def append(self, records: bytes) -> None:
        """Write records that end with an entry's.

        Raises:
            GroundupError: the disk is full or the file cannot be written; it ends with the entry before.
        """
        if self._end and (self._handle is None or self._end + len(records) > FILE_BYTES):
            self.close()
        try:
            if self._handle is None:
                self._handle = self._growing.open("wb", buffering=0)
            if not self._end:
                about = f"software: groundup/{version_of('groundup')}\r\nformat: WARC File Format 1.1\r\n"
                about += f"robots: obey\r\nhttp-header-user-agent: {self._user_agent}\r\n"
                records = _record(WarcRecordType.warcinfo, "application/warc-fields", about.encode(), {}) + records
            self._handle.seek(self._end)
            rest = memoryview(records)
            while rest:
                rest = rest[self._handle.write(rest) :]
            self._end += len(records)
        except OSError as error:
            raise write_error(self._growing, error) from error

    def close(self) -> None:
        """Give the growing file its name, also one that an earlier session left."""
        try:
            if self._handle is not None:
                self._handle.close()
                self._handle = None
            if self._end:
                with self._growing.open("r+b") as handle:
                    handle.truncate(self._end)
                    os.fsync(handle.fileno())
                self._growing.replace(self._path)
                self._number, self._end = self._number + 1, 0
            self._growing.unlink(missing_ok=True)
            sync(self._folder)
        except OSError as error:
            raise write_error(self._growing, error) from error

    def _read(self, path: Path) -> int:
        """Take up the entries of a file; returns the byte behind the last one."""
        last = 0
        with ordinary_file(path).open("rb") as handle:
            for data, end in _members(handle):
                head, _, block = data.partition(b"\r\n\r\n")
                if b"\r\nWARC-Type: metadata\r\n" in head:
                    try:
                        self.entries.append(_ENTRY.validate_json(block))
                    except ValueError:
                        break
                    last = end
        return last

    @property
    def _path(self) -> Path:
        return self._folder / f"pages-{self._number:05d}.warc.gz"

    @property
    def _growing(self) -> Path:
        return Path(f"{self._path}.open")


def _members(handle: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    """The whole gzip members (their checksums hold), each with the byte it ends at; ends before the first torn one."""
    rest = b""
    while rest or (rest := handle.read(1 << 20)):
        unpacker, parts = zlib.decompressobj(31), list[bytes]()
        while not unpacker.eof:
            try:
                parts.append(unpacker.decompress(rest))
            except zlib.error:
                return
            rest = unpacker.unused_data if unpacker.eof else handle.read(1 << 20)
            if not rest and not unpacker.eof:
                return
        yield b"".join(parts), handle.tell() - len(rest)
