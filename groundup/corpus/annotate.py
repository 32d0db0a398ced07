"""The first pass of the data stage: one piece of the input read, changed where asked, and measured.

In: `Unit`s (a part of a file, a file, or many small ones). Out: a folder with

    documents.parquet   id, text, source, file, url, key, position, place, number: one row a document
    signals.parquet     id, source, language, language_score, characters, bytes, and a column for every signal asked for
    ids.npy digests.npy lengths.npy signatures.npy    what deduplication compares
    set_aside.jsonl     what could not be read, and why
    emptied.jsonl       texts of which the line rules left nothing
    unit.json           counts, the fingerprint of all that the folder depends on, and the digests of its files

No threshold is applied here, so that changing one needs no second reading. Of documents in other languages than
those asked for only the beginning is kept. A folder whose fingerprint and files still fit is used again. The pass is a
pure function of the unit, so any worker can do it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
import orjson
import xxhash

from groundup.batches import batches
from groundup.corpus.dedup.minhash import HASH_VERSION, NO_SHINGLES, signatures
from groundup.corpus.document import EXCERPT_CHARACTERS, Document, Reason, Record, SetAside, excerpt_of
from groundup.corpus.quality.language import detect_languages
from groundup.corpus.quality.lines import clean_lines, line_rules_of
from groundup.corpus.quality.predicate import load_predicate, predicate_fingerprint
from groundup.corpus.quality.privacy import replace_private
from groundup.corpus.quality.rules import rules_for
from groundup.corpus.quality.signals import signals, toxic_share
from groundup.corpus.reading.extract import Extractor
from groundup.corpus.reading.read import Unit, UnitReader
from groundup.corpus.reading.sources import InputFile
from groundup.corpus.reading.text import DOCUMENT
from groundup.corpus.words import words_of
from groundup.errors import ArtifactError, DataError
from groundup.files import atomic_folder, file_digest, read_json, value_digest, write_json
from groundup.recipe import CorpusSettings
from groundup.untrusted import ordinary_file, read_bytes, reading

if TYPE_CHECKING:
    import pyarrow as pa

ANNOTATION_VERSION = 5
"""Raised when the results of this pass change."""

DOCUMENTS_TABLE = "documents.parquet"
SIGNALS_TABLE = "signals.parquet"
SET_ASIDE = "set_aside.jsonl"
EMPTIED = "emptied.jsonl"
"""Separate from `SET_ASIDE`, so that each of the two is in the order of the input, however records were batched."""
UNIT = "unit.json"
SCORE = "score"
TOXIC = "toxic_share"
PREDICATE = "predicate"
BATCH_CHARACTERS = 1 << 20
FINDINGS_KEPT = 20
EXCERPT = 4 * EXCERPT_CHARACTERS
SEPARATED = "documents of text files with separators"

Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class Annotation:
    """The task of one piece of work: a unit, or many small ones, with a folder of their own and the fingerprint of all
    that its contents depend on; `stamp_of` each file, taken before; the trained classifier's folder, or ""."""

    units: tuple[Unit, ...]
    settings: CorpusSettings
    folder: str
    fingerprint: str
    stamps: tuple[Stamp | None, ...]
    classifier: str = ""


def annotate(work: Annotation) -> dict[str, Any]:
    """Read and measure one unit, or find that this has been done.

    Returns:
        What `unit.json` says: fingerprint, file (the first one's name), files (how many), documents, records (how many
        the reader counted), bytes_in, set_aside ([reason, file, documents]), changed (how often, by what), findings
        (samples of what was taken for private), contents (the folder's other files, each with its digest).

    Raises:
        DataError: a file changed meanwhile: what was read is not what the fingerprint stands for.
    """
    done = annotated(work.folder, work.fingerprint)
    if done is not None:
        return done
    with atomic_folder(Path(work.folder)) as folder:
        record = _Annotator(work, folder).run()
        for unit, stamp in zip(work.units, work.stamps, strict=True):
            if stamp_of(unit.source) != stamp:
                raise DataError(
                    f"{unit.source.label}: it was changed or removed while it was being read.",
                    "Give the same command again when nothing writes to it any more.",
                )
        record["contents"] = {path.name: file_digest(path) for path in sorted(folder.glob("[!.]*"))}
        write_json(folder / UNIT, {**record, "digest": value_digest(record)})
    return record


def stamp_of(source: InputFile) -> Stamp | None:
    """A local file's size, time of change and number: another one later means that its contents may be others."""
    if not isinstance(source.entry, Path):
        return None
    try:
        status = source.entry.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


