"""Documents that repeat evaluation data: found by runs of words that both have.

In: evaluation files, and the corpus's texts. Out: for each text the evaluation records that it repeats.

Evaluation files are what the corpus room reads, but for pages and archives; every string of every record counts,
whatever the fields are called; a record of a text file is a paragraph. A file that cannot be read to its end is
refused.

Every run of `ngram` words (13 by default, as for GPT-3: Brown et al. 2020, appendix C) of every string of every
evaluation record is looked for, words as in `words.py`: whatever the case, punctuation and spacing. A string of fewer
words is looked for whole, if it has at least 8 (GPT-3's least; `ngram`, if that is less). Shorter ones, such as most
answers to choose from, are everyday phrases and stand in many innocent documents. For the same reason a run that
stands in more than 10 different strings of one task is ignored: it is the wording of the task's instruction. So is a
run in which fewer than half of the words have a letter, such as "1, 2, 3, 4 ...".
"""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from groundup.batches import batches
from groundup.corpus.dedup.files import is_new
from groundup.corpus.document import Reason, SetAside
from groundup.corpus.reading.intake import limit_bytes
from groundup.corpus.reading.sources import InputFile, find_sources
from groundup.corpus.reading.values import read_values, strings_of
from groundup.corpus.words import Words, has_bits, set_bits, words_of
from groundup.errors import DataError
from groundup.files import atomic_folder, read_json, write_json
from groundup.recipe import CorpusSettings
from groundup.untrusted import reading

SHORTEST_WORDS = 8
COMMON_TEXTS = 10
SHOWN_CHARACTERS = 400
EXAMPLES_PER_TASK = 20
_BATCH_CHARACTERS = 1 << 20
_INDEX = "index.json"
_FILTER_BITS_PER_KEY = 32
_FILTER_MOST_BITS = 28
_LENGTH_SALT = 0xC2B2AE3D27D4EB4F
_FILES = "[corpus.decontaminate] files"
_SPLIT_NAMES = re.compile(r"(?:test|train|dev|val|valid|validation|data|eval)(?:[-_.]|$)", re.IGNORECASE)
_PLAIN = CorpusSettings(text_field="")
_FIX = "Repair the file, or take it off the list: the part that cannot be read would stay in the corpus."


@dataclass(frozen=True, slots=True)
class Match:
    """One evaluation record that a document repeats.

    Attributes:
        task: the evaluation file's name.
        record: which of its records, from 1 on.
        text: the longest run of words that both have, as it stands in the document (its first 400 characters).
        n_words: words of that run.
        share: share of the document's words that are repeated from any evaluation record; the same in all its matches.
    """

    task: str
    record: int
    text: str
    n_words: int
    share: float


