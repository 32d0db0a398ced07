"""Shards on disk: the stream comes back whole, and every damage is found and named."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shards_bytes import ByteTokenizer, document, opened, stream_of, written

from groundup.corpus import Document
from groundup.errors import ArtifactError, DataError, GroundupError
from groundup.files import value_digest
from groundup.recipe import ShardsSettings
from groundup.shards import TokenShards, write_shards
from groundup.shards.write import largest_first
from groundup.tokenizer import Tokenizer

TEXTS = ["alpha " * n for n in range(1, 40)] + ["a long one " * 300, "", "ω€😀"]


@given(
    texts=st.lists(st.text(max_size=1500), min_size=1, max_size=8),
    start=st.integers(0, 10_000),
    length=st.integers(0, 3000),
)
def test_the_stream_comes_back_across_file_borders(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], start: int, length: int
) -> None:
    shards = opened(tmp_path_factory.mktemp("shards"), texts)
    stream = np.array(stream_of(texts))
    assert shards.n_tokens == len(stream)
    assert shards.n_documents == len(texts)
    assert shards.n_bytes == sum(len(text.encode()) for text in texts)
    start = min(start, len(stream))
    length = min(length, len(stream) - start)
    window = shards.window(start, length)
    assert window.dtype == np.int64
    np.testing.assert_array_equal(window, stream[start : start + length])
    documents = list(shards.documents())
    assert [list(ids) for ids in documents] == [stream_of([text]) for text in texts]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    return opened(tmp_path_factory.mktemp("shards"), TEXTS)


def test_windows_outside_the_stream_are_refused(tmp_path: Path) -> None:
    shards = opened(tmp_path, ["abc"])
    for start, length in ((-1, 2), (0, 5), (4, 1), (0, -1)):
        with pytest.raises(IndexError):
            shards.window(start, length)


def test_files_are_cut_at_exactly_the_asked_size(tmp_path: Path) -> None:
    summary = written(tmp_path, TEXTS)
    sizes = [path.stat().st_size for path in sorted(tmp_path.glob("train-*.bin"))]
    assert set(sizes[:-1]) == {2 * 1024}
    assert 0 < sizes[-1] <= 2 * 1024
    assert sum(sizes) == 2 * summary["tokens_train"] == 2 * len(stream_of(TEXTS))
    assert summary == {
        "tokens_train": len(stream_of(TEXTS)),
        "tokens_validation": 9,
        "bytes_train": sum(len(text.encode()) for text in TEXTS),
        "bytes_validation": 8,
        "documents_train": len(TEXTS),
        "documents_validation": 1,
        "dtype": "uint16",
        "files": len(sizes) + 1,
        "bytes_per_token": 1.0,
    }


@pytest.mark.parametrize(("vocab_size", "dtype"), [(257, "<u2"), (65_536, "<u2"), (65_537, "<u4"), (131_072, "<u4")])
def test_ids_are_as_wide_as_the_vocabulary_needs(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    shards = opened(tmp_path, ["\x7f highest ÿ"], vocab_size=vocab_size)
    assert shards.dtype == np.dtype(dtype)
    expected = stream_of(["\x7f highest ÿ"], vocab_size - 256)
    assert list(shards.window(0, shards.n_tokens)) == expected
    # Anybody can read the files without groundup.
    assert list(np.fromfile(tmp_path / "train-00000.bin", dtype=dtype)) == expected
    assert list(np.fromfile(tmp_path / "train-00000.idx", dtype="<u8")) == [len(expected)]


def test_shards_of_an_earlier_call_are_replaced(tmp_path: Path) -> None:
    written(tmp_path, TEXTS)
    (tmp_path / "started.json").write_text("{}")
    written(tmp_path, ["short"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".groundup-folder",
        "manifest.json",
        "started.json",
        "train-00000.bin",
        "train-00000.idx",
        "validation-00000.bin",
        "validation-00000.idx",
    ]
    assert TokenShards.open(tmp_path, "train").n_documents == 1


def test_a_failure_in_the_middle_leaves_no_shards_behind(tmp_path: Path) -> None:
    written(tmp_path, TEXTS)

    def documents():
        yield document("x" * 5_000_000)  # enough to be written out, with the second file begun
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_shards(documents(), ByteTokenizer(), tmp_path, ShardsSettings(shard_tokens=4_000_000))  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.glob("*.bin")] == ["train-00000.bin"]
    assert not list(tmp_path.glob("*.groundup-partial-*"))
    with pytest.raises(ArtifactError, match=r"manifest\.json: not found"):
        TokenShards.open(tmp_path, "train")


def test_no_training_document_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no training document"):
        written(tmp_path, [])
    written(tmp_path, ["text"], validation=[])
    with pytest.raises(ArtifactError, match="no validation documents"):
        TokenShards.open(tmp_path, "validation")
    with pytest.raises(ArtifactError, match="no test documents"):
        TokenShards.open(tmp_path, "test")


def test_shards_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    shards = opened(tmp_path, TEXTS, fingerprint="1" * 32)
    assert shards.tokenizer_fingerprint == "1" * 32
    TokenShards.open(tmp_path, "train", tokenizer_fingerprint="1" * 32)
    with pytest.raises(ArtifactError, match=r"manifest\.json: made with another tokenizer"):
        TokenShards.open(tmp_path, "train", tokenizer_fingerprint="2" * 32)


@pytest.fixture(scope="module")
def good_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("good")
    written(folder, TEXTS, validation=TEXTS[:9])
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[!.]*"))}


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def open_all(folder: Path) -> list[TokenShards]:
    return [TokenShards.open(folder, split) for split in ("train", "validation")]


@given(data=st.data())
def test_one_flipped_bit_anywhere_is_found_and_its_file_named(
    tmp_path_factory: pytest.TempPathFactory, good_files: dict[str, bytes], data: st.DataObject
) -> None:
    folder = put(tmp_path_factory.mktemp("flipped"), good_files)
    name = data.draw(st.sampled_from([name for name, content in good_files.items() if content]))
    position = data.draw(st.integers(0, len(good_files[name]) - 1))
    damaged = bytearray(good_files[name])
    damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    (folder / name).write_bytes(damaged)
    with pytest.raises(ArtifactError) as caught:
        open_all(folder)
    assert str(folder / name) in caught.value.message
    if name != "manifest.json":
        assert len([TokenShards.open(folder, split, verify=False) for split in ("train", "validation")]) == 2


@given(data=st.data())
def test_a_missing_or_shortened_file_is_found_on_opening(
    tmp_path_factory: pytest.TempPathFactory, good_files: dict[str, bytes], data: st.DataObject
) -> None:
    folder = put(tmp_path_factory.mktemp("cut"), good_files)
    name = data.draw(st.sampled_from([name for name, content in good_files.items() if content]))
    length = data.draw(st.none() | st.integers(0, len(good_files[name]) - 2))
    if length is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(good_files[name][:length])
    with pytest.raises(ArtifactError) as caught:
        open_all(folder)
    assert str(folder / name) in caught.value.message
    assert isinstance(caught.value, GroundupError)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format": "other"}, "not a manifest"), ({"version": 3}, "version 3"), ({"vocab_size": 1}, "checksum")],
)
def test_a_changed_manifest_is_refused(
    tmp_path: Path, good_files: dict[str, bytes], change: dict[str, object], message: str
) -> None:
    put(tmp_path, good_files)
    values = json.loads(good_files["manifest.json"])
    (tmp_path / "manifest.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(ArtifactError, match=rf"manifest\.json: .*{message}"):
        TokenShards.open(tmp_path, "train")


DEEP = json.loads("[" * 400 + "]" * 400)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("splits.train.files.0.name", "../secret", r"names the file '../secret', which is not in the folder"),
        ("splits.train.files.0.index_name", "/etc/passwd", r"names the file '/etc/passwd'"),
        ("splits.train.files.0.tokens", -1, r"manifest\.json, splits\.train\.files\.0\.tokens: .*greater than"),
        ("splits.train.files.0.tokens", 10**30, r"manifest\.json, splits\.train\.files\.0\.tokens: "),
        ("splits.train.files.0.documents", 1 << 50, r"manifest\.json, splits\.train: .* documents, but its"),
        ("splits.train.files", {}, r"manifest\.json, splits\.train\.files: .*array"),
        ("splits.train.tokens", "5", r"manifest\.json, splits\.train\.tokens: .*integer"),
        ("splits.train.tokens", 5, r"manifest\.json, splits\.train: 5 tokens, but its files have"),
        ("splits", None, r"manifest\.json, splits: .*object"),
        ("vocab_size", 0, r"manifest\.json, vocab_size: .*greater"),
        ("provenance", {"deep": DEEP}, r"manifest\.json: .*recursion"),
    ],
)
def test_a_manifest_made_to_harm_is_refused_with_its_field(
    tmp_path: Path, good_files: dict[str, bytes], place: str, value: object, said: str
) -> None:
    """Its checksum fits: whoever wrote it wrote that, too."""
    put(tmp_path, good_files)
    values = json.loads(good_files["manifest.json"])
    del values["checksum"]
    inner, *names = values, *place.split(".")
    for name in names[:-1]:
        inner = inner[int(name)] if isinstance(inner, list) else inner[name]
    inner[names[-1]] = value
    (tmp_path / "manifest.json").write_text(json.dumps({**values, "checksum": value_digest(values)}))
    with pytest.raises(ArtifactError, match=said) as caught:
        TokenShards.open(tmp_path, "train")
    assert caught.value.fix


@pytest.mark.parametrize("content", ["[]", "[" * 100_000, '{"format": NaN}', "{}", '{"format": "groundup-shards"'])
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"manifest\.json: "):
        TokenShards.open(tmp_path, "train")


@pytest.mark.parametrize("ends", [[0, 9], [9, 9], [12, 9], [1 << 63, 9], [4, 11], [9, 1 << 40]])
def test_document_ends_that_leave_the_file_are_refused(tmp_path: Path, ends: list[int]) -> None:
    written(tmp_path, ["abc", "defg"])
    np.array(ends, dtype="<u8").tofile(tmp_path / "train-00000.idx")
    shards = TokenShards.open(tmp_path, "train", verify=False)
    for read in (shards.document_ends, lambda: list(shards.documents()), lambda: [shards.document(n) for n in (0, 1)]):
        with pytest.raises(ArtifactError, match=r"train-00000\.idx: .*damaged"):
            read()


@given(
    documents=st.lists(
        st.tuples(st.text(max_size=40), st.sampled_from(["a.txt", "b.txt"]), st.sampled_from(["en", "de", ""])),
        min_size=1,
        max_size=20,
    )
)
def test_the_manifest_says_what_came_from_where(
    tmp_path_factory: pytest.TempPathFactory, documents: list[tuple[str, str, str]]
) -> None:
    out = tmp_path_factory.mktemp("provenance")
    made = [
        Document(id=str(number), text=text, source=source, language=language, split="train")
        for number, (text, source, language) in enumerate(documents)
    ]
    write_shards(made, ByteTokenizer(), out, ShardsSettings(shard_tokens=1024))  # type: ignore[arg-type]
    split = json.loads((out / "manifest.json").read_text())["splits"]["train"]
    for what, key in (("sources", 1), ("languages", 2)):
        expected: dict[str, list[int]] = {}
        for given_document in documents:
            counts = expected.setdefault(given_document[key] or "unknown", [0, 0, 0])
            n_bytes = len(given_document[0].encode())
            for place, more in enumerate((1, n_bytes, n_bytes + 1)):
                counts[place] += more
        assert {name: list(counts.values()) for name, counts in split[what].items()} == expected
        tokens = [counts["tokens"] for counts in split[what].values()]
        assert tokens == sorted(tokens, reverse=True)
        assert sum(tokens) == split["tokens"]


def test_many_sources_are_counted_together() -> None:
    counts = {f"{n:05d}.txt": {"documents": 1, "bytes": 10, "tokens": n} for n in range(2000)}
    listed = largest_first(counts)
    assert len(listed) == 1001
    assert list(listed)[:2] == ["01999.txt", "01998.txt"]
    assert listed["(others)"] == {"documents": 1000, "bytes": 10_000, "tokens": sum(range(1000))}


@given(number=st.integers(0, len(TEXTS) - 1))
def test_any_document_at_once(shards: TokenShards, number: int) -> None:
    assert shards.document(number).tolist() == stream_of([TEXTS[number]])


def test_documents_that_are_not_there(shards: TokenShards) -> None:
    for number in (-1, len(TEXTS)):
        with pytest.raises(IndexError, match=f"document {number} of {len(TEXTS)}"):
            shards.document(number)


def test_a_tokenizer_that_gives_more_than_its_vocabulary_is_refused(tmp_path: Path) -> None:
    class Liar(ByteTokenizer):
        def encode_to_arrays(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
            return np.full(len(texts), 300, dtype=np.uint32), np.ones(len(texts), dtype=np.int64)

    with pytest.raises(ArtifactError, match="gives id 300, but says that its vocabulary has 257"):
        write_shards([document("x")], Liar(), tmp_path)  # type: ignore[arg-type]


def test_fingerprints_follow_the_content(tmp_path: Path) -> None:
    same = [opened(tmp_path / name, TEXTS).fingerprint for name in ("a", "b")]
    others = [
        opened(tmp_path / "c", [*TEXTS, "more"]).fingerprint,
        opened(tmp_path / "d", TEXTS, fingerprint="0" * 32).fingerprint,
        opened(tmp_path / "e", [TEXTS[1], TEXTS[0], *TEXTS[2:]]).fingerprint,
    ]
    assert same[0] == same[1]
    assert len({same[0], *others}) == 4


def test_through_the_real_tokenizer_and_back(tmp_path: Path) -> None:
    adversarial = "Nice text <|endoftext|> and <|user|> say <|end|> to the fox in the forest."
    splits = ("train", "train", "validation")
    documents = [document(f"{adversarial} It was told {n} times.", splits[n % 3]) for n in range(60)]
    tokenizer = Tokenizer.train(documents, vocab_size=300)
    summary = write_shards(documents, tokenizer, tmp_path)
    for split in ("train", "validation"):
        shards = TokenShards.open(tmp_path, split, tokenizer_fingerprint=tokenizer.fingerprint)
        texts = [document.text for document in documents if document.split == split]
        ids_of_each = [ids.tolist() for ids in shards.documents()]
        # The only control token is the one that closes each document: text cannot inject any.
        assert all(not tokenizer.special_ids & set(ids[:-1]) for ids in ids_of_each)
        assert {ids[-1] for ids in ids_of_each} == {tokenizer.end_of_text_id}
        assert [tokenizer.decode(ids[:-1]) for ids in ids_of_each] == texts
        assert summary[f"bytes_{split}"] == sum(len(text.encode()) for text in texts)
