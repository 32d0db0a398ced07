"""Files on the net: stores and web servers, read like local files, whatever they do in between."""

import contextlib
import gzip
import http.server
import json
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from groundup.corpus import Reason, Record, SetAside, input_fingerprint, read
from groundup.corpus.reading.read import Unit, UnitReader, units_of
from groundup.corpus.reading.remote import RemoteFile
from groundup.corpus.reading.sources import find_sources
from groundup.errors import DataError
from groundup.recipe import CorpusSettings

GOOD = "It was a bright cold day, and the fox was walking through the forest."


def read_all(*inputs: object, split_bytes: int = 1 << 40, **changes: object) -> tuple[list[Record], list[SetAside]]:
    aside: list[SetAside] = []
    settings = CorpusSettings(**changes)
    units = units_of(find_sources([str(item) for item in inputs]), split_bytes)
    return [record for unit in units for record in UnitReader(unit, settings, aside.append)], aside


def only(aside: list[SetAside]) -> SetAside:
    (record,) = aside
    return record


@pytest.fixture
def memory() -> Iterator[Callable[[str, bytes], str]]:
    filesystem = fsspec.filesystem("memory")

    def put(name: str, data: bytes) -> str:
        with filesystem.open(f"/groundup/{name}", "wb") as handle:
            handle.write(data)
        return f"memory://groundup/{name}"

    yield put
    filesystem.rm("/groundup", recursive=True)


LINES = b"".join(json.dumps({"text": f"text {n}"}).encode() + b"\n" for n in range(100))


def test_a_store_is_read_like_a_folder(memory: Callable[[str, bytes], str]) -> None:
    memory("b/a.txt", b"one")
    memory("b/c/d.jsonl.gz", gzip.compress(b'{"text": "two"}'))
    memory("b/.hidden/e.txt", b"no")
    memory("b/picture.png", b"no")
    memory("b/runs/mine/corpus/stage.json", b"{}")
    memory("b/runs/mine/corpus/units/documents.jsonl", b'{"text": "no"}')
    for item, wanted in [
        ("memory://groundup/b", ["one", "two"]),
        ("memory://groundup/b/", ["one", "two"]),
        ("memory://groundup/b/*.txt", ["one"]),
        ("memory://groundup/b/**", ["one", "two"]),
        ("memory://groundup/b/c*", ["two"]),
        ("memory://groundup/b/**/*.gz", ["two"]),
        ("memory://groundup/b/a.txt", ["one"]),
    ]:
        records, aside = read_all(item)
        assert ([record.text for record in records], aside) == (wanted, []), item
    sources = find_sources(["memory://groundup/b", "memory://groundup/b/a.txt", "memory://groundup/b/*.txt"])
    assert [source.label for source in sources.files] == [
        "memory:///groundup/b/a.txt",
        "memory:///groundup/b/c/d.jsonl.gz",
    ]
    assert sources.size_bytes() == sum(source.size_bytes() for source in sources.files) > 3


def test_files_of_a_store_are_cut_like_local_ones(memory: Callable[[str, bytes], str], tmp_path: Path) -> None:
    url = memory("a.jsonl", LINES)
    assert len(units_of(find_sources([url]), 100)) == -(-len(LINES) // 100)
    records, aside = read_all(url, split_bytes=100)
    assert [record.text for record in records] == [f"text {n}" for n in range(100)]
    assert aside == []
    pq.write_table(pa.table({"text": [GOOD] * 50}), tmp_path / "a.parquet", row_group_size=10)
    url = memory("a.parquet", (tmp_path / "a.parquet").read_bytes())
    records, aside = read_all(url, split_bytes=1)
    assert ([record.position for record in records], aside) == (list(range(50)), [])


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_store_that_gives_less_than_it_said_is_set_aside(memory: Callable[[str, bytes], str], name: str) -> None:
    (source,) = find_sources([memory(name, LINES)]).files
    assert isinstance(source.entry, RemoteFile)
    longer = replace(source, entry=replace(source.entry, size=len(LINES) + 5))
    aside: list[SetAside] = []
    records = list(UnitReader(Unit(longer), CorpusSettings(), aside.append))
    assert len(records) == (100 if name == "a.jsonl" else 0)
    if name == "a.parquet":  # it is no table, and that is seen first
        assert only(aside).reason is Reason.DAMAGED
    else:
        assert only(aside).reason is Reason.UNREADABLE
        assert f"the server sent {len(LINES):,} of {len(LINES) + 5:,} bytes" in only(aside).detail


def test_a_file_of_a_store_that_is_gone_is_set_aside(memory: Callable[[str, bytes], str]) -> None:
    url = memory("a.txt", LINES)
    (unit,) = units_of(find_sources([url]), 1 << 40)
    fsspec.filesystem("memory").rm("/groundup/a.txt")
    memory("b.txt", b"")
    aside: list[SetAside] = []
    assert list(UnitReader(unit, CorpusSettings(), aside.append)) == []
    assert only(aside).reason is Reason.UNREADABLE


def test_the_fingerprint_of_a_store_follows_its_files(memory: Callable[[str, bytes], str]) -> None:
    url = memory("a.txt", b"one")
    chosen = CorpusSettings(inputs=(url,))
    before = input_fingerprint(chosen)
    assert input_fingerprint(chosen) == before
    memory("a.txt", b"two")
    assert input_fingerprint(chosen) != before


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://groundup/nothing.txt", "no such file or folder"),
        ("memory://groundup/*.nothing", "nothing matches"),
        ("gopher-hole://x/a.txt", "no kind of address"),
        ("http://127.0.0.1:9/a.txt", "no such file|cannot be reached"),
        ("memory://groundup/a.parquet.gz", "packed again"),
    ],
)
def test_addresses_that_lead_nowhere_are_errors(memory: Callable[[str, bytes], str], url: str, message: str) -> None:
    memory("a.parquet.gz", b"x")
    with pytest.raises(DataError, match=message) as caught:
        find_sources([url])
    assert url in caught.value.message
    assert caught.value.fix


