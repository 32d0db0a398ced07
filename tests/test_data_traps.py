"""Traps of data pipelines that others fell into, each named after its place in our notes, with the report it is from.

Most are held by tests elsewhere (tests/test_*.py); this module holds the rest.

 1  who is removed goes by place, not by id: here, and data_stage: documents_do_not_depend_on_which_file_holds_them
 2  unsorted or corrupt keys: here, and corpus_dedup: keys_that_do_not_fit, signatures_of_other_settings
 3  clustering in dicts on one core: corpus_dedup: union_find_of_a_long_chain, a_bucket_of_a_hundred_thousand
 4  more pieces than the system has handles: here, and data_stage: a_worker_that_is_killed, two_workers_give
 5  many small reads of every file: corpus_dedup: ranges_of_keys, the_result_does_not_depend_on_units_or_memory
 6  other words, another rate of duplicates: corpus_minhash: punctuation_and_case_do_not_count, numbers_of_old_stay
 7  duplicates removed without a look at clusters: here
 8  punctuation counted as words: here (by source), and corpus_rules: gopher_keeps_technical_english
 9  a stage that goes to the network: here, and corpus_language: no_network, corpus_extract: nothing_is_fetched
10  trainers out of memory, counts that overflow: tokenizer_train: a_sample_keeps_to_its_budget, no_pair_can_be_counted
11  control tokens in documents: tokenizer_encode: text_never_gives_a_control_token, bad_input: cannot_inject
12  ids wider than their files: here, and shards_files: ids_are_as_wide, more_than_its_vocabulary_is_refused
13  extractors that crash, hang and leak: corpus_extract: over_time, over_memory, process_dies, process_is_replaced
14  files cut off that read as whole: data_faults: a_file_cut_off, corpus_faults: wherever_a_packed_file, corpus_warc
15  texts that travel between processes: here, and data_stage: ray_gives_the_same_bytes
16  a file is one piece of work: here, and corpus_units
17  output packed with gzip: here
18  a module of the user's hides one of Python's: here (other clashes are for the environment)
19  loaders that drop or repeat tokens: shards_loader: every_token_is_a_target, going_on_from_a_state, the_shares
20  other thresholds than the ones documented: here, and corpus_rules: published_thresholds
"""

from __future__ import annotations

import html
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from data_stage import near_copy, sentence, text_of, write_inputs

from groundup import Tokenizer, TokenShards
from groundup.console import Console
from groundup.corpus import curate, stream_documents
from groundup.corpus.dedup import files as key_files
from groundup.corpus.engine import Engine
from groundup.corpus.passes import ANNOTATED
from groundup.errors import ArtifactError
from groundup.files import file_digest
from groundup.pipeline import build
from groundup.recipe import CorpusSettings, parse_recipe
from groundup.shards import write_shards

RESULT = ("documents.jsonl", "set_aside.jsonl", "filter_statistics.json")


def curated(out: Path, *inputs: Path, **changes: Any) -> dict[str, Any]:
    return curate(CorpusSettings(inputs=tuple(map(str, inputs)), **{"languages": (), **changes}), out)


def digests(out: Path) -> list[str]:
    return [file_digest(out / name) for name in RESULT]


def write_lines(path: Path, texts: Sequence[str], **more: Sequence[str]) -> Path:
    path.parent.mkdir(exist_ok=True)
    rows = [{"text": text, **{name: values[n] for name, values in more.items()}} for n, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def statistics_of(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "filter_statistics.json").read_text()))


# --- 1


def test_01_removals_go_by_id_when_files_change_places_names_and_pieces(tmp_path: Path) -> None:
    # FineWeb's published data: huggingface.co/datasets/HuggingFaceFW/fineweb, discussion 29
    chance = random.Random(1)
    single = [text_of(chance, 9) for _ in range(40)]
    twice = [text_of(chance, 9) for _ in range(10)]
    nearly = [near_copy(text, chance) for text in single[:5]]
    every = [*single, *twice, *twice, *nearly]
    out, folder = tmp_path / "out", tmp_path / "in"
    found = []
    for attempt in range(3):  # the same folder of measurements throughout: what still fits is used again
        chance.shuffle(every)
        shutil.rmtree(folder, ignore_errors=True)
        for number in range(5):
            names = f"{(number * 3 + attempt) % 7}.jsonl"
            write_lines(folder / names, every[number * 13 : (number + 1) * 13])
        summary = curated(out, folder, split_mib=(0.005, 1.0)[attempt % 2])
        assert summary["removed"] == {"duplicate": 10, "near-duplicate": 5}
        kept = {document.id: document.text for document in stream_documents(out)}
        assert len(set(kept.values())) == len(kept) == 50
        assert set(twice) | set(single[5:]) <= set(kept.values())  # nobody went whose text is not there
        for record in map(json.loads, (out / "set_aside.jsonl").read_text().splitlines()):
            survivor = kept[record["detail"].rsplit(" ", 1)[1]]
            assert record["excerpt"][:20] == survivor[:20] or record["reason"] == "near-duplicate"
        found.append({(document.id, document.split) for document in stream_documents(out)})
    assert found == [found[0]] * 3


