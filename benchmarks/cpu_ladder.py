"""What each trick pays in a training step on a CPU: one change a row, every row in a process of its own, interleaved.

The last two rows run beside a program that keeps one core busy, which is what a shared machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any

from record import spread, write_result

SLICED: dict[str, Any] = {"sliced": True}
BFLOAT16 = {**SLICED, "precision": "bfloat16"}
PRODUCTS = {**BFLOAT16, "products": True}
FUSED = {**PRODUCTS, "fused": True}
KEPT = {**FUSED, "keep": True}
COMPILED = {**KEPT, "compile": True}
ROWS: dict[str, dict[str, Any]] = {
    "float32, all logits at once, AdamW op by op": {},
    "+ the loss in slices, logits never held": SLICED,
    "+ bfloat16": BFLOAT16,
    "+ attention by products": PRODUCTS,
    "+ AdamW in one pass": FUSED,
    "+ freed memory is kept": KEPT,
    "+ blocks compiled": COMPILED,
    "the same beside a busy program": {**COMPILED, "busy": True, "spin": True},
    "+ waiting threads spin briefly, then sleep": {**COMPILED, "busy": True},
}
SIZES: dict[str, dict[str, int]] = {
    "1m": {"vocab_size": 1024, "n_layers": 4, "n_heads": 4, "d_model": 128, "d_ff": 344, "rows": 16},
    "14m": {"vocab_size": 8192, "n_layers": 6, "n_heads": 6, "d_model": 384, "d_ff": 1024, "rows": 8},
}
LENGTH, STEPS = 256, 8


def main() -> None:
    """Run the rows in turn for some rounds, and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(json.loads(arguments.one))))
        return
    found = []
    for size in arguments.sizes:
        run({**COMPILED, "size": size})  # what is compiled once stays so
        seconds: dict[str, list[float]] = {name: [] for name in ROWS}
        for _ in range(arguments.rounds):
            for name, row in ROWS.items():
                seconds[name].append(run({**row, "size": size}))
        first = spread(seconds[next(iter(ROWS))])["median"]
        rows = [
            {"row": name, "seconds_per_step": spread(values), "speed_over_first": first / spread(values)["median"]}
            for name, values in seconds.items()
        ]
        found.append({"size": size, "shape": SIZES[size], "length": LENGTH, "rows": rows})
        for row in rows:
            print(f"| {size} | {row['row']} | {1000 * row['seconds_per_step']['median']:.0f} "
                  f"| {row['speed_over_first']:.2f}× |")  # fmt: skip
    write_result("cpu_ladder", {"sizes": found})


def run(row: dict[str, Any]) -> float:
    """One row in a fresh process, beside a busy program where the row says so."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    if not row.get("spin"):
        environment["GOMP_SPINCOUNT"] = "10000"  # what the command line sets
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if row.get("busy") else None
    try:
        command = [sys.executable, __file__, "--one", json.dumps(row)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        return float(json.loads(done.stdout))
    finally:
        if busy is not None:
            busy.kill()
            busy.wait()


def measure(row: dict[str, Any]) -> float:
    """The median seconds of a training step."""
    import statistics
    import time

    import torch
    import torch.nn.functional as F

    from groundup.console import Console
    from groundup.environment import usable_cores
    from groundup.model import ModelConfig, Transformer, attention
    from groundup.recipe import OptimizerSettings
    from groundup.training import head_loss
    from groundup.training.compilation import CompiledBlocks
    from groundup.training.optimizers import Optimizers, clip_gradients
    from groundup.training.process import keep_freed_memory

    torch.set_num_threads(usable_cores())
    if row.get("keep"):
        keep_freed_memory()
    if not row.get("products"):
        attention.PRODUCTS_UP_TO = 0
    shape = dict(SIZES[row["size"]])
    n_rows = shape.pop("rows")
    heads = shape["n_heads"]
    config = ModelConfig(**shape, context_length=LENGTH, n_kv_heads=heads, head_dim=shape["d_model"] // heads,
                         tied_embeddings=True)  # fmt: skip
    model = Transformer(config)
    model.compute_dtype = torch.bfloat16 if row.get("precision") == "bfloat16" else torch.float32
    optimizers = Optimizers(model, OptimizerSettings(optimizer="adamw"), model.compute_dtype)
    if not row.get("fused"):
        (adamw,) = optimizers.all
        for group in adamw.param_groups:
            group |= {"fused": False, "foreach": False}
        adamw._step_supports_amp_scaling = False
    if row.get("compile"):
        CompiledBlocks(model, Console())
    ids = torch.randint(0, config.vocab_size, (n_rows, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    times = []
    for step in range(STEPS + 2):
        start = time.perf_counter()
        if row.get("sliced"):
            loss = model(inputs, head=head_loss(targets)).objective / targets.numel()
        else:
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        clip_gradients(optimizers.parameters(), 1.0)
        optimizers.step(1.0)
        if step >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
