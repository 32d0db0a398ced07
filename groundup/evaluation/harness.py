"""All the scores that a recipe asks for, of one model; every language model of a run is scored by itself and kept.

`evaluate/NAME/scores.json` holds the figures of the model that the stage NAME made; `evaluate/before-NAME`, those of
the model that it started from, where no stage of the recipe made that one.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from groundup.corpus import stream_documents
from groundup.errors import ArtifactError, DataError
from groundup.evaluation.attention import write_attention
from groundup.evaluation.metrics import Answer, Estimate, bits_per_byte, exact_match, share
from groundup.evaluation.sets import read_set
from groundup.evaluation.small_talk import score_harm
from groundup.evaluation.talk import score_first_messages, score_style
from groundup.files import read_json, write_json
from groundup.interop import load_model
from groundup.interop.start import starting_point
from groundup.model import Transformer
from groundup.recipe import BEFORE, EvaluateSettings, Gate, Section, StartSettings
from groundup.report.format import format_lines, is_number
from groundup.run import Run
from groundup.stage import MODEL_FOLDER, Context, Method, Shown, Stage, graph, model_digest
from groundup.tokenizer import Tokenizer

BITS_PER_BYTE, TASKS = "bits_per_byte", "groundup:tasks"
STYLE, FIRST, HARM = "groundup:style", "groundup:first-messages", "groundup:harm"
EXACT = {TASKS: "exact_match", "groundup:hard-tasks": "exact_match_hard", "groundup:sums": "exact_match_sums"}
METRICS_OF_TASK = {
    BITS_PER_BYTE: ("bits_per_byte",),
    **{name: (metric,) for name, metric in EXACT.items()},
    STYLE: ("polite_share", "exact_match_sampled", "answer_words", "entropy", "kl_to_start"),
    FIRST: ("fitting_share", "refusal_rate"),
    HARM: ("harm_declined_share", "harmless_answered_share"),
}
METRICS = tuple(metric for metrics in METRICS_OF_TASK.values() for metric in metrics)
LOWER_IS_BETTER = ("bits_per_byte", "refusal_rate", "kl_to_start")
N_TASKS = 10_000
"""Tasks that are generated; the held-out ones among them are asked."""
SCORES_FILE = "scores.json"
_KEPT_ANSWERS = 60
_QUICK_PROMPTS = 100


@dataclass
class Scores:
    """What was measured; what was not asked for is None or empty.

    Attributes:
        figures: the scores that were asked for, by metric.
        by_kind: exact match of each kind of task.
        answers: every answered prompt.
        generation_tokens_per_second: a wall-clock figure of this machine.
    """

    figures: dict[str, Estimate] = field(default_factory=dict)
    by_kind: dict[str, Estimate] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    generation_tokens_per_second: float | None = None


def check_tasks(names: Sequence[str]) -> None:
    """Raise DataError for a task that is not known."""
    for name in names:
        if name not in METRICS_OF_TASK:
            near = difflib.get_close_matches(name, METRICS_OF_TASK, n=1)
            fix = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(METRICS_OF_TASK)}."
            raise DataError(f"[evaluate] tasks: {name!r} is not known.", fix)


def score_model(
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    settings: EvaluateSettings,
    texts: Iterable[str] | None = None,
    n_tasks: int = N_TASKS,
    seed: int = 1,
    start: Transformer | None = None,
) -> Scores:
    """Score a model on what `settings.tasks` names.

    Args:
        model: put into evaluation mode; its arithmetic is in its `compute_dtype`.
        tokenizer: of the model.
        settings: which tasks, and how many prompts.
        texts: the validation documents, for bits per byte.
        n_tasks: how many tasks are generated; the held-out ones among them are asked.
        seed: of the generator.
        start: the model that it was trained from, for `groundup:style`.

    Raises:
        DataError: an unknown task, or no validation text.
    """
    check_tasks(settings.tasks)
    scores = Scores()
    held_out = functools.partial(_held_out, n_tasks=n_tasks, seed=seed, limit=settings.limit)
    if BITS_PER_BYTE in settings.tasks:
        if texts is None:
            raise DataError("bits_per_byte needs a validation text.", "Give texts, or leave the task out.")
        scores.figures["bits_per_byte"] = bits_per_byte(model, texts, tokenizer)
    for name in EXACT.keys() & {*settings.tasks}:
        # A call of the calculator takes some forty tokens.
        most = settings.max_tokens + (64 if name == "groundup:sums" else 0)
        found, answers, speed = exact_match(model, tokenizer, held_out(name), max_tokens=most)
        scores.figures[EXACT[name]] = found
        scores.answers += answers
        if name == TASKS:
            scores.generation_tokens_per_second = speed
    if STYLE in settings.tasks:
        asked = held_out(TASKS)
        scores.figures |= score_style(
            model, tokenizer, asked, start=start, max_tokens=settings.max_tokens, seed=seed
        )  # fmt: skip
    if FIRST in settings.tasks:
        figures, answers = score_first_messages(model, tokenizer, limit=settings.limit)
        scores.figures |= figures
        scores.answers += answers
    if HARM in settings.tasks:
        figures, answers = score_harm(model, tokenizer, held_out(HARM))
        scores.figures |= figures
        scores.answers += answers
    kinds = sorted({answer.kind for answer in scores.answers})
    scores.by_kind = {
        kind: share([answer.correct for answer in scores.answers if answer.kind == kind]) for kind in kinds
    }
    scores.figures = {name: scores.figures[name] for name in METRICS if name in scores.figures}
    return scores


def _held_out(name: str, n_tasks: int, seed: int, limit: int | None) -> list[Any]:
    tasks = read_set(name, n_tasks if name == TASKS else n_tasks // 4, seed)
    return [task for task in tasks if task.split == "held_out"][:limit]


class Evaluate(Method):
    """The stage: one model to its scores."""

    settings = EvaluateSettings
    version = 4

    def subjects(self, stage: Stage, stages: Mapping[str, Stage]) -> list[str]:
        """What is scored for a stage that makes a language model: what it started from, once, and what it made."""
        starts_fresh = stage.start is None and stage.outside_start is None
        # An untrained model is scored on text only: there is nothing it could answer.
        is_scored = stage.start is None and (not starts_fresh or BITS_PER_BYTE in stage.recipe.evaluate.tasks)
        before = before_name(stage, stages)
        return [before, stage.name] if is_scored and before == f"{BEFORE}{stage.name}" else [stage.name]

    def needs(self, stage: Stage) -> tuple[str, ...]:
        """The model, and the validation text."""
        assert stage.subject is not None
        model = () if stage.subject.startswith(BEFORE) else (stage.subject,)
        if not stage.recipe.reads_text:
            return model
        return (*model, *(("tokenizer",) if not model else ()), "corpus")

    def sections(self, stage: Stage) -> tuple[Section, ...]:
        """The tasks; of a model that no stage made, its shape."""
        own = (stage.recipe.model,) if _stage_after(stage) else ()
        return (*own, stage.settings)

    def outside(self, stage: Stage) -> dict[str, str]:
        """A model made elsewhere."""
        after = _stage_after(stage)
        start = None if after is None else after.outside_start
        return {} if start is None else {"model": model_digest(start)}

    def is_whole(self, folder: Path) -> bool:
        """Its scores can be read."""
        return bool(read_scores(folder))

    def quick(self, settings: EvaluateSettings) -> EvaluateSettings:
        """A hundred prompts, and gates that check the direction only."""
        gates = tuple(gate for gate in map(_direction, settings.gates) if gate is not None)
        limit = min(settings.limit or _QUICK_PROMPTS, _QUICK_PROMPTS)
        return settings.model_copy(update={"limit": limit, "gates": gates})

    def work(self, context: Context) -> dict[str, Any]:
        """Load the model and score it."""
        stage, recipe, run = context.stage, context.recipe, context.run
        settings, after = recipe.evaluate, _stage_after(stage)
        with context.console.bar(stage.name) as bar:
            model, tokenizer = _model(stage, after, run)
            if after is not None and after.outside_start is None:
                settings = settings.model_copy(update={"tasks": (BITS_PER_BYTE,)})
            documents = stream_documents(run.folder("corpus"), "validation") if recipe.reads_text else None
            texts = None if documents is None else (document.text for document in documents)
            origin = graph(recipe)[stage.subject].start if after is None and stage.subject is not None else None
            start = None
            if origin is not None and STYLE in settings.tasks:
                start, _ = load_model(run.folder(origin) / MODEL_FOLDER, verify=False)
            scores = score_model(
                model.eval(), tokenizer, settings=settings, texts=texts, seed=recipe.seed, start=start
            )  # fmt: skip
            figures = scores.figures
            bar.finish(" · ".join(_lines({name: figure.value for name, figure in figures.items()})))
        if recipe.reads_text and after is None:
            text = next(document.text for document in stream_documents(run.folder("corpus"), "validation"))
            write_attention(model, tokenizer, text, context.folder)
        write_json(
            context.folder / SCORES_FILE,
            {
                "figures": {name: asdict(figure) for name, figure in figures.items()},
                "by_kind": {kind: asdict(figure) for kind, figure in scores.by_kind.items()},
                "answers": [answer.to_dict() for answer in scores.answers[:_KEPT_ANSWERS]],
            },
        )
        speed = scores.generation_tokens_per_second
        return {name: figure.value for name, figure in figures.items()} | (
            {} if speed is None else {"generation_tokens_per_second": speed}
        )

    def shown(self, stage: Stage, summary: Mapping[str, Any]) -> Shown:
        """Its scores."""
        return Shown(f"Scores of {stage.subject}", lines=_lines(summary))


EVALUATE = Evaluate()


def read_scores(folder: Path) -> dict[str, Any]:
    """The scores that are kept in a folder; nothing if they are not there, or damaged."""
    try:
        found: dict[str, Any] = read_json(folder / SCORES_FILE)
        tables = [*found["figures"].values(), *found["by_kind"].values()]
        is_whole = all(is_number(figure["value"]) for figure in tables) and isinstance(found["answers"], list)
        is_whole &= found["figures"].keys() <= {*METRICS}
    except (ArtifactError, AttributeError, KeyError, TypeError):
        return {}
    return found if is_whole else {}


def before_name(stage: Stage, stages: Mapping[str, Stage]) -> str:
    """Under which name the model is scored that a stage starts from; of stages with one start, that of the first."""
    if stage.start is not None:
        return stage.start
    outside = [one for one in stages.values() if isinstance(one.settings, StartSettings) and one.outside_start]
    same = [one.name for one in outside if one.outside_start == stage.outside_start]
    return f"{BEFORE}{same[0] if same and stage.name in same else stage.name}"


def _stage_after(stage: Stage) -> Stage | None:
    """Where a starting model is scored: the stage that starts from it."""
    assert stage.subject is not None
    if not stage.subject.startswith(BEFORE):
        return None
    return graph(stage.recipe)[stage.subject.removeprefix(BEFORE)]


def _model(stage: Stage, after: Stage | None, run: Run) -> tuple[Transformer, Tokenizer]:
    if after is not None:
        return starting_point(after, run)
    assert stage.subject is not None
    model, tokenizer = load_model(run.folder(stage.subject) / MODEL_FOLDER, verify=False)  # the pipeline did
    assert tokenizer is not None, "a stage saves its model with its tokenizer"
    return model, tokenizer


def _direction(gate: Gate) -> Gate | None:
    """What a gate asks of a quick run: a gain where one is asked for; how large, or at what price, it does not show."""
    tiny = 1e-6
    if gate.metric == EXACT["groundup:hard-tasks"]:
        return None  # a few steps teach none of them
    if gate.over is None:
        if gate.metric not in METRICS or gate.metric in LOWER_IS_BETTER:
            return None
        return gate if gate.min is None else gate.model_copy(update={"min": min(gate.min, tiny)})
    if gate.min is not None and gate.min > 0:
        return gate.model_copy(update={"min": tiny, "max": None})
    if gate.max is not None and gate.max < 0:
        return gate.model_copy(update={"min": None, "max": -tiny})
    return None


def _lines(figures: Mapping[str, Any]) -> tuple[str, ...]:
    return format_lines(
        (figures.get("bits_per_byte"), lambda value: f"{value:.2f} bits/byte"),
        (figures.get("exact_match"), lambda value: f"{value:.1%} right"),
    )
