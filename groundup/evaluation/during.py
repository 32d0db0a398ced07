"""What a model is asked while it trains, `[….evaluate]` of a stage: the same items every time, so at a fixed cost.

The items are those that `groundup evaluate --limit` draws. Nothing here knows of training, or touches its state.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

from groundup.errors import DataError
from groundup.evaluation.benchmarks import EvaluationTask, Item
from groundup.evaluation.measure import figures_of, measure
from groundup.evaluation.sets import BITS_PER_BYTE, METRICS_OF_TASK, find_task
from groundup.model import Transformer
from groundup.recipe import DuringSettings, EvaluateSettings
from groundup.tokenizer import Tokenizer


def scores_during(
    settings: DuringSettings | None, tokenizer: Tokenizer | None
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
        task, items, asked = read(name)
        found = figures_of(measure(model, tokenizer, task, items, settings=asked))
        shown = itertools.islice(found.items(), None if name in METRICS_OF_TASK else 1)
        title = task.name.removeprefix("groundup:")
        suffixes = {"": "value", "_stderr": "stderr", "_n": "n"}
        return {f"{title}_{figure}{end}": getattr(one, key) for figure, one in shown for end, key in suffixes.items()}

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
        _read(settings, name)


def _read(settings: DuringSettings, name: str) -> tuple[EvaluationTask, list[Item], EvaluateSettings]:
    asked = EvaluateSettings(tasks=(name,), data=settings.data, limit=settings.limit)
    task = find_task(name)
    return task, task.read(asked, seed=1), asked
