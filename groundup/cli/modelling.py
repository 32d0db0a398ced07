"""Commands about models as files and shapes: `model list`, `model describe`, `import`, `export` and `quantize`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from groundup.cli import options
from groundup.cli.output import command_line, print_json, print_table
from groundup.errors import GroundupError, Problem, RecipeError
from groundup.files import check_signed
from groundup.recipe import parse_recipe

if TYPE_CHECKING:
    from groundup.model import ModelConfig
    from groundup.model.ladder import Choice

Source = Annotated[Path, Argument(metavar="SOURCE", help="A run's folder, or a model's folder.")]
OutFolder = Annotated[Path, Argument(metavar="OUT", help="The new model folder.")]
Stage = Annotated[
    str | None, Option("--model", "-m", metavar="STAGE", help="Of a run: whose model (default: what chat takes).")
]
Force = Annotated[bool, Option("--force", help="Replace a model that is there already.")]
app = typer.Typer()
model_app = typer.Typer(
    help="Look at model shapes: what there is, what they are made of, what they cost.", no_args_is_help=True
)
app.add_typer(model_app, name="model", rich_help_panel=options.MODELS)


@model_app.command("list", epilog="Examples:  groundup model list  ·  groundup model list --json")
def list_models(as_json: options.Json = False) -> None:
    """The presets, with their sizes."""
    from groundup.model import count_parameters, preset, preset_names

    configs = {name: (preset(name), count_parameters(preset(name))) for name in preset_names()}
    if as_json:
        print_json([{"name": name, "parameters": size, **one.to_dict()} for name, (one, size) in configs.items()])
        return
    columns = ("preset", "parameters", "layers", "width", "heads", "key heads", "feed-forward", "vocabulary", "context")
    rows = [
        (
            name, size, one.n_layers, one.d_model, one.n_heads, one.n_kv_heads,
            f"{one.n_experts} × {one.d_ff:,}" if one.n_experts else one.d_ff, one.vocab_size, one.context_length,
        )
        for name, (one, size) in configs.items()
    ]  # fmt: skip
    print_table(columns, rows)
    typer.echo(f"\nAny size between:  {command_line('model', 'describe', '30m')}")


@model_app.command(
    "describe",
    epilog="Examples:  groundup model describe gpt2  ·  groundup model describe 30m  ·  groundup model describe "
    "runs/demo  ·  groundup model describe llama-3.1-8b --length 8192 --set vocab_size=32768",
)
def describe(
    model: Annotated[
        str, Argument(metavar="MODEL", help="A preset, a size such as 30m, depth=12, a run or a model's folder.")
    ],
    settings: Annotated[
        list[str] | None,
        Option("--set", "-s", metavar="FIELD=VALUE", help="Change one field of the shape; may be given many times."),
    ] = None,
    batch: Annotated[int, Option("--batch", "-b", min=1, help="Rows in a forward pass.")] = 1,
    length: Annotated[int | None, Option("--length", "-l", min=1, help="Tokens in a row [context].")] = None,
    as_json: options.Json = False,
) -> None:
    """A model's parts, the shapes of its parameters, and what it costs: parameters, FLOPs, bytes."""
    from groundup.console import format_bytes, format_count
    from groundup.model import describe as page

    config, reasons = _find(model, _fields(settings or []))
    if as_json:
        told = [{"setting": one.name, "value": one.value, "reason": one.reason} for one in reasons]
        print_json({"model": model, **page.to_json(config, batch, length), **({"derived": told} if told else {})})
        return
    counted = page.costs(config, batch, length)
    groups = [
        (group.name, " × ".join(f"{side:,}" for side in group.shape), group.count, group.n_parameters)
        for group in page.parameter_groups(config)
    ]
    size = f"{'a row' if batch == 1 else f'{batch} rows'} of {length or config.context_length:,} tokens"
    titles: dict[str, tuple[str, Callable[[float], str]]] = {
        "parameters": ("parameters", format_count),
        "flops": (f"FLOPs, {size}", "{:.2e}".format),
        "bytes": (f"memory, {size}", format_bytes),
    }
    tables: list[tuple[tuple[str, ...], list[tuple[Any, ...]]]] = [
        (("part", "what it is"), [*page.parts_in_words(config).items()]),
        (("parameter", "shape", "how many", "parameters"), groups),
        *(
            ((title, "", ""), [(name, value, shown(value)) for name, value in counted[kind].items()])
            for kind, (title, shown) in titles.items()
        ),
        (("follows from the size", "", "why"), [(one.name, str(one.value), one.reason) for one in reasons]),
    ]
    typer.echo(f"{model}: {counted['parameters']['all']:,} parameters")
    for columns, rows in tables:
        if rows:
            typer.echo()
            print_table(columns, rows)


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


@app.command(
    "import",
    rich_help_panel=options.MODELS,
    epilog="Examples:  groundup import downloads/SmolLM2-135M models/smollm2  ·  "
    "groundup generate models/smollm2 'Once upon a time'",
)
def import_model(
    folder: Annotated[
        Path,
        Argument(
            metavar="FOLDER", help="A Hugging Face folder: GPT-2, GPT-Neo, Llama, Mistral, Qwen2, Qwen3 or Mixtral."
        ),
    ],
    out: OutFolder,
    force: Force = False,
    as_json: options.Json = False,
) -> None:
    """Make a model folder of groundup's from a Hugging Face folder, checking every file of it.

    Nothing that is pickled is loaded, no code is run, and what groundup would compute otherwise is refused by name.
    """
    from groundup.interop import import_folder

    _tell(import_folder(folder, out, force=force), as_json)


