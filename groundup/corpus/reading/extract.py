"""Text out of HTML pages, in a process apart: a page that crashes, hangs or eats memory costs that page only.

The extractors are native code that threads bring down and that grows with the pages it has seen, so each page is done
by a child process with limits of time and memory, replaced after some pages and after every crash. A page's text
depends on the page alone. A process of `multiprocessing`, and so a pool such as pebble's, would not do: it runs the
user's script again and imports all of this package, and a worker of a pool may not begin one.
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
from groundup.corpus.reading.refusal import RefusedError
from groundup.errors import GroundupError

_STARTS = 3  # a process that is killed while it loads the extractor is started again so often
# Sets of strings must come in one order in every child; a module beside the script must not hide one of the library's
# (-P); glibc would give the memory of every page back to the system, and take it anew for the next one.
_ENVIRONMENT = {
    "PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
}  # fmt: skip


@dataclass
class Extractor:
    """Takes the main text out of HTML pages. Use it in a `with` statement: leaving it ends the child.

    The child starts with the first page, so an extractor that sees none costs nothing. Not for several threads.

    Attributes:
        kind: "trafilatura" (better) or "resiliparse" (many times faster).
        timeout_seconds: processor time that a page may take (and four times as much by the clock).
        pages_per_process: the child is replaced after so many.
        memory_mib: what a page may take beside the extractor itself, where the system can limit it.
    """

    kind: Literal["trafilatura", "resiliparse"]
    timeout_seconds: float
    pages_per_process: int = 1000
    memory_mib: float = 2048.0
    _n_answered: int = field(default=0, init=False)
    _child: tuple[subprocess.Popen[bytes], Connection] | None = field(default=None, init=False)

    @property
    def process_id(self) -> int | None:
        """The child's, while there is one."""
        return self._child[0].pid if self._child else None

    def extract(self, html: bytes, url: str = "") -> str:
        """The main text of a page as it was served from `url` (nothing is fetched).

        A page whose child dies is tried once more by a fresh one, and that counts: the first may have been killed
        from outside, or have grown full with the pages before.

        Raises:
            RefusedError: there is no text in it, or it takes too much time or memory, or crashes the extractor.
            GroundupError: the extractor is not installed, or cannot start.
        """
        for is_last in (False, True):
            if self._n_answered >= self.pages_per_process:
                self.__exit__()
            try:
                self._child = self._child or self._start()
                is_text, text = self._answer(self._child, url.encode("utf-8", "replace"), html)
                break
            except RefusedError as refused:
                if is_last or refused.reason == Reason.TIMEOUT:
                    raise
        self._n_answered += 1
        if is_text and text:
            return text
        if is_text:
            raise RefusedError(Reason.NO_CONTENT, "the extractor found no main text in the page")
        raise RefusedError(Reason.CRASH, text)

    def __enter__(self) -> Extractor:
        return self

    def __exit__(self, *error: object) -> None:
        """Close the connection, which ends the child where it waits for a page, and see that it ends."""
        if self._child is None:
            return
        (process, connection), self._child = self._child, None
        connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5.0)
        process.kill()
        process.wait()

    def _start(self) -> tuple[subprocess.Popen[bytes], Connection]:
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry)
        is_loaded, why, self._n_answered = False, "its process ends at once", 0
        for _ in range(_STARTS):
            ours, theirs = Pipe()
            arguments = [self.kind, str(self.timeout_seconds), str(self.memory_mib), str(theirs.fileno())]
            process = subprocess.Popen(
                [sys.executable, "-P", str(Path(child.__file__).resolve()), *arguments],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path, **_ENVIRONMENT}, pass_fds=[theirs.fileno()], process_group=0,
            )  # fmt: skip
            theirs.close()
            self._child = process, ours
            with contextlib.suppress(RefusedError):
                is_loaded, why = self._answer(self._child)
                break
        if is_loaded and self._child:
            return self._child
        self.__exit__()
        raise GroundupError(
            f"[corpus] extractor = {self.kind!r} cannot be started: {why}",
            "Run: pip install trafilatura lxml_html_clean resiliparse, or choose the other of the two extractors.",
        )

    def _answer(self, running: tuple[subprocess.Popen[bytes], Connection], *page: bytes) -> tuple[bool, str]:
        """What the child says to a page, or of its own when it is loaded: whether that is a text, and what it is.

        Raises `RefusedError` if it ends instead: its own timers, which the kernel keeps, see to that.
        """
        process, connection = running
        with contextlib.suppress(EOFError, OSError):
            for message in page:
                connection.send_bytes(message)
            answer = connection.recv_bytes().decode()
            return answer[0] == "+", answer[1:]
        connection.close()
        code = process.wait()
        self.__exit__()
        if -code in (signal.SIGPROF, signal.SIGALRM):
            raise RefusedError(Reason.TIMEOUT, f"more than {self.timeout_seconds:g} s")
        how = (
            f"was ended by {signal.Signals(-code).name}" if -code in set(signal.Signals) else f"ended with code {code}"
        )
        if code == child.OUT_OF_MEMORY:
            how = f"ran out of memory: a page may take {self.memory_mib:,.0f} MiB"
        raise RefusedError(Reason.CRASH, f"the extractor's process {how}")
