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
import socket
import struct
import subprocess
import sys
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Literal

from groundup.corpus.document import Reason
from groundup.corpus.reading import extract_child as child
from groundup.corpus.reading.refusal import RefusedError
from groundup.errors import GroundupError

_LOADING_SECONDS = 300.0
_HANG_FACTOR = 4  # so many times its seconds of processor time a page may take by the clock: the machine may be busy
# Sets of strings must come in one order in every child; a module beside the script must not hide one of the
# library's; glibc would give the memory of every page back to the system, and take it anew for the next one.
_ENVIRONMENT = {
    "PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
}  # fmt: skip


@dataclass
class Extractor(contextlib.AbstractContextManager["Extractor", None]):
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
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)  # the child, while there is one
    _connection: Connection = field(init=False)
    _n_pages: int = field(default=0, init=False)

    def extract(self, html: bytes, url: str = "") -> str:
        """The main text of a page as it was served from `url` (nothing is fetched).

        A page whose child dies is tried once more by a fresh one, and that counts: the first may have been killed
        from outside, or have grown full with the pages before.

        Raises:
            RefusedError: there is no text in it, or it takes too much time or memory, or crashes the extractor.
            GroundupError: the extractor is not installed, or cannot start.
        """
        for is_last in (False, True):
            if self._n_pages >= self.pages_per_process:
                self.__exit__()
            process, self._n_pages = self.process or self._start(), self._n_pages + 1
            try:
                text = self._ask(process, url.encode("utf-8", "replace"), html)
                break
            except RefusedError as refused:
                if is_last or self.process or refused.reason == Reason.TIMEOUT:
                    raise
        if not text:
            raise RefusedError(Reason.NO_CONTENT, "the extractor found no main text in the page")
        return text

    def __exit__(self, *error: object) -> None:
        """End the child; killing it ends one that hangs or was stopped too."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self._connection.close()
            self.process = None

    def _start(self) -> subprocess.Popen[bytes]:
        ours, theirs = socket.socketpair()
        limit = struct.pack("ll", *divmod(int(_HANG_FACTOR * self.timeout_seconds * 1e6) + 1, 10**6))
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, limit)
        self._connection, self._n_pages = Connection(ours.detach()), 0
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry)
        with theirs:
            self.process = process = subprocess.Popen(
                [sys.executable, child.__file__, self.kind, str(self.timeout_seconds), str(self.memory_mib)],
                stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path, **_ENVIRONMENT}, process_group=0,
            )  # fmt: skip
        try:
            self._ask(process)
        except RefusedError as refused:
            self.__exit__()
            raise GroundupError(
                f"[corpus] extractor = {self.kind!r} cannot be started: {refused}",
                "Run: pip install trafilatura lxml_html_clean resiliparse, or choose the other of the two extractors.",
            ) from refused
        return process

    def _ask(self, process: subprocess.Popen[bytes], *page: bytes) -> str:
        """The text of a page; without one, "" when the extractor is loaded.

        Raises `RefusedError` if the child says what went wrong, or ends, as its own timer sees to, or does not answer
        in time; then there is none any more.
        """
        try:
            for message in page:
                self._connection.send_bytes(message)
            if not page and not self._connection.poll(_LOADING_SECONDS):
                raise BlockingIOError
            answer = self._connection.recv_bytes().decode()
        except (EOFError, OSError) as error:
            is_late = isinstance(error, BlockingIOError)  # what a socket with a time limit raises
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.0 if is_late else 5.0)
            self.__exit__()
            code = process.returncode
            if is_late or code == -signal.SIGPROF:
                seconds = self.timeout_seconds if page else _LOADING_SECONDS
                raise RefusedError(Reason.TIMEOUT, f"more than {seconds:g} s") from error
            how = f"ended with code {code}" if code >= 0 else f"was ended by signal {-code} ({signal.strsignal(-code)})"
            if code == child.OUT_OF_MEMORY:
                how = f"ran out of memory: a page may take {self.memory_mib:,.0f} MiB"
            raise RefusedError(Reason.CRASH, f"the extractor's process {how}") from error
        if answer.startswith("-"):
            raise RefusedError(Reason.CRASH, answer[1:])
        return answer[1:]
