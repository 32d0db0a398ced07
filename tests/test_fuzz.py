"""Every reader meets damaged files: only errors of ours come out, in time, within its memory, and nothing is lost.

GROUNDUP_FUZZ=30000 tries so many files over all readers (default: 3,000, in `make test-long` 30,000);
GROUNDUP_FUZZ_CASE=reader:number tries one.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import struct
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import tiny_run
from fuzz import PACKING, Files, Reader, faults, grouped
from generation_models import TEXT, random_model, small_tokenizer
from lengths import IS_LONG
from scrapy.http import Response
from shards_bytes import ByteTokenizer, document
from test_scaling_law import DATA, made_up

from groundup.alignment.conversations import load_conversations
from groundup.console import Console
from groundup.corpus.crawl.fetch import (
    Refused,
    extract_links,
    normalize_url,
    parse_robots,
    parse_sitemap,
    retry_after_seconds,
    unpacked,
)  # fmt: skip
from groundup.corpus.crawl.warc import WarcFiles, page_record
from groundup.corpus.decontaminate import find_tasks
from groundup.corpus.reading.extract import Extractor
from groundup.corpus.reading.read import UnitReader, units_of
from groundup.corpus.reading.sources import find_sources
from groundup.distributed import current_world
from groundup.evaluation.benchmarks import find_benchmark, read_items
from groundup.evaluation.comparison import compare_cards
from groundup.evaluation.scorecard import read_scores
from groundup.evaluation.table import compare, read_comparison
from groundup.files import write_json
from groundup.interop import export_folder, load_model, save_model
from groundup.pipeline import plan
from groundup.preview import check_recipe, derived_values
from groundup.recipe import CorpusSettings, ShardsSettings, read_recipe, recipe_toml
from groundup.report.closing import closing_table
from groundup.report.page import write_report
from groundup.report.record import read_record
from groundup.run import Run
from groundup.shards import TokenShards, import_ids, verify_shards, write_shards
from groundup.shards.export_ids import export_shards
from groundup.tokenizer import load_tokenizer
from groundup.training.checkpoint import CheckpointWriter, Progress, load_checkpoint, weights_of
from groundup.training.metrics import read_log
from groundup.training.scaling_law import ScalingLaw, fit_scaling_law

CASES = int(os.environ.get("GROUNDUP_FUZZ", "30000" if IS_LONG else "3000"))
ONE_CASE = os.environ.get("GROUNDUP_FUZZ_CASE", "")
LINES = [f"{TEXT} {number} " + "The old king gave bread. " * (number % 5) for number in range(12)]
SETTINGS = CorpusSettings(max_document_mib=1.0, extractor="resiliparse", extract_seconds=2.0)
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def read_folder(folder: Path) -> Files:
    """The files below a folder."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return {name: (folder / name).read_bytes() for name in names}


def made(make: Callable[[Path], object]) -> Files:
    """The files that something writes into a folder."""
    with tempfile.TemporaryDirectory() as place:
        make(Path(place))
        return read_folder(Path(place))


# --- Recipes


def recipes() -> list[Files]:
    folder = Path(tiny_run.__file__).parents[1] / "groundup" / "recipes"
    return [{"recipe.toml": path.read_bytes()} for path in sorted(folder.glob("*.toml"))] + [
        {"recipe.toml": tiny_run.TOML.format(inputs="groundup:classics").encode()}
    ]


def read_a_recipe(folder: Path) -> object:
    recipe = read_recipe(folder / "recipe.toml")
    check_recipe(recipe, "recipe.toml")
    return recipe_toml(recipe), derived_values(recipe)


# --- Corpus formats


def texts() -> list[Files]:
    plain = {"a.txt": "\n\n".join(LINES).encode(), "b.md": f"# Title\n\n{TEXT}".encode()}
    return [plain, *({f"a.txt{suffix}": pack(plain["a.txt"])} for suffix, (pack, _) in PACKING.items())]


