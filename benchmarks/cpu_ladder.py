"""What each trick pays in a training step on a CPU: one change a row, every row in a process of its own, interleaved.

The last two rows run beside a program that keeps one core busy, which is what a shared machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

from record import spread, write_result

ROWS = {
    "float32, torch's fused attention": {},
    "+ bfloat16": {"precision": "bfloat16"},
    "+ plain attention": {"precision": "bfloat16", "plain": True},
    "+ freed memory is kept": {"precision": "bfloat16", "plain": True, "keep": True},
    "the same beside a busy program": {
        "precision": "bfloat16",
        "plain": True,
        "keep": True,
        "busy": True,
        "spin": True,
    },
    "+ waiting threads spin briefly, then sleep": {"precision": "bfloat16", "plain": True, "keep": True, "busy": True},
}
STEPS = 8


def main() -> None:
    """Run the rows in turn for some rounds, and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(json.loads(arguments.one))))
        return
    seconds: dict[str, list[float]] = {name: [] for name in ROWS}
    for _ in range(arguments.rounds):
        for name, row in ROWS.items():
            seconds[name].append(run(row))
    first = spread(seconds["float32, torch's fused attention"])["median"]
    rows = []
    for name, values in seconds.items():
        found = spread(values)
        rows.append({"row": name, "seconds_per_step": found, "speed_over_first": first / found["median"]})
        print(f"| {name} | {1000 * found['median']:.0f} | {first / found['median']:.2f}× |")
    write_result("cpu_ladder", {"model": "ground-1m, 16 rows of 256 tokens, optimizer step included", "rows": rows})


def run(row: dict[str, object]) -> float:
    """One row in a fresh process, beside a busy program where the row says so."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    if not row.get("spin"):
        environment["GOMP_SPINCOUNT"] = "3000"  # what the command line sets
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if row.get("busy") else None
    try:
        command = [sys.executable, __file__, "--one", json.dumps(row)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return float(json.loads(done.stdout))
    finally:
        if busy is not None:
            busy.kill()
            busy.wait()


def measure(row: dict[str, object]) -> float:
    """The median seconds of a training step."""
    import statistics
    import time

    import torch

    from groundup.environment import usable_cores
    from groundup.model import Transformer, attention, preset
    from groundup.recipe import OptimizerSettings
    from groundup.training import head_loss
    from groundup.training.memory import keep_freed_memory
    from groundup.training.optimizers import Optimizers, clip_gradients

    torch.set_num_threads(usable_cores())
    if row.get("keep"):
        keep_freed_memory()
    if not row.get("plain"):
        attention.PRODUCTS_UP_TO = 0
    model = Transformer(preset("ground-1m"))
    model.compute_dtype = torch.bfloat16 if row.get("precision") == "bfloat16" else torch.float32
    optimizers = Optimizers(model, OptimizerSettings(), model.compute_dtype)
    ids = torch.randint(0, model.config.vocab_size, (16, 257), generator=torch.Generator().manual_seed(0))
    times = []
    for step in range(STEPS + 2):
        start = time.perf_counter()
        (model(ids[:, :-1], head=head_loss(ids[:, 1:])).objective / ids[:, 1:].numel()).backward()
        clip_gradients(optimizers.parameters(), 1.0, lambda values: values)
        optimizers.step(1.0)
        if step >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
