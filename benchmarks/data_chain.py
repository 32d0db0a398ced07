"""The text chain of the data stage against datatrove 0.10.1, in CPU seconds: same input, same rules, same tokenizer.

    JSONL → language (en) → Gopher quality and repetition → MinHash 14 × 8 → 32k tokens → shards

groundup runs with one worker (with gigatoken, and with tiktoken as if gigatoken was not installed) and with two, for
wall time. datatrove runs in an environment of its own, in its default form and in the fastest patched one
(`baselines/datatrove_chain.py` says what is patched). Every run is a process of its own with one thread a worker, and
rows take turns. "chain" leaves out start and imports of both; "whole" is all that the system booked for the processes.
Training the tokenizer is not part of either.

Examples:
    python benchmarks/data_chain.py --quick                         a smoke run on 1 MB
    python benchmarks/data_chain.py --generated 60 300              two made-up corpora beside the real one
    python benchmarks/data_chain.py --input pages.jsonl --generated 0 --large 0 --rounds 5
    python benchmarks/data_chain.py --without-datatrove             groundup's rows only
    python benchmarks/data_chain.py --input none --generated 0 --large 400 --keep      one corpus anew
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gzip
import hashlib
import importlib
import importlib.metadata
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from baselines.datatrove_runs import ENVIRONMENT, FORMS, agreement, make_environment, run_chain
from processes import ONE_THREAD, cpu_seconds, run

HERE = Path(__file__).resolve().parent
RAW = HERE.parents[1] / "shared" / "data" / "raw_web" / "raw-00.jsonl.gz"
VOCAB_SIZE = 32_768
TRAINING_BYTES = 32 << 20
PIECE_MIB = 8
"""Size of a piece of work, with one worker as with two; the bytes of the result do not depend on it."""

GROUNDUP: dict[str, dict[str, Any]] = {
    "groundup": {"workers": 1, "engine": "gigatoken"},
    "groundup, tiktoken": {"workers": 1, "engine": "tiktoken"},
    "groundup, 2 workers": {"workers": 2, "engine": "gigatoken"},
}
DATATROVE = {f"datatrove, {form}": form for form in FORMS}


def main() -> None:
    """Prepare corpora, run the rows in turn, compare the decisions, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, default=RAW, help="real text: JSONL (.gz too) with id and text")
    parser.add_argument("--generated", type=float, nargs="*", default=[60.0], help="megabytes of made-up corpora")
    parser.add_argument("--large", type=float, nargs="*", default=[400.0], help="megabytes, for groundup's rows only")
    parser.add_argument("--seed", type=int, default=0, help="of the made-up corpora")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--default-mb", type=float, default=20.0, help="text for datatrove's slow default form")
    parser.add_argument("--default-rounds", type=int, default=1)
    parser.add_argument("--venv", type=Path, default=ENVIRONMENT, help="datatrove's environment")
    parser.add_argument("--without-datatrove", action="store_true")
    parser.add_argument("--keep", action="store_true", help="keep earlier results of corpora that are not measured now")
    parser.add_argument("--quick", action="store_true", help="1 MB, one round, and no result file")
    parser.add_argument("--make-environment", action="store_true", help="make datatrove's environment, and stop")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        row = json.loads(arguments.one)
        Path(row["result"]).write_text(json.dumps(DO[row["do"]](row)), encoding="utf-8")
        return
    if not arguments.without_datatrove or arguments.make_environment:
        make_environment(arguments.venv)
        if arguments.make_environment:
            return
    if arguments.quick:
        arguments.generated, arguments.large, arguments.rounds = [1.0], [], 1
        arguments.default_mb, arguments.input = 0.3, Path()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, file, origin, with_datatrove in prepare(arguments, Path(folder)):
            found.append({"corpus": name, **origin, **benchmark(file, arguments, with_datatrove)})
            print(table(found[-1]))
    if not arguments.quick:
        from record import RESULTS, write_result

        if arguments.keep and (RESULTS / "data_chain.json").is_file():
            earlier = json.loads((RESULTS / "data_chain.json").read_text(encoding="utf-8"))["corpora"]
            names = {one["corpus"] for one in found}
            found = [*(one for one in earlier if one["corpus"] not in names), *found]
        baseline = {"datatrove": found[0].get("baseline_versions")} if found else {}
        versions = {name: importlib.metadata.version(name) for name in ("gigatoken", "tiktoken", "pyarrow")}
        write_result("data_chain", {"vocab_size": VOCAB_SIZE, "versions": {**versions, **baseline}, "corpora": found})


