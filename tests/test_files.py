"""Files appear whole or not at all: also when the writer fails, is killed, or the disk is full."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from groundup.errors import ArtifactError, GroundupError
from groundup.files import (
    atomic_folder,
    atomic_writer,
    clear_folder,
    file_digest,
    own_folder,
    read_json,
    remove_partials,
    value_digest,
    write_json,
    write_text,
)

pytestmark = pytest.mark.faults

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


class Stop(Exception):
    """A failure in the middle of writing."""


def write_half_a_file(target: Path, failure: type[BaseException] = Stop) -> None:
    with atomic_writer(target) as handle:
        handle.write("half of the n")
        raise failure


def write_half_a_folder(target: Path) -> None:
    with atomic_folder(target) as folder:
        (folder / "weights").write_text("ne")
        raise Stop


def names(folder: Path) -> list[str]:
    """What is in a folder, but for our mark."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".groundup-folder")


def test_nothing_is_under_the_name_until_the_writer_is_done(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "file.bin"
    with atomic_writer(target, binary=True) as handle:
        handle.write(b"\x00\xff" * 1000)
        handle.flush()
        assert not target.exists()
    assert target.read_bytes() == b"\x00\xff" * 1000
    assert names(target.parent) == ["file.bin"]


@pytest.mark.parametrize("failure", [Stop, KeyboardInterrupt, SystemExit])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, failure: type[BaseException]) -> None:
    target = tmp_path / "file.txt"
    write_text(target, "old")
    with pytest.raises(failure):
        write_half_a_file(target, failure)
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_text_is_utf8_with_plain_line_ends(tmp_path: Path) -> None:
    write_text(tmp_path / "file.txt", "Größe\n→\n")
    assert (tmp_path / "file.txt").read_bytes() == b"Gr\xc3\xb6\xc3\x9fe\n\xe2\x86\x92\n"


ENDLESS_WRITER = """
import sys
from pathlib import Path
from groundup.files import write_text
target, turn = Path(sys.argv[1]), 0
while True:
    turn += 1
    write_text(target, str(turn % 10) * 300_000)
"""


def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    own_folder(tmp_path)
    target = tmp_path / "file.txt"
    for more in (0.0, 0.013, 0.031):
        target.unlink(missing_ok=True)
        writer = subprocess.Popen([sys.executable, "-c", ENDLESS_WRITER, str(target)])
        try:
            while not target.exists():
                assert writer.poll() is None, "the writer ended by itself"
                time.sleep(0.001)
            time.sleep(more)
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        text = target.read_text()
        assert len(text) == 300_000
        assert set(text) == {text[0]}
    remove_partials(tmp_path)
    assert names(tmp_path) == ["file.txt"]


FULL_DISK = """
import sys
from pathlib import Path
from groundup.errors import GroundupError
from groundup.files import atomic_folder, write_text
disk = Path(sys.argv[1])
write_text(disk / "file.txt", "old")
def fill_a_folder():
    with atomic_folder(disk / "folder") as folder:
        (folder / "part").write_text("x" * 1_000_000)
for write in (lambda: write_text(disk / "file.txt", "x" * 1_000_000), fill_a_folder):
    try:
        write()
    except GroundupError as error:
        print(error.message, "|", error.fix)
print(sorted(path.name for path in disk.iterdir()), (disk / "file.txt").read_text())
"""


