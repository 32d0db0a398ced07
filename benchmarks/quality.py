"""Tokens that the defaults need for the loss that AdamW and GPT-2's defaults reach, on both shipped corpora.

Baseline: GPT-2's parts at ground-1m's size, AdamW, cosine to a tenth; its learning rate is the best of `RATES` (seed 1,
all T tokens), walked on while the best is at an end. T is the recipe's own budget; a seed's baseline ends at its L*.
Defaults: the recipe as it is, nothing tuned here, at shares of T, each share a run with its own schedule. Tokens to L*
are interpolated in log tokens between the two shares around it. Within a seed both see the same rows in the same order
and the same dropout; all held-out text is scored. On seed 1 also: the baseline with a quarter of the batch, as more
steps may suit it better, and the ladder from one to the other at half of T.
A killed benchmark goes on in `--work`; no clock is read.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import spread, write_result

from groundup.model import ModelConfig
from groundup.model.cost import parameter_shapes, training_flops_per_token
from groundup.recipe import read_recipe

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "quality.svg"
COLOURS = {"baseline": "#c2410c", "defaults": "#1d4ed8"}

RECIPES = {"shakespeare": "shakespeare", "classics": "demo"}
SHARES = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
FIRST_SHARES = (0.3,)
RATES = (3e-4, 6e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
FIRST_RATES = (4e-3, 8e-3)
LADDER_SHARE = 0.5
SMALLER = 4  # what the baseline's batch is also divided by
N_PASSES = 6  # validation passes in T tokens
TARGET = 0.6

GPT2 = {
    "model.norm": "layernorm",
    "model.norm_eps": 1e-5,
    "model.qk_norm": False,
    "model.position": "learned",
    "model.activation": "gelu_tanh",
    "model.d_ff": 576,  # two matrices as large as SwiGLU's three
    "model.bias": True,
    "model.tied_embeddings": True,
    "model.initialization": "gpt2",
}
ADAMW = {"pretrain.optimizer": "adamw", "pretrain.beta1": 0.9, "pretrain.beta2": 0.95, "pretrain.weight_decay": 0.1}
COSINE = {"pretrain.schedule": "cosine", "pretrain.final_lr_share": 0.1}

Finished = dict[str, Any]
"""What is kept of a run: where it ended and its validation passes."""


@dataclass(frozen=True)
class Point:
    """One run.

    Attributes:
        corpus: a key of `RECIPES`.
        name: of the variant.
        changes: settings by dotted name, in place of the recipe's.
        share: of T.
    """

    corpus: str
    name: str
    changes: dict[str, Any]
    share: float
    seed: int


@dataclass(frozen=True)
class Bench:
    """Where runs are kept, and slots for those that run at once; `scale` shortens all of them, to try the script."""

    work: Path
    slots: threading.Semaphore
    scale: float

    def run(self, points: Iterable[Point]) -> list[Finished]:
        """The points, in their order."""
        points = list(points)
        with ThreadPoolExecutor(len(points)) as pool:
            return list(pool.map(self.run_one, points))

    def run_one(self, point: Point) -> Finished:
        """One point by `groundup pretrain`, which goes on where it was killed and repeats nothing that is done."""
        recipe = RECIPES[point.corpus]
        whole = self.budget(point.corpus)
        rows = point.changes.get("pretrain.batch_size", read_recipe(recipe).pretrain.batch_size)
        length = config_of(point.corpus, point.changes).context_length
        settings = {
            **point.changes,
            "seed": point.seed,
            "pretrain.tokens": round(point.share * whole),
            "pretrain.eval_every": max(1, whole // (N_PASSES * rows * length)),
            "pretrain.eval_tokens": 1 << 30 if self.scale == 1.0 else 4000,
            "pretrain.samples": [],
        }
        folder = self.work / point.corpus / f"{point.name}, {point.share:g}, seed {point.seed}"
        command = [sys.executable, "-m", "groundup", "pretrain", recipe, "--runs", str(folder)]
        for name, value in settings.items():
            command += ["--set", f"{name}={json.dumps(value)}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self.slots:
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise SystemExit(f"{folder.name}: {done.stderr[-3000:]}")
        stage = folder / recipe / "pretrain"
        summary = json.loads((stage / "stage.json").read_text())["summary"]
        lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
        curve = [[line["tokens"], line["val_loss"]] for line in lines if "val_loss" in line]
        finished = {
            "variant": point.name,
            "seed": point.seed,
            "share": point.share,
            "tokens": summary["tokens"],
            "val_loss": summary["val_loss"],
            "lowest_val_loss": min(loss for _, loss in curve),
            "train_loss": summary["final_loss"],
            "parameters": summary["parameters"],
            "precision": summary["precision"],
            "curve": curve,
        }
        print(f"{point.corpus}: {folder.name}: {finished['val_loss']:.4f}", flush=True)
        return finished

    def budget(self, corpus: str) -> int:
        """T, in tokens."""
        tokens = read_recipe(RECIPES[corpus]).pretrain.tokens
        assert isinstance(tokens, int)
        return round(tokens * self.scale)


def main() -> None:
    """Run what is not done, and write figures and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="where runs are kept")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, of one thread each")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="shorten all runs; nothing is then written")
    arguments = parser.parse_args()
    bench = Bench(arguments.work, threading.Semaphore(arguments.jobs), arguments.scale)
    seeds = range(1, arguments.seeds + 1)
    with ThreadPoolExecutor(len(RECIPES)) as pool:
        found = dict(zip(RECIPES, pool.map(lambda corpus: measure(bench, corpus, seeds), RECIPES), strict=True))
    for corpus, result in found.items():
        print(f"\n{corpus}\n{table(result)}\n{smaller_batch_line(result)}\n\n{ladder_table(result)}")
    if bench.scale == 1.0:
        write_result("quality", {"target": TARGET, "n": len(seeds), "corpora": found})
        draw(found, PICTURE)


