"""Commands that let a model write: `generate` and `chat`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from groundup.cli.options import JsonOption, command_line, print_json
from groundup.recipe.registry import TRUNK

if TYPE_CHECKING:
    import torch

    from groundup.cli.partners import Local
    from groundup.generation import Constraint, Engine, SamplingParams
    from groundup.model import Transformer
    from groundup.recipe import GenerateSettings
    from groundup.tokenizer import Tokenizer

ModelArgument = Annotated[Path, typer.Argument(metavar="MODEL", help="A run's folder, or a model's folder.")]
TemperatureOption = Annotated[
    float | None, typer.Option("--temperature", "-t", help="0: always the most probable token. Default: the recipe's.")
]
TopKOption = Annotated[int | None, typer.Option("--top-k", help="Draw among the k most probable tokens (0: all).")]
TopPOption = Annotated[float | None, typer.Option("--top-p", help="Draw among the tokens that hold this mass.")]
MaxTokensOption = Annotated[int | None, typer.Option("--max-tokens", "-n", help="Most tokens to write.")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="The same seed gives the same text.")]
MinPOption = Annotated[
    float | None, typer.Option("--min-p", help="Draw among tokens at least this share as probable as the best.")
]
PenaltyOption = Annotated[
    float | None,
    typer.Option("--repetition-penalty", help="Over 1: tokens that were there become less probable."),
]
DraftOption = Annotated[
    str | None,
    typer.Option(
        "--draft",
        metavar="ngrams|N|MODEL",
        help="Guess the next tokens, for speed: what followed before, the model's first N blocks, or a smaller model "
        "(a stage of the run or a folder).",
    ),
]
PrecisionOption = Annotated[
    str | None, typer.Option("--precision", metavar="float32|bfloat16", help="Of the arithmetic. Default: the model's.")
]
ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", metavar="STAGE", help="Of a run: the stage whose model it is.")
]
PANEL = "Use a model"


def add_to(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command(
        rich_help_panel=PANEL,
        epilog='Examples:  groundup generate runs/demo "Once upon a time"  ·  '
        "groundup generate runs/shakespeare ROMEO: -n 300 -t 0.8 --seed 7  ·  "
        "echo Once | groundup generate runs/demo  ·  "
        "groundup generate runs/demo Once --draft ngrams  ·  groundup generate runs/demo Yes: --choice yes --choice no",
    )(generate)
    app.command(
        rich_help_panel=PANEL,
        epilog="Examples:  groundup chat runs/demo  ·  groundup chat runs/demo --temperature 0  ·  "
        'groundup chat runs/demo --say "What is the capital of France?"',
    )(chat)


def generate(
    model: ModelArgument,
    prompt: Annotated[str | None, typer.Argument(help="The text to continue (default: standard input).")] = None,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    max_tokens: MaxTokensOption = None,
    seed: SeedOption = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Stop before this text; may be given often.")] = None,
    min_p: MinPOption = None,
    repetition_penalty: PenaltyOption = None,
    samples: Annotated[int, typer.Option("--samples", help="Write so many texts, one after the other.")] = 1,
    beams: Annotated[int, typer.Option("--beams", help="Search for the most probable text with so many beams.")] = 0,
    schema: Annotated[
        str | None, typer.Option("--json-schema", metavar="FILE|JSON", help="The text is JSON that fits this schema.")
    ] = None,
    regex: Annotated[str | None, typer.Option("--regex", help="The text matches this pattern.")] = None,
    choice: Annotated[list[str] | None, typer.Option("--choice", help="The text is this, or another choice.")] = None,
    draft: DraftOption = None,
    precision: PrecisionOption = None,
    stage: ModelOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a text, streaming: of a run, with its base model unless --model names another."""
    from groundup.cli.chat import printable
    from groundup.generation import Engine, beam_search, text_request

    text = _as_text(prompt) if prompt is not None else _standard_input()
    network, tokenizer, folder = load_model(model, stage, to_chat=False)
    params = _params(
        model, temperature=temperature, top_k=top_k, top_p=top_p, max_tokens=max_tokens, seed=seed,
        stop=tuple(stop or ()), min_p=min_p, repetition_penalty=repetition_penalty, n=samples,
        constraint=_constraint(schema, regex, choice),
    )  # fmt: skip
    request = text_request(network, tokenizer, text, params)
    if beams:
        _refuse_with_beams(
            temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=stop, min_p=min_p,
            repetition_penalty=repetition_penalty, json_schema=schema, regex=regex, choice=choice, draft=draft,
            precision=precision,
        )  # fmt: skip
        results = beam_search(network, tokenizer, request.ids, n_beams=beams, max_tokens=params.max_tokens)[:samples]
    else:
        engine = Engine(
            network, tokenizer, slots=samples, length=len(request.ids) + params.max_tokens, dtype=dtype_of(precision),
            draft=draft_model(model, draft),
        )  # fmt: skip
        say_why_slow(engine)
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


