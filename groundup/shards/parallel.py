"""`documents.jsonl` to shards by many processes, with the same bytes for any number of workers.

Two passes over files, as MapReduce does it. First, each byte range of `documents.jsonl` is encoded into a folder of
its own: the ids and lengths of the documents that begin in it, by split. Then each shard is cut out of the stream
that the ranges make in their order: where a shard begins depends on token counts only.
Folders of ranges appear whole and carry the fingerprint of all that decided their bytes, so a run that was killed
goes on with those that fit; they are removed at the end.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import orjson
import xxhash

from groundup.console import Console, format_bytes
from groundup.corpus.document import Document
from groundup.corpus.engine import Engine, engine_for
from groundup.corpus.passes import DOCUMENTS
from groundup.errors import ArtifactError
from groundup.files import (
    atomic_folder,
    file_digest,
    own_folder,
    read_json,
    remove_folder,
    value_digest,
    write_json,
)
from groundup.integrity import FileRecords, check_files, record_files
from groundup.recipe import ShardsSettings
from groundup.report.format import format_lines
from groundup.shards.encode import Tally, encode_documents
from groundup.shards.format import MANIFEST, SPLITS, ShardFile, ShardsManifest, token_dtype
from groundup.shards.stream import StreamWriter, begin_shards
from groundup.shards.write import finish_shards, in_words
from groundup.stage import Context, Method, Shown, Stage

if TYPE_CHECKING:
    from groundup.tokenizer import Tokenizer

RANGE_BYTES = 32 << 20
SMALL_BYTES = 128 << 20
"""Less than this the threads of one process encode sooner than several processes, each with a tokenizer to load."""
RANGES = "ranges"
RANGE_FORMAT = 2
COPY_TOKENS = 1 << 22


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
        out: the folder for the shards.
        settings: of the stage.
        console: where the work is shown.
        engine: who does it (default: `settings.workers` processes; one a core for a large file).
        range_bytes: how much of the file is one piece of work; changes nothing in the result.

    Returns:
        The stage's figures, as `write_shards` gives them.

    Raises:
        ArtifactError: a file is missing or damaged.
        DataError: no document in the training split.
    """
    console = console or Console(quiet=True)
    settings = settings or ShardsSettings()
    # Absolute, for workers that stand elsewhere.
    documents, out, tokenizer_folder = (Path(path).absolute() for path in (documents, out, tokenizer_folder))
    tokenizer = _tokenizer(str(tokenizer_folder))
    try:
        size = documents.stat().st_size
    except FileNotFoundError as error:
        raise ArtifactError(f"{documents}: not found.", "Run the corpus stage first.") from error
    begin_shards(out)
    ranges = [
        RangeWork(str(documents), begin, min(begin + range_bytes, size), str(tokenizer_folder), str(out / RANGES))
        for begin in range(0, size, range_bytes)
    ]
    own_folder(out / RANGES)
    _remove_other_ranges(out / RANGES, ranges)
    with contextlib.ExitStack() as stack:
        workers = engine or stack.enter_context(engine_for("local", settings.workers, size, SMALL_BYTES))
        bar = stack.enter_context(console.bar("shards", size))
        records = []
        for work, record in zip(ranges, workers.map(encode_range, ranges), strict=True):
            records.append(record)
            bar.update(work.end, note=f"{format_bytes(work.end)} of {format_bytes(size)}")
        files: dict[str, list[ShardFile]] = {name: [] for name in SPLITS}
        shards = [shard for name in SPLITS for shard in plan_shards(records, name, out, settings.shard_tokens)]
        for shard, file in zip(shards, workers.map(join_shard, shards), strict=True):
            files[shard.split].append(file)
        splits = {}
        for name in SPLITS:
            tally = Tally()
            for record in records:
                tally.merge(Tally(**record["splits"][name]))
            splits[name] = tally.split(tuple(files[name]))
        summary = finish_shards(out, tokenizer, splits, file_digest(documents), settings)
        bar.finish(in_words(summary))
    remove_folder(out / RANGES)
    return summary


@dataclass(frozen=True)
class RangeWork:
    """One byte range to encode: the documents whose line begins in it.

    Attributes:
        documents: the file.
        begin: first byte.
        end: the byte after the last.
        tokenizer: its folder.
        out: the folder for the range's folder.
    """

    documents: str
    begin: int
    end: int
    tokenizer: str
    out: str

    @property
    def folder(self) -> Path:
        """Where the range's ids are put."""
        return Path(self.out) / f"{self.begin:015d}-{self.end:015d}"


def encode_range(work: RangeWork) -> dict[str, Any]:
    """Encode one range into its folder, unless a folder with its fingerprint is there.

    Returns:
        folder, fingerprint, and for each split: tokens, documents, text_bytes, sources, languages.

    Raises:
        ArtifactError: a line is damaged.
    """
    tokenizer = _tokenizer(work.tokenizer)
    data, first_byte = _lines_beginning_in(Path(work.documents), work.begin, work.end)
    fingerprint = value_digest([RANGE_FORMAT, tokenizer.fingerprint, xxhash.xxh3_128_hexdigest(data)])
    done = _record_of(work.folder)
    if done is not None and done.get("fingerprint") == fingerprint:
        return done
    dtype = token_dtype(tokenizer.vocab_size)
    tallies = {name: Tally() for name in SPLITS}
    with atomic_folder(work.folder) as folder:
        documents = _documents(data, Path(work.documents), first_byte)
        for name, tokens, ends in encode_documents(documents, tokenizer, dtype, tallies):
            before = tallies[name].tokens - len(tokens)
            for path, values in zip(_range_files(folder, name), (tokens, ends + before), strict=True):
                with path.open("ab") as handle:
                    handle.write(values.data)
        record = {
            "folder": str(work.folder),
            "fingerprint": fingerprint,
            "dtype": dtype.str,
            "splits": {name: asdict(tally) for name, tally in tallies.items()},
            "contents": record_files(folder, [path.name for path in sorted(folder.glob("[!.]*"))]),
        }
        write_json(folder / "record.json", record)
    return record


