"""Peak memory of the data stage over corpora of 1, 4 and 10 times the memory budget: it must not grow with them.

`[corpus] memory_mib` is what one process may use for its work; the program itself and its libraries come on top, which
the row "1 MB" shows. Each stage (corpus, shards) is a process of its own, with no worker beside it and with two, whose
memory is told apart from their parent's. The parent keeps a few bytes for every document: `parent_bytes_per_document`.

Examples:
    python benchmarks/data_memory.py --quick                smoke run on small corpora
    python benchmarks/data_memory.py                        128 MiB: 134, 537 and 1,342 MB of text
    python benchmarks/data_memory.py --memory-mib 256 --times 1 10 --workers 2
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_corpus import write_corpus
from processes import ONE_THREAD, run

HERE = Path(__file__).resolve().parent
RAW = HERE.parents[1] / "shared" / "data" / "raw_web" / "raw-00.jsonl.gz"
LEAST_MEMORY_MIB = 128.0
SMALL_MB = 1.0
VOCAB_SIZE = 32_768
TRAINING_BYTES = 32 << 20


def main() -> None:
    """Run every size, stage and number of workers once, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory-mib", type=float, default=LEAST_MEMORY_MIB, help="[corpus] memory_mib (128 or more)")
    parser.add_argument("--split-mib", type=float, default=16.0, help="[corpus] split_mib: size of a piece of work")
    parser.add_argument("--times", type=float, nargs="+", default=[1, 4, 10], help="corpora, in memory budgets")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="corpora of 2 and 4 MB, and no result file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        row = json.loads(arguments.one)
        DO[row["do"]](row)
        return
    times = [2e6 / budget_bytes(arguments), 4e6 / budget_bytes(arguments)] if arguments.quick else arguments.times
    with tempfile.TemporaryDirectory() as folder:
        rows = list(measure(arguments, times, Path(folder)))
    growth = growth_of(rows)
    for name, found in growth.items():
        print(f"- {name}: {', '.join(f'{what} {value:.3g}' for what, value in found.items())}")
    if not arguments.quick:
        from record import write_result

        settings = {"memory_mib": arguments.memory_mib, "split_mib": arguments.split_mib, "seed": arguments.seed}
        write_result("data_memory", {**settings, "rows": rows, "growth": growth})


def measure(arguments: argparse.Namespace, times: list[float], folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each size, number of workers and stage."""
    tokenizer, pools = folder / "tokenizer", () if arguments.quick or not RAW.is_file() else (RAW,)
    print("| corpus | documents | workers | stage | process MiB | largest worker MiB | CPU s |\n|" + "---|" * 7)
    for number, factor in enumerate([0.0, *sorted(times)]):
        megabytes = factor * budget_bytes(arguments) / 1e6 or SMALL_MB
        file = folder / "corpus.jsonl"
        n_documents = sum(write_corpus(file, megabytes, arguments.seed, pools).values())
        if number <= 1:  # the second is the first large enough to learn all tokens from
            shutil.rmtree(tokenizer, ignore_errors=True)
            _run({"do": "train", "input": str(file), "out": str(tokenizer)})
        for workers in arguments.workers:
            out = folder / "out"
            shutil.rmtree(out, ignore_errors=True)
            for stage in ("corpus", "shards"):
                usage = _run(
                    {
                        "do": stage, "input": str(file), "out": str(out), "tokenizer": str(tokenizer),
                        "workers": workers, "memory_mib": arguments.memory_mib, "split_mib": arguments.split_mib,
                    }
                )  # fmt: skip
                yield {
                    "times_the_budget": factor,
                    "megabytes": megabytes,
                    "documents": n_documents,
                    "workers": workers,
                    "stage": stage,
                    "process_mib": usage.peak_mib,
                    "worker_mib": usage.children_peak_mib,
                    "cpu_seconds": usage.cpu_seconds,
                }
                print(
                    f"| {megabytes:,.0f} MB ({factor:g} ×) | {n_documents:,} | {workers} | {stage} | "
                    f"{usage.peak_mib:.0f} | {usage.children_peak_mib:.0f} | {usage.cpu_seconds:.1f} |",
                    flush=True,
                )


def growth_of(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """How much more memory the largest corpus takes than the smallest that fills the budget, by stage and workers."""
    found = {}
    for workers, stage in dict.fromkeys((row["workers"], row["stage"]) for row in rows):
        mine = [row for row in rows if (row["workers"], row["stage"]) == (workers, stage)]
        small, first, last = mine[0], mine[1], mine[-1]
        more_documents = last["documents"] - small["documents"]
        name = f"{stage}, {workers} worker{'s' * (workers > 1)}"
        found[name] = {
            "corpus": last["megabytes"] / first["megabytes"],
            "process": last["process_mib"] / first["process_mib"],
            "process_mib_over_small": last["process_mib"] - small["process_mib"],
        }
        if workers > 1:
            found[name]["worker"] = last["worker_mib"] / first["worker_mib"]
            found[name]["worker_mib_over_small"] = last["worker_mib"] - small["worker_mib"]
            more_bytes = (last["process_mib"] - small["process_mib"]) * 2**20
            found[name]["parent_bytes_per_document"] = more_bytes / more_documents
    return found


def train(row: dict[str, Any]) -> None:
    """Train the tokenizer."""
    from data_chain import texts_of

    from groundup.tokenizer import Tokenizer

    texts = texts_of(Path(row["input"]))
    Tokenizer.train(texts, vocab_size=VOCAB_SIZE, sample_bytes=TRAINING_BYTES).save(row["out"])


def corpus(row: dict[str, Any]) -> None:
    """The corpus stage: language, Gopher's rules, near-duplicates."""
    from groundup.corpus import curate
    from groundup.recipe import CorpusSettings

    settings = CorpusSettings(
        inputs=(row["input"],), languages=("en",), quality=("gopher",), dedup="near", workers=row["workers"],
        memory_mib=row["memory_mib"], split_mib=row["split_mib"],
    )  # fmt: skip
    curate(settings, Path(row["out"]) / "corpus")


def shards(row: dict[str, Any]) -> None:
    """The shards stage."""
    from groundup.recipe import ShardsSettings
    from groundup.shards import write_shards_from_file

    out = Path(row["out"])
    settings = ShardsSettings(workers=row["workers"])
    write_shards_from_file(out / "corpus" / "documents.jsonl", Path(row["tokenizer"]), out / "shards", settings)


DO = {"train": train, "corpus": corpus, "shards": shards}


def budget_bytes(arguments: argparse.Namespace) -> float:
    """The memory budget."""
    return float(arguments.memory_mib * 2**20)


def _run(row: dict[str, Any]) -> Any:
    return run([sys.executable, str(Path(__file__).resolve()), "--one", json.dumps(row)], ONE_THREAD)


if __name__ == "__main__":
    main()
