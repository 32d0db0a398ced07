"""The three passes over a corpus: read and measure (annotate), select, write.

In: the files of `[corpus] inputs`. Out: `documents.jsonl`, `set_aside.jsonl` and `FilterStatistics`.
Every piece of work goes to an `Engine`; what comes back is counts and names of files, never a text.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from groundup.console import format_bytes
from groundup.corpus.annotate import DOCUMENTS_TABLE, Annotation, annotate, annotation_fingerprint, stamp_of
from groundup.corpus.decontaminate import ContaminationCounts, EvaluationIndex
from groundup.corpus.dedup.files import Removed, UnitKeys
from groundup.corpus.dedup.near import near_duplicates
from groundup.corpus.dedup.repeats import SPAN, exact_duplicates, repeated_parts, repeated_substrings
from groundup.corpus.document import Reason, SetAside
from groundup.corpus.engine import Engine
from groundup.corpus.filter_statistics import FilterStatistics, set_aside_record
from groundup.corpus.holdout import Holdout
from groundup.corpus.mix import plan_mix, plan_tokens
from groundup.corpus.reading.read import Unit, read, units_of
from groundup.corpus.reading.sources import InputFiles, find_sources
from groundup.corpus.select import Annotated, Selection
from groundup.corpus.words import WORDS_VERSION
from groundup.corpus.write import Merge, WriteUnit, merge_range, write_unit
from groundup.errors import DataError
from groundup.files import (
    append_file,
    atomic_folder,
    atomic_writer,
    own_folder,
    read_json,
    remove_folder,
    value_digest,
    write_json,
)  # fmt: skip
from groundup.recipe import CorpusSettings

DOCUMENTS = "documents.jsonl"
SET_ASIDE_FILE = "set_aside.jsonl"
STATISTICS_FILE = "filter_statistics.json"
ANNOTATED = "annotated"
CLASSIFIER = "classifier"
KEYS_LISTED = 20
FILES_IN_A_PACK = 2000


class Passes:
    """The three passes, and what each hands to the next."""

    def __init__(
        self, settings: CorpusSettings, out: Path, work: Path, engine: Engine, show: Callable[..., None]
    ) -> None:
        self._settings, self._out, self._work, self._engine, self._show = settings, out, work, engine, show
        self._memory_bytes = int(settings.memory_mib * 2**20)
        self._selection = Selection(settings)
        self._units: list[Annotated] = []
        self.statistics = FilterStatistics()
        self.holdout = Holdout(settings)
        self.more: dict[str, Any] = {}
        self._aside: list[SetAside] = []

    def annotate(self, sources: InputFiles) -> None:
        """Read and measure every unit that is not measured yet; forget units that are no longer asked for."""
        settings = self._settings
        root = self._out / ANNOTATED
        own_folder(root)
        classifier = self._train_classifier()
        common = annotation_fingerprint(settings, classifier)
        split_bytes = int(settings.split_mib * 2**20)
        stamps = {source: stamp_of(source) for source in sources.files}
        digests = {source: source.digest() for source in sources.files}
        trained = str(root / CLASSIFIER) if classifier else ""
        tasks = []
        for pack in _packed(units_of(sources, split_bytes, settings.separator), split_bytes):
            places = [[unit.source.label, digests[unit.source], unit.start, unit.stop] for unit in pack]
            fingerprint = value_digest([common, places])
            before = tuple(stamps[unit.source] for unit in pack)
            tasks.append(Annotation(pack, settings, str(root / fingerprint), fingerprint, before, trained))
        wanted = {Path(task.folder).name for task in tasks}
        for old in root.iterdir():
            if old.name not in wanted and old.name != CLASSIFIER:
                remove_folder(old)
        read_bytes = 0
        self._units = []
        numbers: Counter[str] = Counter()
        for task, record in zip(tasks, self._engine.map(annotate, tasks), strict=True):
            self._units.append(Annotated(Path(task.folder), record, numbers[record["file"]]))
            numbers[record["file"]] += record["records"]
            read_bytes += record["bytes_in"]
            note = f"{len(self._units)}/{len(tasks)} read · {format_bytes(read_bytes)}"
            self._show(len(self._units), total=len(tasks), note=note)
        self._count_read(sources)

    def select(self) -> None:
        """Select the documents to keep, by their signals and keys alone."""
        selection, units = self._selection, self._units
        self._show(0, total=1, note="selecting")
        for unit in units:
            selection.judge(unit)
        if self._settings.dedup != "none":
            self._remove_duplicates()
        for unit in units:
            self.statistics.add(selection.entries(unit))
        self.statistics.check("select")
        self.more["histograms"] = selection.histograms
        self.more["duplicate_keys"] = self._duplicate_keys()

    def write(self) -> None:
        """Write the documents that are kept, and list all others."""
        units, settings = self._units, self._settings
        for name in (STATISTICS_FILE, DOCUMENTS, SET_ASIDE_FILE):  # of an earlier call: the three belong together
            (self._out / name).unlink(missing_ok=True)
        cuts = self._find_cuts()
        evaluation = self._index_evaluation()
        n_ranges = max(1, -(-self.statistics.bytes_kept // max(1, self._memory_bytes // 8)))
        bounds = (0, *(int(step) for step in np.arange(1, n_ranges) * (2**64 / n_ranges)))
        tasks = [
            WriteUnit(unit, np.concatenate(spans), str(self._work / f"{number:06d}"), settings, evaluation, bounds)
            for number, (unit, *spans) in enumerate(zip(units, *cuts, strict=True))
        ]
        self._write_units(tasks)
        self._merge(tasks)

    def _train_classifier(self) -> str:
        """Train the quality classifier, if the recipe has one; its fingerprint."""
        asked = self._settings.classifier
        if asked is None:
            return ""
        from groundup.corpus.quality.classifier import CLASSIFIER_VERSION, Classifier

        folder = self._out / ANNOTATED / CLASSIFIER
        same = ("unicode", "text_field", "separator", "follow_links")
        plain = CorpusSettings(**{name: getattr(self._settings, name) for name in same})
        both = (asked.positive, asked.negative)
        found = [find_sources(files, follow_links=plain.follow_links).files for files in both]
        digests = [[source.digest() for source in sources] for sources in found]
        fingerprint = value_digest([CLASSIFIER_VERSION, WORDS_VERSION, *digests])
        marker = folder / "fingerprint.json"
        if not marker.is_file() or read_json(marker) != fingerprint:
            good, bad = ((item.text for item in read(*files, settings=plain)) for files in both)
            self._show(0, total=1, note="training the quality classifier")
            with atomic_folder(folder) as place:
                Classifier.train(good, bad, seed=0).save(place)
                write_json(place / marker.name, fingerprint)
        self.more["classifier"] = Classifier.load(folder).report
        return fingerprint

    def _count_read(self, sources: InputFiles) -> None:
        self._aside = sources.aside
        for item in self._aside:
            self.statistics.add_input(1, 0)
            self.statistics.add([(item.reason, item.source, "", 1, 0)])
            self.statistics.add_example("", item)
        for unit in self._units:
            record = unit.record
            n_aside = sum(count for _, _, count in record["set_aside"])
            self.statistics.add_input(record["documents"] + n_aside, record["bytes_in"])
            self.statistics.add((reason, file, "", count, 0) for reason, file, count in record["set_aside"])
            self.statistics.changed.update(record["changed"])
            for kind, samples in record["findings"].items():
                known = self.statistics.findings.setdefault(kind, [])
                known += samples[: 20 - len(known)]

    def _remove_duplicates(self) -> None:
        selection, units = self._selection, self._units
        keys = self._keys
        self._show(0, total=1, note="exact duplicates")
        found = exact_duplicates(keys, [u.stays for u in units], self._work / "exact", self._engine, self._memory_bytes)
        self._remove(found, selection.reasons.index(Reason.DUPLICATE))
        if self._settings.dedup == "near":
            self._show(0, total=1, note="near-duplicates")
            kept = [unit.stays for unit in units]
            where = (self._work / "near", self._engine, self._memory_bytes)
            found, self.more["clusters"] = near_duplicates(keys, kept, self._settings.minhash, *where)
            self._remove(found, selection.reasons.index(Reason.NEAR_DUPLICATE))

    def _find_cuts(self) -> list[list[np.ndarray]]:
        """By search, for each unit the repeated spans to cut out of its texts; the first search finds none."""
        settings = self._settings
        common = (self._engine, self._memory_bytes)
        kept = [unit.stays for unit in self._units]
        searches = [[np.empty(0, SPAN) for _ in kept]]
        if settings.dedup_within != "none":
            self._show(0, total=1, note=f"repeated {settings.dedup_within}")
            within, least = settings.dedup_within, settings.dedup_within_characters
            searches.append(repeated_parts(self._keys, kept, within, self._work / "parts", *common, least))
        if settings.dedup_substring:
            self._show(0, total=1, note="repeated passages")
            n_words = settings.dedup_substring
            searches.append(repeated_substrings(self._keys, kept, n_words, self._work / "substrings", *common))
        return searches

    @property
    def _keys(self) -> list[UnitKeys]:
        return [UnitKeys(unit.folder, unit.n) for unit in self._units]

    def _remove(self, found: Sequence[Removed], code: int) -> None:
        for unit, removed in zip(self._units, found, strict=True):
            unit.remove(removed.rows, code)
            for row, survivor in zip(removed.rows, removed.survivors, strict=True):
                unit.survivors[int(row)] = f"{int(survivor[0]):016x}{int(survivor[1]):016x}"

    def _duplicate_keys(self) -> dict[str, Any]:
        """Records of one file that carry the same id; they are kept, since their texts decide, but they are listed."""
        count = 0
        examples: list[dict[str, Any]] = []
        for _, of_file in itertools.groupby(self._units, lambda unit: unit.record["file"]):
            units = [unit for unit in of_file if unit.n]
            columns = [unit.columns(["key_hash"])["key_hash"] for unit in units]
            hashes = np.concatenate([*columns, np.empty(0, np.uint64)])
            repeated, times = np.unique(hashes[hashes != 0], return_counts=True)
            repeated, times = repeated[times > 1], times[times > 1]
            count += int((times - 1).sum())
            if len(repeated) and len(examples) < KEYS_LISTED:
                examples += _records_with(units, repeated)[: KEYS_LISTED - len(examples)]
        return {"count": count, "examples": examples}

    def _index_evaluation(self) -> str:
        """Build the index of evaluation data, if the recipe has any; its folder."""
        asked = self._settings.decontaminate
        if asked is None:
            return ""
        self._show(0, total=1, note="indexing evaluation data")
        folder = self._work / "evaluation"
        EvaluationIndex.build(asked.files, asked.ngram, folder)
        return str(folder)

    def _write_units(self, tasks: Sequence[WriteUnit]) -> None:
        """Write every unit's survivors, and count what the steps that read their texts have removed."""
        statistics = self.statistics
        statistics.clear_kept()
        self._offsets: list[list[int]] = []
        contamination = ContaminationCounts()
        for written in self._engine.map(write_unit, tasks):
            statistics.merge(written.statistics)
            self.holdout.merge(written.holdout)
            contamination.merge(written.contamination)
            self._offsets.append(written.offsets)
            self._show(len(self._offsets), total=len(tasks), note=f"{len(self._offsets)}/{len(tasks)} written")
        statistics.check("write")
        if tasks[0].evaluation:
            self.more["contamination"] = contamination.summary(EvaluationIndex(tasks[0].evaluation).tasks)
        with atomic_writer(self._out / SET_ASIDE_FILE, binary=True) as handle:
            for item in self._aside:
                handle.write(orjson.dumps(set_aside_record(item)) + b"\n")
            for task in tasks:
                append_file(handle, Path(f"{task.out}.aside.jsonl"))
        if not statistics.documents_kept:
            raise statistics.nothing_left()

    def _merge(self, tasks: Sequence[WriteUnit]) -> None:
        """Merge the units' files, one range of ids after the other, into `documents.jsonl`."""
        factors = None
        if self._settings.mix:
            factors = plan_mix(self.statistics.bytes_by_source, self._settings.mix)
        elif self._settings.mix_tokens:
            tokens, bytes_per_token = self._settings.mix_tokens, self._settings.bytes_per_token
            factors = plan_tokens(self.statistics.bytes_by_source, tokens, bytes_per_token)
        if factors is not None:
            self.more["mix"] = factors
        merges = []
        for number in range(len(tasks[0].bounds)):
            pieces = [
                (f"{task.out}.jsonl", offsets[number], offsets[number + 1])
                for task, offsets in zip(tasks, self._offsets, strict=True)
                if offsets[number] < offsets[number + 1]
            ]
            out = str(self._work / f"range-{number:06d}.jsonl")
            merges.append(Merge(pieces, out, self.holdout, factors))
        with atomic_writer(self._out / DOCUMENTS, binary=True) as handle:
            for merge, record in zip(merges, self._engine.map(merge_range, merges), strict=True):
                self.statistics.documents_written.update(record["documents"])
                self.statistics.remove_kept(record["mixed_out"])
                append_file(handle, Path(merge.out))
                Path(merge.out).unlink()
            self.statistics.check("mix")
            if not self.statistics.documents_written["validation"]:
                raise DataError(
                    f"corpus: {self.statistics.characters_kept:,} characters of text are too few to hold out a "
                    "validation part.",
                    "Add text, or raise [corpus] validation_share.",
                )


