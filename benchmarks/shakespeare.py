"""Validation loss over wall-clock time of the shakespeare recipe, three minutes or (--long) twelve.

Prints the curve at the recipe's own validation passes, and says when each bound was passed. The clock counts
training and validation, not the few seconds of reading, tokenizing and importing before it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from record import write_result

BOUNDS = (1.88, 1.60, 1.55, 1.50, 1.47)


def main() -> None:
    """Run the recipe and write the curve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--long", action="store_true", help="the twelve-minute recipe, shakespeare-long")
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    recipe = "shakespeare-long" if arguments.long else "shakespeare"
    curves = [run(recipe, seed) for seed in range(1, arguments.seeds + 1)]
    write_result(recipe.replace("-", "_"), {"recipe": recipe, "n": len(curves), "curves": curves})
    for curve in curves:
        print(f"seed {curve['seed']}: best {curve['best']:.4f}, last {curve['points'][-1]['val_loss']:.4f}")
        print("  " + "  ".join(f"{p['seconds']:.0f}s {p['val_loss']:.3f}" for p in curve["points"]))


def run(recipe: str, seed: int) -> dict[str, object]:
    """One run's curve: seconds of training and validation loss in nats per character."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "groundup", "pretrain", recipe, "--runs", folder]
        subprocess.run([*command, "--set", f"seed={seed}", "--set", "pretrain.log_every=1"], check=True)
        stage = Path(folder) / recipe / "pretrain"
        clock = {line["step"]: line["seconds"] for line in read_lines(stage / "timings.jsonl")}
        points = [
            {"seconds": clock.get(line["step"], 0.0), "tokens": line["tokens"], "val_loss": line["val_loss"]}
            for line in read_lines(stage / "metrics.jsonl")
            if "val_loss" in line
        ]
        summary = json.loads((stage / "stage.json").read_text())["summary"]
    passed = {
        str(bound): next((point["seconds"] for point in points if point["val_loss"] <= bound), None) for bound in BOUNDS
    }
    best = min(point["val_loss"] for point in points)
    return {"seed": seed, "best": best, "seconds_to": passed, "points": points, "summary": summary}


def read_lines(path: Path) -> list[dict[str, float]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
