"""Other programs' files: there and back without a changed byte, and every damage refused by name."""

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lengths import examples
from shards_bytes import stream_of, written

from groundup.errors import ArtifactError, DataError, GroundupError
from groundup.recipe import ShardsSettings
from groundup.shards import TokenShards, export_shards, import_ids, verify_shards
from groundup.tokenizer import Tokenizer

SMALL = ShardsSettings(shard_tokens=1024)
TEXTS = ["alpha " * n for n in range(1, 40)] + ["a long one " * 300, "", "ω€😀"]
HELD_OUT = ["held out", "", "and more"]
texts_lists = st.lists(st.text(max_size=300), min_size=1, max_size=6)


def binaries(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".bin", ".idx")}


def documents_of(folder: Path, split: str = "train") -> list[list[int]]:
    return [ids.tolist() for ids in TokenShards.open(folder, split).documents()]


def llmc_file(path: Path, ids: Sequence[int], wide: bool = False) -> Path:
    """By hand, from the description of the format."""
    header = [20240801, 7, len(ids)] if wide else [20240520, 1, len(ids)]
    body = struct.pack(f"<{len(ids)}{'I' if wide else 'H'}", *ids)
    path.write_bytes(struct.pack("<256i", *header, *[0] * 253) + body)
    return path


def megatron_files(
    folder: Path, sequences: Sequence[Sequence[int]], borders: Sequence[int], code: int = 8, letter: str = "H"
) -> Path:
    """By hand: sequences, and the numbers of sequences at which documents end, 0 first."""
    sizes = [len(sequence) for sequence in sequences]
    width = struct.calcsize(letter)
    pointers = [sum(sizes[:number]) * width for number in range(len(sizes))]
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    index += struct.pack("<Q", len(sizes)) + struct.pack("<Q", len(borders))
    index += struct.pack(f"<{len(sizes)}i", *sizes) + struct.pack(f"<{len(sizes)}q", *pointers)
    index += struct.pack(f"<{len(borders)}q", *borders)
    (folder / "mine.idx").write_bytes(index)
    (folder / "mine.bin").write_bytes(
        b"".join(struct.pack(f"<{len(sequence)}{letter}", *sequence) for sequence in sequences)
    )
    return folder / "mine"


# --- there and back


@settings(max_examples=examples(12))
@given(texts=texts_lists, held_out=st.lists(st.text(max_size=30), max_size=2), wide=st.booleans())
@pytest.mark.parametrize("format", ["nanogpt", "megatron"])
def test_exported_and_imported_again_are_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, format: str, texts: list[str], held_out: list[str], wide: bool
) -> None:
    folder = tmp_path_factory.mktemp("convert")
    # Two ids of 16 bits of which the second is zero are also one of 32; such a file is refused until it is named.
    texts, held_out = ["ab", *texts], held_out and ["ab", *held_out]
    vocab_size = 70_000 if wide and format != "nanogpt" else 257
    written(folder / "mine", texts, held_out, vocab_size=vocab_size)
    for path in export_shards(folder / "mine", folder / "theirs", format):
        assert path.is_file()
    given = "uint16" if format == "nanogpt" else None  # texts of one letter look like wider ids
    again = folder / "again"
    done = import_ids(folder / "theirs", again, format=given, end_of_text_id=0, vocab_size=vocab_size, settings=SMALL)
    assert done.format == (given or format)  # told from the files
    assert not any("closed" in note or "empty" in note for note in done.notes)
    assert binaries(folder / "again") == binaries(folder / "mine")
    assert verify_shards(folder / "again").faults == ()


@given(documents=st.lists(st.lists(st.integers(1, 60_000), max_size=40), min_size=1, max_size=8))
def test_llmc_documents_begin_with_end_of_text(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]
) -> None:
    """As llm.c and modded-nanogpt write it: end-of-text (here 50256) before each document."""
    folder = tmp_path_factory.mktemp("llmc")
    documents = [[index for index in document if index != 50256] for document in documents]
    stream = [index for document in documents for index in (50256, *document)]
    theirs = llmc_file(folder / "mine_train_000000.bin", stream)
    done = import_ids(theirs, folder / "shards", end_of_text_id=50256, settings=ShardsSettings())
    assert documents_of(folder / "shards") == [[*document, 50256] for document in documents]
    assert any("before each document" in note for note in done.notes)