def annotation_fingerprint(settings: CorpusSettings, classifier: str = "") -> str:
    """Digest of what every unit's annotation depends on beside the unit: settings, files they name, code."""
    near = settings.minhash if settings.dedup == "near" else None
    return value_digest(
        {
            "version": ANNOTATION_VERSION,
            "reading": [
                settings.text_field, settings.source_field, settings.unicode, settings.max_document_mib,
                settings.extractor, settings.extract_seconds, settings.separator,
            ],
            "languages": [sorted(settings.languages), file_fingerprint(settings.language_model)],
            "signals": signal_names(settings),
            "changes": [sorted(line_rules_of(settings.quality)), sorted(settings.privacy)],
            "toxic": file_fingerprint(settings.toxic_words),
            "predicate": predicate_fingerprint(settings.predicate) if settings.predicate else "",
            "classifier": classifier,
            "minhash": [HASH_VERSION, near.ngram, near.bands * near.rows] if near else None,
        }
    )  # fmt: skip


def signal_names(settings: CorpusSettings) -> list[str]:
    """The signals of the recipe's rules; of rules that are switched off too, so that they can be switched on later."""
    rules = [*rules_for(settings.quality, {}), *rules_for(settings.quality, settings.thresholds)]
    return sorted({rule.signal for rule in rules})


def annotated(folder: str | Path, fingerprint: str) -> dict[str, Any] | None:
    """What `annotate` returned for the folder, if it is finished, whole and still what its fingerprint says.

    A file that could not be read may be readable by now, so such a folder counts as not finished.
    """
    folder = Path(folder)
    try:
        record = read_json(folder / UNIT)
        if not isinstance(record, dict) or record.pop("digest", None) != value_digest(record):
            return None
        is_whole = all(file_digest(folder / name) == digest for name, digest in record["contents"].items())
    except (ArtifactError, OSError):
        return None
    is_read = all(reason != Reason.UNREADABLE for reason, _, _ in record["set_aside"])
    return record if is_whole and is_read and record["fingerprint"] == fingerprint else None


def file_fingerprint(path: str) -> str:
    """Digest of a file that the recipe names; "" for no file. DataError: it cannot be read."""
    if not path:
        return ""
    with reading(path, DataError, "Check the path in [corpus]."):
        return file_digest(ordinary_file(Path(path).expanduser(), DataError))


