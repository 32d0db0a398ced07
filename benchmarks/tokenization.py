"""Engines side by side: the same text to the same ids, in MB per CPU-second; and two trainers of the same BPE.

Every measurement is a process of its own with one thread, so every engine starts cold; rows take turns. Text is
given in batches of some 4 MB, as the shards stage does. "again" is a second pass of the same process over the same
text: what an engine that remembers pieces reaches on text that repeats itself.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import xxhash
from record import spread, write_result

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "raw_web"
ENGINES = (("huggingface", ""), ("tiktoken", ""), ("gigatoken", ""), ("tiktoken", "en"), ("gigatoken", "en"))
"""Name, and the language of the text ("": all of the text, in some 180 languages)."""

TRAINERS = ("huggingface", "rustbpe")
VOCAB_SIZE = 32_768
BATCH_BYTES = 4 << 20


def main() -> None:
    """Train, run the engines in turn for some rounds, compare, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, nargs="+", default=sorted(DATA.glob("raw-0*.jsonl.gz")))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train-mb", type=float, default=15.0, help="text that the trainers get")
    parser.add_argument("--slow-mb", type=float, default=10.0, help="text that the slowest engine gets")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(json.loads(arguments.one))))
        return
    if not arguments.data:
        parser.error(f"no text in {DATA}: name JSONL files with --data")
    files = [str(path) for path in arguments.data]
    with tempfile.TemporaryDirectory() as folder:
        training = train_all(files, arguments.train_mb, arguments.rounds, folder)
        encoding = encode_all(files, arguments.slow_mb, arguments.rounds, str(Path(folder) / "huggingface"))
    write_result("tokenization", {"vocab_size": VOCAB_SIZE, "split": "llama3", **encoding, "training": training})


