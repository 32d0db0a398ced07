"""A crawl that is killed, stopped, short of disk or of leave: it goes on, fetches nothing twice, loses nothing."""

from __future__ import annotations

import errno
import gzip
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from misbehaving_server import MisbehavingServer, page, redirect

pytest.importorskip("scrapy")

from crawl_pages import crawl_and_exit, pages_of, quick
from scrapy.http import Response

from groundup.corpus.crawl import Refusal, crawl, warc
from groundup.corpus.crawl.warc import Entry, WarcFiles, page_record
from groundup.errors import ArtifactError, GroundupError, Interrupted, RunError


@pytest.fixture
def server() -> Iterator[MisbehavingServer]:
    with MisbehavingServer() as started:
        yield started


PROCESSES = multiprocessing.get_context("forkserver")  # a server that has imported everything once
PROCESSES.set_forkserver_preload(["crawl_pages", "groundup.corpus.crawl.session"])


def _start(server: MisbehavingServer, out: Path, delay: float, path: str = "/") -> Any:
    process = PROCESSES.Process(target=crawl_and_exit, args=(server.url(path), str(out), delay))
    process.start()
    return process


def _site(server: MisbehavingServer, n_pages: int) -> dict[str, bytes]:
    noise = random.Random(0)
    site = {"/": page("hub", *[f"/{n}" for n in range(n_pages // 2)])}
    for number in range(n_pages):
        further = [f"/{number + n_pages // 2}"] if number < n_pages // 2 else []
        site[f"/{number}"] = page(str(number), *further) + noise.randbytes(1000)
    server.pages |= site
    return site


def _stored(out: Path) -> set[str]:
    return {entry.url for entry in WarcFiles(out).entries if entry.event == "stored"}


def test_killed_at_any_moment_it_goes_on(server: MisbehavingServer, tmp_path: Path) -> None:
    site = _site(server, 60)
    moments = random.Random(int(os.environ.get("CRAWL_SEED", "7")))
    out, kills, kept = tmp_path / "out", 0, set[str]()
    while True:
        asked = len(server.requests)
        before = server.counts
        until = moments.randrange(8, 24)
        process = _start(server, out, 0.002)
        while len(server.requests) < asked + until and process.is_alive():
            time.sleep(0.0005)
        time.sleep(moments.random() * 0.004)
        process.kill()
        process.join()
        kills += process.exitcode != 0
        again = {path for path, count in server.counts.items() if count > before[path]}
        assert not {server.url(path) for path in again} & kept, "what is stored is not fetched again"
        assert kept <= _stored(out), "what was stored stays stored"
        kept = _stored(out)
        if process.exitcode == 0:
            break
    assert kills >= 2
    assert pages_of(out) == {server.url(path): body for path, body in site.items()}
    assert server.counts.total() <= len(site) + kills, "at most what was in flight is fetched twice"
    assert json.loads((out / "crawl.json").read_text())["stored"] == len(site)


@pytest.mark.parametrize(
    ("how", "path", "delay", "until"),
    [
        (signal.SIGINT, "/", 0.02, 8),
        (signal.SIGTERM, "/", 600.0, 1),  # while a host rests
        (signal.SIGTERM, "/silent", 0.0, 2),  # while a page is under way
    ],
)
def test_stopped_it_leaves_whole_files(
    server: MisbehavingServer, tmp_path: Path, how: signal.Signals, path: str, delay: float, until: int
) -> None:
    site = _site(server, 40)
    process = _start(server, tmp_path, delay, path)
    while len(server.requests) < until and process.is_alive():
        time.sleep(0.001)
    os.kill(process.pid, how)
    process.join(20)
    assert process.exitcode == Interrupted.exit_code
    found = pages_of(tmp_path)
    assert set(found) == _stored(tmp_path)
    assert until - 3 <= len(found) < len(site)


def test_whatever_did_not_reach_the_disk_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a growing file, any cut, flipped bit, or lost end costs the entries from there on, and no other."""
    monkeypatch.setattr(warc, "FILE_BYTES", 4000)
    (tmp_path / "killed").mkdir()
    killed = WarcFiles(tmp_path / "killed", "me")
    noise = random.Random(3)
    for number in range(5):
        body = noise.randbytes(1000)
        url = f"http://a/{number}"
        killed.append(page_record(Response(url, body=body)) + Entry("stored", url).record())
        killed.append(Entry("refused", f"http://b/{number}", reason=Refusal.TYPE, detail="ü\udce9").record())
    killed._handle.close()  # type: ignore[union-attr]
    (growing,) = (tmp_path / "killed").glob("*.open")
    data = growing.read_bytes()
    entries = WarcFiles(tmp_path / "killed", "me").entries
    assert len(entries) == 10
    growing.unlink()
    safe = len(WarcFiles(tmp_path / "killed", "me").entries)
    assert 0 < safe < 10
    damages = [data[:size] for size in range(0, len(data), 97)]
    damages += [data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in range(10, len(data), 97)]
    damages += [data[:at] + bytes(len(data) - at) for at in range(0, len(data), 97)]
    monkeypatch.undo()
    odd = [b"[]", b"[" * 10**5, b'{"event": 1}', b'{"event": "stored", "url": "x", "links": 5}', b"\xff", b"",
           b'{"event": "refused", "url": "x", "reason": "never"}', b'{"event": "stored", "url": ["x"]}']  # fmt: skip
    damages += [data + gzip.compress(b"WARC/1.1\r\nWARC-Type: metadata\r\n\r\n" + block) for block in odd]
    damages += [data + b"torn", data]
    for number, left in enumerate(damages):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "killed", folder)
        (folder / growing.name).write_bytes(left)
        files = WarcFiles(folder, "me")
        assert files.entries == entries[: len(files.entries)]
        assert len(files.entries) >= (len(entries) if left.startswith(data) else safe)
        files.append(Entry("refused", "http://a/new", reason=Refusal.TYPE).record())
        files.close()
        assert not list(folder.glob("*.open"))
        assert WarcFiles(folder, "me").entries == [
            *files.entries,
            Entry("refused", "http://a/new", reason=Refusal.TYPE),
        ]
        shutil.rmtree(folder)


def test_a_full_disk_leaves_whole_pages(
    server: MisbehavingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, opened, written = _site(server, 10), Path.open, 0

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            nonlocal written
            written += 1
            if written == 4:
                return super().write(data[: len(data) // 2])
            if written == 5:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    def growing(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        return Full(path, mode) if (path.suffix, mode) == (".open", "wb") else opened(path, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", growing)
    with pytest.raises(GroundupError, match=r"the disk is full.*\n.*same command"):
        crawl([server.url()], tmp_path, quick(depth=3))
    assert len(pages_of(tmp_path)) == 2
    assert crawl([server.url()], tmp_path, quick(depth=3)).stored == len(site)
    assert len(pages_of(tmp_path)) == len(site)


def test_limits_stop_and_a_higher_one_goes_on(server: MisbehavingServer, tmp_path: Path) -> None:
    for number in range(6):
        server.pages[f"/{number}"] = page(str(number), words=1000)
    urls = [server.url(f"/{number}") for number in range(6)]
    report = crawl(urls, tmp_path, quick(max_pages=2))
    assert (report.stored, report.waiting, report.limit) == (2, 4, "max_pages")
    assert crawl(urls, tmp_path, quick(max_pages=2)).fetched == 0
    report = crawl([], tmp_path, quick(max_megabytes=0.025))
    assert (report.stored, report.limit) == (3, "max_megabytes")
    report = crawl([], tmp_path, quick())
    assert (report.stored, report.waiting, report.limit, report.fetched) == (6, 0, "", 3)
    assert set(server.counts.values()) == {1}
    assert len(pages_of(tmp_path)) == 6


def test_where_redirects_led_is_remembered(server: MisbehavingServer, tmp_path: Path) -> None:
    server.pages |= {"/old": redirect("/new"), "/new": page("new")}
    assert crawl([server.url("/old")], tmp_path, quick()).stored == 1
    assert crawl([server.url("/new")], tmp_path, quick()).found == 1
    assert server.counts == {"/old": 1, "/new": 1}
    assert list(pages_of(tmp_path)) == [server.url("/new")]


def test_a_folder_is_one_crawl_of_one_process(server: MisbehavingServer, tmp_path: Path) -> None:
    from filelock import FileLock

    crawl([server.url("/gzip")], tmp_path, quick())
    with pytest.raises(RunError, match="depth = 0"):
        crawl([server.url("/gzip")], tmp_path, quick(depth=1))
    with FileLock(tmp_path / ".lock"), pytest.raises(RunError, match="another process"):
        crawl([server.url("/gzip")], tmp_path, quick())


def test_pages_that_someone_removed_or_changed_are_missed(server: MisbehavingServer, tmp_path: Path) -> None:
    (path,) = crawl([server.url("/gzip")], tmp_path, quick()).files
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match="is damaged behind byte"):
        crawl([], tmp_path, quick())
    path.unlink()
    with pytest.raises(ArtifactError, match="is gone"):
        crawl([], tmp_path, quick())
    path.write_bytes(data)
    assert crawl([], tmp_path, quick()).stored == 1