def chat(
    model: Annotated[
        Path | None, typer.Argument(metavar="MODEL", help="A run's folder, or a model's folder; none with --url.")
    ] = None,
    url: Annotated[
        str | None, typer.Option("--url", metavar="URL", help="Talk to a running server: http://127.0.0.1:8000")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="GROUNDUP_API_KEY", help="That the server of --url wants.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="What the assistant is told first.")] = None,
    say: Annotated[str | None, typer.Option("--say", help="One message; print the answer and leave.")] = None,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    max_tokens: MaxTokensOption = None,
    seed: SeedOption = None,
    draft: DraftOption = None,
    precision: PrecisionOption = None,
    stage: ModelOption = None,
    as_json: JsonOption = False,
) -> None:
    """Talk to the assistant, streaming. Ctrl-C stops an answer, Ctrl-D leaves; /help lists the commands."""
    from groundup.cli.chat import Chat
    from groundup.cli.partners import Partner
    from groundup.errors import GroundupError
    from groundup.serving.client import Remote

    if (model is None) == (url is None):
        example = command_line("chat", "runs/demo")
        raise GroundupError("chat needs a model, or --url of a server, and not both.", f"For example: {example}")
    partner: Partner
    if model is None:
        if draft is not None or precision is not None:
            raise GroundupError("--draft and --precision are the server's to choose: give them to groundup serve.")
        partner = Remote(url or "", api_key, stage)
    else:
        partner = _local(model, stage, draft, precision)
    place = model or Path()
    params = _params(place, temperature=temperature, top_k=top_k, top_p=top_p, max_tokens=max_tokens, seed=seed)
    talk = Chat(partner, params, system=_as_text(system) if system else None)
    if say is not None:
        say = _as_text(say)
        answer = talk.answer(say, echo=not as_json)
        if as_json:
            print_json({"message": say, "answer": answer, "model": partner.name})
        return
    talk.run()


def _local(path: Path, stage: str | None, draft: str | None, precision: str | None) -> Local:
    """A run's models, or the one of a folder, in this process."""
    from groundup.cli.partners import Local
    from groundup.generation import Engine
    from groundup.run import RECIPE_FILE, Run
    from groundup.stage import graph, language_models

    def load(name: str | None) -> tuple[Engine, Tokenizer, Path]:
        network, tokenizer, folder = load_model(path, name, to_chat=True)
        engine = Engine(network, tokenizer, slots=1, dtype=dtype_of(precision), draft=draft_model(path, draft))
        say_why_slow(engine)
        if folder.parent.name in TRUNK:
            typer.echo("note: this model was not taught to answer; it only continues text.", err=True)
        return engine, tokenizer, folder

    engine, tokenizer, folder = load(stage)
    if not (path / RECIPE_FILE).is_file():
        return Local(str(folder), engine, tokenizer, path)
    models = language_models(graph(Run(path).recipe))
    names = [one.name for one in models if (path / one.name / "model").is_dir()]
    return Local(str(folder), engine, tokenizer, path, lambda name: load(name)[:2], names)


def _standard_input() -> str:
    from groundup.errors import GroundupError

    if sys.stdin.isatty():
        example = command_line("generate", "runs/demo", "Once upon a time")
        raise GroundupError("no prompt.", f"Give one: {example}")
    return sys.stdin.read().rstrip("\n")


def _params(model: Path, **given: Any) -> SamplingParams:
    """What was given on the command line, and else what the run's own [generate] section says."""
    from groundup.generation import SamplingParams

    defaults = _defaults(model).model_dump(include={"temperature", "top_k", "top_p", "max_tokens"})
    return SamplingParams(**defaults | {name: value for name, value in given.items() if value is not None})


def _constraint(schema: str | None, regex: str | None, choices: list[str] | None) -> Constraint | None:
    from groundup.errors import GroundupError
    from groundup.generation import Constraint
    from groundup.untrusted import read_bytes

    given = [name for name, value in (("--json-schema", schema), ("--regex", regex), ("--choice", choices)) if value]
    if len(given) > 1:
        raise GroundupError(f"{' and '.join(given)}: a text can be one of them.", "Keep one.")
    if schema is not None:
        path = Path(schema)
        is_path = not schema.lstrip().startswith("{")
        return Constraint.json_schema(read_bytes(path).decode("utf-8", "replace") if is_path else schema)
    if regex is not None:
        return Constraint.regex(regex)
    return Constraint.choices(choices) if choices else None


def _refuse_with_beams(**options: object) -> None:
    from groundup.errors import GroundupError

    if given := [f"--{name.replace('_', '-')}" for name, value in options.items() if value not in (None, [])]:
        raise GroundupError(f"--beams searches for the most probable text: {', '.join(given)} would do nothing.")


def say_why_slow(engine: Engine) -> None:
    """A note, where PyTorch alone makes the tokens."""
    if engine.why_slow is not None:
        typer.echo(f"note: tokens are made by PyTorch alone, more slowly: {engine.why_slow}", err=True)


def dtype_of(precision: str | None) -> torch.dtype | None:
    """What --precision says."""
    import torch

    from groundup.errors import GroundupError

    known = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if precision not in known:
        raise GroundupError(f"--precision {precision}: must be float32 or bfloat16.")
    return known[precision]


def draft_model(model: Path, draft: str | None) -> Literal["ngrams"] | int | Transformer | None:
    """What --draft says; a stage is one of the model's own run."""
    from groundup.interop import load
    from groundup.run import RECIPE_FILE

    if draft is None or draft == "ngrams":
        return "ngrams" if draft else None
    if draft.isdigit():
        return int(draft)
    if (model / RECIPE_FILE).is_file() and Path(draft).name == draft and (model / draft).is_dir():
        return load(model, stage=draft).model
    return load(Path(draft)).model


def _as_text(argument: str) -> str:
    """An argument as text: bytes of it that are not UTF-8 become U+FFFD."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def load_model(path: Path, stage: str | None, *, to_chat: bool) -> tuple[Transformer, Tokenizer, Path]:
    """A model, its tokenizer and folder; of a run without a stage, which model that is is said."""
    from groundup.errors import ArtifactError
    from groundup.interop import load
    from groundup.run import RECIPE_FILE, Run
    from groundup.stage import default_model

    if stage is None and (path / RECIPE_FILE).is_file():
        stage, why = default_model(Run(path).recipe, to_chat=to_chat)
        typer.echo(f"model: {path / stage} ({why}; --model STAGE takes another)", err=True)
    loaded = load(path, stage=stage)
    if loaded.tokenizer is None:
        raise ArtifactError(
            f"{loaded.folder}: this model has no tokenizer beside it.", "Copy its tokenizer.json there."
        )
    return loaded.model, loaded.tokenizer, loaded.folder


def _defaults(path: Path) -> GenerateSettings:
    """The run's own [generate] section, or the defaults."""
    from groundup.recipe import GenerateSettings
    from groundup.run import RECIPE_FILE, Run

    for folder in (path, *path.resolve().parents[:2]):
        if (folder / RECIPE_FILE).is_file():
            return Run(folder).recipe.generate
    return GenerateSettings()