class EvaluationIndex:
    """The runs of words of all evaluation data, in the folder that `build` wrote, shared by the processes that map it.

    ArtifactError: there is no index.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        about = read_json(folder / _INDEX)
        self.tasks: dict[str, int] = about["tasks"]
        """Records of each task, in the order of the files."""
        self._lengths: list[int] = about["lengths"]
        self._names = list(self.tasks)

        def array(name: str) -> np.ndarray:
            return np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))

        self._keys, self._filter = array("keys"), array("filter")
        self._key_starts, self._key_texts = array("key_starts"), array("key_texts")
        self._text_tasks, self._text_starts = array("text_tasks"), array("text_starts")
        self._text_records = array("text_records")

    @classmethod
    def build(cls, files: Sequence[str | Path], ngram: int, folder: str | Path) -> EvaluationIndex:
        """Index evaluation files, folders or globs into a folder (an old one is replaced).

        `ngram` words in a row count as repeated. Memory is about 40 bytes a word of evaluation data.

        Raises:
            DataError: a file that is not there or cannot be read, or no string of enough words in any.
        """
        tasks = find_tasks(files)
        runs = _Runs(ngram)
        n_records = {task.name: runs.add(number, task) for number, task in enumerate(tasks)}
        arrays = runs.arrays()
        if not len(arrays["keys"]):
            least = min(ngram, SHORTEST_WORDS)
            raise DataError(
                f"[corpus.decontaminate] files: no string in {tasks[0].source.label}"
                + (f" and {len(tasks) - 1} more" if len(tasks) > 1 else "")
                + f" has {least} words.",
                "Name the files that hold the questions.",
            )
        with atomic_folder(Path(folder)) as place:
            for name, array in arrays.items():
                np.save(place / f"{name}.npy", array)
            write_json(place / _INDEX, {"lengths": sorted(runs.lengths), "tasks": n_records})
        return cls(folder)

    def find(self, texts: Sequence[str]) -> list[list[Match]]:
        """The evaluation records that each text repeats, by task and number. Many texts at once are faster."""
        return [matches for batch in batches(texts, _BATCH_CHARACTERS) for matches in self._find(batch)]

    def _find(self, texts: Sequence[str]) -> list[list[Match]]:
        words = words_of(texts)
        places, lengths, keys = self._hits(words)
        matches: list[list[Match]] = [[] for _ in texts]
        if not len(places):
            return matches
        owners = np.searchsorted(words.starts, places, side="right") - 1
        for owner in np.unique(owners).tolist():
            mine = owners == owner
            first, last = int(words.starts[owner]), int(words.starts[owner + 1])
            found = places[mine] - first, lengths[mine], keys[mine]
            matches[owner] = self._matches(
                texts[owner], words.word_begin[first:last], words.word_end[first:last], *found
            )
        return matches

    def _hits(self, words: Words) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Runs of the texts' words that the index has: first word, length, place in `_keys`, (n_hits,) int64 each."""
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for length in self._lengths:
            grams, starts = words.ngrams(length)
            grams = grams ^ _length_salt(length)
            hits = np.flatnonzero(has_bits(self._filter, grams))
            keys = np.searchsorted(self._keys, grams[hits])
            keys[keys == len(self._keys)] = 0
            same = self._keys[keys] == grams[hits]
            hits, keys = hits[same], keys[same]
            owners = np.searchsorted(starts, hits, side="right") - 1
            # Of a text that is shorter than `length` there is a gram too, but it is not one of `length` words.
            whole = words.counts[owners] >= length
            hits, keys, owners = hits[whole], keys[whole], owners[whole]
            places = words.starts[owners] + hits - starts[owners]
            found.append((places, np.full(len(places), length), keys))
        places, lengths, keys = (np.concatenate(parts) for parts in zip(*found, strict=True))
        order = np.lexsort((lengths, places))
        return places[order], lengths[order], keys[order]

    def _matches(
        self, text: str, begin: np.ndarray, end: np.ndarray, places: np.ndarray, lengths: np.ndarray, keys: np.ndarray
    ) -> list[Match]:
        """One text's hits as matches: joined to runs, record by record."""
        share = float(_covered(places, lengths, len(begin)).mean())
        sizes = self._key_starts[keys + 1] - self._key_starts[keys]
        hit = np.repeat(np.arange(len(keys)), sizes)
        before = np.cumsum(sizes) - sizes
        evaluation_texts = self._key_texts[np.arange(len(hit)) + (self._key_starts[keys] - before)[hit]]
        longest: dict[tuple[int, int], tuple[int, int]] = {}
        order = np.argsort(evaluation_texts, kind="stable")
        borders = np.flatnonzero(np.diff(evaluation_texts[order])) + 1
        for group in np.split(order, borders):
            run = _longest_run(places[hit[group]], lengths[hit[group]])
            number = int(evaluation_texts[group[0]])
            task = int(self._text_tasks[number])
            for record in self._text_records[self._text_starts[number] : self._text_starts[number + 1]].tolist():
                longest[task, record] = max(longest.get((task, record), (0, 0)), run)
        return [
            Match(self._names[task], record, text[begin[-at] : end[n - at - 1]][:SHOWN_CHARACTERS], n, share)
            for (task, record), (n, at) in sorted(longest.items())
        ]


class ContaminationCounts:
    """What decontamination found, task by task; the same whatever the order of documents and workers."""

    def __init__(self) -> None:
        self._documents: Counter[str] = Counter()
        self._records: defaultdict[str, set[int]] = defaultdict(set)
        self._examples: defaultdict[str, set[tuple[str, int, str]]] = defaultdict(set)

    def add(self, document_id: str, matches: Sequence[Match]) -> None:
        """Take note of one document's matches."""
        self._documents.update({match.task for match in matches})
        for match in matches:
            self._records[match.task].add(match.record)
            self._show(match.task, {(document_id, match.record, match.text)})

    def merge(self, other: ContaminationCounts) -> None:
        """Add what was counted of other documents."""
        self._documents.update(other._documents)
        for task, records in other._records.items():
            self._records[task] |= records
            self._show(task, other._examples[task])

    def _show(self, task: str, examples: set[tuple[str, int, str]]) -> None:
        self._examples[task] = set(sorted(self._examples[task] | examples)[:EXAMPLES_PER_TASK])

    def summary(self, n_records: Mapping[str, int]) -> dict[str, Any]:
        """For each of `EvaluationIndex.tasks`: records (all), records_hit, documents (that repeat it), examples."""
        names = ("document", "record", "text")
        return {
            task: {
                "records": total,
                "records_hit": len(self._records[task]),
                "documents": self._documents[task],
                "examples": [dict(zip(names, one, strict=True)) for one in sorted(self._examples[task])],
            }
            for task, total in n_records.items()
        }


