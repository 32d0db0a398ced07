"""`groundup corpus crawl`: the one command of the data stage that goes to the network."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from groundup.cli.options import JsonOption, QuietOption, print_json, result_console
from groundup.recipe.crawl import CrawlSettings

EPILOG = (
    "Examples:  groundup corpus crawl https://example.org/docs/ --out pages --depth 3 --same-path --max-pages 500  ·  "
    "groundup corpus crawl --urls list.txt --sitemap https://example.org/sitemap.xml --out pages --delay 2"
)
_List = typer.Option(
    "--urls", metavar="FILE", encoding="utf-8-sig", errors="replace", help="A list of pages, one a line (-: stdin)."
)


def crawl(
    urls: Annotated[list[str] | None, typer.Argument(metavar="URL", help="Pages to fetch.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Where the pages go.")] = Path("pages"),
    lists: Annotated[list[typer.FileText] | None, _List] = None,
    sitemaps: Annotated[
        list[str] | None, typer.Option("--sitemap", metavar="URL", help="A sitemap whose pages are fetched.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    **chosen: Any,
) -> None:
    """Fetch web pages into WARC files, politely: robots.txt obeyed, one request at a time to a host, with pauses.

    Interrupted anywhere, the same command goes on. Exit code 1 if no page is stored.
    """
    from pydantic import ValidationError

    from groundup.cli.building import stopped_by_sigterm
    from groundup.console import Console
    from groundup.corpus.crawl import crawl as fetch
    from groundup.errors import Problem, RecipeError

    try:
        settings = CrawlSettings(**chosen)
    except ValidationError as error:
        problems = [Problem(f"{_flag(str(one['loc'][0]))} {one['input']}", f"{one['msg']}.") for one in error.errors()]
        raise RecipeError("corpus crawl", problems) from error
    console, table = Console(quiet=quiet), Table("outcome", "addresses", "for example", box=None, pad_edge=False)
    lines = (line.strip() for file in lists or [] for line in file)
    pages = [*(urls or []), *(line for line in lines if line and not line.startswith("#"))]
    with stopped_by_sigterm():
        report = fetch(pages, out, settings, console, sitemaps=sitemaps or [])
    for outcome, count in report.outcomes.most_common():
        table.add_row(outcome, f"{count:,}", report.examples.get(outcome))
    left_alone = [f"{host} {why}" for host, why in report.closed_hosts.items()]
    table.add_row("waiting", f"{report.waiting:,}", (left_alone or [""])[0])
    if as_json:
        print_json(vars(report))
    elif not quiet:
        result_console().print(table)
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
        option = typer.Option(_flag(name), metavar="A,B" if is_list else None, help=f"{about[0].upper()}{about[1:]}.")
        annotation: Any = Annotated[kind, option]
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )
    command.__signature__ = signature.replace(parameters=parameters)


_with_options(crawl)
