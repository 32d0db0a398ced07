"""Benchmarks of a model into a folder, and two such folders side by side.

In: a model, names of benchmarks, their data. Out: `scores.json` with every figure, what it was measured with, and how;
beside it the records of each benchmark's items. Models that answered the same items are compared item by item: the
difference is paired, which takes out how hard the items are.
"""

from __future__ import annotations

import math
import platform
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from groundup.console import Console
from groundup.errors import ArtifactError, DataError
from groundup.evaluation.benchmarks import find_benchmark, fingerprint, read_items
from groundup.evaluation.contamination import NGRAM, contaminated_items
from groundup.evaluation.measure import (
    GREEDY,
    Decoding,
    Record,
    by_group,
    figures_of,
    item_scores,
    measure,
    read_records,
    to_plain,
)
from groundup.files import read_json, value_digest, write_json
from groundup.model import Transformer
from groundup.tokenizer import Tokenizer
from groundup.untrusted import file_inside, reading

CARD = "scores.json"
_WAY_OUT = "Write them: groundup evaluate MODEL --tasks …"
_RESAMPLES = 10_000
_LEVEL = 0.05
_SHOWN = 0.02  # the difference for which the needed number of items is told
_POWER = 1.96 + 0.84  # both sides at 5 %, found four times in five


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
    trained_on: Iterable[str] | None = None,
    ngram: int = NGRAM,
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
        trained_on: the training texts: items that stand there are counted, and every figure is told without them, too
            ("clean").
        ngram: words in a row that count as standing there, 8 to 13.
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
    tainted = None if trained_on is None else contaminated_items(read, trained_on, ngram)
    console = Console(quiet=True) if console is None else console
    found: dict[str, Any] = {}
    for place, (benchmark, items) in enumerate(zip(chosen, read, strict=True)):
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
            **({} if tainted is None else {"ngram": ngram, **_without(records, tainted[place])}),
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


@dataclass(frozen=True)
class Difference:
    """How two models differ on one benchmark.

    Attributes:
        benchmark: its name.
        n: items that both answered.
        first, second: their mean scores, of a text −bits per byte.
        value: second − first.
        low, high: of the 95 % interval, by 10,000 paired resamples.
        p: two-sided, corrected for the number of benchmarks (Holm 1979).
        n_needed: items that would show a difference of 0.02 four times in five.
        verdict: in words.
    """

    benchmark: str
    n: int
    first: float
    second: float
    value: float
    low: float
    high: float
    p: float
    n_needed: int
    verdict: str


def compare_cards(first: str | Path, second: str | Path) -> list[Difference]:
    """Two folders that `score_benchmarks` wrote, benchmark by benchmark.

    Raises:
        ArtifactError: no scores there, or damaged ones.
        DataError: they share no benchmark with the same items.
    """
    cards = [_card(Path(folder)) for folder in (first, second)]
    paired: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    units: dict[str, str] = {}
    for name, one in cards[0].items():
        other = cards[1].get(name)
        if other is None or other["fingerprint"] != one["fingerprint"]:
            continue
        scores, is_text = zip(
            *(_scores(Path(folder), name, card) for folder, card in ((first, one), (second, other))), strict=True
        )
        if any(is_text):
            units[name] = " bits per byte"
        places = sorted(scores[0].keys() & scores[1].keys())
        if len(places) > 1:
            paired[name] = (
                np.array([scores[0][place] for place in places]),
                np.array([scores[1][place] for place in places]),
            )
    if not paired:
        raise DataError(
            f"{first} and {second} share no benchmark with two or more of the same items.",
            "Score both with the same --tasks, --shots, --limit and --seed.",
        )
    plain = {name: _p_value(b - a) for name, (a, b) in paired.items()}
    corrected = holm(plain)
    return [_difference(name, a, b, corrected[name], units.get(name, "")) for name, (a, b) in paired.items()]


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values corrected for how many there are (Holm 1979): the smallest times n, the next times n − 1, …"""
    found: dict[str, float] = {}
    most = 0.0
    for place, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        most = max(most, min(1.0, p * (len(p_values) - place)))
        found[name] = most
    return {name: found[name] for name in p_values}


def _p_value(differences: np.ndarray) -> float:
    """Two-sided, by 10,000 random signs: of two equal models, either could have been the better one at any item."""
    rng = np.random.default_rng(0)
    seen = abs(differences.sum())
    if not seen:
        return 1.0
    signs = (rng.integers(0, 2, (len(differences), 1000)) * 2 - 1 for _ in range(_RESAMPLES // 1000))
    n_beyond = sum(int((abs(differences @ part) >= seen - 1e-9).sum()) for part in signs)
    return (n_beyond + 1) / (_RESAMPLES + 1)


def _difference(name: str, a: np.ndarray, b: np.ndarray, p: float, unit: str) -> Difference:
    rng = np.random.default_rng(0)
    differences = b - a
    n = len(differences)
    resampled = [differences[rng.integers(0, n, n)].mean() for _ in range(_RESAMPLES)]
    low, high = np.quantile(resampled, [_LEVEL / 2, 1 - _LEVEL / 2])
    spread = float(differences.std(ddof=1))
    n_needed = max(2, math.ceil((_POWER * spread / _SHOWN) ** 2))
    value = float(differences.mean())
    least = f"{_SHOWN}{unit}" if unit else f"{_SHOWN * 100:g} points"
    if p < _LEVEL:
        better = f"{abs(value):.3g}{unit}" if unit else f"{abs(value):.1%}"
        verdict = f"the {'second' if value > 0 else 'first'} is better by {better}"
    elif n < n_needed:
        verdict = f"no difference shown at n = {n:,}; {n_needed:,} items would show one of {least}"
    else:
        verdict = f"no difference shown at n = {n:,}, where one of {least} would have been seen"
    return Difference(name, n, float(a.mean()), float(b.mean()), value, float(low), float(high), p, n_needed, verdict)


def _card(folder: Path) -> dict[str, Any]:
    if not (folder / CARD).is_file():
        raise ArtifactError(f"{folder / CARD}: not found.", _WAY_OUT)
    found = read_json(folder / CARD)
    parts = found.get("benchmarks") if isinstance(found, dict) else None
    if not isinstance(parts, dict) or not all(isinstance(one, dict) and "fingerprint" in one for one in parts.values()):
        raise ArtifactError(f"{folder / CARD}: holds no benchmarks.", _WAY_OUT)
    return parts


def _scores(folder: Path, name: str, card: Mapping[str, Any]) -> tuple[dict[int, float], bool]:
    """The score of each item, and whether they are texts."""
    path = file_inside(folder, f"{name}.jsonl")
    with reading(str(path), fix=_WAY_OUT):
        records = read_records(path, str(card.get("identity", "")))
        scores = item_scores(records)
    if not all(map(math.isfinite, scores.values())):
        raise ArtifactError(f"{path}: a score that is no finite number.", _WAY_OUT)
    return scores, "bits" in records[0]


def say(name: str, value: float, stderr: float) -> str:
    """A figure with its standard error: shares in percent."""
    is_share = name not in ("bits_per_byte", "perplexity", "brier")
    return f"{value:.1%} ± {stderr:.1%}" if is_share else f"{value:.4g} ± {stderr:.2g}"
