"""A quality classifier trained on examples: texts to keep more of against texts to keep less of.

In: two streams of texts. Out: a model that gives every text the probability that it is one of the first kind.

The model is fastText's for two classes (Joulin et al. 2016, "Bag of Tricks for Efficient Text Classification"), with
its two linear maps multiplied out into one. A text's features are its words and pairs of neighbouring words, each
hashed to one of 2^20 buckets with a weight w of its own:

    p(text) = sigmoid(bias + mean of w over the text's features)

It is trained by Adagrad (Duchi et al. 2011) on the logistic loss, both classes of equal weight however many examples
they have. A tenth of the texts, chosen by their hash, is kept apart; accuracy and AUC are measured on it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from groundup.batches import batches
from groundup.corpus.words import WORDS_VERSION, words_of
from groundup.errors import ArtifactError, DataError
from groundup.files import atomic_writer, file_digest, read_json, write_json

CLASSIFIER_VERSION = 1
"""Raised when the same examples make another model."""

N_BUCKETS = 1 << 20
HELD_OUT_SHARE = 0.1
MOST_WORDS = 4_000_000
"""Training words of a class; beyond them the texts with the lowest hashes are taken."""
MOST_TEXT_WORDS = 4096
"""Training words of a text, its first ones: one long book must not stand for all books."""
LEAST_TEXTS = 2
"""Training texts that must have a feature; what stands in one text only teaches the model that text."""
EPOCHS = 10
LEARNING_RATE = 1.0
_BATCH_FEATURES = 200_000
_LEAST_BATCHES = 20
_BATCH_CHARACTERS = 1 << 20
_SHIFT = np.uint64(64 - 20)
_PAIR_SALT = np.uint64(0x8CB92BA72F3D8DD7)
_SAMPLE_SEED, _HELD_OUT_SEED = 22, 23
_ABOUT, _WEIGHTS = "classifier.json", "weights.npy"


class Classifier:
    """A trained model: (2^20,) float32 weights of the buckets, the bias, and what training found (see `train`)."""

    def __init__(self, weights: np.ndarray, bias: float, report: dict[str, Any]) -> None:
        self._weights = weights
        self._bias = bias
        self.report = report

    @classmethod
    def train(cls, positive: Iterable[str], negative: Iterable[str], seed: int = 0) -> Classifier:
        """Learn to tell two kinds of texts apart. The same texts, in any order, and the same seed give the same model.

        Of equal texts one counts; the seed gives the order in which examples are seen.

        Returns:
            The model. Its `report` has the number of texts (positive, negative) and, of the tenth held out
            (held_out), accuracy at 0.5 (both classes of equal weight) and auc (None where a class is missing there).

        Raises:
            DataError: a kind of which no text with words is left to learn from.
        """
        examples = [_gather(texts) for texts in (positive, negative)]
        learnt = [[example for example in kind if not example.is_held_out] for kind in examples]
        for name, kind in zip(("positive", "negative"), learnt, strict=True):
            if not kind:
                raise DataError(
                    f"[corpus.classifier] {name}: there is no text in these files to learn from.",
                    "Give files with at least some dozens of texts; hundreds are better.",
                )
        weights, bias = _fit(learnt, seed)
        held_out = [[example for example in kind if example.is_held_out] for kind in examples]
        scores = [_probability(weights, bias, *_joined(kind)) for kind in held_out]
        report = {"positive": len(examples[0]), "negative": len(examples[1]), **_quality(*scores)}
        return cls(weights, bias, report)

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """The probability that each text is a positive one, (n_texts,) float32; it does not depend on the others."""
        found = map(_features, batches(texts, _BATCH_CHARACTERS))
        scores = [_probability(self._weights, self._bias, *features) for features in found]
        return np.concatenate([*scores, np.empty(0)]).astype(np.float32)

    def save(self, folder: str | Path) -> None:
        """Write the model into a folder."""
        with atomic_writer(Path(folder) / _WEIGHTS, binary=True) as handle:
            np.save(handle, self._weights)
        about = {
            "version": CLASSIFIER_VERSION,
            "words_version": WORDS_VERSION,
            "weights": file_digest(Path(folder) / _WEIGHTS),
            "bias": self._bias,
            "report": self.report,
        }
        write_json(Path(folder) / _ABOUT, about)

    @classmethod
    def load(cls, folder: str | Path) -> Classifier:
        """Read what `save` wrote, or raise ArtifactError; processes that load it share its memory."""
        about = read_json(Path(folder) / _ABOUT)
        if (about.get("version"), about.get("words_version")) != (CLASSIFIER_VERSION, WORDS_VERSION):
            raise ArtifactError(f"{folder}: a classifier of another version of groundup.", "Train it again.")
        try:
            weights = np.load(Path(folder) / _WEIGHTS, mmap_mode="r", allow_pickle=False)
        except (OSError, EOFError, ValueError) as error:
            raise ArtifactError(f"{folder}/{_WEIGHTS}: damaged ({error}).", "Train it again.") from error
        if file_digest(Path(folder) / _WEIGHTS) != about["weights"]:
            raise ArtifactError(f"{folder}/{_WEIGHTS}: not the weights that were saved.", "Train it again.")
        return cls(np.asarray(weights), float(about["bias"]), about["report"])


class _Example(NamedTuple):
    """One training text: the hash by which texts are sampled and sorted, and its features, (n_features,) uint32."""

    order: int
    is_held_out: bool
    features: np.ndarray


def _gather(texts: Iterable[str]) -> list[_Example]:
    """The examples with the lowest hashes that together stay within `MOST_WORDS`, by hash."""
    kept: dict[int, _Example] = {}
    highest: list[int] = []  # a heap of minus the hashes
    n_features = 0
    for batch in batches(texts, _BATCH_CHARACTERS):
        features, starts = _features(batch, MOST_TEXT_WORDS)
        for place, text in enumerate(batch):
            data = text.encode("utf-8", "surrogatepass")
            order = xxhash.xxh3_64_intdigest(data, seed=_SAMPLE_SEED)
            found = features[starts[place] : starts[place + 1]]
            if order in kept or not len(found):
                continue
            held_out = xxhash.xxh3_64_intdigest(data, seed=_HELD_OUT_SEED) < int(HELD_OUT_SHARE * 2**64)
            kept[order] = _Example(order, held_out, found.astype(np.uint32))
            heapq.heappush(highest, -order)
            n_features += len(found)
            while n_features > 2 * MOST_WORDS and len(highest) > 1:
                n_features -= len(kept.pop(-heapq.heappop(highest)).features)
    return [kept[order] for order in sorted(kept)]


def _features(texts: Sequence[str], most_words: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Buckets of the texts' words and pairs, (n_features,) int64, and where each text's begin, (n_texts + 1,) int64.

    Of each text `most_words` are looked at, and as many pairs; all without it.
    """
    words = words_of(texts)
    pairs, pair_starts = words.ngrams(2)
    kinds = ((words.hashes, words.starts), (pairs ^ _PAIR_SALT, pair_starts))
    sizes = [np.minimum(np.diff(begins), most_words or len(words.hashes)) for _, begins in kinds]
    starts = np.concatenate([[0], np.cumsum(sizes[0] + sizes[1])])
    features = np.empty(int(starts[-1]), dtype=np.int64)
    first = starts[:-1]
    for (hashes, begins), size in zip(kinds, sizes, strict=True):
        within = np.arange(int(size.sum())) - np.repeat(np.cumsum(size) - size, size)
        # The product's upper bits depend on all bits of the hash.
        buckets = (hashes * _PAIR_SALT) >> _SHIFT
        features[np.repeat(first, size) + within] = buckets[np.repeat(begins[:-1], size) + within]
        first = first + size
    return features, starts


