"""Text out of HTML pages, in a process apart: a page that crashes, hangs or eats memory costs that page only.

In: pages as bytes, whatever their encoding. Out: their main text, or why there is none. The extractors are native code
that threads bring down and that grows with the pages it has seen, so each page is done by a child process with a limit
of time and memory; the child is replaced after some pages and after every crash. A page's text depends on the page
alone, never on those before it. Nothing is fetched.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from groundup.corpus.document import Reason
from groundup.corpus.reading import extract_child as child
from groundup.errors import GroundupError

MEMORY_MIB = 2048.0
"""Memory that one page may take in the child, beside the extractor itself."""

_IN_FLIGHT_PAGES = 32
_PIPE_BYTES = 1 << 20  # so much waits in the pipe while this process is busy elsewhere
_IN_FLIGHT_BYTES = _PIPE_BYTES
_READ_BYTES = 1 << 18
_STARTS = 3  # a process that is killed while it loads the extractor is started again so often
_STARTING_SECONDS = 300.0
_GRACE_SECONDS = 30.0  # beyond the child's own timers, which the kernel keeps
# glibc would give the memory of every page back to the system, and take it anew for the next one.
_KEEP_FREED = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(128 << 20)}
_TIMERS = {signal.SIGPROF, signal.SIGALRM}


@dataclass(frozen=True, slots=True)
class ExtractionFailure:
    """Why a page gave no text.

    Attributes:
        reason: `Reason.NO_CONTENT`, `Reason.TIMEOUT` or `Reason.CRASH`.
        detail: in words.
    """

    reason: Reason
    detail: str


class Extractor:
    """Takes the main text out of HTML pages. Use it in a `with` statement: leaving it ends the child.

    The child starts with the first page, so an extractor that sees none costs nothing. Not for several threads.

    Args:
        kind: "trafilatura" (better) or "resiliparse" (many times faster).
        timeout_seconds: processor time that a page may take (and four times as much by the clock).
        pages_per_process: the child is replaced after so many.
        memory_mib: what a page may take beside the extractor itself, where the system can limit it.
    """

    def __init__(
        self,
        kind: Literal["trafilatura", "resiliparse"],
        timeout_seconds: float,
        pages_per_process: int = 1000,
        memory_mib: float = MEMORY_MIB,
    ) -> None:
        self.kind = kind
        self.timeout_seconds = timeout_seconds
        self.pages_per_process = pages_per_process
        self.memory_mib = memory_mib
        self.n_processes = self._n_failed_starts = 0
        self._child: _Child | None = None
        self._is_busy = False

    @property
    def process_id(self) -> int | None:
        """The child's, while there is one."""
        return self._child.process.pid if self._child else None

    def extract(self, html: bytes, url: str = "") -> str | ExtractionFailure:
        """The main text of one page.

        Args:
            html: the page as it was served (see `in_utf8` where the server named an encoding).
            url: its address, which may help the extractor; nothing is fetched.

        Raises:
            GroundupError: the extractor is not installed, or cannot start.
        """
        return next(self.extract_many([(html, url)]))

    def extract_many(self, pages: Iterable[tuple[bytes, str]]) -> Iterator[str | ExtractionFailure]:
        """The main text of each page, in their order; while the child works on one, the next ones are read.

        Args:
            pages: (html, url); some are taken ahead, at most 32 of 1 MiB in all.

        Raises:
            GroundupError: as `extract`.
        """
        assert not self._is_busy, "an extractor does one series of pages at a time"
        self._is_busy = True
        waiting: deque[_Page] = deque()
        try:
            for html, url in pages:
                waiting.append(_Page(html, url))
                self._send(waiting)
                while len(waiting) >= _IN_FLIGHT_PAGES or sum(len(page.html) for page in waiting) >= _IN_FLIGHT_BYTES:
                    yield self._take_first(waiting)
            while waiting:
                yield self._take_first(waiting)
        finally:
            self._is_busy = False
            if waiting:  # abandoned half-way: discard the answers still to come
                self._end()

    def __enter__(self) -> Extractor:
        return self

    def __exit__(self, *error: object) -> None:
        """End the child."""
        self._end()

    def _take_first(self, waiting: deque[_Page]) -> str | ExtractionFailure:
        """The answer to the first page that waits; it waits no more.

        A page whose child dies is tried once more by a fresh one, and that counts: the first may have been killed
        from outside, or have grown full with the pages before.
        """
        page = waiting[0]
        while True:
            self._send(waiting)
            assert self._child is not None
            answer = self._child.receive(child.HANG_FACTOR * self.timeout_seconds + _GRACE_SECONDS)
            if answer is not None and answer[0] != child.NO_MEMORY:
                waiting.popleft()
                self._child.n_answered += 1
                self._send(waiting)
                return _result_of(*answer)
            failure = self._child.exit_reason(is_out_of_memory=answer is not None)
            self._n_failed_starts = 0 if self._child.is_loaded else self._n_failed_starts + 1
            if self._n_failed_starts >= _STARTS:
                raise self._child.not_loaded(failure.detail)
            self._end()
            for other in waiting:
                other.is_sent = False
            if self._n_failed_starts:
                continue
            if page.was_tried or failure.reason == Reason.TIMEOUT:
                waiting.popleft()
                return failure
            page.was_tried = True

    def _send(self, waiting: deque[_Page]) -> None:
        """Hand the child the pages that it may still take, and start it if need be."""
        if not waiting:
            return
        if self._child and self._child.n_sent == self._child.n_answered >= self.pages_per_process:
            self._end()
        if self._child is None:
            self._child = _Child(self)
            self.n_processes += 1
        for page in waiting:
            if not page.is_sent and self._child.n_sent < self.pages_per_process:
                self._child.send(page)
                page.is_sent = True
        self._child.push()

    def _end(self) -> None:
        if self._child:
            self._child.end()
            self._child = None