def prepare(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Path, dict[str, Any], bool]]:
    """The corpora as plain JSONL, each in a folder of its own: name, file, where it comes from, and for whom."""
    from data_corpus import write_corpus

    if arguments.input.is_file():
        file = _place(folder, "real")
        with _open(arguments.input) as source, file.open("wb") as out:
            shutil.copyfileobj(source, out)
        yield arguments.input.name, file, {}, not arguments.without_datatrove
    sizes = [(megabytes, not arguments.without_datatrove) for megabytes in arguments.generated]
    for megabytes, with_datatrove in [*sizes, *((megabytes, False) for megabytes in arguments.large)]:
        if not megabytes:
            continue
        file = _place(folder, f"generated-{megabytes:g}")
        kinds = write_corpus(file, megabytes, arguments.seed)
        with file.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        yield (
            f"generated, {megabytes:g} MB",
            file,
            {"seed": arguments.seed, "made_of": "groundup:classics", "kinds": kinds, "sha256": digest},
            with_datatrove,
        )


def benchmark(file: Path, arguments: argparse.Namespace, with_datatrove: bool) -> dict[str, Any]:
    """All rows on one corpus, or groundup's alone."""
    with tempfile.TemporaryDirectory(dir=file.parents[1]) as name:
        folder = Path(name)
        tokenizer = folder / "tokenizer"
        size, n_documents = size_of(file)
        measure({"do": "train", "input": str(file), "out": str(tokenizer)}, folder)
        sample = _place(folder, "sample")
        sample_size = cut_sample(file, sample, arguments.default_mb)
        runs: dict[str, list[dict[str, Any]]] = {}
        for number in range(arguments.rounds):
            for row, how in GROUNDUP.items():
                runs.setdefault(row, []).append(measure({"do": "chain", "input": str(file), **how}, folder))
            for row, form in DATATROVE.items() if with_datatrove else ():
                if form == "patched" or number < arguments.default_rounds:
                    what = sample if form == "default" else file
                    runs.setdefault(row, []).append(run_chain(form, what, tokenizer, folder, arguments.venv))
        rows = {row: summary(found, sample_size if "default" in row else size) for row, found in runs.items()}
        for row, how in GROUNDUP.items():
            rows[row]["encoder"] = measure({"do": "encoder", **how}, folder)["encoder"]
        result = {
            "megabytes": size,
            "documents": n_documents,
            "sample_megabytes": sample_size,
            "rows": rows,
            "ratios": ratios(rows),
        }
        stages, found = compare(file, sample, tokenizer, folder, arguments.venv if with_datatrove else None)
        if found:
            result["baseline_versions"] = runs["datatrove, patched"][0]["versions"]
        return {**result, "groundup_stages": stages, "agreement": found}


def compare(
    file: Path, sample: Path, tokenizer: Path, folder: Path, venv: Path | None
) -> tuple[dict[str, float], dict[str, Any]]:
    """Runs that are not timed against each other: groundup's CPU seconds by step, and who decides how."""
    found = {}
    first: dict[str, Any] = {}
    for form, what in (("patched", file), ("default", sample)):
        mine = measure({"do": "chain", "input": str(what), **GROUNDUP["groundup"], "again": True}, folder)
        first = first or mine["stages"]
        if venv is None:
            break
        theirs = run_chain(form, what, tokenizer, folder, venv, explain=True)
        found[form] = agreement(what, folder / "out" / "corpus", theirs)
    return first, found


