"""Commands that use a model: `generate`, `chat` and `serve`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from groundup.cli import options
from groundup.cli.output import command_line, print_json
from groundup.errors import ArtifactError, GroundupError
from groundup.recipe import GenerateSettings
from groundup.untrusted import read_bytes

if TYPE_CHECKING:
    from groundup.generation import Constraint, Engine, SamplingParams
    from groundup.model import Transformer
    from groundup.serving.state import ServedModel
    from groundup.tokenizer import Tokenizer

TemperatureOption = Annotated[
    float | None, Option("--temperature", "-t", help="0: always the most probable token. Default: the recipe's.")
]
TopKOption = Annotated[int | None, Option(help="Draw among the k most probable tokens (0: all).")]
TopPOption = Annotated[float | None, Option(help="Draw among the tokens that hold this mass.")]
MaxTokensOption = Annotated[int | None, Option("--max-tokens", "-n", help="Most tokens to write.")]
SeedOption = Annotated[int | None, Option(help="The same seed gives the same text.")]
app = typer.Typer()


@app.command(
    rich_help_panel=options.USE,
    epilog='Examples:  groundup generate runs/demo "Once upon a time"  ·  '
    "groundup generate runs/shakespeare ROMEO: -n 300 -t 0.8 --seed 7  ·  "
    "echo Once | groundup generate runs/demo  ·  "
    "groundup generate runs/demo Once --draft ngrams  ·  groundup generate runs/demo Yes: --choice yes --choice no",
)
def generate(
    model: options.Model,
    prompt: Annotated[str | None, Argument(help="The text to continue (default: standard input).")] = None,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    max_tokens: MaxTokensOption = None,
    seed: SeedOption = None,
    stop: Annotated[list[str] | None, Option(help="Stop before this text; may be given often.")] = None,
    min_p: Annotated[
        float | None, Option(help="Draw among tokens at least this share as probable as the best.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, Option(help="Over 1: tokens that were there become less probable.")
    ] = None,
    samples: Annotated[int, Option(help="Write so many texts, one after the other.")] = 1,
    beams: Annotated[int, Option(help="Search for the most probable text with so many beams.")] = 0,
    json_schema: Annotated[
        str | None, Option(metavar="FILE|JSON", help="The text is JSON that fits this schema.")
    ] = None,
    regex: Annotated[str | None, Option(help="The text matches this pattern.")] = None,
    choice: Annotated[list[str] | None, Option(help="The text is this, or another choice.")] = None,
    draft: options.Draft = None,
    precision: options.Precision = None,
    stage: options.Stage = None,
    as_json: options.Json = False,
) -> None:
    """Continue a text, streaming: of a run, with its base model unless --model names another."""
    from groundup.cli.chat import printable
    from groundup.generation import beam_search, text_request

    if prompt is None and sys.stdin.isatty():
        example = command_line("generate", "runs/demo", "Once upon a time")
        raise GroundupError("no prompt.", f"Give one: {example}")
    text = sys.stdin.read().rstrip("\n") if prompt is None else _as_text(prompt)
    network, tokenizer, folder = load_model(model, stage, to_chat=False)
    drawn = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "stop": tuple(stop or ()) or None,
        "min_p": min_p, "repetition_penalty": repetition_penalty,
    }  # fmt: skip
    constraint = _constraint(json_schema, regex, choice)
    params = _params(model, **drawn, max_tokens=max_tokens, n=samples, constraint=constraint)
    request = text_request(network, tokenizer, text, params)
    if beams:
        forms = {"json_schema": json_schema, "regex": regex, "choice": choice}
        others = {**drawn, **forms, "draft": draft, "precision": precision}
        if given := [f"--{name.replace('_', '-')}" for name, value in others.items() if value not in (None, [])]:
            raise GroundupError(f"--beams searches for the most probable text: {', '.join(given)} would do nothing.")
        results = beam_search(network, tokenizer, request.ids, n_beams=beams, max_tokens=params.max_tokens)[:samples]
    else:
        length = len(request.ids) + params.max_tokens
        engine = make_engine(model, network, tokenizer, draft, precision, slots=samples, length=length)
        if samples == 1 and not as_json:
            typer.echo(text, nl=False)
            for chunk in engine.stream(request):
                # A terminal would obey control characters; a file gets them as they are.
                typer.echo(printable(chunk.text) if sys.stdout.isatty() else chunk.text, nl=False)
            typer.echo()
            return
        results = engine.run([request])[0]
    if as_json:
        found = [{"text": one.text, "finish_reason": one.finish_reason, "n_tokens": one.n_tokens} for one in results]
        print_json({"prompt": text, **found[0], "model": str(folder)} | ({"samples": found} if samples > 1 else {}))
        return
    for one in results:
        typer.echo(text + (printable(one.text) if sys.stdout.isatty() else one.text))


@app.command(
    rich_help_panel=options.USE,
    epilog="Examples:  groundup chat runs/demo  ·  groundup chat runs/demo --temperature 0  ·  "
    'groundup chat runs/demo --say "What is the capital of France?"',
)
def chat(
    model: Annotated[
        Path | None, Argument(metavar="MODEL", help="A run's folder, or a model's folder; none with --url.")
    ] = None,
    url: Annotated[str | None, Option(metavar="URL", help="Talk to a running server: http://127.0.0.1:8000")] = None,
    api_key: Annotated[str | None, Option(envvar="GROUNDUP_API_KEY", help="That the server of --url wants.")] = None,
    system: Annotated[str | None, Option(help="What the assistant is told first.")] = None,
    say: Annotated[str | None, Option(help="One message; print the answer and leave.")] = None,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    max_tokens: MaxTokensOption = None,
    seed: SeedOption = None,
    draft: options.Draft = None,
    precision: options.Precision = None,
    stage: options.Stage = None,
    as_json: options.Json = False,
) -> None:
    """Talk to the assistant, streaming. Ctrl-C stops an answer, Ctrl-D leaves; /help lists the commands."""
    from groundup.cli.chat import Chat, Local
    from groundup.serving.client import Remote
    from groundup.stage import is_assistant, models_there

    if (model is None) == (url is None):
        example = command_line("chat", "runs/demo")
        raise GroundupError("chat needs a model, or --url of a server, and not both.", f"For example: {example}")
    partner: Local | Remote
    if model is None:
        if draft is not None or precision is not None:
            raise GroundupError("--draft and --precision are the server's to choose: give them to groundup serve.")
        partner = Remote(url or "", api_key, stage)
    else:

        def load(name: str | None) -> tuple[Engine, Path]:
            network, tokenizer, folder = load_model(model, name, to_chat=True)
            if not is_assistant(folder):
                typer.echo("note: this model was not taught to answer; it only continues text.", err=True)
            return make_engine(model, network, tokenizer, draft, precision, slots=1), folder

        engine, folder = load(stage)
        partner = Local(str(folder), engine, model, lambda name: load(name)[0], models_there(model))
    params = _params(
        model or Path(), temperature=temperature, top_k=top_k, top_p=top_p, max_tokens=max_tokens, seed=seed
    )
    talk = Chat(partner, params, system=_as_text(system) if system else None)
    if say is None:
        talk.run()
        return
    say = _as_text(say)
    answer = talk.answer(say, echo=not as_json)
    if as_json:
        print_json({"message": say, "answer": answer, "model": partner.name})


@app.command(
    rich_help_panel=options.USE,
    epilog="Examples:  groundup serve runs/demo --open  ·  groundup serve runs/demo -m sft -m pretrain  ·  "
    "groundup serve runs/demo small=exports/llama --port 8080  ·  "
    "GROUNDUP_API_KEY=… groundup serve runs/demo --host 0.0.0.0  ·  "
    'curl http://127.0.0.1:8000/v1/completions -d \'{"prompt": "Once"}\' -H "Content-Type: application/json"',
)
def serve(
    models: Annotated[
        list[str], Argument(metavar="RUN|FOLDER|NAME=FOLDER…", help="Runs and models' folders, all served at once.")
    ],
    host: Annotated[
        str, Option(help="The address to listen on; others than this machine's own need a key.")
    ] = "127.0.0.1",
    port: Annotated[int, Option("--port", "-p", help="0: any that is free.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        Option(
            envvar="GROUNDUP_API_KEY",
            help="What clients must send; may be given often. In the environment variable no other user of this "
            "machine can read it.",
        ),
    ] = None,
    insecure: Annotated[bool, Option("--insecure", help="Listen on any address without a key.")] = False,
    allow_host: Annotated[
        list[str] | None,
        Option(
            metavar="NAME",
            help="A name by which browsers may call this server, beside localhost and addresses; may be given often.",
        ),
    ] = None,
    stage: Annotated[
        list[str] | None,
        Option("--model", "-m", metavar="STAGE", help="Of the runs: only these stages' models (default: all)."),
    ] = None,
    slots: Annotated[int, Option(min=1, help="Most texts of a model that are written at once.")] = 16,
    draft: options.Draft = None,
    precision: options.Precision = None,
    rate_limit: Annotated[int | None, Option(min=1, metavar="N", help="Most requests a minute of one key.")] = None,
    timeout: Annotated[float, Option(min=1, help="Most seconds for an answer.")] = 600,
    drain: Annotated[float, Option(min=0, help="Seconds that answers have to finish once the server is stopped.")] = 30,
    open_page: Annotated[bool, Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Serve models over HTTP: an OpenAI-compatible API, and a page. Ctrl-C or SIGTERM finishes what was begun."""
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


