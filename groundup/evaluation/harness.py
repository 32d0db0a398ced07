"""All the scores that a recipe asks for, of one model."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from groundup.errors import DataError
from groundup.evaluation.metrics import Answer, Estimate, bits_per_byte, exact_match, share
from groundup.evaluation.tasks import generate_tasks
from groundup.model import Transformer
from groundup.recipe import EvaluateSettings
from groundup.shards import TokenShards
from groundup.tokenizer import Tokenizer

BITS_PER_BYTE, TASKS = "bits_per_byte", "groundup:tasks"


@dataclass
class Scores:
    """What was measured; what was not asked for is None or empty.

    Attributes:
        by_kind: exact match of each kind of task.
        answers: every answered prompt.
        generation_tokens_per_second: a wall-clock figure of this machine.
    """

    bits_per_byte: Estimate | None = None
    exact_match: Estimate | None = None
    by_kind: dict[str, Estimate] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    generation_tokens_per_second: float | None = None


def check_tasks(names: Sequence[str]) -> None:
    """Raise DataError for a task that is not known."""
    for name in names:
        if name not in (BITS_PER_BYTE, TASKS):
            near = difflib.get_close_matches(name, (BITS_PER_BYTE, TASKS), n=1)
            fix = f"Did you mean {near[0]!r}?" if near else f"Known: {BITS_PER_BYTE}, {TASKS}."
            raise DataError(f"[evaluate] tasks: {name!r} is not known.", fix)


def score_model(
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    settings: EvaluateSettings,
    shards_folder: Path | None = None,
    n_tasks: int = 10_000,
    tasks_seed: int = 1,
) -> Scores:
    """Score a model on what `settings.tasks` names.

    Args:
        model: put into evaluation mode; its arithmetic is in its `compute_dtype`.
        tokenizer: of the model.
        settings: which tasks, and how many prompts.
        shards_folder: where the validation text is, for bits per byte.
        n_tasks: how many tasks the generator made for training; the held-out ones among them are asked.
        tasks_seed: of the generator.

    Raises:
        DataError: an unknown task, or no validation text.
    """
    check_tasks(settings.tasks)
    scores = Scores()
    if BITS_PER_BYTE in settings.tasks:
        if shards_folder is None:
            raise DataError("bits_per_byte needs the folder of the token shards.")
        shards = TokenShards.open(shards_folder, "validation", tokenizer_fingerprint=tokenizer.fingerprint)
        scores.bits_per_byte = bits_per_byte(model, shards, tokenizer)
    if TASKS in settings.tasks:
        held_out = [task for task in generate_tasks(n_tasks, tasks_seed) if task.split == "held_out"]
        asked = held_out[: settings.limit]
        scores.exact_match, scores.answers, scores.generation_tokens_per_second = exact_match(
            model, tokenizer, asked, max_tokens=settings.max_tokens
        )
        kinds = sorted({answer.kind for answer in scores.answers})
        scores.by_kind = {
            kind: share([answer.correct for answer in scores.answers if answer.kind == kind]) for kind in kinds
        }
    return scores
