"""Commands that look at a tokenizer: `groundup tokenizer report` and `groundup tokenizer try`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from groundup.cli.options import JsonOption, print_json, print_table, result_console

if TYPE_CHECKING:
    from collections.abc import Iterator

    from groundup.corpus import Document

TokenizerArgument = Annotated[
    Path, typer.Argument(metavar="TOKENIZER", help="A run's folder, a folder with tokenizer.json, or the file itself.")
]

REPORT_EXAMPLES = (
    "Examples:  groundup tokenizer report runs/demo  ·  groundup tokenizer report runs/demo --html tokenizer.html  ·  "
    "groundup tokenizer report tokenizer.json --text 'texts/*.txt'"
)
TRY_EXAMPLES = (
    'Examples:  groundup tokenizer try runs/demo "The lion said: it\'s 1900!"  ·  '
    'groundup tokenizer try tokenizer.json "naïve 日本語" --json'
)
MOST_LISTED = 60


def report(
    tokenizer: TokenizerArgument,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text", "-t", metavar="FILES", help="Text to measure by, where not the run's corpus; may be repeated."
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the report as one HTML page too.")
    ] = None,
    most_mib: Annotated[
        float, typer.Option("--most-mib", metavar="MIB", min=0.001, help="Measure by no more text than this.")
    ] = 64.0,
    as_json: JsonOption = False,
) -> None:
    """What a tokenizer makes of a corpus: bytes per token by language and source, tokens never used, samples."""
    from groundup.tokenizer import load_tokenizer
    from groundup.tokenizer.measure import measure
    from groundup.tokenizer.page import render, write_page

    file = tokenizer_file(tokenizer)
    measured = measure(load_tokenizer(file), _documents(tokenizer, text), int(most_mib * 2**20))
    name = _name_of(tokenizer)
    if html is not None:
        write_page(measured, name, html)
    if as_json:
        print_json(measured)
        return
    console = result_console()
    console.print(render(measured, name, colour=console.color_system is not None))
    if html is not None:
        typer.echo(f"\n{html}: written.")


def try_text(
    tokenizer: TokenizerArgument,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="Any text.")],
    as_json: JsonOption = False,
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
    rows = ((str(piece.id), Text(piece.shown), Text(piece.bytes, style="dim")) for piece in pieces[:MOST_LISTED])
    print_table(("id", "piece", "bytes"), rows, right=(0,))
    if len(pieces) > MOST_LISTED:
        console.print(Text(f"… and {len(pieces) - MOST_LISTED:,} more; --json lists all.", style="dim"))


def tokenizer_file(path: Path) -> Path:
    """Where the tokenizer of a run, a folder or a file is."""
    in_run = path / "tokenizer" / "tokenizer.json"
    return in_run if in_run.is_file() else path


def _name_of(path: Path) -> str:
    resolved = path.resolve()
    return resolved.parent.name if resolved.suffix == ".json" else resolved.name


def _documents(tokenizer: Path, text: list[str] | None) -> Iterator[Document]:
    """The documents to measure by: files that the user names, else the corpus of the run."""
    import dataclasses

    from groundup.corpus import DOCUMENTS, read, stream_documents
    from groundup.errors import DataError

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
