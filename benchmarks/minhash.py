"""MinHash: megabytes of text per CPU-second, and how many planted near-duplicates are found and wrongly found.

Speed is that of text in memory to signatures (14 bands of 8, word 5-grams), on one core. Recall and precision are
those of the whole of `near_duplicates`, on made-up texts with edited copies whose similarity is known exactly.
"""

from __future__ import annotations

import argparse
import gzip
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import orjson
from record import spread, write_result

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from planted import Pair, digests_of, planted_pairs, texts_of, write_units

import groundup
from groundup.corpus.dedup.minhash import match_probability, signatures
from groundup.corpus.dedup.near import near_duplicates
from groundup.corpus.engine import Engine
from groundup.corpus.words import words_of
from groundup.recipe import MinHashSettings

CLASSICS = Path(groundup.__file__).parent / "data" / "classics.jsonl"
BATCH_CHARACTERS = 1 << 20
BINS = [0.0, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0]
MINHASH = MinHashSettings()
LEAST = sorted({0.0, 0.7, 0.72, MINHASH.min_agreement})
"""Shares of equal hashes to verify with; 0 is no verification."""


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", type=Path, default=CLASSICS, help="JSONL (.gz too) with a field 'text'")
    parser.add_argument("--megabytes", type=float, default=32.0, help="how much of it, repeated if it is shorter")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=2000)
    arguments = parser.parse_args()
    batches = read_batches(arguments.input, arguments.megabytes)
    size = sum(len(text.encode()) for batch in batches for text in batch) / 1e6
    rows = {
        "words": lambda texts: words_of(texts),
        "words and 5-grams": lambda texts: words_of(texts).ngrams(MINHASH.ngram),
        "signatures": lambda texts: signatures(texts, ngram=MINHASH.ngram, n_hashes=MINHASH.bands * MINHASH.rows),
    }
    speeds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(arguments.rounds):
        for name, work in rows.items():
            speeds[name].append(size / cpu_seconds(work, batches))
    for name, values in speeds.items():
        print(f"| {name} | {spread(values)['median']:.1f} MB per CPU-second |")
    write_result(
        "minhash",
        {
            "input": arguments.input.name,
            "megabytes": size,
            "texts": sum(map(len, batches)),
            "megabytes_per_cpu_second": {name: spread(values) for name, values in speeds.items()},
            "planted": [planted(arguments.pairs, uniform, least) for uniform in (False, True) for least in LEAST],
        },
    )


def read_batches(path: Path, megabytes: float) -> list[list[str]]:
    """The first texts of a file, over and over until there are enough, in batches of about a million characters."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        texts = [orjson.loads(line)["text"] for line in lines]
    batches: list[list[str]] = [[]]
    inside, total = 0, 0.0
    while total < megabytes * 1e6:
        for text in texts:
            batches[-1].append(text)
            inside += len(text)
            total += len(text.encode())
            if inside >= BATCH_CHARACTERS:
                batches.append([])
                inside = 0
            if total >= megabytes * 1e6:
                break
    return [batch for batch in batches if batch]


def cpu_seconds(work: Callable[[Sequence[str]], object], batches: Sequence[Sequence[str]]) -> float:
    """Of all batches; the first is done once before, so that nothing is measured that is only done once."""
    work(batches[0])
    start = time.process_time()
    for batch in batches:
        work(batch)
    return time.process_time() - start


def planted(n: int, uniform: bool, min_agreement: float) -> dict[str, Any]:
    """Recall by similarity, beside what the formula says, and precision."""
    minhash = MINHASH.model_copy(update={"min_agreement": min_agreement})
    pairs = planted_pairs(n, seed=11, uniform=uniform)
    texts = texts_of(pairs)
    with tempfile.TemporaryDirectory() as folder:
        units = write_units(Path(folder), texts, [])
        everyone = [np.ones(len(texts), dtype=bool)]
        start = time.process_time()
        (removed,), _ = near_duplicates(units, everyone, minhash, Path(folder) / "work", Engine(), 1 << 30)
        seconds = time.process_time() - start
    ids = [tuple(row) for row in digests_of(texts).tolist()]
    partners = [ids[(row + n) % len(texts)] == tuple(survivor)
                for row, survivor in zip(removed.rows.tolist(), removed.survivors.tolist(), strict=True)]  # fmt: skip
    found = {row % n for row, is_partner in zip(removed.rows.tolist(), partners, strict=True) if is_partner}
    similar = [number for number, pair in enumerate(pairs) if pair.similarity >= 0.8]
    row = {
        "pairs": n,
        "similarities": "even from 0.1 to 1" if uniform else "share of edited words exponential, mean 2 %",
        "min_agreement": min_agreement,
        "removed": len(removed.rows),
        "not_planted": partners.count(False),
        "recall_from_0.8": sum(number in found for number in similar) / len(similar),
        "precision_from_0.7": sum(pairs[number].similarity >= 0.7 for number in found) / len(removed.rows),
        "precision_from_0.65": sum(pairs[number].similarity >= 0.65 for number in found) / len(removed.rows),
        "by_similarity": by_similarity(pairs, found),
        "cpu_seconds": seconds,
    }
    print(
        f"| {row['similarities']} | agreement ≥ {min_agreement:g} | recall (J ≥ 0.8) {row['recall_from_0.8']:.4f} "
        f"| precision (J ≥ 0.7) {row['precision_from_0.7']:.4f} |"
    )
    return row


def by_similarity(pairs: Sequence[Pair], found: set[int]) -> list[dict[str, float]]:
    """Pairs, those found, and the share that shares a band by the formula (before verification)."""
    rows = []
    for low, high in pairwise(BINS):
        inside = [n for n, pair in enumerate(pairs) if low <= pair.similarity < high or pair.similarity == high == 1]
        expected = [match_probability(pairs[number].similarity, MINHASH.bands, MINHASH.rows) for number in inside]
        rows.append(
            {
                "from": low,
                "to": high,
                "pairs": len(inside),
                "found": sum(number in found for number in inside),
                "sharing_a_band_by_formula": float(sum(expected)),
            }
        )
    return rows


if __name__ == "__main__":
    main()