# --- the layouts, read by hand


def test_the_megatron_layout(tmp_path: Path) -> None:
    written(tmp_path / "narrow", TEXTS, HELD_OUT)
    written(tmp_path / "wide", TEXTS, HELD_OUT, vocab_size=70_000)
    for name, code, letter, shift in (("narrow", 8, "H", 1), ("wide", 4, "i", 69_744)):
        export_shards(tmp_path / name, tmp_path / f"{name}-out", "megatron")
        index = (tmp_path / f"{name}-out" / "train_text_document.idx").read_bytes()
        body = (tmp_path / f"{name}-out" / "train_text_document.bin").read_bytes()
        assert index[:9] == b"MMIDIDX\x00\x00"
        assert struct.unpack("<Q", index[9:17]) == (1,)
        assert index[17] == code
        n_sequences, n_borders = struct.unpack("<QQ", index[18:34])
        assert (n_sequences, n_borders) == (len(TEXTS), len(TEXTS) + 1)
        sizes = struct.unpack(f"<{n_sequences}i", index[34 : 34 + 4 * n_sequences])
        pointers = struct.unpack(f"<{n_sequences}q", index[34 + 4 * n_sequences : 34 + 12 * n_sequences])
        borders = struct.unpack(f"<{n_borders}q", index[34 + 12 * n_sequences :])
        assert list(borders) == list(range(len(TEXTS) + 1))
        for text, size, pointer in zip(TEXTS, sizes, pointers, strict=True):
            assert list(struct.unpack_from(f"<{size}{letter}", body, pointer)) == stream_of([text], shift)
        assert len(body) == sum(sizes) * struct.calcsize(letter)


def test_the_nanogpt_layout(tmp_path: Path) -> None:
    written(tmp_path / "mine", TEXTS, HELD_OUT)
    train, val = export_shards(tmp_path / "mine", tmp_path / "out", "nanogpt")
    assert (train.name, val.name) == ("train.bin", "val.bin")
    with pytest.raises(GroundupError, match=r"train\.bin: is there already"):
        export_shards(tmp_path / "mine", tmp_path / "out", "nanogpt")
    export_shards(tmp_path / "mine", tmp_path / "out", "nanogpt", force=True)
    assert np.memmap(train, dtype=np.uint16, mode="r").tolist() == stream_of(TEXTS)
    assert np.memmap(val, dtype=np.uint16, mode="r").tolist() == stream_of(HELD_OUT)


# --- reading what others wrote


@given(
    documents=st.lists(st.lists(st.integers(1, 100), min_size=1, max_size=20), min_size=1, max_size=8),
    kind=st.sampled_from([(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (8, "H")]),
    closed=st.booleans(),
    data=st.data(),
)
def test_megatron_documents_of_any_type_of_ids(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[int]],
    kind: tuple[int, str],
    closed: bool,
    data: st.DataObject,
) -> None:
    """Documents may have several sequences, and may or may not be closed by end-of-text."""
    folder = tmp_path_factory.mktemp("megatron")
    sequences: list[list[int]] = []
    borders = [0]
    for document in documents:
        whole = [*document, 0] if closed else document
        cut = data.draw(st.integers(0, len(whole)))
        sequences += [whole[:cut], whole[cut:]]
        borders.append(len(sequences))
    prefix = megatron_files(folder, sequences, borders, *kind)
    done = import_ids(prefix, folder / "out", end_of_text_id=0)
    assert documents_of(folder / "out") == [[*document, 0] for document in documents]
    assert any("not closed by end-of-text" in note for note in done.notes) != closed


def test_megatron_documents_without_an_end_of_text(tmp_path: Path) -> None:
    prefix = megatron_files(tmp_path, [[1, 2], [], [3]], [0, 1, 2, 3])
    done = import_ids(prefix, tmp_path / "out")
    assert documents_of(tmp_path / "out") == [[1, 2], [3]]
    assert done.manifest.end_of_text_id is None
    assert "empty documents, left out: 1" in done.notes
    assert verify_shards(tmp_path / "out").faults == ()