# --- 2

SPOILED: dict[str, Callable[[Path], object]] = {
    "a flipped byte": lambda path: path.write_bytes(flipped(path.read_bytes())),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
}


def flipped(data: bytes) -> bytes:
    place = len(data) * 2 // 3
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize("how", SPOILED)
def test_02_spoiled_measurements_are_noticed_and_made_again(tmp_path: Path, how: str) -> None:
    # datatrove, issues 157 ("Hash order error"), 301 and 397
    chance = random.Random(2)
    texts = [text_of(chance, 9) for _ in range(30)]
    source = write_lines(tmp_path / "a.jsonl", [*texts, texts[3], near_copy(texts[4], chance), ""])
    curated(tmp_path / "out", source)
    wanted = digests(tmp_path / "out")
    (folder,) = (path for path in (tmp_path / "out" / ANNOTATED).iterdir() if path.is_dir())
    names = [path.name for path in folder.iterdir() if path.stat().st_size and not path.name.startswith(".")]
    assert {"ids.npy", "signatures.npy", "signals.parquet", "set_aside.jsonl", "unit.json"} <= set(names)
    for name in names if how == "a flipped byte" else ("ids.npy", "signals.parquet", "unit.json"):
        SPOILED[how](folder / name)
        curated(tmp_path / "out", source)
        assert digests(tmp_path / "out") == wanted, name


# --- 4


