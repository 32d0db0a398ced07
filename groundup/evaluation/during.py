"""What a model is asked while it trains, `[….evaluate]` of a stage: the same items every time, so at a fixed cost.

The items are those that `groundup evaluate --limit` draws. Nothing here knows of training, or touches its state.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

from groundup.errors import DataError
from groundup.evaluation.benchmarks import Benchmark, Item, find_benchmark, read_items
from groundup.evaluation.harness import BITS_PER_BYTE, METRICS_OF_TASK, score_model
from groundup.evaluation.measure import figures_of, measure
from groundup.model import Transformer
from groundup.recipe import DuringSettings, EvaluateSettings
from groundup.tokenizer import Tokenizer


def scores_during(
    settings: DuringSettings | None, tokenizer: Tokenizer | None, seed: int
) -> Callable[[Transformer, str], dict[str, float]] | None:
    """What scores a model on one of `settings.tasks`; None where there are none.

    Its figures have names such as "arc_easy_accuracy", with "_stderr" and "_n": of a benchmark the first that
    `groundup evaluate` shows, of a generated set all.

    Raises:
        DataError: there is no tokenizer.
    """
    if settings is None:
        return None
    if tokenizer is None:
        raise DataError("evaluate: benchmarks need the model's tokenizer.", "Give tokenizer=…, or leave evaluate out.")
    read = functools.cache(functools.partial(_read, settings))

    def score(model: Transformer, name: str) -> dict[str, float]:
        if name in METRICS_OF_TASK:
            generated = EvaluateSettings(tasks=(name,), limit=settings.limit)
            figures = score_model(model, tokenizer, settings=generated, seed=seed).figures
            name = name.removeprefix("groundup:")
        else:
            benchmark, items = read(name)
            figures = figures_of(measure(model, tokenizer, benchmark, items))
            figures, name = dict(itertools.islice(figures.items(), 1)), benchmark.name
        told = {"": "value", "_stderr": "stderr", "_n": "n"}
        return {
            f"{name}_{figure}{suffix}": getattr(estimate, attribute)
            for figure, estimate in figures.items()
            for suffix, attribute in told.items()
        }

    return score


def check_during(settings: DuringSettings, makes: str) -> None:
    """Read every item, before a run begins.

    Raises:
        DataError: an unknown task, a file that is missing or damaged, or a stage that makes no language model.
    """
    if makes != "lm":
        raise DataError("evaluate: this stage makes no language model.", "Leave it out.")
    for name in settings.tasks:
        if name == BITS_PER_BYTE:
            raise DataError(f"tasks: {name} is in every validation pass.", "Leave it out.")
        if name not in METRICS_OF_TASK:
            _read(settings, name)


def _read(settings: DuringSettings, name: str) -> tuple[Benchmark, list[Item]]:
    benchmark = find_benchmark(name)
    return benchmark, read_items(benchmark, settings.data, limit=settings.limit)