def test_nanogpt_files(tmp_path: Path) -> None:
    np.array([5, 6, 9, 7, 9, 9, 8], dtype="<u2").tofile(tmp_path / "train.bin")
    np.array([5, 9], dtype="<u2").tofile(tmp_path / "val.bin")
    done = import_ids(tmp_path, tmp_path / "out", end_of_text_id=9)
    assert documents_of(tmp_path / "out") == [[5, 6, 9], [7, 9], [9], [8, 9]]
    assert documents_of(tmp_path / "out", "validation") == [[5, 9]]
    assert "documents not closed by end-of-text, which got one: 1" in done.notes
    assert done.manifest.vocab_size == 10

    done = import_ids(tmp_path / "train.bin", tmp_path / "whole")
    assert documents_of(tmp_path / "whole") == [[5, 6, 9, 7, 9, 9, 8]]
    assert any("each file is one document" in note for note in done.notes)
    assert any("no validation split" in note for note in done.notes)

    import_ids(tmp_path / "train.bin", tmp_path / "named", validation=tmp_path / "val.bin", end_of_text_id=9)
    assert documents_of(tmp_path / "named", "validation") == [[5, 9]]


@pytest.mark.parametrize("dtype", ["uint32", "int64"])
@pytest.mark.parametrize("largest", [100_000, 50_000, 9])
def test_raw_ids_wider_than_nanogpts_are_refused_until_their_width_is_said(
    tmp_path: Path, dtype: str, largest: int
) -> None:
    ids = [largest, 2, 3] * 40
    np.array(ids, dtype=dtype).tofile(tmp_path / "train.bin")
    with pytest.raises(ArtifactError, match=r"train\.bin: .*as if wider ids were cut.*\n.*--format uint32 or int64"):
        import_ids(tmp_path, tmp_path / "out")
    done = import_ids(tmp_path, tmp_path / "out", format=dtype)
    assert (done.format, documents_of(tmp_path / "out")) == (dtype, [ids])


def test_wide_ids_that_are_all_large_are_asked_about_too(tmp_path: Path) -> None:
    ids = np.random.default_rng(1).integers(99_000, 151_000, 500)  # as Chinese text has with Qwen's tokenizer
    ids.astype("<u4").tofile(tmp_path / "train.bin")
    with pytest.raises(ArtifactError, match="as if wider ids were cut"):
        import_ids(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("dtype", ["<i4", "<i8", ">u4"])
def test_a_few_negative_ids_or_turned_bytes_do_not_hide_the_width(tmp_path: Path, dtype: str) -> None:
    ids = np.array([*range(1, 1000), *([-1] * 10 if "i" in dtype else [])], dtype=dtype)
    ids.tofile(tmp_path / "train.bin")
    with pytest.raises(ArtifactError, match="as if wider ids were cut"):
        import_ids(tmp_path, tmp_path / "out")


def test_floats_that_are_called_ids_are_more_than_any_vocabulary(tmp_path: Path) -> None:
    np.arange(100, dtype="<f4").tofile(tmp_path / "train.bin")
    with pytest.raises(ArtifactError, match="more than any vocabulary has"):
        import_ids(tmp_path, tmp_path / "out", format="uint32")


@given(ids=st.lists(st.integers(1, 60_000), min_size=64, max_size=200), narrow=st.booleans())
def test_ids_of_16_bits_are_not_asked_about(
    tmp_path_factory: pytest.TempPathFactory, ids: list[int], narrow: bool
) -> None:
    ids = [*(index % 80 + 1 if narrow else index for index in ids), 70, 79]
    folder = tmp_path_factory.mktemp("narrow")
    np.array([*ids, *ids[1:]], dtype="<u2").tofile(folder / "train.bin")  # each id stands in an even and an odd place
    import_ids(folder / "train.bin", folder / "out")
    assert documents_of(folder / "out") == [[*ids, *ids[1:]]]


@pytest.mark.parametrize("name", ["ids.npy", "train.bin"])
@pytest.mark.parametrize("dtype", ["<u2", ">i4", "<i8"])
def test_arrays_of_numpy_are_read_by_their_header(tmp_path: Path, name: str, dtype: str) -> None:
    rows = np.array([[1, 2, 0], [3, 4, 0]], dtype=dtype)
    for array, options, expected in (
        (rows, {}, rows.tolist()),
        (np.asfortranarray(rows), {}, rows.tolist()),
        (rows, {"join_rows": True}, rows.tolist()),
        (rows.ravel(), {}, rows.tolist()),
        (rows[:, 0], {}, [[1, 3, 0]]),
    ):
        with (tmp_path / name).open("wb") as handle:
            np.save(handle, array)
        import_ids(tmp_path / name, tmp_path / "out", end_of_text_id=0, **options)
        assert documents_of(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.array([[[1]]]), "1×1×1 values of int64"),
        (np.array([1.5]), "1 values of float64"),
        (np.array(["x", None], dtype=object), "Array can't be memory-mapped"),
    ],
)
def test_arrays_that_hold_no_ids_are_refused(tmp_path: Path, array: np.ndarray, said: str) -> None:
    np.save(tmp_path / "ids.npy", array)
    with pytest.raises(ArtifactError, match=rf"ids\.npy: .*{said}"):
        import_ids(tmp_path / "ids.npy", tmp_path / "out")


