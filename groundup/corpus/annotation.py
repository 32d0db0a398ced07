"""A piece of the first pass: its task, what its result depends on, and whether an earlier result still holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groundup.corpus.dedup.minhash import HASH_VERSION
from groundup.corpus.document import Reason
from groundup.corpus.quality.lines import line_rules_of
from groundup.corpus.quality.predicate import predicate_fingerprint
from groundup.corpus.quality.rules import rules_for
from groundup.corpus.reading.read import Unit
from groundup.corpus.reading.sources import InputFile
from groundup.errors import ArtifactError, DataError
from groundup.files import file_digest, read_json, value_digest
from groundup.recipe import CorpusSettings
from groundup.untrusted import ordinary_file, reading

ANNOTATION_VERSION = 3
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


Stamp = tuple[int, int, int]


def stamp_of(source: InputFile) -> Stamp | None:
    """A local file's size, time of change and number: another one later means that its contents may be others."""
    if not isinstance(source.entry, Path):
        return None
    try:
        status = source.entry.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


@dataclass(frozen=True)
class Annotation:
    """The task of one piece of work.

    Attributes:
        units: what to read: one, or many small ones.
        settings: the recipe's `[corpus]`.
        folder: the unit's own folder.
        fingerprint: of all that its contents depend on.
        stamps: `stamp_of` every unit's file, taken before the fingerprint was.
        classifier: the trained classifier's folder, or "".
    """

    units: tuple[Unit, ...]
    settings: CorpusSettings
    folder: str
    fingerprint: str
    stamps: tuple[Stamp | None, ...]
    classifier: str = ""


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
    """Digest of a file that the recipe names; "" for no file.

    Raises:
        DataError: it cannot be read.
    """
    if not path:
        return ""
    with reading(path, DataError, "Check the path in [corpus]."):
        return file_digest(ordinary_file(Path(path).expanduser(), DataError))