@app.command(
    "export",
    rich_help_panel=options.MODELS,
    epilog="Examples:  groundup export runs/demo demo-hf --to hf --dtype bf16  ·  "
    "groundup export runs/demo demo.gguf --to gguf --dtype q8_0",
)
def export_model(
    source: Source,
    out: Annotated[Path, Argument(metavar="OUT", help="The new folder; with --to gguf, the new file.")],
    to: Annotated[Literal["hf", "gguf"], Option(help="hf: a folder for transformers. gguf: a file for llama.cpp.")],
    dtype: Annotated[
        Literal["f32", "f16", "bf16", "q8_0", "q4_0"] | None,
        Option(
            help="How weights are kept. hf: f32, f16, bf16 (default: as they are, quantized ones f32). "
            "gguf: f16; of a quantized model, its own kind."
        ),
    ] = None,
    stage: Stage = None,
    shard_gb: Annotated[
        float, Option(metavar="GB", min=0.001, help="hf: most gigabytes of weights in one file.")
    ] = 5.0,
    force: Force = False,
    as_json: options.Json = False,
) -> None:
    """Give a model to other programs: a folder that transformers loads as it stands, or one GGUF file."""
    from groundup.interop import export_folder, load
    from groundup.report.card import MODELFILE, write_card, write_modelfile
    from groundup.stage import find_model

    if to == "gguf":
        from groundup.interop.gguf import export_gguf

        if out.exists() and (out.is_dir() or not force):
            raise GroundupError(f"{out}: is there already.", "Name another file, or replace it with --force.")
        check_signed(out.with_name(MODELFILE))  # before the model is written
        loaded = load(source, stage=stage)
        summary = {"file": str(out), **export_gguf(loaded.model, loaded.tokenizer, out, dtype=dtype)}
        summary["modelfile"] = str(write_modelfile(loaded.folder, out))
    elif dtype in ("q8_0", "q4_0"):
        raise GroundupError(f"--dtype {dtype}: is for --to gguf.", "A folder has f32, f16 or bf16.")
    else:
        summary = export_folder(source, out, dtype=dtype, stage=stage, most_bytes=int(shard_gb * 1e9), force=force)
        if (card := write_card(find_model(source, stage=stage), out)) is not None:
            summary["card"] = str(card)
    _tell(summary, as_json)


@app.command(
    "quantize",
    rich_help_panel=options.MODELS,
    epilog="Examples:  groundup quantize runs/demo demo-int8  ·  groundup quantize runs/demo demo-int4 --bits 4 · "
    "groundup quantize models/smollm2 smollm2-int4 --bits 4 --text mine.txt  ·  in a recipe: [quantize.int4]",
)
def quantize_model(
    source: Source,
    out: OutFolder,
    bits: Annotated[int, Option("--bits", "-b", help="Of a weight: 8 or 4.")] = 8,
    method: Annotated[
        Literal["rtn", "gptq"] | None,
        Option(help="rtn: to the nearest; gptq: by the text (default: gptq with 4 bits and a text)."),
    ] = None,
    group_size: Annotated[
        int | None, Option(help="Inputs per scale (default: 32 with 4 bits, the row with 8).")
    ] = None,
    activations: Annotated[Literal["float", "int8"], Option(help="int8: rounded, too (8 bits, on CPUs).")] = "float",
    calibration: Annotated[int, Option(min=1, help="gptq: windows of the text.")] = 128,
    text: Annotated[
        Path | None, Option(help="A text file to calibrate and measure on (default: the run's own text).")
    ] = None,
    stage: Stage = None,
    force: Force = False,
    as_json: options.Json = False,
) -> None:
    """Keep a model's weights in 8 or 4 bits, and say what that gains and costs: size, bits per byte, speed."""
    from groundup.alignment.quantization import file_text, in_words, quantize_and_measure, run_text
    from groundup.interop import load
    from groundup.interop.convert import check_new_folder

    asked = {"bits": bits, "method": method, "group_size": group_size, "activations": activations}
    given = [f"quantize.it.{name}={value}" for name, value in asked.items() if value is not None]
    settings = parse_recipe("", "command line", given).quantize["it"]
    check_new_folder(out, source, force=force)
    loaded = load(source, stage=stage)
    texts: list[str] = []
    windows = None
    if loaded.tokenizer is not None:
        shape = (calibration, loaded.model.config.context_length)
        if text is None:
            texts, windows = run_text(loaded.folder, loaded.tokenizer, shape)
        else:
            texts, windows = file_text(text, loaded.tokenizer, shape)
    figures = quantize_and_measure(loaded.model, loaded.tokenizer, settings, out, texts=texts, calibration=windows)
    if as_json:
        print_json({"folder": str(out), **figures})
        return
    for label, value in [("folder", str(out)), *in_words(figures)]:
        typer.echo(f"{label}: {value}")


def _tell(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(summary)
        return
    for name, value in summary.items():
        if value not in (None, [], {}):
            typer.echo(f"{name.replace('_', ' ')}: {_shown(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(one)}" for name, one in value.items())
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)