def lines() -> list[Files]:
    rows = "".join(json.dumps({"id": str(n), "text": line, "n": n}) + "\n" for n, line in enumerate(LINES)).encode()
    array = json.dumps([{"text": line} for line in LINES]).encode()
    table = "id,text\n" + "".join(f'{number},"{line}"\n' for number, line in enumerate(LINES))
    others = [{"a.json": array}, {"a.csv": table.encode()}, {"a.tsv": table.replace(",", "\t").encode()}]
    return [
        {"a.jsonl": rows},
        {"a.jsonl": rows},
        *others,
        *({f"a.jsonl{suffix}": pack(rows)} for suffix, (pack, _) in PACKING.items()),
    ]


def tables() -> list[Files]:
    rows = pa.table({"id": range(len(LINES)), "text": LINES, "tags": [["a", "b"]] * len(LINES)})
    options = (
        {},
        {"compression": "zstd", "row_group_size": 3},
        {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
        {"use_dictionary": False, "write_page_checksum": True, "data_page_size": 200},
    )
    # 300 bytes that stand for 2 GB, and a page of 128 MB
    alike = pa.DictionaryArray.from_arrays(pa.array([0] * 1_000, pa.int32()), pa.array(["a" * (1 << 21)]))
    page = pa.table({"text": ["a" * (1 << 21)] * 64})
    made_of = [(rows, choice) for choice in options * 2] + [
        (pa.table({"text": alike}), {"compression": "zstd", "store_schema": False}),
        (page, {"compression": "zstd", "use_dictionary": False, "data_page_size": 1 << 30}),
    ]
    return [
        made(lambda place, table=table, choice=choice: pq.write_table(table, place / "a.parquet", **choice))
        for table, choice in made_of
    ]


PAGE = (
    "<html><head><title>A page</title><meta charset=utf-8></head><body><nav>Menu</nav>"
    f"<p>{TEXT}</p><p>{TEXT}</p></body></html>"
)


def pages() -> list[Files]:
    return [{"a.html": PAGE.encode()}, {"a.htm": PAGE.encode("utf-16")}]


def archives() -> list[Files]:
    def record(kind: str, block: bytes, content_type: str) -> bytes:
        head = (
            f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:uuid:{len(block)}>\r\n"
            f"WARC-Date: 2024-01-01T00:00:00Z\r\nWARC-Target-URI: https://example.org/{kind}\r\n"
            f"Content-Type: {content_type}\r\nContent-Length: {len(block)}\r\n\r\n"
        )
        return head.encode() + block + b"\r\n\r\n"

    body = PAGE.encode()
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    response = record("warcinfo", b"software: x\r\n", "application/warc-fields")
    for extra, content in (
        (b"Content-Length: %d\r\n" % len(body), body),
        (b"Transfer-Encoding: chunked\r\n", chunked),
        (b"Content-Encoding: gzip\r\n", PACKING[".gz"][0](body)),
    ):
        http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n" + extra + b"\r\n" + content
        response += record("response", http, "application/http; msgtype=response")
    converted = record("conversion", TEXT.encode(), "text/plain") * 3
    return [{"a.warc": response}, {"a.wet": converted}, {"a.warc.gz": PACKING[".gz"][0](response)}]


@functools.cache
def extractor() -> Extractor:
    """One worker process for all pages of a child."""
    return Extractor(SETTINGS.extractor, SETTINGS.extract_seconds)


def read_a_corpus(folder: Path) -> object:
    """Every file ends in records or reasons; every line that is not blank in one of them."""
    sources = find_sources([folder])
    aside = [*sources.aside]
    shown, counts = [], Counter[str]()
    for unit in units_of(sources, 1 << 12):
        reader = UnitReader(unit, SETTINGS, aside.append, extractor())
        for record in reader:
            counts[unit.source.label] += 1
            shown.append(record.text)
    counts.update(item.source for item in aside)
    whole = {item.source for item in aside if not item.place}
    for source in sources.files:
        path = Path(source.entry)
        least = 1
        if path.suffix == ".jsonl" and source.label not in whole and path.is_file() and not path.is_symlink():
            least = max(1, sum(bool(line.strip()) for line in path.read_bytes().split(b"\n")))
        assert counts[source.label] >= least, f"lost: {counts[source.label]} of {least} accounted for in {path.name}"
    known = {source.label for source in sources.files} | {*sources.passed_over} | {*counts}
    lost = [path.name for path in folder.iterdir() if path.as_posix() not in known and not path.is_dir()]
    assert not lost, f"lost: {lost} is in no list"
    return "".join(shown)


def evaluation_files() -> list[Files]:
    rows = "".join(json.dumps({"question": line, "answers": [line]}) + "\n" for line in LINES).encode()
    table = "question,answer\n" + "".join(f'"{line}",yes\n' for line in LINES)
    return [
        {"a.jsonl": rows},
        {"a.json": json.dumps([{"q": line} for line in LINES]).encode()},
        {"a.csv": table.encode()},
        {"a.txt.gz": PACKING[".gz"][0]("\n\n".join(LINES).encode())},
        made(lambda place: pq.write_table(pa.table({"q": LINES}), place / "a.parquet")),
    ]


def read_evaluation_files(folder: Path) -> object:
    return [text for task in find_tasks([folder]) for _, texts in task.records() for text in texts]


def benchmarks() -> list[Files]:
    told = 'kind = "choice"\nfiles = "a.jsonl"\ncontext = "{{ q }}"\nchoices = "answers"\ngold = "{{ right }}"\n'
    rows = "".join(json.dumps({"q": line, "answers": ["no", "yes"], "right": 1}) + "\n" for line in LINES)
    return [{"mine.toml": told.encode(), "a.jsonl": rows.encode()}]


def read_a_benchmark(folder: Path) -> object:
    return [item.pairs for item in read_items(find_benchmark(str(folder / "mine.toml")), folder)]


def scores() -> list[Files]:
    choice = [{"logprob": [-1.0 - n % 2, -1.5], "greedy": [True, False], "gold": 0} for n in range(6)]
    reply = [
        {"reply": "4", "target": "4", "answer": "4", "outcomes": {"exact_match": n > 2, "f1": 1.0}} for n in range(6)
    ]
    code = [{"passed": [True, n < 3], "reasons": ["", ""]} for n in range(6)]
    text = [{"bits": [[9.0], [8.0]], "bytes": [[5], [4 + n]]} for n in range(6)]
    files: Files = {}
    for name, rows in {"arc": choice, "sums": reply, "code": code, "text": text}.items():
        told = [{"identity": "x"}, *({"item": n, "group": "", **row} for n, row in enumerate(rows))]
        files[f"{name}.jsonl"] = "".join(json.dumps(row) + "\n" for row in told).encode()
    one = {"fingerprint": "f", "identity": "x", "figures": {}, "groups": {}}
    card = {"format": 2, "model": "x", "core": None, "tasks": {Path(name).stem: one for name in files}}
    files["scores.json"] = json.dumps(card).encode()
    return [{f"{side}/{name}": data for side in "ab" for name, data in files.items()}]


def read_scores_of_two(folder: Path) -> object:
    return compare_cards(folder / "a", folder / "b")


def conversations() -> list[Files]:
    def line(number: int) -> str:
        messages = [
            {"role": "user", "content": LINES[number % 12] + str(number)},
            {"role": "assistant", "content": "Yes."},
        ]
        return json.dumps({"messages": messages}) + "\n"

    return [{"a.jsonl": "".join(map(line, range(40))).encode()}]


def read_conversations(folder: Path) -> None:
    found = load_conversations([str(folder / "a.jsonl")], 0, 1, "align.sft")
    if not found.set_aside.keys() & {"unreadable", "damaged file", "cut off", "invalid UTF-8"}:  # of a whole file
        n_lines = sum(bool(line.strip()) for line in (folder / "a.jsonl").read_bytes().split(b"\n"))
        n_found = len(found.train) + len(found.held_out) + sum(found.set_aside.values())
        assert n_found >= n_lines, f"lost: {n_found} of {n_lines} lines accounted for"


# --- Tokenizers and models


def tokenizers() -> list[Files]:
    import tokenizers as hf

    def theirs(model: object, trainer: object, folder: Path) -> None:
        engine = hf.Tokenizer(model)
        engine.normalizer = hf.normalizers.Sequence([hf.normalizers.NFKC(), hf.normalizers.Lowercase()])
        engine.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
        engine.decoder = hf.decoders.ByteLevel()
        engine.train_from_iterator([TEXT] * 3, trainer)
        engine.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({**SPECIAL, "chat_template": "{{ messages }}"}))

    special, letters = list(SPECIAL.values()), hf.pre_tokenizers.ByteLevel.alphabet()
    bpe = hf.trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=letters, show_progress=False)
    found = [made(lambda place, kind=kind: small_tokenizer(kind).save(place)) for kind in ("bpe", "unigram")]
    found.append(made(lambda place: theirs(hf.models.BPE(), bpe, place)))
    model = json.loads(found[-1]["tokenizer.json"])["model"]
    merges = "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]) + "\n"
    found.append({"vocab.json": json.dumps(model["vocab"]).encode(), "merges.txt": merges.encode()})
    return found


