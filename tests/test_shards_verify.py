"""`verify_shards` finds every kind of damage and names file and byte; `shard_stats` counts."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shards_bytes import stream_of, written

from groundup.errors import ArtifactError
from groundup.files import value_digest
from groundup.shards import shard_stats, verify_shards
from groundup.shards.format import ShardsManifest
from groundup.shards.stream import begin_shards

TEXTS = ["alpha " * n for n in range(1, 40)] + ["a long one " * 300, "", "ω€😀"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    written(tmp_path, TEXTS, validation=TEXTS[:9])
    return tmp_path


def resealed(folder: Path) -> None:
    """Make every checksum in the manifest fit the files as they are now."""
    import xxhash

    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    del values["checksum"]
    for split in values["splits"].values():
        for file in split["files"]:
            file["checksum"] = xxhash.xxh3_128_hexdigest((folder / file["name"]).read_bytes())
            file["index_checksum"] = xxhash.xxh3_128_hexdigest((folder / file["index_name"]).read_bytes())
    path.write_text(json.dumps({**values, "checksum": value_digest(values)}))


def change(path: Path, place: int, value: int, dtype: str) -> None:
    values = np.fromfile(path, dtype=dtype)
    values[place] = value
    values.tofile(path)


def test_good_shards_have_no_faults(folder: Path) -> None:
    found = verify_shards(folder)
    assert found.faults == ()
    assert found.files == len(list(folder.glob("*.bin"))) + len(list(folder.glob("*.idx")))
    assert found.tokens == len(stream_of(TEXTS)) + len(stream_of(TEXTS[:9]))
    assert found.documents == len(TEXTS) + 9


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda f: change(f / "train-00001.bin", 5, 257, "<u2"),
            "train-00001.bin, byte 10: id 257, but the vocabulary",
        ),
        (
            lambda f: change(f / "train-00000.idx", 3, 9, "<u8"),
            "train-00000.idx, byte 24: document end 9 does not follow 39",
        ),
        (
            lambda f: change(f / "validation-00000.idx", 8, 4096, "<u8"),
            "validation-00000.idx, byte 64: document end 4096 is not in the file's 279 tokens",
        ),
        (
            lambda f: change(f / "train-00000.bin", 6, 7, "<u2"),
            "train-00000.bin, byte 12: a document ends with id 7, not with end-of-text (0)",
        ),
        (
            lambda f: change(f / "validation-00000.idx", 8, 278, "<u8"),
            "validation-00000.idx: the last document is not closed at the stream's end",
        ),
    ],
)
def test_what_checksums_cannot_see_is_found(folder: Path, damage: Callable[[Path], None], said: str) -> None:
    """Written wrong, not damaged later: the checksums fit."""
    damage(folder)
    resealed(folder)
    faults = [str(fault) for fault in verify_shards(folder).faults]
    assert any(fault.startswith(f"{folder}/{said}") for fault in faults), faults
    assert not any("its checksum does not fit" in fault for fault in faults)


def test_every_fault_is_told_at_once(folder: Path) -> None:
    (folder / "train-00000.idx").unlink()
    path = folder / "train-00002.bin"
    path.write_bytes(path.read_bytes()[:-2])
    change(folder / "validation-00000.bin", 0, 9, "<u2")
    found = verify_shards(folder)
    assert [str(fault) for fault in found.faults] == [
        f"{folder / 'train-00000.idx'}: not found.",
        f"{path}, byte 2,046: 2,046 bytes instead of 2,048",
        f"{folder / 'validation-00000.bin'}: damaged, its checksum does not fit",
    ]


def test_without_a_manifest_nothing_can_be_judged(folder: Path) -> None:
    begin_shards(folder)
    with pytest.raises(ArtifactError, match=r"manifest\.json: not found"):
        verify_shards(folder)


# --- statistics


@given(texts=st.lists(st.text(alphabet="ab", max_size=70), min_size=1, max_size=60))
def test_the_distribution_of_lengths(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("stats")
    written(folder, texts, validation=[])
    lengths = sorted(len(text) + 1 for text in texts)
    found = shard_stats(folder)["splits"]["train"]["lengths"]
    assert (found["min"], found["max"]) == (lengths[0], lengths[-1])
    assert found["mean"] == pytest.approx(sum(lengths) / len(lengths))
    for percent in (1, 10, 50, 90, 99):  # the least length that so many documents do not exceed
        rank = max(1, -(-percent * len(lengths) // 100))
        assert found[f"p{percent}"] == lengths[rank - 1]
    assert found["histogram"] == [
        [low, 2 * low, count]
        for low in (1 << power for power in range(8))
        if (count := sum(low <= length < 2 * low for length in lengths))
    ]


def test_the_figures_of_a_folder(folder: Path) -> None:
    found = shard_stats(folder)
    json.dumps(found)
    train = found["splits"]["train"]
    n_bytes = sum(len(text.encode()) for text in TEXTS)
    assert (train["tokens"], train["documents"], train["text_bytes"]) == (n_bytes + len(TEXTS), len(TEXTS), n_bytes)
    assert train["bytes_per_token"] == 1.0
    on_disk = sum(path.stat().st_size for path in folder.glob("train-*"))
    assert train["size_bytes"] == on_disk
    assert train["sources"] == {"test": {"documents": len(TEXTS), "bytes": n_bytes, "tokens": train["tokens"]}}
    assert found["dtype"] == "uint16"
    assert found["provenance"]["settings"] == {"shard_tokens": 1024}
    assert found["version"] == ShardsManifest.read(folder).version == 2


def test_an_empty_split_has_no_lengths(tmp_path: Path) -> None:
    written(tmp_path, ["one"], validation=[])
    found = shard_stats(tmp_path)["splits"]["validation"]
    assert (found["tokens"], found["lengths"], found["bytes_per_token"]) == (0, {}, None)