@pytest.mark.parametrize("options", [{"dedup": "near"}, {"dedup": "none", "dedup_within": "paragraphs"}], ids=str)
def test_04_more_pieces_than_files_that_may_be_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    # datatrove, issue 222 (hundreds of tasks); most systems allow 1,024 open files: 64 GB, in pieces of 64 MiB
    chance = random.Random(4)
    texts = [text_of(chance, 6) for _ in range(80)]
    source = write_lines(tmp_path / "a.jsonl", [*texts, texts[5]])
    curated(tmp_path / "whole", source, **options)
    monkeypatch.setattr(key_files, "_OPEN_MAPS", 6)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    n_open = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 64
    resource.setrlimit(resource.RLIMIT_NOFILE, (n_open + 24, before[1]))
    try:
        curated(tmp_path / "out", source, split_mib=source.stat().st_size / 36 / 2**20, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(list((tmp_path / "out" / ANNOTATED).iterdir())) >= 36
    assert digests(tmp_path / "out")[:2] == digests(tmp_path / "whole")[:2]


# --- 7


def test_07_clusters_are_reported_and_removing_can_be_switched_down(tmp_path: Path) -> None:
    # FineWeb (arXiv:2406.17557), section 3.4: one global deduplication removed what was good
    chance = random.Random(7)
    originals = [text_of(chance, 24) for _ in range(30)]
    texts = [*originals, *(near_copy(originals[0], chance) for _ in range(4)), near_copy(originals[1], chance)]
    source = write_lines(tmp_path / "a.jsonl", [*texts, originals[2], originals[2]])
    curated(tmp_path / "near", source)
    clusters = statistics_of(tmp_path / "near")["clusters"]
    assert clusters["largest_cluster"] == 5
    by_size = {row["size"]: (row["clusters"], row["documents"]) for row in clusters["clusters"]}
    assert by_size == {"2": (1, 2), "3-4": (0, 0), "5-8": (1, 5)}
    assert curated(tmp_path / "exact", source, dedup="exact")["removed"] == {"duplicate": 2}
    assert curated(tmp_path / "none", source, dedup="none")["removed"] == {}


# --- 8


def test_08_technical_pages_pass_the_published_rules_and_every_source_has_its_own_row(tmp_path: Path) -> None:
    # datatrove's English words are spaCy's tokens: its default chain kept 20 of 1,689 technical documents
    chance = random.Random(8)
    manual = [
        " ".join(f"{sentence(chance)} Set `--jobs={n}` (see [{chance.randrange(99)}]); it's `O(n)`." for n in range(12))
        for _ in range(20)
    ]
    books = [text_of(chance, 18) for _ in range(20)]
    symbols = ["# = % & " * 60 + sentence(chance) for _ in range(5)]
    kinds = ["manual"] * 20 + ["book"] * 20 + ["symbols"] * 5
    source = write_lines(tmp_path / "a.jsonl", [*manual, *books, *symbols], kind=kinds)
    # Repetition is not what this is about: our sentences are drawn from forty words.
    rules = dict.fromkeys(REPETITION, False)
    curated(tmp_path / "out", source, quality=("gopher",), thresholds=rules, source_field="kind", dedup="none")
    rows = statistics_of(tmp_path / "out")["by_source"]
    assert {name: (row["in"], row["kept"]) for name, row in rows.items()} == {
        "manual": (20, 20), "book": (20, 20), "symbols": (5, 0),
    }  # fmt: skip
    assert sum(rows["symbols"]["removed"].values()) == 5


REPETITION = [
    f"gopher.max_{name}"
    for name in [
        "duplicate_lines", "duplicate_paragraphs", "duplicate_line_characters", "duplicate_paragraph_characters",
        *(f"top_{n}gram_characters" for n in (2, 3, 4)), *(f"duplicate_{n}gram_characters" for n in range(5, 11)),
    ]
]  # fmt: skip


# --- 9 and 18: one run in an empty world, with the user's own modules lying about

GUARD = """
import os, sys
def refuse(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        if not isinstance(arguments[1], tuple):
            return  # within this machine, by a file
    elif event not in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        return
    with open(LOG, "a") as log:
        log.write(f"{event} {arguments}\\n")
    raise OSError("the network is closed")
sys.addaudithook(refuse)
with open(STARTED, "a") as log:
    log.write(f"{os.getpid()}\\n")
"""
STRAY = ("html", "json", "random", "string", "types", "token", "tokenize", "queue", "copy", "code", "parser", "utils")


@pytest.fixture(scope="module")
def closed_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole data stage, from the command line, of every format, without a network, among stray modules."""
    folder = tmp_path_factory.mktemp("closed")
    write_inputs(folder / "texts", 80)
    chance = random.Random(9)
    link = "<link rel=stylesheet href='https://example.org/a.css'><img src='https://example.org/i.png'>"
    for number in range(6):
        paragraphs = "".join(f"<p>{html.escape(text_of(chance, 3))}</p>" for _ in range(4))
        page = f"<html><head>{link}</head><body><article>{paragraphs}</article></body></html>"
        (folder / "texts" / f"page{number}.html").write_text(page)
    write_lines(folder / "quiz.jsonl", ["unused"])
    (folder / "quiz.jsonl").write_text(json.dumps({"question": text_of(chance, 2), "answer": "none"}) + "\n")
    (folder / "bad.txt").write_text("badword\n")
    (folder / "mine.py").write_text("def keep(document):\n    return True\n")
    for name in STRAY:
        (folder / f"{name}.py").write_text(
            f"open({str(folder / 'stray.log')!r}, 'a').write({name!r})\nraise SystemExit\n"
        )
    guard = tmp_path_factory.mktemp("guard")
    names = f"LOG, STARTED = {str(folder / 'network.log')!r}, {str(folder / 'started.log')!r}\n"
    (guard / "sitecustomize.py").write_text(names + GUARD)
    (folder / "recipe.toml").write_text(
        'name = "closed"\n[corpus]\ninputs = ["texts"]\nquality = ["gopher", "c4", "fineweb"]\n'
        'privacy = ["email", "phone", "ip", "credit_card"]\ndedup_within = "paragraphs"\ndedup_substring = 50\n'
        'predicate = "mine.py:keep"\ntoxic_words = "bad.txt"\nsplit_mib = 0.1\nworkers = 2\n'
        '[corpus.thresholds]\n"c4.min_sentences" = false\n'
        + "".join(f'"{name}" = false\n' for name in REPETITION)
        + '[corpus.decontaminate]\nfiles = ["quiz.jsonl"]\n'
        "[corpus.classifier]\npositive = ['texts/a.jsonl']\nnegative = ['texts/b.jsonl.gz']\nmin_score = 0.0\n"
        '[tokenizer]\nvocab_size = 400\nsplit = "llama3"\n[shards]\nworkers = 2\n'
    )
    script = Path(sys.executable).with_name("groundup")
    program = [str(script)] if script.is_file() else [sys.executable, "-P", "-m", "groundup"]
    paths = [str(guard), str(Path(__file__).resolve().parents[1])]
    ended = subprocess.run(
        [*program, "shards", "recipe.toml", "--out", "run"], cwd=folder, capture_output=True, text=True, timeout=200,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    (folder / "ended.json").write_text(json.dumps([ended.returncode, ended.stderr]))
    return folder


@pytest.mark.slow
def test_09_nothing_goes_to_the_network(closed_world: Path) -> None:
    # datatrove fetches its language model and nltk's punkt at first use; lighteval and spaCy do too
    code, said = json.loads((closed_world / "ended.json").read_text())
    assert code == 0, said
    processes = (closed_world / "started.log").read_text().split()
    assert len(set(processes)) >= 4  # the command's, two workers', an extractor's: the guard was in all of them
    assert not (closed_world / "network.log").exists()
    sources = {Path(document.source).suffix for document in stream_documents(closed_world / "run" / "corpus")}
    assert {".jsonl", ".gz", ".txt", ".html"} <= sources
    assert TokenShards.open(closed_world / "run" / "shards", "train").n_tokens > 0


@pytest.mark.slow
def test_09_the_guard_holds(closed_world: Path, tmp_path: Path) -> None:
    guard = "LOG, STARTED = 'log', 'started'\n" + GUARD
    try_it = "import socket\ntry:\n    socket.create_connection(('::1', 9))\nexcept OSError as error:\n    print(error)"
    done = subprocess.run([sys.executable, "-c", guard + try_it], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "the network is closed"
    assert "socket." in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_18_modules_in_the_working_folder_hide_none_of_pythons(closed_world: Path) -> None:
    # Ours: a stray html.py beside the texts was imported by the extractor's process, a types.py by every worker
    code, said = json.loads((closed_world / "ended.json").read_text())
    assert code == 0, said
    assert "Traceback" not in said
    assert not (closed_world / "stray.log").exists()
    statistics = statistics_of(closed_world / "run" / "corpus")
    assert "extraction crash" not in {reason for step in statistics["steps"] for reason in step["removed"]}


# --- 12


@pytest.mark.parametrize(("spare", "dtype"), [(65_536 - 300, "uint16"), (65_537 - 300, "uint32")])
def test_12_ids_beyond_two_bytes_come_back(tmp_path: Path, spare: int, dtype: str) -> None:
    # dolma's `tokens` writes uint16 unless told otherwise; so does datatrove's Elasticsearch path
    chance = random.Random(12)
    write_lines(tmp_path / "a.jsonl", [text_of(chance, 6) for _ in range(25)])
    curated(tmp_path / "corpus", tmp_path / "a.jsonl")
    documents = list(stream_documents(tmp_path / "corpus"))
    plain = Tokenizer.train((document.text for document in documents), vocab_size=300)

    class Shifted:
        """The same tokenizer with its ids at the top of a large vocabulary."""

        vocab_size = spare + 300
        end_of_text_id = plain.end_of_text_id + spare
        fingerprint = "0" * 32

        def encode_to_arrays(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
            ids, lengths = plain.encode_to_arrays(texts)
            return ids.astype(np.uint32) + np.uint32(spare), lengths

    write_shards(documents, Shifted(), tmp_path / "shards")  # type: ignore[arg-type]
    read = TokenShards.open(tmp_path / "shards", "train")
    assert read.dtype == np.dtype(dtype)
    wanted = [document.text for document in documents if document.split == "train"]
    texts = [plain.decode([int(one) - spare for one in ids[:-1]]) for ids in read.documents()]
    assert sorted(texts) == sorted(wanted)


# --- 15


class Listening(Engine):
    """Does the work here, and weighs what would have travelled to another process and back."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def map(self, function: Callable[[Any], Any], arguments: Sequence[Any]) -> Iterator[Any]:
        for argument in arguments:
            self.sent.append(pickle.dumps(argument))
            result = function(pickle.loads(self.sent[-1]))
            self.sent.append(pickle.dumps(result))
            yield result


def test_15_what_travels_does_not_grow_with_the_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Ray's object store spills and runs over where blocks of text travel (ray-project/ray, many issues)
    module = sys.modules[curate.__module__]
    weights = []
    for times in (1, 4):
        chance = random.Random(15)
        texts = [text_of(chance, 24) for _ in range(60 * times)]
        source = write_lines(tmp_path / f"{times}.jsonl", [*texts, *(near_copy(text, chance) for text in texts[:50])])
        engine = Listening()
        with monkeypatch.context() as patch:
            patch.setattr(module, "engine_for", lambda *arguments, here=engine, **options: here)
            curated(tmp_path / f"out {times}", source, dedup_within="paragraphs")
        weights.append(sum(map(len, engine.sent)))
        assert weights[-1] < source.stat().st_size / 2
        middles = [text[len(text) // 2 :][:60].encode() for text in texts]
        assert not any(middle in sent for middle in middles for sent in engine.sent)
    assert weights[1] < 1.2 * weights[0]


# --- 16 and 17


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_16_one_large_file_is_many_pieces_of_work(tmp_path: Path, name: str) -> None:
    # datatrove, and most others: one file of 100 GB keeps one core busy
    chance = random.Random(16)
    texts = [text_of(chance, 12) for _ in range(200)]
    lines = write_lines(tmp_path / "a.jsonl", texts)
    if name.endswith("parquet"):
        pq.write_table(pq_table(texts), tmp_path / name, row_group_size=10, compression="none", use_dictionary=False)
    size = (tmp_path / name).stat().st_size
    curated(tmp_path / "out", tmp_path / name, split_mib=size / 8 / 2**20, dedup="exact")
    units = [json.loads(path.read_text()) for path in (tmp_path / "out" / ANNOTATED).glob("*/unit.json")]
    assert len(units) >= 7
    assert sum(unit["documents"] for unit in units) == 200
    assert max(unit["documents"] for unit in units) <= 60
    curated(tmp_path / "whole", lines, dedup="exact")
    ids = [{document.id for document in stream_documents(tmp_path / folder)} for folder in ("out", "whole")]
    assert ids[0] == ids[1]


def pq_table(texts: Sequence[str]) -> Any:
    import pyarrow as pa

    return pa.table({"text": list(texts)})


def test_17_nothing_that_is_written_goes_through_gzip(tmp_path: Path) -> None:
    # datatrove's default writer: at 24 MB a CPU second, gzip was slower than all filters together
    chance = random.Random(17)
    curated(tmp_path / "out", write_lines(tmp_path / "a.jsonl", [text_of(chance, 9) for _ in range(20)]))
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not [path for path in files if path.read_bytes()[:2] == b"\x1f\x8b"]
    tables = [path for path in files if path.suffix == ".parquet"]
    used = Counter(pq.ParquetFile(path).metadata.row_group(0).column(0).compression for path in tables)
    assert used == {"LZ4": 2}


# --- 20


def test_20_the_report_shows_the_thresholds_that_were_used(tmp_path: Path) -> None:
    # FineWeb's paper says 0.1 for the characters in duplicate lines, its code 0.01
    chance = random.Random(20)
    short = [sentence(chance, 20) for _ in range(5)]
    source = write_lines(tmp_path / "a.jsonl", [*(text_of(chance, 15) for _ in range(30)), *short])
    recipe = parse_recipe(
        f'name = "t"\n[corpus]\ninputs = ["{source}"]\nquality = ["gopher"]\n'
        '[corpus.thresholds]\n"gopher.min_words" = 37\n"gopher.max_ellipses" = false\n',
        "t.toml",
    )
    build(recipe, tmp_path / "run", only=["corpus"], console=Console(quiet=True))
    statistics = statistics_of(tmp_path / "run" / "corpus")
    assert statistics["histograms"]["words"]["rule"] in ("gopher.min_words", "gopher.max_words")
    used = statistics["histograms"]["mean_word_length"]
    assert (used["least"], used["most"]) in ((3, None), (None, 10))
    assert "rule" not in statistics["histograms"].get("ellipses", {})
    page = html.unescape((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    assert "the least is 37" in page  # beside the examples of what it removed
    assert "gopher.min_words" in page
    assert any(f"gopher.max_hash_signs at {value}" in page for value in ("0.1", "0.10"))
    removed = next(step["removed"] for step in statistics["steps"] if "gopher.min_words" in step["removed"])
    assert removed["gopher.min_words"] == 5


def test_keys_that_cannot_be_opened_are_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "x.npy").mkdir()
    with pytest.raises(ArtifactError, match=r"x\.npy: cannot be read \(Is a directory\)"):
        key_files.load(tmp_path / "x.npy")