@pytest.mark.parametrize("mask", [pa.list_(pa.int8()), pa.list_(pa.bool_())])
def test_what_a_mask_masks_is_left_out(tmp_path: Path, mask: pa.DataType) -> None:
    rows = [[1, 2, 9, 9], [3, 4, 5, 9], [9, 9, 9, 9], [9, 9, 6, 7]]
    masks = [[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 1, 1]]
    table = pa.table({"input_ids": rows, "attention_mask": pa.array(masks).cast(mask)})
    pq.write_table(table, tmp_path / "ids.parquet", row_group_size=3)
    done = import_ids(tmp_path / "ids.parquet", tmp_path / "out")
    assert documents_of(tmp_path / "out") == [[1, 2], [3, 4, 5], [6, 7]]
    assert "padding, left out as attention_mask says: 9 ids" in done.notes
    pq.write_table(pa.table({"ids": [[1, 2]], "attention_mask": [[1]]}), tmp_path / "ids.parquet")
    with pytest.raises(ArtifactError, match=r"ids\.parquet: the rows of column 'attention_mask' are not as long"):
        import_ids(tmp_path / "ids.parquet", tmp_path / "out")


def test_llmc_files_are_one_stream(tmp_path: Path) -> None:
    """Documents run over the borders of files, and GPT-2's end-of-text comes first."""
    (tmp_path / "theirs").mkdir()
    llmc_file(tmp_path / "theirs" / "fineweb_train_000001.bin", [50256, 1, 2])
    llmc_file(tmp_path / "theirs" / "fineweb_train_000002.bin", [3, 50256, 50256, 4])
    llmc_file(tmp_path / "theirs" / "fineweb_val_000000.bin", [50256, 5])
    done = import_ids(tmp_path / "theirs", tmp_path / "out", end_of_text_id=50256)
    assert documents_of(tmp_path / "out") == [[1, 2, 3, 50256], [50256], [4, 50256]]
    assert documents_of(tmp_path / "out", "validation") == [[5, 50256]]
    assert done.format == "llmc"
    assert not any("not closed" in note for note in done.notes)
    wide = llmc_file(tmp_path / "wide.bin", [128_000, 7, 8], wide=True)
    import_ids(wide, tmp_path / "wide", end_of_text_id=128_000)
    assert documents_of(tmp_path / "wide") == [[7, 8, 128_000]]
    assert TokenShards.open(tmp_path / "wide", "train").dtype == np.dtype("<u4")


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.uint16()), "fixed"])
def test_tables_of_ids(tmp_path: Path, kind: Any) -> None:
    rows = [[1, 2, 0], [3, 0], [0], [4, 5]]
    if kind == "fixed":
        rows = [[1, 2, 0], [3, 4, 5]]
        kind = pa.list_(pa.int64(), 3)
    table = pa.table({"text": ["x"] * len(rows), "input_ids": pa.array(rows, kind), "labels": pa.array(rows, kind)})
    expected = [[*row, 0] if row[-1] else row for row in rows]
    pq.write_table(table, tmp_path / "ids.parquet", row_group_size=2)
    import_ids(tmp_path / "ids.parquet", tmp_path / "a", end_of_text_id=0)
    assert documents_of(tmp_path / "a") == expected
    # As `datasets` saves to disk: Arrow streams, a folder for each split.
    for split, part in (("train", table), ("validation", table.slice(0, 1))):
        (tmp_path / "saved" / split).mkdir(parents=True)
        path = tmp_path / "saved" / split / "data-00000-of-00001.arrow"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(part, max_chunksize=2)
    import_ids(tmp_path / "saved", tmp_path / "b", end_of_text_id=0)
    assert documents_of(tmp_path / "b") == expected
    assert documents_of(tmp_path / "b", "validation") == expected[:1]
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    import_ids(tmp_path / "file.arrow", tmp_path / "c", end_of_text_id=0, column="labels")
    assert documents_of(tmp_path / "c") == expected


