"""Documents that repeat evaluation data: found by runs of words that both have.

In: evaluation files, and the corpus's texts. Out: for each text the evaluation records that it repeats.

Every run of `ngram` words (13 by default, as for GPT-3: Brown et al. 2020, appendix C) of every string of every
evaluation record is looked for, words as in `words.py`: whatever the case, punctuation and spacing. A string of fewer
words is looked for whole, if it has at least 8 (GPT-3's least; `ngram`, if that is less). Shorter ones, such as most
answers to choose from, are everyday phrases and stand in many innocent documents. For the same reason a run that
stands in more than 10 different strings of one task is ignored: it is the wording of the task's instruction. So is a
run in which fewer than half of the words have a letter, such as "1, 2, 3, 4 ...".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from groundup.corpus.decontamination.files import find_tasks
from groundup.corpus.decontamination.runs import SHORTEST_WORDS, EvaluationRuns, length_salt, may_be_keys
from groundup.corpus.words import WORDS_VERSION, Words, batches, words_of
from groundup.errors import ArtifactError, DataError
from groundup.files import atomic_folder, read_json, write_json

SHOWN_CHARACTERS = 400
EXAMPLES_PER_TASK = 20
_BATCH_CHARACTERS = 1 << 20
_INDEX = "index.json"
_ARRAYS = ("keys", "key_starts", "key_texts", "text_tasks", "text_starts", "text_records", "filter")


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
    """The runs of words of all evaluation data, on disk, shared by the processes that map it.

    It is pickled as its path.

    Args:
        folder: what `build` wrote.

    Raises:
        ArtifactError: there is no index, or one of another version.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        about = read_json(self._folder / _INDEX)
        if about["words_version"] != WORDS_VERSION:
            raise ArtifactError(f"{self._folder}: made by another version of groundup.", "Build it again.")
        self.tasks: dict[str, int] = about["tasks"]
        """Records of each task, in the order of the files."""
        self.n_ignored: dict[str, int] = about["ignored"]
        """Runs of words that were ignored in each task because too many of its strings have them."""
        self._lengths: list[int] = about["lengths"]
        self._names = list(self.tasks)
        arrays = {name: np.asarray(np.load(self._folder / f"{name}.npy", mmap_mode="r")) for name in _ARRAYS}
        self._keys, self._filter = arrays["keys"], arrays["filter"]
        self._key_starts, self._key_texts = arrays["key_starts"], arrays["key_texts"]
        self._text_tasks, self._text_starts = arrays["text_tasks"], arrays["text_starts"]
        self._text_records = arrays["text_records"]

    @classmethod
    def build(cls, files: Sequence[str | Path], ngram: int, folder: str | Path) -> EvaluationIndex:
        """Index evaluation files into a folder (an old one is replaced).

        Memory is about 40 bytes a word of evaluation data.

        Args:
            files: evaluation files, folders or globs.
            ngram: words in a row that count as repeated.
            folder: where the index is kept.

        Raises:
            DataError: a file that is not there or cannot be read, or no string of enough words in any.
        """
        tasks = find_tasks(files)
        builder = EvaluationRuns(ngram)
        n_records = {task.name: builder.add(number, task) for number, task in enumerate(tasks)}
        arrays, n_ignored = builder.arrays(len(tasks))
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
            about = {
                "words_version": WORDS_VERSION,
                "ngram": ngram,
                "lengths": builder.lengths,
                "tasks": n_records,
                "ignored": {task.name: int(n) for task, n in zip(tasks, n_ignored, strict=True)},
            }
            write_json(place / _INDEX, about)
        return cls(folder)

    @classmethod
    def load(cls, folder: str | Path) -> EvaluationIndex:
        """An index that was built before. Raises as the class."""
        return cls(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return EvaluationIndex, (str(self._folder),)

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
            grams = grams ^ length_salt(length)
            hits = may_be_keys(self._filter, grams)
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
        evaluation_texts = self._key_texts[_ranges(self._key_starts[keys], sizes)]
        longest: dict[tuple[int, int], tuple[int, int]] = {}
        order = np.argsort(evaluation_texts, kind="stable")
        borders = np.flatnonzero(np.diff(evaluation_texts[order])) + 1
        for group in np.split(order, borders):
            run = _longest_run(places[hit[group]], lengths[hit[group]])
            number = int(evaluation_texts[group[0]])
            task = int(self._text_tasks[number])
            for record in self._text_records[self._text_starts[number] : self._text_starts[number + 1]].tolist():
                longest[task, record] = max(longest.get((task, record), (0, 0)), run)
        matches = []
        for (task, record), (n_words, first) in sorted(longest.items()):
            first = -first
            shown = text[begin[first] : end[first + n_words - 1]][:SHOWN_CHARACTERS]
            matches.append(Match(self._names[task], record, shown, n_words, share))
        return matches


class ContaminationCounts:
    """What decontamination found, task by task; the same whatever the order of documents and workers."""

    def __init__(self) -> None:
        self._documents: Counter[str] = Counter()
        self._records: dict[str, set[int]] = {}
        self._examples: dict[str, list[tuple[str, int, str]]] = {}

    def add(self, document_id: str, matches: Iterable[Match]) -> None:
        """Take note of one document's matches."""
        for task, group in _by_task(matches).items():
            self._documents[task] += 1
            self._records.setdefault(task, set()).update(match.record for match in group)
            self._show(task, [(document_id, match.record, match.text) for match in group])

    def state(self) -> dict[str, Any]:
        """All of it, JSON-able, for `merge`."""
        return {
            task: {
                "documents": self._documents[task],
                "records": sorted(self._records[task]),
                "examples": [list(example) for example in self._examples[task]],
            }
            for task in sorted(self._documents)
        }

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add what another counted (its `state()`), of other documents."""
        for task, seen in state.items():
            self._documents[task] += seen["documents"]
            self._records.setdefault(task, set()).update(seen["records"])
            self._show(task, [(document, record, text) for document, record, text in seen["examples"]])

    def summary(self, n_records: Mapping[str, int]) -> dict[str, Any]:
        """For each task: records (all), records_hit, documents (that repeat it), examples (document, record, text).

        Args:
            n_records: `EvaluationIndex.tasks`.
        """
        return {
            task: {
                "records": total,
                "records_hit": len(self._records.get(task, ())),
                "documents": self._documents[task],
                "examples": [
                    {"document": document, "record": record, "text": text}
                    for document, record, text in self._examples.get(task, [])
                ],
            }
            for task, total in n_records.items()
        }

    def _show(self, task: str, examples: list[tuple[str, int, str]]) -> None:
        self._examples[task] = sorted({*self._examples.get(task, []), *examples})[:EXAMPLES_PER_TASK]


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


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """start, start + 1, … start + size - 1, for each, in one array."""
    before = np.cumsum(sizes) - sizes
    return np.arange(int(sizes.sum())) + np.repeat(starts - before, sizes)


def _by_task(matches: Iterable[Match]) -> dict[str, list[Match]]:
    groups: dict[str, list[Match]] = {}
    for match in matches:
        groups.setdefault(match.task, []).append(match)
    return groups