def test_a_full_disk_is_named_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    script = 'mount -t tmpfs -o size=128k tmpfs "$0" && exec "$@"'
    try:
        probe = subprocess.run([*mounted, script, str(disk), "true"], capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs unshare (util-linux) to make a small disk")
    if probe.returncode:
        pytest.skip(f"needs the right to mount a small disk: {probe.stderr.decode().strip()}")
    writer = [sys.executable, "-c", FULL_DISK, str(disk)]
    lines = subprocess.run([*mounted, script, str(disk), *writer], capture_output=True, text=True, check=True).stdout
    of_file, of_folder, left = lines.splitlines()
    assert "file.txt: the disk is full" in of_file
    assert "another disk" in of_file
    assert "folder: the disk is full" in of_folder
    assert left == "['file.txt'] old"


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way of a folder")
    with pytest.raises(GroundupError, match=r"file/inside\.json"):
        write_json(tmp_path / "file" / "inside.json", {})
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_forbidden_folder_is_named_with_a_way_out(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(GroundupError, match="cannot be written") as raised:
            write_text(tmp_path / "file.txt", "x")
    finally:
        tmp_path.chmod(0o700)
    assert "--runs" in (raised.value.fix or "")


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for content in ("old", "new"):
        with atomic_folder(target) as folder:
            (folder / content).write_text(content)
            assert not (target / content).exists()
    assert names(target) == ["new"]
    assert names(tmp_path) == ["model"]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as folder:
        (folder / "weights").write_text("old")
    with pytest.raises(Stop):
        write_half_a_folder(target)
    assert (target / "weights").read_text() == "old"
    assert names(tmp_path) == ["model"]


ENDLESS_FOLDER_WRITER = """
import sys
from pathlib import Path
from groundup.files import atomic_folder
turn = 0
while True:
    turn += 1
    with atomic_folder(Path(sys.argv[1])) as folder:
        for part in range(40):
            (folder / f"part-{part}").write_text(str(turn))
"""


def test_a_folder_whose_writer_is_killed_is_never_half(tmp_path: Path) -> None:
    own_folder(tmp_path)
    target = tmp_path / "model"
    for more in (0.003, 0.011, 0.017, 0.029):
        writer = subprocess.Popen([sys.executable, "-c", ENDLESS_FOLDER_WRITER, str(target)])
        try:
            while not (target / "part-0").exists():
                assert writer.poll() is None, "the writer ended by itself"
            time.sleep(more)
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        remove_partials(tmp_path)
        assert names(tmp_path) in ([], ["model"])
        if target.exists():
            assert len(names(target)) == 40
            assert len({(target / name).read_text() for name in names(target)}) == 1


def test_the_old_folder_is_whole_until_the_new_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Removing the old folder takes time; whoever looks (or kills) meanwhile must not find it half removed."""
    target = tmp_path / "model"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("old")
        (folder / "b").write_text("old")
    seen = []
    unlink = os.unlink

    def watching_unlink(path: object, **options: object) -> None:
        unlink(path, **options)  # type: ignore[arg-type]
        seen.append({name: (target / name).read_text() for name in names(target)} if target.exists() else None)

    monkeypatch.setattr(os, "unlink", watching_unlink)
    with atomic_folder(target) as folder:
        (folder / "a").write_text("new")
        (folder / "b").write_text("new")
    old, new = {"a": "old", "b": "old"}, {"a": "new", "b": "new"}
    assert seen, "nothing was removed: this test watches the wrong function"
    assert all(state in (old, new) for state in seen), seen


def test_leftovers_are_cleared_at_any_depth_of_our_folders_and_nothing_else(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "deep", tmp_path / "deep" / "er"):
        own_folder(folder)
    (tmp_path / "keep.txt").write_text("keep")
    with atomic_writer(tmp_path / "deep" / "er" / "file"), atomic_folder(tmp_path / "model"):
        (file_name,) = (path for path in (tmp_path / "deep" / "er").iterdir() if path.name.startswith("file"))
        (folder_name,) = (path for path in tmp_path.iterdir() if path.name.startswith("model"))
    (tmp_path / "deep" / "er" / "file").unlink()
    clear_folder(tmp_path / "model")
    # Now as a killed process would have left them:
    file_name.write_text("half")
    own_folder(folder_name)
    (folder_name / "inner").mkdir()
    (folder_name / "inner" / file_name.name).write_text("nested")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / file_name.name).write_text("not in a folder of ours")
    remove_partials(tmp_path)
    assert names(tmp_path) == ["deep", "keep.txt", "theirs"]
    assert names(tmp_path / "deep" / "er") == []
    assert names(tmp_path / "theirs") == [file_name.name]


@given(json_values)
def test_json_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert read_json(path) == value


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe{}", b"{'a': 1}", b"[" * 100_000])
def test_damaged_json_is_named_with_a_way_out(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "stage.json"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"stage\.json: not valid JSON") as raised:
        read_json(path)
    assert "--from" in (raised.value.fix or "")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to(path)])
def test_what_is_no_file_is_never_waited_for(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "stage.json")
    with pytest.raises(ArtifactError, match=r"stage\.json: (is|cannot be read)"):
        read_json(tmp_path / "stage.json")


def test_a_file_that_cannot_be_read_is_no_fault_of_the_one_being_written(tmp_path: Path) -> None:
    with pytest.raises(GroundupError, match="gone: cannot be read"), atomic_writer(tmp_path / "out") as handle:
        handle.write((tmp_path / "gone").read_text())


def test_missing_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"gone\.json: not found"):
        read_json(tmp_path / "gone.json")


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (2 << 20) + 3])
def test_a_files_digest_is_that_of_its_bytes(tmp_path: Path, size: int) -> None:
    content = bytes(index * 31 % 251 for index in range(size))
    (tmp_path / "file").write_bytes(content)
    assert file_digest(tmp_path / "file") == xxhash.xxh3_128_hexdigest(content)


@given(st.dictionaries(st.text(), json_values, min_size=2, max_size=5), st.randoms())
def test_a_values_digest_knows_no_key_order(value: dict[str, object], random: object) -> None:
    keys = list(value)
    random.shuffle(keys)  # type: ignore[attr-defined]
    assert value_digest({key: value[key] for key in keys}) == value_digest(value)


@given(json_values, json_values)
def test_digests_are_equal_only_for_equal_values(one: object, other: object) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (value_digest(one) == value_digest(other)) == same


def test_half_a_character_has_a_digest_too() -> None:
    assert value_digest({"a": "\ud800"}) != value_digest({"a": "?"})
