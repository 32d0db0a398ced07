"""WARC, WET and ARC archives cut into records, every byte of them in a record or in a counted loss.

In: an archive file. Out: `RawRecord`s and `LostBytes` in the order of the file. Formats: ISO 28500 (WARC 0.18 to 1.1)
and the Internet Archive's ARC 1 and 2. The cutting is our own because the libraries end without a word where a file is
cut off (FastWARC 2.0.1 and warcio 1.8.1: 265 of 500 records, no error) and give up at the first damage.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from groundup.corpus.document import Reason, excerpt_of
from groundup.corpus.reading.archive_stream import ARC_RECORD, WARC_RECORD, ArchiveStream, StreamFault
from groundup.corpus.reading.sources import InputFile

HEAD_BYTES = 1 << 16
"""A record's header that is longer is damage."""

_SWALLOWED = re.compile(rb"\r?\n\r?\n(WARC/\d+\.\d+\r?\n)")
_ARC_FIELDS = {b"1": 4, b"2": 9}  # behind the address, by version


@dataclass(frozen=True, slots=True)
class RawRecord:
    """One record of an archive.

    Attributes:
        kind: its WARC-Type, such as "response"; an ARC record is one of these kinds too.
        position: where it begins in the uncompressed file.
        number: which record of the file, from 1 on; a loss counts as one.
        fields: its header, names in lower case.
        block: its content, at most the reader's limit and one byte of it.
        size_bytes: how long the content is by its header.
        fault: why the content is not whole, or None.
    """

    kind: str
    position: int
    number: int
    fields: dict[str, str]
    block: bytes
    size_bytes: int
    fault: StreamFault | None = None


@dataclass(frozen=True, slots=True)
class LostBytes:
    """Bytes of an archive that belong to no record that can be read.

    Attributes:
        position: where they begin in the uncompressed file.
        number: as in `RawRecord`.
        reason: `Reason.CUT_OFF`, `Reason.DAMAGED` or `Reason.UNREADABLE`.
        detail: in words.
        excerpt: how they begin, as far as they could be read.
        size_bytes: how many.
    """

    position: int
    number: int
    reason: Reason
    detail: str
    excerpt: str = ""
    size_bytes: int = 0


def read_records(source: InputFile, limit_bytes: int) -> Iterator[RawRecord | LostBytes]:
    """All records of an archive, whatever state it is in.

    Args:
        source: the file.
        limit_bytes: of a longer content only so much and one byte is kept.
    """
    stream = ArchiveStream(source)
    number = 0
    is_arc: bool | None = None
    arc_version = b"1"
    while True:
        fault = stream.go_on()
        if fault is not None:
            number += 1
            yield LostBytes(stream.position, number, fault.reason, fault.detail, size_bytes=fault.size_bytes)
            continue
        _skip_blank_lines(stream)
        if stream.at_end():
            return
        position = stream.position
        line = stream.line(HEAD_BYTES)
        if not line:
            continue  # a border or a fault comes first
        number += 1
        if is_arc is None and ARC_RECORD.match(line):
            is_arc, stream.record_begins = True, ARC_RECORD
        elif is_arc is None and WARC_RECORD.match(line):
            is_arc = False
        head = _arc_head(line, arc_version) if is_arc else _warc_head(line, stream)
        if isinstance(head, dict):
            record = _content(stream, head, position, number, limit_bytes)
            if is_arc and record.kind == "warcinfo" and (version := record.block[:1]) in _ARC_FIELDS:
                arc_version = version
            yield record
        else:
            n_lost = stream.position - position + _skip_to_record(stream)
            if fault := _taken_fault(stream):
                yield LostBytes(position, number, fault.reason, f"{head}: {fault.detail}", excerpt_of(line), n_lost)
                continue
            detail = f"{head}; {n_lost:,} bytes up to {_what_follows(stream)} are lost"
            yield LostBytes(position, number, Reason.DAMAGED, detail, excerpt_of(line), n_lost)


def _warc_head(line: bytes, stream: ArchiveStream) -> dict[str, str] | str:
    """The header that begins with this line, names in lower case; or what is wrong with it."""
    if not WARC_RECORD.match(line):
        return "not the beginning of a record"
    fields: dict[str, str] = {}
    name = ""
    left = HEAD_BYTES
    while left > 0:
        line = stream.line(left)
        left -= len(line)
        if not line.endswith(b"\n"):
            break
        if line in (b"\r\n", b"\n"):
            return _with_length(fields, "content-length")
        if WARC_RECORD.match(line):
            stream.put_back(line)
            return "a record's header without an end"
        text = line.decode("utf-8", "replace").strip()
        if line[:1] in b" \t" and name:
            fields[name] = f"{fields[name]} {text}"
        else:
            name, _, value = text.partition(":")
            name = name.strip().lower()
            fields.setdefault(name, value.strip())
    return "a record's header without an end" if left > 0 else f"a record's header beyond {HEAD_BYTES:,} bytes"