def measure(bench: Bench, corpus: str, seeds: range) -> dict[str, Any]:
    """All of one corpus."""
    rates = best_rate(bench, corpus)
    return {
        "rates": rates,
        **compare(bench, corpus, rates["best"], seeds),
        "smaller_batch": smaller_batch(bench, corpus, rates["best"]),
        "ladder": bench.run(ladder(corpus, rates["best"])),
    }


def best_rate(bench: Bench, corpus: str) -> dict[str, Any]:
    """The baseline's loss at T by learning rate, with the best inside of those tried."""
    tried = dict(zip(FIRST_RATES, bench.run([baseline(corpus, rate, 1) for rate in FIRST_RATES]), strict=True))
    while True:
        best = min(tried, key=lambda rate: tried[rate]["val_loss"])
        place = RATES.index(best)
        beside = [rate for rate in RATES[max(0, place - 1) : place + 2] if rate not in tried]
        if not beside:
            return {"best": best, "val_loss": {f"{rate:g}": tried[rate]["val_loss"] for rate in sorted(tried)}}
        tried |= zip(beside, bench.run([baseline(corpus, rate, 1) for rate in beside]), strict=True)


def compare(bench: Bench, corpus: str, rate: float, seeds: range) -> dict[str, Any]:
    """Every seed's baseline, and the tokens that the defaults need for its loss."""
    baselines = bench.run([baseline(corpus, rate, seed) for seed in seeds])
    shares, ours, first = [], [], FIRST_SHARES
    for run in baselines:
        runs = approach(bench, corpus, run["seed"], run["val_loss"], first)
        tokens = tokens_to(run["val_loss"], runs)
        shares.append(None if tokens is None else tokens / run["tokens"])
        ours += runs
        if tokens is not None:  # the next seed's will be near
            first = around(run["val_loss"], runs)
    reached = [share for share in shares if share is not None]
    flops = {name: flops_per_token(corpus, changes) for name, changes in (("baseline", GPT2 | ADAMW), ("defaults", {}))}
    return {
        "recipe": RECIPES[corpus],
        "tokens": bench.budget(corpus),
        "target_loss": spread([run["val_loss"] for run in baselines]),
        "shares": shares,
        "share": spread(reached) if len(reached) == len(shares) else None,
        "flops_per_token": flops,
        "baseline": baselines,
        "defaults": ours,
    }


