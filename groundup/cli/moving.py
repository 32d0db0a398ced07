"""Commands that take a model in and give it out: `groundup import` and `groundup export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from groundup.cli.options import JsonOption, print_json

ForceOption = Annotated[bool, typer.Option("--force", help="Replace a model that is there already.")]


def add_to(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command(
        "import",
        rich_help_panel="Models in and out",
        epilog="Examples:  groundup import downloads/SmolLM2-135M models/smollm2  ·  "
        "groundup generate models/smollm2 'Once upon a time'",
    )(import_model)
    app.command(
        "export",
        rich_help_panel="Models in and out",
        epilog="Examples:  groundup export runs/demo demo-hf --to hf --dtype bf16  ·  "
        "groundup export runs/demo demo.gguf --to gguf --dtype q8_0",
    )(export_model)
    app.command(
        "quantize",
        rich_help_panel="Models in and out",
        epilog="Examples:  groundup quantize runs/demo demo-int8  ·  groundup quantize runs/demo demo-int4 --bits 4 · "
        "groundup quantize models/smollm2 smollm2-int4 --bits 4 --text mine.txt  ·  in a recipe: [quantize.int4]",
    )(quantize_model)


def import_model(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="A Hugging Face folder: GPT-2, GPT-Neo, Llama, Mistral, Qwen2, Qwen3 or Mixtral."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new model folder.")],
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a model folder of groundup's from a Hugging Face folder, checking every file of it.

    Nothing that is pickled is loaded, no code is run, and what groundup would compute otherwise is refused by name.
    """
    from groundup.interop import import_folder

    _tell(import_folder(folder, out, force=force), as_json)


def export_model(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A run's folder, or a model's folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new folder; with --to gguf, the new file.")],
    to: Annotated[
        Literal["hf", "gguf"], typer.Option("--to", help="hf: a folder for transformers. gguf: a file for llama.cpp.")
    ],
    dtype: Annotated[
        Literal["f32", "f16", "bf16", "q8_0", "q4_0"] | None,
        typer.Option(
            "--dtype",
            help="How weights are kept. hf: f32, f16, bf16 (default: as they are, quantized ones f32). "
            "gguf: f16; of a quantized model, its own kind.",
        ),
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="STAGE", help="Of a run: whose model (default: what chat takes)."),
    ] = None,
    shard_gb: Annotated[
        float, typer.Option("--shard-gb", metavar="GB", min=0.001, help="hf: most gigabytes of weights in one file.")
    ] = 5.0,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Give a model to other programs: a folder that transformers loads as it stands, or one GGUF file."""
    from groundup.errors import GroundupError

    if to == "gguf":
        from groundup.interop import load
        from groundup.interop.gguf import export_gguf

        if out.exists() and (out.is_dir() or not force):
            raise GroundupError(f"{out}: is there already.", "Name another file, or replace it with --force.")
        loaded = load(source, stage=stage)
        summary = export_gguf(loaded.model, loaded.tokenizer, out, dtype=dtype)
        summary["modelfile"] = str(_write_modelfile(loaded.folder, out))
        _tell({"file": str(out), **summary}, as_json)
        return
    from groundup.interop import export_folder

    if dtype in ("q8_0", "q4_0"):
        raise GroundupError(f"--dtype {dtype}: is for --to gguf.", "A folder has f32, f16 or bf16.")
    summary = export_folder(source, out, dtype=dtype, stage=stage, most_bytes=int(shard_gb * 1e9), force=force)
    if (card := _write_card(source, stage, out)) is not None:
        summary["card"] = str(card)
    _tell(summary, as_json)


def _write_card(source: Path, stage: str | None, out: Path) -> Path | None:
    """The card of a run's model, beside it."""
    from groundup.files import write_text
    from groundup.report.card import CARD, model_card, run_of
    from groundup.stage import find_model

    found = run_of(find_model(source, stage=stage))
    if found is None:
        return None
    write_text(out / CARD, model_card(*found, out.name))
    return out / CARD


def _write_modelfile(model: Path, out: Path) -> Path:
    """Ollama's description of a GGUF file, beside it."""
    from groundup.files import write_text
    from groundup.report.card import modelfile, run_of

    found = run_of(model)
    recipe = found[0].recipe if found is not None else None
    can_chat = found is None or found[1] != "pretrain"
    path = out.with_name("Modelfile")
    write_text(path, modelfile(out.name, can_chat=can_chat, temperature=recipe.generate.temperature if recipe else 0.7))
    return path


def quantize_model(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A run's folder, or a model's folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new model folder.")],
    bits: Annotated[int, typer.Option("--bits", "-b", help="Of a weight: 8 or 4.")] = 8,
    method: Annotated[
        Literal["rtn", "gptq"] | None,
        typer.Option("--method", help="rtn: to the nearest; gptq: by the text (default: gptq with 4 bits and a text)."),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option("--group-size", help="Inputs per scale (default: 32 with 4 bits, the row with 8).")
    ] = None,
    activations: Annotated[
        Literal["float", "int8"], typer.Option("--activations", help="int8: rounded, too (8 bits, on CPUs).")
    ] = "float",
    calibration: Annotated[int, typer.Option("--calibration", min=1, help="gptq: windows of the text.")] = 128,
    text: Annotated[
        Path | None,
        typer.Option("--text", help="A text file to calibrate and measure on (default: the run's own text)."),
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="STAGE", help="Of a run: whose model (default: what chat takes)."),
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Keep a model's weights in 8 or 4 bits, and say what that gains and costs: size, bits per byte, speed."""
    from groundup.alignment.quantization import file_text, in_words, quantize_and_measure, run_text
    from groundup.interop import load
    from groundup.interop.convert import check_new_folder
    from groundup.recipe import parse_recipe

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
