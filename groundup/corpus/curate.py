"""The corpus stage: raw files in, `documents.jsonl` out, and the whole story of what was left out.

Files to documents, then in this order: too short, wrong language, exact duplicate; last the part held out for
validation. Writes `documents.jsonl`, `set_aside.jsonl` (every record left out, and why) and `funnel.json`
(counts and examples). The same input gives the same bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import orjson

from groundup.console import Console
from groundup.corpus.dedup import ExactDuplicates
from groundup.corpus.document import Document, Reason, SetAside, excerpt_of
from groundup.corpus.funnel import Funnel, set_aside_record
from groundup.corpus.holdout import Holdout
from groundup.corpus.language import check_languages, detect_language
from groundup.corpus.read import read_sources
from groundup.corpus.sources import Sources, find_sources
from groundup.errors import ArtifactError, DataError
from groundup.files import PARTIAL_MARK, atomic_writer, write_json
from groundup.recipe import CorpusSettings

DOCUMENTS = "documents.jsonl"
SET_ASIDE = "set_aside.jsonl"
FUNNEL = "funnel.json"
DOCUMENTS_BETWEEN_UPDATES = 100


def curate(settings: CorpusSettings, out: Path, console: Console | None = None) -> dict[str, Any]:
    """Make the corpus in the folder `out`.

    Args:
        settings: inputs and filters.
        out: the folder for `documents.jsonl`, `set_aside.jsonl`, `funnel.json`.
        console: where the work is shown.

    Returns:
        The stage's figures: documents_in, documents_kept, documents_train, documents_validation, bytes_in,
        bytes_kept, characters_kept, removed (count for each reason), validation_by ("document" or "tail").
        Always `documents_in == documents_kept + sum(removed.values())`: a file or line set aside counts as
        one document that came in; a document cut by "tail" counts once as kept, and once in each part.

    Raises:
        DataError: an input is missing, nothing is left, or nothing can be held out.
    """
    console = console or Console(quiet=True)
    out = Path(out)
    check_languages(settings.languages)
    sources = find_sources(settings.inputs)
    funnel, holdout = Funnel(), Holdout(settings)
    # Who is held out is known only when every document has been seen, so they wait on disk, not in memory.
    waiting = out / f"kept{PARTIAL_MARK}{DOCUMENTS}"
    try:
        with console.bar("corpus") as bar:
            with atomic_writer(waiting, binary=True) as kept, atomic_writer(out / SET_ASIDE, binary=True) as aside:
                for document in _filtered(sources, settings, funnel, aside):
                    funnel.keep(document)
                    holdout.see(document.text)
                    _write_line(kept, dataclasses.asdict(document))
                    if funnel.documents_kept % DOCUMENTS_BETWEEN_UPDATES == 0:
                        bar.update(funnel.documents_kept, note=f"{funnel.documents_in:,} docs")
            if not funnel.documents_kept:
                raise funnel.nothing_left()
            _write_parts(waiting, out / DOCUMENTS, holdout, funnel)
            bar.finish(funnel.in_words)
    finally:
        waiting.unlink(missing_ok=True)
    write_json(out / FUNNEL, funnel.as_json(len(sources.files), sources.passed_over))
    n_faults, first = funnel.faults
    if first is not None:
        console.warn(f"{n_faults:,} records are broken and were set aside ({out / SET_ASIDE}). The first: {first}")
    if holdout.moved:
        console.warn(f"validation: {holdout.moved}.")
    return funnel.summary(holdout.by)


def stream_documents(folder: Path, split: str | None = None) -> Iterator[Document]:
    """Read back what `curate` wrote.

    Args:
        folder: the corpus folder.
        split: "train" or "validation"; without it, both.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    for document in _read_lines(Path(folder) / DOCUMENTS):
        if split is None or document.split == split:
            yield document


def _filtered(sources: Sources, settings: CorpusSettings, funnel: Funnel, aside: IO[bytes]) -> Iterator[Document]:
    """The documents that pass every filter, with their language; all others go to `aside`."""
    duplicates = ExactDuplicates() if settings.dedup == "exact" else None

    def set_aside(record: SetAside) -> None:
        funnel.set_aside(record)
        _write_line(aside, set_aside_record(record))

    def unread(record: SetAside) -> None:
        funnel.came_in(record.size_bytes)
        set_aside(record)

    for document, record in read_sources(sources, settings, unread):
        size = len(document.text.encode())
        funnel.came_in(size)
        document, refusal = _filter(document, settings, duplicates, funnel)
        if refusal is None:
            yield document
        else:
            reason, detail = refusal
            set_aside(SetAside(document.source, record, reason, detail, excerpt_of(document.text), size))


def _filter(
    document: Document, settings: CorpusSettings, duplicates: ExactDuplicates | None, funnel: Funnel
) -> tuple[Document, tuple[Reason, str] | None]:
    """The document with its language, and why it is refused, if it is."""
    n_characters = len(document.text)
    if n_characters < settings.min_characters:
        return document, (Reason.SHORT, f"{n_characters} characters; the least is {settings.min_characters}")
    language, probability = detect_language(document.text)
    funnel.languages[language] += 1
    document = dataclasses.replace(document, language=language)
    if settings.languages and language not in settings.languages:
        return document, (Reason.LANGUAGE, f"{language} ({probability:.2f})")
    if settings.languages and probability < settings.language_floor:
        floor = settings.language_floor
        return document, (Reason.LANGUAGE, f"{language} ({probability:.2f}), below the floor of {floor:g}")
    earlier = duplicates.first(document.text, document.id) if duplicates is not None else None
    if earlier is not None:
        return document, (Reason.DUPLICATE, f"the same text as document {earlier}")
    return document, None


def _write_parts(waiting: Path, target: Path, holdout: Holdout, funnel: Funnel) -> None:
    """Give every kept document its split and write it."""
    with atomic_writer(target, binary=True) as handle:
        for document in _read_lines(waiting):
            for part in holdout.divide(document):
                funnel.parts[part.split] += 1
                _write_line(handle, dataclasses.asdict(part))
        if not funnel.parts["validation"]:
            raise DataError(
                f"corpus: {funnel.characters_kept:,} characters of text are too few to hold a part out for validation.",
                "Add text, or raise [corpus] validation_share.",
            )


def _write_line(handle: IO[bytes], record: dict[str, Any]) -> None:
    handle.write(orjson.dumps(record) + b"\n")


def _read_lines(path: Path) -> Iterator[Document]:
    try:
        with path.open("rb") as handle:
            for number, line in enumerate(handle, start=1):
                try:
                    yield Document(**orjson.loads(line))
                except (orjson.JSONDecodeError, TypeError) as error:
                    raise ArtifactError(
                        f"{path}, line {number}: damaged ({error}).", "Make it again with --from corpus."
                    ) from error
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: not found.", "Run the corpus stage first.") from error
