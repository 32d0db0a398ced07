"""The corpus stage: raw files in, `documents.jsonl` out, with every record that was removed and why.

    read and measure (annotate) → decide (select) → write

Writes `documents.jsonl` (in the order of ids), `set_aside.jsonl` (every record left out, and why),
`filter_statistics.json` (counts, histograms and examples), and keeps the measurements in `annotated/`, so that another
threshold does not read the texts again. The same texts give the same bytes, for any number of workers, size of pieces,
engine, or order of the files; killed anywhere, the same call goes on and ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson

from groundup.console import Console
from groundup.corpus.annotate import SEPARATED, file_fingerprint, toxic_words
from groundup.corpus.decontaminate import find_tasks
from groundup.corpus.document import Document
from groundup.corpus.engine import engine_for
from groundup.corpus.filter_statistics import PASSED_OVER_SHOWN
from groundup.corpus.passes import ANNOTATED, DOCUMENTS, SET_ASIDE_FILE, STATISTICS_FILE, Passes
from groundup.corpus.quality.language import check_languages
from groundup.corpus.quality.predicate import load_predicate, predicate_fingerprint
from groundup.corpus.quality.rules import left_out, rules_for
from groundup.corpus.reading.sources import InputFiles, find_sources
from groundup.corpus.reading.text import separated_in_words
from groundup.corpus.write import parse_line
from groundup.errors import ArtifactError, DataError, RunError
from groundup.files import own_folder, remove_partials, temporary, value_digest, write_error, write_json
from groundup.recipe import CorpusSettings
from groundup.report.format import format_lines, is_number
from groundup.stage import Check, Context, Method, Shown, Stage


def curate(settings: CorpusSettings, out: Path, console: Console | None = None) -> dict[str, Any]:
    """Make the corpus in the folder `out`.

    Returns:
        The stage's figures: documents_in, documents_kept, documents_train, documents_validation, bytes_in,
        bytes_kept, characters_kept, removed (count for each reason), validation_by ("document" or "tail").
        Always `documents_in == documents_kept + sum(removed.values())`: a file or line set aside counts as
        one document that came in; a document cut by "tail", or repeated by `mix`, counts once as kept.

    Raises:
        DataError: an input is missing or changes meanwhile, nothing is left, or nothing can be held out.
        RunError: another process works in `out`, or it holds files that are not ours.
        GroundupError: a worker died, the disk is full, or the counts of documents do not add up.
    """
    console = console or Console(quiet=True)
    out = Path(out).absolute()  # workers may stand elsewhere
    check_languages(settings.languages, settings.language_model)
    check_named_files(settings)
    sources = _without_own_files(find_sources(settings.inputs, follow_links=settings.follow_links), out)
    if words := sources.in_words():
        console.note(f"corpus: {words}.")
    own_folder(out)
    try:
        with _alone_in(out):
            try:
                remove_partials(out)  # those of a process that was killed
                passes = _make(settings, sources, out, console)
            finally:
                remove_partials(out)  # those of workers that were stopped too
    except OSError as error:
        raise write_error(Path(error.filename or out), error) from error
    without_meaning = left_out(settings.quality, settings.thresholds, settings.languages)
    for why, rules in itertools.groupby(without_meaning, key=lambda rule: rule.why):
        names = ", ".join(rule.name for rule in rules)
        console.note(f"left out: {names} ({why}; languages = {list(settings.languages)})")
    statistics = passes.statistics
    files = {
        "read": len(sources.files),
        "passed_over": len(sources.passed_over),
        "names": sources.passed_over[:PASSED_OVER_SHOWN],
    }
    write_json(out / STATISTICS_FILE, statistics.as_json(files, passes.more))
    n_faults, first = statistics.faults
    if n_separated := statistics.changed.get(SEPARATED):
        console.note(f"corpus: {separated_in_words(n_separated, settings.separator)}.")
    if first is not None:
        console.warn(
            f"{n_faults:,} records or files cannot be used and were set aside ({out / SET_ASIDE_FILE}). "
            f"The first: {first}"
        )
    if passes.holdout.moved:
        console.warn(f"validation: {passes.holdout.moved}.")
    return statistics.summary(passes.holdout.by)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder, where the system can lock one; the lock falls with its process, and leaves no file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise RunError(
            f"{folder}: another process is making a corpus there.", "Wait for it, or choose another folder with --out."
        ) from error
    except OSError:
        pass  # a file system on the net, without such locks
    try:
        yield
    finally:
        os.close(descriptor)


def _make(settings: CorpusSettings, sources: InputFiles, out: Path, console: Console) -> Passes:
    work = temporary(out / "work")  # all in it can be made again
    own_folder(work)
    workers = engine_for(settings.engine, settings.workers, sources.size_bytes())
    with console.bar("corpus") as bar, workers as engine:
        passes = Passes(settings, out, work, engine, bar.update)
        passes.annotate(sources)
        passes.select()
        passes.write()
        bar.finish(passes.statistics.in_words)
    return passes


def _without_own_files(sources: InputFiles, out: Path) -> InputFiles:
    """What an earlier call has left in `out` is no input of this one. DataError: there is nothing else."""
    folder = os.path.join(os.path.realpath(out), "")
    is_ours = [isinstance(one.entry, Path) and os.path.realpath(one.entry).startswith(folder) for one in sources.files]
    files = [source for source, ours in zip(sources.files, is_ours, strict=True) if not ours]
    if not files:
        raise DataError(f"{out}: the corpus is to be written where its input is.", "Choose another folder with --out.")
    passed_over = {*sources.passed_over, *([str(out)] if any(is_ours) else [])}
    return replace(sources, files=files, passed_over=sorted(passed_over))


def stream_documents(folder: Path, split: str | None = None) -> Iterator[Document]:
    """Read back what `curate` wrote: one split, or both. ArtifactError: the file is missing or damaged."""
    path = Path(folder) / DOCUMENTS
    try:
        with path.open("rb") as handle:
            for number, line in enumerate(handle, start=1):
                try:
                    document = parse_line(line)
                except (orjson.JSONDecodeError, TypeError) as error:
                    raise ArtifactError(
                        f"{path}, line {number}: damaged ({error}).", "Make it again with --from corpus."
                    ) from error
                if split is None or document.split == split:
                    yield document
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: not found.", "Run the corpus stage first.") from error


def input_fingerprint(settings: CorpusSettings) -> str:
    """Digest of all files' names and contents, not of their order or times. DataError: a file is missing."""
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
    """See that everything the recipe names beside the texts is there and can be used, or raise DataError."""
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


