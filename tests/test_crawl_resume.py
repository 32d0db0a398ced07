"""A crawl that is killed, stopped, short of disk or of leave: it goes on, fetches nothing twice, loses nothing."""

from __future__ import annotations

import collections
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from misbehaving_server import MisbehavingServer, page, redirect

pytest.importorskip("aiohttp")
pytest.importorskip("protego")

from crawl_pages import pages_of, quick

from groundup.corpus.crawl import CrawlSettings, Refusal, crawl
from groundup.corpus.crawl.journal import JOURNAL, Entry, Store, read_journal
from groundup.errors import ArtifactError, GroundupError, Interrupted, RunError


@pytest.fixture
def server() -> Iterator[MisbehavingServer]:
    with MisbehavingServer() as started:
        yield started


CRAWL = """
import sys
from groundup.corpus.crawl import CrawlSettings, crawl
from groundup.errors import Interrupted
settings = CrawlSettings(allow_private=True, delay_seconds=float(sys.argv[3]), depth=3, file_mib=0.02)
try:
    crawl([sys.argv[1]], sys.argv[2], settings)
except Interrupted as stop:
    print(stop.message)
    sys.exit(stop.exit_code)
"""


def _start(server: MisbehavingServer, out: Path, delay: float) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", CRAWL, server.url(), str(out), str(delay)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def _site(server: MisbehavingServer, n_pages: int) -> dict[str, bytes]:
    noise = random.Random(0)
    site = {"/": page("hub", *[f"/{n}" for n in range(n_pages // 2)])}
    for number in range(n_pages):
        further = [f"/{number + n_pages // 2}"] if number < n_pages // 2 else []
        site[f"/{number}"] = page(str(number), *further) + noise.randbytes(1000)
    server.pages |= site
    return site


def _stored_by_journal(out: Path) -> set[str]:
    return {entry.url for entry, _ in read_journal(out / JOURNAL) if entry.event == "stored"}


def test_killed_at_any_moment_it_goes_on(server: MisbehavingServer, tmp_path: Path) -> None:
    site = _site(server, 90)
    moments = random.Random(int(os.environ.get("CRAWL_SEED", "7")))
    out, kills, kept = tmp_path / "out", 0, set[str]()
    while True:
        asked = len(server.requests)
        before = server.counts
        until = moments.randrange(10, 40)
        with _start(server, out, 0.002) as process:
            while len(server.requests) < asked + until and process.poll() is None:
                time.sleep(0.0005)
            time.sleep(moments.random() * 0.004)
            process.kill()
        kills += process.returncode != 0
        again = {path for path, count in server.counts.items() if count > before[path]}
        assert not {server.url(path) for path in again} & kept, "what is stored is not fetched again"
        assert kept <= _stored_by_journal(out), "what was stored stays stored"
        kept = _stored_by_journal(out)
        if process.returncode == 0:
            break
    assert kills >= 2
    assert pages_of(out) == {server.url(path): body for path, body in site.items()}
    assert server.counts.total() <= len(site) + kills, "at most what was in flight is fetched twice"
    assert json.loads((out / "crawl.json").read_text())["stored"] == len(site)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_leaves_whole_files(server: MisbehavingServer, tmp_path: Path, how: signal.Signals) -> None:
    site = _site(server, 40)
    with _start(server, tmp_path, 0.02) as process:
        while len(server.requests) < 8 and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(how)
        out = process.communicate(timeout=20)[0]
    assert process.returncode == Interrupted.exit_code
    assert "pages are stored" in out
    found = pages_of(tmp_path)
    assert set(found) == _stored_by_journal(tmp_path)
    assert 5 <= len(found) < len(site)


def _folder_of_a_killed_crawl(folder: Path) -> list[Entry]:
    """Five stored pages, three of them in a growing file."""
    folder.mkdir()
    store = Store(folder, CrawlSettings(file_mib=0.003))
    noise = random.Random(3)
    for number in range(5):
        store.store(Entry("stored", f"http://a/{number}"), gzip.compress(noise.randbytes(1000)))
        store.note(Entry("refused", f"http://b/{number}", reason=Refusal.TYPE))
    store._journal.close()
    store._files._handle.close()  # type: ignore[union-attr]
    return [entry for entry, _ in read_journal(folder / JOURNAL)]


def test_whatever_did_not_reach_the_disk_is_cut_off(tmp_path: Path) -> None:
    entries = _folder_of_a_killed_crawl(tmp_path / "killed")
    (growing,) = (tmp_path / "killed").glob("*.open")
    assert list((tmp_path / "killed").glob("*.warc.gz"))
    pages, journal = growing.read_bytes(), (tmp_path / "killed" / JOURNAL).read_bytes()
    places = [entry.place for entry in entries if entry.place is not None]
    safe = sum(place.file < places[-1].file for place in places)
    damages = [(pages[:size], journal) for size in range(0, len(pages), 97)]
    damages += [(pages[:at] + bytes([pages[at] ^ 1]) + pages[at + 1 :], journal) for at in range(0, len(pages), 97)]
    damages += [(pages[:at] + bytes(len(pages) - at), journal) for at in range(0, len(pages), 97)]
    kept_lines = journal.index(b"\n", journal.index(b"a/%d" % (safe - 1))) + 1
    damages += [(pages, journal[:size]) for size in range(kept_lines, len(journal), 13)]
    damages += [(pages, journal[:at] + b"\0" * 50 + journal[at + 50 :]) for at in range(kept_lines, len(journal), 31)]
    damages += [(pages + b"torn", journal + b'{"event":"stored"')]
    for number, (pages_left, journal_left) in enumerate(damages):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "killed", folder)
        (folder / growing.name).write_bytes(pages_left)
        (folder / JOURNAL).write_bytes(journal_left)
        store = Store(folder, CrawlSettings())
        store.store(Entry("stored", "http://a/new"), gzip.compress(b"new"))
        store.close()
        found = [entry.place for entry, _ in read_journal(folder / JOURNAL) if entry.place is not None]
        assert len(found) >= safe + 1
        for place in found:
            path = folder / f"pages-{place.file:05d}.warc.gz"
            gzip.decompress(path.read_bytes()[place.begin : place.end])
        by_file = collections.defaultdict(int)
        for place in found:
            by_file[place.file] = max(by_file[place.file], place.end)
        assert {path: (folder / f"pages-{path:05d}.warc.gz").stat().st_size for path in by_file} == by_file
        shutil.rmtree(folder)


def test_a_full_disk_leaves_whole_pages(
    server: MisbehavingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from groundup.corpus.crawl import warc

    site = _site(server, 10)
    write = warc.WarcFiles._write
    written = 0

    def full_after_five(self: Any, data: bytes) -> None:
        nonlocal written
        written += 1
        if written == 5:
            write(self, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    monkeypatch.setattr(warc.WarcFiles, "_write", full_after_five)
    with pytest.raises(GroundupError, match=r"the disk is full.*\n.*same command"):
        crawl([server.url()], tmp_path, quick(depth=3))
    assert len(pages_of(tmp_path)) == 4 - 1
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
    assert crawl([server.url("/new")], tmp_path, quick()).refused == {Refusal.DUPLICATE: 1}
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
    with pytest.raises(ArtifactError, match="the journal says"):
        crawl([], tmp_path, quick())
    path.unlink()
    with pytest.raises(ArtifactError, match="is gone"):
        crawl([], tmp_path, quick())
    path.write_bytes(data)
    assert crawl([], tmp_path, quick()).stored == 1
