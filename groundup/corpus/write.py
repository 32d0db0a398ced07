"""The third pass: the documents that stay, written to `documents.jsonl` in the order of their ids.

First every unit's survivors are read again, cut where they repeat others, looked up among the evaluation data, and
written to a file of the unit, sorted by id, with what was left out beside it. Then the files are merged, a range of
ids at a time. Since ids are digests of texts, the result is a shuffled corpus whose bytes depend on the texts
alone, not on the order of their files or on how the work was divided.
"""

from __future__ import annotations

import contextlib
import heapq
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import xxhash

from groundup.corpus.annotate import DOCUMENTS_TABLE, EMPTIED, SCORE, SET_ASIDE, SIGNALS_TABLE, TOXIC
from groundup.corpus.decontaminate import ContaminationCounts, EvaluationIndex, Match
from groundup.corpus.dedup.repeats import cut_spans
from groundup.corpus.document import Document, Reason, SetAside, derived_id, excerpt_of
from groundup.corpus.filter_statistics import KEPT, Entry, FilterStatistics, set_aside_record
from groundup.corpus.holdout import Holdout
from groundup.corpus.mix import copies_of
from groundup.corpus.select import Annotated, Selection
from groundup.recipe import CorpusSettings

ID_PREFIX = b'{"id":"'
ID_END = len(ID_PREFIX) + 32
_SPLIT_AT = ID_END + 2  # behind `{"id":"…",`


@dataclass(frozen=True)
class WriteUnit:
    """One unit's share of the third pass.

    Attributes:
        unit: its annotation, and which documents are kept.
        cuts: the stretches of characters to cut out of its texts (`SPAN` records).
        out: the file to write, without its ending.
        evaluation: the evaluation index's folder, or "".
        bounds: the first 64 bits of the ids at which ranges begin.
    """

    unit: Annotated
    cuts: np.ndarray
    out: str
    settings: CorpusSettings
    evaluation: str
    bounds: tuple[int, ...]


def write_unit(work: WriteUnit) -> Written:
    """Write one unit's survivors, and what was left out of it.

    Returns:
        What became of the documents that were read.
    """
    return _UnitWriter(work).run()


class Written(NamedTuple):
    """What became of a unit's documents; `offsets`: bytes at which each range of ids begins in its file."""

    statistics: FilterStatistics
    holdout: Holdout
    contamination: ContaminationCounts
    offsets: list[int]


