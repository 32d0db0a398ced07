"""`groundup shards verify|stats|show|import|export`, called as a user calls them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import orjson
import pytest
from typer.testing import CliRunner, Result

from groundup.cli.data import shards_app
from groundup.corpus import Document
from groundup.errors import ArtifactError, DataError
from groundup.shards import write_shards_from_file
from groundup.tokenizer import Tokenizer, load_tokenizer
from groundup.tokenizer.pieces import readable

TEXTS = ["The stone by the river [bold]x[/bold].", "Die Brücke am Fluss.", "水 and 😀", "The last stone."]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a corpus, a tokenizer and shards."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    documents = [
        Document(f"{number:032x}", text, f"{number % 2}.txt", "de" if number == 1 else "en", split)
        for split in ("train", "validation")
        for number, text in enumerate(TEXTS if split == "train" else TEXTS[:1])
    ]
    (run / "corpus").mkdir(parents=True)
    lines = b"".join(orjson.dumps(dataclasses.asdict(document)) + b"\n" for document in documents)
    (run / "corpus" / "documents.jsonl").write_bytes(lines)
    Tokenizer.train(TEXTS * 3, vocab_size=300).save(run / "tokenizer")
    write_shards_from_file(run / "corpus" / "documents.jsonl", run / "tokenizer", run / "shards")
    return run


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(shards_app, [str(argument) for argument in arguments], catch_exceptions=True)


def test_verify(run_folder: Path, tmp_path: Path) -> None:
    done = call("verify", run_folder)  # a run's folder stands for the shards in it
    assert done.exit_code == 0
    assert "4 files, 5 documents" in done.stdout
    assert "all good" in done.stdout
    assert json.loads(call("verify", run_folder / "shards", "--json").stdout)["good"] is True
    for path in (run_folder / "shards").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = bytearray((tmp_path / "train-00000.bin").read_bytes())
    data[8:10] = b"\xff\xff"
    (tmp_path / "train-00000.bin").write_bytes(data)
    done = call("verify", tmp_path)
    assert isinstance(done.exception, ArtifactError)  # which the program shows in words, with exit code 1
    assert done.exception.exit_code == 1
    assert "train-00000.bin: damaged" in done.exception.message
    assert "train-00000.bin, byte 8: id 65535" in done.exception.message
    done = call("verify", tmp_path, "--json")
    assert done.exit_code == 1
    assert {"file": str(tmp_path / "train-00000.bin"), "byte": 8}.items() <= json.loads(done.stdout)["faults"][
        1
    ].items()


def test_stats(run_folder: Path) -> None:
    done = call("stats", run_folder)
    assert done.exit_code == 0
    for shown in ("uint16", "0.txt", "1.txt", "train, by language", "de", "validation"):
        assert shown in done.stdout
    found = json.loads(call("stats", run_folder, "--json").stdout)
    train = found["splits"]["train"]
    assert train["documents"] == sum(count for _, _, count in train["lengths"]["histogram"]) == 4
    assert train["languages"]["de"] == {
        "documents": 1,
        "bytes": len(TEXTS[1].encode()),
        "tokens": len(load_tokenizer(run_folder / "tokenizer").encode(TEXTS[1])) + 1,
    }


def test_show(run_folder: Path) -> None:
    for number, text in enumerate(TEXTS):
        done = call("show", run_folder, number)
        assert done.exit_code == 0
        about, cut = done.stdout.split("\n", 1)
        assert f"document={number}  split=train" in about
        assert f"source={number % 2}.txt" in about
        assert cut.rstrip("\n").removesuffix("│<|endoftext|>").replace("│", "") == readable(text) or "⟨" in cut
        found = json.loads(call("show", run_folder, number, "--json").stdout)
        tokenizer = load_tokenizer(run_folder / "tokenizer")
        assert found["ids"] == [*tokenizer.encode(text), tokenizer.end_of_text_id]
        assert found["pieces"][-1] == "<|endoftext|>"
        assert (found["tokens"], found["bytes"]) == (len(found["ids"]), len(text.encode()))
        assert found["language"] == ("de" if number == 1 else "en")
    assert "split=validation" in call("show", run_folder, 0, "--split", "validation").stdout
    done = call("show", run_folder, 4)
    assert isinstance(done.exception, DataError)
    assert "has documents 0 to 3" in done.exception.message


def test_show_where_the_corpus_is_another(run_folder: Path, tmp_path: Path) -> None:
    """A source is named only if the text proves it."""
    for stage in ("shards", "tokenizer"):
        (tmp_path / stage).mkdir()
        for path in (run_folder / stage).iterdir():
            (tmp_path / stage / path.name).write_bytes(path.read_bytes())
    assert "source is not known" in call("show", tmp_path, 0).stdout
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "documents.jsonl").write_bytes(
        orjson.dumps(dataclasses.asdict(Document("0" * 32, "other text", "wrong.txt"))) + b"\n"
    )
    done = call("show", tmp_path, 0)
    assert "source is not known" in done.stdout
    assert "wrong.txt" not in done.stdout


def test_show_needs_the_right_tokenizer(run_folder: Path, tmp_path: Path) -> None:
    for path in (run_folder / "shards").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    done = call("show", tmp_path, 0)
    assert "No tokenizer beside the shards" in done.stdout
    assert "stone" not in done.stdout
    assert "stone" in call("show", tmp_path, 0, "--tokenizer", run_folder / "tokenizer").stdout.replace("│", "")
    Tokenizer.train(["another text"], vocab_size=270).save(tmp_path / "other")
    done = call("show", tmp_path, 0, "--tokenizer", tmp_path / "other")
    assert isinstance(done.exception, ArtifactError)
    assert "not the tokenizer of these shards" in done.exception.message


def test_export_and_import(run_folder: Path, tmp_path: Path) -> None:
    for format in ("nanogpt", "megatron"):
        done = call("export", run_folder, tmp_path / format, "--format", format)
        assert done.exit_code == 0
        assert all(Path(line).is_file() for line in done.stdout.splitlines())
        back = tmp_path / f"{format}-back"
        done = call("import", tmp_path / format, back, "--tokenizer", run_folder / "tokenizer")
        assert done.exit_code == 0
        assert "train: 4 documents" in done.stdout
        for path in (run_folder / "shards").glob("*.[bi][id][nx]"):
            assert (back / path.name).read_bytes() == path.read_bytes()


def test_import_says_what_it_assumed(tmp_path: Path) -> None:
    np.array([5, 9, 7], dtype="<u2").tofile(tmp_path / "train.bin")
    done = call("import", tmp_path / "train.bin", tmp_path / "out")
    assert done.exit_code == 0
    assert "train: 1 documents, 3 tokens" in done.stdout
    assert "note: no end-of-text id was given" in done.stderr
    again = call("import", tmp_path / "train.bin", tmp_path / "out", "--end-of-text-id", "9", "--json")
    found = json.loads(again.stdout)
    assert found["splits"]["train"] == {"tokens": 4, "documents": 2}
    assert (found["format"], found["dtype"]) == ("nanogpt", "uint16")
