"""Benchmarks of a model into a folder.

In: a model, names of benchmarks, their data. Out: `scores.json` with every figure, what it was measured with, and how;
beside it the records of each benchmark's items, by which `comparison` compares models.
"""

from __future__ import annotations

import math
import platform
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from groundup.console import Console
from groundup.errors import ArtifactError, DataError
from groundup.evaluation.benchmarks import find_benchmark, fingerprint, read_items
from groundup.evaluation.contamination import contaminated_items
from groundup.evaluation.measure import (
    GREEDY,
    Decoding,
    Record,
    by_group,
    figures_of,
    measure,
    to_plain,
)
from groundup.files import read_json, value_digest, write_json
from groundup.model import Transformer
from groundup.tokenizer import Tokenizer

CARD = "scores.json"


def score_benchmarks(
    model: Transformer,
    tokenizer: Tokenizer,
    names: Sequence[str],
    data: str | Path,
    *,
    folder: Path,
    identity: str,
    shots: int = 0,
    limit: int | None = None,
    decoding: Decoding = GREEDY,
    trained_on: Callable[[], Iterable[str]] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Put benchmarks to a model, and write what came out into a folder.

    Args:
        model: put into evaluation mode.
        tokenizer: of the model.
        names: of benchmarks that ship, or paths of `.toml` files.
        data: folder of their files.
        folder: of the result; finished items that stand there are not done again.
        identity: what stands for the model in the result, such as `model_digest`.
        shots: worked examples before each item.
        limit: most items of each benchmark.
        decoding: of generations and code.
        trained_on: gives the training documents: items that stand there are counted, and every figure is told
            without them, too ("clean").
        console: shows the progress.

    Returns:
        What `scores.json` holds: "model"; "benchmarks" by name ("n", "settings", "fingerprint" of the items,
        "identity" of the records, "figures", "groups"), those that stood there of the same model too; "aggregate":
        the mean of centered accuracies, as DCLM's CORE (arXiv:2406.11794).

    Raises:
        DataError: no such benchmark, or its files are missing or damaged.
    """
    chosen = [find_benchmark(name) for name in names]
    if twice := [name for name, n in Counter(one.name for one in chosen).items() if n > 1]:
        raise DataError(f"two benchmarks are named {twice[0]!r}: one would stand in for the other.", "Rename a file.")
    read = [read_items(one, data, shots=shots, seed=decoding.seed, limit=limit) for one in chosen]
    console = Console(quiet=True) if console is None else console
    found: dict[str, Any] = {}
    for benchmark, items in zip(chosen, read, strict=True):
        of_items = fingerprint(benchmark, items)
        told: list[Any] = [identity, of_items, str(model.compute_dtype)]
        told += [asdict(decoding)] if benchmark.kind in ("generation", "code") else []
        whole = value_digest(told)
        with console.bar(benchmark.name, len(items)) as bar:
            n_done = 0

            def advance(n: int) -> None:
                nonlocal n_done
                n_done += n
                bar.update(n_done)

            tainted = set() if trained_on is None else contaminated_items(items, trained_on())
            records = measure(
                model, tokenizer, benchmark, items, decoding=decoding, kept=folder / f"{benchmark.name}.jsonl",
                identity=whole, advance=advance,
            )  # fmt: skip
            figures = figures_of(records)
            name, figure = next(iter(figures.items()))
            bar.finish(f"{name} {say(name, figure.value, figure.stderr)}, n = {figure.n:,}")
        found[benchmark.name] = {
            "n": len(records),
            "settings": {"shots": shots, "limit": limit, "dtype": str(model.compute_dtype), **asdict(decoding)},
            "fingerprint": of_items,
            "identity": whole,
            "figures": to_plain(figures),
            **({} if trained_on is None else _without(records, tainted)),
            "groups": {group: to_plain(parts) for group, parts in by_group(records).items()},
        }
    found = _kept(folder, identity) | found
    centered = [one["figures"]["accuracy_centered"] for one in found.values() if "accuracy_centered" in one["figures"]]
    card = {
        "model": identity,
        "benchmarks": found,
        "aggregate": _mean_of(centered),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    write_json(folder / CARD, card)
    return card


def _without(records: Sequence[Record], tainted: Collection[int]) -> dict[str, Any]:
    """How many items the training text repeats, and the figures of the others."""
    clean = [record for record in records if record["item"] not in tainted]
    return {"n_contaminated": len(records) - len(clean), "clean": to_plain(figures_of(clean)) if clean else None}


def _kept(folder: Path, identity: str) -> dict[str, Any]:
    """What was measured of the same model before."""
    try:
        card = read_json(folder / CARD)
    except ArtifactError:
        return {}
    return dict(card.get("benchmarks", {})) if isinstance(card, dict) and card.get("model") == identity else {}


def _mean_of(centered: Sequence[Mapping[str, float]]) -> dict[str, Any] | None:
    n = len(centered)
    if not n:
        return None
    stderr = math.sqrt(sum(one["stderr"] ** 2 for one in centered)) / n
    return {"centered_accuracy": sum(one["value"] for one in centered) / n, "stderr": stderr, "n": n}


def say(name: str, value: float, stderr: float) -> str:
    """A figure with its standard error: shares in percent."""
    is_share = name not in ("bits_per_byte", "perplexity", "brier")
    return f"{value:.1%} ± {stderr:.1%}" if is_share else f"{value:.4g} ± {stderr:.2g}"
