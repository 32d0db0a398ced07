"""What the data stages' commands can do beside their stage: `corpus crawl`, `tokenizer report`, `shards verify`, …"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text
from typer import Argument, Option

from groundup.cli import options
from groundup.cli.output import print_json, print_table, result_console
from groundup.errors import ArtifactError, DataError, Problem, RecipeError
from groundup.recipe import ShardsSettings
from groundup.recipe.crawl import CrawlSettings

if TYPE_CHECKING:
    from groundup.corpus import Document
    from groundup.shards import TokenShards
    from groundup.tokenizer import Tokenizer

TokenizerPlace = Annotated[
    Path, Argument(metavar="TOKENIZER", help="A run's folder, a folder with tokenizer.json, or the file itself.")
]
ShardsFolder = Annotated[Path, Argument(metavar="FOLDER", help="A folder of shards, or a run's folder.")]
MOST_LISTED = 60  # pieces of a text
MOST_ROWS = 12  # sources, languages
BAR_WIDTH = 30
corpus_app, tokenizer_app, shards_app = typer.Typer(), typer.Typer(), typer.Typer()
_List = Option(
    "--urls", metavar="FILE", encoding="utf-8-sig", errors="replace", help="A list of pages, one a line (-: stdin)."
)


@corpus_app.command(
    epilog="Examples:  groundup corpus crawl https://example.org/docs/ --out pages --depth 3 --same-path "
    "--max-pages 500  ·  "
    "groundup corpus crawl --urls list.txt --sitemap https://example.org/sitemap.xml --out pages --delay 2"
)
def crawl(
    urls: Annotated[list[str] | None, Argument(metavar="URL", help="Pages to fetch.")] = None,
    out: Annotated[Path, Option("--out", "-o", metavar="FOLDER", help="Where the pages go.")] = Path("pages"),
    lists: Annotated[list[typer.FileText] | None, _List] = None,
    sitemap: Annotated[list[str] | None, Option(metavar="URL", help="A sitemap whose pages are fetched.")] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    **chosen: Any,
) -> None:
    """Fetch web pages into WARC files, politely: robots.txt obeyed, one request at a time to a host, with pauses.

    Interrupted anywhere, the same command goes on. Exit code 1 if no page is stored.
    """
    from pydantic import ValidationError

    from groundup.cli.building import stopping
    from groundup.console import Console
    from groundup.corpus.crawl import crawl as fetch

    try:
        settings = CrawlSettings(**chosen)
    except ValidationError as error:
        problems = [Problem(f"{_flag(str(one['loc'][0]))} {one['input']}", f"{one['msg']}.") for one in error.errors()]
        raise RecipeError("corpus crawl", problems) from error
    console = Console(quiet=quiet)
    lines = (line.strip() for file in lists or [] for line in file)
    pages = [*(urls or []), *(line for line in lines if line and not line.startswith("#"))]
    with stopping("Pages that are stored are kept."):
        report = fetch(pages, out, settings, console, sitemaps=sitemap or [])
    if as_json:
        print_json(vars(report))
    elif not quiet:
        rows = [(outcome, count, report.examples.get(outcome, "")) for outcome, count in report.outcomes.most_common()]
        left_alone = [f"{host} {why}" for host, why in report.closed_hosts.items()]
        print_table(
            ("outcome", "addresses", "for example"), [*rows, ("waiting", report.waiting, (left_alone or [""])[0])]
        )
        if report.limit and report.waiting:
            console.note(f"{_flag(report.limit)} is reached; the same command with a higher one goes on.")
        if report.stored:
            console.note(f'Build on it:  [corpus] inputs = ["{out}/*.warc.gz"]')
    if not report.stored:
        raise typer.Exit(1)


def _flag(name: str) -> str:
    return "--" + name.removesuffix("_seconds").replace("_", "-")


def _with_options(command: Any) -> None:
    """An option for each setting, with the setting's own words."""
    signature = inspect.signature(command, eval_str=True)
    parameters = list(signature.parameters.values())[:-1]
    for name, field in CrawlSettings.model_fields.items():
        about, is_list = str(field.description), isinstance(field.default, tuple)
        kind, default = (str, ",".join(field.default)) if is_list else (field.annotation, field.default)
        option = Option(_flag(name), metavar="A,B" if is_list else None, help=f"{about[0].upper()}{about[1:]}.")
        annotation: Any = Annotated[kind, option]
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )
    command.__signature__ = signature.replace(parameters=parameters)


_with_options(crawl)


