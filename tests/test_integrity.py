"""What was written down of files is held against them: the size always, the digest once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from groundup import integrity
from groundup.errors import ArtifactError
from groundup.files import own_folder
from groundup.integrity import FileRecords, check_files, record_files

NAMES = ("a.bin", "model/weights.bin")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    own_folder(tmp_path / "stage")
    (tmp_path / "stage" / "model").mkdir()
    for name in NAMES:
        (tmp_path / "stage" / name).write_bytes(name.encode() * 100)
    (tmp_path / "secret").write_bytes(b"s")
    return tmp_path / "stage"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)


def link(path: Path) -> None:
    path.rename(path.parents[2] / "elsewhere")
    path.symlink_to(path.parents[2] / "elsewhere")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip, "damaged or changed: its digest is"),
        (lambda path: os.truncate(path, 3), "3 bytes instead of 1,700"),
        (lambda path: path.unlink(), "not found"),
        (link, "is a link that leads out of its folder"),
        (pipe, "is not an ordinary file"),
    ],
)
def test_every_damage_is_named_with_a_way_out(folder: Path, damage: Callable[[Path], None], said: str) -> None:
    records = record_files(folder, NAMES)
    check_files(folder, records, "Make it again.")
    damage(folder / "model" / "weights.bin")
    with pytest.raises(
        ArtifactError, match=rf"model/weights\.bin: {said}.*\n(Make it again|Put the file itself there)"
    ):
        check_files(folder, records, "Make it again.")


@pytest.mark.parametrize("name", ["../secret", "model/../../secret", "/etc/passwd", "", "out/secret"])
def test_no_name_leads_out_of_the_folder(folder: Path, name: str) -> None:
    (folder / "out").symlink_to(folder.parent)
    with pytest.raises(ArtifactError, match=r"not in the folder|leads out"):
        check_files(folder, {name: (1, "0")}, "Make it again.")


def test_what_was_checked_is_read_again_only_when_it_was_touched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records, read = record_files(folder, NAMES), []
    digest = integrity.file_digest
    monkeypatch.setattr(integrity, "file_digest", lambda path: read.append(path.name) or digest(path))

    def check(expected: FileRecords = records, *, digests: bool = True) -> list[str]:
        read.clear()
        check_files(folder, expected, "Make it again.", digests=digests)
        return list(read)

    assert check(digests=False) == []
    assert check() == ["a.bin", "weights.bin"]
    assert check() == []
    before = (folder / "a.bin").stat()
    flip(folder / "a.bin")
    os.utime(folder / "a.bin", ns=(before.st_atime_ns, before.st_mtime_ns))  # as some tools that copy do
    assert check(digests=False) == []
    with pytest.raises(ArtifactError, match=r"a\.bin: damaged"):
        check()
    now = record_files(folder, NAMES)
    assert check(now) == ["a.bin"]
    (folder / ".checked.json").write_text("[")
    assert check(now) == ["a.bin", "weights.bin"]