def _covered(places: np.ndarray, lengths: np.ndarray, n_words: int) -> np.ndarray:
    """(n_words,) bool: which words lie in one of the runs."""
    depth = np.bincount(places, minlength=n_words + 1) - np.bincount(places + lengths, minlength=n_words + 1)
    return np.cumsum(depth)[:n_words] > 0


def _longest_run(places: np.ndarray, lengths: np.ndarray) -> tuple[int, int]:
    """Words of the longest stretch that overlapping runs cover, and minus its first word (so that `max` takes the
    longest, and of equal ones the first)."""
    ends = np.maximum.accumulate(places + lengths)
    begins_new = np.concatenate([[True], places[1:] >= ends[:-1]])
    first = np.flatnonzero(begins_new)
    last = np.append(first[1:], len(places)) - 1
    sizes = ends[last] - places[first]
    best = int(np.argmax(sizes))
    return int(sizes[best]), -int(places[first[best]])


class _Runs:
    """Gathers the runs of words ("grams") of every different string of each task."""

    def __init__(self, ngram: int) -> None:
        self._ngram = ngram
        self._shortest = min(ngram, SHORTEST_WORDS)
        self._grams: list[np.ndarray] = []
        self._gram_texts: list[np.ndarray] = []
        self._text_tasks: list[int] = []
        self._text_records: list[list[int]] = []
        self.lengths: set[int] = set()
        """How many words the grams have."""

    def add(self, task_number: int, task: EvaluationTask) -> int:
        """Take a task's strings in; returns the number of its records."""
        n_records = 0

        def new_texts() -> Iterator[str]:
            nonlocal n_records
            numbers: dict[bytes, int] = {}
            for record, strings in task.records():
                n_records += 1
                for text in strings:
                    key = xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass"))
                    number = numbers.setdefault(key, len(self._text_records))
                    if number == len(self._text_records):
                        self._text_records.append([record])
                        yield text
                    elif self._text_records[number][-1] != record:
                        self._text_records[number].append(record)

        first = len(self._text_records)
        for texts in batches(new_texts(), _BATCH_CHARACTERS):
            self._index(texts, first)
            first += len(texts)
        self._text_tasks += [task_number] * (first - len(self._text_tasks))
        return n_records

    def arrays(self) -> dict[str, np.ndarray]:
        """The index's arrays by name, without the grams that are too common to count.

        keys: (n_keys,) uint64, sorted; filter: see `_filter_of`; key_starts: (n_keys + 1,) int64, places in key_texts,
        where each key's texts begin; key_texts: int32. text_tasks: (n_texts,) int32; text_starts: (n_texts + 1,) int64,
        places in text_records, where each text's records begin; text_records: int32.
        """
        grams = np.concatenate([*self._grams, np.empty(0, dtype=np.uint64)])
        texts = np.concatenate([*self._gram_texts, np.empty(0, dtype=np.int32)])
        tasks = np.array(self._text_tasks, dtype=np.int32)
        order = np.lexsort((texts, grams))
        grams, texts = grams[order], texts[order]
        once = is_new(grams) | is_new(texts)
        grams, texts = grams[once], texts[once]
        # A task's texts are numbered in a row, so within a gram they stand together.
        group = np.cumsum(is_new(grams) | is_new(tasks[texts])) - 1
        is_common = np.bincount(group, minlength=1)[group] > COMMON_TEXTS
        grams, texts = grams[~is_common], texts[~is_common]
        keys, starts = np.unique(grams, return_index=True)
        n_records = [len(records) for records in self._text_records]
        return {
            "keys": keys,
            "filter": _filter_of(keys),
            "key_starts": np.append(starts, len(grams)).astype(np.int64),
            "key_texts": texts,
            "text_tasks": tasks,
            "text_starts": np.concatenate([[0], np.cumsum(n_records)]).astype(np.int64),
            "text_records": np.array([record for found in self._text_records for record in found], dtype=np.int32),
        }

    def _index(self, texts: Sequence[str], first: int) -> None:
        """Add the grams of texts, the first of which has this number."""
        words = words_of(texts)
        grams, starts = words.ngrams(self._ngram)
        owners = np.repeat(np.arange(words.n_texts), np.diff(starts))
        lengths = np.minimum(words.counts, self._ngram)[owners]
        places = words.starts[owners] + np.arange(len(grams)) - starts[owners]
        n_with_letters = np.concatenate([[0], np.cumsum(_have_letters(words, texts))])
        are_words = 2 * (n_with_letters[places + lengths] - n_with_letters[places]) >= lengths
        counted = are_words & (lengths >= self._shortest)
        salts = np.array([_length_salt(length) for length in range(self._ngram + 1)], dtype=np.uint64)
        self._grams.append((grams ^ salts[lengths])[counted])
        self._gram_texts.append((first + owners[counted]).astype(np.int32))
        self.lengths.update(np.unique(lengths[counted]).tolist())


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


