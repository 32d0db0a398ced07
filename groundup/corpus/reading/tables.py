"""Parquet tables to values: a row a record, streamed batch by batch; whole files or ranges of their row groups.

Only the columns that are asked for are read; held are a few MiB of rows, and a page of each column (the writer's
choice, most often 1 MiB). A row group that is damaged is set aside from the damaged place on,
and the next one is read. https://parquet.apache.org/docs/file-format/
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Generator, Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from groundup.corpus.document import OnSetAside, Reason, excerpt_of
from groundup.corpus.reading.compressed import BOMB_RATIO
from groundup.corpus.reading.intake import unread
from groundup.corpus.reading.jsonl import Value
from groundup.corpus.reading.parquet_footer import RowGroup, page_sizes, read_row_groups
from groundup.corpus.reading.refusal import READ_ERRORS, RefusedError
from groundup.corpus.reading.remote import RemoteReadError
from groundup.corpus.reading.sources import InputFile
from groundup.recipe import CorpusSettings

PLACE = "row"
BATCH_BYTES = 4 << 20
BATCH_ROWS = 1024
WHOLE_ROWS = 64
"""Of tables that are read with all their columns."""
DISTINCT_BYTES = 16 << 20
"""Row groups up to this size, as stored, are read by their distinct texts."""
DISTINCT_BATCHES = 16
"""In at most so many batches: each brings all texts that came before along."""
BOMB_BYTES = 128 << 20
"""A row group is not read if a column, or a page of one, declares more than this, and more than `BOMB_RATIO` times its
stored bytes: a page is held whole."""
DISTINCT_ROWS = 1 << 22
_MAGIC = b"PAR1"
_SHOWN = 8
_READING: dict[str, Any] = {"pre_buffer": False, "buffer_size": 1 << 20, "page_checksum_verification": True}


def read_table(
    source: InputFile, start: int, stop: int | None, settings: CorpusSettings, set_aside: OnSetAside
) -> Generator[Value, None, int]:
    """The rows of row groups `start` to `stop` (without it, to the last): the columns that make a record of the
    corpus, or all of them where no `text_field` is asked for. Returns how many rows these are."""
    n_rows = 0
    try:
        with source.open() as handle:
            file, groups = _open(handle)
            refusal = _refusal(file.schema_arrow, settings.text_field)
            if refusal is None and not any(group.n_rows for group in groups):
                refusal = RefusedError(Reason.EMPTY, "no row in the file")
            if refusal is not None:
                if not start:  # once a file, however it is cut
                    set_aside(unread(source, refusal))
                return 0
            columns = _columns(file.schema_arrow, settings)
            before = sum(group.n_rows for group in groups[:start])
            for place in range(start, len(groups) if stop is None else min(stop, len(groups))):
                n_read, n_in_group = 0, groups[place].n_rows
                rows = _rows(handle, file, groups[place], place, columns)
                try:
                    for row, is_strict in rows:
                        position, n_read = before + n_rows + n_read, n_read + 1
                        yield Value(row, position, PLACE, n_rows + n_read, is_strict=is_strict)
                except Exception as error:  # on damage pyarrow raises much more than its own errors
                    so_far = f"{n_in_group - n_read:,} rows from here on are lost"
                    at = before + n_rows + n_read
                    set_aside(unread(source, _fault(error), at, PLACE, n_rows + n_read, so_far))
                n_rows += n_in_group
    except READ_ERRORS as error:
        set_aside(unread(source, error))
    return n_rows


def row_group_borders(source: InputFile, split_bytes: int) -> list[int]:
    """The row groups at which pieces of about `split_bytes` (as stored) begin; [0] if the table cannot be read."""
    borders, size = [0], 0
    with contextlib.suppress(Exception), source.open() as handle:  # told when the table is read
        for place, group in enumerate(_open(handle)[1]):
            n_bytes = sum(column.stored_bytes for column in group.columns)
            if size and size + n_bytes > split_bytes:
                borders.append(place)
                size = 0
            size += n_bytes
        return borders
    return [0]


def _open(handle: IO[bytes]) -> tuple[pq.ParquetFile, list[RowGroup]]:
    """The table and its row groups. Raises `RefusedError`: it is cut off, damaged, empty or no table."""
    begins, size = handle.read(4), handle.seek(0, 2)
    if not size:
        raise RefusedError(Reason.EMPTY, "no row in the file")
    handle.seek(max(0, size - 4))
    ends = handle.read(4)
    handle.seek(0)
    if begins != _MAGIC:
        raise RefusedError(Reason.DAMAGED, "not a Parquet file")
    if ends != _MAGIC:
        raise RefusedError(Reason.CUT_OFF, f"cut off before its end: no table of contents in {size:,} bytes")
    try:
        groups = read_row_groups(handle)
        file = pq.ParquetFile(handle, **_READING)
        _ = file.schema_arrow.names
    except Exception as error:  # on damage pyarrow raises much more than its own errors
        raise _fault(error) from error
    return file, groups


def _refusal(schema: pa.Schema, field: str) -> RefusedError | None:
    """Why no row of such a table has a text, if so."""
    names = schema.names
    if field and field not in names:
        listed = ", ".join(map(repr, names[:_SHOWN])) + (", …" if len(names) > _SHOWN else "")
        return RefusedError(Reason.NO_TEXT, f"no column {field!r}, only {listed or 'none at all'}")
    if names.count(field) > 1:
        return RefusedError(Reason.NO_TEXT, f"{names.count(field)} columns are named {field!r}")
    if not field or _is_string(kind := schema.field(field).type):
        return None
    is_list = isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType)
    is_ids = is_list and pa.types.is_integer(kind.value_type)
    what = "token ids, not text" if is_ids else "not a string"
    return RefusedError(Reason.NO_TEXT, f"column {field!r} is {kind}, {what}")


def _is_string(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _columns(schema: pa.Schema, settings: CorpusSettings) -> list[str]:
    """The columns of a record; of all others it is asked what they take only where nothing else is asked for."""
    if not settings.text_field:
        return []
    columns = {settings.text_field}
    for name in ("id", "url", settings.source_field):
        if schema.names.count(name) == 1:
            kind = schema.field(name).type
            if _is_string(kind) or pa.types.is_integer(kind):
                columns.add(name)
    if "url" not in columns and schema.names.count("metadata") == 1:
        kind = schema.field("metadata").type
        if pa.types.is_struct(kind) and kind.get_field_index("url") >= 0 and _is_string(kind.field("url").type):
            columns.add("metadata.url")
    return sorted(columns)


def _rows(
    handle: IO[bytes], file: pq.ParquetFile, group: RowGroup, place: int, columns: list[str]
) -> Iterator[tuple[dict[str, Any], bool]]:
    """The rows of one row group, all columns or those asked for, each with whether its strings are UTF-8.

    A table may store a text once and then say in a byte that a row has it too, so that a few bytes stand for
    gigabytes. Row groups that are small as stored are therefore read by their distinct texts, whose sum is no larger;
    or, where their encoding shares beginnings instead (DELTA_BYTE_ARRAY; no text of it is longer than all of it is
    as stored), in small batches.

    Raises:
        RefusedError: a column is a decompression bomb.
    """
    read = [
        column for column in group.columns
        if not columns or column.path in columns or column.path.split(".")[0] in columns
    ]  # fmt: skip
    for column in read:
        sizes = [(column.stored_bytes, column.grown_bytes)]
        if isinstance(handle, io.BufferedReader):  # on the net each page would be a question of its own
            sizes += page_sizes(handle, column)
        for stored, grown in sizes:
            if grown > BOMB_BYTES and grown > BOMB_RATIO * stored:
                says = f"{stored:,} bytes of column {column.path!r} grow to {grown:,}"
                raise RefusedError(Reason.DAMAGED, f"a decompression bomb: {says}")
    n_bytes = sum(column.grown_bytes for column in group.columns)
    n_rows = max(1, min(BATCH_ROWS if columns else WHOLE_ROWS, BATCH_BYTES * group.n_rows // max(1, n_bytes)))
    if n_bytes <= DISTINCT_BYTES and any(column.is_delta for column in read):
        # Arrow can read it into no dictionary, also where the schema it wrote itself beside the table says so.
        file = pq.ParquetFile(handle, metadata=_without_arrow_schema(file.metadata), **_READING)
        n_rows = max(1, min(n_rows, 4 * DISTINCT_BYTES // max(1, n_bytes)))
    elif n_bytes <= DISTINCT_BYTES and columns:
        schema = file.schema_arrow
        texts = [name for name in columns if name in schema.names and _is_string(schema.field(name).type)]
        file = pq.ParquetFile(handle, metadata=file.metadata, read_dictionary=texts, **_READING)
        n_rows = max(n_rows, min(group.n_rows // DISTINCT_BATCHES, DISTINCT_ROWS))
    for batch in file.iter_batches(n_rows, row_groups=[place], columns=columns or None, use_threads=False):
        names, is_strict = batch.schema.names, True
        try:
            values = [_values(column, is_strict) for column in batch.columns]
        except UnicodeDecodeError:
            is_strict = False
            values = [_values(column, is_strict) for column in batch.columns]
        for row in zip(*values, strict=True):
            yield dict(zip(names, row, strict=True)), is_strict


def _without_arrow_schema(metadata: pq.FileMetaData) -> pq.FileMetaData:
    written = io.BytesIO()
    metadata.write_metadata_file(written)
    return pq.read_metadata(io.BytesIO(written.getvalue().replace(b"ARROW:schema", b"OTHER:schema")))


def _values(column: pa.Array, is_strict: bool) -> list[Any]:
    """What a column holds; if not strict, bytes that are not UTF-8 stand for themselves, as in a row of CSV."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        distinct = _values(column.dictionary, is_strict)
        return [None if place is None else distinct[place] for place in column.indices.to_pylist()]
    if not is_strict and pa.types.is_struct(kind):
        children = [_values(column.field(at), is_strict) for at in range(kind.num_fields)]
        return [dict(zip([field.name for field in kind], row, strict=True)) for row in zip(*children, strict=True)]
    if is_strict or not _is_string(kind):
        return column.to_pylist()
    written = column.cast(pa.large_binary()).to_pylist()
    return [None if value is None else value.decode(errors="surrogateescape") for value in written]


def _fault(error: Exception) -> Exception:
    """What happened: the file could not be read (that error), or what was read is no table.

    Arrow raises OSError for both; the system's has a number, and the net's is a class of its own.
    """
    if isinstance(error, RefusedError | RemoteReadError) or getattr(error, "errno", None) is not None:
        return error
    what = excerpt_of(str(error)) or "no reason given"
    return RefusedError(Reason.DAMAGED, what if isinstance(error, OSError | pa.ArrowException) else
                              f"{type(error).__name__}: {what}")  # fmt: skip