def test_rows_of_equal_length_can_be_joined(tmp_path: Path) -> None:
    """Many data sets are stored as pieces of one stream."""
    pq.write_table(pa.table({"tokens": [[1, 2, 3], [4, 0, 5], [6, 7, 0]]}), tmp_path / "ids.parquet")
    done = import_ids(tmp_path / "ids.parquet", tmp_path / "out", end_of_text_id=0, join_rows=True)
    assert documents_of(tmp_path / "out") == [[1, 2, 3, 4, 0], [5, 6, 7, 0]]
    assert not any("not closed" in note for note in done.notes)
    with pytest.raises(GroundupError, match="--join-rows: nothing says where documents end"):
        import_ids(tmp_path / "ids.parquet", tmp_path / "out", join_rows=True)


def test_null_rows_are_empty_documents(tmp_path: Path) -> None:
    pq.write_table(pa.table({"ids": pa.array([[1], None, [], [2]], pa.list_(pa.int64()))}), tmp_path / "ids.parquet")
    done = import_ids(tmp_path / "ids.parquet", tmp_path / "out")
    assert documents_of(tmp_path / "out") == [[1], [2]]
    assert "empty documents, left out: 2" in done.notes
    import_ids(tmp_path / "ids.parquet", tmp_path / "closed", end_of_text_id=0)
    assert documents_of(tmp_path / "closed") == [[1, 0], [0], [0], [2, 0]]


def test_with_the_tokenizer_everything_is_known(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["the stone by the river"] * 9, vocab_size=300)
    texts = ["the stone", "by the river €"]
    rows = [[*tokenizer.encode(text), tokenizer.end_of_text_id] for text in texts]
    pq.write_table(pa.table({"input_ids": rows}), tmp_path / "train.parquet")
    done = import_ids(tmp_path / "train.parquet", tmp_path / "out", tokenizer=tokenizer)
    shards = TokenShards.open(tmp_path / "out", "train", tokenizer_fingerprint=tokenizer.fingerprint)
    assert [tokenizer.decode(ids) for ids in shards.documents()] == texts
    assert shards.n_bytes == sum(len(text.encode()) for text in texts)
    assert done.manifest.provenance["format"] == "parquet"
    with pytest.raises(GroundupError, match="end-of-text id 9: the tokenizer's is 0"):
        import_ids(tmp_path / "train.parquet", tmp_path / "x", tokenizer=tokenizer, end_of_text_id=9)
    import_ids(tmp_path / "train.parquet", tmp_path / "unknown", end_of_text_id=0)
    with pytest.raises(ArtifactError, match="made with another tokenizer"):
        TokenShards.open(tmp_path / "unknown", "train", tokenizer_fingerprint=tokenizer.fingerprint)