def read_a_tokenizer(folder: Path) -> object:
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(f"{TEXT} </s> <|end|>")
    assert all(0 <= index < tokenizer.vocab_size for index in ids), "ids beyond the vocabulary"
    return tokenizer.decode(ids)


def models() -> list[Files]:
    def both(place: Path) -> None:
        tokenizer = small_tokenizer()
        save_model(place / "ours", random_model("llama-nano", vocab_size=tokenizer.vocab_size), tokenizer)
        export_folder(place / "ours", place / "theirs")
        export_folder(place / "ours", place / "pieces", most_bytes=60_000)

    files = made(both)
    return [
        {name.partition("/")[2]: data for name, data in files.items() if name.startswith(f"{folder}/")}
        for folder in ("ours", "theirs", "pieces")
    ]


def read_a_model(folder: Path) -> None:
    load_model(folder)
    strangers = [path.name for path in folder.iterdir() if path.is_symlink() and path.suffix == ".safetensors"]
    assert not strangers, f"read a file that is not in the folder: {strangers}"


# --- Shards and other programs' ids


def shards() -> list[Files]:
    documents = [document(text, split) for split in ("train", "validation") for text in LINES]
    write = functools.partial(write_shards, documents, ByteTokenizer(), settings=ShardsSettings(shard_tokens=1024))
    return [made(lambda place: write(place / "shards"))]


