"""`groundup plan` against what happens: seconds and peak memory of real runs, each in processes of its own.

For each row the plan is asked how many tokens fit into a time, its probe included; then `groundup pretrain` does that
run. Compared are the stage's seconds with the time that was asked for, and the process's peak resident set with the
plan's. Wanted: ±25 % and ±15 %. About ten minutes on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import write_result

TIME, MEMORY = 0.25, 0.15
"""Errors that are allowed, as shares of what was measured."""

RECIPE = """
name = "plan"
[corpus]
inputs = ["groundup:classics"]
dedup = "exact"
[tokenizer]
vocab_size = 4_096
[model]
size = "{size}"
context_length = 512
[pretrain]
tokens = {tokens}
eval_tokens = 4_000
sample_tokens = 16
compile = false
{settings}
"""

KIND = "activation_checkpointing"
ROWS: list[tuple[str, dict[str, Any]]] = [
    ("500k", {"batch_size": 16, "sequence_length": 256, "precision": "bfloat16"}),
    ("1m", {"batch_size": 16, "sequence_length": 256, "precision": "float32"}),
    ("1m", {"batch_size": 32, "sequence_length": 128, "precision": "bfloat16"}),
    ("3m", {"batch_size": 16, "sequence_length": 256, "precision": "bfloat16", KIND: "selective"}),
    ("3m", {"batch_size": 32, "sequence_length": 256, "precision": "bfloat16", KIND: "full"}),
    ("10m", {"batch_size": 8, "sequence_length": 512, "precision": "bfloat16"}),
    ("10m", {"batch_size": 4, "sequence_length": 512, "precision": "float32", "optimizer": "adamw", "lr": 1e-3}),
    ("10m", {"batch_size": 16, "micro_batch_size": 4, "sequence_length": 256, "precision": "bfloat16", "ema": 0.99}),
    ("30m", {"batch_size": 4, "sequence_length": 256, "precision": "bfloat16"}),
    ("30m", {"batch_size": 2, "sequence_length": 512, "precision": "float32", KIND: "full"}),
]  # fmt: skip


def main() -> None:
    """Run the rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=35.0, help="of each run")
    parser.add_argument("--rows", type=int, nargs="*", help="only these (0, 1, …); nothing is recorded then")
    arguments = parser.parse_args()
    chosen = [ROWS[index] for index in arguments.rows] if arguments.rows else ROWS
    found = []
    with tempfile.TemporaryDirectory(prefix="groundup-plan-") as folder:
        work = Path(folder)
        write_recipe(work, "1m", 10_000, {})
        command("shards", str(work / "plan.toml"), "--runs", str(work / "prepared"), "--quiet")
        print("| run | seconds: plan | real | error | MiB: plan | real | error |")
        print("|---|---|---|---|---|---|---|")
        for size, settings in chosen:
            row = compare(work, size, settings, arguments.seconds)
            found.append(row)
            print(
                f"| {row['run']} | {row['seconds']['plan']:.1f} | {row['seconds']['real']:.1f} "
                f"| {row['seconds']['error']:+.0%} | {row['bytes']['plan'] / 2**20:,.0f} "
                f"| {row['bytes']['real'] / 2**20:,.0f} | {row['bytes']['error']:+.0%} |",
                flush=True,
            )
    good_time = sum(abs(row["seconds"]["error"]) <= TIME for row in found)
    good_memory = sum(abs(row["bytes"]["error"]) <= MEMORY for row in found)
    print(f"\nwithin ±{TIME:.0%} of the time: {good_time} of {len(found)}; ±{MEMORY:.0%} of memory: {good_memory}")
    if not arguments.rows:
        write_result(
            "plan",
            {
                "allowed": {"time": TIME, "memory": MEMORY},
                "within": {"time": good_time, "memory": good_memory, "n": len(found)},
                "rows": found,
            },
        )


def compare(work: Path, size: str, settings: dict[str, Any], seconds: float) -> dict[str, Any]:
    """One row: what the plan says, and what happens."""
    runs = work / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    shutil.copytree(work / "prepared", runs)
    write_recipe(work, size, 10_000, settings)
    options = ["--runs", str(runs), "--json"]
    planned, _ = command("plan", str(work / "plan.toml"), "--hours", str(seconds / 3600), *options)
    tokens = planned["training"]["tokens"]
    write_recipe(work, size, tokens, settings)
    made, peak = command("pretrain", str(work / "plan.toml"), *options, "--quiet")
    stage = made["stages"]["pretrain"]
    assert stage["summary"]["steps"] == planned["training"]["steps"]
    said = ", ".join(f"{name} {value}" for name, value in settings.items())
    return {
        "run": f"{size}: {said}",
        "parameters": planned["parameters"]["all"],
        "settings": settings,
        "tokens": tokens,
        "how": planned["time"]["how"],
        "seconds": error_of(planned["time"]["total_seconds"], stage["seconds"]),
        "bytes": error_of(planned["memory"]["total"], peak),
        "planned_seconds": planned["time"]["seconds"],
        "planned_bytes": planned["memory"]["parts"],
    }


def error_of(plan: float, real: float) -> dict[str, float]:
    """Both, and the error as a share of what is real."""
    return {"plan": plan, "real": real, "error": plan / real - 1}


def write_recipe(work: Path, size: str, tokens: int, settings: dict[str, Any]) -> None:
    """`plan.toml`: only [model] and [pretrain] differ, so that corpus, tokenizer and shards stand."""
    lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in settings.items())
    (work / "plan.toml").write_text(RECIPE.format(size=size, tokens=tokens, settings=lines), encoding="utf-8")


def command(*arguments: str) -> tuple[Any, int]:
    """Run `groundup`; its JSON if it prints any, and its peak resident set in bytes."""
    process = subprocess.Popen([sys.executable, "-m", "groundup", *arguments], stdout=subprocess.PIPE)
    assert process.stdout is not None
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"groundup {' '.join(arguments)}: exit code {process.returncode}")
    # What a child of this process has at least is what this process had when it was made.
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert usage.ru_maxrss > own, "the benchmark is larger than what it measures"
    return json.loads(out) if out.strip() else None, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
