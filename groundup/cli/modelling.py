"""Commands that look at models before anything is trained: `groundup model list` and `groundup model describe`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from groundup.cli.options import JsonOption, command_line, print_json, print_table

if TYPE_CHECKING:
    from groundup.model import ModelConfig
    from groundup.model.ladder import Choice

model_app = typer.Typer(help="Look at model shapes: what there is, what they are made of, what they cost.")
FieldOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="FIELD=VALUE", help="Change one field of the shape; may be given many times."),
]


def add_to(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.add_typer(model_app, name="model", no_args_is_help=True, rich_help_panel="Models in and out")


@model_app.command("list", epilog="Examples:  groundup model list  ·  groundup model list --json")
def list_models(as_json: JsonOption = False) -> None:
    """The presets, with their sizes."""
    from groundup.model import count_parameters, preset, preset_names

    configs = {name: preset(name) for name in preset_names()}
    if as_json:
        print_json(
            [{"name": name, "parameters": count_parameters(one), **one.to_dict()} for name, one in configs.items()]
        )
        return
    columns = ("preset", "parameters", "layers", "width", "heads", "key heads", "feed-forward", "vocabulary", "context")
    rows = []
    for name, config in configs.items():
        inner = f"{config.n_experts} × {config.d_ff:,}" if config.n_experts else f"{config.d_ff:,}"
        numbers = (count_parameters(config), config.n_layers, config.d_model, config.n_heads, config.n_kv_heads)
        last = (inner, f"{config.vocab_size:,}", f"{config.context_length:,}")
        rows.append((name, *(f"{number:,}" for number in numbers), *last))
    print_table(columns, rows, right=range(1, len(columns)))
    typer.echo(f"\nAny size between:  {command_line('model', 'describe', '30m')}")


@model_app.command(
    "describe",
    epilog="Examples:  groundup model describe gpt2  ·  groundup model describe 30m  ·  groundup model describe "
    "runs/demo  ·  groundup model describe llama-3.1-8b --length 8192 --set vocab_size=32768",
)
def describe(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A preset, a size such as 30m, depth=12, a run or a model's folder.")
    ],
    settings: FieldOption = None,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Rows in a forward pass.")] = 1,
    length: Annotated[int | None, typer.Option("--length", "-l", min=1, help="Tokens in a row [context].")] = None,
    as_json: JsonOption = False,
) -> None:
    """A model's parts, the shapes of its parameters, and what it costs: parameters, FLOPs, bytes."""
    from groundup.model import describe as page

    config, reasons = _find(model, _fields(settings or []))
    if as_json:
        told = [{"setting": one.name, "value": one.value, "reason": one.reason} for one in reasons]
        print_json({"model": model, **page.to_json(config, batch, length), **({"derived": told} if told else {})})
        return
    n_tokens = length or config.context_length
    counted = page.costs(config, batch, length)
    typer.echo(f"{model}: {counted['parameters']['all']:,} parameters\n")
    print_table(("part", "what it is"), page.parts_in_words(config).items())
    typer.echo()
    groups = [
        (group.name, " × ".join(f"{side:,}" for side in group.shape), f"{group.count:,}", f"{group.n_parameters:,}")
        for group in page.parameter_groups(config)
    ]
    print_table(("parameter", "shape", "how many", "parameters"), groups, right=(2, 3))
    rows = "a row" if batch == 1 else f"{batch} rows"
    titles = {
        "parameters": "parameters",
        "flops": f"FLOPs, {rows} of {n_tokens:,} tokens",
        "bytes": f"memory, {rows} of {n_tokens:,} tokens",
    }
    for kind, title in titles.items():
        typer.echo()
        lines = [(name, f"{value:,}", _short(value, kind)) for name, value in counted[kind].items()]
        print_table((title, "", ""), lines, right=(1, 2))
    if reasons:
        typer.echo()
        derived = ((choice.name, str(choice.value), choice.reason) for choice in reasons)
        print_table(("follows from the size", "", "why"), derived, right=(1,))


def _find(model: str, fields: dict[str, Any]) -> tuple[ModelConfig, list[Choice]]:
    """The configuration that is meant, and what was derived with its reasons."""
    from groundup.model import ladder_config, preset, preset_names, reshaped
    from groundup.model.ladder import shape_choices, training_choices

    depth = re.fullmatch(r"depth=(\d+)", model)
    if depth is not None or (re.fullmatch(r"\d[\d_.]*[kmbKMB]?", model) and not Path(model).exists()):
        start: dict[str, Any] = {"depth": int(depth[1])} if depth is not None else {"size": model}
        config = ladder_config(**start, **fields)
        asked = f"depth {depth[1]}" if depth is not None else f"size {model}"
        changed = {f"model.{name}" for name in fields}
        derived = [*shape_choices(config, asked), *training_choices(config)]
        return config, [choice for choice in derived if choice.name not in changed]
    if model not in preset_names() and Path(model).exists():
        # Imported here: reading folders takes libraries that presets do not need.
        from groundup.interop import find_model
        from groundup.interop.stored import open_stored

        return reshaped(open_stored(find_model(model)).config.to_dict(), fields), []
    return preset(model, **fields), []


def _fields(settings: list[str]) -> dict[str, Any]:
    """The fields that are changed, each of its type and in its range, as in `[model]` of a recipe."""
    from groundup.errors import Problem, RecipeError
    from groundup.recipe import parse_recipe

    found: dict[str, Any] = {}
    of_model = []
    for item in settings:
        name, equals, value = (part.strip() for part in item.partition("="))
        name = name.removeprefix("model.")
        if not equals or not name:
            problem = Problem(f"--set {item}", "is not of the form field=value.")
        elif name in ("preset", "size", "depth"):
            problem = Problem(f"--set {item}", "is a whole shape.", f"Say it so:  groundup model describe {value}")
        elif name == "vocab_size" and not (value.replace("_", "").isdecimal() and int(value) > 0):
            problem = Problem(f"--set {item}", "is no number of tokens.")
        elif name == "vocab_size":
            found[name] = int(value)
            continue
        else:
            of_model.append(f"model.{name}={value}")
            continue
        raise RecipeError("command line", [problem])
    return found | parse_recipe("", "command line", of_model).model.overrides()


def _short(value: int, kind: str) -> str:
    """1,234,567,890 as 1.23 G, or 1.15 GiB."""
    step = 1024 if kind == "bytes" else 1000
    number, unit = float(value), ""
    for larger in "KMGTP":
        if number < step:
            break
        number, unit = number / step, larger
    return f"{number:.3g} {unit}" + ("" if kind != "bytes" else "iB" if unit else "B")