def _means(weights: np.ndarray, features: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The mean weight of each text's features, (n_texts,) float64; 0 of a text without any."""
    sizes = np.diff(starts)
    sums = np.zeros(len(sizes))
    some = sizes > 0
    if some.any():
        sums[some] = np.add.reduceat(weights[features], starts[:-1][some], dtype=np.float64)
    return sums / np.maximum(sizes, 1)


def _probability(weights: np.ndarray, bias: float, features: np.ndarray, starts: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(bias + _means(weights, features, starts), -60, 60)))


def _joined(examples: Sequence[_Example]) -> tuple[np.ndarray, np.ndarray]:
    """As `_features` has them."""
    starts = np.cumsum([0, *(len(example.features) for example in examples)])
    return np.concatenate([np.empty(0, dtype=np.uint32), *(example.features for example in examples)]), starts


def _fit(kinds: Sequence[Sequence[_Example]], seed: int) -> tuple[np.ndarray, float]:
    """Weights and bias, by Adagrad on mini-batches."""
    examples = [*kinds[0], *kinds[1]]
    labels = np.repeat([1.0, 0.0], [len(kind) for kind in kinds])
    class_weights = np.repeat([0.5 * len(examples) / len(kind) for kind in kinds], [len(kind) for kind in kinds])
    texts_with = np.zeros(N_BUCKETS, dtype=np.int32)
    for example in examples:
        texts_with[np.unique(example.features)] += 1
    learnt = np.flatnonzero(texts_with >= min(LEAST_TEXTS, len(examples)))
    # Only what is learnt gets a place; all else shares the last one, whose weight stays 0.
    places = np.full(N_BUCKETS, len(learnt))
    places[learnt] = np.arange(len(learnt))
    n_features = sum(len(example.features) for example in examples)
    n_batches = min(len(examples), max(_LEAST_BATCHES, n_features // _BATCH_FEATURES))
    weights, squares = (np.zeros(len(learnt) + 1, dtype=np.float32) for _ in range(2))
    bias = bias_square = 0.0
    random = np.random.Generator(np.random.PCG64(seed))
    for epoch in range(EPOCHS):
        rate = LEARNING_RATE * (1 - epoch / EPOCHS)
        for chosen in np.array_split(random.permutation(len(examples)), n_batches):
            features, starts = _joined([examples[number] for number in chosen])
            features, sizes = places[features], np.diff(starts)
            error = _probability(weights, bias, features, starts) - labels[chosen]
            error *= class_weights[chosen] / len(chosen)
            sums = np.bincount(features, weights=np.repeat(error / sizes, sizes), minlength=len(weights))
            slope: np.ndarray = sums.astype(np.float32)
            slope[-1] = 0
            squares += slope * slope
            weights -= np.float32(rate) * slope / (np.sqrt(squares) + np.float32(1e-12))
            bias_slope = float(error.sum())
            bias_square += bias_slope * bias_slope
            bias -= 0.1 * rate * bias_slope / (bias_square**0.5 + 1e-12)
    return weights[places], bias


def _quality(positive: np.ndarray, negative: np.ndarray) -> dict[str, Any]:
    """Accuracy and AUC on the scores of held-out texts of both kinds."""
    n_held_out = len(positive) + len(negative)
    if not len(positive) or not len(negative):
        return {"held_out": n_held_out, "accuracy": None, "auc": None}
    accuracy = 0.5 * (float((positive >= 0.5).mean()) + float((negative < 0.5).mean()))
    # AUC = P(a positive text scores more than a negative one) + half of P(the same) (Mann and Whitney 1947)
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, side="left")
    not_above = np.searchsorted(ordered, positive, side="right")
    auc = float((below + not_above).mean()) / (2 * len(negative))
    return {"held_out": n_held_out, "accuracy": round(accuracy, 6), "auc": round(auc, 6)}
