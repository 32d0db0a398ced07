"""Files that appear whole or not at all, and folders that groundup may remove.

Everything groundup writes goes to a temporary name in the target's folder, is flushed to disk
(fsync) and renamed: a reader, or a run killed at any moment, sees the old file or the new one, never half.

Nobody's files are lost: a folder is emptied, removed or replaced only if it carries our mark, the file
`.groundup-folder`, which is the first thing in it and the last to go. Links are never followed to remove something.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import functools
import json
import os
import re
import shutil
import tomllib
import uuid
from collections.abc import Collection, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import xxhash

from groundup.errors import ArtifactError, GroundupError, RunError
from groundup.untrusted import read_bytes

if TYPE_CHECKING:
    from torch import Tensor

MARK = ".groundup-folder"
_ABOUT = "groundup made this folder, and may empty or remove it. Keep nothing of your own in it.\n"
_PARTIAL, _REPLACED = ".groundup-partial-", ".groundup-replaced-"
_SUFFIXES = rf"(?:(?P<kind>{re.escape(_PARTIAL)}|{re.escape(_REPLACED)})[0-9a-f]{{16}})+"
_SIGNED = re.compile(r"groundup, ([0-9a-f]{32})\W*")
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM, errno.EROFS)


@contextlib.contextmanager
def atomic_writer(path: Path, *, binary: bool = False, through: Path | None = None) -> Iterator[IO[Any]]:
    """Open `path` for writing so that it appears whole on success and not at all on failure.

    Text is UTF-8 with `\\n` line ends.

    Args:
        path: the file.
        binary: whether bytes are written.
        through: the folder for what is not whole yet (default: the file's own); one of ours, where `path` lies in a
            folder that is not.

    Raises:
        GroundupError: the disk is full, or the folder cannot be written.
    """
    path = Path(path)
    partial = temporary((through or path.parent) / path.name)
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
            raise _failure(partial, path, error) from error
        raise


def write_error(path: Path | str, error: OSError) -> GroundupError:
    """Say in words why `path` could not be written; a temporary name gives way to the one it stands for."""
    path = re.sub(_SUFFIXES, "", str(path))
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return GroundupError(
            f"{path}: the disk is full; nothing half-written was left behind.",
            "Free some space, or choose a folder on another disk, then give the same command again.",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return GroundupError(f"{path}: cannot be written ({error.strerror}).", "Choose another folder.")
    return GroundupError(f"{path}: {error.strerror or error}")


def _failure(partial: Path, path: Path, error: OSError) -> GroundupError:
    """What went wrong while `path` was written as `partial`: a file that could not be read is no fault of these."""
    name = error.filename
    if isinstance(name, str) and not (name.startswith(str(partial)) or path.is_relative_to(name)):
        return GroundupError(f"{name}: cannot be read ({error.strerror}).")
    return write_error(path, error)


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


def write_text(path: Path, text: str, *, through: Path | None = None) -> None:
    """Write a UTF-8 text file whole; the arguments are those of `atomic_writer`."""
    with atomic_writer(path, through=through) as handle:
        handle.write(text)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file whole, keys in their order, two spaces of indent."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_signed(path: Path, text: str, comment: str, *, through: Path | None = None) -> None:
    """Write a text file whole whose last line says that it is ours, in the place of nothing but such a file.

    Args:
        path: the file.
        text: all but the last line.
        comment: how the file's language writes one, such as "# {}".
        through: see `atomic_writer`.

    Raises:
        RunError: what is there is somebody else's, or somebody has changed it.
        GroundupError: the disk is full, or the folder cannot be written.
    """
    check_signed(path)
    text += "" if text.endswith("\n") else "\n"
    digest = xxhash.xxh3_128_hexdigest(text.encode())
    write_text(path, text + comment.format(f"Written by groundup, {digest}") + "\n", through=through)


def check_signed(path: Path) -> None:
    """Hold that a file may be replaced: it is not there, or as `write_signed` wrote it.

    Raises:
        RunError: it is somebody else's, or somebody has changed it.
    """
    if not os.path.lexists(path):
        return
    with contextlib.suppress(OSError):
        *lines, last = path.read_bytes().splitlines(keepends=True) or [b""]
        found = _SIGNED.search(last.decode(errors="replace"))
        if not path.is_symlink() and found and found[1] == xxhash.xxh3_128_hexdigest(b"".join(lines)):
            return
    raise RunError(
        f"{path}: was not written by groundup, or was changed since. It is left as it is.",
        "Move it away, or choose another place with --out.",
    )


def read_json(path: Path) -> Any:
    """Read a JSON file that groundup wrote.

    Raises:
        ArtifactError: missing, no ordinary file, too large, or not JSON.
    """
    contents = read_bytes(Path(path))
    try:
        return json.loads(contents.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError
        raise ArtifactError(
            f"{path}: not valid JSON ({error}).", "The file is damaged: make it again with --from STAGE."
        ) from error


@functools.cache
def read_shipped(name: str) -> dict[str, Any]:
    """A table that ships with groundup, `groundup/data/NAME.toml`; not to be changed."""
    return tomllib.loads((resources.files("groundup") / "data" / f"{name}.toml").read_text(encoding="utf-8"))


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
    """Fill a new folder that appears under its name only when complete; it replaces one of ours, or an empty one.

    Killed between the two renames of a replacement, the old one is there under a temporary name, from which
    `remove_partials` takes it back.

    Raises:
        RunError: what is there is not ours.
        GroundupError: the disk is full, or the folder cannot be written.
    """
    path = Path(path)
    check_ours(path)
    partial, replaced = temporary(path), temporary(path, _REPLACED)
    try:
        partial.mkdir(parents=True)
        _mark(partial)
        yield partial
        for written in [*partial.rglob("*"), partial]:
            sync(written)
        # Renamed first: removing takes time, and a kill meanwhile must not leave half a folder under the name.
        if is_ours(path):
            path.replace(replaced)
        partial.replace(path)  # refused by the system if somebody has put something else there meanwhile
        sync(path.parent)
        remove_folder(replaced)
    except BaseException as error:
        with contextlib.suppress(OSError):  # else it is taken back by `remove_partials`
            if replaced.exists() and not path.exists():
                replaced.replace(path)
        with contextlib.suppress(OSError):
            _clear(partial)
        if isinstance(error, OSError):
            raise _failure(partial, path, error) from error
        raise


def is_ours(folder: Path) -> bool:
    """Whether groundup made this folder. A link is not ours, whatever it leads to."""
    return os.path.isfile(folder / MARK) and not os.path.islink(folder)


def check_ours(folder: Path) -> None:
    """Hold that groundup may write and remove in a folder: it is ours, empty, or not there.

    Raises:
        RunError: it is somebody else's.
    """
    if is_ours(folder) or not os.path.lexists(folder):
        return
    what = "holds files that groundup did not make"
    if folder.is_symlink():
        what = "is a link, and no folder that groundup made"
    elif not folder.is_dir():
        what = "is a file, and a folder is needed there"
    else:
        with contextlib.suppress(OSError):
            if not any(folder.iterdir()):
                return
    raise RunError(f"{folder}: {what}. It is left as it is.", "Move it away, or choose another place with --out.")


def own_folder(folder: Path) -> None:
    """Make a folder that carries our mark from its first moment, or mark an empty one.

    Raises:
        RunError: it is somebody else's.
        GroundupError: the disk is full, or the folder cannot be written.
    """
    check_ours(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not is_ours(folder):
            _mark(folder)
            sync(folder)
    except OSError as error:
        raise write_error(folder, error) from error


def _mark(folder: Path) -> None:
    (folder / MARK).write_text(_ABOUT, encoding="utf-8")  # the name alone counts: a kill before the text does no harm


def clear_folder(folder: Path, keeps: Collection[str] = ()) -> None:
    """Remove a folder of ours; or, with `keeps`, all that is in it but entries of these patterns.

    Raises:
        RunError: it is somebody else's.
        OSError: something cannot be removed; what is left is still marked.
    """
    check_ours(folder)
    if folder.is_dir():
        _clear(folder, keeps)


def _clear(folder: Path, keeps: Collection[str] = ()) -> None:
    for entry in list(folder.iterdir()):
        if entry.name == MARK or any(fnmatch.fnmatchcase(entry.name, keep) for keep in keeps):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)
    if not keeps:
        (folder / MARK).unlink(missing_ok=True)
        folder.rmdir()


def remove_folder(folder: Path) -> None:
    """Remove a folder of ours, as far as the system lets us; it loses its name first, so that nobody finds half of it.

    What is not ours stays.
    """
    with contextlib.suppress(OSError):
        if is_ours(folder):
            going = temporary(folder)
            folder.replace(going)
            _clear(going)


def remove_partials(folder: Path) -> None:
    """Clear what a killed process left under temporary names in a folder of ours, and in those of ours within it.

    A folder that was about to be replaced is taken back. A folder that is not ours is not even looked into.
    """
    if is_ours(folder):
        for entry in list(folder.iterdir()):
            if not _clear_leftover(entry):
                remove_partials(entry)


def _clear_leftover(entry: Path) -> bool:
    """Clear an entry with a temporary name, and say whether it has one."""
    found = re.fullmatch(rf"(?P<name>.+?){_SUFFIXES}", entry.name)
    if found is None:
        return False
    before = entry.with_name(found["name"])
    with contextlib.suppress(OSError, RunError):
        if not entry.is_dir() or entry.is_symlink():
            entry.unlink(missing_ok=True)
        elif found["kind"] == _REPLACED and not before.exists():
            entry.replace(before)
        else:
            clear_folder(entry)
    return True


def temporary(path: Path, kind: str = _PARTIAL) -> Path:
    """A new name beside `path`, by which `remove_partials` knows what a killed process left."""
    return path.with_name(f"{path.name}{kind}{uuid.uuid4().hex[:16]}")


def append_file(handle: IO[bytes], path: Path) -> None:
    """Copy the bytes of a file to the end of one that is being written."""
    with Path(path).open("rb") as source:
        shutil.copyfileobj(source, handle, 1 << 20)


def append_line(path: Path, line: bytes) -> None:
    """One whole line, behind whole lines: what a full disk or a kill left of the last one is ended first."""
    with path.open("a+b") as handle:
        size = handle.seek(0, os.SEEK_END)
        if size:
            handle.seek(size - 1)
            line = line if handle.read(1) == b"\n" else b"\n" + line
        handle.write(line + b"\n")
        handle.flush()
        os.fsync(handle.fileno())


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
    return xxhash.xxh3_128_hexdigest(canonical.encode(errors="surrogatepass"))
