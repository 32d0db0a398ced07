"""`groundup compare`: models, runs and repeated runs side by side, in words or on a page."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from groundup.cli.options import JsonOption, print_json, print_table


def add_to(app: typer.Typer) -> None:
    """Add `compare` to the command line."""
    app.command(
        rich_help_panel="Look at runs, recipes and this machine",
        epilog="Examples:  groundup compare runs/demo/pretrain runs/demo/sft  ·  groundup compare runs/a runs/b runs/c"
        "  ·  groundup compare runs/a-seeds runs/b-seeds  ·  groundup compare --html ab.html runs/a runs/b",
    )(compare)


def compare(
    scores: Annotated[
        list[Path],
        typer.Argument(
            metavar="A B…", help="Runs, their stages, folders with scores.json, or folders of `groundup build --seeds`."
        ),
    ],
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page of these runs side by side.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare models: the first with each other one, with intervals, corrected for how many are looked at.

    Where two answered the same items, these are compared one by one; repeated runs are compared over their seeds.
    """
    from groundup.errors import DataError
    from groundup.evaluation.comparison import compare_cards
    from groundup.run import Run

    if len(scores) < 2:
        raise DataError(f"{scores[0]}: there is nothing to compare it with.", "Name two or more.")
    runs = [] if html is None else [Run.existing(path) for path in scores]
    try:
        found = compare_cards(*scores)
    except DataError:
        if html is None:
            raise
        found = []  # they share no scores: there is the rest to see
    if html is not None:
        from groundup.report.versus import write_versus

        write_versus(runs, html, found)
        typer.echo(html, err=as_json)
    if as_json:
        print_json([asdict(one) for one in found])
    if as_json or html is not None:
        return
    is_many = len(scores) > 2
    print_table(
        ["benchmark", *(["with"] if is_many else []), "first", "other", "difference (95 %)", "p", "verdict"],
        [
            [
                one.benchmark, *([one.other] if is_many else []), f"{one.first:.3f}", f"{one.second:.3f}",
                f"{one.value:+.3f} ({one.low:+.3f} to {one.high:+.3f})",
                f"{one.p:.3f}" if one.p >= 0.0005 else "<0.001", one.verdict,
            ]
            for one in found
        ],
    )  # fmt: skip