class _Annotator:
    """One unit's pass: records are measured in batches and appended to the unit's tables."""

    def __init__(self, work: Annotation, folder: Path) -> None:
        self._work, self._settings, self._folder = work, work.settings, folder
        self._signals = signal_names(work.settings)
        self._line_rules = line_rules_of(work.settings.quality)
        self._predicate = load_predicate(work.settings.predicate) if work.settings.predicate else None
        self._toxic = toxic_words(work.settings.toxic_words) if work.settings.toxic_words else None
        self._classifier = None
        if work.classifier:
            from groundup.corpus.quality.classifier import Classifier

            self._classifier = Classifier.load(work.classifier).score
        self._set_aside_counts: Counter[tuple[str, str]] = Counter()
        self._changed: Counter[str] = Counter()
        self._findings: dict[str, list[str]] = {}
        self._bytes_in = self._n_documents = self._n_records = 0

    def run(self) -> dict[str, Any]:
        import pyarrow.parquet as pq

        tables: dict[str, pq.ParquetWriter] = {}
        with contextlib.ExitStack() as files:
            self._aside = files.enter_context((self._folder / SET_ASIDE).open("wb"))
            self._emptied = files.enter_context((self._folder / EMPTIED).open("wb"))
            settings = self._settings
            names = ("ids", "digests", "lengths", *(["signatures"] if settings.dedup == "near" else []))
            self._arrays = {name: files.enter_context(_ArrayWriter(self._folder / f"{name}.npy")) for name in names}
            extractor = files.enter_context(Extractor(settings.extractor, settings.extract_seconds))
            try:
                for batch in batches(self._records(extractor), BATCH_CHARACTERS, _size):
                    for name, table in self._measure(batch):
                        if name not in tables:
                            # Statistics and dictionaries of texts cost more than they could ever save.
                            few = {"source", "file", "place", "language"} & set(table.schema.names)
                            tables[name] = pq.ParquetWriter(
                                self._folder / name, table.schema, compression="lz4",
                                use_dictionary=sorted(few), write_statistics=False,
                            )  # fmt: skip
                        tables[name].write_table(table)
            finally:
                for table in tables.values():
                    table.close()
        return {
            "fingerprint": self._work.fingerprint,
            "file": self._work.units[0].source.label, "files": len(self._work.units),
            "documents": self._n_documents, "records": self._n_records, "bytes_in": self._bytes_in,
            "set_aside": [[*key, count] for key, count in sorted(self._set_aside_counts.items())],
            "changed": {what: count for what, count in sorted(self._changed.items()) if count},
            "findings": self._findings,
        }  # fmt: skip

    def _records(self, extractor: Extractor) -> Iterator[tuple[str, Record]]:
        """Every record with the name of its file."""
        for unit in self._work.units:
            reader = UnitReader(unit, self._settings, self._set_aside, extractor)
            for record in reader:
                self._changed[SEPARATED] += record.place == DOCUMENT
                yield unit.source.label, record
            self._n_records += reader.n_records

    def _set_aside(self, record: SetAside) -> None:
        self._bytes_in += record.size_bytes
        self._list(record, self._aside)

    def _list(self, record: SetAside, handle: IO[bytes]) -> None:
        self._set_aside_counts[str(record.reason), record.source] += 1
        handle.write(orjson.dumps(asdict(record)) + b"\n")

    def _measure(self, batch: Sequence[tuple[str, Record]]) -> Iterator[tuple[str, pa.Table]]:
        """The batch's rows of both tables, and its rows of the arrays."""
        import pyarrow as pa

        rows = []
        for file, record in batch:
            as_read = record.text.encode()
            self._bytes_in += len(as_read)
            text = self._change(file, record)
            if text is not None:
                rows.append(_Row(file, record, text, as_read, as_read if text is record.text else text.encode()))
        if not rows:
            return
        self._n_documents += len(rows)
        languages = detect_languages([row.text for row in rows], self._settings.language_model)
        # Documents in other languages are dropped whatever their signals are, so these are not computed.
        asked = self._settings.languages
        is_wanted = np.array([not asked or code in asked for code, _ in languages])
        wanted = np.flatnonzero(is_wanted)
        identities = [xxhash.xxh3_128_digest(row.as_read) for row in rows]
        digests = [
            identity if row.encoded is row.as_read else xxhash.xxh3_128_digest(row.encoded)
            for identity, row in zip(identities, rows, strict=True)
        ]
        stored = [
            row.encoded if keep else row.text[:EXCERPT].encode() for row, keep in zip(rows, is_wanted, strict=True)
        ]
        identity = pa.array(identities, pa.binary(16))
        documents = {
            "id": identity,
            "text": pa.array(stored, pa.binary()).view(pa.string()),
            "source": [row.source for row in rows],
            "file": [row.file for row in rows],
            "url": [row.record.url for row in rows],
            "key": [row.record.key for row in rows],
            # With their type: to find one out, pyarrow loads dateutil.
            "position": pa.array([row.record.position for row in rows], pa.int64()),
            "place": [row.record.place for row in rows],
            "number": pa.array([row.record.number for row in rows], pa.int64()),
        }
        yield DOCUMENTS_TABLE, pa.table(documents)
        lengths = np.array([len(row.text) for row in rows], dtype=np.int64)
        measured: dict[str, Any] = {
            "id": identity,
            "source": [row.source for row in rows],
            "language": [code for code, _ in languages],
            "language_score": pa.array([score for _, score in languages], pa.float32()),
            "characters": lengths,
            "bytes": pa.array([len(row.encoded) for row in rows], pa.int64()),
            "key_hash": pa.array([_key_hash(row.file, row.record.key) for row in rows], pa.uint64()),
        }
        chosen = [rows[place] for place in wanted]
        names = [languages[place][0] for place in wanted]
        measured |= {name: _spread(values, wanted, len(rows)) for name, values in self._judge(chosen, names).items()}
        yield SIGNALS_TABLE, pa.table(measured)
        self._arrays["ids"].append(_as_words(identities))
        self._arrays["digests"].append(_as_words(digests))
        self._arrays["lengths"].append(lengths)
        if self._settings.dedup == "near":
            minhash = self._settings.minhash
            found = np.full((len(rows), minhash.bands * minhash.rows), NO_SHINGLES, dtype=np.uint32)
            if chosen:
                words = words_of([row.text for row in chosen])
                found[wanted] = signatures(words, ngram=minhash.ngram, n_hashes=found.shape[1])
            self._arrays["signatures"].append(found)

    def _judge(self, rows: Sequence[_Row], languages: Sequence[str]) -> dict[str, np.ndarray]:
        """Everything about these documents that a selection may look at: (n,) by name."""
        texts = [row.text for row in rows]
        found: dict[str, np.ndarray] = dict(signals(texts, self._signals)) if self._signals else {}
        if self._toxic is not None:
            found[TOXIC] = toxic_share(texts, self._toxic)
        if self._classifier is not None:
            found[SCORE] = self._classifier(texts)
        if self._predicate is not None:
            documents = (
                Document(xxhash.xxh3_128_hexdigest(row.as_read), row.text, row.source, language, url=row.record.url)
                for row, language in zip(rows, languages, strict=True)
            )
            found[PREDICATE] = np.array([bool(self._predicate(document)) for document in documents], dtype=bool)
        return found

    def _change(self, file: str, record: Record) -> str | None:
        """The text as the recipe wants it changed; None if nothing was left (it is then set aside)."""
        text = record.text
        if self._line_rules:
            text, counts = clean_lines(text, self._line_rules)
            self._changed.update({f"lines: {name}": count for name, count in counts.items() if count})
        if self._settings.privacy:
            text, findings = replace_private(text, self._settings.privacy)
            for finding in findings:
                self._changed[f"private: {finding.kind}"] += 1
                samples = self._findings.setdefault(finding.kind, [])
                if len(samples) < FINDINGS_KEPT:
                    samples.append(finding.excerpt)
        if text.strip():
            return text
        why, excerpt = "no line is left after the line rules", excerpt_of(record.text)
        emptied = SetAside(file, record.place, record.number, Reason.EMPTY, why, excerpt, 0, record.position)
        self._list(emptied, self._emptied)
        return None


