"""WARC 1.0 (ISO 28500): pages as request and response records, each a gzip member of its own, in files that grow whole.

A file grows under `NAME.open`; when it is full, or the crawl stops, it is flushed and renamed. What a kill leaves
behind the last page that the journal knows is cut off when the crawl goes on.

Bodies are stored unpacked and in one piece. Headers that speak of the packed or chunked form they had on the wire keep
their values under an `X-Crawl-` name, as Common Crawl does it: a reader that follows the headers reads correctly.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from groundup.corpus.crawl.fetch import Response
from groundup.environment import version_of
from groundup.errors import GroundupError
from groundup.files import sync

OPEN_MARK = ".open"
_OF_THE_WIRE = frozenset({b"content-encoding", b"transfer-encoding", b"content-length"})


@dataclass(frozen=True)
class PageSpan:
    """Where a page stands: the file's number, the bytes in it, and their CRC-32."""

    file: int
    begin: int
    end: int
    crc: int


def page_records(response: Response, hops: Sequence[str]) -> bytes:
    """A page as WARC records: response, request, and metadata if redirects led to it.

    Args:
        response: the answer that is stored.
        hops: the addresses asked for before, in their order.
    """
    date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    identity = _new_id()
    head = [response.status_line.encode("latin-1", "replace")]
    for name, value in response.raw_headers:
        kept = b"X-Crawl-" + name if name.lower() in _OF_THE_WIRE else name
        head.append(_one_line(kept) + b": " + _one_line(value))
    head.append(b"Content-Length: %d" % len(response.body))
    block = b"\r\n".join([*head, b"", b""]) + response.body
    fields = {
        "WARC-Target-URI": response.url,
        "WARC-Date": date,
        "WARC-IP-Address": response.address,
        "WARC-Payload-Digest": _digest(response.body),
        "Content-Type": "application/http; msgtype=response",
    }
    records = [_record("response", identity, fields, block)]
    about = {"WARC-Target-URI": response.url, "WARC-Date": date, "WARC-Concurrent-To": identity}
    request = {**about, "Content-Type": "application/http; msgtype=request"}
    records.append(_record("request", _new_id(), request, response.request))
    if hops:
        lines = [*(f"via: {hop}" for hop in hops), f"fetchTimeMs: {1000 * response.seconds:.0f}", ""]
        metadata = {**about, "Content-Type": "application/warc-fields"}
        records.append(_record("metadata", _new_id(), metadata, "\r\n".join(lines).encode()))
    return b"".join(records)


def _record(kind: str, identity: str, fields: dict[str, str], block: bytes) -> bytes:
    named = {
        "WARC-Type": kind,
        "WARC-Record-ID": identity,
        **{name: value for name, value in fields.items() if value},
        "WARC-Block-Digest": _digest(block),
        "Content-Length": str(len(block)),
    }
    head = "\r\n".join(["WARC/1.0", *(f"{name}: {value}" for name, value in named.items()), "", ""])
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    return packer.compress(head.encode()) + packer.compress(block) + packer.compress(b"\r\n\r\n") + packer.flush()


def _digest(data: bytes) -> str:
    return "sha1:" + base64.b32encode(hashlib.sha1(data, usedforsecurity=False).digest()).decode()


def _new_id() -> str:
    return f"<urn:uuid:{uuid.uuid4()}>"


def _one_line(text: bytes) -> bytes:
    return text.replace(b"\r", b" ").replace(b"\n", b" ")


