"""`groundup serve`: models for people and programs, over HTTP."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from groundup.cli.options import command_line
from groundup.cli.talking import PANEL, DraftOption, PrecisionOption, draft_model, dtype_of, load_model, say_why_slow

if TYPE_CHECKING:
    from groundup.serving.state import ServedModel


def add_to(app: typer.Typer) -> None:
    """Add this command to the command line."""
    app.command(
        rich_help_panel=PANEL,
        epilog="Examples:  groundup serve runs/demo --open  ·  groundup serve runs/demo -m sft -m pretrain  ·  "
        "groundup serve runs/demo small=exports/llama --port 8080  ·  "
        "GROUNDUP_API_KEY=… groundup serve runs/demo --host 0.0.0.0  ·  "
        'curl http://127.0.0.1:8000/v1/completions -d \'{"prompt": "Once"}\' -H "Content-Type: application/json"',
    )(serve)


def serve(
    models: Annotated[
        list[str],
        typer.Argument(metavar="RUN|FOLDER|NAME=FOLDER…", help="Runs and models' folders, all served at once."),
    ],
    host: Annotated[
        str, typer.Option("--host", help="The address to listen on; others than this machine's own need a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-p", help="0: any that is free.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            envvar="GROUNDUP_API_KEY",
            help="What clients must send; may be given often. In the "
            "environment variable no other user of this machine can read it.",
        ),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen on any address without a key.")] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            metavar="NAME",
            help="A name by which browsers may call this server, beside localhost and addresses; may be given often.",
        ),
    ] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", metavar="STAGE", help="Of the runs: only these stages' models (default: all)."),
    ] = None,
    slots: Annotated[int, typer.Option("--slots", min=1, help="Most texts of a model that are written at once.")] = 16,
    draft: DraftOption = None,
    precision: PrecisionOption = None,
    rate_limit: Annotated[
        int | None, typer.Option("--rate-limit", min=1, metavar="N", help="Most requests a minute of one key.")
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", min=1, help="Most seconds for an answer.")] = 600,
    drain: Annotated[
        float, typer.Option("--drain", min=0, help="Seconds that answers have to finish once the server is stopped.")
    ] = 30,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Serve models over HTTP: an OpenAI-compatible API, and a page. Ctrl-C or SIGTERM finishes what was begun."""
    from groundup.errors import GroundupError

    try:
        from groundup.serving.page import routes
        from groundup.serving.server import listen, make_server
        from groundup.serving.state import Limits, State
    except ModuleNotFoundError as error:
        raise GroundupError(
            f"serve needs {str(error.name).partition('.')[0]}.", "pip install 'groundup[serve]'"
        ) from None
    keys = [key for key in api_key or () if key]  # an empty one would let everybody in
    if host not in ("127.0.0.1", "localhost", "::1") and not (keys or insecure):
        raise GroundupError(
            f"--host {host}: anybody who can reach this machine could use the models.",
            "Set a key in GROUNDUP_API_KEY, or say --insecure.",
        )
    with listen(host, port) as socket:  # before minutes of reading
        address, port = socket.getsockname()[:2]
        served, run = read_models(models, stage, slots, draft, precision)
        limits = Limits(seconds=timeout, per_minute=rate_limit)
        names = [*(allow_host or ()), *([host] if host != address else [])]
        state = State(served, limits=limits, keys=keys, hosts=names, run=run)
        server = make_server(state, routes(), drain_seconds=drain)
        shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(address, f"[{address}]" if ":" in address else address)
        listed = ", ".join(state.models) or "none is finished yet"
        typer.echo(f"models: {listed}\nlistening: http://{shown}:{port}/  (API: http://{shown}:{port}/v1)", err=True)
        if open_page:
            import threading
            import webbrowser

            threading.Timer(0.5, webbrowser.open, [f"http://{shown}:{port}/"]).start()
        _log()
        try:
            server.run(sockets=[socket])
        except KeyboardInterrupt:
            typer.echo("stopped.", err=True)


def read_models(
    paths: list[str], stages: list[str] | None, slots: int, draft: str | None, precision: str | None
) -> tuple[list[ServedModel], Path | None]:
    """The models, each with an engine, and the run that the first ones are of, which may have none yet."""
    from groundup.errors import ArtifactError, GroundupError
    from groundup.generation import Engine
    from groundup.run import RECIPE_FILE, Run
    from groundup.serving.state import ServedModel
    from groundup.stage import default_model, graph, language_models

    found: list[tuple[str, Path, str | None]] = []
    run: Path | None = None
    for given in paths:
        name, _, rest = given.partition("=")
        is_named = bool(rest) and not Path(given).exists()
        path = Path(rest if is_named else given)
        if is_named or not (path / RECIPE_FILE).is_file():
            found.append((name if is_named else path.resolve().name, path, None))
            continue
        run = run or path
        recipe = Run(path).recipe
        made = [one.name for one in language_models(graph(recipe)) if (path / one.name / "model").is_dir()]
        if unknown := sorted(set(stages or ()) - set(made)):
            raise ArtifactError(f"{path}: no model of a stage {unknown[0]!r} here.", f"Its models: {', '.join(made)}.")
        first = default_model(recipe, to_chat=True)[0]
        made.sort(key=lambda one: one != first)
        found += [(one, path, one) for one in made if not stages or one in stages]
    names = [name for name, *_ in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise GroundupError(
            f"two models are called {twice}.", f"Name one of them: {command_line('serve', 'NAME=FOLDER')}"
        )
    served = []
    for name, path, stage in found:
        model, tokenizer, folder = load_model(path, stage, to_chat=True)
        guesses = draft_model(path, draft)
        engine = Engine(model, tokenizer, slots=slots, dtype=dtype_of(precision), draft=guesses)
        say_why_slow(engine)
        served.append(ServedModel(name, engine, folder))
    return served, run


def _log() -> None:
    """One line for each request, to standard error."""
    import logging

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for name in ("groundup.serving", "uvicorn.error"):
        logging.getLogger(name).addHandler(handler)
    logging.getLogger("groundup.serving").setLevel(logging.INFO)
