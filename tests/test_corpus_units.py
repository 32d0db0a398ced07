"""Units: however the input is cut, the same records and the same faults, and every piece can travel to a worker."""

import io
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundup.corpus import engine
from groundup.corpus.document import Reason, Record, SetAside
from groundup.corpus.reading.read import Unit, UnitReader, units_of
from groundup.corpus.reading.sources import InputFile, find_sources
from groundup.errors import GroundupError
from groundup.recipe import CorpusSettings

Read = tuple[list[Record], list[SetAside]]


def read_units(units: Sequence[Unit], settings: CorpusSettings | None = None) -> Read:
    """All records and faults, numbered from the beginning of their file."""
    records: list[Record] = []
    aside: list[SetAside] = []
    before: dict[str, int] = {}
    for unit in units:
        heard: list[SetAside] = []
        reader = UnitReader(unit, settings or CorpusSettings(), heard.append)
        first = before.get(unit.source.label, 0)
        records += [record._replace(number=record.number + first) for record in reader]
        aside += [replace(record, number=record.number + first) if record.place else record for record in heard]
        before[unit.source.label] = first + reader.n_records
    return records, aside


def cut(path: Path, split_bytes: int) -> list[Unit]:
    return units_of(find_sources([path]), split_bytes)


LINES = st.one_of(
    st.sampled_from(
        [
            b"", b" ", b"\r", b"\xef\xbb\xbf", b"{", b"[]", b'{"text": ""}', b'{"text": null}', b'{"text": "a\\ud800"}',
            b'{"text": "\\u0000"}', b'{"text": "long ' + b"x" * 90 + b'"}', b'{"text": "\xff"}', b"\xff\xfe",
            b"\xfe\xff", b'{"text": "ok", "x": NaN}',
        ]
    ),
    st.text(max_size=20).map(lambda text: json.dumps({"text": text, "id": len(text)}, ensure_ascii=False).encode()),
    st.binary(max_size=12),
)  # fmt: skip


@given(
    lines=st.lists(LINES, max_size=12),
    ends=st.sampled_from([b"\n", b"\r\n", b"\n\n"]),
    tail=st.sampled_from([b"", b"\n", b'{"text": "half']),
    split_bytes=st.integers(1, 120),
    mib=st.sampled_from([16.0, 60 / 2**20]),
)
def test_any_jsonl_read_in_any_pieces_is_the_same_as_read_whole(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], ends: bytes, tail: bytes, split_bytes: int, mib: float
) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    path.write_bytes(ends.join(lines) + tail)
    settings = CorpusSettings(max_document_mib=mib)
    whole = read_units(cut(path, 1 << 40), settings)
    pieces = cut(path, split_bytes)
    assert len(pieces) == max(1, -(-path.stat().st_size // split_bytes))
    assert read_units(pieces, settings) == whole
    assert len({record.position for record in whole[0]}) == len(whole[0])
    for record in whole[0]:
        # The line begins where the position says, and is the number'th.
        before = path.read_bytes()[: record.position]
        assert not before or before.endswith(b"\n")
        assert before.count(b"\n") + 1 == record.number


def test_a_line_belongs_to_the_unit_of_its_first_byte(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"text {n}"}).encode() + b"\n" for n in range(10)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(lines))
    size = len(lines[0])
    for split_bytes, wanted in [(size, [1] * 10), (size * 2, [2] * 5), (size + 1, [2] + [1] * 8 + [0])]:
        units = cut(path, split_bytes)
        assert [len(list(UnitReader(unit, CorpusSettings(), print))) for unit in units] == wanted[: len(units)]
    (source,) = find_sources([path]).files
    (record,) = UnitReader(Unit(source, size, size + 1), CorpusSettings(), print)
    assert record == Record("text 1", size, "line", 1)
    assert list(UnitReader(Unit(source, size + 1, 2 * size), CorpusSettings(), print)) == []