class _UnitWriter:
    def __init__(self, work: WriteUnit) -> None:
        self._work, self._settings = work, work.settings
        self._folder, self._codes = work.unit.folder, work.unit.codes
        self._cuts: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        for row, begin, end in work.cuts.tolist():
            self._cuts[row].append((begin, end))
        self._selection = Selection(work.settings)
        self._evaluation = EvaluationIndex(work.evaluation) if work.evaluation else None
        self._details = _Details(self._folder, self._codes, self._selection) if self._codes.any() else None
        self._statistics = FilterStatistics()
        self._holdout = Holdout(self._settings)
        self._contamination = ContaminationCounts()
        self._lines: list[bytes] = []

    def run(self) -> Written:
        with Path(f"{self._work.out}.aside.jsonl").open("wb") as handle:
            for record in self._left_out():
                handle.write(orjson.dumps(set_aside_record(record)) + b"\n")
        self._lines.sort()
        firsts = [int(line[len(ID_PREFIX) : len(ID_PREFIX) + 16], 16) for line in self._lines]
        begins = np.cumsum([0, *map(len, self._lines)])
        places = np.searchsorted(np.array(firsts, dtype=np.uint64), np.array(self._work.bounds, dtype=np.uint64))
        with Path(f"{self._work.out}.jsonl").open("wb") as handle:
            handle.writelines(self._lines)
        offsets = [*begins[places].tolist(), int(begins[-1])]
        return Written(self._statistics, self._holdout, self._contamination, offsets)

    def _left_out(self) -> Iterator[SetAside]:
        """Everything left out, in the order of the file; the lines of kept documents are collected meanwhile."""
        with (self._folder / SET_ASIDE).open("rb") as aside, (self._folder / EMPTIED).open("rb") as emptied:
            unread = (map(self._unread, lines) for lines in (aside, emptied))
            yield from heapq.merge(*unread, self._judged(), key=lambda record: (record.source, record.position))

    def _unread(self, line: bytes) -> SetAside:
        record = SetAside(**orjson.loads(line))
        if record.place:
            record = replace(record, number=record.number + self._work.unit.first_number)
        key = xxhash.xxh3_128_hexdigest(f"{record.source}\0{record.position}".encode())
        self._statistics.add_example(key, record)
        return record

    def _judged(self) -> Iterator[SetAside]:
        first = self._work.unit.first_number
        for rows in _row_groups(self._folder):
            texts = {
                row: cut_spans(values["text"], self._cuts[row]) if row in self._cuts else values["text"]
                for row, values in rows
                if not self._codes[row]
            }
            matches = self._matches_of(texts)
            for row, values in rows:
                code, identity = int(self._codes[row]), values["id"].hex()
                if code:
                    reason: str | None = self._selection.reasons[code]
                    detail = self._detail(row, str(reason))
                else:
                    reason, detail = self._refusal(values["text"], texts[row], matches.get(row, []), identity)
                if reason is None:
                    self._keep(identity, texts[row], values)
                    continue
                if not code:  # the others are counted already
                    self._enter(str(reason), values, len(texts[row].encode()))
                record = SetAside(
                    values["file"], values["place"], values["number"] + first, str(reason), detail,
                    excerpt_of(values["text"]), values["bytes"], values["position"],
                )  # fmt: skip
                self._statistics.add_example(identity, record)
                yield record

    def _matches_of(self, texts: Mapping[int, str]) -> dict[int, list[Match]]:
        """What of the evaluation data each text repeats, where it is enough to remove it."""
        if self._evaluation is None or self._settings.decontaminate is None:
            return {}
        limit = self._settings.decontaminate.max_share
        found = zip(texts, self._evaluation.find(list(texts.values())), strict=True)
        return {row: matches for row, matches in found if matches and matches[0].share > limit}

    def _refusal(self, whole: str, text: str, matches: Sequence[Match], identity: str) -> tuple[str | None, str]:
        """Why a document that was kept so far is not written after all."""
        n_cut = len(whole) - len(text)
        if n_cut:
            self._statistics.changed["characters cut as repeated"] += n_cut
        if n_cut and len(text.strip()) < self._settings.min_characters:
            return Reason.REPEATED_PARTS, f"{n_cut:,} of {len(whole):,} characters stand elsewhere too"
        if matches:
            self._contamination.add(identity, matches)
            return Reason.CONTAMINATED, f"{matches[0].task}, record {matches[0].record}: {excerpt_of(matches[0].text)}"
        return None, ""

    def _keep(self, identity: str, text: str, values: Mapping[str, Any]) -> None:
        self._enter(KEPT, values, len(text.encode()))
        self._holdout.see(identity)
        self._statistics.characters_kept += len(text)
        score = values.get(SCORE)
        kept = Document(identity, text, values["source"], values["language"], url=values["url"], score=score)
        line = orjson.dumps({"id": identity, **_rest(kept)})
        self._lines.append(line + b"\n")

    def _enter(self, reason: str, values: Mapping[str, Any], size_bytes: int) -> None:
        self._statistics.add([(reason, values["source"], values["language"], 1, size_bytes)])

    def _detail(self, row: int, reason: str) -> str:
        survivor = self._work.unit.survivors.get(row)
        if survivor is not None:
            same = "the same text as" if reason == Reason.DUPLICATE else "nearly the same text as"
            return f"{same} document {survivor}"
        assert self._details is not None
        return self._details.of(row, reason)


class _Details:
    """Says for a removed document what its value was and what the threshold is."""

    def __init__(self, folder: Path, codes: np.ndarray, selection: Selection) -> None:
        import pyarrow.parquet as pq

        self._settings = selection.settings
        self._rules = {rule.name: rule for rule in selection.rules}
        rows = np.flatnonzero(codes)
        table = pq.read_table(folder / SIGNALS_TABLE).take(rows)
        self._rows = {int(row): place for place, row in enumerate(rows)}
        self._columns = {name: table[name].combine_chunks() for name in table.schema.names}

    def of(self, row: int, reason: str) -> str:
        settings, place = self._settings, self._rows[row]

        def value(name: str) -> Any:
            return self._columns[name][place].as_py()

        if reason == Reason.SHORT:
            return f"{value('characters')} characters; the least is {settings.min_characters}"
        if reason == Reason.LANGUAGE:
            language, score = value("language"), value("language_score")
            below = language in settings.languages
            return f"{language} ({score:.2f})" + (f", below the floor of {settings.language_floor:g}" if below else "")
        if reason == Reason.CLASSIFIER and settings.classifier is not None:
            return f"score {value(SCORE):.3f}; the least is {settings.classifier.min_score:g}"
        if reason == Reason.TOXIC:
            return f"share {value(TOXIC):.4f}; the most is {settings.max_toxic_share:g}"
        if reason == Reason.PREDICATE:
            return f"{settings.predicate} said no"
        rule = self._rules[reason]
        bound = f"the least is {rule.least:g}" if rule.least is not None else f"the most is {rule.most:g}"
        return f"{rule.signal} {value(rule.signal):.4g}; {bound}"


