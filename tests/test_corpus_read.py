"""Reading files into documents: which files an input means, the same text whatever the packing, a stable order."""

import bz2
import csv
import glob
import gzip
import io
import json
import lzma
import os
import random
import re
import time
import tracemalloc
import unicodedata
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from lengths import examples

from groundup.console import Console
from groundup.corpus import Document, Record, SetAside, curate, input_fingerprint, read
from groundup.corpus.document import text_id
from groundup.corpus.reading import jsonl
from groundup.corpus.reading import text as text_module
from groundup.corpus.reading.compressed import PACKINGS
from groundup.corpus.reading.intake import normalize
from groundup.corpus.reading.read import UnitReader, units_of
from groundup.corpus.reading.sources import find_sources
from groundup.errors import DataError
from groundup.recipe import CorpusSettings

FABLE = "The Fox and the Grapes\n\nA hungry Fox saw some fine bunches of Grapes."


def texts_of(*inputs: object, **changes: object) -> list[str]:
    return [document.text for document in read(*map(str, inputs), settings=CorpusSettings(**changes))]


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstandard.compress, ".xz": lzma.compress}


def write(path: Path, data: bytes) -> None:
    """Write a file, packed as its name says."""
    path.write_bytes(PACK.get(path.suffix.lower(), bytes)(data))


@pytest.mark.parametrize("packing", ["", ".gz", ".bz2", ".zst", ".xz", ".GZ", ".Zst"])
@pytest.mark.parametrize("kind", [".txt", ".md", ".TXT", ".markdown", ".rst", ".log", ".text"])
def test_plain_text_in_every_packing_reads_the_same(tmp_path: Path, kind: str, packing: str) -> None:
    path = tmp_path / f"a{kind}{packing}"
    write(path, (FABLE + "\n").encode())
    (document,) = read(path)
    assert document == Document(text_id(FABLE), FABLE, path.as_posix())
    assert len(document.id) == 32
    assert [source.label for source in find_sources([tmp_path]).files] == [path.as_posix()]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.JSONL", "a.jsonl.gz", "a.ndjson.bz2", "a.jsonl.zst"])
def test_jsonl_gives_a_document_a_line(tmp_path: Path, name: str) -> None:
    data = "".join(json.dumps({"body": f"text {n}", "id": 7}) + "\r\n\n" for n in range(3)).encode()
    write(tmp_path / name, data)
    documents = list(read(tmp_path / name, settings=CorpusSettings(text_field="body")))
    assert [document.text for document in documents] == ["text 0", "text 1", "text 2"]
    # The records carry the same id of their own; ours still differ.
    assert len({document.id for document in documents}) == 3