def train_all(files: list[str], megabytes: float, rounds: int, folder: str) -> dict[str, object]:
    """Both trainers on the same text; the tokenizers stay in `folder`."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in TRAINERS}
    for _ in range(rounds):
        for name in TRAINERS:
            row = {"trainer": name, "files": files, "mb": megabytes, "out": str(Path(folder) / name)}
            found[name].append(run(row))
    print("| trainer | MB/cpu-s | CPU seconds | tokens | peak MiB |\n|---|---|---|---|---|")
    rows = {}
    for name, runs in found.items():
        rows[name] = {
            "mb_per_cpu_second": spread([one["mb_per_cpu_second"] for one in runs]),
            "cpu_seconds": spread([one["cpu_seconds"] for one in runs]),
            "tokens": runs[0]["tokens"],
            "peak_mib": max(one["peak_mib"] for one in runs),
        }
        speed, seconds = rows[name]["mb_per_cpu_second"]["median"], rows[name]["cpu_seconds"]["median"]
        print(f"| {name} | {speed:.1f} | {seconds:.1f} | {rows[name]['tokens']:,.0f} | {rows[name]['peak_mib']:.0f} |")
    usual, fast = (rows[name]["tokens"] for name in TRAINERS)
    return {"mb": megabytes, "trainers": rows, "tokens_of_rustbpe_over_huggingface": fast / usual}


def encode_all(files: list[str], slow_mb: float, rounds: int, tokenizer: str) -> dict[str, object]:
    """Every engine on the whole text, and on a part that the slowest can do too; their ids must be equal."""
    common = {"files": files, "digest_mb": slow_mb, "tokenizer": tokenizer}
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for name, language in ENGINES:
            megabytes = slow_mb if name == "huggingface" else 1e9
            row = {**common, "engine": name, "mb": megabytes, "language": language}
            found.setdefault(f"{name}, {language or 'all languages'}", []).append(run(row))
    digests = {one["digest"] for runs in found.values() for one in runs}
    assert len(digests) == 1, "the engines give different ids"
    print("| engine | MB/cpu-s | again | load s | peak MiB |\n|---|---|---|---|---|")
    rows = {}
    for name, runs in found.items():
        rows[name] = {
            "mb": runs[0]["mb"],
            "mb_per_cpu_second": spread([one["mb_per_cpu_second"] for one in runs]),
            "mb_per_cpu_second_again": spread([one["mb_per_cpu_second_again"] for one in runs]),
            "load_cpu_seconds": spread([one["load_cpu_seconds"] for one in runs]),
            "peak_mib": max(one["peak_mib"] for one in runs),
        }
        first, again = rows[name]["mb_per_cpu_second"], rows[name]["mb_per_cpu_second_again"]
        print(
            f"| {name} | {first['median']:.1f} ({first['min']:.1f} to {first['max']:.1f}) | {again['median']:.1f} | "
            f"{rows[name]['load_cpu_seconds']['median']:.2f} | {rows[name]['peak_mib']:.0f} |"
        )
    return {"ids_are_equal": True, "compared_mb": slow_mb, "engines": rows}


def run(row: dict[str, object]) -> dict[str, float]:
    """One measurement in a fresh process with one thread."""
    environment = {**os.environ, "RAYON_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--one", json.dumps(row)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout)


def measure(row: dict[str, object]) -> dict[str, float]:
    """What a fresh process does."""
    texts = read_texts(row["files"], float(str(row["mb"])), str(row.get("language", "")))
    megabytes = sum(len(text.encode("utf-8", "replace")) for text in texts) / 1e6
    found = train_one(texts, row) if "trainer" in row else encode_one(texts, row)
    seconds = found.pop("seconds")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if "seconds_again" in found:
        found["mb_per_cpu_second_again"] = megabytes / found.pop("seconds_again")
    return {
        "mb": megabytes,
        "cpu_seconds": seconds,
        "mb_per_cpu_second": megabytes / seconds,
        "peak_mib": peak,
        **found,
    }


def train_one(texts: list[str], row: dict[str, object]) -> dict[str, float]:
    """Train, and count the tokens of the text trained on."""
    from groundup.tokenizer import Tokenizer

    start = time.process_time()
    trained = Tokenizer.train(texts, vocab_size=VOCAB_SIZE, trainer=str(row["trainer"]))
    seconds = time.process_time() - start
    trained.save(Path(str(row["out"])))
    _, lengths = trained.encode_to_arrays(texts)
    return {"seconds": seconds, "tokens": int(lengths.sum())}


def encode_one(texts: list[str], row: dict[str, object]) -> dict[str, float]:
    """Encode everything twice with one engine."""
    from tokenizers import Tokenizer as HuggingFace

    from groundup.tokenizer.engines import GigatokenEncoder, HuggingFaceEncoder, TiktokenEncoder

    spec = json.loads((Path(str(row["tokenizer"])) / "tokenizer.json").read_text(encoding="utf-8"))
    reference = HuggingFaceEncoder(HuggingFace.from_str(json.dumps({**spec, "added_tokens": []})))
    start = time.process_time()
    kinds = {"tiktoken": TiktokenEncoder, "gigatoken": GigatokenEncoder}
    encoder = kinds[str(row["engine"])](spec, reference) if row["engine"] in kinds else reference
    loaded = time.process_time() - start
    batches = list(batched(texts))
    seconds = []
    for _ in range(2):
        start = time.process_time()
        for batch in batches:
            encoder.encode(batch)
        seconds.append(time.process_time() - start)
    compared = digest(encoder, read_texts(row["files"], float(str(row["digest_mb"]))))
    return {"load_cpu_seconds": loaded, "seconds": seconds[0], "seconds_again": seconds[1], "digest": compared}


def digest(encoder: object, texts: list[str]) -> str:
    """Of the ids of the texts that every engine encodes."""
    value = xxhash.xxh3_128()
    for batch in batched(texts):
        ids, lengths = encoder.encode(batch)  # type: ignore[attr-defined]
        value.update(ids.astype(np.uint32).tobytes())
        value.update(lengths.astype(np.int64).tobytes())
    return value.hexdigest()


def read_texts(files: object, megabytes: float, language: str = "") -> list[str]:
    """The texts of JSONL files, as many as make up so much."""
    texts = []
    for path in map(str, files):  # type: ignore[call-overload]
        with gzip.open(path, "rt") if path.endswith(".gz") else open(path, encoding="utf-8") as lines:
            records = [json.loads(line) for line in lines]
        texts += [record["text"] for record in records if record.get("lang", "").startswith(language)]
    # The two files are of one kind; every n-th text of them is a fair part.
    step = max(1, round(sum(map(len, texts)) / 1e6 / megabytes))
    return within(texts[::step], megabytes)


def within(texts: list[str], megabytes: float) -> list[str]:
    """The first texts, as many as make up so much."""
    sizes = np.cumsum([len(text.encode("utf-8", "replace")) for text in texts])
    return texts[: int(np.searchsorted(sizes, megabytes * 1e6)) + 1]


def batched(texts: list[str]) -> list[list[str]]:
    """Texts in batches of some megabytes."""
    batches, size = [[]], 0
    for text in texts:
        if size >= BATCH_BYTES:
            batches.append([])
            size = 0
        batches[-1].append(text)
        size += len(text)
    return batches


if __name__ == "__main__":
    main()
