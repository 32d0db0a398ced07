"""Documents and a tokenizer to token shards: by one process, or by many with the same bytes for any number of them.

Many encode: each byte range of `documents.jsonl` becomes a folder of shards of its own. One joins: the stream that the
ranges make in their order is cut into the shards. A range's manifest carries the fingerprint of all that decided its
bytes, so a run that was killed goes on with those that fit; they are removed at the end.
No Python object is made per token: ids stay in numpy from the tokenizer to the file.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import xxhash

from groundup.batches import batches
from groundup.console import Console, format_bytes, format_count
from groundup.corpus.document import Document
from groundup.corpus.engine import Engine, engine_for
from groundup.corpus.passes import DOCUMENTS
from groundup.errors import ArtifactError, DataError
from groundup.files import atomic_folder, file_digest, own_folder, remove_folder, value_digest
from groundup.integrity import FileRecords, check_files, record_files
from groundup.recipe import ShardsSettings
from groundup.report.format import format_lines
from groundup.shards.format import INDEX_DTYPE, MANIFEST, SPLITS, Counts, ShardFile, ShardsManifest, Split, token_dtype
from groundup.shards.read import mapped
from groundup.shards.stream import StreamWriter, begin_shards
from groundup.stage import Context, Method, Shown, Stage

if TYPE_CHECKING:
    from groundup.tokenizer import Tokenizer

GROUP_CHARACTERS = 4 << 20
MOST_NAMES = 1000
"""So many sources or languages are listed in a manifest; the smaller ones are counted together."""
OTHERS = "(others)"
RANGE_BYTES = 32 << 20
SMALL_BYTES = 128 << 20
"""Less than this the threads of one process encode sooner than several processes, each with a tokenizer to load."""
RANGES = "ranges"


def write_shards(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    out: Path,
    settings: ShardsSettings | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Encode documents into the folder `out`, each in the split it carries, in the order given, by this process.

    Text never becomes a control token; `<|endoftext|>` follows every document. Shards of an earlier call in
    the same folder are replaced. `write_shards_from_file` gives the same bytes with several processes.

    Returns:
        The stage's figures: tokens_train, tokens_validation (`<|endoftext|>` included), bytes_train,
        bytes_validation (UTF-8 of the text), documents_train, documents_validation, dtype, files (number of
        .bin files), bytes_per_token (text bytes by text tokens, over both splits).

    Raises:
        DataError: no document in the training split.
    """
    settings, out = settings or ShardsSettings(), Path(out)
    begin_shards(out)
    with (console or Console(quiet=True)).bar("shards") as bar:
        tallies = _encode_into(
            out, documents, tokenizer, settings.shard_tokens, lambda n: bar.update(n, note=f"{n:,} docs")
        )
        summary = _finish(out, tokenizer, tallies, None, settings)
        bar.finish(", ".join(f"{format_count(summary[f'tokens_{name}'])} tokens {name}" for name in SPLITS))
    return summary