def _length_salt(length: int) -> np.uint64:
    """Keeps runs of different lengths apart in one table."""
    return np.uint64(length * _LENGTH_SALT & (1 << 64) - 1)


def _filter_of(keys: np.ndarray) -> np.ndarray:
    """(n_bits / 8,) uint8, one bit for each key: it dismisses 31 of 32 others, and only the rest are looked up."""
    n_bits = 1 << min(_FILTER_MOST_BITS, max(6, int(len(keys) * _FILTER_BITS_PER_KEY).bit_length() - 1))
    bits = np.zeros(n_bits // 8, dtype=np.uint8)
    set_bits(bits, keys)
    return bits


@dataclass(frozen=True)
class EvaluationTask:
    """One file of evaluation data.

    Attributes:
        name: the file's name without its endings; with its folder's, where that says more ("gsm8k/test").
        source: the file.
    """

    name: str
    source: InputFile

    def records(self) -> Iterator[tuple[int, list[str]]]:
        """Number (from 1 on: a line, row or paragraph) and strings of each record.

        Raises:
            DataError: the file cannot be read, or not as what its name says.
        """
        if self.source.kind == "text":
            yield from self._paragraphs()
            return
        for value in read_values(self.source, _PLAIN, _refuse):
            yield value.number, list(strings_of(value.data))

    def _paragraphs(self) -> Iterator[tuple[int, list[str]]]:
        with reading(f"{_FILES}: {self.source.label}", DataError, _FIX), self.source.open() as handle:
            lines = (line.decode() for line in iter(lambda: handle.readline(limit_bytes(_PLAIN)), b""))
            solid = (group for is_solid, group in itertools.groupby(lines, lambda line: bool(line.strip())) if is_solid)
            for number, group in enumerate(solid, start=1):
                yield number, ["".join(group)]


def find_tasks(files: Sequence[str | Path]) -> list[EvaluationTask]:
    """The evaluation files that paths, folders and globs name, each once, by name.

    A text file that was found, not named, counts only if no other data lies beside or below it: beside tables texts are
    notes and licences.

    Raises:
        DataError: something that is not there, or of a kind that is not read.
    """
    found = [source for name in files for source in find_sources([name], setting=_FILES).files]
    named = {str(Path(name).expanduser()) for name in files}
    tables = {str(source.entry) for source in found if source.kind in ("lines", "json", "separated", "table")}

    def counts(source: InputFile) -> bool:
        path = str(source.entry)
        folder = os.path.join(os.path.dirname(path), "")
        is_text = source.kind == "text"
        return path in tables or (is_text and (path in named or not any(one.startswith(folder) for one in tables)))

    kept = {str(source.entry): source for source in found if counts(source)}
    if not kept:
        listed = ", ".join(map(str, files))
        raise DataError(f"{_FILES}: no evaluation data in {listed}.", "Name JSON, Parquet, CSV or text files.")
    stems = Counter(_stem(one) for one in kept.values())
    tasks: dict[str, EvaluationTask] = {}
    for path, one in sorted(kept.items()):
        name = _stem(one)
        if stems[name] > 1 or _SPLIT_NAMES.match(name):
            name = f"{os.path.basename(os.path.dirname(os.path.abspath(path)))}/{name}"
        name = path if name in tasks else name
        tasks[name] = EvaluationTask(name, one)
    return list(tasks.values())


def _stem(source: InputFile) -> str:
    name = source.entry.name
    name = name[: -len(source.packing)] if source.packing else name
    return os.path.splitext(name)[0]


def _refuse(record: SetAside) -> None:
    if record.reason != Reason.EMPTY:
        raise DataError(f"{_FILES}: {record} (it is read as its ending says).", _FIX)
