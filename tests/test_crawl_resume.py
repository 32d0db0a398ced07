"""A crawl that is killed, stopped, short of disk or of leave: it goes on, fetches nothing twice, loses nothing."""

from __future__ import annotations

import errno
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

from crawl_pages import crawl_and_exit, files_of, pages_of, quick
from scrapy.http import Response

from groundup.corpus.crawl import crawl
from groundup.corpus.crawl.warc import WarcFiles, page_record
from groundup.errors import GroundupError, Interrupted, RunError


@pytest.fixture
def server() -> Iterator[MisbehavingServer]:
    with MisbehavingServer() as started:
        yield started


PROCESSES = multiprocessing.get_context("forkserver")  # a server that has imported everything once
PROCESSES.set_forkserver_preload(["crawl_pages", "groundup.corpus.crawl"])


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
    return set(WarcFiles(out).stored)


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
    assert json.loads((out / "crawl.json").read_text())["outcomes"]["stored"] == len(site)


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


def test_whatever_did_not_reach_the_disk_is_cut_off(tmp_path: Path) -> None:
    """Of a growing file, any cut, flipped bit, or lost end costs the pages from there on, and no other."""
    (tmp_path / "killed").mkdir()
    killed, noise = WarcFiles(tmp_path / "killed", "me"), random.Random(3)
    bodies, ends = {f"http://a/{number}": noise.randbytes(1000) for number in range(5)}, [0]
    for url, body in bodies.items():
        killed.append(page_record(Response(url, body=body)))
        ends.append(killed._end)
    killed._handle.close()  # type: ignore[union-attr]
    (growing,) = (tmp_path / "killed").glob("*.open")
    data = growing.read_bytes()
    damages = [(at, data[:at]) for at in range(0, len(data), 97)]
    damages += [(at, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]) for at in range(10, len(data), 97)]
    damages += [(at, data[:at] + bytes(len(data) - at)) for at in range(0, len(data), 97)]
    damages += [(len(data), data + b"torn"), (len(data), data)]
    for at, left in damages:
        folder = tmp_path / "left"
        folder.mkdir()
        (folder / growing.name).write_bytes(left)
        files = WarcFiles(folder, "me")
        whole = list(bodies)[: max(0, sum(end <= at for end in ends) - 1)]
        assert list(files.stored)[: len(whole)] == whole
        if len(left) < len(data):  # else the bit may be one that nobody reads
            assert list(files.stored) == whole
        assert all(files.read(url).body == bodies[url] for url in files.stored)
        files.append(page_record(Response("http://a/new", body=b"new")))
        files.close()
        assert not list(folder.glob("*.open"))
        assert set(pages_of(folder)) == {*files.stored, "http://a/new"} == {*WarcFiles(folder).stored}
        shutil.rmtree(folder)


def test_a_full_disk_leaves_whole_pages(
    server: MisbehavingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, opened, written = _site(server, 10), Path.open, 0

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            nonlocal written
            written += 1
            if written == 3:
                return super().write(data[: len(data) // 2])
            if written == 4:
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
    report = crawl(urls, tmp_path, quick(max_megabytes=0.025))
    assert (report.stored, report.limit) == (3, "max_megabytes")
    report = crawl(urls, tmp_path, quick())
    assert (report.stored, report.waiting, report.limit, report.fetched) == (6, 0, "", 3)
    assert set(server.counts.values()) == {1}
    assert len(pages_of(tmp_path)) == 6


def test_a_crawl_goes_on_deeper(server: MisbehavingServer, tmp_path: Path) -> None:
    """Links of stored pages are followed again, also where a redirect led to them."""
    server.pages |= {"/": page("hub", "/old"), "/old": redirect("/new"), "/new": page("new", "/deep")}
    server.pages["/deep"] = page("deep")
    for depth, stored in ((0, 1), (1, 2), (1, 2), (2, 3)):
        assert crawl([server.url()], tmp_path, quick(depth=depth)).stored == stored
    assert len(pages_of(tmp_path)) == 3
    assert [server.counts[path] for path in ("/", "/new", "/deep")] == [1, 1, 1]


def test_a_folder_is_of_one_process(server: MisbehavingServer, tmp_path: Path) -> None:
    from filelock import FileLock

    crawl([server.url("/gzip")], tmp_path, quick())
    with FileLock(tmp_path / ".lock"), pytest.raises(RunError, match="another process"):
        crawl([server.url("/gzip")], tmp_path, quick())


def test_pages_that_someone_removed_or_damaged_are_fetched_again(server: MisbehavingServer, tmp_path: Path) -> None:
    crawl([server.url("/gzip")], tmp_path, quick())
    (path,) = files_of(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    assert crawl([server.url("/gzip")], tmp_path, quick()).fetched == 1
    assert [file.name for file in files_of(tmp_path)] == [path.name, "pages-00001.warc.gz"]
    for file in files_of(tmp_path):
        file.unlink()
    assert crawl([server.url("/gzip")], tmp_path, quick()).fetched == 1