def write_shards_from_file(
    documents: Path,
    tokenizer_folder: Path,
    out: Path,
    settings: ShardsSettings | None = None,
    console: Console | None = None,
    engine: Engine | None = None,
    *,
    range_bytes: int = RANGE_BYTES,
) -> dict[str, Any]:
    """Encode `documents.jsonl` into the folder `out`: the files of `write_shards`, made by an engine's workers.

    Killed at any moment and started again, it gives the same bytes, and does not encode again what was encoded.

    Args:
        documents: the file that `curate` wrote.
        tokenizer_folder: where `tokenizer.json` is.
        out, settings, console: as for `write_shards`.
        engine: who does it (default: `settings.workers` processes; one a core for a large file).
        range_bytes: how much of the file is one piece of work; changes nothing in the result.

    Returns:
        The stage's figures, as `write_shards` gives them.

    Raises:
        ArtifactError: a file is missing or damaged.
        DataError: no document in the training split.
    """
    console, settings = console or Console(quiet=True), settings or ShardsSettings()
    # Absolute, for workers that stand elsewhere.
    documents, out, tokenizer_folder = (Path(path).absolute() for path in (documents, out, tokenizer_folder))
    tokenizer = _tokenizer(tokenizer_folder)
    try:
        size = documents.stat().st_size
    except FileNotFoundError as error:
        raise ArtifactError(f"{documents}: not found.", "Run the corpus stage first.") from error
    begin_shards(out)
    own_folder(out / RANGES)
    borders = [*range(0, size, range_bytes), size]
    ranges = [
        RangeWork(documents, begin, end, tokenizer_folder, out / RANGES / f"{begin:015d}-{end:015d}")
        for begin, end in itertools.pairwise(borders)
    ]
    for path in {*(out / RANGES).glob("*")} - {work.folder for work in ranges}:  # what a call with other ranges left
        remove_folder(path)
    with contextlib.ExitStack() as stack:
        workers = engine or stack.enter_context(engine_for("local", settings.workers, size, SMALL_BYTES))
        bar = stack.enter_context(console.bar("shards", size))
        manifests = []
        for work, manifest in zip(ranges, workers.map(encode_range, ranges), strict=True):
            manifests.append(manifest)
            bar.update(work.end, note=f"{format_bytes(work.end)} of {format_bytes(size)}")
        tallies = {name: Tally() for name in SPLITS}
        for name, tally in tallies.items():
            with StreamWriter(out, name, token_dtype(tokenizer.vocab_size), settings.shard_tokens) as writer:
                for work, manifest in zip(ranges, manifests, strict=True):
                    for file in manifest.splits[name].files:
                        ends = mapped(work.folder / file.index_name, INDEX_DTYPE, file.documents)
                        ids = mapped(work.folder / file.name, manifest.dtype, file.tokens)
                        writer.append(ids, ends.astype(np.int64))
                    for label, counts in manifest.splits[name].sources.items():
                        _count(tally.sources, label, counts)
                    for label, counts in manifest.splits[name].languages.items():
                        _count(tally.languages, label, counts)
                tally.files = writer.finish()
        summary = _finish(out, tokenizer, tallies, file_digest(documents), settings)
        bar.finish(", ".join(f"{format_count(summary[f'tokens_{name}'])} tokens {name}" for name in SPLITS))
    remove_folder(out / RANGES)
    return summary


@dataclass(frozen=True)
class RangeWork:
    """One byte range to encode, the documents whose line begins in it, into a folder of its own."""

    documents: Path
    begin: int
    end: int
    tokenizer: Path
    folder: Path


def encode_range(work: RangeWork) -> ShardsManifest:
    """Make one range's shards, unless those with its fingerprint are there."""
    tokenizer = _tokenizer(work.tokenizer)
    data, first_byte = _lines_beginning_in(work.documents, work.begin, work.end)
    made_from = {"range": value_digest([tokenizer.fingerprint, xxhash.xxh3_128_hexdigest(data)])}
    with contextlib.suppress(ArtifactError):  # none there, or damaged: made again
        done = ShardsManifest.read(work.folder)
        if done.provenance == made_from:
            for name in SPLITS:
                check_files(work.folder, done.records(name), "")
            return done
    with atomic_folder(work.folder) as folder:
        tallies = _encode_into(folder, _documents(data, work.documents, first_byte), tokenizer, 1 << 62)
        splits = {name: tally.split(most=None) for name, tally in tallies.items()}
        manifest = _manifest(tokenizer, splits, made_from)
        manifest.write(folder)
    return manifest


