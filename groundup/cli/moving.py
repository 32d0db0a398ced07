"""Commands that take a model in and give it out: `groundup import` and `groundup export`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from groundup.cli.options import JsonOption, print_json

ForceOption = Annotated[bool, typer.Option("--force", help="Replace a model that is there already.")]


class Target(StrEnum):
    """What can be exported to."""

    HF = "hf"
    GGUF = "gguf"


class Dtype(StrEnum):
    """How weights can be kept; the last two in GGUF only."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"


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
    to: Annotated[Target, typer.Option("--to", help="hf: a folder for transformers. gguf: a file for llama.cpp.")],
    dtype: Annotated[
        Dtype | None,
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

    if to is Target.GGUF:
        from groundup.interop import load
        from groundup.interop.gguf import GgufType, export_gguf

        if out.exists() and (out.is_dir() or not force):
            raise GroundupError(f"{out}: is there already.", "Name another file, or replace it with --force.")
        loaded = load(source, stage=stage)
        kept: GgufType | None = None if dtype is None else dtype.value
        summary = export_gguf(loaded.model, loaded.tokenizer, out, dtype=kept)
        _tell({"file": str(out), **summary}, as_json)
        return
    from groundup.interop import export_folder

    if dtype in (Dtype.Q8_0, Dtype.Q4_0):
        raise GroundupError(f"--dtype {dtype}: is for --to gguf.", "A folder has f32, f16 or bf16.")
    kind = None if dtype is None else dtype.value
    _tell(export_folder(source, out, dtype=kind, stage=stage, most_bytes=int(shard_gb * 1e9), force=force), as_json)


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
