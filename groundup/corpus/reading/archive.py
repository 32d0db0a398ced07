"""WARC, WET and ARC archives cut into records, every byte of them in a record or in a counted loss.

In: an archive file. Out: `RawRecord`s, and what is set aside, in the order of the file. Formats: ISO 28500 (WARC 0.18
to 1.1) and the Internet Archive's ARC 1 and 2. The cutting is our own because the libraries end without a word where a
file is cut off (FastWARC 2.0.1 and warcio 1.8.1: 265 of 500 records, no error) and give up at the first damage.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from groundup.corpus.document import Reason, SetAside, excerpt_of
from groundup.corpus.reading.archive_stream import ARC_RECORD, WARC_RECORD, ArchiveStream, StreamFault
from groundup.corpus.reading.sources import InputFile

PLACE = "record"
HEAD_BYTES = 1 << 16
"""A record's header that is longer is damage."""

_SHOWN_BYTES = 4096
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
        block: its content, at most the reader's limit and one byte of it; only its beginning where its length is wrong.
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


def read_records(source: InputFile, limit_bytes: int) -> Iterator[RawRecord | SetAside]:
    """All records of an archive, whatever state it is in, and the bytes of it that belong to none that can be read.

    Args:
        source: the file.
        limit_bytes: of a longer content only so much and one byte is kept.
    """
    stream = ArchiveStream(source)
    number = 0
    begins: re.Pattern[bytes] | None = None
    arc_version = b"1"
    while not stream.at_end():
        if fault := stream.go_on():
            number += 1
            yield SetAside(
                source.label, PLACE, number, fault.reason, fault.detail, "", fault.size_bytes, stream.position
            )
            continue
        stream.skip_blanks()
        line = stream.line(HEAD_BYTES)
        if not line:
            continue  # a border or a fault comes first
        number += 1
        position = stream.position
        if begins is None:
            begins = next((kind for kind in (ARC_RECORD, WARC_RECORD) if kind.match(line)), None)
        stream.skip(len(line))
        head = _arc_head(line, arc_version) if begins is ARC_RECORD else _warc_head(line, stream)
        if isinstance(head, dict):
            record = _content(stream, head, position, number, limit_bytes, begins or WARC_RECORD)
            if begins is ARC_RECORD and record.kind == "warcinfo" and (version := record.block[:1]) in _ARC_FIELDS:
                arc_version = version
            yield record
            continue
        _skip_to_record(stream, begins or WARC_RECORD)
        n_lost = stream.position - position
        if fault := stream.go_on(is_within=True):
            reason, detail = fault.reason, f"{head}: {fault.detail}"
        else:
            follows = "the file's end" if stream.at_end() else "the next record"
            reason, detail = Reason.DAMAGED, f"{head}; {n_lost:,} bytes up to {follows} are lost"
        yield SetAside(source.label, PLACE, number, reason, detail, excerpt_of(line), n_lost, position)


def _warc_head(line: bytes, stream: ArchiveStream) -> dict[str, str] | str:
    """The header that begins with this line, names in lower case; or what is wrong with it."""
    if not WARC_RECORD.match(line):
        return "not the beginning of a record"
    fields: dict[str, str] = {}
    name = ""
    left = HEAD_BYTES
    while left > 0:
        line = stream.line(left)
        if (not line.endswith(b"\n") and len(line) < left) or WARC_RECORD.match(line):
            return "a record's header without an end"
        left -= stream.skip(len(line))
        if line in (b"\r\n", b"\n"):
            return _with_length(fields)
        text = line.decode("utf-8", "replace").strip()
        if line[:1] in b" \t" and name:
            fields[name] = f"{fields[name]} {text}"
        else:
            name, _, value = text.partition(":")
            name = name.strip().lower()
            fields.setdefault(name, value.strip())
    return f"a record's header beyond {HEAD_BYTES:,} bytes"


def _arc_head(line: bytes, version: bytes) -> dict[str, str] | str:
    """The header that this line of an ARC file is, as that of a WARC record; or what is wrong with it."""
    text = line.decode("utf-8", "replace").strip()
    parts = text.rsplit(" ", _ARC_FIELDS[version])
    if not ARC_RECORD.match(line) or len(parts) <= _ARC_FIELDS[version]:
        return "not the beginning of a record"
    fields = {"warc-target-uri": parts[0], "content-type": parts[3], "content-length": parts[-1]}
    fields["warc-type"] = "warcinfo" if parts[0].startswith("filedesc:") else "response"
    return _with_length(fields)


def _with_length(fields: dict[str, str]) -> dict[str, str] | str:
    length = fields.get("content-length", "")
    if length.isascii() and length.isdigit() and len(length) <= 18:
        return fields
    return f"a record whose length is {length!r}" if length else "a record without a length"


def _content(
    stream: ArchiveStream, fields: dict[str, str], position: int, number: int, limit_bytes: int,
    begins: re.Pattern[bytes],
) -> RawRecord:  # fmt: skip
    """The record whose content comes next, with what follows it as far as that shows whether its length is right."""
    size = int(fields["content-length"])
    n_kept = min(size, limit_bytes + 1)
    n_there = min(stream.fill(n_kept), n_kept)
    is_longer = n_there == n_kept < size
    block = b""
    if is_longer:
        block = bytes(stream.data[stream.at : stream.at + n_there])
        n_there = stream.skip(size)
    n_left = 0 if is_longer else n_there  # of the content, not passed yet
    follows = stream.line(HEAD_BYTES, n_left) if n_there == size else b""
    is_right = n_there == size and (not follows or follows in (b"\r\n", b"\n", b"\r") or begins.match(follows))
    if not is_longer:  # of a wrong one just enough to recognize it: it may claim all that follows, again and again
        block = bytes(stream.data[stream.at : stream.at + (n_there if is_right else min(n_there, _SHOWN_BYTES))])
    record = RawRecord(fields.get("warc-type", "").lower(), position, number, fields, block, size)
    if is_right:
        stream.skip(n_left)
        stream.skip_blanks()
        # The member's checksum comes after the content; the fault that it shows is this record's.
        fault = stream.go_on(is_within=True)
        return replace(record, fault=fault) if fault else record
    says = f"its length says {size:,} bytes"
    seen = stream.at + n_left + len(follows)
    swallowed = None if is_longer else _SWALLOWED.search(stream.data, stream.at, seen)
    if swallowed:
        n_before = swallowed.start(1) - stream.at
        stream.skip(n_before)
        return replace(
            record, fault=StreamFault(Reason.DAMAGED, f"{says}, but the next record begins after {n_before:,}")
        )  # fmt: skip
    stream.skip(n_left)
    if n_there < size:
        says = f"{says}, of which {n_there:,} are there"
        fault = stream.go_on()
        if fault is None and stream.at_end():
            return replace(record, fault=StreamFault(Reason.CUT_OFF, f"{says}: the file ends there"))
    else:
        n_more = stream.skip(len(follows)) + _skip_to_record(stream, begins)
        says = f"{says}, but {n_more:,} more follow that belong to no record"
        fault = stream.go_on(is_within=True)
    if fault:
        return replace(record, fault=replace(fault, detail=f"{says}: {fault.detail}"))
    return replace(record, fault=StreamFault(Reason.DAMAGED, says))


def _skip_to_record(stream: ArchiveStream, begins: re.Pattern[bytes]) -> int:
    """Pass over what is no record; returns how many bytes."""
    n_bytes = 0
    begins_line = True
    while line := stream.line(HEAD_BYTES):
        if begins_line and begins.match(line):
            break
        begins_line = line.endswith(b"\n")
        n_bytes += stream.skip(len(line))
    return n_bytes
