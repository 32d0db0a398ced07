"""Faults through the whole corpus stage: whatever comes in is counted, listed with its place, and the counts add up.

What one reader makes of one fault is in `test_corpus_faults.py` (files, lines, packings, permissions),
`test_corpus_formats.py` (tables, pages) and `test_corpus_warc.py` (archives); full disks in `test_bad_input.py`.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import os
import random
import resource
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from data_stage import not_root, text_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lengths import examples

from groundup.corpus import annotate as annotate_module
from groundup.corpus import curate, read, stream_documents
from groundup.corpus import curate as curate_function
from groundup.corpus.reading.extract import Extractor
from groundup.corpus.reading.sources import find_sources
from groundup.errors import DataError, GroundupError
from groundup.files import file_digest
from groundup.recipe import CorpusSettings

pytestmark = pytest.mark.faults

GOOD = "It was a bright cold day, and the fox was walking through the forest."
MORE = "In the evening it came to a river, and the bridge was gone."
RESULT = ("documents.jsonl", "set_aside.jsonl", "filter_statistics.json")


def curated(out: Path, *inputs: Path, **changes: Any) -> dict[str, Any]:
    """The corpus stage, every language; its counts must add up."""
    options: dict[str, Any] = {
        "languages": (), "dedup": "exact", "extractor": "resiliparse", "validation_by": "document", **changes
    }  # fmt: skip
    summary = curate(CorpusSettings(inputs=tuple(map(str, inputs)), **options), out)
    check_counts(out, summary)
    return summary


def check_counts(out: Path, summary: dict[str, Any]) -> None:
    """In = kept + removed, at every step and for every source; what was left out is listed, each with its reason."""
    assert summary["documents_in"] == summary["documents_kept"] + sum(summary["removed"].values())
    statistics = json.loads((out / "filter_statistics.json").read_text(encoding="utf-8"))
    for step in statistics["steps"]:
        assert step["in"] == step["out"] + sum(step["removed"].values())
    assert statistics["steps"][0]["in"] == summary["documents_in"]
    assert statistics["steps"][-1]["out"] == summary["documents_kept"]
    listed = Counter(record["reason"] for record in left_out(out))
    assert listed == Counter(summary["removed"])
    assert not list(out.rglob("*.groundup-partial-*"))


def left_out(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "set_aside.jsonl").read_bytes().splitlines()]


def kept(out: Path) -> set[str]:
    return {document.text for document in stream_documents(out)}


def make(path: Path, content: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def good(folder: Path) -> Path:
    """Two documents with nothing wrong, as a file."""
    return make(folder / "zz.jsonl", b"".join(json.dumps({"text": text}).encode() + b"\n" for text in (GOOD, MORE)))


def digests(out: Path) -> list[str]:
    return [file_digest(out / name) for name in RESULT]


# --- Any bytes at all


@pytest.fixture(scope="module")
def one_extractor() -> Iterator[None]:
    """One process for the pages of all examples, where the stage would start one for each."""
    with Extractor("resiliparse", 20.0) as extractor, pytest.MonkeyPatch.context() as patch:
        shared = contextlib.nullcontext(extractor)
        patch.setattr(annotate_module, "Extractor", lambda kind, seconds: shared)
        yield


def warc(*pages: tuple[str, bytes]) -> bytes:
    """An archive of responses with these media types and bodies, one gzip member a record."""
    members = []
    for number, (media_type, body) in enumerate(pages):
        http = f"HTTP/1.1 200 OK\r\nContent-Type: {media_type}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        head = (
            f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:uuid:{number}>\r\n"
            f"WARC-Target-URI: https://example.org/{number}\r\nContent-Type: application/http; msgtype=response\r\n"
            f"Content-Length: {len(http)}\r\n\r\n"
        )
        members.append(gzip.compress(head.encode() + http + b"\r\n\r\n", mtime=0))
    return b"".join(members)


def table(texts: list[str], **options: Any) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), stream, **options)
    return stream.getvalue()


chance = random.Random(1)
TEXTS = [text_of(chance, 6) for _ in range(12)]
LINES = "".join(json.dumps({"id": str(number), "text": text}) + "\n" for number, text in enumerate(TEXTS)).encode()
PAGE = f"<html><body><article><p>{'</p><p>'.join(TEXTS[:3])}</p></article></body></html>".encode()
WHOLE: dict[str, bytes] = {
    "a.txt": TEXTS[0].encode(),
    "a.txt.gz": gzip.compress(TEXTS[0].encode()),
    "a.html": PAGE,
    "a.jsonl": LINES,
    "a.jsonl.gz": gzip.compress(LINES[:900], mtime=0) + gzip.compress(LINES[900:], mtime=0),
    "a.jsonl.zst": zstandard.ZstdCompressor(write_checksum=True).compress(LINES),
    "a.jsonl.bz2": bz2.compress(LINES),
    "a.parquet": table(TEXTS, row_group_size=4),
    "a.warc": gzip.decompress(warc(*(("text/plain", text.encode()) for text in TEXTS))),
    "a.warc.gz": warc(*(("text/plain", text.encode()) for text in TEXTS)),
    "a.arc": b"filedesc://a 0.0.0.0 20200101000000 text/plain 9\n1 0 test\n\n",
    "a.wet.gz": warc(("text/plain", b"x")),
}
"""A whole file of every kind."""


@settings(max_examples=examples(12), deadline=None)  # a dozen files each
@given(data=st.data())
def test_any_bytes_end_in_documents_or_reasons(
    one_extractor: None, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("any")
    for name, whole in WHOLE.items():
        make(folder / "in" / name, data.draw(st.one_of(broken(whole), st.binary(max_size=300)), name))
    good(folder / "in")
    limit = data.draw(st.sampled_from([16.0, 500 / 2**20]))
    split = data.draw(st.sampled_from([64.0, 200 / 2**20]))
    curated(folder / "out", folder / "in", max_document_mib=limit, split_mib=split, dedup="none")
    in_documents = {Path(document.source).name for document in stream_documents(folder / "out")}
    in_reasons = {Path(record["source"]).name for record in left_out(folder / "out")}
    assert in_documents | in_reasons == {*WHOLE, "zz.jsonl"}
    assert {GOOD, MORE} <= kept(folder / "out")
    shutil.rmtree(folder)


@st.composite
def broken(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file that was whole: cut, with bytes changed, added or taken away."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["cut", "flip", "insert", "delete", "double"]))
        if kind == "cut":
            del data[place:]
        elif kind == "flip" and place < len(data):
            data[place] ^= draw(st.integers(1, 255))
        elif kind == "insert":
            data[place:place] = draw(st.binary(min_size=1, max_size=20))
        elif kind == "delete":
            del data[place : place + draw(st.integers(1, 30))]
        else:
            data[place:place] = data[:place]
    return bytes(data)


# --- Records with something odd beside the text

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=8)
    | st.sampled_from(["\0", "\ud800", "x\udfff", "a\r\nb", "\u2028", "\ufeff", "x" * 5000]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip
RECORD = st.fixed_dictionaries(
    {"text": st.sampled_from(TEXTS)}, optional=dict.fromkeys(("id", "url", "source", "metadata"), ANY_JSON)
)


@settings(max_examples=examples(12), deadline=None)
@given(records=st.lists(RECORD, min_size=1, max_size=5))
@example(records=[{"text": TEXTS[0], "id": "\ud800", "url": "\0", "source": "s\udfff"}])
@example(records=[{"text": TEXTS[0], "metadata": {"url": ["\ud800"]}, "source": "", "id": 10**25}])
def test_whatever_stands_beside_the_text_costs_no_document(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]]
) -> None:
    folder = tmp_path_factory.mktemp("beside")
    lines = "".join(json.dumps(record) + "\n" for record in records)  # escapes lone surrogates
    (folder / "a.jsonl").write_text(lines)
    curated(folder / "out", folder / "a.jsonl", good(folder), source_field="source", dedup="none")
    texts = sorted(document.text for document in stream_documents(folder / "out"))
    assert texts == sorted([GOOD, MORE, *(record["text"] for record in records)])
    shutil.rmtree(folder)


def test_records_with_one_id_are_kept_and_listed_with_their_places(tmp_path: Path) -> None:
    ids = ["x", "y", "x", "z", "x", ""]
    rows = [json.dumps({"id": name, "text": text}) for name, text in zip(ids, TEXTS, strict=False)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    (tmp_path / "b.jsonl").write_text(json.dumps({"id": "y", "text": TEXTS[7]}))  # another file's y is another y
    pq.write_table(pa.table({"id": [7, 8, 7], "text": TEXTS[8:11]}), tmp_path / "c.parquet")
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.parquet")]
    # Cut in pieces, their records' numbers still count from the beginning of the file.
    assert curated(tmp_path / "out", *files, split_mib=300 / 2**20)["documents_kept"] == 10
    found = json.loads((tmp_path / "out" / "filter_statistics.json").read_text())["duplicate_keys"]
    assert found["count"] == 3
    assert {(Path(one["source"]).name, one["id"], tuple(one["records"])) for one in found["examples"]} == {
        ("a.jsonl", "x", ("line 1", "line 3", "line 5")),
        ("c.parquet", "7", ("row 1", "row 3")),
    }


def test_line_ends_marks_and_packings_change_no_id(one_extractor: None, tmp_path: Path) -> None:
    text = "First line.\nSecond – line.\n\nThird line, and the last."
    windows = text.replace("\n", "\r\n").encode()
    files = {
        "a.txt": text.encode(),
        "b.txt": b"\xef\xbb\xbf" + windows,
        "c.md.gz": gzip.compress(text.replace("\n", "\r").encode() + b"\r\r"),
        "d.jsonl": b"\xef\xbb\xbf" + json.dumps({"text": windows.decode()}).encode() + b"\r\n",
        "e.ndjson.bz2": bz2.compress(json.dumps({"text": "\ufeff" + text + " \n"}).encode()),
        "f.parquet": table([windows.decode()]),
        "g.warc.gz": warc(("text/plain", b"\xef\xbb\xbf" + windows)),
    }
    for name, content in files.items():
        make(tmp_path / "in" / name, content)
    summary = curated(tmp_path / "out", tmp_path / "in", validation_by="tail")
    assert summary["removed"] == {"duplicate": len(files) - 1}
    assert {document.text for document in read(tmp_path / "in")} == {text}


# --- Bombs


def test_a_table_that_says_a_long_text_a_thousand_times_is_read_in_bounded_memory(tmp_path: Path) -> None:
    """A dictionary of one text and a number a row: a gigabyte in 600 bytes, and no compression is needed for it."""
    text = "word " * 200_000
    rows = pa.DictionaryArray.from_arrays(pa.array([0, None] * 500, pa.int32()), pa.array([text]))
    pool = pa.default_memory_pool()
    for stored_as in (True, False):  # with Arrow's note that it was a dictionary, and as any other writer has it
        pq.write_table(pa.table({"text": rows, "url": rows}), tmp_path / "a.parquet", store_schema=stored_as)
        held, most, count = pool.bytes_allocated(), 0, 0
        for document in read(tmp_path / "a.parquet", on_set_aside=lambda record: None):
            count += document.text == text.rstrip()
            most = max(most, pool.bytes_allocated() - held)
        assert count == 500
        assert most < 20 << 20


# --- Files that are not what they were a moment ago

CHANGES: dict[str, Callable[[Path], object]] = {
    "grows": lambda path: path.write_bytes(path.read_bytes() + b'{"text": "One more line at the end."}\n'),
    "is cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "is replaced by another of its size": lambda path: os.replace(
        make(path.with_name("other"), LINES.replace(b"river", b"RIVER")), path
    ),
    "is removed": lambda path: path.unlink(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_that_changes_while_it_is_read_is_an_error_and_the_same_command_goes_on(
    tmp_path: Path, name: str
) -> None:
    good(tmp_path / "in")
    path = make(tmp_path / "in" / "a.jsonl", LINES)
    changed = []

    def keep(document: Any) -> bool:
        if not changed:
            changed.append(True)
            CHANGES[name](path)
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(annotate_module, "load_predicate", lambda name: keep)
        (tmp_path / "mine.py").write_text("def keep(document):\n    return True\n")
        options = {"predicate": f"{tmp_path / 'mine.py'}:keep", "split_mib": 0.001}
        with pytest.raises(DataError, match=r"a\.jsonl: it was changed or removed while it was being read") as caught:
            curated(tmp_path / "out", tmp_path / "in", **options)
        assert "same command again" in str(caught.value)
        assert not (tmp_path / "out" / "documents.jsonl").exists()
        curated(tmp_path / "out", tmp_path / "in", **options)
        curated(tmp_path / "fresh", tmp_path / "in", **options)
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")
    assert GOOD in kept(tmp_path / "out")


def test_a_file_that_vanishes_between_listing_and_reading_is_counted_and_read_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good(tmp_path / "in")
    path = make(tmp_path / "in" / "a.txt", TEXTS[0].encode())

    def listed(*inputs: Any, **more: Any) -> Any:
        found = find_sources(*inputs, **more)
        path.rename(tmp_path / "away")
        return found

    module = __import__(curate_function.__module__, fromlist=["curate"])
    with monkeypatch.context() as patch:
        patch.setattr(module, "find_sources", listed)
        summary = curated(tmp_path / "out", tmp_path / "in")
    assert summary["removed"] == {"unreadable": 1}
    assert left_out(tmp_path / "out")[0]["source"] == str(path)
    (tmp_path / "away").rename(path)
    assert curated(tmp_path / "out", tmp_path / "in")["removed"] == {}


def test_an_archive_without_any_page_is_counted(tmp_path: Path) -> None:
    """What a crawl leaves that was refused everything; alone it is an error that says what it holds."""
    info = b"WARC/1.0\r\nWARC-Type: warcinfo\r\nWARC-Record-ID: <urn:uuid:1>\r\nContent-Length: 0\r\n\r\n\r\n\r\n"
    path = make(tmp_path / "in" / "pages.warc.gz", gzip.compress(info))
    with pytest.raises(DataError, match=r"\(1 empty\)[\s\S]*no page in the file.*1 warcinfo"):
        curated(tmp_path / "out", path)
    good(tmp_path / "in")
    assert curated(tmp_path / "out", tmp_path / "in")["removed"] == {"empty": 1}


# --- Where the result cannot be written


@contextlib.contextmanager
def files_of_at_most(n_bytes: int) -> Iterator[None]:
    """The system refuses to write more than so much into one file, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def long_texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A corpus whose files are of very different sizes, so that each limit stops another step; and its digests."""
    folder = tmp_path_factory.mktemp("long")
    draw = random.Random(2)
    rows = [json.dumps({"text": text_of(draw, 30)}) + "\n" for _ in range(60)]
    make(folder / "in" / "a.jsonl", "".join([*rows, "{\n", *rows[:5]]).encode())
    curated(folder / "out", folder / "in", dedup="near")
    return folder / "in", digests(folder / "out")


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.long)])
def test_wherever_writing_fails_nothing_is_half_and_the_same_command_goes_on(
    long_texts: tuple[Path, list[str]], tmp_path: Path, workers: int
) -> None:
    inputs, wanted = long_texts
    out, failed = tmp_path / "out", dict[int, str]()
    for n_bytes in (0, 300, 3_000, 12_000, 40_000, 90_000, 1 << 30):
        try:
            with files_of_at_most(n_bytes):
                curated(out, inputs, dedup="near", workers=workers, split_mib=0.02)
        except GroundupError as error:
            failed[n_bytes] = error.message.removeprefix(str(out))
        assert not list(out.rglob("*.groundup-partial-*"))
        assert (n_bytes in failed) is not (out / "documents.jsonl").exists()
    assert all(message.endswith("File too large") for message in failed.values())
    assert len(set(failed.values())) >= 2  # other files, at other steps
    assert digests(out)[:2] == wanted[:2]


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    source = make(tmp_path / "a.txt", GOOD.encode())
    other = make(tmp_path / "other", b"")
    for out in (other, other / "below"):
        with pytest.raises(GroundupError, match=r"other.*: (is a file|Not a directory)"):
            curated(out, source)
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o555)
        text = make(Path(name) / "a.txt", GOOD.encode()) if os.geteuid() == 0 else source
        with not_root(), pytest.raises(GroundupError, match=r"out: cannot be written \(Permission denied\)") as caught:
            curated(Path(name) / "out", text)
        assert caught.value.fix
        os.chmod(name, 0o755)


def test_a_corpus_below_its_own_texts_does_not_read_itself_nor_another(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    for number, text in enumerate([*TEXTS, TEXTS[3]]):
        make(folder / f"{number}.txt", text.encode())
    first = curated(folder / "out", folder)
    assert first["removed"] == {"duplicate": 1}
    before = digests(folder / "out")[:2]
    assert curated(folder / "out", folder) == first
    assert digests(folder / "out")[:2] == before
    # Else what the first removed would come back from its measurements.
    assert curated(folder / "second", folder) == first
    assert curated(tmp_path / "third", folder / "**" / "*") == first
    assert digests(folder / "second")[:2] == before
    with pytest.raises(DataError, match="the corpus is to be written where its input is"):
        curated(folder, folder)
    # By name it can be read, of course.
    assert curated(tmp_path / "again", folder / "out" / "documents.jsonl")["documents_kept"] == len(TEXTS)


def test_two_processes_cannot_write_one_corpus(tmp_path: Path) -> None:
    source = make(tmp_path / "a.txt", GOOD.encode())
    (tmp_path / "mine.py").write_text(
        "from groundup.corpus import curate\nfrom groundup.errors import RunError\n"
        "from groundup.recipe import CorpusSettings\nfrom pathlib import Path\n"
        f"def keep(document):\n"
        f"    try:\n        curate(CorpusSettings(inputs={str(source)!r}), Path({str(tmp_path / 'out')!r}))\n"
        "    except RunError:\n        return True\n    return False\n"
    )
    summary = curated(tmp_path / "out", source, good(tmp_path), predicate=f"{tmp_path / 'mine.py'}:keep")
    assert summary["documents_kept"] == 3 - summary["removed"].get("duplicate", 0)