def measure(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One run of groundup in a process of its own."""
    result = folder / "result.json"
    row = {"tokenizer": str(folder / "tokenizer"), "out": str(folder / "out"), **row, "result": str(result)}
    shutil.rmtree(row["out"], ignore_errors=True)
    # A stage that needs no other process uses as many threads instead.
    threads = {**ONE_THREAD, "RAYON_NUM_THREADS": str(row.get("workers", 1))}
    usage = run([sys.executable, str(Path(__file__).resolve()), "--one", json.dumps(row)], threads)
    return {**json.loads(result.read_text(encoding="utf-8")), "usage": dataclasses.asdict(usage)}


def train(row: dict[str, Any]) -> dict[str, Any]:
    """Train the tokenizer that both use."""
    from groundup.tokenizer import Tokenizer

    tokenizer = Tokenizer.train(texts_of(Path(row["input"])), vocab_size=VOCAB_SIZE, sample_bytes=TRAINING_BYTES)
    tokenizer.save(row["out"])
    return {"vocab_size": tokenizer.vocab_size}


def chain(row: dict[str, Any]) -> dict[str, Any]:
    """groundup's chain, through its public functions, with the worker counts that a recipe would lead to."""
    _choose(row["engine"])
    for library in ("awkward", "pyarrow.parquet", "groundup.tokenizer.engines"):  # loaded at first use otherwise
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
    from groundup.corpus import curate
    from groundup.recipe import CorpusSettings, ShardsSettings
    from groundup.shards import write_shards_from_file

    out, workers = Path(row["out"]), row["workers"]
    settings = CorpusSettings(
        inputs=(row["input"],), languages=("en",), quality=("gopher",), dedup="near", workers=workers,
        split_mib=PIECE_MIB,
    )  # fmt: skip
    documents, tokenizer = out / "corpus" / "documents.jsonl", Path(row["tokenizer"])
    started, began = cpu_seconds(), time.perf_counter()
    corpus = curate(settings, out / "corpus")
    curated = cpu_seconds()
    shards = write_shards_from_file(
        documents,
        tokenizer,
        out / "shards",
        ShardsSettings(workers=None if workers > 1 else 1),
        range_bytes=PIECE_MIB << 20,
    )
    ended, wall_seconds = cpu_seconds(), time.perf_counter() - began
    stages = {"curate": curated - started, "encode and write shards": ended - curated}
    if row.get("again"):  # what was measured before is used again, which leaves selecting and writing
        curate(settings, out / "corpus")
        stages["curate: select and write"] = cpu_seconds() - ended
        stages["curate: read and measure"] = stages.pop("curate") - stages["curate: select and write"]
    return {
        "cpu_seconds": ended - started,
        "wall_seconds": wall_seconds,
        "stages": stages,
        "documents_kept": corpus["documents_kept"],
        "tokens": shards["tokens_train"] + shards["tokens_validation"],
    }


def encoder(row: dict[str, Any]) -> dict[str, Any]:
    """Who encodes in this row."""
    _choose(row["engine"])
    from groundup.tokenizer import load_tokenizer

    return {"encoder": load_tokenizer(row["tokenizer"]).choose_engine()}


DO = {"train": train, "chain": chain, "encoder": encoder}


def _choose(engine: str) -> None:
    if engine == "tiktoken":
        sys.modules["gigatoken"] = None  # type: ignore[assignment] # as if it was not installed


def summary(runs: list[dict[str, Any]], megabytes: float) -> dict[str, Any]:
    """A row: medians and spreads of its runs."""
    from record import spread

    def over(seconds: list[float]) -> dict[str, float]:
        return spread([megabytes / value for value in seconds])

    stages = {name: spread([one["stages"][name] for one in runs])["median"] for name in runs[0]["stages"]}
    return {
        "megabytes_per_cpu_second": over([one["cpu_seconds"] for one in runs]),
        "megabytes_per_cpu_second_whole": over([one["usage"]["cpu_seconds"] for one in runs]),
        "megabytes_per_second": over([one["wall_seconds"] for one in runs]),
        "cpu_seconds": spread([one["cpu_seconds"] for one in runs]),
        "cpu_seconds_whole": spread([one["usage"]["cpu_seconds"] for one in runs]),
        "wall_seconds": spread([one["wall_seconds"] for one in runs]),
        "peak_mib": max(one["usage"]["peak_mib"] for one in runs),
        "children_peak_mib": max(one["usage"]["children_peak_mib"] for one in runs),
        "stages": stages,
        "documents_kept": runs[0]["documents_kept"],
        "tokens": runs[0]["tokens"],
    }


def ratios(rows: dict[str, Any]) -> dict[str, float]:
    """What to quote: groundup's speed over each baseline's, and two workers' wall time over one's."""

    def median(row: str, what: str) -> float:
        return float(rows[row][what]["median"])

    speed, whole = "megabytes_per_cpu_second", "megabytes_per_cpu_second_whole"
    found = {
        "wall time, 2 workers over 1": median("groundup, 2 workers", "wall_seconds")
        / median("groundup", "wall_seconds")
    }
    for baseline in filter(rows.__contains__, DATATROVE):
        for mine in ("groundup", "groundup, tiktoken"):
            found[f"{mine} over {baseline}"] = median(mine, speed) / median(baseline, speed)
            found[f"{mine} over {baseline}, whole"] = median(mine, whole) / median(baseline, whole)
    return found


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        f"\n{result['corpus']}: {result['megabytes']:.1f} MB of text, {result['documents']:,} documents\n",
        "| row | MB/cpu-s, chain (min … max) | whole | wall s | peak MiB, process / child | kept | tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        speed, whole = row["megabytes_per_cpu_second"], row["megabytes_per_cpu_second_whole"]
        lines.append(
            f"| {name} | {speed['median']:.2f} ({speed['min']:.2f} … {speed['max']:.2f}) | {whole['median']:.2f} | "
            f"{row['wall_seconds']['median']:.1f} | {row['peak_mib']:.0f} / {row['children_peak_mib']:.0f} | "
            f"{row['documents_kept']:,} | {row['tokens']:,} |"
        )
    lines += [f"- {name}: {value:.2f}×" for name, value in result["ratios"].items()]
    for form, found in result.get("agreement", {}).items():
        lines.append(f"- {form}: {found['decided_alike']:.1%} of {found['distinct_texts']:,} texts decided alike")
    return "\n".join(lines)


def size_of(file: Path) -> tuple[float, int]:
    """Megabytes of text, and documents."""
    sizes = [len(text.encode()) for text in texts_of(file)]
    return sum(sizes) / 1e6, len(sizes)


def cut_sample(file: Path, out: Path, megabytes: float) -> float:
    """Documents spread evenly over the file until there are so many megabytes of text; how many there are."""
    size, _ = size_of(file)
    every = max(1, int(size / megabytes))
    total = 0
    with file.open("rb") as lines, out.open("wb") as handle:
        for number, line in enumerate(lines):
            if number % every == 0 and total < megabytes * 1e6:
                handle.write(line)
                total += len(json.loads(line)["text"].encode())
    return total / 1e6


def texts_of(file: Path) -> Iterator[str]:
    """The texts of a JSONL file."""
    with file.open("rb") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def _open(path: Path) -> Any:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _place(folder: Path, name: str) -> Path:
    (folder / name).mkdir(parents=True)
    return folder / name / "corpus.jsonl"


if __name__ == "__main__":
    main()
