"""The one reader of records: JSON lines, JSON, Parquet, CSV and TSV, packed or not, as values of Python.

The corpus makes documents of them (`record_of`), fine-tuning conversations, decontamination strings to look for. What
cannot be read is set aside with its reason, and the reading goes on.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

from groundup.corpus.document import OnSetAside, Reason, Record, SetAside, excerpt_of
from groundup.corpus.reading.intake import make_record
from groundup.corpus.reading.jsonl import Value, label_of, read_json, read_lines
from groundup.corpus.reading.refusal import RefusedError
from groundup.corpus.reading.separated import read_rows
from groundup.corpus.reading.sources import InputFile
from groundup.recipe import CorpusSettings


def read_values(
    source: InputFile, settings: CorpusSettings, set_aside: OnSetAside, start: int = 0, stop: int | None = None
) -> Generator[Value, None, int]:
    """The records of a file; returns how many lines (blank ones too), rows or elements there are.

    Args:
        source: of any kind but pages and archives; a text is read as lines of JSON.
        settings: the size limit, and `text_field`: the field that each record must have, once; "" for none. Without
            it, rows of CSV come as lists of cells, the first line too, and rows of a table with all their columns.
        set_aside: called with everything left out.
        start, stop: first byte (lines) or row group (tables), and the one after the last.
    """
    if source.kind in ("lines", "text"):
        return (yield from read_lines(source, start, stop, settings, set_aside))
    if source.kind == "json":
        return (yield from read_json(source, settings, set_aside))
    if source.kind == "separated":
        read = _read_named if settings.text_field else read_rows
        return (yield from read(source, settings, set_aside))
    if source.kind == "table":
        from groundup.corpus.reading.tables import read_table  # loads pyarrow

        return (yield from read_table(source, start, stop, settings, set_aside))
    set_aside(SetAside(source.label, "", 0, Reason.NO_TEXT, "a page or an archive, which holds no records"))
    return 0


def record_of(source: InputFile, value: Value, settings: CorpusSettings, set_aside: OnSetAside) -> tuple[Record, ...]:
    """The document in a record, or none (then it was set aside)."""
    try:
        text = text_of(value, settings.text_field)
    except RefusedError as refused:
        set_aside(value.aside(source, refused))
        return ()
    fields = value.data if isinstance(value.data, dict) else {}
    url = fields.get("url")
    if url is None and type(metadata := fields.get("metadata")) is dict:
        url = metadata.get("url")
    named = fields.get(settings.source_field) if settings.source_field else None
    name, address, key = label_of(named), label_of(url), label_of(fields.get("id"))
    if not value.is_strict:
        name, address, key = (label.encode(errors="replace").decode() for label in (name, address, key))
    return make_record(source, text, settings, set_aside, value.position, value.place, value.number, name, address, key)


def text_of(value: Value, field: str) -> str:
    """The text in a field of a record, or that the record is. Raises `RefusedError`: there is none."""
    text = value.data
    if isinstance(text, dict):
        if field not in text:
            listed = ", ".join(repr(excerpt_of(name)) for name in list(text)[:8]) or "an empty object"
            raise RefusedError(Reason.NO_TEXT, f"no field {field!r}, only {listed}")
        text = text[field]
        if not isinstance(text, str):
            raise RefusedError(Reason.NO_TEXT, f"field {field!r} is {_json_type(text)}, not a string")
    elif not isinstance(text, str):
        raise RefusedError(Reason.NO_TEXT, f"the record is {_json_type(text)}, not an object or a string")
    if not value.is_strict:
        check_writable(text)
    return text


def check_writable(text: str) -> None:
    """Raises `RefusedError` if a text has half a surrogate pair, or (of CSV) bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        what = f"is half a surrogate pair (\\u{code:04x})"
        if 0xDC80 <= code <= 0xDCFF:
            what = f"is no UTF-8 (byte 0x{code - 0xDC00:02x})"
        raise RefusedError(Reason.INVALID_UTF8, f"character {error.start} {what}") from error


def _read_named(source: InputFile, settings: CorpusSettings, set_aside: OnSetAside) -> Generator[Value, None, int]:
    """The rows of a file behind its first one as objects, with the names that it gives."""
    field, n_aside = settings.text_field, 0

    def count(record: SetAside) -> None:
        nonlocal n_aside
        n_aside += 1
        set_aside(record)

    rows = read_rows(source, settings, count)
    header = next(rows, None)
    if header is None:
        return 0
    names = header.data
    if names.count(field) != 1:
        listed = ", ".join(repr(excerpt_of(name.encode(errors="replace"))) for name in names[:8])
        detail = f"no column {field!r}, only {listed}" if field not in names else f"two columns are named {field!r}"
        set_aside(SetAside(source.label, "", 0, Reason.NO_TEXT, detail, size_bytes=source.size_bytes()))
        rows.close()
        return 0
    n_rows = 0
    for row in rows:
        n_rows = row.number - 1
        yield row._replace(data=dict(zip(names, row.data, strict=False)), number=n_rows)
    if not n_rows and not n_aside:
        set_aside(SetAside(source.label, "", 0, Reason.EMPTY, "no row in the file"))
    return n_rows


def strings_of(value: Any) -> Iterator[str]:
    """Every string in a value, however deep in lists and fields; without recursion, so that no depth is too much."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            waiting += reversed(list(item.values()))
        elif isinstance(item, list | tuple):
            waiting += reversed(item)


def _json_type(value: object) -> str:
    if isinstance(value, bool):
        return "true or false"
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return names.get(type(value), "null")
