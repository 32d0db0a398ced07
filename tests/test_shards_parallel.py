"""`documents.jsonl` to shards: the same bytes whoever does the work, however it is cut, and whenever it is killed."""

import dataclasses
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lengths import examples

from groundup.corpus import Document
from groundup.corpus.engine import Engine, LocalPool
from groundup.errors import ArtifactError, DataError
from groundup.files import file_digest
from groundup.recipe import ShardsSettings
from groundup.shards import TokenShards, verify_shards, write_shards, write_shards_from_file
from groundup.shards import write as write_module
from groundup.tokenizer import Tokenizer, load_tokenizer

SMALL = ShardsSettings(shard_tokens=1024)
WORDS = ["stone", "river", "Brücke", "naïve", "水", "😀", "\u2028", "<|endoftext|>", "0", "\n", "\x00", "\\u0041", '"']


class ShuffledEngine(Engine):
    """Does the work in any order, and gives results in the asked one."""

    def map(self, function: Callable[[Any], Any], arguments: Sequence[Any]) -> Iterator[Any]:
        order = list(range(len(arguments)))
        random.Random(len(arguments)).shuffle(order)
        results = {number: function(arguments[number]) for number in order}
        return iter([results[number] for number in range(len(arguments))])


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train([f"The {word} by the {other}." for word in WORDS for other in WORDS], vocab_size=300).save(folder)
    return folder


def documents_of(n: int, seed: int = 0, longest: int = 120) -> list[Document]:
    draw = random.Random(seed)
    documents = []
    for number in range(n):
        text = " ".join(draw.choices(WORDS, k=draw.randrange(longest)))
        split = "validation" if draw.random() < 0.1 else "train"
        language = draw.choice(["en", "de"])
        documents.append(Document(f"{number:032x}", text, draw.choice(["a.txt", "b.txt"]), language, split))
    return documents


def put(path: Path, documents: Sequence[Document]) -> Path:
    path.write_bytes(b"".join(orjson.dumps(dataclasses.asdict(document)) + b"\n" for document in documents))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def without_corpus(files: dict[str, bytes]) -> dict[str, Any]:
    """The files, with the manifest's digests of the corpus and of itself left out."""
    manifest = json.loads(files["manifest.json"])
    manifest["provenance"].pop("corpus")
    manifest.pop("checksum")
    return {**files, "manifest.json": manifest}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return put(tmp_path_factory.mktemp("corpus") / "documents.jsonl", documents_of(150))


@pytest.fixture(scope="module")
def expected(
    tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer_folder: Path
) -> tuple[dict[str, bytes], dict[str, Any]]:
    out = tmp_path_factory.mktemp("expected")
    summary = write_shards_from_file(corpus, tokenizer_folder, out, SMALL)
    return contents(out), summary


def test_it_gives_the_bytes_of_the_plain_form(
    tmp_path: Path, tokenizer_folder: Path, expected: tuple[dict[str, bytes], dict[str, Any]]
) -> None:
    summary = write_shards(documents_of(150), load_tokenizer(tokenizer_folder), tmp_path, SMALL)
    assert summary == expected[1]
    assert len(expected[0]) > 12  # several files of each split
    assert without_corpus(contents(tmp_path)) == without_corpus(expected[0])


def test_the_manifest_names_the_corpus(corpus: Path, expected: tuple[dict[str, bytes], dict[str, Any]]) -> None:
    provenance = json.loads(expected[0]["manifest.json"])["provenance"]
    assert provenance == {"corpus": file_digest(corpus), "settings": {"shard_tokens": 1024}}


@settings(max_examples=examples(10))
@given(range_bytes=st.integers(1, 60_000))
def test_any_size_of_ranges_in_any_order_gives_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory,
    corpus: Path,
    tokenizer_folder: Path,
    expected: tuple[dict[str, bytes], dict[str, Any]],
    range_bytes: int,
) -> None:
    range_bytes = max(range_bytes, corpus.stat().st_size // 20)  # each range is a folder: not thousands of them
    out = tmp_path_factory.mktemp("out")
    write_shards_from_file(corpus, tokenizer_folder, out, SMALL, engine=ShuffledEngine(), range_bytes=range_bytes)
    assert contents(out) == expected[0]


def test_two_processes_give_the_same_bytes(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, expected: tuple[dict[str, bytes], dict[str, Any]]
) -> None:
    with LocalPool(2) as engine:
        for name in ("once", "twice"):  # the engine stays the caller's: it can be used again
            summary = write_shards_from_file(
                corpus, tokenizer_folder, tmp_path / name, SMALL, engine=engine, range_bytes=20_000
            )
            assert summary == expected[1]
            assert contents(tmp_path / name) == expected[0]


@pytest.mark.parametrize("range_bytes", [1, 7, 64])
def test_ranges_shorter_than_a_line_lose_nothing(tmp_path: Path, tokenizer_folder: Path, range_bytes: int) -> None:
    documents = documents_of(3, longest=3)
    path = put(tmp_path / "documents.jsonl", documents)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))  # and the last line is not ended
    write_shards_from_file(path, tokenizer_folder, tmp_path / "out", SMALL, range_bytes=range_bytes)
    tokenizer = load_tokenizer(tokenizer_folder)
    texts = [tokenizer.decode(ids) for ids in TokenShards.open(tmp_path / "out", "train").documents()]
    assert texts == [document.text for document in documents if document.split == "train"]