@dataclass(frozen=True)
class Merge:
    """One range of ids: the units' files with its (begin, end) in each, the file to write, what the hold-out saw of all
    documents, and how often those of each source are written (None: once)."""

    files: Sequence[tuple[str, int, int]]
    out: str
    holdout: Holdout
    factors: dict[str, float] | None


def merge_range(work: Merge) -> dict[str, Any]:
    """Write the documents of one range of ids, each with its split.

    Returns:
        documents (written, by split), mixed_out (source, language, documents, bytes).
    """
    lines: list[bytes] = []
    for name, begin, end in work.files:
        with Path(name).open("rb") as handle:
            handle.seek(begin)
            lines += handle.read(end - begin).splitlines(keepends=True)
    lines.sort()
    holdout = work.holdout
    counts: Counter[str] = Counter()
    mixed_out: list[Entry] = []
    with Path(work.out).open("wb") as handle:
        for line, original, identity in _distinct(lines, work.factors, mixed_out):
            if holdout.by == "document":
                split = holdout.split_of(original)
                counts[split] += 1
                head = ID_PREFIX + identity.encode() + b'","split":"' + split.encode() + b'",'
                handle.write(head + line[_SPLIT_AT:])
            else:
                for part in holdout.divide(replace(parse_line(line), id=identity)):
                    counts[part.split] += 1
                    handle.write(orjson.dumps({"id": part.id, "split": part.split, **_rest(part)}) + b"\n")
    return {"documents": dict(counts), "mixed_out": mixed_out}


def _distinct(
    lines: Sequence[bytes], factors: Mapping[str, float] | None, mixed_out: list[Entry]
) -> Iterator[tuple[bytes, str, str]]:
    """Each line to write with its text's id and its own: copies get an id derived from it."""
    before, n_same = "", 0
    for line in lines:
        original = line[len(ID_PREFIX) : ID_END].decode()
        n_same = n_same + 1 if original == before else 0
        before = original
        identity = derived_id(original, f"same {n_same}") if n_same else original
        n_copies = 1
        if factors is not None:
            document = parse_line(line)
            n_copies = copies_of(identity, factors[document.source])
            if not n_copies:
                size = len(document.text.encode())
                mixed_out.append((str(Reason.MIX), document.source, document.language, 1, size))
        for copy in range(n_copies):
            yield line, original, derived_id(identity, f"copy {copy}") if copy else identity


def parse_line(line: bytes) -> Document:
    """A document as `documents.jsonl` holds it."""
    return Document(**orjson.loads(line))


def _rest(document: Document) -> dict[str, Any]:
    rest = {"source": document.source, "language": document.language, "url": document.url}
    return {**rest, **({"score": document.score} if document.score is not None else {}), "text": document.text}


def _row_groups(folder: Path) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """The annotated documents in order, with language and score, a group at a time."""
    import pyarrow.parquet as pq

    if not (folder / DOCUMENTS_TABLE).exists():
        return
    with contextlib.ExitStack() as files:
        documents = files.enter_context(pq.ParquetFile(folder / DOCUMENTS_TABLE))
        signals = files.enter_context(pq.ParquetFile(folder / SIGNALS_TABLE))
        names = ["language", "bytes", *([SCORE] if SCORE in signals.schema_arrow.names else [])]
        row = 0
        for group in range(documents.num_row_groups):
            columns = documents.read_row_group(group).to_pydict()
            columns |= signals.read_row_group(group, columns=names).to_pydict()
            keys = list(columns)
            rows = [dict(zip(keys, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            yield list(enumerate(rows, start=row))
            row += len(rows)
