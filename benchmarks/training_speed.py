"""Training steps per second beside nanoGPT's model in a plain loop, transformers and litgpt, interleaved in one run.

Every contestant is a process of its own that stays alive; they take turns, some steps each, so that a slow minute of
the machine is everybody's. Same shapes, same tokens a step; forward, backward, clipping and AdamW included. Peers run
at their defaults (float32, AdamW as the library makes it) and at their best: bfloat16 by autocast, torch.compile over
model and loss, fused AdamW. Groundup runs the same two models (GPT-2's shape and Llama's). litgpt has an environment
of its own, made here at the first run (`--make-environment` makes it and stops).

`--curves` trains one model three times from the same weights on the same text: groundup's best form, a plain loop in
float32, and that loop on the text in another order, which says what noise is.

Examples:
    python benchmarks/training_speed.py
    python benchmarks/training_speed.py --sizes 1m 14m --rounds 20
    python benchmarks/training_speed.py --sizes 124m-1024 --device cuda
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from record import RESULTS, spread, write_result

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE / ".cache" / "litgpt"
SIZES: dict[str, dict[str, Any]] = {
    "1m": {"vocab": 1024, "layers": 4, "heads": 4, "width": 128, "length": 256, "inner": 344, "rows": 16},
    "14m": {"vocab": 8192, "layers": 6, "heads": 6, "width": 384, "length": 256, "inner": 1024, "rows": 8},
    "124m": {"vocab": 50304, "layers": 12, "heads": 12, "width": 768, "length": 512, "inner": 2048, "rows": 4},
    "124m-1024": {"vocab": 50304, "layers": 12, "heads": 12, "width": 768, "length": 1024, "inner": 2048, "rows": 32},
    "1b": {
        "vocab": 50304, "layers": 18, "heads": 16, "width": 2048, "length": 2048, "inner": 5632, "rows": 8,
        "tied": False,
    },
}  # fmt: skip
TARGETS = {"1m": (1.3, 2.3), "14m": (1.25, 3.4), "124m": (1.2, 3.6)}
"""Times the fastest peer at its best, and the fastest at its defaults."""

BEST = {"precision": "bfloat16", "compile": True, "fused": True}
DEFAULT = {"precision": "float32"}
CONTESTANTS: dict[str, dict[str, Any]] = {
    "groundup, Llama's shape": {"who": "groundup", "model": "llama", **BEST},
    "groundup, GPT-2's shape": {"who": "groundup", "model": "gpt", **BEST},
    "plain loop (nanoGPT's model), best": {"who": "nanogpt", "model": "gpt", **BEST},
    "transformers Llama, best": {"who": "transformers", "model": "llama", **BEST},
    "litgpt Llama, best": {"who": "litgpt", "model": "llama", **BEST},
    "plain loop (nanoGPT's model), default": {"who": "nanogpt", "model": "gpt", **DEFAULT},
    "transformers Llama, default": {"who": "transformers", "model": "llama", **DEFAULT},
    "litgpt Llama, default": {"who": "litgpt", "model": "llama", **DEFAULT},
}


def main() -> None:
    """Run every size, print its table, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=["1m", "14m", "124m"])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn, about")
    parser.add_argument("--threads", type=int, default=0, help="of each process (0: one for each core)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="*", help="contestants whose names have one of these words")
    parser.add_argument("--without-litgpt", action="store_true")
    parser.add_argument("--curves", action="store_true", help="loss curves beside a plain float32 loop, and no races")
    parser.add_argument("--steps", type=int, default=300, help="of the curves")
    parser.add_argument("--keep", action="store_true", help="keep earlier results of sizes that are not measured now")
    parser.add_argument("--make-environment", action="store_true", help="make litgpt's environment, and stop")
    arguments = parser.parse_args()
    if arguments.curves:
        from training_curves import curves

        curves(arguments.steps)
        return
    if not arguments.without_litgpt:
        make_environment()
        if arguments.make_environment:
            return
    arguments.threads = arguments.threads or len(os.sched_getaffinity(0))
    found = [race(size, arguments) for size in arguments.sizes]
    name = "training_speed" if arguments.device == "cpu" else "training_speed_cuda"
    if arguments.keep and (RESULTS / f"{name}.json").is_file():
        earlier = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["sizes"]
        found = [*(one for one in earlier if one["size"] not in arguments.sizes), *found]
        found.sort(key=lambda one: list(SIZES).index(one["size"]))
    write_result(name, {"threads": arguments.threads, "versions": versions(), "sizes": found})


def race(size: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All contestants of one size: those at their best in one race, the defaults in another beside groundup."""
    ceiling = measured_ceilings(arguments.device)
    names = [
        name
        for name, what in CONTESTANTS.items()
        if (not arguments.only or any(word in name for word in arguments.only))
        and not (arguments.without_litgpt and what["who"] == "litgpt")
    ]
    fast = [name for name in names if "default" not in name]
    slow = [name for name in names if "default" in name]
    rows = run_together(size, fast, arguments)
    rows += [
        {**row, "beside_defaults": True} if row["contestant"] in fast else row
        for row in (run_together(size, [*fast[:1], *slow], arguments) if slow else [])
    ]
    flops = flops_per_token(SIZES[size])
    for row in rows:
        row["share_of_bfloat16_ceiling"] = row["tokens_per_second"]["median"] * flops / ceiling["bfloat16"]
    result = {"size": size, "shape": SIZES[size], "flops_per_token": flops, "ceilings": ceiling, "rows": rows}
    result |= ratios(rows)
    show(result)
    return result


def run_together(size: str, names: list[str], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Start these contestants, let them take turns, and give each one's figures."""
    kids = {name: Contestant(name, size, arguments) for name in names}
    kids = {name: kid for name, kid in kids.items() if kid.is_ready()}
    try:
        for _ in range(arguments.rounds):
            for kid in kids.values():
                kid.turn(arguments.seconds)
        return [kid.figures() for kid in kids.values()]
    finally:
        for kid in kids.values():
            kid.stop()


class Contestant:
    """A process that makes training steps on demand."""

    def __init__(self, name: str, size: str, arguments: argparse.Namespace) -> None:
        shape = {key: value for key, value in SIZES[size].items() if key != "rows"}
        self.name, self.tokens = name, SIZES[size]["rows"] * shape["length"]
        what = {**CONTESTANTS[name], "shape": shape, "rows": SIZES[size]["rows"], "threads": arguments.threads,
                "device": arguments.device}  # fmt: skip
        python = str(ENVIRONMENT / "bin" / "python") if what["who"] == "litgpt" else sys.executable
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
        environment |= {"TORCHINDUCTOR_CACHE_DIR": str(HERE / ".cache" / "inductor"), "TOKENIZERS_PARALLELISM": "false"}
        if what["who"] == "groundup":
            environment["GOMP_SPINCOUNT"] = "10000"  # what the command line sets
        self._process = subprocess.Popen(
            [python, str(HERE / "baselines" / "training_step.py"), json.dumps(what)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self._seconds: list[float] = []
        self._last: dict[str, Any] = {}
        self._begin: dict[str, Any] = {}

    def is_ready(self) -> bool:
        """Whether it got through its first steps; what it said otherwise."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            assert self._process.stderr is not None
            print(f"{self.name}: left out: {self._process.stderr.read()[-600:]}")
            return False
        self._begin = json.loads(line)
        return True

    def turn(self, seconds: float) -> None:
        """Some steps: as many as take about so long."""
        n_steps = max(2, round(seconds / statistics.median(self._seconds))) if self._seconds else 2
        self._last = self._ask({"steps": n_steps})
        self._seconds += self._last["seconds"]

    def figures(self) -> dict[str, Any]:
        """What it did."""
        rates = [self.tokens / seconds for seconds in self._seconds]
        return {
            "contestant": self.name,
            "parameters": self._begin["parameters"],
            "first_steps_seconds": self._begin["ready"],
            "tokens_per_second": spread(rates),
            "peak_mib": self._last["peak_bytes"] / 2**20,
        }

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _ask(self, what: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def ratios(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Groundup's faster shape over the fastest peer, of those that took turns with it."""
    together = [row for row in rows if "default" not in row["contestant"] and not row.get("beside_defaults")]
    ours = [row for row in together if row["contestant"].startswith("groundup")]
    peers = [row for row in together if not row["contestant"].startswith("groundup")]
    defaults = [row for row in rows if "default" in row["contestant"]]
    beside = [row for row in rows if row.get("beside_defaults")]

    def rate(row: dict[str, Any]) -> float:
        return row["tokens_per_second"]["median"]

    found: dict[str, Any] = {}
    if ours and peers:
        found["over_the_best_peer"] = max(map(rate, ours)) / max(map(rate, peers))
        found["peak_over_the_leanest_peer"] = min(r["peak_mib"] for r in ours) / min(r["peak_mib"] for r in peers)
        for shape, kind in (("Llama", "Llama"), ("GPT-2", "plain")):
            mine = [row for row in ours if shape in row["contestant"]]
            same = [row for row in peers if kind in row["contestant"]]
            if mine and same:
                found[f"over_the_best_peer_of_{shape}_shape"] = rate(mine[0]) / max(map(rate, same))
    if beside and defaults:
        found["over_the_best_default"] = rate(beside[0]) / max(map(rate, defaults))
    return found


def show(result: dict[str, Any]) -> None:
    """A table on the terminal."""
    print(f"\n{result['size']}: bfloat16 ceiling {result['ceilings']['bfloat16'] / 1e9:,.0f} GFLOP/s")
    for row in result["rows"]:
        rate = row["tokens_per_second"]
        print(
            f"| {row['contestant']:<40} | {rate['median']:>9,.0f} ({rate['min']:,.0f} … {rate['max']:,.0f}) tok/s "
            f"| {row['share_of_bfloat16_ceiling']:>4.0%} | {row['peak_mib']:>6,.0f} MiB |"
        )
    print({key: round(value, 3) for key, value in result.items() if "over" in key})


def flops_per_token(shape: dict[str, Any]) -> float:
    """6 for each parameter in a product, 12 · layers · width · sequence for attention (the square, as nanoGPT)."""
    inner = 3 * shape["inner"] if "inner" in shape else 8 * shape["width"]
    block = 4 * shape["width"] ** 2 + inner * shape["width"]
    products = shape["layers"] * block + shape["vocab"] * shape["width"]
    return 6 * products + 12 * shape["layers"] * shape["width"] * shape["length"]


def measured_ceilings(device: str) -> dict[str, float]:
    """The best matmul rates here and now, FLOP/s."""
    program = (
        "import json, torch; from groundup.training.throughput import measured_ceiling as c; "
        f"d = torch.device('{device}'); "
        "print(json.dumps({n: c(getattr(torch, n), d) for n in ('float32', 'bfloat16')}))"
    )
    return json.loads(subprocess.check_output([sys.executable, "-c", program], text=True))


def versions() -> dict[str, str]:
    """Of the peers."""
    import importlib.metadata

    found = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    if (ENVIRONMENT / "bin" / "python").exists():
        program = "import importlib.metadata as m; print(m.version('litgpt'))"
        found["litgpt"] = subprocess.check_output([ENVIRONMENT / "bin" / "python", "-c", program], text=True).strip()
    return found


def make_environment() -> None:
    """An environment of its own for litgpt, by pip, from pinned versions."""
    if (ENVIRONMENT / "bin" / "litgpt").exists():
        return
    print(f"making litgpt's environment in {ENVIRONMENT} (once) …", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
    pinned = HERE / "baselines" / "litgpt.txt"
    subprocess.run([ENVIRONMENT / "bin" / "python", "-m", "pip", "install", "-q", "-r", str(pinned)], check=True)


if __name__ == "__main__":
    main()
