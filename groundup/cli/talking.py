"""Commands that let a model write: `generate` and `chat`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from groundup.cli.options import JsonOption, command_line, print_json
from groundup.recipe.registry import TRUNK

if TYPE_CHECKING:
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


ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", metavar="STAGE", help="Of a run: the stage whose model it is.")
]
PANEL = "Use a model"


def add_to(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command(
        rich_help_panel=PANEL,
        epilog='Examples:  groundup generate runs/demo "Once upon a time"  ·  '
        "groundup generate runs/shakespeare ROMEO: -n 300 -t 0.8 --seed 7  ·  echo Once | groundup generate runs/demo",
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
    stage: ModelOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a text, streaming: of a run, with its base model unless --model names another."""
    from groundup.cli.chat import printable
    from groundup.generation import generate as generate_text
    from groundup.generation import stream

    text = _as_text(prompt) if prompt is not None else _standard_input()
    network, tokenizer, folder = _load(model, stage, to_chat=False)
    defaults = _defaults(model)
    options: dict[str, Any] = {
        "max_tokens": max_tokens if max_tokens is not None else defaults.max_tokens,
        "temperature": temperature if temperature is not None else defaults.temperature,
        "top_k": top_k if top_k is not None else defaults.top_k,
        "top_p": top_p if top_p is not None else defaults.top_p,
        "seed": seed,
        "stop": tuple(stop or ()),
    }
    if as_json:
        result = generate_text(network, tokenizer, text, **options)
        print_json(
            {
                "prompt": text,
                "text": result.text,
                "finish_reason": result.finish_reason,
                "n_tokens": result.n_tokens,
                "model": str(folder),
            }
        )
        return
    pieces = stream(network, tokenizer, text, **options)
    typer.echo(text, nl=False)
    for piece in pieces:
        # A terminal would obey control characters; a file gets them as they are.
        typer.echo(printable(piece) if sys.stdout.isatty() else piece, nl=False)
    typer.echo()


def chat(
    model: ModelArgument,
    system: Annotated[str | None, typer.Option("--system", help="What the assistant is told first.")] = None,
    say: Annotated[str | None, typer.Option("--say", help="One message; print the answer and leave.")] = None,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    max_tokens: MaxTokensOption = None,
    seed: SeedOption = None,
    stage: ModelOption = None,
    as_json: JsonOption = False,
) -> None:
    """Talk to the assistant, streaming. Ctrl-C stops an answer, Ctrl-D leaves; /help lists the commands."""
    from groundup.cli.chat import Chat
    from groundup.generation import SamplingParams

    network, tokenizer, folder = _load(model, stage, to_chat=True)
    defaults = _defaults(model)
    params = SamplingParams(
        temperature=temperature if temperature is not None else defaults.temperature,
        top_k=top_k if top_k is not None else defaults.top_k,
        top_p=top_p if top_p is not None else defaults.top_p,
        max_tokens=max_tokens if max_tokens is not None else defaults.max_tokens,
        seed=seed,
    )
    talk = Chat(network, tokenizer, params, system=_as_text(system) if system else None)
    if folder.parent.name in TRUNK:
        typer.echo("note: this model was not taught to answer; it only continues text.", err=True)
    if say is not None:
        say = _as_text(say)
        answer = talk.answer(say, echo=not as_json)
        if as_json:
            print_json({"message": say, "answer": answer, "model": str(folder)})
        return
    talk.run(title=str(folder))


def _standard_input() -> str:
    from groundup.errors import GroundupError

    if sys.stdin.isatty():
        example = command_line("generate", "runs/demo", "Once upon a time")
        raise GroundupError("no prompt.", f"Give one: {example}")
    return sys.stdin.read().rstrip("\n")


def _as_text(argument: str) -> str:
    """An argument as text: bytes of it that are not UTF-8 become U+FFFD."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _load(path: Path, stage: str | None, *, to_chat: bool) -> tuple[Transformer, Tokenizer, Path]:
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
