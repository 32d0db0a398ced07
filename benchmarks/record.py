"""Writes a benchmark's result with the machine and the versions it was measured on."""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from groundup.environment import describe_environment

RESULTS = Path(__file__).resolve().parent / "results"


def write_result(name: str, values: dict[str, Any]) -> Path:
    """Write `results/NAME.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    head = {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%d"),
        "environment": describe_environment(),
        "load_average": os.getloadavg(),
    }
    path.write_text(json.dumps({**head, **values}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written: {path.relative_to(RESULTS.parent.parent)}")
    return path


def spread(values: list[float]) -> dict[str, float]:
    """n, median, least and most."""
    return {"n": len(values), "median": statistics.median(values), "min": min(values), "max": max(values)}