def _params(model: Path, **given: Any) -> SamplingParams:
    """What was given on the command line, and else what the run's own [generate] section says, or the defaults."""
    from groundup.generation import SamplingParams
    from groundup.run import RECIPE_FILE, Run

    around = next((at for at in (model, *model.resolve().parents[:2]) if (at / RECIPE_FILE).is_file()), None)
    settings = GenerateSettings() if around is None else Run(around).outline.generate
    defaults = settings.model_dump(include={"temperature", "top_k", "top_p", "max_tokens"})
    return SamplingParams(**defaults | {name: value for name, value in given.items() if value is not None})


def _constraint(json_schema: str | None, regex: str | None, choice: list[str] | None) -> Constraint | None:
    from groundup.generation import Constraint

    given = [
        name for name, value in (("--json-schema", json_schema), ("--regex", regex), ("--choice", choice)) if value
    ]
    if len(given) > 1:
        raise GroundupError(f"{' and '.join(given)}: a text can be one of them.", "Keep one.")
    if json_schema is not None:
        is_path = not json_schema.lstrip().startswith("{")
        return Constraint.json_schema(
            read_bytes(Path(json_schema)).decode("utf-8", "replace") if is_path else json_schema
        )
    if regex is not None:
        return Constraint.regex(regex)
    return Constraint.choices(choice) if choice else None