def smaller_batch(bench: Bench, corpus: str, rate: float) -> dict[str, Any]:
    """Seed 1 against a baseline whose batch was chosen too: more and smaller steps for the same tokens."""
    rows = read_recipe(RECIPES[corpus]).pretrain.batch_size // SMALLER
    place = RATES.index(rate)
    points = [
        Point(corpus, f"{point.name}, {rows} rows", point.changes | {"pretrain.batch_size": rows}, 1.0, 1)
        for point in (baseline(corpus, one, 1) for one in RATES[place - 1 : place + 1])
    ]
    tried = bench.run(points)
    best = min(tried, key=lambda run: run["val_loss"])
    tokens = tokens_to(best["val_loss"], approach(bench, corpus, 1, best["val_loss"], FIRST_SHARES))
    return {"rows": rows, "tried": tried, "best": best, "share": None if tokens is None else tokens / best["tokens"]}


def approach(bench: Bench, corpus: str, seed: int, target: float, first: Iterable[float]) -> list[Finished]:
    """The defaults at these shares, and at further ones until the target lies between two; few to many tokens."""
    tried = set(first)
    while True:
        runs = bench.run(defaults(corpus, seed, sorted(tried)))
        if runs[0]["val_loss"] <= target:
            beside = SHARES.index(min(tried)) - 1
        elif runs[-1]["val_loss"] > target:
            beside = SHARES.index(max(tried)) + 1
        else:
            return runs
        if not 0 <= beside < len(SHARES):
            return runs
        tried.add(SHARES[beside])


def baseline(corpus: str, rate: float, seed: int, share: float = 1.0) -> Point:
    """AdamW and GPT-2's defaults."""
    return Point(corpus, f"baseline, lr {rate:g}", GPT2 | ADAMW | COSINE | {"pretrain.lr": rate}, share, seed)


def defaults(corpus: str, seed: int, shares: Iterable[float]) -> list[Point]:
    """The recipe as it is."""
    return [Point(corpus, "defaults", {}, share, seed) for share in shares]


def ladder(corpus: str, rate: float) -> list[Point]:
    """From the baseline to the defaults, one change a rung."""
    rungs = {
        "+ our parts and initialization": ADAMW | COSINE | {"pretrain.lr": rate},
        "+ Muon": COSINE,
    }
    return [
        baseline(corpus, rate, 1, LADDER_SHARE),
        *(Point(corpus, name, changes, LADDER_SHARE, 1) for name, changes in rungs.items()),
        *defaults(corpus, 1, (LADDER_SHARE,)),
    ]


def around(target: float, runs: list[Finished]) -> tuple[float, float]:
    """The shares on both sides of a loss that some reach and some do not."""
    after = next(place for place, run in enumerate(runs) if run["val_loss"] <= target)
    return runs[after - 1]["share"], runs[after]["share"]


def tokens_to(target: float, runs: list[Finished]) -> float | None:
    """Tokens to reach a loss, interpolated in log tokens between the runs around it; None if none or all reach it."""
    for before, after in itertools.pairwise(runs):
        if before["val_loss"] > target >= after["val_loss"]:
            part = (before["val_loss"] - target) / (before["val_loss"] - after["val_loss"])
            return math.exp((1 - part) * math.log(before["tokens"]) + part * math.log(after["tokens"]))
    return None


def config_of(corpus: str, changes: dict[str, Any]) -> ModelConfig:
    """A variant's model; the vocabulary is the recipe's, which matters here for FLOPs only."""
    model = {name.removeprefix("model."): value for name, value in changes.items() if name.startswith("model.")}
    recipe = read_recipe(RECIPES[corpus])
    vocab_size = recipe.tokenizer.vocab_size if recipe.tokenizer.kind == "bpe" else 77
    return recipe.model.model_copy(update=model).config(vocab_size)


def flops_per_token(corpus: str, changes: dict[str, Any]) -> float:
    """Forward, backward and, with Muon, the five Newton-Schulz steps of every matrix, shared out over a batch."""
    config = config_of(corpus, changes)
    found = training_flops_per_token(config, config.context_length)
    if "pretrain.optimizer" not in changes:
        batch_tokens = read_recipe(RECIPES[corpus]).pretrain.batch_size * config.context_length
        for name, shape in parameter_shapes(config).items():
            if name.startswith("layers.") and len(shape) == 2:
                small, large = sorted(shape)
                found += 5 * (4 * small * small * large + 2 * small**3) / batch_tokens
    return found


