"""A shipped recipe from nothing, with one seed or several: the closing table, seconds and peak memory of each stage.

With several seeds, each figure of each model is a mean over them with its 95 % interval, and what one seed alone would
have said stands beside it.

Examples:
    python benchmarks/demo.py
    python benchmarks/demo.py --recipe demo-full --seeds 1 2 3 --runs /tmp/demo-full    # goes on where it stopped
    python benchmarks/demo.py --recipe demo-full --smoke                                # nothing is recorded
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import write_result

from groundup.evaluation.seeds import over_seeds
from groundup.run import Run


def main() -> None:
    """Build as a user would, and write down what it gave."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--runs", type=Path, help="where the runs are kept (default: nowhere)")
    parser.add_argument("--smoke", action="store_true", help="the quick version of the recipe; nothing is recorded")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = arguments.runs or Path(folder)
        folders = [root / f"{arguments.recipe}-seed-{seed}" for seed in arguments.seeds]
        runs = [
            build(arguments.recipe, seed, run, arguments.smoke)
            for seed, run in zip(arguments.seeds, folders, strict=True)
        ]
        table = over_seeds([Run(run) for run in folders]) if len(runs) > 1 else []
    if table:
        show(table)
    if not arguments.smoke:
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        more = {"table": table, "runs": runs} if table else runs[0]
        result = {"recipe": arguments.recipe, "peak_memory_bytes": peak, **more}
        write_result(arguments.recipe.replace("-", "_"), result)


def build(recipe: str, seed: int, run: Path, smoke: bool) -> dict[str, Any]:
    """One run, and what its stages and its closing table say."""
    command = [sys.executable, "-m", "groundup", "build", recipe, "--out", str(run), "--set", f"seed={seed}"]
    start = time.perf_counter()
    done = subprocess.run([*command, *(["--smoke"] if smoke else [])], check=False)
    manifests = sorted(run.rglob("stage.json"))
    stages = {path.parent.relative_to(run).as_posix(): json.loads(path.read_text()) for path in manifests}
    scores = json.loads((run / "evaluate" / "scores.json").read_text())
    return {
        "seed": seed,
        "exit_code": done.returncode,
        "seconds": time.perf_counter() - start,
        "stages": {name: {"seconds": stage["seconds"], "summary": stage["summary"]} for name, stage in stages.items()},
        "rows": scores["rows"],
        "by_kind": scores["by_kind"],
        "gates": scores["gates"],
    }


def show(table: list[dict[str, Any]]) -> None:
    """Metrics down, models across."""
    models = list(dict.fromkeys(row["model"] for row in table))
    cells = {(row["key"], row["model"]): f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" for row in table}
    print(f"| | {' | '.join(models)} |\n|---|{'---|' * len(models)}")
    for metric in dict.fromkeys(row["key"] for row in table):
        print(f"| {metric} | {' | '.join(cells.get((metric, model), '') for model in models)} |")


if __name__ == "__main__":
    main()
