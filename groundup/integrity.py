"""Files that are still what was written down of them: the size always, the digest once.

Whoever finishes files records the size and the 128-bit xxh3 digest of each; whoever takes them checks. A check that
ended well is remembered beside the files by size, times and inode: what was not touched since is not read again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from groundup.errors import ArtifactError, GroundupError
from groundup.files import file_digest, is_ours, read_json, write_json
from groundup.untrusted import file_inside, reading

CHECKED = ".checked.json"
FileRecords = Mapping[str, tuple[int, str]]
"""By a file's name, relative to its folder: its size in bytes, and its digest."""


def record_files(folder: Path, names: Iterable[str]) -> FileRecords:
    """What is to be written down of files."""
    return {name: ((folder / name).stat().st_size, file_digest(folder / name)) for name in names}


def check_files(folder: Path, records: FileRecords, fix: str, *, digests: bool = True) -> None:
    """Hold that files are what was written down of them.

    Args:
        folder: in which they are.
        records: what was written down.
        fix: the way out where one is not.
        digests: compare digests too, unless that was done since the file was last touched.

    Raises:
        ArtifactError: a file is missing, damaged or changed, no ordinary file, or not in the folder.
    """
    checked = _checked(folder) if digests else {}
    news = {}
    for name, (size, digest) in records.items():
        try:
            path = _inside(folder, name)
        except ArtifactError as error:
            raise ArtifactError(error.message, error.fix or fix) from error
        with reading(str(path), fix=fix):
            found = path.stat()
            if found.st_size != size:
                raise ArtifactError(f"{path}: {found.st_size:,} bytes instead of {size:,}; cut off or changed.", fix)
            identity = [size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, digest]
            if digests and checked.get(name) != identity:
                if (now := file_digest(path)) != digest:
                    what = f"its digest is {now}, and was {digest} when it was made"
                    raise ArtifactError(f"{path}: damaged or changed: {what}.", fix)
                news[name] = identity
    if news and is_ours(folder):
        with contextlib.suppress(GroundupError, OSError):  # where nothing can be written, the next check reads again
            for left_by_a_kill in folder.glob(f"{CHECKED}.groundup-partial-*"):
                left_by_a_kill.unlink()
            write_json(folder / CHECKED, {**checked, **news})


def _checked(folder: Path) -> dict[str, list[int | str]]:
    try:
        found = read_json(folder / CHECKED) if (folder / CHECKED).is_file() else {}
    except (GroundupError, OSError):
        found = {}
    return found if isinstance(found, dict) else {}


def _inside(folder: Path, name: str) -> Path:
    place = PurePosixPath(name)
    if place.is_absolute() or ".." in place.parts:
        raise ArtifactError(f"{folder}: names the file {name!r:.80}, which is not in the folder.")
    for part in place.parts[:-1]:
        folder /= part
        if folder.is_symlink():
            raise ArtifactError(f"{folder}: is a link that leads out of its folder.")
    return file_inside(folder, place.name)