def test_pieces_within_a_long_line_do_not_read_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "' + b"x" * 4_000_000 + b'"}\n{"text": "end"}\n')
    counted = [0]

    class Counting(io.FileIO):
        def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
            n_bytes = super().readinto(buffer) or 0
            counted[0] += n_bytes
            return n_bytes

    monkeypatch.setattr(InputFile, "open_stored", lambda source: io.BufferedReader(Counting(path), 8192))
    (source,) = find_sources([path]).files
    units = [Unit(source, start, start + 100_000) for start in range(100_000, 4_000_000, 100_000)]
    for unit in units:
        assert list(UnitReader(unit, CorpusSettings(), print)) == []
    assert counted[0] < 2 * 4_000_000 + len(units) * 3 * 8192


def test_borders_stay_when_a_file_grows_and_only_the_last_piece_is_open(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 100)
    before = cut(path, 300)
    path.write_bytes(b'{"text": "a"}\n' * 200)
    after = cut(path, 300)
    assert after[: len(before) - 1] == before[:-1]
    assert [unit.stop is None for unit in after] == [False] * (len(after) - 1) + [True]
    assert [unit.start for unit in after] == [0] + [unit.stop for unit in after[:-1]]


def table(path: Path, n_rows: int, row_group_size: int) -> None:
    rows = pa.table({"text": [f"text {n} " + "x" * (n % 50) for n in range(n_rows)], "id": list(range(n_rows))})
    pq.write_table(rows, path, row_group_size=row_group_size)


@pytest.mark.parametrize("split_bytes", [1, 300, 1000, 5000, 1 << 30])
def test_tables_are_cut_at_row_groups(tmp_path: Path, split_bytes: int) -> None:
    path = tmp_path / "a.parquet"
    table(path, 1000, 64)
    units = cut(path, split_bytes)
    n_groups = pq.ParquetFile(path).num_row_groups
    assert len(units) == {1: n_groups, 1 << 30: 1}.get(split_bytes, len(units))
    records, aside = read_units(units)
    assert aside == []
    assert [(record.key, record.position, record.number) for record in records] == [
        (str(n), n, n + 1) for n in range(1000)
    ]
    assert {record.place for record in records} == {"row"}


def test_what_is_wrong_with_a_whole_table_is_said_once_however_it_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table(path, 1000, 64)
    for split_bytes in (1, 1000, 1 << 30):
        records, aside = read_units(cut(path, split_bytes), CorpusSettings(text_field="body"))
        assert records == []
        assert [record.reason for record in aside] == [Reason.NO_TEXT]


def test_packed_files_texts_and_archives_are_one_piece(tmp_path: Path) -> None:
    for name in ["a.txt", "a.md", "a.html", "a.warc", "a.warc.gz", "a.wet", "a.jsonl.gz", "a.jsonl.zst", "a.jsonl"]:
        (tmp_path / name).write_bytes(b"x\n" * 500)
    units = units_of(find_sources([tmp_path]), 100)
    assert {unit.source.kind for unit in units if unit.start} == {"lines"}
    assert len(units) == 8 + 10


def test_files_that_cannot_be_read_are_one_piece_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "lost.jsonl").symlink_to(tmp_path / "gone")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" + b"x" * 5000)
    records, aside = read_units(units_of(find_sources([tmp_path]), 10))
    assert records == []
    assert [record.reason for record in aside] == [Reason.CUT_OFF, Reason.UNREADABLE]


@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
@pytest.mark.parametrize(
    ("error", "why"),
    [
        (Exception("The current node timed out during startup.\nA trace"), "node timed out during startup."),
        (ConnectionError("Ray is trying to start at an address"), "Ray is trying"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_a_ray_that_does_not_start_is_an_error_with_a_way_out(
    monkeypatch: pytest.MonkeyPatch, error: Exception, why: str, address: str | None
) -> None:
    def init(**options: object) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=init))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(GroundupError, match=r"could not (start Ray|join .*10\.0\.0\.1:6379)") as caught:
        engine.engine_for("ray", 1, 0)
    assert why in str(caught.value)
    assert "A trace" not in str(caught.value)
    assert "engine = 'local'" in str(caught.value.fix)