class Corpus(Method):
    """The stage: raw files to documents."""

    settings = CorpusSettings
    version = 4
    keeps = (ANNOTATED,)  # every piece in it is checked by its own fingerprint
    outputs = (DOCUMENTS,)

    def outside(self, stage: Stage) -> dict[str, str]:
        """Digests of the input files."""
        return {"inputs": input_fingerprint(stage.settings)}

    def checks(self, stage: Stage) -> Iterable[Check]:
        """Inputs that are missing, languages and rules that are unknown."""
        settings = stage.settings
        yield "[corpus] inputs", lambda: find_sources(settings.inputs, follow_links=settings.follow_links)
        yield "[corpus] languages", lambda: check_languages(settings.languages, settings.language_model)
        yield "[corpus] quality", lambda: rules_for(settings.quality, settings.thresholds, settings.languages)
        yield "[corpus]", lambda: check_named_files(settings)

    def derived(self, stage: Stage) -> Iterable[tuple[str, str, str]]:
        """Rules that mean nothing in the recipe's languages."""
        settings = stage.settings
        for rule in left_out(settings.quality, settings.thresholds, settings.languages):
            why = f"{rule.why}; languages = {list(settings.languages)}"
            yield f'corpus.thresholds."{rule.name}"', "false", why

    def work(self, context: Context) -> dict[str, Any]:
        """See `curate`."""
        return curate(context.recipe.corpus, context.folder, context.console)

    def shown(self, stage: Stage, summary: Mapping[str, Any]) -> Shown:
        """How many documents stayed."""
        came, kept = summary.get("documents_in"), summary.get("documents_kept")
        aside = came - kept if is_number(came) and is_number(kept) else None
        return Shown("Corpus", lines=format_lines((kept, "{} kept"), (aside, "{} set aside")))


CORPUS = Corpus()