def test_what_was_encoded_is_not_encoded_again(
    tmp_path: Path,
    corpus: Path,
    tokenizer_folder: Path,
    expected: tuple[dict[str, bytes], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    encoded: list[int] = []
    really = write_module.encode_texts

    def counted(tokenizer: Tokenizer, texts: list[str], dtype: np.dtype[Any]) -> tuple[np.ndarray, np.ndarray]:
        encoded.append(len(texts))
        return really(tokenizer, texts, dtype)

    def run(path: Path = corpus) -> dict[str, Any]:
        encoded.clear()
        return write_shards_from_file(path, tokenizer_folder, out, SMALL, range_bytes=20_000)

    class StoppedError(Exception):
        pass

    def stopped(*work: object) -> None:
        raise StoppedError

    monkeypatch.setattr(write_module, "encode_texts", counted)
    with monkeypatch.context() as patch:
        patch.setattr(write_module, "mapped", stopped)
        with pytest.raises(StoppedError):
            run()
    assert sum(encoded) == 150
    assert list((out / "ranges").iterdir())
    run()
    assert encoded == []
    assert contents(out) == expected[0]

    # What was damaged meanwhile is encoded again.
    with monkeypatch.context() as patch:
        patch.setattr(write_module, "mapped", stopped)
        with pytest.raises(StoppedError):
            run()
    flipped = max((out / "ranges").rglob("train-*.bin"))
    flipped.write_bytes(bytes([flipped.read_bytes()[0] ^ 1]) + flipped.read_bytes()[1:])
    run()
    assert 0 < sum(encoded) < 150
    assert contents(out) == expected[0]

    # Of another text, another tokenizer, or other ranges, nothing is taken over.
    with monkeypatch.context() as patch:
        patch.setattr(write_module, "mapped", stopped)
        with pytest.raises(StoppedError):
            run()
    changed = documents_of(150)
    changed[-1] = dataclasses.replace(changed[-1], text="other")
    run(put(tmp_path / "documents.jsonl", changed))
    assert 0 < sum(encoded) < 150  # the last range only
    assert verify_shards(out).faults == ()
    assert not (out / "ranges").exists()


SCRIPT = """
import sys
from pathlib import Path
from groundup.recipe import ShardsSettings
from groundup.shards import write_shards_from_file
corpus, tokenizer, out = map(Path, sys.argv[1:])
print("ready", flush=True)
write_shards_from_file(corpus, tokenizer, out, ShardsSettings(shard_tokens=1024), range_bytes=6_000)
"""


def test_killed_at_any_moment_and_started_again(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, expected: tuple[dict[str, bytes], dict[str, Any]]
) -> None:
    draw = random.Random(3)
    out = tmp_path / "out"
    killed = 0
    for _ in range(6):
        command = [sys.executable, "-c", SCRIPT, str(corpus), str(tokenizer_folder), str(out)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(draw.random() * 0.25)
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
    assert killed
    write_shards_from_file(corpus, tokenizer_folder, out, SMALL, range_bytes=6_000)
    assert contents(out) == expected[0]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"id": "1", "text": "cut', "unexpected control character"),
        (b'{"id": "1", "source": "x"}', "missing 1 required"),
        (b'{"id": "1", "text": "a", "source": "x", "split": "test"}', "split 'test'"),
        (b'{"id": "1", "text": 7, "source": "x"}', "text int"),
        (b"[1, 2]", "must be a mapping"),
        (b'{"id": "1", "text": "\xff", "source": "x"}', "not valid UTF-8"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, tokenizer_folder: Path, line: bytes, what: str) -> None:
    path = put(tmp_path / "documents.jsonl", documents_of(20))
    position = path.stat().st_size
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(ArtifactError, match=rf"documents\.jsonl, the line at byte {position:,}: damaged \(.*{what}"):
        write_shards_from_file(path, tokenizer_folder, tmp_path / "out", SMALL, range_bytes=1000)
    assert not list((tmp_path / "out").glob("*.json"))


def test_a_missing_corpus_or_none_at_all(tmp_path: Path, tokenizer_folder: Path) -> None:
    with pytest.raises(ArtifactError, match=r"documents\.jsonl: not found"):
        write_shards_from_file(tmp_path / "documents.jsonl", tokenizer_folder, tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        write_shards_from_file(put(tmp_path / "documents.jsonl", []), tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match="no training document"):
        write_shards_from_file(tmp_path / "documents.jsonl", tokenizer_folder, tmp_path / "out")