def _packed(units: Sequence[Unit], split_bytes: int) -> Iterator[tuple[Unit, ...]]:
    """Small files grouped, so that a hundred thousand pages are not as many pieces of work."""
    pack: list[Unit] = []
    size = 0
    for unit in units:
        unit_bytes = unit.source.size_bytes()
        stands_alone = bool(unit.start) or unit.stop is not None or unit_bytes >= split_bytes
        if pack and (stands_alone or size + unit_bytes > split_bytes or len(pack) >= FILES_IN_A_PACK):
            yield tuple(pack)
            pack, size = [], 0
        if stands_alone:
            yield (unit,)
            continue
        pack.append(unit)
        size += unit_bytes
    if pack:
        yield tuple(pack)


def _records_with(units: Sequence[Annotated], hashes: np.ndarray) -> list[dict[str, Any]]:
    """The ids behind these hashes, with the records that carry them."""
    import pyarrow.parquet as pq

    places: dict[tuple[str, str], list[str]] = {}
    for unit in units:
        rows = np.flatnonzero(np.isin(unit.columns(["key_hash"])["key_hash"], hashes))
        table = pq.read_table(unit.folder / DOCUMENTS_TABLE, columns=["file", "key", "place", "number"]).take(rows)
        for item in table.to_pylist():
            record = f"{item['place']} {item['number'] + unit.first_number}"
            places.setdefault((item["file"], item["key"]), []).append(record)
    return [{"source": file, "id": key, "records": found[:10]} for (file, key), found in sorted(places.items())]
