"""What the corpus depends on outside the run: the texts, and every file that the recipe names beside them."""

from __future__ import annotations

from groundup.corpus.annotate import toxic_words
from groundup.corpus.annotation import file_fingerprint
from groundup.corpus.decontamination.files import find_tasks
from groundup.corpus.quality.predicate import load_predicate, predicate_fingerprint
from groundup.corpus.reading.sources import find_sources
from groundup.files import value_digest
from groundup.recipe import CorpusSettings


def input_fingerprint(settings: CorpusSettings) -> str:
    """Digest of all files' names and contents; neither their order nor times of change count.

    Raises:
        DataError: a file is missing; see `find_sources`.
    """
    beside = [file_fingerprint(settings.language_model), file_fingerprint(settings.toxic_words)]
    if settings.predicate:
        beside.append(predicate_fingerprint(settings.predicate))
    if settings.classifier is not None:
        examples = (settings.classifier.positive, settings.classifier.negative)
        beside += [_contents(files, settings) for files in examples]
    if settings.decontaminate is not None:
        tasks = find_tasks(settings.decontaminate.files)
        beside.append(value_digest([[task.name, task.source.digest()] for task in tasks]))
    return value_digest([_contents(settings.inputs, settings), *beside])


def check_named_files(settings: CorpusSettings) -> None:
    """See that everything the recipe names beside the texts is there and can be used.

    Raises:
        DataError: it is not.
    """
    file_fingerprint(settings.language_model)
    if settings.toxic_words:
        toxic_words(settings.toxic_words)
    if settings.predicate:
        load_predicate(settings.predicate)
    beside = [settings.classifier.positive, settings.classifier.negative] if settings.classifier is not None else []
    for files in beside:
        find_sources(files, follow_links=settings.follow_links)
    if settings.decontaminate is not None:
        find_tasks(settings.decontaminate.files)


def _contents(inputs: tuple[str, ...], settings: CorpusSettings) -> str:
    found = find_sources(inputs, follow_links=settings.follow_links)
    return value_digest(sorted([source.label, source.digest()] for source in found.files))