class WarcFiles:
    """The numbered files of a crawl; the last one may be growing.

    Args:
        folder: where they are.
        user_agent: said in each file's first record.
        max_bytes: size after which the next file is begun.
    """

    def __init__(self, folder: Path, user_agent: str, max_bytes: int) -> None:
        self._folder, self._user_agent, self._max_bytes = folder, user_agent, max_bytes
        self._handle: IO[bytes] | None = None
        self._number = 0
        self._first_page = 0  # byte
        self._end = 0  # byte behind the last whole page

    def path(self, number: int) -> Path:
        """The name of a finished file."""
        return self._folder / f"pages-{number:05d}.warc.gz"

    def recover(self, places: Sequence[PageSpan], next_number: int) -> int:
        """Go on after a kill: keep the pages of the growing file that are there as the journal says.

        Args:
            places: the pages of file `next_number` and later ones, in the journal's order.
            next_number: the first number that no finished file has.

        Returns:
            How many of `places` are kept; the next page, or `finish`, cuts off what stands behind them.
        """
        self._number = next_number
        path = self.open_path(next_number)
        kept = 0
        if path.exists():
            with path.open("rb") as handle:
                for place in places:
                    handle.seek(place.begin)
                    data = handle.read(place.end - place.begin)
                    whole = len(data) == place.end - place.begin and zlib.crc32(data) == place.crc
                    if place.file != next_number or not whole:
                        break
                    self._end = place.end
                    kept += 1
            if kept:
                self._first_page = places[0].begin
                self._handle = path.open("r+b", buffering=0)
            else:
                path.unlink()
        for stray in self._folder.glob(f"pages-*.warc.gz{OPEN_MARK}"):
            if stray != path:
                stray.unlink()
        return kept

    def append(self, records: bytes) -> PageSpan:
        """Write a page's records behind the last page.

        Raises:
            GroundupError: the disk is full or the file cannot be written; the file ends with the page before.
        """
        try:
            if self._handle is None:
                self._begin()
            begin = self._end
            self._write(records)
        except OSError as error:
            raise store_error(self.open_path(self._number), error) from error
        self._end += len(records)
        return PageSpan(self._number, begin, self._end, zlib.crc32(records))

    def is_full_for(self, n_bytes: int) -> bool:
        """Whether the next page belongs into another file: `finish` this one first."""
        return self._end > self._first_page and self._end + n_bytes > self._max_bytes

    def forget_last(self, place: PageSpan) -> None:
        """Take back the page just written."""
        self._end = place.begin

    def sync(self) -> None:
        """Flush the growing file to disk."""
        if self._handle is not None:
            os.fsync(self._handle.fileno())

    def finish(self) -> None:
        """Give the growing file its name; the next page begins another."""
        if self._handle is None:
            return
        try:
            self._handle.truncate(self._end)
            os.fsync(self._handle.fileno())
        finally:
            self._handle.close()
            self._handle = None
        path = self.open_path(self._number)
        if self._end > self._first_page:
            path.replace(self.path(self._number))
            self._number += 1
        else:
            path.unlink(missing_ok=True)
        sync(self._folder)
        self._end = self._first_page = 0

    def _begin(self) -> None:
        self._end = 0
        self._handle = self.open_path(self._number).open("wb", buffering=0)
        fields = {
            "WARC-Date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "WARC-Filename": self.path(self._number).name,
            "Content-Type": "application/warc-fields",
        }
        lines = [
            f"software: groundup/{version_of('groundup')}",
            "format: WARC File Format 1.0",
            "conformsTo: http://bibnum.bnf.fr/WARC/WARC_ISO_28500_version1_latestdraft.pdf",
            "robots: obey",
            f"http-header-user-agent: {self._user_agent}",
            "",
        ]
        self._write(_record("warcinfo", _new_id(), fields, "\r\n".join(lines).encode()))
        self._end = self._first_page = self._handle.tell()
        sync(self._folder)

    def _write(self, data: bytes) -> None:
        assert self._handle is not None
        self._handle.seek(self._end)
        self._handle.truncate()
        rest = memoryview(data)
        while rest:
            rest = rest[self._handle.write(rest) :]

    def open_path(self, number: int) -> Path:
        """The name of a growing file."""
        path = self.path(number)
        return path.with_name(path.name + OPEN_MARK)


def store_error(path: Path, error: OSError) -> GroundupError:
    """Say in words why something in a crawl's folder could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return GroundupError(
            f"{path}: the disk is full; every page that was stored before is whole.",
            "Free some space, then give the same command again.",
        )
    return GroundupError(f"{path}: cannot be written ({error.strerror or error}).", "Choose another folder with --out.")
