"""Formats beside plain text and JSON lines: Parquet, HTML and archives."""

import gzip
import json
import os
import random
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from groundup.corpus import Reason, Record, SetAside, read
from groundup.corpus.reading import read as read_module
from groundup.corpus.reading import tables
from groundup.corpus.reading.parquet_footer import page_sizes, read_row_groups
from groundup.corpus.reading.read import UnitReader, units_of
from groundup.corpus.reading.sources import find_sources
from groundup.recipe import CorpusSettings

GOOD = "It was a bright cold day, and the fox was walking through the forest."


def read_all(*inputs: object, split_bytes: int = 1 << 40, **changes: object) -> tuple[list[Record], list[SetAside]]:
    aside: list[SetAside] = []
    settings = CorpusSettings(**changes)
    units = units_of(find_sources([str(item) for item in inputs]), split_bytes)
    return [record for unit in units for record in UnitReader(unit, settings, aside.append)], aside


LINES = b"".join(json.dumps({"text": f"text {n}"}).encode() + b"\n" for n in range(100))


def only(aside: list[SetAside]) -> SetAside:
    (record,) = aside
    return record


# Parquet

TEXT_TYPES = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
ENCODINGS = [None, "PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"]  # None: a dictionary


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
@pytest.mark.parametrize("kind", TEXT_TYPES, ids=str)
def test_a_table_gives_a_record_a_row(tmp_path: Path, kind: pa.DataType, encoding: str | None) -> None:
    columns = {
        "body": pa.array(["one\r\n", "zwei ä", " three"]).cast(kind),
        "id": pa.array([7, None, 9]),
        "url": pa.array(["https://a.example", None, ""]),
        "where": pa.array(["books", "web", None]),
        "other": pa.array([[1], [2], [3]]),
    }
    encodings = dict.fromkeys(("body", "url"), encoding) if encoding else None
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", use_dictionary=not encoding, column_encoding=encodings)
    records, aside = read_all(tmp_path, text_field="body", source_field="where")
    assert aside == []
    assert records == [
        Record("one", 0, "row", 1, "books", "https://a.example", "7"),
        Record("zwei ä", 1, "row", 2, "web", "", ""),
        Record(" three", 2, "row", 3, "", "", "9"),
    ]


def test_the_address_may_stand_in_the_metadata(tmp_path: Path) -> None:
    rows = pa.table({"text": ["one", "two"], "metadata": [{"url": "https://a.example", "n": 1}, None]})
    pq.write_table(rows, tmp_path / "a.parquet")
    records, _ = read_all(tmp_path)
    assert [record.url for record in records] == ["https://a.example", ""]


@pytest.mark.parametrize(
    ("columns", "detail"),
    [
        ({"body": ["x"], "n": [1]}, "no column 'text', only 'body', 'n'"),
        ({"text": [1]}, "column 'text' is int64, not a string"),
        ({"text": [b"x"]}, "column 'text' is binary, not a string"),
        ({"text": [[1, 2]]}, "token ids, not text"),
        ({"text": [["a"]]}, "not a string"),
    ],
)
def test_a_table_without_a_column_of_text_is_set_aside_whole(
    tmp_path: Path, columns: dict[str, list[object]], detail: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    records, aside = read_all(tmp_path)
    assert records == []
    assert (only(aside).reason, only(aside).record) == (Reason.NO_TEXT, "")
    assert detail in only(aside).detail


def test_rows_without_a_text_are_set_aside_one_by_one(tmp_path: Path) -> None:
    texts = [GOOD, None, "", " \n ", "a\0b", "x" * 3000, GOOD]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=3)
    records, aside = read_all(tmp_path, max_document_mib=2000 / 2**20)
    assert [record.number for record in records] == [1, 7]
    assert [(record.reason, record.record, record.position) for record in aside] == [
        (Reason.NO_TEXT, "row 2", 1),
        (Reason.EMPTY, "row 3", 2),
        (Reason.EMPTY, "row 4", 3),
        (Reason.NUL, "row 5", 4),
        (Reason.TOO_LONG, "row 6", 5),
    ]
    assert aside[0].detail == "field 'text' is null, not a string"


def test_a_text_that_is_not_utf8_is_set_aside_alone(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"a\xffb", None, b"also good"])
    texts = pa.StringArray.from_buffers(4, raw.buffers()[1], raw.buffers()[2], raw.buffers()[0])
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    records, aside = read_all(tmp_path)
    assert [record.text for record in records] == ["good", "also good"]
    assert [(record.reason, record.record) for record in aside] == [
        (Reason.INVALID_UTF8, "row 2"),
        (Reason.NO_TEXT, "row 3"),
    ]
    assert "character 1 is no UTF-8 (byte 0xff)" in aside[0].detail


def test_empty_tables(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"")
    records, aside = read_all(tmp_path)
    assert records == []
    assert [(record.reason, record.detail) for record in aside] == [(Reason.EMPTY, "no row in the file")] * 2