@pytest.mark.parametrize(("url", "module"), [("s3://bucket/a.txt", "s3fs"), ("gs://bucket/a.txt", "gcsfs")])
def test_a_missing_library_is_an_error_that_says_how_to_get_it(
    url: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=r"pip install 'groundup\[cloud\]'") as caught:
        find_sources([url])
    assert url in caught.value.message


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files, whole or in ranges, or breaks off in the middle of them."""

    def do_GET(self) -> None:
        name, _, query = self.path.partition("?")
        data = (Path(self.server.folder) / name.lstrip("/")).read_bytes()  # type: ignore[attr-defined]
        first, last = 0, len(data)
        asked = self.headers.get("Range")
        if asked and "ranges" in query:
            low, _, high = asked.removeprefix("bytes=").partition("-")
            first, last = int(low), min(len(data), int(high) + 1 if high else len(data))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last - 1}/{len(data)}")
        else:
            self.send_response(200)
        if "nolength" not in query:
            self.send_header("Content-Length", str(last - first))
        if "etag" in query:
            self.send_header("ETag", f'"{hash(data)}"')
        self.end_headers()
        if self.command == "GET":
            part = data[first:last]
            if "breaks" in query:
                part = part[: len(part) // 2]
                self.close_connection = True
            with contextlib.suppress(ConnectionError):
                for begin in range(0, len(part), 1 << 16):
                    self.wfile.write(part[begin : begin + (1 << 16)])
                    self.server.n_sent += len(part[begin : begin + (1 << 16)])  # type: ignore[attr-defined]
            self.wfile.flush()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class Server(http.server.ThreadingHTTPServer):
    """What `Handler` serves, and how much of it went out."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = str(folder)
        self.n_sent = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no news."""


@contextlib.contextmanager
def http_server(folder: Path) -> Iterator[Server]:
    with Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    with http_server(folder) as server:
        yield server.url


@pytest.mark.parametrize("query", ["", "?ranges", "?etag", "?ranges&etag", "?nolength"])
def test_files_of_a_web_server_are_read(tmp_path: Path, query: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES))
    with served(tmp_path) as server:
        for name in ("a.jsonl", "b.jsonl.gz"):
            records, aside = read_all(f"{server}/{name}{query}", split_bytes=100)
            assert ([record.text for record in records], aside) == ([f"text {n}" for n in range(100)], [])
        n_units = len(units_of(find_sources([f"{server}/a.jsonl{query}"]), 100))
        assert n_units == (-(-len(LINES) // 100) if "ranges" in query else 1)
        chosen = CorpusSettings(inputs=(f"{server}/a.jsonl{query}",))
        before = input_fingerprint(chosen)
        assert input_fingerprint(chosen) == before
        (tmp_path / "a.jsonl").write_bytes(LINES.replace(b"text 5", b"text 6"))
        assert input_fingerprint(chosen) != before


@pytest.mark.parametrize("query", ["", "?ranges"])
def test_large_files_of_a_web_server_are_read_once(tmp_path: Path, query: str) -> None:
    lines = b"".join(b'{"text": "%d %s"}\n' % (n, b"x" * 100_000) for n in range(300))
    (tmp_path / "a.jsonl").write_bytes(lines)
    with served(tmp_path) as server:
        sources = find_sources([f"{server}/a.jsonl{query}"])
        units = units_of(sources, 8 << 20)
        assert len(units) == (4 if query else 1)
        records = [record for unit in units for record in UnitReader(unit, CorpusSettings(), print)]
        assert [record.text.split()[0] for record in records] == [str(n) for n in range(300)]
        assert [len(record.text) > 100_000 for record in records] == [True] * 300


def test_finding_a_file_of_a_web_server_does_not_fetch_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n" * (64 << 20))
    with http_server(tmp_path) as server:
        (source,) = find_sources([f"{server.url}/a.jsonl"]).files
        assert source.size_bytes() == 64 << 20
        assert not source.can_seek
        assert server.n_sent < 32 << 20


@pytest.mark.parametrize("query", ["?breaks", "?breaks&ranges"])
def test_a_server_that_breaks_off_is_set_aside(tmp_path: Path, query: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.txt").write_bytes(LINES)
    with served(tmp_path) as server:
        for name in ("a.jsonl", "b.txt"):
            records, aside = read_all(f"{server}/{name}{query}")
            assert len(records) < 100
            assert only(aside).reason is Reason.UNREADABLE
            assert only(aside).source.startswith(f"{server}/{name}")


def test_signatures_in_an_address_are_not_written_into_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with served(tmp_path) as server:
        (document,) = read(f"{server}/a.txt?token=secret")
        (other,) = read(f"{server}/a.txt?token=other")
    assert "secret" not in document.source
    assert document.source.startswith(f"{server}/a.txt?")
    assert document.source != other.source