def in_utf8(html: bytes, encoding: str) -> bytes:
    """A page in UTF-8 with the mark that outranks what the page says of itself; unchanged where it is not `encoding`.

    Args:
        html: the page as served.
        encoding: what its server's Content-Type named, or "".
    """
    name = child.known_encoding(encoding) if encoding else None
    if not name or html.startswith(child.BYTE_ORDER_MARKS):
        return html
    if not name.startswith(("iso2022", "hz")):  # their bytes are ASCII
        with contextlib.suppress(UnicodeDecodeError):
            html.decode("utf-8")
            return html  # nothing else looks like UTF-8 by chance
    try:
        return b"\xef\xbb\xbf" + html.decode(name).encode("utf-8")
    except (UnicodeDecodeError, UnicodeEncodeError, LookupError):
        return html


@dataclass(slots=True)
class _Page:
    html: bytes
    url: str
    is_sent: bool = False
    was_tried: bool = False


def _result_of(kind: int, text: str) -> str | ExtractionFailure:
    if kind == child.FAILED:
        return ExtractionFailure(Reason.CRASH, text)
    return text or ExtractionFailure(Reason.NO_CONTENT, "the extractor found no main text in the page")


class _Child:
    """One child process and the two pipes to it, which are served together so that neither blocks the other."""

    def __init__(self, owner: Extractor) -> None:
        self.n_sent = self.n_answered = 0
        self._outgoing: deque[memoryview] = deque()
        self._incoming = bytearray()
        self._owner = owner
        self.is_loaded = self._is_overdue = False
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry)
        # Sets of strings must come in one order in every child; a module beside the script must not hide one of
        # the library's (-P).
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1", **_KEEP_FREED}
        arguments = [owner.kind, str(owner.timeout_seconds), str(owner.memory_mib)]
        script = str(Path(child.__file__).resolve())
        self.process = subprocess.Popen(
            [sys.executable, "-P", script, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, bufsize=0,
            process_group=0,
        )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._write_end, self._read_end = self.process.stdin.fileno(), self.process.stdout.fileno()
        for pipe in (self._write_end, self._read_end):
            os.set_blocking(pipe, False)
            _widen(pipe)

    def send(self, page: _Page) -> None:
        """Put a page into the queue to the child."""
        url = page.url.encode("utf-8", "replace")
        self._outgoing.append(memoryview(child.PAGE_HEAD.pack(len(url), len(page.html)) + url))
        self._outgoing.append(memoryview(page.html))
        self.n_sent += 1

    def push(self) -> None:
        """Write what the pipe takes."""
        try:
            while self._outgoing:
                n_written = os.write(self._write_end, self._outgoing[0]) if self._outgoing[0] else 0
                self._outgoing[0] = self._outgoing[0][n_written:]
                if not self._outgoing[0]:
                    self._outgoing.popleft()
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._outgoing.clear()  # it died; `receive` will see that

    def receive(self, seconds: float) -> tuple[int, str] | None:
        """The next answer as (kind, text), or None: it died, or said nothing for so many seconds (then it is killed).

        Raises:
            GroundupError: the extractor could not be loaded.
        """
        if not self.is_loaded:
            first = self._frame(_STARTING_SECONDS)
            if first is None:
                return None
            if first[0] != child.TEXT:
                raise self.not_loaded(first[1])
            self.is_loaded = True
        return self._frame(seconds)

    def _frame(self, seconds: float) -> tuple[int, str] | None:
        size = child.ANSWER_HEAD.size
        deadline = time.monotonic() + seconds
        while True:
            if len(self._incoming) >= size:
                kind, n_bytes = child.ANSWER_HEAD.unpack_from(self._incoming)
                if len(self._incoming) >= size + n_bytes:
                    text = self._incoming[size : size + n_bytes].decode()
                    del self._incoming[: size + n_bytes]
                    return kind, text
            poll = select.poll()
            poll.register(self._read_end, select.POLLIN)
            if self._outgoing:
                poll.register(self._write_end, select.POLLOUT)
            ready = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
            if not ready:
                self._is_overdue = True
                self.process.kill()
                return None
            if self._write_end in ready:
                self.push()
            if self._read_end in ready:
                data = os.read(self._read_end, _READ_BYTES)
                if not data:
                    return None
                self._incoming += data

    def exit_reason(self, is_out_of_memory: bool) -> ExtractionFailure:
        """Why the process ended, as the failure of the page that it was reading."""
        code = self.process.wait()
        if is_out_of_memory:
            detail = f"out of memory: a page may take {self._owner.memory_mib:,.0f} MiB"
        elif self._is_overdue or -code in _TIMERS:
            return ExtractionFailure(Reason.TIMEOUT, f"more than {self._owner.timeout_seconds:g} s")
        elif -code in set(signal.Signals):
            detail = f"the extractor's process was ended by {signal.Signals(-code).name}"
        else:
            detail = f"the extractor's process ended with code {code}"
        return ExtractionFailure(Reason.CRASH, detail)

    def end(self) -> None:
        """Close the pipes, which ends the process where it has nothing to do, and wait for its end."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        try:
            if self.n_sent > self.n_answered:
                self.process.kill()
            self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def not_loaded(self, why: str) -> GroundupError:
        """The error for an extractor that does not start."""
        return GroundupError(
            f"[corpus] extractor = {self._owner.kind!r} cannot be started: {why}",
            "Run: pip install trafilatura lxml_html_clean resiliparse, or choose the other of the two extractors.",
        )


def _widen(pipe: int) -> None:
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import fcntl

        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