@dataclass(frozen=True)
class ShardWork:
    """One shard to cut out of the ranges.

    Attributes:
        split: "train" or "validation".
        number: of the shard in its split.
        out: the folder.
        dtype: of the ids.
        pieces: (the range's folder, its tokens, the first and the last + 1 of them that belong to the shard).
    """

    split: str
    number: int
    out: str
    dtype: str
    pieces: tuple[tuple[str, int, int, int], ...]


def plan_shards(records: Sequence[Mapping[str, Any]], split: str, out: Path, shard_tokens: int) -> Iterator[ShardWork]:
    """What each shard of a split is made of.

    Args:
        records: of the ranges, in their order.
        split: "train" or "validation".
        out: the folder for the shards.
        shard_tokens: ids in a shard (the last has the rest).
    """
    number, room = 0, shard_tokens
    pieces: list[tuple[str, int, int, int]] = []
    for record in records:
        n_tokens, begin = record["splits"][split]["tokens"], 0
        while begin < n_tokens:
            end = min(n_tokens, begin + room)
            pieces.append((record["folder"], n_tokens, begin, end))
            room -= end - begin
            begin = end
            if not room:
                yield ShardWork(split, number, str(out), record["dtype"], tuple(pieces))
                number, room, pieces = number + 1, shard_tokens, []
    if pieces:
        yield ShardWork(split, number, str(out), records[0]["dtype"], tuple(pieces))


def join_shard(work: ShardWork) -> ShardFile:
    """Write one shard and its index."""
    with StreamWriter(Path(work.out), work.split, np.dtype(work.dtype), first=work.number) as writer:
        for folder, _, begin, end in work.pieces:
            tokens_path, ends_path = _range_files(Path(folder), work.split)
            tokens, ends = np.memmap(tokens_path, dtype=work.dtype, mode="r"), np.fromfile(ends_path, dtype="<i8")
            for start in range(begin, end, COPY_TOKENS):
                stop = min(end, start + COPY_TOKENS)
                first, last = np.searchsorted(ends, [start, stop], side="right")
                writer.append(tokens[start:stop], ends[first:last] - start)
        (file,) = writer.finish()
        return file


def _range_files(folder: Path, split: str) -> tuple[Path, Path]:
    return folder / f"{split}.tokens", folder / f"{split}.ends"


def _record_of(folder: Path) -> dict[str, Any] | None:
    with contextlib.suppress(ArtifactError, KeyError, TypeError, AttributeError, ValueError):  # damaged: made again
        record = read_json(folder / "record.json")
        check_files(folder, record["contents"], "")
        return {**record, "folder": str(folder)}
    return None


def _remove_other_ranges(folder: Path, ranges: Sequence[RangeWork]) -> None:
    """Remove what an earlier call with other ranges left."""
    wanted = {work.folder.name for work in ranges}
    for path in folder.glob("*"):
        if path.name not in wanted:
            remove_folder(path)


def _lines_beginning_in(path: Path, begin: int, end: int) -> tuple[bytes, int]:
    """The lines that begin at bytes `begin` … `end - 1`, whole, and where the first of them begins."""
    with path.open("rb") as handle:
        first = _next_line(handle, begin)
        if first >= end:
            return b"", first
        last = _next_line(handle, end)
        handle.seek(first)
        return handle.read(last - first), first


def _next_line(handle: IO[bytes], place: int) -> int:
    """Where the first line begins that does not begin before `place`."""
    if not place:
        return 0
    handle.seek(place - 1)
    handle.readline()  # the rest of a line that began before, or just the end of the one before
    return handle.tell()


def _documents(data: bytes, path: Path, first_byte: int) -> Iterator[Document]:
    begin = 0
    while begin < len(data):
        end = data.find(b"\n", begin) + 1 or len(data)
        try:
            document = Document(**orjson.loads(data[begin:end]))
            if document.split not in SPLITS or not isinstance(document.text, str):
                raise TypeError(f"split {document.split!r}, text {type(document.text).__name__}")
        except (orjson.JSONDecodeError, TypeError) as error:
            raise ArtifactError(
                f"{path}, the line at byte {first_byte + begin:,}: damaged ({error}).",
                "Make it again with --from corpus.",
            ) from error
        yield document
        begin = end


def _tokenizer(folder: str) -> Tokenizer:
    """The tokenizer in a folder, loaded once a worker."""
    from groundup.tokenizer.files import TOKENIZER_FILE

    path = Path(folder) / TOKENIZER_FILE
    return _load_tokenizer(folder, file_digest(path) if path.is_file() else "")


@functools.lru_cache(maxsize=2)
def _load_tokenizer(folder: str, digest: str) -> Tokenizer:
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
