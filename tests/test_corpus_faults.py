"""Broken input: each fault is a clear error, or a set-aside that is counted and listed; the rest is used."""

import bz2
import codecs
import gzip
import io
import itertools
import json
import lzma
import os
import random
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from data_stage import not_root

from groundup.corpus import Reason, SetAside, curate, read, stream_documents
from groundup.corpus.reading import compressed
from groundup.errors import DataError
from groundup.recipe import CorpusSettings

GOOD = "It was a bright cold day, and the fox was walking through the forest."


def read_all(path: Path, **changes: object) -> tuple[list[str], list[SetAside]]:
    aside: list[SetAside] = []
    found = read(path, settings=CorpusSettings(**changes), on_set_aside=aside.append)
    return [document.text for document in found], aside


def only(aside: list[SetAside]) -> SetAside:
    (record,) = aside
    return record


RECORDS = b"".join(b'{"text": "%d %s"}\n' % (n, os.urandom(40).hex().encode()) for n in range(1000))
PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
"""Packers whose output carries a checksum."""

BROKEN_FILES = {
    "empty.txt": (b"", Reason.EMPTY, "no text"),
    "empty.jsonl": (b"", Reason.EMPTY, "no record"),
    "blank.jsonl": (b"\n \n\r\n", Reason.EMPTY, "no record"),
    "zero.txt.gz": (b"", Reason.EMPTY, "no text"),
    "zero.jsonl.gz": (b"", Reason.EMPTY, "no record"),
    "blanks.txt": (b" \n\t\r\n ", Reason.EMPTY, ""),
    "mark.txt": (b"\xef\xbb\xbf", Reason.EMPTY, "no text"),
    "zero.md.zst": (b"", Reason.EMPTY, "no text"),
    "zero.md.bz2": (b"", Reason.EMPTY, "no text"),
    "zero.html": (b"", Reason.EMPTY, "no text"),
    "not.txt.gz": (GOOD.encode(), Reason.DAMAGED, "not a gzip file"),
    "not.jsonl.gz": (b'{"text": "x"}', Reason.DAMAGED, "not a gzip file"),
    "not.txt.zst": (GOOD.encode(), Reason.DAMAGED, "not a Zstandard file"),
    "not.txt.bz2": (GOOD.encode(), Reason.DAMAGED, "not a bzip2 file"),
    "cut.txt.gz": (gzip.compress(GOOD.encode() * 9)[:-12], Reason.CUT_OFF, "cut off before its end: its "),
    "head.txt.gz": (gzip.compress(GOOD.encode())[:5], Reason.CUT_OFF, "its 5 bytes hold 0 bytes of text"),
    "one.txt.gz": (b"\x1f", Reason.CUT_OFF, "its 1 bytes"),
    "cut.txt.zst": (zstandard.compress(GOOD.encode() * 9)[:-1], Reason.CUT_OFF, "cut off"),
    "head.txt.zst": (zstandard.compress(GOOD.encode())[:6], Reason.CUT_OFF, "its 6 bytes"),
    "cut.txt.bz2": (bz2.compress(GOOD.encode() * 9)[:-1], Reason.CUT_OFF, "cut off"),
    "sum.txt.gz": (gzip.compress(GOOD.encode())[:-8] + b"\0" * 8, Reason.DAMAGED, "incorrect data check"),
    "length.txt.gz": (gzip.compress(GOOD.encode())[:-4] + b"\0" * 4, Reason.DAMAGED, "incorrect length check"),
    "cut.txt.xz": (lzma.compress(GOOD.encode() * 9)[:-1], Reason.CUT_OFF, "cut off"),
    "behind.txt.xz": (lzma.compress(GOOD.encode()) + b"x", Reason.DAMAGED, "something else follows"),
    "sum.txt.zst": (PACK[".zst"](GOOD.encode())[:-4] + b"\0" * 4, Reason.DAMAGED, "checksum"),
    "behind.txt.gz": (
        gzip.compress(GOOD.encode()) + b"garbage",
        Reason.DAMAGED,
        "something else follows the gzip data",
    ),
    "behind.txt.zst": (zstandard.compress(GOOD.encode()) + b"x", Reason.DAMAGED, "something else follows"),
    "behind.txt.bz2": (bz2.compress(GOOD.encode()) + b"PK\3\4", Reason.DAMAGED, "something else follows"),
    "utf16.jsonl": ('{"text": "x"}\n'.encode("utf-16"), Reason.INVALID_UTF8, "UTF-16"),
    "utf16be.jsonl": (codecs.BOM_UTF16_BE + '{"text": "x"}\n'.encode("utf-16-be") * 9, Reason.INVALID_UTF8, "UTF-16"),
    "not.parquet": (b"PK\3\4 something", Reason.DAMAGED, "not a Parquet file"),
    "zero.parquet": (b"", Reason.EMPTY, "no row"),
    "zero.json": (b" \n", Reason.EMPTY, "no record"),
    "none.json": (b"[ ]", Reason.EMPTY, "no record"),
    "open.json": (b'[{"text": ', Reason.CUT_OFF, "the list has no end"),
    "deep.json": (b"[" * 100_000, Reason.INVALID_JSON, "recursion"),
    "huge.json": (b"[" + b"9" * 5000 + b"]", Reason.INVALID_JSON, "4300 digits"),
    "two.json": (b"[] []", Reason.INVALID_JSON, "something else follows the list"),
    "not.json": (b"hello", Reason.INVALID_JSON, "character"),
    "utf16.json": ("[1]".encode("utf-16"), Reason.INVALID_UTF8, "UTF-16"),
    "zero.csv": (b"", Reason.EMPTY, "no row"),
    "head.csv": (b"id,text\n", Reason.EMPTY, "no row"),
    "other.csv": (b"id,body\n1,x\n", Reason.NO_TEXT, "no column 'text', only 'id', 'body'"),
    "twice.csv": (b"text,text\n1,x\n", Reason.NO_TEXT, "two columns"),
    "utf16.csv": ("id,text\n1,x\n".encode("utf-16"), Reason.INVALID_UTF8, "UTF-16"),
    "quote.csv": (b'id,text\n1,"open\n' + b"x\n" * 9, Reason.INVALID_CSV, "unexpected end of data"),
    "latin1.csv": (b"id,text\n1,M\xe4rchen\n", Reason.INVALID_UTF8, "character 1 is no UTF-8 (byte 0xe4)"),
    "latin1.txt": ("Ein Märchen".encode("latin-1"), Reason.INVALID_UTF8, "byte 5"),
    "marked.txt": (b"\xef\xbb\xbfab\xff", Reason.INVALID_UTF8, "byte 5"),
    "half.txt": ("Märchen".encode()[:2], Reason.INVALID_UTF8, "byte 1"),
    "utf16.txt": (GOOD.encode("utf-16"), Reason.INVALID_UTF8, "UTF-16"),
    **{
        f"{width}{order}{mark}.{kind}": (
            (("\ufeff" if mark else "") + text).encode(f"utf-{width}-{order}"),
            Reason.INVALID_UTF8,
            f"is UTF-{width}:",
        )
        for kind, text in (("txt", GOOD), ("jsonl", '{"text": "x"}\n'), ("json", "[1]"), ("csv", "id,text\n1,x\n"))
        for width, order, mark in itertools.product((16, 32), ("le", "be"), ("", "-marked"))
    },
    "manual.txt": (b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n", Reason.BINARY, "a PDF: save its text"),
    "letter.md": (b"{\\rtf1\\ansi Hello}", Reason.BINARY, "rich text"),
    "book.log": (b"PK\3\4\x14\0", Reason.BINARY, "a zip archive, as .docx"),
    "data.jsonl": (gzip.compress(b'{"text": "x"}'), Reason.BINARY, "gzip: give it the ending .gz"),
    "data.json": (zstandard.compress(b"[1]"), Reason.BINARY, "Zstandard: give it the ending .zst"),
    "table.csv": (b"PAR1\x15\4", Reason.BINARY, "a Parquet table: give it the ending .parquet"),
    "base.text": (b"SQLite format 3\0", Reason.BINARY, "an SQLite database: export"),
    "packed.txt.gz": (gzip.compress(b"\x7fELF\2"), Reason.BINARY, "a program"),
    "manual.html": (b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n", Reason.BINARY, "a PDF: save its text"),
    "page.htm.gz": (gzip.compress(gzip.compress(b"<p>x")), Reason.BINARY, "gzip: give it the ending .gz"),
    "garbled.md": (("R\ufffd" * 40 + GOOD).encode(), Reason.GARBLED, "40 of "),
    "nul.md": (b"some\0thing", Reason.NUL, "at character 4"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_broken_file_is_set_aside_and_the_next_is_read(tmp_path: Path, name: str) -> None:
    data, reason, detail = BROKEN_FILES[name]
    (tmp_path / name).write_bytes(data)
    (tmp_path / "zz.txt").write_text(GOOD)
    texts, aside = read_all(tmp_path)
    assert texts == [GOOD]
    record = only(aside)
    assert (record.source, record.reason) == ((tmp_path / name).as_posix(), reason)
    assert detail in record.detail


BROKEN_LINES = {
    "cut in half": (b'{"text": "half a li', Reason.INVALID_JSON, "character"),
    "no json": (b"hello", Reason.INVALID_JSON, "character"),
    "too deep": (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", Reason.INVALID_JSON, ""),
    "twice": (b'{"text": "one", "text": "two"}', Reason.INVALID_JSON, 'the field "text" stands in it twice'),
    "deep and named again": (
        b'{"text": "x", "y": {"text": 1}, "z": ' + b"[" * 1000 + b"]" * 1000 + b"}",
        Reason.INVALID_JSON,
        "",
    ),
    "huge number": (b'{"text": "x", "n": NaN, "m": ' + b"9" * 5000 + b"}", Reason.INVALID_JSON, ""),
    "list": (b'["text"]', Reason.NO_TEXT, "the record is a list"),
    "null": (b"null", Reason.NO_TEXT, "the record is null"),
    "no field": (b'{"body": "x", "n": 1}', Reason.NO_TEXT, "only 'body', 'n'"),
    "no fields": (b"{}", Reason.NO_TEXT, "empty object"),
    "null text": (b'{"text": null}', Reason.NO_TEXT, "null"),
    "number": (b'{"text": 3}', Reason.NO_TEXT, "a number"),
    "list of texts": (b'{"text": ["a"]}', Reason.NO_TEXT, "a list"),
    "empty text": (b'{"text": ""}', Reason.EMPTY, "no text"),
    "blank text": (b'{"text": " \\n\\t "}', Reason.EMPTY, ""),
    "invalid byte": (b'{"text": "a\xffb"}', Reason.INVALID_UTF8, "byte 11"),
    "half a pair": (b'{"text": "ab\\ud800"}', Reason.INVALID_UTF8, "character 2 is half a surrogate pair (\\ud800)"),
    "NUL": (b'{"text": "ab\\u0000c"}', Reason.NUL, "at character 2"),
    "undecoded": (b'{"text": "R' + b"\\ufffd" * 4 + b'e"}', Reason.GARBLED, "4 of 6 characters are U+FFFD"),
    "controls": ('{"text": "R\x80\x93\x99\x9ce"}'.encode(), Reason.GARBLED, "4 of 6"),
    "iso-2022": (b'{"text": "It is \\u001b$B%s"}' % (b"El5~" * 2000), Reason.GARBLED, "U+FFFD or control"),
    "escapes": (b'{"text": "' + b"\\u001b[0m" * 4 + b'"}', Reason.GARBLED, "4 of 16"),
}


@pytest.mark.parametrize("name", BROKEN_LINES)
def test_broken_line_is_set_aside_and_its_neighbours_are_read(tmp_path: Path, name: str) -> None:
    line, reason, detail = BROKEN_LINES[name]
    good = json.dumps({"text": GOOD}).encode()
    (tmp_path / "a.jsonl").write_bytes(good + b"\n" + line + b"\n" + good)
    texts, aside = read_all(tmp_path)
    assert texts == [GOOD, GOOD]
    record = only(aside)
    assert (record.record, record.reason) == ("line 2", reason)
    assert detail in record.detail
    record.excerpt.encode()  # can be written as UTF-8


@pytest.mark.parametrize(
    "line", [b'{"text": "ok", "x": NaN}', b'{"text": "ok", "x": "\\ud800"}', b'{"x": {"text": 1}, "text": "ok"}']
)
def test_oddities_beside_the_text_do_no_harm(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(line)
    assert read_all(tmp_path) == (["ok"], [])


def test_broken_rows_and_elements_leave_their_neighbours(tmp_path: Path) -> None:
    long = "y" * 3000
    (tmp_path / "a.csv").write_text(f'text,n\none,1\n"tw" o,2\nthree,{long}\n"{long}\n{long}",4\nfive,5\n')
    texts, aside = read_all(tmp_path / "a.csv", max_document_mib=2000 / 2**20)
    assert texts == ["one", "five"]
    assert [one.reason for one in aside if one.record != "row 5"][:2] == [Reason.INVALID_CSV, Reason.TOO_LONG]
    (tmp_path / "a.json").write_text(json.dumps([{"text": "one"}, {"text": long}, 3, {"text": 4}, {"text": "five"}]))
    twice = '[{"text": "six", "text": "seven"},'
    (tmp_path / "a.json").write_text((tmp_path / "a.json").read_text().replace("[", twice, 1))
    texts, aside = read_all(tmp_path / "a.json", max_document_mib=2000 / 2**20)
    assert texts == ["one", "five"]
    assert [(one.record, one.reason) for one in aside] == [
        ("record 1", Reason.INVALID_JSON), ("record 3", Reason.TOO_LONG), ("record 4", Reason.NO_TEXT),
        ("record 5", Reason.NO_TEXT),
    ]  # fmt: skip


@pytest.mark.parametrize("packing", PACK)
def test_wherever_a_packed_file_is_cut_it_is_noticed_and_the_lines_before_are_used(
    tmp_path: Path, packing: str
) -> None:
    wanted = [json.loads(line)["text"] for line in RECORDS.splitlines()]
    # Two members, the second one of several blocks: cut within each, in their heads and ends, and between them.
    packed = PACK[packing](RECORDS[: RECORDS.index(b"\n") + 1])
    border = len(packed)
    packed += PACK[packing](RECORDS[RECORDS.index(b"\n") + 1 :])
    path = tmp_path / f"a.jsonl{packing}"
    for cut in [1, 3, 9, border - 1, border + 1, border + 8, len(packed) // 2, len(packed) - 5, len(packed) - 1]:
        path.write_bytes(packed[:cut])
        texts, aside = read_all(path)
        assert texts == wanted[: len(texts)]
        record = only(aside)
        assert record.reason is Reason.CUT_OFF, cut
        assert f"its {cut:,} bytes hold" in record.detail
        if texts:
            assert f"the {len(texts):,} lines before it are read" in record.detail
            assert record.record == f"line {len(texts) + 1}"
            assert record.position == sum(len(line) for line in RECORDS.splitlines(keepends=True)[: len(texts)])
        assert cut <= border or texts
        path.with_name(f"b.txt{packing}").write_bytes(packed[:cut])
        texts, aside = read_all(path.with_name(f"b.txt{packing}"))
        assert (texts, only(aside).reason) == ([], Reason.CUT_OFF)
    path.write_bytes(packed[:border])
    assert read_all(path) == (wanted[:1], [])
    path.write_bytes(packed)
    assert read_all(path) == (wanted, [])


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100, 5000])
@pytest.mark.parametrize("packing", PACK)
def test_packed_files_read_the_same_in_blocks_of_any_size(
    tmp_path: Path, packing: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressed, "CHUNK_BYTES", chunk)
    data = RECORDS[:3000]
    packed = PACK[packing](data[:100]) + PACK[packing](b"") + PACK[packing](data[100:])
    path = tmp_path / f"a.txt{packing}"
    path.write_bytes(packed)
    assert read_all(path) == ([data.decode().rstrip()], [])
    path.write_bytes(packed[:-1])
    assert only(read_all(path)[1]).reason is Reason.CUT_OFF
    path.write_bytes(packed + b"x")
    assert only(read_all(path)[1]).reason is Reason.DAMAGED


@pytest.mark.parametrize("packing", PACK)
def test_any_flipped_bit_of_a_packed_file_is_noticed(tmp_path: Path, packing: str) -> None:
    packed = PACK[packing](RECORDS[:20_000])
    path = tmp_path / f"a.txt{packing}"
    generator = random.Random(packing)
    unnoticed = 0
    for _ in range(60):
        place = generator.randrange(len(packed))
        damaged = bytearray(packed)
        damaged[place] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        texts, aside = read_all(path)
        if texts:  # flags that do not touch the text: gzip's time, system and name
            assert texts == [RECORDS[:20_000].decode().rstrip()]
            unnoticed += 1
        else:
            assert only(aside).reason in (Reason.DAMAGED, Reason.CUT_OFF)
    assert unnoticed < 6


def test_zeros_behind_a_gzip_are_padding(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one ") + b"\0" * 700_000 + gzip.compress(b"two") + b"\0" * 9)
    assert read_all(tmp_path) == (["one two"], [])


def test_frames_to_skip_and_frames_without_size_are_read(tmp_path: Path) -> None:
    skipped = b"\x53\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"
    stream = io.BytesIO()
    with zstandard.ZstdCompressor(level=19).stream_writer(stream, closefd=False) as writer:
        writer.write(RECORDS * 20)
    path = tmp_path / "a.txt.zst"
    path.write_bytes(skipped + stream.getvalue() + skipped)
    assert read_all(path) == ([(RECORDS * 20).decode().rstrip()], [])
    path.write_bytes(stream.getvalue() + skipped[:-1])
    assert only(read_all(path)[1]).reason is Reason.CUT_OFF


@pytest.mark.parametrize("packing", PACK)
def test_a_bomb_is_set_aside_in_bounded_memory(tmp_path: Path, packing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "BOMB_BYTES", 32 << 20)
    monkeypatch.setattr(compressed, "BOMB_RATIO", 500)
    packed = PACK[packing](b" " * (40 << 20))
    for name in ("a.txt", "a.jsonl", "a.html"):
        (tmp_path / f"{name}{packing}").write_bytes(packed)
    tracemalloc.start()
    texts, aside = read_all(tmp_path, max_document_mib=1.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts == []
    assert {record.reason for record in aside} == {Reason.DAMAGED}
    assert len(aside) == 3
    assert "bomb" in aside[0].detail
    assert peak < (48 if packing == ".xz" else 12) << 20  # xz has a dictionary of 8 MiB


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_a_long_file_with_one_bad_byte_is_not_used_in_part(tmp_path: Path, name: str) -> None:
    good = (GOOD + "\n\n").encode() * 50_000
    data = good + b"\xff" + good
    (tmp_path / name).write_bytes(PACK.get(Path(name).suffix, bytes)(data))
    texts, aside = read_all(tmp_path, max_document_mib=1.0)
    assert texts == []
    assert only(aside).reason is Reason.INVALID_UTF8
    assert f"byte {len(good)} " in only(aside).detail


def test_a_zstandard_block_that_cannot_be_is_damage(tmp_path: Path) -> None:
    packed = bytearray(zstandard.compress(GOOD.encode()))
    header = zstandard.frame_header_size(bytes(packed))
    for field in (0b111, 1 | (1 << 20 << 3)):
        packed[header : header + 3] = field.to_bytes(3, "little")
        (tmp_path / "a.txt.zst").write_bytes(packed)
        assert only(read_all(tmp_path)[1]).reason is Reason.DAMAGED


def test_a_multibyte_character_on_a_block_border_is_no_fault(tmp_path: Path) -> None:
    for shift in range(3):
        (tmp_path / "a.txt").write_bytes(b"x" * (2**20 - 1 - shift) + "\n€uro\n".encode() + b"y\n" * 600_000)
        texts, aside = read_all(tmp_path, max_document_mib=1.5)
        assert aside == []
        assert "€uro" in "".join(texts)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.gz"])
def test_a_line_of_50_mb_is_set_aside_in_bounded_memory(tmp_path: Path, name: str) -> None:
    good = json.dumps({"text": GOOD}).encode() + b"\n"
    with (gzip.open if name.endswith(".gz") else open)(tmp_path / name, "wb") as handle:  # type: ignore[operator]
        handle.write(good + b'{"text": "')
        for _ in range(50):
            handle.write(b"long line " * 100_000)
        handle.write(b'"}\n' + good)
    tracemalloc.start()
    texts, aside = read_all(tmp_path, max_document_mib=1.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(texts) == 2
    assert (only(aside).reason, only(aside).size_bytes) == (Reason.TOO_LONG, 50_000_013)
    assert peak < 8 * 2**20


def test_a_paragraph_right_at_the_limit_is_kept_and_one_byte_more_is_not(tmp_path: Path) -> None:
    limit = 1000
    lines = [b"a" * limit, b"b" * (limit + 1), b"c" * 10]
    (tmp_path / "a.txt").write_bytes(b"\n".join(lines))
    texts, aside = read_all(tmp_path, max_document_mib=limit / 2**20)
    assert texts == ["a" * limit, "c" * 10]
    assert only(aside).size_bytes == limit + 2


MISSING = {
    "nothing": ("no such file or folder", "missing.txt"),
    "pattern": ("nothing matches", "*.nothing"),
    "empty folder": ("there is none", "folder"),
    "folder of pictures": ("passed over: .*cat.png", "pictures"),
    "pattern of pictures": ("passed over: .*cat.png", "pictures/*"),
    "kind": ("packed again", "pictures/a.parquet.gz"),
    "name": ("File name too long", "x" * 5000),
    "pipe": ("neither a file nor a folder", "pipe.txt"),
}


@pytest.mark.parametrize("name", MISSING)
def test_input_without_text_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "cat.png").write_bytes(b"\x89PNG")
    (tmp_path / "pictures" / "a.parquet.gz").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.txt")
    message, path = MISSING[name]
    with pytest.raises(DataError, match=message) as caught:
        curate(CorpusSettings(inputs=("groundup:classics", str(tmp_path / path))), tmp_path / "out")
    assert str(tmp_path / path) in caught.value.message
    assert caught.value.fix
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("pattern", ["", "*", "**/*"])
def test_pipes_and_links_that_lead_out_of_a_folder_are_set_aside_and_not_opened(tmp_path: Path, pattern: str) -> None:
    folder = tmp_path / "in"
    for name in ("in/deep", "out"):
        (tmp_path / name).mkdir(parents=True)
    os.mkfifo(folder / "pipe.txt")
    (folder / "device.txt").symlink_to("/dev/zero")
    (folder / "good.txt").write_text(GOOD)
    (folder / "picture.png").symlink_to("/etc/hostname")
    (folder / "deep" / "inside.txt").symlink_to(folder / "good.txt")
    (tmp_path / "secret").write_text("a secret")
    (tmp_path / "out" / "more.txt").write_text("more")
    (folder / "passwd.txt").symlink_to(tmp_path / "secret")
    (folder / "more").symlink_to(tmp_path / "out")
    (folder / "deep" / "loop").symlink_to(tmp_path)
    texts, aside = read_all(folder / pattern)
    assert texts == [GOOD]
    links = {"device.txt", "passwd.txt", "more", "loop"}
    assert {Path(one.source).name for one in aside if one.reason == Reason.LINK} == links
    assert [one.detail for one in aside if one.reason == Reason.UNREADABLE] == ["not an ordinary file"]
    texts, aside = read_all(folder / pattern, follow_links=True)
    assert sorted(texts) == sorted([GOOD, "a secret", "more"])
    assert {Path(one.source).name for one in aside} == {"pipe.txt", "device.txt"}


def test_a_link_to_nowhere_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "lost.txt").symlink_to(tmp_path / "gone")
    (tmp_path / "a.txt").write_text(GOOD)
    texts, aside = read_all(tmp_path)
    assert texts == [GOOD]
    assert (only(aside).reason, only(aside).detail) == (Reason.UNREADABLE, "No such file or directory")


def test_files_and_folders_without_permission_are_set_aside() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "good.txt").write_text(GOOD)
        (folder / "secret.txt").write_text(GOOD)
        (folder / "secret.txt").chmod(0)
        (folder / "closed").mkdir()
        (folder / "closed" / "x.txt").write_text(GOOD)
        (folder / "closed").chmod(0)
        try:
            with not_root():
                texts, aside = read_all(folder)
                with pytest.raises(DataError, match=r"closed: no file here .*cannot be listed \(Permission denied"):
                    read(folder / "closed")
        finally:
            (folder / "closed").chmod(0o755)
    assert texts == [GOOD]
    assert [(Path(record.source).name, record.reason, record.detail) for record in aside] == [
        ("closed", Reason.UNREADABLE, "the folder cannot be listed (Permission denied)"),
        ("secret.txt", Reason.UNREADABLE, "Permission denied"),
    ]


NOTHING_LEFT = {
    "language": (
        [{"text": "Es war einmal ein König, der hatte drei Söhne und ein großes Schloss im Wald."}],
        {},
        r"nothing is left of 1 documents \(1 language\).*languages = \[\"de\"\]",
    ),
    "short": ([{"text": "short"}] * 3, {"min_characters": 100}, r"\(3 short\).*min_characters"),
    "field": ([{"body": GOOD}] * 2, {}, r"\(2 no text field\).*text_field.*only 'body'"),
    "mixed": ([{"text": ""}, {"text": ""}, {"x": 1}], {}, r"\(1 no text field, 2 empty\)"),
    "floor": ([{"text": GOOD}], {"language_floor": 1.0}, r"\(1 language\)"),
}


@pytest.mark.parametrize("name", NOTHING_LEFT)
def test_when_nothing_is_left_the_error_says_what_removed_it(tmp_path: Path, name: str) -> None:
    records, changes, message = NOTHING_LEFT[name]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(DataError, match=f"(?s){message}"):
        curate(CorpusSettings(inputs=(str(path),), **changes), tmp_path / "out")
    assert not (tmp_path / "out" / "documents.jsonl").exists()


@pytest.mark.parametrize("name", ["empty.txt", "zero.txt.gz", "latin1.txt", "cut.txt.gz"])
def test_a_broken_file_alone_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    data, reason, _ = BROKEN_FILES[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=rf"\(1 {reason}\)") as caught:
        curate(CorpusSettings(inputs=(str(tmp_path / name),)), tmp_path / "out")
    assert str(tmp_path / name) in str(caught.value)


def test_every_fault_at_once_is_counted_and_listed(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, (data, _, _) in BROKEN_FILES.items():
        (folder / name).write_bytes(data)
    lines = [line for line, _, _ in BROKEN_LINES.values()]
    good = [json.dumps({"text": f"{GOOD} {n}"}).encode() for n in range(30)]
    (folder / "lines.jsonl").write_bytes(b"\n".join(lines + good))
    summary = curate(CorpusSettings(inputs=(str(folder),), dedup="exact"), tmp_path / "out")
    assert summary["documents_kept"] == 30
    assert summary["documents_in"] == 30 + sum(summary["removed"].values())
    listed = [json.loads(line) for line in (tmp_path / "out" / "set_aside.jsonl").read_text().splitlines()]
    assert len(listed) == len(BROKEN_FILES) + len(BROKEN_LINES)
    assert {record["reason"] for record in listed} == set(summary["removed"])
    assert len(list(stream_documents(tmp_path / "out"))) == 30
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".groundup-folder",
        "annotated",
        "documents.jsonl",
        "filter_statistics.json",
        "set_aside.jsonl",
    ]