def _arc_head(line: bytes, version: bytes) -> dict[str, str] | str:
    """The header that this line of an ARC file is, as that of a WARC record; or what is wrong with it."""
    text = line.decode("utf-8", "replace").strip()
    parts = text.rsplit(" ", _ARC_FIELDS[version])
    if not ARC_RECORD.match(line) or len(parts) <= _ARC_FIELDS[version]:
        return "not the beginning of a record"
    fields = {"warc-target-uri": parts[0], "content-type": parts[3], "content-length": parts[-1]}
    fields["warc-type"] = "warcinfo" if parts[0].startswith("filedesc:") else "response"
    return _with_length(fields, "content-length")


def _with_length(fields: dict[str, str], name: str) -> dict[str, str] | str:
    length = fields.get(name, "")
    if length.isascii() and length.isdigit() and len(length) <= 18:
        return fields
    return f"a record whose length is {length!r}" if length else "a record without a length"


def _content(stream: ArchiveStream, fields: dict[str, str], position: int, number: int, limit_bytes: int) -> RawRecord:
    """The record whose content comes next, with what follows it as far as that shows whether its length is right."""
    size = int(fields["content-length"])
    block = stream.take(min(size, limit_bytes + 1))
    n_read = len(block) + stream.skip(size - len(block))
    record = RawRecord(fields.get("warc-type", "").lower(), position, number, fields, block, size)
    follows = b"" if n_read < size else _line_behind(stream)
    if n_read == size and not follows:
        # The member's checksum comes after the content; the fault that it shows is this record's.
        return replace(record, fault=_taken_fault(stream))
    seen = block + follows
    swallowed = _SWALLOWED.search(seen) if n_read == len(block) else None
    says = f"its length says {size:,} bytes"
    if swallowed:
        stream.put_back(seen[swallowed.start(1) :])
        says = f"{says}, but the next record begins after {swallowed.start():,}"
    elif n_read < size:
        says = f"{says}, of which {n_read:,} are there"
        if stream.fault is not None and (fault := stream.go_on()):
            return replace(record, fault=replace(fault, detail=f"{says}: {fault.detail}"))
        if stream.at_end():
            return replace(record, fault=StreamFault(Reason.CUT_OFF, f"{says}: the file ends there"))
    else:
        n_more = len(follows) + _skip_to_record(stream)
        says = f"{says}, but {n_more:,} more follow that belong to no record"
        if fault := _taken_fault(stream):
            return replace(record, fault=replace(fault, detail=f"{says}: {fault.detail}"))
    return replace(record, fault=StreamFault(Reason.DAMAGED, says))


def _taken_fault(stream: ArchiveStream) -> StreamFault | None:
    """The fault that reading has stopped at, if it makes what was read last doubtful; then it is passed."""
    return stream.go_on() if stream.fault is not None and stream.fault.is_within else None


def _line_behind(stream: ArchiveStream) -> bytes:
    """Pass the blank lines behind a record; returns what follows them if it is no record (then it has been read)."""
    n_blank = _skip_blank_lines(stream)
    line = stream.line(HEAD_BYTES)
    if not line:
        return b""
    if n_blank or WARC_RECORD.match(line) or (stream.record_begins is ARC_RECORD and ARC_RECORD.match(line)):
        stream.put_back(line)
        return b""
    return line


def _skip_blank_lines(stream: ArchiveStream) -> int:
    n_blank = 0
    while True:
        line = stream.line(2)
        if line not in (b"\r\n", b"\n", b"\r"):
            if line:
                stream.put_back(line)
            return n_blank
        n_blank += 1


def _skip_to_record(stream: ArchiveStream) -> int:
    """Pass over what is no record; returns how many bytes."""
    n_bytes = 0
    begins_line = True
    while line := stream.line(HEAD_BYTES):
        if begins_line and stream.record_begins.match(line):
            stream.put_back(line)
            break
        begins_line = line.endswith(b"\n")
        n_bytes += len(line)
    return n_bytes


def _what_follows(stream: ArchiveStream) -> str:
    return "the file's end" if stream.at_end() else "the next record"