@dataclass
class Tally:
    """What is in a split.

    Attributes:
        files: in the order of the stream.
        sources: documents, bytes (UTF-8 of the text) and tokens (`<|endoftext|>` included) by source.
        languages: likewise ("unknown" where none is given).
    """

    files: tuple[ShardFile, ...] = ()
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    languages: dict[str, dict[str, int]] = field(default_factory=dict)

    def add(self, documents: Sequence[Document], ends: np.ndarray) -> None:
        """Count documents, whose last ids end at `ends`, (n_documents,)."""
        for document, n_tokens in zip(documents, np.diff(ends, prepend=0).tolist(), strict=True):
            text = document.text
            counts = {"documents": 1, "bytes": len(text) if text.isascii() else len(text.encode()), "tokens": n_tokens}
            _count(self.sources, document.source, counts)
            _count(self.languages, document.language or "unknown", counts)

    def split(self, most: int | None = MOST_NAMES) -> Split:
        """What the manifest says of it, of so many sources and languages by name (None: all)."""
        n_bytes = sum(counts["bytes"] for counts in self.sources.values())
        tokens, documents = (sum(getattr(file, what) for file in self.files) for what in ("tokens", "documents"))
        by_size = largest_first(self.sources, most), largest_first(self.languages, most)
        return Split(tokens, documents, n_bytes, self.files, *by_size)


def largest_first(counts: Counts, most: int | None = MOST_NAMES) -> dict[str, dict[str, int]]:
    """Counts in order of their tokens (equal ones by name), the smallest of too many joined under one name."""
    out: dict[str, dict[str, int]] = {}
    for place, name in enumerate(sorted(counts, key=lambda name: (-counts[name]["tokens"], name))):
        _count(out, name if most is None or place < most else OTHERS, counts[name])
    return out


def _count(counts: dict[str, dict[str, int]], name: str, more: Mapping[str, int]) -> None:
    entry = counts.setdefault(name, {"documents": 0, "bytes": 0, "tokens": 0})
    for what in entry:
        entry[what] += more[what]


def _encode_into(
    out: Path,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    shard_tokens: int,
    show: Callable[[int], None] = lambda n_documents: None,
) -> dict[str, Tally]:
    """Write each split's files, in groups of a few MiB of text: the tokenizer uses every core in bounded memory."""
    dtype = token_dtype(tokenizer.vocab_size)
    tallies = {name: Tally() for name in SPLITS}
    seen = 0
    with contextlib.ExitStack() as stack:
        writers = {name: stack.enter_context(StreamWriter(out, name, dtype, shard_tokens)) for name in SPLITS}
        for group in batches(documents, GROUP_CHARACTERS, lambda one: len(one.text)):
            for name in dict.fromkeys(one.split for one in group):
                part = [one for one in group if one.split == name]
                tokens, ends = encode_texts(tokenizer, [one.text for one in part], dtype)
                tallies[name].add(part, ends)
                writers[name].append(tokens, ends)
            seen += len(group)
            show(seen)
        for name, writer in writers.items():
            tallies[name].files = writer.finish()
    return tallies


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str], dtype: np.dtype[Any]) -> tuple[np.ndarray, np.ndarray]:
    """The ids of texts one after the other, each followed by `<|endoftext|>`.

    Returns:
        ids, (n_tokens,) of `dtype`, and where each text's last id ends, (n_texts,) int64.

    Raises:
        ArtifactError: the tokenizer gives an id that its vocabulary does not have.
    """
    ids, lengths = tokenizer.encode_to_arrays(texts)
    largest = int(ids.max(initial=0))
    if largest >= tokenizer.vocab_size:
        raise ArtifactError(
            f"the tokenizer gives id {largest}, but says that its vocabulary has {tokenizer.vocab_size} entries.",
            "Train it again with --from tokenizer.",
        )
    ends = np.cumsum(lengths + 1)
    out = np.empty(len(ids) + len(lengths), dtype=dtype)
    is_text = np.ones(len(out), dtype=bool)
    is_text[ends - 1] = False
    out[is_text] = ids
    out[ends - 1] = tokenizer.end_of_text_id
    return out, ends


