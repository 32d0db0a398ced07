"""What a Parquet file says of its row groups before they are read: rows, and of each column its encodings and sizes.

pyarrow's own view of it ends the process where a column's description is damaged (26.0: an exception of C++ that nobody
catches), so it is decoded here. Formats: Thrift's compact protocol; `FileMetaData` and `PageHeader` of parquet.thrift.
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any, NamedTuple

_DELTA_ENCODINGS = {5, 6, 7}  # DELTA_BINARY_PACKED, DELTA_LENGTH_BYTE_ARRAY, DELTA_BYTE_ARRAY
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 11, 12
_MOST_DEPTH = 16
_HEADER_BYTES = 1 << 16  # of a page: most often a hundred


class ColumnChunk(NamedTuple):
    """A column of a row group.

    Attributes:
        path: its name, with those of the fields within it, such as "metadata.url".
        start: where its first page begins in the file.
        is_delta: whether some of it is stored as differences.
        stored_bytes, grown_bytes: its size as stored and when decompressed.
    """

    path: str
    start: int
    is_delta: bool
    stored_bytes: int
    grown_bytes: int


class RowGroup(NamedTuple):
    """A row group: how many rows, and its columns."""

    n_rows: int
    columns: list[ColumnChunk]


def read_row_groups(handle: IO[bytes]) -> list[RowGroup]:
    """The row groups of a Parquet file. Raises LookupError, TypeError, ValueError: its footer is damaged."""
    end = max(0, handle.seek(0, 2) - 8)
    handle.seek(end)
    n_bytes = min(int.from_bytes(handle.read(4), "little"), end)
    handle.seek(end - n_bytes)
    file = _Reader(handle.read(n_bytes)).struct()
    handle.seek(0)
    return [RowGroup(max(0, group[3]), [_chunk(column[3]) for column in group[1]]) for group in file[4]]


def page_sizes(handle: IO[bytes], column: ColumnChunk) -> Iterator[tuple[int, int]]:
    """Bytes of each page of a column as stored and decompressed, as far as its header says so."""
    at = column.start
    while at < column.start + column.stored_bytes:
        handle.seek(at)
        reader = _Reader(handle.read(_HEADER_BYTES))
        try:
            header = reader.struct()
            stored, grown = int(header[3]), int(header[2])
        except (LookupError, TypeError, ValueError):
            return  # a fault of the page, or a writer that counted otherwise: reading it will show
        yield stored, grown
        at += reader.at + max(0, stored)


def _chunk(meta: dict[int, Any]) -> ColumnChunk:
    path = b".".join(meta[3]).decode("utf-8", "replace")
    start = min(meta[9], meta.get(11) or meta[9])  # a dictionary comes first
    return ColumnChunk(path, start, not _DELTA_ENCODINGS.isdisjoint(meta[2]), meta[7], meta[6])


class _Reader:
    """Values of Thrift's compact protocol, one after the other."""

    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """A struct as its values by field number."""
        if depth > _MOST_DEPTH:
            raise ValueError("nested too deeply")
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            kind = head & 15
            fields[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (_TRUE, _FALSE, _BYTE):
            return self._byte()
        if kind < _DOUBLE:
            return self._integer()
        if kind in (_DOUBLE, _BINARY):
            n_bytes = 8 if kind == _DOUBLE else self._unsigned()
            self.at += n_bytes
            return self._data[self.at - n_bytes : self.at]
        if kind in (_LIST, _SET):
            head = self._byte()
            count = self._unsigned() if head >> 4 == 15 else head >> 4
            return [self._value(head & 15, depth) for _ in range(count)]
        if kind == _MAP:
            count = self._unsigned()
            kinds = self._byte() if count else 0
            return [(self._value(kinds >> 4, depth), self._value(kinds & 15, depth)) for _ in range(count)]
        if kind == _STRUCT:
            return self.struct(depth + 1)
        raise ValueError(f"no kind of value: {kind}")

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def _unsigned(self) -> int:
        value = 0
        for shift in range(0, 64, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("an integer beyond 64 bits")

    def _integer(self) -> int:
        value = self._unsigned()
        return value >> 1 ^ -(value & 1)