def read_shards(folder: Path) -> None:
    verify_shards(folder / "shards")
    for split in ("train", "validation"):
        stream = TokenShards.open(folder / "shards", split)
        n_tokens = sum(len(ids) for ids in stream.documents())
        assert n_tokens == stream.n_tokens, f"lost: {n_tokens} of {stream.n_tokens} tokens"
    export_shards(folder / "shards", folder / "out", "megatron")


def foreign_ids() -> list[Files]:
    ids = [np.arange(1, 60, dtype="<u2"), np.arange(5, 90, dtype="<u2")]
    flat = np.concatenate([np.append(row, 0) for row in ids]).astype("<u2")
    llmc = struct.pack("<256i", 20240520, 1, len(flat), *[0] * 253) + flat.tobytes()
    table = pa.table({"input_ids": [row.tolist() for row in ids], "attention_mask": [[1] * len(row) for row in ids]})
    sizes = [len(row) for row in ids]
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 2, 3) + struct.pack("<2i", *sizes)
    index += struct.pack("<2q", 0, 2 * sizes[0]) + struct.pack("<3q", 0, 1, 2)
    return [
        {"ids/train.bin": flat.tobytes()},
        {"ids/train.bin": llmc},
        {"ids/train.idx": index, "ids/train.bin": b"".join(row.tobytes() for row in ids)},
        made(lambda place: ((place / "ids").mkdir(), pq.write_table(table, place / "ids/train.parquet"))),
        made(lambda place: ((place / "ids").mkdir(), pa.feather.write_feather(table, str(place / "ids/train.arrow")))),
    ]