@tokenizer_app.command(
    epilog="Examples:  groundup tokenizer report runs/demo  ·  groundup tokenizer report runs/demo --html "
    "tokenizer.html  ·  groundup tokenizer report tokenizer.json --text 'texts/*.txt'"
)
def report(
    tokenizer: TokenizerPlace,
    text: Annotated[
        list[str] | None,
        Option(
            "--text", "-t", metavar="FILES", help="Text to measure by, where not the run's corpus; may be repeated."
        ),
    ] = None,
    html: Annotated[Path | None, Option(metavar="FILE", help="Write the report as one HTML page too.")] = None,
    most_mib: Annotated[float, Option(metavar="MIB", min=0.001, help="Measure by no more text than this.")] = 64.0,
    as_json: options.Json = False,
) -> None:
    """What a tokenizer makes of a corpus: bytes per token by language and source, tokens never used, samples."""
    from groundup.tokenizer import load_tokenizer
    from groundup.tokenizer.measure import measure
    from groundup.tokenizer.page import render, write_page

    file = tokenizer_file(tokenizer)
    measured = measure(load_tokenizer(file), _documents(tokenizer, text), int(most_mib * 2**20))
    resolved = tokenizer.resolve()
    name = resolved.parent.name if resolved.suffix == ".json" else resolved.name
    if html is not None:
        write_page(measured, name, html)
    if as_json:
        print_json(measured)
        return
    console = result_console()
    console.print(render(measured, name, colour=console.color_system is not None))
    if html is not None:
        typer.echo(f"\n{html}: written.")


@tokenizer_app.command(
    "try",
    epilog='Examples:  groundup tokenizer try runs/demo "The lion said: it\'s 1900!"  ·  '
    'groundup tokenizer try tokenizer.json "naïve 日本語" --json',
)
def try_text(
    tokenizer: TokenizerPlace,
    text: Annotated[str, Argument(metavar="TEXT", help="Any text.")],
    as_json: options.Json = False,
) -> None:
    """How a text is cut: its pieces in colour, each with its id."""
    from groundup.tokenizer import load_tokenizer
    from groundup.tokenizer.pieces import cut, in_colour, to_json

    pieces = cut(load_tokenizer(tokenizer_file(tokenizer)), text)
    figures = to_json(pieces, text)
    if as_json:
        print_json(figures)
        return
    console = result_console()
    console.print(in_colour([piece.shown for piece in pieces], colour=console.color_system is not None))
    ratio = f" · {figures['bytes_per_token']:.2f} bytes per token" if pieces else ""
    console.print(Text(f"{figures['tokens']:,} tokens · {figures['bytes']:,} bytes{ratio}", style="dim"))
    rows = ((str(piece.id), piece.shown, Text(piece.bytes, style="dim")) for piece in pieces[:MOST_LISTED])
    print_table(("id", "piece", "bytes"), rows)
    if len(pieces) > MOST_LISTED:
        console.print(Text(f"… and {len(pieces) - MOST_LISTED:,} more; --json lists all.", style="dim"))


def tokenizer_file(path: Path) -> Path:
    """Where the tokenizer of a run, a folder or a file is."""
    in_run = path / "tokenizer" / "tokenizer.json"
    return in_run if in_run.is_file() else path


def _documents(tokenizer: Path, text: list[str] | None) -> Iterator[Document]:
    """The documents to measure by: files that the user names, else the corpus of the run."""
    from groundup.corpus import DOCUMENTS, read, stream_documents

    if text:
        from groundup.corpus.quality.language import detect_language

        for document in read(*text):
            yield dataclasses.replace(document, language=detect_language(document.text)[0])
        return
    for corpus in (tokenizer / "corpus", tokenizer.parent / "corpus", tokenizer.parent.parent / "corpus"):
        if (corpus / DOCUMENTS).is_file():
            yield from stream_documents(corpus)
            return
    raise DataError(f"{tokenizer}: no run's corpus is beside it to measure by.", "Name text files with --text.")


@shards_app.command(epilog="Examples:  groundup shards verify runs/demo  ·  groundup shards verify my/shards --json")
def verify(folder: ShardsFolder, as_json: options.Json = False) -> None:
    """Read every byte: checksums, ids in the vocabulary, documents that end where the index says. Exit code 1 if not.

    Every fault is named with its file and the byte at which it is.
    """
    from groundup.shards import verify_shards
    from groundup.shards.format import AGAIN

    found = verify_shards(shards_folder(folder))
    if as_json:
        faults = [{"file": str(fault.path), "byte": fault.offset, "what": fault.what} for fault in found.faults]
        counts = {"files": found.files, "tokens": found.tokens, "documents": found.documents}
        print_json({"good": not faults, **counts, "faults": faults})
        if faults:
            raise typer.Exit(1)
        return
    if found.faults:
        raise ArtifactError("\n".join(map(str, found.faults)), AGAIN)
    typer.echo(f"{folder}: {found.files} files, {found.documents:,} documents, {found.tokens:,} tokens: all good.")


@shards_app.command(epilog="Examples:  groundup shards stats runs/demo  ·  groundup shards stats my/shards --json")
def stats(folder: ShardsFolder, as_json: options.Json = False) -> None:
    """Tokens, documents and how long they are, by source and by language."""
    from groundup.shards import shard_stats

    found = shard_stats(shards_folder(folder))
    if as_json:
        print_json(found)
        return
    for titles, rows in _stats_tables(found):
        print_table(titles, rows)
        typer.echo()