def test_a_table_cut_anywhere_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"{n} {GOOD}" for n in range(500)]}), path)
    data = path.read_bytes()
    for cut in [4, 5, 100, len(data) // 2, len(data) - 8, len(data) - 1]:
        path.write_bytes(data[:cut])
        records, aside = read_all(path)
        assert records == []
        assert only(aside).reason in (Reason.CUT_OFF, Reason.DAMAGED), cut
    path.write_bytes(data[:2])
    assert only(read_all(path)[1]).reason is Reason.DAMAGED


def test_a_damaged_row_group_costs_its_own_rows_however_the_file_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [os.urandom(30).hex() for _ in range(400)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=100, compression="zstd", use_dictionary=False,
                   write_page_checksum=True)  # fmt: skip
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 0xFF
    path.write_bytes(data)
    for split_bytes in (1, 1 << 40):
        records, aside = read_all(path, split_bytes=split_bytes)
        assert [record.text for record in records] == texts[:100] + texts[200:]
        assert (only(aside).reason, only(aside).position) == (Reason.DAMAGED, 100)
        assert "100 rows from here on are lost" in only(aside).detail


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_any_damage_to_a_table_is_told(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"{n} {GOOD}" for n in range(40)]}), path, row_group_size=10,
                   compression=compression)  # fmt: skip
    data = path.read_bytes()
    generator = random.Random(compression)
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(generator.choice((1, 1, 30))):
            damaged[generator.randrange(len(data))] = generator.randrange(256)
        path.write_bytes(damaged)
        for split_bytes in (1, 1 << 40):
            records, aside = read_all(path, split_bytes=split_bytes)
            assert records or aside


def test_a_schema_that_its_columns_do_not_fit_is_damage_and_no_end_of_the_process(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [GOOD, GOOD]}), path)
    optional, required = b"\x25\x02\x18\x04text", b"\x25\x00\x18\x04text"
    assert path.read_bytes().count(optional) == 1
    path.write_bytes(path.read_bytes().replace(optional, required))
    assert only(read_all(path, split_bytes=1)[1]).reason is Reason.DAMAGED  # pyarrow's view of the column aborts


def test_a_footer_says_what_pyarrow_says(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = {"text": [GOOD] * 40, "metadata": [{"url": "https://a.example", "tags": ["a", "b"]}] * 40}
    pq.write_table(pa.table(rows), path, row_group_size=15, column_encoding={"text": "DELTA_BYTE_ARRAY"},
                   use_dictionary=["metadata.url"])  # fmt: skip
    with path.open("rb") as handle:
        groups = read_row_groups(handle)
    metadata = pq.ParquetFile(path).metadata
    assert [group.n_rows for group in groups] == [15, 15, 10]
    for place, group in enumerate(groups):
        with path.open("rb") as handle:
            pages = [list(page_sizes(handle, column)) for column in group.columns]
        assert all(
            sum(stored for stored, _ in sizes) < column.stored_bytes <= sum(stored + 400 for stored, _ in sizes)
            for column, sizes in zip(group.columns, pages, strict=True)
        )
        theirs = [metadata.row_group(place).column(at) for at in range(metadata.num_columns)]
        assert [
            (column.path, column.stored_bytes, column.grown_bytes, column.is_delta) for column in group.columns
        ] == [
            (column.path_in_schema, column.total_compressed_size, column.total_uncompressed_size,
             "DELTA_BYTE_ARRAY" in column.encodings)
            for column in theirs
        ]  # fmt: skip


@pytest.mark.parametrize("hidden", [False, True], ids=["alone", "among others"])
def test_a_page_that_would_fill_the_memory_is_refused_by_its_declared_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: bool
) -> None:
    monkeypatch.setattr(tables, "BOMB_BYTES", 16 << 20)
    noise = random.Random(0).randbytes(100_000).hex()
    texts = [GOOD, GOOD, "x" * (24 << 20), noise if hidden else GOOD, GOOD, GOOD]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=2, compression="zstd",
                   use_dictionary=False, write_batch_size=1, data_page_size=1)  # fmt: skip
    before = pa.default_memory_pool().max_memory()
    records, aside = read_all(tmp_path)
    assert [record.position for record in records] == [0, 1, 4, 5]
    assert (only(aside).reason, only(aside).position) == (Reason.DAMAGED, 2)
    assert "a decompression bomb" in only(aside).detail
    assert pa.default_memory_pool().max_memory() == before


def test_large_tables_are_streamed(tmp_path: Path) -> None:
    """Rows of 1 MB in one row group: held are some, not all."""
    path = tmp_path / "a.parquet"
    with pq.ParquetWriter(path, pa.schema([("text", pa.string())]), compression="zstd", write_batch_size=1) as writer:
        writer.write_table(pa.table({"text": [str(n) + " " + "text " * 200_000 for n in range(60)]}), row_group_size=60)
    pool = pa.default_memory_pool()
    held = pool.bytes_allocated()
    most = 0
    tracemalloc.start()
    (unit,) = units_of(find_sources([path]), 1 << 40)
    count = 0
    for _ in UnitReader(unit, CorpusSettings(), print):
        count += 1
        most = max(most, pool.bytes_allocated() - held)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 60
    assert most < 30 << 20
    assert peak < 16 << 20