def test_a_record_names_its_source_and_address(tmp_path: Path) -> None:
    records = [
        {"text": "one", "source": "books", "url": "https://a.example"},
        {"text": "two", "metadata": {"url": "https://b.example"}, "source": 7},
        {"text": "three", "url": 3.5, "source": None, "metadata": ["x"]},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    label = (tmp_path / "a.jsonl").as_posix()
    documents = list(read(tmp_path, settings=CorpusSettings(source_field="source")))
    assert [(document.source, document.url) for document in documents] == [
        ("books", "https://a.example"),
        ("7", "https://b.example"),
        (label, ""),
    ]
    assert {document.source for document in read(tmp_path)} == {label}


def test_folder_is_read_by_name_at_any_depth(tmp_path: Path) -> None:
    for name in ["b/z.txt", "b/a.md", "a.txt", "c.txt", ".hidden/x.txt", ".x.txt", "b/picture.png"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts_of(tmp_path) == ["a.txt", "b/a.md", "b/z.txt", "c.txt"]
    assert [Path(name).name for name in find_sources([tmp_path]).passed_over] == ["picture.png"]


def test_globs_are_those_of_the_standard_library(tmp_path: Path) -> None:
    names = [
        "a.txt",
        "b/c.txt",
        "b/d/e.txt",
        "b/d/f/g.txt",
        ".h/i.txt",
        ".j.txt",
        "b/[k].txt",
        "bb/l.txt",
        "b/.m/n.txt",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for pattern in [
        "*", "**", "**/*", "**/*.txt", "*/*.txt", "b*/**/*.txt", "b/**/f/*.txt", "**/d/**/*.txt", "[ab]*", "?/d", ".*",
        ".h/*", "**/.m/*", "b/[[]k].txt", "**/**/c.txt", "*/d/../*.txt",
    ]:  # fmt: skip
        expected = {Path(name) for name in glob.glob(str(tmp_path / pattern), recursive=True)}
        files = {name for name in expected if name.is_file()}
        for folder in expected - files:
            files |= {
                path
                for path in folder.rglob("*")
                if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
            }
        found = find_sources([tmp_path / pattern]).files
        assert {os.path.realpath(source.entry) for source in found} == {os.path.realpath(path) for path in files}, (
            pattern
        )


def test_links_that_lead_in_circles_end(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text("a")
    for name in ["up", "again", "more"]:
        (tmp_path / "deep" / name).symlink_to(tmp_path)
    (tmp_path / "self.txt").symlink_to(tmp_path / "self.txt")
    heard: list[SetAside] = []
    for item in [tmp_path, tmp_path / "**" / "*", tmp_path / "**"]:
        documents = list(read(item, on_set_aside=heard.append))
        assert [document.text for document in documents] == ["a"]
        assert documents[0].source == (tmp_path / "deep" / "a.txt").as_posix()
    assert len(heard) == 3
    assert "symbolic links" in heard[0].detail


def test_order_of_inputs_does_not_matter_and_no_file_is_read_twice(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "link.txt").symlink_to(tmp_path / "b.txt")
    (tmp_path / "0.txt").symlink_to(tmp_path / "c.txt")
    inputs = [tmp_path / "b.txt", tmp_path, tmp_path / "*.txt", "groundup:shakespeare", tmp_path / "link.txt"]
    wanted = [source.label for source in find_sources(inputs).files]
    names = [Path(label).name for label in wanted]
    assert sorted(names) == ["0.txt", "a.txt", "b.txt", "groundup:shakespeare"]
    prints = {input_fingerprint(CorpusSettings(inputs=tuple(map(str, inputs))))}
    for seed in range(5):
        random.Random(seed).shuffle(inputs)
        assert [source.label for source in find_sources(inputs).files] == wanted == sorted(wanted)
        prints.add(input_fingerprint(CorpusSettings(inputs=tuple(map(str, inputs)))))
    assert len(prints) == 1
    assert texts_of(tmp_path / "b.txt", tmp_path / "b.txt") == ["b"]


def test_artifacts_of_runs_below_the_texts_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    chosen = CorpusSettings(inputs=(str(tmp_path),))
    before = input_fingerprint(chosen)
    for name in [
        "runs/mine/corpus/documents.jsonl",
        "runs/mine/corpus/units/7/set_aside.jsonl",
        "runs/mine/pretrain/metrics.jsonl",
    ]:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text('{"text": "ours"}')
    (tmp_path / "runs/mine/corpus/stage.json").write_text("{}")
    (tmp_path / "runs/mine/pretrain/started.json").write_text("{}")
    for pattern in ["", "**", "**/*", "*", "runs/../a.txt"]:
        assert texts_of(tmp_path / pattern) == ["text"], pattern
    with pytest.raises(DataError, match="passed over"):
        find_sources([tmp_path / "runs/mine/corpus"])
    assert input_fingerprint(chosen) == before
    # Named as a file, it is read.
    assert texts_of(tmp_path / "runs/mine/corpus/documents.jsonl") == ["ours"]


def test_relative_names_and_file_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    for item in ["b", "./b", "b/a.txt", "b/*.txt", "**/*.txt", "./b/../b/?.txt"]:
        (source,) = find_sources([item]).files
        assert source.label.endswith("b/a.txt")
        assert not source.label.startswith("/")
    for kind in ("file", "local"):
        (source,) = find_sources([f"{kind}://{tmp_path}/b/a.txt"]).files
        assert isinstance(source.entry, Path)
    assert source.label == (tmp_path / "b" / "a.txt").as_posix()


def test_a_name_with_glob_characters_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("bracket")
    assert texts_of(tmp_path / "a[1].txt") == ["bracket"]


def test_a_file_name_that_is_not_utf8_can_be_named_and_written(tmp_path: Path) -> None:
    Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.txt")).write_text("coffee")
    (document,) = read(tmp_path)
    assert document.text == "coffee"
    assert document.source.encode().endswith(b"caf\\xe9.txt")


def test_texts_that_ship_with_groundup() -> None:
    classics = list(read("groundup:classics"))
    assert len(classics) == 420
    assert classics[0].text.startswith("The Fox and the Grapes")
    assert classics[0].source == "groundup:classics"
    (shakespeare,) = read("groundup:shakespeare")
    assert shakespeare.text.startswith("First Citizen:")
    with pytest.raises(DataError, match="Did you mean 'groundup:classics'"):
        read("groundup:classic")


WRITTEN = st.characters(exclude_categories=["Cs", "Cc"], include_characters="\0\t\n\r", exclude_characters="\ufffd")


@given(text=st.text(WRITTEN, max_size=200), form=st.sampled_from(["NFC", "NFKC", "none"]))
@settings(max_examples=examples(60), deadline=None)
def test_a_text_comes_back_normalized_and_once_normalized_stays(
    tmp_path_factory: pytest.TempPathFactory, text: str, form: str
) -> None:
    folder = tmp_path_factory.mktemp("text")

    def through(value: str) -> list[str]:
        (folder / "a.jsonl").write_text(json.dumps({"text": value}), encoding="utf-8")
        found = read(folder / "a.jsonl", settings=CorpusSettings(unicode=form), on_set_aside=lambda record: None)
        return [document.text for document in found]

    once = through(text)
    assert len(once) == (bool(text.removeprefix("\ufeff").strip()) and "\0" not in text)
    if once:
        assert "\r" not in once[0]
        assert form == "none" or unicodedata.is_normalized(form, once[0])
        assert once[0].startswith("\ufeff") or through(once[0]) == once


def test_marks_without_end_are_normalized_in_linear_time() -> None:
    marks = "\u0301\u0316" * 200_000  # out of order: 143 s where a run has no limit
    begin = time.process_time()
    normal = normalize(f"a{marks}", "NFC")
    assert time.process_time() - begin < 5
    assert normalize(normal, "NFC") == normal
    assert Counter(normal)["\u0316"] == 200_000
    longest = "a" + marks[:30]
    assert normalize(longest, "NFC") == unicodedata.normalize("NFC", longest)
    assert "\u034f" in normalize(longest + "\u0316" + "b" * 2_000, "NFC")


def test_a_long_text_is_split_at_paragraphs_and_nothing_is_lost(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {n} " + "tells of something. " * (n % 17) + "\nand ends." for n in range(3000)]
    (tmp_path / "long.txt").write_text("\n\n".join(paragraphs))
    (tmp_path / "long.txt.gz").write_bytes(gzip.compress("\n\n".join(paragraphs).encode()))
    limit = 4096
    for name in ("long.txt", "long.txt.gz"):
        parts = texts_of(tmp_path / name, max_document_mib=limit / 2**20)
        assert len(parts) > 100
        assert max(len(part.encode()) for part in parts) <= limit
        assert [paragraph for part in parts for paragraph in part.split("\n\n")] == paragraphs


def test_a_part_stands_where_its_position_says(tmp_path: Path) -> None:
    data = b"".join(b"%d " % n * (n % 40) + b"\n" * (1 + n % 3 // 2) for n in range(400)) + b"x" * 700 + b"\nend"
    (tmp_path / "a.txt").write_bytes(data)
    (unit,) = units_of(find_sources([tmp_path]), 1)
    heard: list[SetAside] = []
    parts = list(UnitReader(unit, CorpusSettings(max_document_mib=600 / 2**20), heard.append))
    assert len(parts) > 20
    for part in parts:
        text = part.text.encode()
        assert data[part.position :].lstrip(b"\n").startswith(text)
        assert len(data[part.position :]) - len(data[part.position :].lstrip(b"\n")) < 3
    assert [data[record.position :][:700] for record in heard] == [b"x" * 700]
    numbers = sorted([part.number for part in parts] + [record.number for record in heard])
    assert numbers == list(range(1, len(numbers) + 1))


def test_a_long_paragraph_is_split_at_lines(tmp_path: Path) -> None:
    lines = [f"line {n} of a poem without an empty line" for n in range(500)]
    (tmp_path / "long.txt").write_text("\n".join(lines))
    parts = texts_of(tmp_path / "long.txt", max_document_mib=1000 / 2**20)
    assert max(len(part) for part in parts) <= 1000
    assert "\n".join(parts).split("\n") == lines


def test_without_a_listener_a_warning_counts_what_was_set_aside(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": 1}\n{"tex\n')
    with pytest.warns(UserWarning, match=r"1 invalid JSON, 1 no text field; the first: .*a\.jsonl, line 2"):
        assert [document.text for document in read(tmp_path)] == ["good"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        heard: list[SetAside] = []
        list(read(tmp_path, on_set_aside=heard.append))
    assert [record.record for record in heard] == ["line 2", "line 3"]


def test_input_fingerprint_follows_content_and_not_time(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    chosen = CorpusSettings(inputs=(str(tmp_path),))
    before = input_fingerprint(chosen)
    os.utime(path, (1, 1))
    assert input_fingerprint(chosen) == before
    path.write_text("two")
    changed = input_fingerprint(chosen)
    (tmp_path / "b.txt").write_text("")
    assert len({before, changed, input_fingerprint(chosen)}) == 3


def test_documents_cannot_be_changed() -> None:
    document = Document("0" * 32, "text", "here")
    with pytest.raises(AttributeError):
        document.text = "other"  # type: ignore[misc]


CHUNKS = st.one_of(
    st.sampled_from([b"<|end|>", b"\n", b"\n\n", b" ", b"<|en", b"x" * 90, b"\xff", b"\0", "é".encode()])
)


@given(
    chunks=st.lists(st.one_of(CHUNKS, st.text("ab<|end>\n", max_size=12).map(str.encode)), max_size=20),
    alone=st.booleans(),
    split_bytes=st.integers(1, 60),
    mib=st.sampled_from([16.0, 60 / 2**20]),
    block=st.sampled_from([1, 3, 8, 1 << 20]),
)
@settings(max_examples=examples(200), deadline=None)
def test_text_between_separators_is_a_document_however_the_file_is_cut(
    tmp_path_factory: pytest.TempPathFactory, chunks: list[bytes], alone: bool, split_bytes: int, mib: float, block: int
) -> None:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    data = b"".join(chunks)
    path.write_bytes(data)
    chosen = CorpusSettings(separator="<|end|>", max_document_mib=mib)

    def read_in(pieces: int) -> tuple[list[Record], list[SetAside]]:
        heard: list[SetAside] = []
        records, before = [], 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text_module, "BLOCK_BYTES", block)
            patch.setattr(text_module, "HEAD_BYTES", block)
            patch.setattr(text_module, "_MENTIONED", b"<|end|>" if alone else b"")
            for unit in units_of(find_sources([path]), pieces, "<|end|>"):
                first = len(heard)
                reader = UnitReader(unit, chosen, heard.append)
                records += [record._replace(number=record.number + before) for record in reader]
                heard[first:] = [replace(one, number=one.number + before * bool(one.place)) for one in heard[first:]]
                before += reader.n_records
        return records, heard

    records, aside = read_in(1 << 40)
    assert read_in(split_bytes) == (records, aside)
    places = [one.position for one in [*records, *aside]]
    assert len(set(places)) == len(places)
    if b"<|end|>" in data:
        pattern = rb"(?m)^<\|end\|>(?=\r?\n|\Z)" if alone else rb"<\|end\|>"
        first, *others = re.split(pattern, data)
        if mib == 16.0 and others:
            wanted = [first, *others[:-1], *([others[-1]] if others[-1].strip() else [])]
            if not first.strip() and data[len(first) + len(b"<|end|>") :].strip():
                del wanted[0]
            good = [one.decode().strip("\n").rstrip() for one in wanted if b"\xff" not in one and b"\0" not in one]
            assert [record.text for record in records] == [text for text in good if text]
            assert len(records) + len(aside) == len(wanted)
        for record in records:
            assert data[record.position :].lstrip(b"\n").startswith(record.text.encode())


def test_the_separator_can_be_another_or_none_and_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    story = "One day, a girl went to the park and {} with her friends until it was dark."
    stories = [story.format(what) for what in ("played", "danced", "sang songs", "ran about", "ate cake")]
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(stories) + "\n<|endoftext|>\n")
    with pytest.warns(UserWarning, match="5 documents were cut out of text files at '<|endoftext|>'"):
        assert texts_of(tmp_path / "a.txt") == stories
    assert len(texts_of(tmp_path / "a.txt", separator="")) == 1
    (tmp_path / "b.txt").write_text("==\n".join(stories))
    with pytest.warns(UserWarning, match="5 documents .* at '=='"):
        assert texts_of(tmp_path / "b.txt", separator="==") == stories
    # `==` cannot be told from its surroundings in `===`, so such a file is one piece.
    assert len(units_of(find_sources([tmp_path / "b.txt"]), 10, "==")) == 1
    (tmp_path / "c.png").write_bytes(b"\x89PNG")
    curate(CorpusSettings(inputs=(str(tmp_path),), separator="<|endoftext|>"), tmp_path / "out", Console())
    said = capsys.readouterr().err
    assert "5 documents were cut out of text files at '<|endoftext|>'" in " ".join(said.split())
    assert "1 .png" in said
    statistics = json.loads((tmp_path / "out" / "filter_statistics.json").read_text())
    assert statistics["changed"]["documents of text files with separators"] == 5


END = "<|endoftext|>"
SEPARATED = {  # what stands in the file, and the documents in it
    "alone": (f"one\n{END}\ntwo\r\n{END}\r\nthree\n{END}", ["one", "two", "three"]),
    "in front": (f"{END}\none\n{END}\ntwo", ["one", "two"]),
    "alone and mentioned": (
        f"it ends at {END} here\n{END}\ntwo{END}three",
        [f"it ends at {END} here", f"two{END}three"],
    ),
    "between texts": (f"One.{END}Two.{END}\nThree.{END} four{END}", ["One.", "Two.", "Three.", " four"]),
    "mentioned once": (f"One.{END}Two.", [f"One.{END}Two."]),
    "mentioned often": (f'Tokens as {END} or `{END}` and ({END}), "{END}".\n{END}: an end{END}', None),
}


@pytest.mark.parametrize("name", SEPARATED)
@pytest.mark.filterwarnings("ignore:.*cut out of text files")
def test_a_text_that_mentions_the_separator_is_not_split_there(tmp_path: Path, name: str) -> None:
    content, documents = SEPARATED[name]
    (tmp_path / "a.txt").write_bytes(content.encode())
    heard: list[SetAside] = []
    assert [one.text for one in read(tmp_path, on_set_aside=heard.append)] == (documents or [content])
    assert not heard


def test_a_file_of_nothing_but_separators_is_empty(tmp_path: Path) -> None:
    heard: list[SetAside] = []
    (tmp_path / "a.txt").write_text(f"\n{END}\n")
    assert not list(read(tmp_path, on_set_aside=heard.append))
    assert [one.reason for one in heard] == ["empty"]


@pytest.mark.filterwarnings("ignore:.*cut out of text files")
def test_a_long_file_with_separators_is_read_in_bounded_memory(tmp_path: Path) -> None:
    with (tmp_path / "a.txt").open("wb") as handle:
        for _ in range(40):
            handle.write(b"word " * 200_000 + b"<|end|>")
    for separator, wanted in (("<|end|>", 40), ("<|endoftext|>", 0), ("", 0)):  # without one, a line that is too long
        tracemalloc.start()
        chosen = CorpusSettings(max_document_mib=1.0, separator=separator)
        n_documents = sum(1 for _ in read(tmp_path / "a.txt", settings=chosen, on_set_aside=lambda record: None))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert n_documents == wanted
        assert peak < 12 << 20


def test_a_named_file_is_read_as_text_whatever_its_ending(tmp_path: Path) -> None:
    for name in ("notes.tex", "README", "b.txt"):
        (tmp_path / name).write_text(f"text of {name}")
    with pytest.warns(UserWarning, match=r"read as text, whatever the ending: .*notes\.tex"):
        assert texts_of(tmp_path / "notes.tex") == ["text of notes.tex"]
    found = find_sources([tmp_path, tmp_path / "README"])
    assert [Path(one.label).name for one in found.files] == ["README", "b.txt"]
    assert found.in_words().endswith("; passed over, since their endings are not those of text: 1 .tex")


JSON_FILES = {
    "list": ('[{"text": "one"},\n {"text": "two", "n": [1, {}]} , {"text": "three"}]', 3),
    "one line": ('[{"text": "one"},{"text": "two"},{"text": "three"}]\n', 3),
    "trailing comma": ('[{"text": "one"},{"text": "two"},{"text": "three"},]', 3),
    "lines": ('{"text": "one"}\n{"text": "two"}\n\n{"text": "three"}\n', 3),
    "frame": ('{"version": 1,\n "data": [{"text": "one"}, {"text": "two"}, {"text": "three"}]}', 3),
    "frame in a line": ('{"version": 1, "data": [{"text": "one"}, {"text": "two"}, {"text": "three"}]}', 3),
    "object": ('{\n  "text": "one",\n "list": [1]\n}\n', 1),
    "object in a line": ('{"text": "one"}', 1),
    "strings": ('["one", "two", "three"]', 3),
    "lines of strings": ('"one"\n"two"\n"three"\n', 3),
    "NaN": ('[{"text": "one", "x": NaN, "y": "\\ud800"}]', 1),
}


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("packing", ["", *PACKINGS])
@pytest.mark.parametrize("name", JSON_FILES)
def test_json_files_are_lists_lines_frames_or_one_object(tmp_path: Path, name: str, packing: str, mark: str) -> None:
    content, count = JSON_FILES[name]
    write(tmp_path / f"a.json{packing}", (mark + content).encode())
    assert texts_of(tmp_path) == ["one", "two", "three"][:count]


@pytest.mark.parametrize("size", [1, 5, 64])
def test_a_list_is_read_the_same_in_blocks_of_any_size(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "BLOCK_BYTES", size)
    texts = ['é\\" \n\u2028 [{', "x" * 200, "]},", "\\u00e9 \\", "end"]
    (tmp_path / "a.json").write_text(json.dumps([{"n": 12.5e3, "text": text} for text in texts], indent=1))
    assert texts_of(tmp_path) == [text.strip() for text in texts]


@pytest.mark.parametrize(
    ("name", "delimiter"),
    [("a.csv", ","), ("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "\t"), ("a.tsv", ","), ("a.csv.gz", "|")],
)
def test_rows_of_csv_are_records_by_the_names_in_the_first_line(tmp_path: Path, name: str, delimiter: str) -> None:
    rows = [["id", "text", "url"], ["7", 'a "quoted" one,\tand\n\nlines', "https://a.example"], ["", "two"], ["x"]]
    stream = io.StringIO(newline="")
    csv.writer(stream, delimiter=delimiter).writerows(rows)
    write(tmp_path / name, b"\xef\xbb\xbf" + stream.getvalue().encode())
    heard: list[SetAside] = []
    documents = list(read(tmp_path, on_set_aside=heard.append))
    assert [(one.text, one.url) for one in documents] == [(rows[1][1], rows[1][2]), ("two", "")]
    assert [(one.record, one.reason) for one in heard] == [("row 3", "no text field")]