@shards_app.command(
    epilog="Examples:  groundup shards show runs/demo 0  ·  groundup shards show runs/demo 7 --split validation"
)
def show(
    folder: ShardsFolder,
    number: Annotated[int, Argument(metavar="N", min=0, help="The document, from 0 on.")],
    split: Annotated[str, Option(help="train or validation.")] = "train",
    tokenizer: Annotated[
        Path | None,
        Option(metavar="FOLDER", help="The tokenizer that made the ids (default: tokenizer/ beside the shards)."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Document N as the model will see it: its text cut into pieces, its length, and where it came from."""
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
        **{name: getattr(document, name, None) for name in ("source", "language", "id")},
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


@shards_app.command(
    "import",
    epilog="Examples:  groundup shards import data/shakespeare my/shards --end-of-text-id 50256  ·  "
    "groundup shards import ids.parquet my/shards --tokenizer runs/demo/tokenizer",
)
def import_(
    source: Annotated[Path, Argument(metavar="SOURCE", help="A file of ids, or a folder of them.")],
    out: Annotated[Path, Argument(metavar="OUT", help="The folder for the shards.")],
    format: Annotated[
        str | None,
        Option(
            help="nanogpt, uint16, uint32, int64, npy, llmc, megatron, parquet or arrow (default: as the files say)."
        ),
    ] = None,
    validation: Annotated[
        Path | None, Option(metavar="SOURCE", help="The validation split (default: files named so).")
    ] = None,
    end_of_text_id: Annotated[
        int | None, Option(help="The id that ends a document (nanoGPT's GPT-2 files: 50256).")
    ] = None,
    vocab_size: Annotated[int | None, Option(help="Entries of the vocabulary (default: the largest id + 1).")] = None,
    tokenizer: Annotated[Path | None, Option(metavar="FOLDER", help="The tokenizer that made the ids.")] = None,
    column: Annotated[str | None, Option(help="The column with the ids (default: input_ids).")] = None,
    join_rows: Annotated[bool, Option("--join-rows", help="Rows are pieces of one stream, not documents.")] = False,
    shard_tokens: Annotated[int, Option(min=1024, help="Most tokens in one file.")] = 100_000_000,
    as_json: options.Json = False,
) -> None:
    """Make shards of another program's ids: nanoGPT, llm.c, Megatron-LM, numpy, Parquet, Hugging Face datasets.

    Where a format does not say where documents end, they are cut at --end-of-text-id; without it each file is one.
    """
    from groundup.shards import import_ids
    from groundup.tokenizer import load_tokenizer

    done = import_ids(
        source, out, validation=validation, format=format, end_of_text_id=end_of_text_id, vocab_size=vocab_size,
        column=column, join_rows=join_rows, settings=ShardsSettings(shard_tokens=shard_tokens),
        tokenizer=load_tokenizer(tokenizer) if tokenizer is not None else None,
    )  # fmt: skip
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


@shards_app.command(
    epilog="Examples:  groundup shards export runs/demo nanogpt/data/mine --format nanogpt  ·  "
    "groundup shards export runs/demo out --format megatron"
)
def export(
    folder: ShardsFolder,
    out: Annotated[Path, Argument(metavar="OUT", help="The folder for the files.")],
    format: Annotated[str, Option(help="nanogpt or megatron.")],
    force: Annotated[bool, Option("--force", help="Replace files that are there already.")] = False,
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
    from groundup.corpus import stream_documents

    folder = shards.folder.parent / "corpus"
    if not (folder / "documents.jsonl").is_file():
        return None
    document = next(islice(stream_documents(folder, shards.split), number, None), None)
    return document if document is not None and document.text == text else None


def _stats_tables(found: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], list[tuple[Any, ...]]]]:
    """Titles and rows."""
    splits = found["splits"].items()
    yield ("split", "documents", "tokens", "text bytes", "bytes/token", "files", "size", "dtype"), [
        (
            name, split["documents"], split["tokens"], split["text_bytes"] or "",
            f"{split['bytes_per_token']:.2f}" if split["bytes_per_token"] else "", split["files"], split["size_bytes"],
            found["dtype"],
        )
        for name, split in splits
    ]  # fmt: skip
    names = ("min", "p10", "p50", "p90", "p99", "max")
    yield (
        ("tokens in a document", *names, "mean"),
        [
            (name, *(lengths[key] for key in names), f"{lengths['mean']:,.1f}")
            for name, split in splits
            if (lengths := split["lengths"])
        ],
    )
    histogram = found["splits"]["train"]["lengths"].get("histogram", [])
    most = max((count for _, _, count in histogram), default=1)
    yield (
        ("train, from", "below", "documents", ""),
        [(low, high, count, "█" * max(1, round(BAR_WIDTH * count / most))) for low, high, count in histogram],
    )
    for what in ("sources", "languages"):
        for name, split in splits:
            rows: list[tuple[Any, ...]] = [
                (label, one["documents"], one["bytes"], one["tokens"], f"{one['tokens'] / split['tokens']:.1%}")
                for label, one in split[what].items()
            ]
            if len(rows) > MOST_ROWS:
                rows[MOST_ROWS:] = [(f"… {len(rows) - MOST_ROWS:,} more: --json",)]
            if rows:
                yield (f"{name}, by {what[:-1]}", "documents", "bytes", "tokens", "share"), rows
