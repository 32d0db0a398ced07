"""Commands that look into token shards and convert them: `groundup shards verify|stats|show|import|export`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from groundup.cli.options import JsonOption, print_json, result_console

if TYPE_CHECKING:
    from groundup.corpus import Document
    from groundup.shards import TokenShards
    from groundup.tokenizer import Tokenizer

FolderArgument = Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of shards, or a run's folder.")]
TokenizerOption = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer", metavar="FOLDER", help="The tokenizer that made the ids (default: tokenizer/ beside the shards)."
    ),
]
MOST_ROWS = 12
BAR_WIDTH = 30


def add_to(group: typer.Typer) -> None:
    """Add these commands to `groundup shards`."""
    group.command(epilog="Examples:  groundup shards verify runs/demo  ·  groundup shards verify my/shards --json")(
        verify
    )
    group.command(epilog="Examples:  groundup shards stats runs/demo  ·  groundup shards stats my/shards --json")(stats)
    group.command(
        epilog="Examples:  groundup shards show runs/demo 0  ·  groundup shards show runs/demo 7 --split validation"
    )(show)
    group.command(
        "import",
        epilog="Examples:  groundup shards import data/shakespeare my/shards --end-of-text-id 50256  ·  "
        "groundup shards import ids.parquet my/shards --tokenizer runs/demo/tokenizer",
    )(import_)
    group.command(
        "export",
        epilog="Examples:  groundup shards export runs/demo nanogpt/data/mine --format nanogpt  ·  "
        "groundup shards export runs/demo out --format megatron",
    )(export)


def verify(folder: FolderArgument, as_json: JsonOption = False) -> None:
    """Read every byte: checksums, ids in the vocabulary, documents that end where the index says. Exit code 1 if not.

    Every fault is named with its file and the byte at which it is.
    """
    from groundup.errors import ArtifactError
    from groundup.shards import verify_shards
    from groundup.shards.format import AGAIN

    found = verify_shards(shards_folder(folder))
    if as_json:
        print_json(
            {
                "good": not found.faults,
                "files": found.files,
                "tokens": found.tokens,
                "documents": found.documents,
                "faults": [
                    {"file": str(fault.path), "byte": fault.offset, "what": fault.what} for fault in found.faults
                ],
            }
        )
        if found.faults:
            raise typer.Exit(1)
        return
    if found.faults:
        raise ArtifactError("\n".join(map(str, found.faults)), AGAIN)
    typer.echo(f"{folder}: {found.files} files, {found.documents:,} documents, {found.tokens:,} tokens: all good.")


def stats(folder: FolderArgument, as_json: JsonOption = False) -> None:
    """Tokens, documents and how long they are, by source and by language."""
    from groundup.shards import shard_stats

    found = shard_stats(shards_folder(folder))
    if as_json:
        print_json(found)
        return
    console = result_console()
    for table in _stats_tables(found):
        console.print(table)
        console.print()


def show(
    folder: FolderArgument,
    number: Annotated[int, typer.Argument(metavar="N", min=0, help="The document, from 0 on.")],
    split: Annotated[str, typer.Option("--split", help="train or validation.")] = "train",
    tokenizer: TokenizerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Document N as the model will see it: its text cut into pieces, its length, and where it came from."""
    from groundup.errors import DataError
    from groundup.shards import TokenShards
    from groundup.tokenizer.pieces import in_colour, piece_of

    shards = TokenShards.open(shards_folder(folder), split, verify=False)
    if number >= shards.n_documents:
        raise DataError(f"document {number}: the {split} split has documents 0 to {shards.n_documents - 1}.")
    ids = shards.document(number).tolist()
    found = _tokenizer_of(shards, tokenizer)
    document = _document_of(shards, number, found.decode(ids)) if found is not None else None
    pieces = None if found is None else [piece_of(found, index).shown for index in ids]
    about: dict[str, Any] = {
        "document": number,
        "split": split,
        "tokens": len(ids),
        "bytes": None if found is None else sum(len(found.token_bytes(index)) for index in ids),
        "source": document.source if document else None,
        "language": document.language if document else None,
        "id": document.id if document else None,
    }
    if as_json:
        print_json({**about, "ids": ids, "pieces": pieces})
        return
    console = result_console()
    console.print(Text("  ".join(f"{name}={value}" for name, value in about.items() if value not in (None, ""))))
    if pieces is None:
        console.print("No tokenizer beside the shards (--tokenizer): these are the ids.", style="dim")
        console.print(" ".join(map(str, ids)), soft_wrap=True)
        return
    if document is None:
        console.print("Its source is not known: the corpus is not beside the shards.", style="dim")
    console.print(in_colour(pieces, colour=console.is_terminal), soft_wrap=True)


