"""Files that appear whole or not at all.

Everything groundup writes goes to a temporary name in the target's folder, is flushed to disk
(fsync) and renamed: a reader, or a run killed at any moment, sees the old file or the new one, never half.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import xxhash

from groundup.errors import ArtifactError, GroundupError

if TYPE_CHECKING:
    from torch import Tensor

PARTIAL_MARK = ".partial-"
_REPLACED = "-old"
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM, errno.EROFS)


@contextlib.contextmanager
def atomic_writer(path: Path, *, binary: bool = False) -> Iterator[IO[Any]]:
    """Open `path` for writing so that it appears whole on success and not at all on failure.

    Text is UTF-8 with `\\n` line ends.

    Raises:
        GroundupError: the disk is full, or the folder cannot be written.
    """
    path = Path(path)
    partial = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle: IO[Any] = partial.open("wb") if binary else partial.open("w", encoding="utf-8", newline="\n")
        with handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(path)
        sync(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise write_error(path, error) from error
        raise


def write_error(path: Path | str, error: OSError) -> GroundupError:
    """Say in words why `path` could not be written; a temporary name gives way to the one it stands for."""
    path = re.sub(rf"{re.escape(PARTIAL_MARK)}[0-9a-f]{{8}}", "", str(path))
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return GroundupError(
            f"{path}: the disk is full; nothing half-written was left behind.",
            "Free some space, or choose another folder with --runs, then give the same command again.",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return GroundupError(f"{path}: cannot be written ({error.strerror}).", "Choose another folder with --runs.")
    return GroundupError(f"{path}: {error.strerror or error}")


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, so that they survive a power cut (a no-op where unsupported).

    Raises:
        OSError: the disk is full or fails: what was written is not there.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file whole."""
    with atomic_writer(path) as handle:
        handle.write(text)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file whole, keys in their order, two spaces of indent."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file that groundup wrote.

    Raises:
        ArtifactError: missing, or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: not found.") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise ArtifactError(
            f"{path}: not valid JSON ({error}).", "The file is damaged: make it again with --from STAGE."
        ) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as a safetensors file; for use inside `atomic_folder`.

    Raises:
        GroundupError: the disk is full, or the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file  # loads torch, which not every command needs

    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        # safetensors puts the system's error into words; its number is what we need.
        number = re.search(r"os error (\d+)", str(error))
        raise write_error(path, OSError(int(number[1]) if number else 0, str(error))) from error


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Fill a new folder that appears under its name only when complete (an old one is replaced).

    Killed between the two renames of a replacement, the old one is there under a temporary name, from which
    `remove_partials` takes it back.

    Raises:
        GroundupError: the disk is full, or the folder cannot be written.
    """
    path = Path(path)
    partial = _temporary(path)
    old = partial.with_name(f"{partial.name}{_REPLACED}")
    try:
        partial.mkdir(parents=True)
        yield partial
        for written in [*partial.rglob("*"), partial]:
            sync(written)
        # Renamed first: removing takes time, and a kill meanwhile must not leave half a folder under the name.
        if path.exists():
            path.replace(old)
        partial.replace(path)
        sync(path.parent)
        if old.exists():
            old.replace(partial)  # what is half removed must not be taken for what is to be taken back
            shutil.rmtree(partial, ignore_errors=True)
    except BaseException as error:
        with contextlib.suppress(OSError):  # else it is taken back by `remove_partials`
            if old.exists() and not path.exists():
                old.replace(path)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise write_error(path, error) from error
        raise


def remove_folder(path: Path) -> None:
    """Remove a folder, as far as the system lets us; it loses its name first, so that nobody finds half of it."""
    going = _temporary(path)
    with contextlib.suppress(OSError):
        path.replace(going)
        shutil.rmtree(going, ignore_errors=True)


def remove_partials(folder: Path, *, deep: bool = True) -> None:
    """Clear what a killed process left under temporary names; a folder it was about to replace is taken back.

    Args:
        folder: where to look.
        deep: in its folders too, at any depth.
    """
    pattern = f"*{PARTIAL_MARK}*"
    for leftover in list(Path(folder).rglob(pattern) if deep else Path(folder).glob(pattern)):
        replaced = leftover.with_name(leftover.name.rpartition(PARTIAL_MARK)[0])
        if leftover.name.endswith(_REPLACED) and leftover.is_dir() and not replaced.exists():
            leftover.replace(replaced)
        elif leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}{PARTIAL_MARK}{uuid.uuid4().hex[:8]}")


def append_file(handle: IO[bytes], path: Path) -> None:
    """Copy the bytes of a file to the end of one that is being written."""
    with Path(path).open("rb") as source:
        shutil.copyfileobj(source, handle, 1 << 20)


def file_digest(path: Path) -> str:
    """The 128-bit xxh3 digest of a file's bytes, in hex."""
    digest = xxhash.xxh3_128()
    with Path(path).open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def value_digest(value: object) -> str:
    """The 128-bit xxh3 digest of a JSON-able value, independent of key order, in hex."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(canonical.encode())
