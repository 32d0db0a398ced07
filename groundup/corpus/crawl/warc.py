"""The WARC files of a crawl (ISO 28500), which are its journal too: what they hold is not fetched again.

A page is a response record, each record a gzip member of its own. A file grows under `pages.warc.gz.open`, and gets
its name when it is full or the crawl stops; what a kill left behind the last whole record is cut off at the next start.
Bodies are stored unpacked and in one piece. Headers that speak of their form on the wire keep their values under an
`X-Crawl-` name, as Common Crawl does it: a reader that follows the headers reads correctly.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fastwarc.stream_io import GzipWriter
from fastwarc.warc import ArchiveIterator, WarcRecord, WarcRecordType
from scrapy.http import Headers, Response

from groundup.environment import version_of
from groundup.files import sync, write_error
from groundup.untrusted import ordinary_file

FILE_BYTES = 256 << 20
"""After which a new file is begun."""
_OF_THE_WIRE = frozenset({b"content-encoding", b"transfer-encoding", b"content-length"})
_MAX_HEAD_BYTES = 24 << 10  # readers of WARC files give up on longer ones
_PAGE = re.compile(rb"WARC/1\.1\r\nWARC-Type: response\r\n(?:.+\r\n)*?WARC-Target-URI: (\S+)\r\n(?:.+\r\n)*\r\n")


def page_record(response: Response) -> bytes:
    """A page as a response record."""
    head = b"HTTP/1.1 200 OK\r\n"
    for name, value in ((name, value) for name, values in response.headers.items() for value in values):
        kept = b"X-Crawl-" + name if name.lower() in _OF_THE_WIRE else name
        line = kept + b": " + re.sub(rb"[\r\n]", b" ", value) + b"\r\n"
        head += line if len(head) + len(line) <= _MAX_HEAD_BYTES else b""
    block = head + b"Content-Length: %d\r\n\r\n" % len(response.body) + response.body
    digest = hashlib.sha1(response.body, usedforsecurity=False).digest()
    headers = {"WARC-Target-URI": response.url, "Content-Type": "application/http; msgtype=response"}
    return _record("response", block, headers, digest)


def _record(kind: str, block: bytes, headers: dict[str, str], digest: bytes | None = None) -> bytes:
    record, packed = WarcRecord(), io.BytesIO()
    record.init_headers(getattr(WarcRecordType, kind), content_length=len(block))
    for name, value in headers.items():
        record.headers[name] = value
    record.set_bytes_content(block)
    with GzipWriter(packed, 6) as writer:
        record.write(writer, checksum_data=True, payload_digest=digest)
    return packed.getvalue()


class WarcFiles:
    """The files of a crawl's folder; `stored`: file and offset of each page that earlier sessions stored whole."""

    def __init__(self, folder: Path, user_agent: str = "") -> None:
        self._folder, self._growing, self._user_agent = folder, folder / "pages.warc.gz.open", user_agent
        self._handle: IO[bytes] | None = None
        self._end = 0  # the byte behind the last whole page of the growing file
        if self._growing.exists():
            self._end = max((end for _, end, data in _members(self._growing) if _PAGE.match(data)), default=0)
            self._handle = self._growing.open("r+b", buffering=0)
            self.close()
        self.stored, self.stored_bytes = dict[str, tuple[Path, int]](), 0
        for path in sorted(folder.glob("pages-*.warc.gz")):
            for start, _, data in _members(path):
                if page := _PAGE.match(data):
                    self.stored[page[1].decode("latin-1")] = path, start
                    self.stored_bytes += len(data) - data.find(b"\r\n\r\n", page.end()) - len("\r\n\r\n" * 2)

    def read(self, url: str) -> Response:
        """A page that an earlier session stored."""
        path, start = self.stored[url]
        with path.open("rb") as handle:
            handle.seek(start)
            record = next(iter(ArchiveIterator(handle)))
            return Response(url, headers=Headers(record.http_headers.items_bytes()), body=record.reader.read())

    def append(self, record: bytes) -> None:
        """Write a page's record.

        Raises:
            GroundupError: the disk is full or the file cannot be written; it ends with the record before.
        """
        if self._end and self._end + len(record) > FILE_BYTES:
            self.close()
        try:
            if self._handle is None:
                self._handle = self._growing.open("wb", buffering=0)
                about = f"software: groundup/{version_of('groundup')}\r\nformat: WARC File Format 1.1\r\n"
                about += f"robots: obey\r\nhttp-header-user-agent: {self._user_agent}\r\n"
                record = _record("warcinfo", about.encode(), {"Content-Type": "application/warc-fields"}) + record
            self._handle.seek(self._end)
            rest = memoryview(record)
            while rest:
                rest = rest[self._handle.write(rest) :]
            self._end += len(record)
        except OSError as error:
            raise write_error(self._growing, error) from error

    def close(self) -> None:
        """Cut the growing file behind its last whole page, and give it its name."""
        if self._handle is None:
            return
        try:
            with self._handle as handle:
                handle.truncate(self._end)
                os.fsync(handle.fileno())
            if self._end:
                names = (self._folder / f"pages-{number:05d}.warc.gz" for number in itertools.count())
                self._growing.rename(next(path for path in names if not path.exists()))
            self._growing.unlink(missing_ok=True)
            sync(self._folder)
        except OSError as error:
            raise write_error(self._growing, error) from error
        self._handle, self._end = None, 0


def _members(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """The whole gzip members (their checksums hold), from where to where; ends before the first torn one."""
    start, rest = 0, b""
    with ordinary_file(path).open("rb") as handle:
        while rest or (rest := handle.read(1 << 20)):
            unpacker, data = zlib.decompressobj(31), bytearray()
            while rest and not unpacker.eof:
                try:
                    data += unpacker.decompress(rest)
                except zlib.error:
                    return
                rest = unpacker.unused_data if unpacker.eof else handle.read(1 << 20)
            if unpacker.eof:
                yield start, (start := handle.tell() - len(rest)), bytes(data)