def make_engine(
    path: Path, model: Transformer, tokenizer: Tokenizer, draft: str | None, precision: str | None, **sizes: Any
) -> Engine:
    """An engine as --draft and --precision ask for it; why it is slow, where PyTorch alone makes the tokens, is said.

    Args:
        path: the model as it was named; a draft that is a stage is one of the same run.
        model: it, loaded.
        tokenizer: of it.
        draft: what --draft says.
        precision: what --precision says.
        sizes: of the engine.
    """
    import torch

    from groundup.generation import Engine

    known = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if precision not in known:
        raise GroundupError(f"--precision {precision}: must be float32 or bfloat16.")
    engine = Engine(model, tokenizer, dtype=known[precision], draft=_draft(path, draft), **sizes)
    if engine.why_slow is not None:
        typer.echo(f"note: tokens are made by PyTorch alone, more slowly: {engine.why_slow}", err=True)
    return engine


def _draft(model: Path, draft: str | None) -> Literal["ngrams"] | int | Transformer | None:
    """What --draft says; a stage is one of the model's own run."""
    from groundup.interop import load
    from groundup.stage import models_there

    if draft is None or draft == "ngrams":
        return "ngrams" if draft else None
    if draft.isdigit():
        return int(draft)
    return (load(model, stage=draft) if draft in models_there(model) else load(draft)).model


def _as_text(argument: str) -> str:
    """An argument as text: bytes of it that are not UTF-8 become U+FFFD."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def load_model(path: Path, stage: str | None, *, to_chat: bool) -> tuple[Transformer, Tokenizer, Path]:
    """A model, its tokenizer and folder; of a run without a stage, which model that is is said."""
    from groundup.interop import load
    from groundup.run import RECIPE_FILE, Run
    from groundup.stage import default_model

    if stage is None and (path / RECIPE_FILE).is_file():
        recipe = Run(path).outline
        if to_chat or not recipe.has_trunk:
            recipe = Run(path).recipe
        stage, why = default_model(recipe, to_chat=to_chat)
        typer.echo(f"model: {path / stage} ({why}; --model STAGE takes another)", err=True)
    loaded = load(path, stage=stage)
    if loaded.tokenizer is None:
        what = f"{loaded.folder}: this model has no tokenizer beside it."
        raise ArtifactError(what, "Copy its tokenizer.json there.")
    return loaded.model, loaded.tokenizer, loaded.folder


def read_models(
    paths: list[str], stages: list[str] | None, slots: int, draft: str | None, precision: str | None
) -> tuple[list[ServedModel], Path | None]:
    """The models, each with an engine, and the run that the first ones are of, which may have none yet."""
    from groundup.run import RECIPE_FILE
    from groundup.serving.state import ServedModel
    from groundup.stage import models_there

    found: list[tuple[str, Path, str | None]] = []
    run: Path | None = None
    for given in paths:
        name, _, rest = given.partition("=")
        is_named = bool(rest) and not Path(given).exists()
        path = Path(rest if is_named else given)
        if is_named or not (path / RECIPE_FILE).is_file():
            found.append((name if is_named else path.resolve().name, path, None))
            continue
        run, made = run or path, models_there(path)
        if unknown := sorted({*(stages or ())} - {*made}):
            raise ArtifactError(f"{path}: no model of a stage {unknown[0]!r} here.", f"Its models: {', '.join(made)}.")
        found += [(one, path, one) for one in made if not stages or one in stages]
    names = [name for name, *_ in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        fix = f"Name one of them: {command_line('serve', 'NAME=FOLDER')}"
        raise GroundupError(f"two models are called {twice}.", fix)
    served = []
    for name, path, stage in found:
        model, tokenizer, folder = load_model(path, stage, to_chat=True)
        served.append(ServedModel(name, make_engine(path, model, tokenizer, draft, precision, slots=slots), folder))
    return served, run


def _log() -> None:
    """One line for each request, to standard error."""
    import logging

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for name in ("groundup.serving", "uvicorn.error"):
        logging.getLogger(name).addHandler(handler)
    logging.getLogger("groundup.serving").setLevel(logging.INFO)