# HTML and archives


ARTICLE = f"<p>{GOOD}</p>" * 5
PAGE = f"<html><head><title>Foxes</title></head><body><nav>Home</nav><article>{ARTICLE}</article></body></html>"


@pytest.mark.parametrize("extractor", ["trafilatura", "resiliparse"])
def test_pages_give_their_main_text(tmp_path: Path, extractor: str) -> None:
    (tmp_path / "a.html").write_text(PAGE)
    (tmp_path / "b.HTM.gz").write_bytes(gzip.compress(PAGE.encode()))
    (tmp_path / "c.html.zst").write_bytes(zstandard.compress(PAGE.encode("utf-16")))
    records, aside = read_all(tmp_path, extractor=extractor)
    assert aside == []
    assert len(records) == 3
    assert all(record.text.count(GOOD) >= 1 and "<p>" not in record.text for record in records)


def test_pages_that_cannot_be_used_are_set_aside(tmp_path: Path) -> None:
    (tmp_path / "blank.html").write_text(" \n")
    (tmp_path / "cut.html.gz").write_bytes(gzip.compress(PAGE.encode())[:-3])
    (tmp_path / "long.html").write_text(PAGE * 50)
    (tmp_path / "none.html").write_text("<html><body></body></html>")
    records, aside = read_all(tmp_path, max_document_mib=8000 / 2**20, extractor="resiliparse")
    assert records == []
    assert [(Path(record.source).name, record.reason) for record in aside] == [
        ("blank.html", Reason.EMPTY),
        ("cut.html.gz", Reason.CUT_OFF),
        ("long.html", Reason.TOO_LONG),
        ("none.html", Reason.NO_CONTENT),
    ]
    assert aside[2].size_bytes == len(PAGE) * 50


def test_one_extractor_serves_many_pages_and_is_closed_by_who_began_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended = [], []

    class Fake:
        def __init__(self, kind: str, timeout_seconds: float) -> None:
            begun.append((kind, timeout_seconds))

        def extract(self, html: bytes, url: str = "") -> str:
            return html.decode().upper()

        def __enter__(self) -> "Fake":
            return self

        def __exit__(self, *error: object) -> None:
            ended.append(True)

    monkeypatch.setattr(read_module, "Extractor", Fake)
    (tmp_path / "a.txt").write_text("plain")
    for number in range(3):
        (tmp_path / f"{number}.html").write_text(f"page {number}")
    assert [document.text for document in read(tmp_path)] == ["PAGE 0", "PAGE 1", "PAGE 2", "plain"]
    assert (begun, ended) == ([("trafilatura", 20.0)], [True])
    # A reader that is given up closes what it began; one that shares leaves it.
    (unit, *_) = units_of(find_sources([tmp_path]), 1)
    iterator = iter(UnitReader(unit, CorpusSettings(), print))
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    assert len(ended) == 2
    list(UnitReader(unit, CorpusSettings(), print, Fake("resiliparse", 1.0)))  # type: ignore[arg-type]
    assert len(ended) == 2


def test_archives_give_their_pages(shared_data: Path) -> None:
    aside: list[SetAside] = []
    path = shared_data / "warc" / "whirlwind_cc" / "whirlwind.warc.wet.gz"
    (unit,) = units_of(find_sources([path]), 1)
    reader = UnitReader(unit, CorpusSettings(), aside.append)
    records = list(reader)
    assert len(records) == reader.n_records == reader.kinds["conversion"] == 1
    assert records[0].url.startswith("https://")
    assert records[0].place == "record"
    pages, _ = read_all(shared_data / "warc" / "whirlwind_cc" / "whirlwind.warc", extractor="resiliparse")
    assert len(pages) == 1
    assert pages[0].url == records[0].url
    assert find_sources([shared_data / "warc" / "warcio" / "example.arc.gz"]).files[0].kind == "archive"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.html", "a.parquet", "a.warc"])
def test_an_error_in_the_middle_of_a_stream_names_the_file(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        def __init__(self, handle: object) -> None:
            self._handle = handle

        def __getattr__(self, attribute: str) -> object:
            return getattr(self._handle, attribute)

        def read(self, size: int = -1) -> bytes:
            raise OSError(5, "Input/output error")

        readline = read

        def __enter__(self) -> "Failing":
            return self

        def __exit__(self, *error: object) -> None:
            self._handle.close()  # type: ignore[attr-defined]

    (tmp_path / name).write_bytes(gzip.compress(LINES) if name.endswith(".gz") else LINES)
    (source,) = find_sources([tmp_path / name]).files
    open_before = type(source.entry).open
    monkeypatch.setattr(
        type(source.entry), "open", lambda path, mode="r", *more: Failing(open_before(path, mode, *more))
    )
    records, aside = read_all(tmp_path / name)
    assert records == []
    assert (only(aside).reason, only(aside).source) == (Reason.UNREADABLE, source.label)
    assert "Input/output error" in only(aside).detail
