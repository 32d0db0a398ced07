"""The scaling law of the demo's text, by `groundup scaling` as it comes, and a larger run that the law has not seen.

The sweep's runs are kept in a work folder, so that a stopped benchmark goes on. Losses do not depend on how busy the
machine is; seconds do, and are recorded only where all runs were trained in one go. Writes docs/scaling.svg.
"""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from record import write_result

import groundup as gu
from groundup.files import read_json, write_json
from groundup.training.scaling_law import COEFFICIENTS, ScalingLaw
from groundup.training.scaling_sweep import sweep_runs

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "scaling.svg"
AHEAD = (1, 10, 100)
CHECK_SIZE = "3m"
"""The next size of the line beyond the sweep's largest, on the largest budget."""
SHORT = {"sizes": ("200k", "500k", "1m"), "tokens": [10_000, 20_000, 40_000]}


def main() -> None:
    """Sweep, fit, check, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/scaling-benchmark"), help="where runs are kept")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--no-check", action="store_true", help="leave the larger run out")
    parser.add_argument("--short", action="store_true", help="a sweep of seconds, to see that it works; not recorded")
    arguments = parser.parse_args()
    recipe = gu.read_recipe(arguments.recipe)
    run = gu.build(recipe, arguments.work / "run", only=["shards"])
    out, shards = arguments.work / ("short" if arguments.short else "sweep"), run.folder("shards")
    is_fresh, start = not (out / "points").exists(), time.perf_counter()
    law = gu.scaling_sweep(recipe, shards, out=out, **(SHORT if arguments.short else {}))
    seconds = time.perf_counter() - start if is_fresh else None
    checked = None if arguments.no_check else check(recipe, shards, law, out)
    print(table(law, checked))
    if not arguments.short:
        shutil.copyfile(out / "scaling.svg", PICTURE)
        write_result("scaling", {"recipe": arguments.recipe, "seconds": seconds, **result(law), "check": checked})


def check(recipe: gu.Recipe, shards: Path, law: ScalingLaw, out: Path) -> dict[str, Any]:
    """Train a model beyond the sweep, and hold its loss against what the law said."""
    budget = max(point.n_tokens for point in law.points)
    vocab_size = gu.TokenShards.open(shards, "train").vocab_size
    (run,), _ = sweep_runs(recipe, [CHECK_SIZE], [budget], vocab_size)
    said = law.predict(run.n_parameters, budget)
    folder = out / "check" / run.name
    if not (folder / "done.json").is_file():
        model = gu.Transformer(run.config, seed=recipe.seed)
        summary = gu.pretrain(model, shards, run.settings, out=folder, seed=recipe.seed).summary
        write_json(folder / "done.json", {"loss": summary["val_loss"], "n_tokens": summary["tokens"]})
    measured = read_json(folder / "done.json")
    times = run.flops / max(point.flops for point in law.points)
    return {"n_parameters": run.n_parameters, **measured, "predicted": asdict(said), "compute_of_largest_run": times}


def result(law: ScalingLaw) -> dict[str, Any]:
    """The law in figures; its replicates stay in the work folder."""
    largest = max(point.flops for point in law.points)
    values = {name: value for name, value in law.to_dict().items() if name != "replicates"}
    return {**values, "compute_optimal": [asdict(law.compute_optimal(factor * largest)) for factor in AHEAD]}


def table(law: ScalingLaw, checked: dict[str, Any] | None) -> str:
    """The law as the manual shows it."""
    intervals = law.intervals()
    lines = ["| coefficient | value | 90 % interval |", "|---|---|---|"]
    for name in COEFFICIENTS:
        low, high = intervals[name]
        lines.append(f"| {name} | {getattr(law, name):.3g} | {low:.3g} to {high:.3g} |")
    lines += ["", f"n = {len(law.points)}, scatter {law.noise:.2%}, left out {law.left_out_error:.2%} (rms)"]
    if checked is not None:
        said = checked["predicted"]
        lines.append(
            f"{checked['n_parameters']:,} parameters, {checked['compute_of_largest_run']:.1f} times the compute of the "
            f"largest run: predicted {said['loss']:.3f} ({said['low']:.3f} to {said['high']:.3f}), "
            f"measured {checked['loss']:.3f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