def import_(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A file of ids, or a folder of them.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder for the shards.")],
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="nanogpt, uint16, uint32, int64, npy, llmc, megatron, parquet or arrow (default: as the files say).",
        ),
    ] = None,
    validation: Annotated[
        Path | None,
        typer.Option("--validation", metavar="SOURCE", help="The validation split (default: files named so)."),
    ] = None,
    end_of_text_id: Annotated[
        int | None, typer.Option("--end-of-text-id", help="The id that ends a document (nanoGPT's GPT-2 files: 50256).")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option("--vocab-size", help="Entries of the vocabulary (default: the largest id + 1).")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", metavar="FOLDER", help="The tokenizer that made the ids.")
    ] = None,
    column: Annotated[
        str | None, typer.Option("--column", help="The column with the ids (default: input_ids).")
    ] = None,
    join_rows: Annotated[
        bool, typer.Option("--join-rows", help="Rows are pieces of one stream, not documents.")
    ] = False,
    shard_tokens: Annotated[
        int, typer.Option("--shard-tokens", min=1024, help="Most tokens in one file.")
    ] = 100_000_000,
    as_json: JsonOption = False,
) -> None:
    """Make shards of another program's ids: nanoGPT, llm.c, Megatron-LM, numpy, Parquet, Hugging Face datasets.

    Where a format does not say where documents end, they are cut at --end-of-text-id; without it each file is one.
    """
    from groundup.recipe import ShardsSettings
    from groundup.shards import import_ids
    from groundup.tokenizer import load_tokenizer

    done = import_ids(
        source,
        out,
        validation=validation,
        format=format,
        tokenizer=load_tokenizer(tokenizer) if tokenizer is not None else None,
        end_of_text_id=end_of_text_id,
        vocab_size=vocab_size,
        column=column,
        join_rows=join_rows,
        settings=ShardsSettings(shard_tokens=shard_tokens),
    )
    splits = {
        name: {"tokens": split.tokens, "documents": split.documents} for name, split in done.manifest.splits.items()
    }
    if as_json:
        print_json({"format": done.format, "dtype": done.manifest.dtype.name, "splits": splits, "notes": done.notes})
        return
    for name, split in splits.items():
        typer.echo(f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens")
    for note in done.notes:
        typer.echo(f"note: {note}", err=True)


def export(
    folder: FolderArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder for the files.")],
    format: Annotated[str, typer.Option("--format", help="nanogpt or megatron.")],
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there already.")] = False,
) -> None:
    """Write shards as nanoGPT or Megatron-LM reads them; `import` makes the same shards of them again."""
    from groundup.shards import export_shards

    for path in export_shards(shards_folder(folder), out, format, force=force):
        typer.echo(path)


def shards_folder(folder: Path) -> Path:
    """The folder of the shards, if a run's folder was named."""
    from groundup.shards.format import MANIFEST

    inside = folder / "shards"
    return inside if (inside / MANIFEST).is_file() else folder


def _tokenizer_of(shards: TokenShards, named: Path | None) -> Tokenizer | None:
    """The tokenizer named, or the one beside the shards; None where there is none.

    Raises:
        ArtifactError: it is not the one that made the ids.
    """
    from groundup.errors import ArtifactError
    from groundup.tokenizer import load_tokenizer

    path = named or shards.folder.parent / "tokenizer"
    if named is None and not (path / "tokenizer.json").is_file():
        return None
    tokenizer = load_tokenizer(path)
    if shards.tokenizer_fingerprint not in ("", tokenizer.fingerprint):
        raise ArtifactError(
            f"{path}: not the tokenizer of these shards ({shards.tokenizer_fingerprint[:12]}…, this is "
            f"{tokenizer.fingerprint[:12]}…).",
            "Name the right one: --tokenizer.",
        )
    return tokenizer


def _document_of(shards: TokenShards, number: int, text: str) -> Document | None:
    """The document with this number in the corpus beside the shards, if it has this text."""
    from itertools import islice

    from groundup.corpus import stream_documents

    folder = shards.folder.parent / "corpus"
    if not (folder / "documents.jsonl").is_file():
        return None
    document = next(islice(stream_documents(folder, shards.split), number, None), None)
    return document if document is not None and document.text == text else None


def _stats_tables(found: Mapping[str, Any]) -> Iterator[Table]:
    table = _table("split", "documents", "tokens", "text bytes", "bytes/token", "files", "size", "dtype")
    for name, split in found["splits"].items():
        ratio = split["bytes_per_token"]
        table.add_row(
            name,
            f"{split['documents']:,}",
            f"{split['tokens']:,}",
            f"{split['text_bytes']:,}" if split["text_bytes"] else "",
            f"{ratio:.2f}" if ratio else "",
            f"{split['files']:,}",
            f"{split['size_bytes']:,}",
            found["dtype"],
        )
    yield table
    table = _table("tokens in a document", "min", "p10", "p50", "p90", "p99", "max", "mean")
    for name, split in found["splits"].items():
        if lengths := split["lengths"]:
            values = [f"{lengths[key]:,}" for key in ("min", "p10", "p50", "p90", "p99", "max")]
            table.add_row(name, *values, f"{lengths['mean']:,.1f}")
    yield table
    histogram = found["splits"]["train"]["lengths"].get("histogram", [])
    table = _table("train, from", "below", "documents", "")
    most = max((count for _, _, count in histogram), default=1)
    for low, high, count in histogram:
        table.add_row(f"{low:,}", f"{high:,}", f"{count:,}", "█" * max(1, round(BAR_WIDTH * count / most)))
    yield table
    for what in ("sources", "languages"):
        yield from _count_tables(found, what)


def _count_tables(found: Mapping[str, Any], what: str) -> Iterator[Table]:
    for name, split in found["splits"].items():
        if not split[what]:
            continue
        table = _table(f"{name}, by {what[:-1]}", "documents", "bytes", "tokens", "share")
        rows = list(split[what].items())
        for label, counts in rows[:MOST_ROWS]:
            share = counts["tokens"] / split["tokens"]
            table.add_row(
                label, f"{counts['documents']:,}", f"{counts['bytes']:,}", f"{counts['tokens']:,}", f"{share:.1%}"
            )
        if len(rows) > MOST_ROWS:
            table.add_row(f"… {len(rows) - MOST_ROWS:,} more: --json")
        yield table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number and column else "left")
    return table
