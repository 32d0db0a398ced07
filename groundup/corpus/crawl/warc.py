"""The WARC files of a crawl (ISO 28500), which are its journal too: a killed crawl goes on from what they hold.

A page is a response and a request record; every outcome, and every address that the user gave, is a metadata record
with an `Entry` as JSON, a page's behind its other records. Each record is a gzip member of its own. A file grows under
`NAME.open`, and gets its name when it is full or the crawl stops; what a kill left behind the last whole entry is cut
off at the next start.

Bodies are stored unpacked and in one piece. Headers that speak of the packed or chunked form they had on the wire keep
their values under an `X-Crawl-` name, as Common Crawl does it: a reader that follows the headers reads correctly.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fastwarc.stream_io import GzipWriter
from fastwarc.warc import WarcRecord, WarcRecordType

from groundup.corpus.crawl.report import Refusal
from groundup.environment import version_of
from groundup.errors import ArtifactError, GroundupError
from groundup.files import sync

_OF_THE_WIRE = frozenset({b"content-encoding", b"transfer-encoding", b"content-length"})
_MAX_HEAD_BYTES = 24 << 10  # readers of WARC files give up on longer ones
_SYNC_SECONDS = 5.0


@dataclass(frozen=True)
class Entry:
    """What a metadata record says.

    Attributes:
        event: "given" by the user; "stored"; "listed": a sitemap was read; "refused".
        url: the address, as it was given or found.
        sitemap: whether it is a sitemap.
        depth: links between it and a given page.
        via: the addresses it was redirected to, in their order; the last one is what was stored.
        links: new addresses that it led to; those of a sitemap are no deeper than it.
        sitemaps: new sitemaps that it led to.
        reason: why it was refused.
        detail: why, in this case.
        size_bytes: size of the stored body.
    """

    event: str
    url: str
    sitemap: bool = False
    depth: int = 0
    via: Sequence[str] = ()
    links: Sequence[str] = ()
    sitemaps: Sequence[str] = ()
    reason: str = ""
    detail: str = ""
    size_bytes: int = 0

    def record(self) -> bytes:
        """As a metadata record."""
        values = {name: value for name, value in vars(self).items() if value}
        return _record(WarcRecordType.metadata, self.url, "application/json", json.dumps(values).encode())


@dataclass(frozen=True)
class Exchange:
    """What was asked and answered, as it was sent, apart from the body."""

    request: bytes
    status_line: str
    headers: Sequence[tuple[bytes, bytes]]
    address: str


def page_records(url: str, exchange: Exchange, body: bytes) -> bytes:
    """A page as response and request records."""
    head = [exchange.status_line.encode("latin-1", "replace")]
    for name, value in exchange.headers:
        name = b"X-Crawl-" + name if name.lower() in _OF_THE_WIRE else name
        head.append(name + b": " + value.replace(b"\r", b" ").replace(b"\n", b" "))
        if sum(map(len, head)) > _MAX_HEAD_BYTES:
            head.pop()
    block = b"\r\n".join([*head, b"Content-Length: %d" % len(body), b"", b""]) + body
    digest = hashlib.sha1(body, usedforsecurity=False).digest()
    kind = "application/http; msgtype="
    return _record(WarcRecordType.response, url, kind + "response", block, exchange.address, digest) + _record(
        WarcRecordType.request, url, kind + "request", exchange.request
    )


def _record(
    kind: WarcRecordType, url: str, content_type: str, block: bytes, address: str = "", digest: bytes | None = None
) -> bytes:
    record = WarcRecord()
    record.init_headers(kind, content_length=len(block))
    for name, value in (("WARC-Target-URI", url), ("WARC-IP-Address", address), ("Content-Type", content_type)):
        if value:
            record.headers[name] = value
    record.set_bytes_content(block)
    packed = io.BytesIO()
    with GzipWriter(packed, 6) as writer:
        record.write(writer, checksum_data=True, payload_digest=digest)
    return packed.getvalue()


class WarcFiles:
    """The numbered files of a crawl's folder; the last one may be growing. Close it with `close`.

    Args:
        folder: the crawl's folder.
        user_agent: said in each file's first record.
        max_bytes: size after which the next file is begun.
        write: whether to open it for writing, and so to cut off what a kill left.

    Attributes:
        entries: what the files hold, in its order.

    Raises:
        ArtifactError: a finished file is missing or damaged.
    """

    def __init__(self, folder: Path, user_agent: str, max_bytes: int, *, write: bool = True) -> None:
        self._folder, self._user_agent, self._max_bytes = folder, user_agent, max_bytes
        self._handle: IO[bytes] | None = None
        self._first = self._end = 0  # bytes: behind the file's first record, and behind the last whole entry
        self._synced = time.monotonic()
        self.entries: list[Entry] = []
        finished = sorted(folder.glob("pages-*.warc.gz"))
        for self._number, path in enumerate(finished):
            if path != self._path():
                raise ArtifactError(f"{self._path()}: is gone, and later files are there.", _FIX)
            if self._read(path) != (size := path.stat().st_size):
                raise ArtifactError(f"{path}: is damaged behind byte {self._end:,} of {size:,}.", _FIX)
        self._number, self._end = len(finished), 0
        growing = self._open_path()
        if growing.exists() and self._read(growing) and write:
            self._handle = growing.open("r+b", buffering=0)
        if write:
            for stray in folder.glob("pages-*.warc.gz.open"):
                if stray != growing or self._handle is None:
                    stray.unlink()

    def append(self, records: bytes) -> None:
        """Write records that end with an entry's.

        Raises:
            GroundupError: the disk is full or the file cannot be written; it ends with the entry before.
        """
        try:
            if self._end > self._first and self._end + len(records) > self._max_bytes:
                self._finish()
            if self._handle is None:
                self._begin()
            self._write(records)
            self._end += len(records)
            if time.monotonic() - self._synced > _SYNC_SECONDS and self._handle is not None:
                os.fsync(self._handle.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            raise store_error(self._open_path(), error) from error

    def close(self) -> None:
        """Give the growing file its name."""
        try:
            self._finish()
        except OSError as error:
            raise store_error(self._open_path(), error) from error

    def _begin(self) -> None:
        self._end = 0
        self._handle = self._open_path().open("wb", buffering=0)
        lines = [
            f"software: groundup/{version_of('groundup')}",
            "format: WARC File Format 1.1",
            "robots: obey",
            f"http-header-user-agent: {self._user_agent}",
            "",
        ]
        about = _record(WarcRecordType.warcinfo, "", "application/warc-fields", "\r\n".join(lines).encode())
        self._write(about)
        self._first = self._end = len(about)
        sync(self._folder)

    def _write(self, data: bytes) -> None:
        assert self._handle is not None
        self._handle.seek(self._end)
        self._handle.truncate()
        rest = memoryview(data)
        while rest:
            rest = rest[self._handle.write(rest) :]

    def _finish(self) -> None:
        if self._handle is None:
            return
        try:
            self._handle.truncate(self._end)
            os.fsync(self._handle.fileno())
        finally:
            self._handle.close()
            self._handle = None
        if self._end > self._first:
            self._open_path().replace(self._path())
            self._number += 1
        else:
            self._open_path().unlink(missing_ok=True)
        sync(self._folder)
        self._end = self._first = 0

    def _read(self, path: Path) -> int:
        """Take up the entries of a file; returns the byte behind the last one."""
        self._end = 0
        with path.open("rb") as handle:
            for data, end in _members(handle):
                head, _, block = data.partition(b"\r\n\r\n")
                if b"\r\nWARC-Type: metadata\r\n" not in head:
                    continue
                try:
                    entry = Entry(**json.loads(block))
                    if entry.reason:
                        Refusal(entry.reason)
                except (TypeError, ValueError):
                    break
                self.entries.append(entry)
                self._end = end
        return self._end

    def _path(self) -> Path:
        return self._folder / f"pages-{self._number:05d}.warc.gz"

    def _open_path(self) -> Path:
        return self._folder / f"pages-{self._number:05d}.warc.gz.open"


_FIX = "Put it back as it was, or begin a new crawl in another folder with --out."


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


def store_error(path: Path, error: OSError) -> GroundupError:
    """Say in words why something in a crawl's folder could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return GroundupError(
            f"{path}: the disk is full; every page that was stored before is whole.",
            "Free some space, then give the same command again.",
        )
    return GroundupError(f"{path}: cannot be written ({error.strerror or error}).", "Choose another folder with --out.")
