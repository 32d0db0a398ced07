"""One recipe built with several seeds: each figure as a mean over the runs, with an interval.

In: a folder of finished runs, `seed-1/`, `seed-2/`, … Out: `seeds.json` beside them. A figure of one run has the error
bar of its sample; what another seed would have given, only other runs can say.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from groundup.errors import ArtifactError
from groundup.evaluation.sets import LABELS
from groundup.evaluation.table import compare
from groundup.files import read_json, write_json
from groundup.report.format import is_number
from groundup.run import Run
from groundup.stage import graph

SEEDS_FILE = "seeds.json"
LEVEL = 0.95


def seed_folder(root: Path, seed: int) -> Path:
    """Where the run of a seed is."""
    return root / f"seed-{seed}"


def write_seeds(root: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Write `seeds.json` of finished runs, and return what it holds.

    Returns:
        "seeds", and "rows": "key" of the metric, "model", "label", "mean", "low" and "high" of the 95 % interval (that
        of Student's t, which takes the runs for draws from a normal distribution), and "values", one for each seed.
    """
    found = {"seeds": list(seeds), "rows": over_seeds([Run(seed_folder(root, seed)) for seed in seeds])}
    write_json(root / SEEDS_FILE, found)
    return found


def over_seeds(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The rows that `write_seeds` writes, of two runs or more wherever they are."""
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    for run in runs:
        for place, value in _figures(run).items():
            values[place].append(value)
    return [
        {"key": key, "model": model, "label": f"{LABELS.get(key, key)}, {model}", **_interval(found), "values": found}
        for (key, model), found in values.items()
        if len(found) == len(runs)
    ]


def read_seeds(root: Path) -> dict[str, Any]:
    """What `write_seeds` wrote. Raises ArtifactError: it is not there, or damaged."""
    found = read_json(root / SEEDS_FILE)
    rows = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and _is_row(row) for row in rows):
        raise ArtifactError(f"{root / SEEDS_FILE}: is no table of figures.", "Make it again: groundup build … --seeds")
    return dict(found)


def _figures(run: Run) -> dict[tuple[str, str], float]:
    """The scores of a run's models, and what its stages measured of themselves."""
    recipe = run.recipe
    found = {(row["key"], row["model"]): row["after"]["value"] for row in compare(recipe, run)["rows"]}
    for name, stage in graph(recipe).items():
        summary = manifest.summary if (manifest := run.manifest(name)) else {}
        found |= {(key, name): summary[key] for key in stage.method.figures if is_number(summary.get(key))}
    return found


def _interval(values: Sequence[float]) -> Mapping[str, float]:
    mean, n = float(np.mean(values)), len(values)
    reach = float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return {"mean": mean, "low": mean - reach, "high": mean + reach}


def _is_row(row: Mapping[str, Any]) -> bool:
    values = row.get("values")
    return (
        {"key", "model"} <= row.keys() and isinstance(values, list) and len(values) > 1 and all(map(is_number, values))
    )