def table(found: dict[str, Any]) -> str:
    """Every seed's target, and where the defaults reach it."""
    shares = sorted({run["share"] for run in found["defaults"]})
    head = [
        "seed",
        f"baseline, {found['tokens'] / 1e6:g} M tokens",
        *(f"{share:g} T" for share in shares),
        "share of T",
    ]
    rows = [head, ["---"] * len(head)]
    for run, share in zip(found["baseline"], found["shares"], strict=True):
        mine = {one["share"]: f"{one['val_loss']:.4f}" for one in found["defaults"] if one["seed"] == run["seed"]}
        reached = "not reached" if share is None else f"{share:.3f}"
        rows.append([str(run["seed"]), f"{run['val_loss']:.4f}", *(mine.get(share, "") for share in shares), reached])
    rates = ", ".join(f"{rate}: {loss:.4f}" for rate, loss in found["rates"]["val_loss"].items())
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", f"baseline's rates: {rates}"])


def smaller_batch_line(found: dict[str, Any]) -> str:
    """What is left of it against the baseline with smaller steps."""
    tougher = found["smaller_batch"]
    reached = "is not reached" if tougher["share"] is None else f"is reached after {tougher['share']:.3f} T"
    return f"{tougher['best']['variant']}, seed 1: {tougher['best']['val_loss']:.4f}, which {reached}"


def ladder_table(found: dict[str, Any]) -> str:
    """What each change pays, at half of the tokens."""
    rows = found["ladder"]
    lines = [
        f"| {run['variant']} | {run['val_loss']:.4f} | {run['val_loss'] - before['val_loss']:+.4f} |"
        for before, run in zip([rows[0], *rows], rows, strict=False)
    ]
    return "\n".join([f"| at {LADDER_SHARE:g} T, seed 1 | validation loss | change |", "|---|---|---|", *lines])


def draw(corpora: dict[str, Any], path: Path) -> None:
    """Validation loss against tokens: the baseline on its way to T, the defaults where each budget ended."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "groundup", "font.size": 10}):
        figure = Figure(figsize=(9.2, 3.9), layout="constrained", facecolor="white")
        for panel, (corpus, found) in zip(figure.subplots(1, len(corpora)), corpora.items(), strict=True):
            target = statistics.mean(run["val_loss"] for run in found["baseline"])
            curves = [[point for point in run["curve"] if point[0]] for run in found["baseline"]]
            _lines(panel, curves, COLOURS["baseline"], "AdamW and GPT-2's defaults, on the way to T", every=False)
            ends = [
                [(run["tokens"], run["val_loss"]) for run in found["defaults"] if run["seed"] == seed]
                for seed in {run["seed"] for run in found["defaults"]}
            ]
            _lines(panel, ends, COLOURS["defaults"], "our defaults, each budget a run", every=True)
            panel.axhline(target, color=COLOURS["baseline"], linewidth=0.8, linestyle=(0, (4, 3)))
            share = f": {found['share']['median']:.2f} T to the same loss" if found["share"] else ""
            shown = [loss for line in [*ends, *curves] for tokens, loss in line if tokens >= 0.2 * found["tokens"]]
            margin = 0.05 * (max(shown) - min(shown))
            panel.set(
                title=f"{corpus}{share}",
                xlabel=f"million tokens (T = {found['tokens'] / 1e6:g})",
                xlim=(0, 1.03 * found["tokens"] / 1e6),
                ylim=(min(shown) - margin, max(shown) + margin),
            )
            panel.grid(color="#dddddd", linewidth=0.6)
            panel.spines[["top", "right"]].set_visible(False)
        figure.axes[0].set_ylabel("validation loss, nats per token")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
        figure.savefig(path, metadata={"Date": None})
    print(f"written: {path.relative_to(PICTURE.parent.parent)}")


def _lines(panel: Any, lines: list[list[Any]], colour: str, label: str, every: bool) -> None:
    """One line a seed; a dot at its end, or at every point."""
    for line in lines:
        tokens, losses = zip(*line, strict=True)
        dots = {"marker": "o", "markersize": 4, "markevery": None if every else [len(line) - 1]}
        millions = [one / 1e6 for one in tokens]
        panel.plot(millions, losses, color=colour, linewidth=1.3, alpha=0.7, label=label, **dots)
        label = "_"  # one entry in the legend


if __name__ == "__main__":
    main()
