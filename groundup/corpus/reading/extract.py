"""Text out of HTML pages, in a process apart: a page that crashes, hangs or eats memory costs that page only.

In: pages as bytes, whatever their encoding. Out: their main text, or why there is none. The extractors are native code
that threads bring down and that grows with the pages it has seen, so each page is done by a child process with limits
of time and memory, replaced after some pages and after every crash. A page's text depends on the page alone.

A process of `multiprocessing`, and so a pool such as pebble's, would not do: it runs the user's script again and
imports all of this package, and a worker of a pool may not begin one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Literal

from groundup.corpus.document import Reason
from groundup.corpus.reading import extract_child as child
from groundup.errors import GroundupError

MEMORY_MIB = 2048.0
"""Memory that one page may take in the child, beside the extractor itself."""

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


@dataclass
class Extractor:
    """Takes the main text out of HTML pages. Use it in a `with` statement: leaving it ends the child.

    The child starts with the first page, so an extractor that sees none costs nothing. Not for several threads.

    Attributes:
        kind: "trafilatura" (better) or "resiliparse" (many times faster).
        timeout_seconds: processor time that a page may take (and four times as much by the clock).
        pages_per_process: the child is replaced after so many.
        memory_mib: what a page may take beside the extractor itself, where the system can limit it.
        n_processes: children begun so far.
    """

    kind: Literal["trafilatura", "resiliparse"]
    timeout_seconds: float
    pages_per_process: int = 1000
    memory_mib: float = MEMORY_MIB
    n_processes: int = field(default=0, init=False)
    _n_answered: int = field(default=0, init=False)
    _child: tuple[subprocess.Popen[bytes], Connection] | None = field(default=None, init=False)

    @property
    def process_id(self) -> int | None:
        """The child's, while there is one."""
        return self._child[0].pid if self._child else None

    def extract(self, html: bytes, url: str = "") -> str | ExtractionFailure:
        """The main text of one page.

        A page whose child dies is tried once more by a fresh one, and that counts: the first may have been killed
        from outside, or have grown full with the pages before.

        Args:
            html: the page as it was served (see `in_utf8` where the server named an encoding).
            url: its address, which may help the extractor; nothing is fetched.

        Raises:
            GroundupError: the extractor is not installed, or cannot start.
        """
        failure = self._try(html, url)
        if isinstance(failure, ExtractionFailure):
            self._end()
            if failure.reason != Reason.TIMEOUT:
                failure = self._try(html, url)
        if isinstance(failure, ExtractionFailure):
            self._end()
            return failure
        kind, text = failure
        self._n_answered += 1
        if kind == child.FAILED:
            return ExtractionFailure(Reason.CRASH, text)
        return text or ExtractionFailure(Reason.NO_CONTENT, "the extractor found no main text in the page")

    def __enter__(self) -> Extractor:
        return self

    def __exit__(self, *error: object) -> None:
        """End the child."""
        self._end()

    def _try(self, html: bytes, url: str) -> tuple[int, str] | ExtractionFailure:
        """The child's answer, or why it gave none and is of no use any more."""
        if self._n_answered >= self.pages_per_process:
            self._end()
        process, connection = self._child or self._start()
        seconds = child.HANG_FACTOR * self.timeout_seconds + _GRACE_SECONDS
        answer = self._answer(process, connection, seconds, url.encode("utf-8", "replace"), html)
        if not isinstance(answer, ExtractionFailure) and answer[0] == child.NO_MEMORY:
            return ExtractionFailure(Reason.CRASH, f"out of memory: a page may take {self.memory_mib:,.0f} MiB")
        return answer

    def _start(self) -> tuple[subprocess.Popen[bytes], Connection]:
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry)
        # Sets of strings must come in one order in every child; a module beside the script must not hide one of
        # the library's (-P).
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1", **_KEEP_FREED}
        for _ in range(_STARTS):
            ours, theirs = Pipe()
            arguments = [self.kind, str(self.timeout_seconds), str(self.memory_mib), str(theirs.fileno())]
            process = subprocess.Popen(
                [sys.executable, "-P", str(Path(child.__file__).resolve()), *arguments],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
                pass_fds=[theirs.fileno()], process_group=0,
            )  # fmt: skip
            theirs.close()
            self._child, self._n_answered = (process, ours), 0
            self.n_processes += 1
            loaded = self._answer(process, ours, _STARTING_SECONDS)
            if loaded == (child.TEXT, ""):
                return self._child
            self._end()
            why = loaded.detail if isinstance(loaded, ExtractionFailure) else loaded[1]
            if not isinstance(loaded, ExtractionFailure):
                break
        raise GroundupError(
            f"[corpus] extractor = {self.kind!r} cannot be started: {why}",
            "Run: pip install trafilatura lxml_html_clean resiliparse, or choose the other of the two extractors.",
        )

    def _answer(
        self, process: subprocess.Popen[bytes], connection: Connection, seconds: float, *page: bytes
    ) -> tuple[int, str] | ExtractionFailure:
        """What the child says, as (kind, text), to a page (or of its own, when it is loaded), or why it ended."""
        is_overdue = False
        try:
            for message in page:
                connection.send_bytes(message)
            if connection.poll(seconds):
                answer = connection.recv_bytes()
                return answer[0], answer[1:].decode()
            is_overdue = True
            process.kill()
        except (EOFError, OSError):
            pass
        code = process.wait()
        if is_overdue or -code in _TIMERS:
            return ExtractionFailure(Reason.TIMEOUT, f"more than {self.timeout_seconds:g} s")
        how = (
            f"was ended by {signal.Signals(-code).name}" if -code in set(signal.Signals) else f"ended with code {code}"
        )
        return ExtractionFailure(Reason.CRASH, f"the extractor's process {how}")

    def _end(self) -> None:
        """Close the connection, which ends the child where it waits for a page, and see that it ends."""
        if self._child is None:
            return
        (process, connection), self._child = self._child, None
        connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5.0)
        process.kill()
        process.wait()


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
