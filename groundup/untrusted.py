"""Files from outside: opened only inside their folder, read only up to a size, parsed strictly.

A model's folder comes from the network as often as from a run. Nothing in it is trusted: no path that leads out of it,
no JSON that says the same name twice, no file that is larger than such a file can be.
"""

from __future__ import annotations

import contextlib
import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from pydantic_core import ValidationError

from groundup.errors import ArtifactError, GroundupError

MOST_CONFIG_BYTES = 16 * 2**20
"""A configuration has a few thousand, an index of a hundred thousand tensors the half."""

MOST_JSON_BYTES = 256 * 2**20
"""A tokenizer of a million entries with its merges has a tenth of it."""


def file_inside(folder: Path, name: str) -> Path:
    """The path of a file of a folder.

    A link may lead to another file of the folder, or, in the Hub's cache, from `snapshots/REVISION/` to `blobs/`.

    Args:
        folder: of the model.
        name: of the file, as another file may have named it.

    Raises:
        ArtifactError: the name is a path, or leads out of the folder by a link; or it is no ordinary file.
    """
    if name in ("", ".", "..") or any(mark in name for mark in ("/", "\\", "\0")) or Path(name).is_absolute():
        raise ArtifactError(
            f"{folder}: names the file {name!r:.80}, which is not in the folder.",
            "A model's files stand side by side; do not trust the source of this folder.",
        )
    path = folder / name
    try:
        real, home = path.resolve(strict=True), folder.resolve(strict=True)
        mode = real.stat().st_mode
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: not found.") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}).") from error
    is_cached = home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"
    if not (real.is_relative_to(home) or is_cached):
        raise ArtifactError(
            f"{path}: is a link that leads out of its folder.", "Put the file itself there, if you trust it."
        )
    if not stat.S_ISREG(mode):
        raise ArtifactError(f"{path}: is not an ordinary file.")
    return path


def ordinary_file(path: Path, kind: type[GroundupError] = ArtifactError) -> Path:
    """The path itself, if a file of bytes stands there: a pipe or a device would be read for ever.

    Raises:
        kind: it is something else, or cannot be looked at.
    """
    with reading(str(path), kind):
        mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise kind(f"{path}: is a folder." if stat.S_ISDIR(mode) else f"{path}: is not an ordinary file.")
    return path


@contextlib.contextmanager
def reading(source: str, kind: type[GroundupError] = ArtifactError, fix: str | None = None) -> Iterator[None]:
    """Turn whatever a library throws while it reads `source` into an error of ours that names it.

    Args:
        source: the file, and the place in it if known.
        kind: the class of the error.
        fix: the way out.

    Raises:
        kind: something was thrown that is neither an error of ours nor a wish to stop.
    """
    try:
        yield
    except (GroundupError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except FileNotFoundError as error:
        raise kind(f"{source}: not found.", fix) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise kind(f"{source}{f', {place}' if place else ''}: {first['msg'][:200]}.", fix) from error
    except BaseException as error:  # a panic of a Rust library is no Exception
        what = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        raise kind(f"{source}: cannot be read ({what[:200]}).", fix) from error


def read_bytes(path: Path, most: int = MOST_JSON_BYTES) -> bytes:
    """A whole file that is not larger than `most` bytes.

    Raises:
        ArtifactError: it is, or cannot be read.
    """
    with reading(str(path)), ordinary_file(path).open("rb") as handle:
        contents = handle.read(most + 1)
    if len(contents) > most:
        raise ArtifactError(f"{path}: is larger than {most:,} bytes, which no such file is.")
    return contents


def read_object(path: Path, most: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file of not more than `most` bytes; in memory it may take twenty times as much.

    Raises:
        ArtifactError: too large, not JSON, or not an object.
    """
    return parse_object(read_bytes(path, most), str(path))


def parse_object(contents: bytes, source: str) -> dict[str, Any]:
    """A JSON object, strictly: no name twice in an object, no NaN or Infinity, no lone surrogate.

    Raises:
        ArtifactError: it is something else.
    """
    try:
        value = json.loads(contents.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant)
        if b"\\ud" in contents.lower():  # half a character, which no file of ours could hold
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError
        raise ArtifactError(f"{source}: not valid JSON ({str(error)[:200]}).") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{source}: is a JSON {type(value).__name__}, not an object.")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {twice!r:.80} stands twice in one object")
    return found


def _no_constant(value: str) -> NoReturn:
    raise ValueError(f"{value} is no number of JSON")
