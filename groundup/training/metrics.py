"""What a training stage writes down while it runs, so that a resumed run's files equal an uninterrupted one's.

`metrics.jsonl` and `samples.jsonl` hold only what the recipe and the seed decide; wall-clock figures go to
`timings.jsonl`. Lines past the checkpoint that a run resumes from are taken back: those steps come again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import orjson

from groundup.files import atomic_writer, write_error

FILES = ("metrics", "samples", "timings")


class MetricLog:
    """The three logs of one stage's folder.

    Args:
        folder: where they are.
        step: the last step that counts; later lines are removed.
        writes: False in all processes but the first.
    """

    def __init__(self, folder: Path, step: int, *, writes: bool = True) -> None:
        self._handles: dict[str, IO[bytes]] = {}
        self._folder, self._writes = folder, writes
        self.take_back(step)

    def take_back(self, step: int) -> None:
        """Remove what comes after this step."""
        self.close()
        for name in FILES if self._writes else ():
            path = self._folder / f"{name}.jsonl"
            # The validation pass after the last counted step is done again: it may have been cut off.
            kept = [
                line
                for line in read_log(path)
                if line["step"] < step or (line["step"] == step and name != "samples" and "val_loss" not in line)
            ]
            with atomic_writer(path, binary=True) as handle:
                handle.writelines(orjson.dumps(line) + b"\n" for line in kept)
            with _named(path):
                self._handles[name] = path.open("ab")

    def add(self, name: str, line: dict[str, Any]) -> None:
        """Append one line, which must have a "step"."""
        if name in self._handles:
            handle = self._handles[name]
            with _named(Path(handle.name)):
                handle.write(orjson.dumps(line) + b"\n")

    def flush(self) -> None:
        """Put everything on disk; called before a checkpoint claims these steps."""
        for handle in self._handles.values():
            with _named(Path(handle.name)):
                handle.flush()
                os.fsync(handle.fileno())

    def close(self) -> None:
        """Flush and close, all of them, whichever fails."""
        handles, self._handles = self._handles, {}
        with contextlib.ExitStack() as stack:
            for handle in handles.values():
                stack.callback(_close, handle)


def _close(handle: IO[bytes]) -> None:
    with _named(Path(handle.name)):
        try:
            handle.flush()
            os.fsync(handle.fileno())
        finally:
            handle.close()


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Within this block an error of the system says which file could not be written."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last line cut short by a kill is left out."""
    if not path.is_file():
        return []
    lines = []
    for raw in path.read_bytes().splitlines():
        try:
            lines.append(orjson.loads(raw))
        except orjson.JSONDecodeError:
            break
    return lines