def test_large_files_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from groundup.shards import external_formats

    draw = np.random.default_rng(0)
    ids = draw.integers(0, 30, 3000).astype("<u2")
    ids.tofile(tmp_path / "train.bin")
    ends = np.flatnonzero(ids == 0) + 1
    documents = [part.tolist() for part in np.split(ids, ends) if len(part)]
    prefix = megatron_files(tmp_path, documents, range(len(documents) + 1))
    monkeypatch.setattr(external_formats, "BLOCK_TOKENS", 64)
    for number, source in enumerate((tmp_path / "train.bin", prefix)):
        import_ids(source, tmp_path / str(number), end_of_text_id=0)
        found = documents_of(tmp_path / str(number))
        assert found[:-1] == documents[:-1]
        assert found[-1][: len(documents[-1])] == documents[-1]
    import_ids(tmp_path / "train.bin", tmp_path / "whole")
    assert documents_of(tmp_path / "whole") == [ids.tolist()]


# --- refusals


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    def refused(name: str, match: str, **options: Any) -> None:
        with pytest.raises(ArtifactError, match=match) as caught:
            import_ids(tmp_path / name, tmp_path / "out", **options)
        assert name.split(".")[0] in caught.value.message
        assert not (tmp_path / "out" / "manifest.json").exists()

    (tmp_path / "odd.bin").write_bytes(b"123")
    refused("odd.bin", "3 bytes, which is not a number of uint16 ids")
    refused("missing.bin", "not found")
    llmc_file(tmp_path / "cut.bin", [1, 2, 3])
    (tmp_path / "cut.bin").write_bytes((tmp_path / "cut.bin").read_bytes()[:-1])
    refused("cut.bin", "1,029 bytes instead of 1,030 for its 3 ids; cut off")
    (tmp_path / "raw.bin").write_bytes(b"\1\0\2\0")
    refused("raw.bin", "begins with magic 131073, version 0", format="llmc")
    (tmp_path / "text.parquet").write_bytes(b"PAR1 is not all")
    refused("text.parquet", "cannot be read")
    pq.write_table(pa.table({"text": ["x"], "a": [[1]], "b": [[2]]}), tmp_path / "columns.parquet")
    refused("columns.parquet", "more than one column of lists of integers")
    refused("columns.parquet", r"no column of lists of integers named 'text'.*text \(string\)", column="text")
    pq.write_table(pa.table({"ids": [[1, None]]}), tmp_path / "nulls.parquet")
    refused("nulls.parquet", "nulls")
    pq.write_table(pa.table({"ids": [list(range(5000))] * 9}), tmp_path / "flipped.parquet", compression="none")
    content = bytearray((tmp_path / "flipped.parquet").read_bytes())
    for place in range(4, 4000):  # pages and dictionary; the footer is whole
        content[place] ^= 0x55
    (tmp_path / "flipped.parquet").write_bytes(content)
    refused("flipped.parquet", "cannot be read")
    table = pa.table({"ids": [[1, 2, 3], [4, 5, 6]]})
    with pa.OSFile(str(tmp_path / "offsets.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    before, after = (np.array([0, middle, 6], dtype="<i4").tobytes() for middle in (3, 1 << 30))
    path = tmp_path / "offsets.arrow"
    path.write_bytes(path.read_bytes().replace(before, after))  # Arrow itself would end the process
    refused("offsets.arrow", "cannot be read")
    os.mkfifo(tmp_path / "pipe.bin")
    refused("pipe.bin", "not found|not an ordinary file")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "train.bin").symlink_to(tmp_path / "odd.bin")
    refused("linked", "train.bin: is a link that leads out of")
    (tmp_path / "less.bin").write_bytes(struct.pack("<256i", 20240520, 1, -12, *[0] * 253)[:1000])
    refused("less.bin", "1,000 bytes instead of 1,000 for its -12 ids")
    pq.write_table(pa.table({"ids": [[1, 1 << 40]]}), tmp_path / "huge.parquet")
    refused("huge.parquet", "ids up to 1,099,511,627,776, more than any vocabulary")
    pq.write_table(pa.table({"ids": [[1, -1]]}), tmp_path / "negative.parquet")
    refused("negative.parquet", "id number 1: -1, but the vocabulary has ids 0 to 1")
    np.array([5, 600], dtype="<u2").tofile(tmp_path / "large.bin")
    refused("large.bin", "id number 1: 600, but the vocabulary has ids 0 to 511", vocab_size=512)
    (tmp_path / "other.txt").write_text("x")
    refused("other.txt", "no file of ids that groundup knows")


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (0, b"X", "not an index of Megatron-LM's"),
        (9, b"\2", "not an index of Megatron-LM's"),
        (17, b"\7", "type 7, which is not an integer"),
        (18, b"\3", "bytes instead of"),
        (34, b"\7", "do not lie one after the other"),
        (34 + 4 * 2 + 8, b"\1", "do not lie one after the other"),
        (34 + 12 * 2, b"\1", "document borders"),
        (34 + 12 * 2 + 16, b"\1", "document borders"),
    ],
)
def test_a_damaged_megatron_index_is_refused(tmp_path: Path, place: int, value: bytes, said: str) -> None:
    megatron_files(tmp_path, [[1, 2, 0], [3, 0]], [0, 1, 2])
    data = bytearray((tmp_path / "mine.idx").read_bytes())
    data[place : place + 1] = value
    (tmp_path / "mine.idx").write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"mine\.idx: .*{said}"):
        import_ids(tmp_path / "mine.idx", tmp_path / "out", format="megatron")