def _finish(
    out: Path, tokenizer: Tokenizer, tallies: Mapping[str, Tally], corpus: str | None, settings: ShardsSettings
) -> dict[str, Any]:
    """Write the manifest, which makes the shards valid; the stage's figures."""
    splits = {name: tally.split() for name, tally in tallies.items()}
    train, validation = (splits[name] for name in SPLITS)
    if not train.documents:
        raise DataError(f"{out}: there is no training document to write.", "Run the corpus stage first.")
    manifest = _manifest(tokenizer, splits, {"corpus": corpus, "settings": {"shard_tokens": settings.shard_tokens}})
    manifest.write(out)
    text_tokens = sum(split.tokens - split.documents for split in splits.values())
    return {
        "tokens_train": train.tokens,
        "tokens_validation": validation.tokens,
        "bytes_train": train.text_bytes,
        "bytes_validation": validation.text_bytes,
        "documents_train": train.documents,
        "documents_validation": validation.documents,
        "dtype": manifest.dtype.name,
        "files": len(train.files) + len(validation.files),
        "bytes_per_token": (train.text_bytes + validation.text_bytes) / max(1, text_tokens),
    }


def _manifest(tokenizer: Tokenizer, splits: Mapping[str, Split], provenance: Mapping[str, Any]) -> ShardsManifest:
    return ShardsManifest(tokenizer.vocab_size, tokenizer.fingerprint, tokenizer.end_of_text_id, splits, provenance)


def _lines_beginning_in(path: Path, begin: int, end: int) -> tuple[bytes, int]:
    """The lines that begin at bytes `begin` … `end - 1`, whole, and where the first of them begins."""
    with path.open("rb") as handle:
        places = []
        for place in (begin, end):
            handle.seek(max(0, place - 1))
            if place:
                handle.readline()  # the rest of a line that began before, or just the end of the one before
            places.append(handle.tell())
        handle.seek(places[0])
        return handle.read(places[1] - places[0]), places[0]


def _documents(data: bytes, path: Path, first_byte: int) -> Iterator[Document]:
    for line in io.BytesIO(data):
        try:
            document = Document(**orjson.loads(line))
            if document.split not in SPLITS or not isinstance(document.text, str):
                raise TypeError(f"split {document.split!r}, text {type(document.text).__name__}")
        except (orjson.JSONDecodeError, TypeError) as error:
            where = f"{path}, the line at byte {first_byte:,}"
            raise ArtifactError(f"{where}: damaged ({error}).", "Make it again with --from corpus.") from error
        yield document
        first_byte += len(line)


def _tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder, loaded once a worker."""
    from groundup.tokenizer.files import TOKENIZER_FILE

    path = folder / TOKENIZER_FILE
    return _load_tokenizer(folder, file_digest(path) if path.is_file() else "")


@functools.lru_cache(maxsize=2)
def _load_tokenizer(folder: Path, digest: str) -> Tokenizer:
    from groundup.tokenizer import load_tokenizer

    return load_tokenizer(folder)


class Shards(Method):
    """The stage: documents and tokenizer to token shards."""

    settings = ShardsSettings
    version = 2

    def needs(self, stage: Stage) -> tuple[str, ...]:
        """Text and tokenizer."""
        return ("corpus", "tokenizer")

    def records(self, folder: Path) -> FileRecords:
        """As the manifest has them."""
        manifest = ShardsManifest.read(folder)
        splits = [manifest.records(split) for split in manifest.splits]
        return {**record_files(folder, [MANIFEST]), **{name: one for split in splits for name, one in split.items()}}

    def work(self, context: Context) -> dict[str, Any]:
        """See `write_shards_from_file`."""
        recipe, documents = context.recipe, context.run.folder("corpus") / DOCUMENTS
        workers = recipe.shards.workers or recipe.corpus.workers
        with engine_for(recipe.corpus.engine, workers, documents.stat().st_size, SMALL_BYTES) as engine:
            return write_shards_from_file(
                documents, context.run.folder("tokenizer"), context.folder, recipe.shards, context.console, engine
            )

    def shown(self, stage: Stage, summary: Mapping[str, Any]) -> Shown:
        """How many tokens there are."""
        counts = (summary.get("tokens_train"), "{} tokens"), (summary.get("tokens_validation"), "{} held out")
        return Shown("Token shards", lines=format_lines(*counts))


SHARDS = Shards()
