"""The journal of a crawl: one JSON line for each address given and each outcome, from which a killed crawl goes on.

A page's line is written after its records: what the journal says is stored is stored. Whatever a kill or a power cut
left half written (a torn last line, pages whose bytes never reached the disk) is cut off at the next start, and those
pages are fetched again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import orjson

from groundup.corpus.crawl.settings import CrawlSettings, Refusal
from groundup.corpus.crawl.warc import PageSpan, WarcFiles, store_error
from groundup.errors import ArtifactError

JOURNAL = "crawl.journal"  # not .jsonl: the folder itself can be an input of the corpus
_SYNC_SECONDS = 5.0

Event = Literal["given", "stored", "listed", "refused"]


@dataclass(frozen=True)
class Entry:
    """One line.

    Attributes:
        event: "given" by the user; "stored"; "listed": a sitemap was read; "refused".
        url: the address, as it was given or found.
        sitemap: whether it is a sitemap.
        depth: links between it and a given page.
        hops: the addresses it was redirected to, in their order; the last one is what was stored.
        links: new addresses that it led to; those of a sitemap are no deeper than it.
        sitemaps: new sitemaps that it led to.
        reason: why it was refused.
        detail: why, in this case.
        size_bytes: size of the stored body.
        place: where it is stored.
    """

    event: Event
    url: str
    sitemap: bool = False
    depth: int = 0
    hops: Sequence[str] = ()
    links: Sequence[str] = ()
    sitemaps: Sequence[str] = ()
    reason: str = ""
    detail: str = ""
    size_bytes: int = 0
    place: PageSpan | None = None

    def line(self) -> bytes:
        """As it is written."""
        values = {name: value for name, value in self.__dict__.items() if value or name in ("event", "url")}
        if self.place is not None:
            values["place"] = list(self.place.__dict__.values())
        return orjson.dumps(values) + b"\n"

    @classmethod
    def of(cls, line: bytes) -> Entry:
        """As it is read.

        Raises:
            ValueError: not such a line.
        """
        values = orjson.loads(line)
        try:
            if "place" in values:
                values["place"] = PageSpan(*values["place"])
            if values["event"] == "refused":
                Refusal(values["reason"])
            return cls(**values)
        except (TypeError, KeyError) as error:
            raise ValueError(str(error)) from error


def read_journal(path: Path) -> Iterator[tuple[Entry, int]]:
    """The whole lines, each with the byte it ends at; ends before the first that is torn."""
    if not path.exists():
        return
    end = 0
    with path.open("rb") as handle:
        for line in handle:
            try:
                if not line.endswith(b"\n"):
                    return
                entry = Entry.of(line)
            except ValueError:
                return
            end += len(line)
            yield entry, end


class Store:
    """Pages and journal of a crawl's folder, kept in step; close it with `close`.

    Args:
        folder: the crawl's folder.
        settings: for the size of files and the user agent.
    """

    def __init__(self, folder: Path, settings: CrawlSettings) -> None:
        self.folder = folder
        self._files = WarcFiles(folder, settings.user_agent, int(settings.file_mib * 2**20))
        self._journal_path = folder / JOURNAL
        self._recover()
        self._journal: IO[bytes] = self._journal_path.open("ab", buffering=0)
        self._synced = time.monotonic()

    def entries(self) -> Iterator[Entry]:
        """What the journal holds."""
        return (entry for entry, _ in read_journal(self._journal_path))

    def store(self, entry: Entry, records: bytes) -> None:
        """Write a page and its line.

        Raises:
            GroundupError: the disk is full or not writable; everything before is whole.
        """
        if self._files.is_full_for(len(records)):
            self._sync_journal()  # a finished file holds no page that the journal could lose
            self._files.finish()
        place = self._files.append(records)
        try:
            self.note(Entry(**{**entry.__dict__, "place": place}))
        except BaseException:
            self._files.forget_last(place)
            raise

    def note(self, *entries: Entry) -> None:
        """Write lines.

        Raises:
            GroundupError: the disk is full or not writable.
        """
        end = self._journal.tell()
        try:
            data = memoryview(b"".join(entry.line() for entry in entries))
            while data:
                data = data[self._journal.write(data) :]
        except OSError as error:
            self._journal.truncate(end)
            self._journal.seek(end)
            raise store_error(self._journal_path, error) from error
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self._files.sync()
            self._sync_journal()

    def close(self) -> None:
        """Give the growing file its name and flush everything."""
        try:
            self._sync_journal()
            self._files.finish()
        finally:
            self._journal.close()

    def _sync_journal(self) -> None:
        os.fsync(self._journal.fileno())
        self._synced = time.monotonic()

    def _recover(self) -> None:
        """Cut off what is not whole, in the journal and in the growing file."""
        number = 0
        while self._files.path(number).exists():
            number += 1
        sizes: dict[int, int] = {}
        growing: list[tuple[PageSpan, int]] = []  # with the byte at which its line begins
        end = 0
        for entry, line_end in read_journal(self._journal_path):
            if entry.place is not None:
                sizes[entry.place.file] = entry.place.end
                if entry.place.file >= number:
                    growing.append((entry.place, end))
            end = line_end
        self._check_files(sizes, number)
        kept = self._files.recover([place for place, _ in growing], number)
        if kept < len(growing):
            end = growing[kept][1]
        if self._journal_path.exists():
            with self._journal_path.open("r+b") as handle:
                handle.truncate(end)

    def _check_files(self, sizes: dict[int, int], number: int) -> None:
        """Check that finished files are unchanged: a killed crawl leaves them whole."""
        fix = "Put it back as it was, or begin a new crawl in another folder with --out."
        for file, size in sizes.items():
            path = self._files.path(file)
            if path.exists():
                if path.stat().st_size != size:
                    has = f"has {path.stat().st_size:,} bytes, and the journal says {size:,}."
                    raise ArtifactError(f"{path}: {has}", fix)
            elif file != number or not self._files.open_path(file).exists():
                raise ArtifactError(f"{path}: is gone, and the journal says that it holds pages.", fix)