def read_foreign_ids(folder: Path) -> None:
    found = import_ids(folder / "ids", folder / "out", end_of_text_id=0, settings=ShardsSettings(shard_tokens=1024))
    verify_shards(folder / "out")
    assert found.manifest.splits["train"].tokens


# --- Runs


def runs() -> list[Files]:
    metrics = [
        {"step": n, "loss": 5.0 / n, "lr": 1e-3, "tokens": 64 * n, "tokens_per_second": 1e3} for n in range(1, 9)
    ]
    logs = {
        "metrics": [*metrics, {"step": 8, "val_loss": 1.5, "val_bits_per_byte": 2.0}],
        "timings": [{"step": n, "seconds": 1.0, "tokens_per_second": 1e3} for n in range(1, 9)],
        "samples": [{"step": n, "prompt": "The", "text": " cat", "n": 1} for n in range(1, 9)],
    }
    score = {"value": 0.5, "stderr": 0.1, "n": 20}
    both = {"fingerprint": "f", "identity": "x"}
    tasks = {
        "bits_per_byte": {**both, "figures": {"bits_per_byte": score}, "groups": {}},
        "groundup:tasks": {**both, "figures": {"exact_match": score}, "groups": {"capital": {"exact_match": score}}},
    }
    scores = {"format": 2, "model": "x", "core": None, "tasks": tasks}
    record = {"item": 0, "group": "capital", "prompt": "Capital?", "target": "b", "reply": "b"}
    records = [{"identity": "x"}, {**record, "outcomes": {"exact_match": True}}]
    row = {"key": "bits_per_byte", "model": "pretrain", "label": "bits per byte, pretrain"}
    table = {
        "rows": [{**row, "before": None, "after": score}],
        "gates": [],
        "model": "sft",
        "by_kind": {},
        "answers": [],
    }

    def write(place: Path) -> None:
        recipe, run = tiny_run.tiny_recipe(Path("groundup:classics")), Run(place)
        run.create(recipe)
        tiny_run.mark_done(
            recipe, run, {name: {"loss": 1.5, "documents_in": 9} for name in ("evaluate/pretrain", "sft")}
        )
        for name, rows in logs.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (place / "pretrain" / f"{name}.jsonl").write_text(text, encoding="utf-8")
        write_json(place / "evaluate" / "pretrain" / "scores.json", scores)
        lines = "".join(json.dumps(row) + "\n" for row in records)
        (place / "evaluate" / "pretrain" / "groundup-tasks.jsonl").write_text(lines, encoding="utf-8")
        write_json(place / "evaluate" / "scores.json", table)
        write_json(place / "corpus" / "filter_statistics.json", {"documents_in": 9, "removed": {"empty": 1}})

    files = made(write)
    return [{name: data for name, data in files.items() if "/." not in f"/{name}"}]


def read_a_run(folder: Path) -> object:
    run = Run.existing(folder)
    for path in folder.rglob("*.jsonl"):
        read_log(path)
    read_scores(run.folder("evaluate/pretrain"))
    closing_table(read_comparison(run), run)
    return read_record(run), compare(run.recipe, run), plan(run.recipe, run, strict=False)


def read_a_report(folder: Path) -> None:
    write_report(Run.existing(folder))


def checkpoints() -> list[Files]:
    def write(place: Path) -> None:
        model = random_model("llama-nano")
        writer = CheckpointWriter(place, current_world(), model.config, 2, beside=False)
        progress = Progress(step=3, tokens=9, seconds=1.0, fingerprint="f", threads=1, world_size=1)
        writer.save({"weights": lambda: weights_of(model)}, progress)

    return [made(write)]


def read_checkpoints(folder: Path) -> object:
    return load_checkpoint(folder, "f", ("weights",), Console(quiet=True))


# --- Crawling: what comes from the net, and what an earlier crawl left


