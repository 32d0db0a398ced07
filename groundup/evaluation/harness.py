"""All the scores that a recipe asks for, of one model; every language model of a run is scored by itself and kept.

`evaluate/NAME/scores.json` holds the figures of the model that the stage NAME made; `evaluate/before-NAME`, those of
the model that it started from, where no stage of the recipe made that one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from groundup.corpus import stream_documents
from groundup.errors import DataError
from groundup.evaluation.scorecard import read_scores, score_model
from groundup.evaluation.sets import BITS_PER_BYTE, EXACT, METRICS, STYLE, task_digests
from groundup.files import write_json
from groundup.generation import prompt_ids
from groundup.interop import load_model
from groundup.interop.start import starting_point
from groundup.model import Transformer
from groundup.recipe import BEFORE, EvaluateSettings, Gate, Section, StartSettings
from groundup.report.format import format_lines
from groundup.run import Run
from groundup.serving.inspect import inspect
from groundup.stage import MODEL_FOLDER, Context, Method, Shown, Stage, graph, model_digest
from groundup.tokenizer import Tokenizer

LOWER_IS_BETTER = ("bits_per_byte", "refusal_rate", "kl_to_start", "perplexity", "brier", "calibration_error")
_QUICK_PROMPTS = 100
_SHOWN_TOKENS, _SHOWN_HEADS = 24, 8  # of `attention.json`


class Evaluate(Method):
    """The stage: one model to its scores."""

    settings = EvaluateSettings
    version = 5
    keeps = ("*.jsonl",)  # each is of one model, items and settings: another task asks nothing again

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
        """A model made elsewhere, and the benchmarks' files."""
        after = _stage_after(stage)
        start = None if after is None else after.outside_start
        return task_digests(_asked(stage)) | ({} if start is None else {"model": model_digest(start)})

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
        settings, after = _asked(stage), _stage_after(stage)
        with context.console.bar(stage.name) as bar:
            model, tokenizer, identity = _model(stage, after, run)
            documents = stream_documents(run.folder("corpus"), "validation") if recipe.reads_text else iter(())
            origin = graph(recipe)[stage.subject].start if after is None and stage.subject is not None else None
            start = None
            if origin is not None and STYLE in settings.tasks:
                start, _ = load_model(run.folder(origin) / MODEL_FOLDER, verify=False)
            scores = score_model(
                model.eval(), tokenizer, settings, seed=recipe.seed, identity=identity, start=start,
                texts=(document.text for document in documents), folder=context.folder, bar=bar,
            )  # fmt: skip
            if recipe.reads_text and after is None:
                text = next(document.text for document in stream_documents(run.folder("corpus"), "validation"))
                _write_attention(model, tokenizer, text, context.folder)
            figures = {metric: figure["value"] for metric, figure in scores.figures.items()}
            bar.finish(" · ".join(_lines(figures)))
        speed = scores.generation_tokens_per_second
        return figures | ({} if speed is None else {"generation_tokens_per_second": speed})

    def shown(self, stage: Stage, summary: Mapping[str, Any]) -> Shown:
        """Its scores."""
        return Shown(f"Scores of {stage.subject}", lines=_lines(summary))


EVALUATE = Evaluate()


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


def _asked(stage: Stage) -> EvaluateSettings:
    """What the recipe asks; of an untrained model text only."""
    after, settings = _stage_after(stage), stage.recipe.evaluate
    is_fresh = after is not None and after.outside_start is None
    return settings.model_copy(update={"tasks": (BITS_PER_BYTE,)}) if is_fresh else settings


def _model(stage: Stage, after: Stage | None, run: Run) -> tuple[Transformer, Tokenizer, str]:
    """The model, its tokenizer, and what stands for it."""
    if after is not None:
        start = after.outside_start
        return *starting_point(after, run), stage.identity if start is None else model_digest(start)
    assert stage.subject is not None
    folder = run.folder(stage.subject) / MODEL_FOLDER
    model, tokenizer = load_model(folder, verify=False)  # the pipeline did
    assert tokenizer is not None, "a stage saves its model with its tokenizer"
    return model, tokenizer, model_digest(folder)


def _write_attention(model: Transformer, tokenizer: Tokenizer, text: str, folder: Path) -> None:
    """For the report: what heads of the first, middle and last layer look at in a text, in percent.

    A model whose attention cannot be told (`DataError` of `inspect`) leaves none.
    """
    try:
        seen = inspect(model, tokenizer, prompt_ids(tokenizer, text)[:_SHOWN_TOKENS], top=1)
    except DataError:
        return
    last = len(seen.attention) - 1
    layers = [
        {"layer": layer + 1, "heads": (100 * seen.attention[layer, :_SHOWN_HEADS]).round().int().tolist()}
        for layer in sorted({0, last // 2, last})
    ]
    write_json(folder / "attention.json", {"tokens": [token.shown for token in seen.tokens], "layers": layers})


def _direction(gate: Gate) -> Gate | None:
    """What a gate asks of a quick run: a gain where one is asked for; how large, or at what price, it does not show."""
    tiny = 1e-6
    if gate.metric == EXACT["groundup:hard-tasks"]:
        return None  # a few steps teach none of them
    if gate.over is None:
        if gate.metric not in METRICS or gate.metric in LOWER_IS_BETTER:  # of a benchmark, a quick run is at chance
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