class _ArrayWriter:
    """Appends rows to a `.npy` file; leaving the `with` statement puts its header right.

    numpy leaves room in every header for a first dimension of 21 digits, so its length never changes.
    """

    def __init__(self, path: Path) -> None:
        self._handle = path.open("wb")
        self._header: dict[str, Any] = {}
        self._n_rows = 0

    def append(self, rows: np.ndarray) -> None:
        """Add rows, all of one dtype and width."""
        self._n_rows += len(rows)
        if not self._header:
            self._header = np.lib.format.header_data_from_array_1_0(rows)
            np.lib.format.write_array_header_1_0(self._handle, self._header)
        self._handle.write(np.ascontiguousarray(rows).data)

    def __enter__(self) -> _ArrayWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._header:
            self._handle.seek(0)
            shape = (self._n_rows, *self._header["shape"][1:])
            np.lib.format.write_array_header_1_0(self._handle, {**self._header, "shape": shape})
        self._handle.close()


class _Row(NamedTuple):
    """One document of a batch: its text as it was read and as it is kept, both as UTF-8 too."""

    file: str
    record: Record
    text: str
    as_read: bytes
    encoded: bytes

    @property
    def source(self) -> str:
        return self.record.source or self.file


def toxic_words(path: str) -> frozenset[str]:
    """The words of a list, one a line, but for lines that begin with #. DataError: it cannot be read, or has none."""
    where = f"[corpus] toxic_words = {path!r}"
    with reading(where, DataError, "Name a UTF-8 text file."):
        lines = read_bytes(Path(path).expanduser()).decode().splitlines()
    words = frozenset(line.strip().casefold() for line in lines if line.strip() and not line.startswith("#"))
    if not words:
        raise DataError(f"{where}: there is no word in it.", "Write one word a line.")
    return words


def _size(item: tuple[str, Record]) -> int:
    """For batches of about a million characters, and of 1,024 records at most."""
    return max(len(item[1].text), BATCH_CHARACTERS >> 10)


def _key_hash(file: str, key: str) -> int:
    """0: the record names no id of its own."""
    return xxhash.xxh3_64_intdigest(f"{file}\0{key}".encode("utf-8", "surrogatepass")) or 1 if key else 0


def _spread(values: np.ndarray, places: np.ndarray, n: int) -> np.ndarray:
    """The values at their places among n; elsewhere NaN (or false)."""
    spread = np.full(n, np.nan if values.dtype.kind == "f" else 0, dtype=values.dtype)
    spread[places] = values
    return spread


def _as_words(digests: Sequence[bytes]) -> np.ndarray:
    """128-bit digests as numbers: (n, 2) uint64, high half first."""
    return np.frombuffer(b"".join(digests), dtype=">u8").reshape(-1, 2).astype(np.uint64)