def test_megatron_files_cut_off_are_refused(tmp_path: Path) -> None:
    prefix = megatron_files(tmp_path, [[1, 2, 0], [3, 0]], [0, 1, 2])
    for name in ("mine.bin", "mine.idx"):
        whole = (tmp_path / name).read_bytes()
        for length in range(len(whole)):
            (tmp_path / name).write_bytes(whole[:length])
            with pytest.raises(ArtifactError, match=rf"mine\.{name[-3:]}: "):
                import_ids(prefix, tmp_path / "out", format="megatron", end_of_text_id=0)
        (tmp_path / name).write_bytes(whole)
    (tmp_path / "mine.bin").unlink()
    with pytest.raises(ArtifactError, match=r"mine\.bin: not found"):
        import_ids(prefix, tmp_path / "out")


def test_options_that_contradict_are_refused(tmp_path: Path) -> None:
    np.array([5, 6], dtype="<u2").tofile(tmp_path / "train.bin")
    with pytest.raises(GroundupError, match="end-of-text id 9: the vocabulary has ids 0 to 7"):
        import_ids(tmp_path / "train.bin", tmp_path / "out", end_of_text_id=9, vocab_size=8)
    with pytest.raises(GroundupError, match="--format pt: unknown"):
        import_ids(tmp_path / "train.bin", tmp_path / "out", format="pt")
    with pytest.raises(GroundupError, match="the ids to import lie in it"):
        import_ids(tmp_path / "train.bin", tmp_path)
    (tmp_path / "empty.bin").write_bytes(b"")
    with pytest.raises(DataError, match="no ids for training"):
        import_ids(tmp_path / "empty.bin", tmp_path / "out")
    written(tmp_path / "shards", ["x"])
    with pytest.raises(ArtifactError, match="groundup's shards already"):
        import_ids(tmp_path / "shards", tmp_path / "out")


def test_exports_that_cannot_be_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "wide", TEXTS, vocab_size=70_000)
    with pytest.raises(GroundupError, match="do not fit in nanoGPT's uint16"):
        export_shards(tmp_path / "wide", tmp_path / "out", "nanogpt")
    with pytest.raises(GroundupError, match="--format csv: unknown"):
        export_shards(tmp_path / "wide", tmp_path / "out", "csv")
    data = bytearray((tmp_path / "wide" / "train-00001.bin").read_bytes())
    data[3] ^= 1
    (tmp_path / "wide" / "train-00001.bin").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"train-00001\.bin: damaged"):
        export_shards(tmp_path / "wide", tmp_path / "out", "megatron")
    assert not (tmp_path / "out").exists()
