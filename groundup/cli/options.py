"""Options and arguments that several commands share, spelled once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

BUILD, PLAN, USE = "Build, stage by stage", "Plan", "Use a model"
LOOK, MODELS = "Look at runs, recipes and this machine", "Models in and out"
"""The parts of the list of commands."""

Recipe = Annotated[
    str, Argument(metavar="RECIPE", help="A recipe file, a run's folder, or a shipped recipe, such as demo.")
]
Run = Annotated[Path, Argument(metavar="RUN", help="A run's folder, such as runs/demo.")]
Model = Annotated[Path, Argument(metavar="MODEL", help="A run's folder, or a model's folder.")]
Set = Annotated[
    list[str] | None,
    Option("--set", "-s", metavar="SECTION.KEY=VALUE", help="Override one setting; may be given many times."),
]
Runs = Annotated[Path, Option(metavar="FOLDER", help="Where runs are kept.")]
Out = Annotated[
    Path | None, Option("--out", "-o", metavar="FOLDER", help="This run's folder (default: RUNS/NAME of the recipe).")
]
Smoke = Annotated[bool, Option("--smoke", help="The same pipeline in a fraction of the time, to see that it works.")]
DryRun = Annotated[bool, Option("--dry-run", help="Say what would be done, and do nothing.")]
Stage = Annotated[str | None, Option("--model", "-m", metavar="STAGE", help="Of a run: the stage whose model it is.")]
Draft = Annotated[
    str | None,
    Option(
        metavar="ngrams|N|MODEL",
        help="Guess the next tokens, for speed: what followed before, the model's first N blocks, or a smaller model "
        "(a stage of the run or a folder).",
    ),
]
Precision = Annotated[str | None, Option(metavar="float32|bfloat16", help="Of the arithmetic. Default: the model's.")]
Json = Annotated[bool, Option("--json", help="Print the result as JSON, for programs.")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="Show warnings and errors only.")]
