"""Evaluation data as the arrays that decontamination looks texts up in.

In: tasks, their records and strings (`files.py`). Out: a sorted key for every run of words that counts, and
for each key the strings and records that have it. Which runs count is said in `decontaminate.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash

from groundup.corpus.decontamination.files import EvaluationTask
from groundup.corpus.words import Words, words_of

SHORTEST_WORDS = 8
COMMON_TEXTS = 10
_BATCH_CHARACTERS = 1 << 20
_FILTER_BITS_PER_KEY = 32
_FILTER_MOST_BITS = 28
_LENGTH_SALT = 0xC2B2AE3D27D4EB4F
_SECOND_PROBE = np.uint64(0x9E3779B97F4A7C15)


class EvaluationRuns:
    """Gathers the grams of every different string of each task."""

    def __init__(self, ngram: int) -> None:
        self._ngram = ngram
        self._shortest = min(ngram, SHORTEST_WORDS)
        self._grams: list[np.ndarray] = []
        self._gram_texts: list[np.ndarray] = []
        self._text_tasks: list[int] = []
        self._text_records: list[list[int]] = []
        self._lengths: set[int] = set()

    @property
    def lengths(self) -> list[int]:
        """How many words the grams have."""
        return sorted(self._lengths)

    def add(self, task_number: int, task: EvaluationTask) -> int:
        """Take a task's strings in; returns the number of its records."""
        numbers: dict[bytes, int] = {}
        waiting: list[tuple[int, str]] = []
        size = n_records = 0
        for record, strings in task.records():
            n_records += 1
            for text in strings:
                key = xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass"))
                number = numbers.get(key)
                if number is not None:
                    if self._text_records[number][-1] != record:
                        self._text_records[number].append(record)
                    continue
                numbers[key] = len(self._text_tasks)
                waiting.append((len(self._text_tasks), text))
                self._text_tasks.append(task_number)
                self._text_records.append([record])
                size += len(text)
                if size >= _BATCH_CHARACTERS:
                    self._index(waiting)
                    waiting, size = [], 0
        self._index(waiting)
        return n_records

    def arrays(self, n_tasks: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The index's arrays by name, and how many grams of each task are too common to count.

        keys: (n_keys,) uint64, sorted; filter: see `_filter_of`; key_starts: (n_keys + 1,) int64, places in key_texts,
        where each key's texts begin; key_texts: int32. text_tasks: (n_texts,) int32; text_starts: (n_texts + 1,) int64,
        places in text_records, where each text's records begin; text_records: int32.
        """
        grams = np.concatenate([*self._grams, np.empty(0, dtype=np.uint64)])
        texts = np.concatenate([*self._gram_texts, np.empty(0, dtype=np.int32)])
        tasks = np.array(self._text_tasks, dtype=np.int32)
        order = np.lexsort((texts, grams))
        grams, texts = grams[order], texts[order]
        is_new = np.ones(len(grams), dtype=bool)
        is_new[1:] = (grams[1:] != grams[:-1]) | (texts[1:] != texts[:-1])
        grams, texts = grams[is_new], texts[is_new]
        # A task's texts are numbered in a row, so within a gram they stand together.
        changes = np.ones(len(grams), dtype=bool)
        changes[1:] = (grams[1:] != grams[:-1]) | (tasks[texts[1:]] != tasks[texts[:-1]])
        group = np.cumsum(changes) - 1
        is_common = np.bincount(group, minlength=1)[group] > COMMON_TEXTS if len(group) else np.zeros(0, dtype=bool)
        n_ignored = np.bincount(tasks[texts[is_common & changes]], minlength=n_tasks)
        grams, texts = grams[~is_common], texts[~is_common]
        keys, starts = np.unique(grams, return_index=True)
        n_records = [len(records) for records in self._text_records]
        arrays = {
            "keys": keys,
            "filter": _filter_of(keys),
            "key_starts": np.append(starts, len(grams)).astype(np.int64),
            "key_texts": texts,
            "text_tasks": tasks,
            "text_starts": np.concatenate([[0], np.cumsum(n_records)]).astype(np.int64),
            "text_records": np.array([record for found in self._text_records for record in found], dtype=np.int32),
        }
        return arrays, n_ignored

    def _index(self, waiting: Sequence[tuple[int, str]]) -> None:
        if not waiting:
            return
        texts = [text for _, text in waiting]
        words = words_of(texts)
        numbers = np.array([number for number, _ in waiting], dtype=np.int32)
        grams, starts = words.ngrams(self._ngram)
        owners = np.repeat(np.arange(words.n_texts), np.diff(starts))
        lengths = np.minimum(words.counts, self._ngram)[owners]
        places = words.starts[owners] + np.arange(len(grams)) - starts[owners]
        n_with_letters = np.concatenate([[0], np.cumsum(_have_letters(words, texts))])
        are_words = 2 * (n_with_letters[places + lengths] - n_with_letters[places]) >= lengths
        counted = are_words & (lengths >= self._shortest)
        salts = np.array([length_salt(length) for length in range(self._ngram + 1)], dtype=np.uint64)
        self._grams.append((grams ^ salts[lengths])[counted])
        self._gram_texts.append(numbers[owners[counted]])
        self._lengths.update(np.unique(lengths[counted]).tolist())


def _have_letters(words: Words, texts: Sequence[str]) -> np.ndarray:
    """(n_words,) bool: which words are not mere numbers; each different word is looked at once."""
    _, first, which = np.unique(words.hashes, return_index=True, return_inverse=True)
    owners = np.searchsorted(words.starts, first, side="right") - 1
    begin, end = words.word_begin[first].tolist(), words.word_end[first].tolist()
    found = [
        any(map(str.isalpha, texts[owner][start:stop]))
        for owner, start, stop in zip(owners.tolist(), begin, end, strict=True)
    ]
    return np.array(found, dtype=bool)[which]


def length_salt(length: int) -> np.uint64:
    """Keeps runs of different lengths apart in one table."""
    return np.uint64(length * _LENGTH_SALT & (1 << 64) - 1)


def _filter_of(keys: np.ndarray) -> np.ndarray:
    """A Bloom filter (Bloom 1970) with two probes, (n_bits / 8,) uint8: it dismisses nearly all that is not a key."""
    n_bits = 1 << min(_FILTER_MOST_BITS, max(6, int(len(keys) * _FILTER_BITS_PER_KEY).bit_length() - 1))
    is_set = np.zeros(n_bits, dtype=bool)
    shift = np.uint64(65 - n_bits.bit_length())
    is_set[keys >> shift] = True
    is_set[keys * _SECOND_PROBE >> shift] = True
    return np.packbits(is_set, bitorder="little")


def _is_set(bits: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Whether the bit is set that the upper bits of each value name."""
    slots = values >> np.uint64(65 - (len(bits) * 8).bit_length())
    return (bits[slots >> np.uint64(3)] >> (slots & np.uint64(7)).astype(np.uint8) & 1).astype(bool)


def may_be_keys(bits: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Places of the values that the filter does not dismiss, (n_left,) int64.

    Args:
        bits: the filter.
        values: (n_values,) uint64.
    """
    places = np.flatnonzero(_is_set(bits, values))
    return places[_is_set(bits, values[places] * _SECOND_PROBE)]