def crawl_files() -> list[Files]:
    links = "".join(f'<a href="/page/{n}">x</a><meta name=robots content="nofollow">' for n in range(5))
    urls = "".join(f"<url><loc>https://example.org/{n}</loc></url>" for n in range(5))
    sitemap = f'<?xml version="1.0"?><urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">{urls}</urlset>'
    robots = "User-agent: *\nDisallow: /private\nCrawl-delay: 2\nSitemap: https://example.org/sitemap.xml\n"
    return [
        {"links": f"<html><head><base href='https://example.org/'></head>{links}</html>".encode()},
        {"sitemap": sitemap.encode()},
        {"robots": robots.encode()},
    ]


def read_crawl_files(folder: Path) -> None:
    (path,) = [path for path in folder.iterdir() if path.is_file()] or [Path(os.devnull)]
    if path.is_symlink():
        return  # what comes from the net is no file
    body = path.read_bytes()
    end = body[-99:].decode("latin-1")
    for kind in (b"text/html", b"text/html; charset=" + body[:20]):
        headers = {"Content-Type": kind, "X-Robots-Tag": body[-99:]}
        extract_links(Response("https://example.org/", headers=headers, body=body), "groundup")
    parse_robots(body, "groundup").can_fetch("https://example.org/private", "groundup")
    retry_after_seconds(end)
    with contextlib.suppress(Refused):
        unpacked(body, "gzip", 1 << 20)
    with contextlib.suppress(Refused):
        _ = [normalize_url(url) for url in parse_sitemap(body)[0]]


def crawl_folders() -> list[Files]:
    def write(place: Path) -> None:
        for _ in range(2):
            files = WarcFiles(place, "test")
            for number in range(3):
                files.append(page_record(Response(f"https://example.org/{number}", body=b"text")))
            files.close()
        files = WarcFiles(place, "test")
        files.append(page_record(Response("https://example.org/4")))

    return [made(write)]


def read_crawl_folder(folder: Path) -> None:
    files = WarcFiles(folder, "test")
    for url in files.stored:
        files.read(url)


READERS: dict[str, Reader] = {
    "recipe": (recipes, read_a_recipe),
    "text": (texts, read_a_corpus),
    "jsonl": (lines, read_a_corpus),
    "parquet": (tables, read_a_corpus),
    "html": (pages, read_a_corpus),
    "warc": (archives, read_a_corpus),
    "evaluation": (evaluation_files, read_evaluation_files),
    "benchmark": (benchmarks, read_a_benchmark),
    "scores": (scores, read_scores_of_two),
    "conversations": (conversations, read_conversations),
    "tokenizer": (tokenizers, read_a_tokenizer),
    "model": (models, read_a_model),
    "shards": (shards, read_shards),
    "ids": (foreign_ids, read_foreign_ids),
    "run": (runs, read_a_run),
    "report": (runs, read_a_report),
    "checkpoint": (checkpoints, read_checkpoints),
    "law": (lambda: [made(lambda place: fit_scaling_law(made_up(), DATA).save(place / "law.json"))], ScalingLaw.load),
    "crawl": (crawl_files, read_crawl_files),
    "crawl-folder": (crawl_folders, read_crawl_folder),
}

COST = {"report": 10, "scores": 10}
"""How many times fewer cases than the others, for those that take long."""
EACH = CASES / sum(1 / COST.get(name, 1) for name in READERS)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.timeout(3000)
def test_damaged_files_end_in_an_error_of_ours_in_time_and_nothing_is_lost(name: str) -> None:
    numbers = range(math.ceil(EACH / COST.get(name, 1)))
    if ONE_CASE:
        wanted, _, number = ONE_CASE.partition(":")
        if wanted != name:
            pytest.skip(f"only {ONE_CASE} is tried")
        numbers = range(int(number), int(number) + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = list(faults(name, READERS[name], numbers))
    assert not found, f"repeat one with GROUNDUP_FUZZ_CASE=reader:number\n{grouped(found, name)}"
