"""Near-duplicates whose similarity is known: seeded edits of made-up texts, and the keys that deduplication reads.

Used by the tests of `groundup.corpus.dedup` and by `benchmarks/minhash.py`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from groundup.corpus.dedup.files import UnitKeys
from groundup.corpus.dedup.minhash import signatures
from groundup.reference.minhash import jaccard, shingles

NGRAM = 5
MEAN_EDITED_SHARE = 0.02


@dataclass(frozen=True)
class Pair:
    """A text, its copy with some words edited, and the Jaccard similarity of their sets of word 5-grams."""

    original: str
    copy: str
    similarity: float


def planted_pairs(n: int, seed: int = 0, *, uniform: bool = False) -> list[Pair]:
    """Copies at all similarities from about 0.1 to 1.

    Args:
        n: pairs.
        seed: the same pairs for the same number.
        uniform: similarities are spread evenly. Otherwise the share of edited words is exponential with mean
            `MEAN_EDITED_SHARE`, as where most copies differ little: of the pairs about half lie above 0.88.
    """
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(20_000)]
    return [_pair(rng, vocabulary, uniform) for _ in range(n)]


def _pair(rng: random.Random, vocabulary: Sequence[str], uniform: bool) -> Pair:
    n_words = min(max(int(rng.lognormvariate(5.8, 0.6)), 60), 3000)
    # Few words are frequent, as in any language.
    words = [vocabulary[int(len(vocabulary) ** rng.random()) - 1] for _ in range(n_words)]
    if uniform:
        wanted = rng.uniform(0.1, 1.0)
        share = (1 - wanted) / (NGRAM * (1 + wanted))  # each edit far from others costs five shingles of either text
    else:
        share = min(rng.expovariate(1 / MEAN_EDITED_SHARE), 0.15)
    copy = list(words)
    for place in rng.sample(range(n_words), round(share * n_words)):
        copy[place] = rng.choice(vocabulary)
    if rng.random() < 0.3 and share > 0.01:  # some edits add or take away
        del copy[rng.randrange(len(copy))]
        copy.insert(rng.randrange(len(copy)), rng.choice(vocabulary))
    similarity = jaccard(shingles(words, NGRAM), shingles(copy, NGRAM))
    return Pair(_as_text(words, rng), _as_text(copy, rng), similarity)


def _as_text(words: Sequence[str], rng: random.Random) -> str:
    """Sentences and paragraphs; punctuation and capitals are no difference between two texts."""
    parts = []
    for begin in range(0, len(words), 12):
        sentence = " ".join(words[begin : begin + 12])
        parts += [sentence.capitalize(), rng.choice([". ", ".\n\n", "! ", " – "])]
    return "".join(parts)


def texts_of(pairs: Sequence[Pair]) -> list[str]:
    """The originals, then their copies: text i and text n + i belong together."""
    return [pair.original for pair in pairs] + [pair.copy for pair in pairs]


def write_units(
    folder: Path, texts: Sequence[str], ends: Sequence[int], *, bands: int = 14, rows: int = 8, ngram: int = NGRAM
) -> list[UnitKeys]:
    """The keys of texts, cut into units before each of the places `ends`."""
    units = []
    for number, (begin, end) in enumerate(zip([0, *ends], [*ends, len(texts)], strict=True)):
        place = folder / f"{number:03d}"
        place.mkdir(parents=True)
        mine = texts[begin:end]
        if mine:
            digests = digests_of(mine)
            np.save(place / "ids.npy", digests)
            np.save(place / "digests.npy", digests)
            np.save(place / "lengths.npy", np.array([len(text) for text in mine], dtype=np.int64))
            np.save(place / "signatures.npy", signatures(mine, ngram=ngram, n_hashes=bands * rows))
            pq.write_table(pa.table({"text": mine}), place / "documents.parquet", row_group_size=100)
        units.append(UnitKeys(place, len(mine)))
    return units


def digests_of(texts: Sequence[str]) -> np.ndarray:
    """(n, 2) uint64: 128-bit xxh3 of each text, high half first."""
    digests = b"".join(xxhash.xxh3_128_digest(text.encode()) for text in texts)
    return np.frombuffer(digests, dtype=">u8").reshape(-1, 2).astype(np.uint64)
