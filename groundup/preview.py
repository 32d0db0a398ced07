"""A recipe before anything runs: what it becomes on this machine, what is wrong with it, a quick version of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from groundup import alignment, evaluation, training
from groundup.corpus.inputs import check_named_files
from groundup.corpus.quality.language import check_languages
from groundup.corpus.quality.rules import rules_for
from groundup.corpus.reading.sources import find_sources
from groundup.distributed import current_world
from groundup.errors import DataError, GroundupError, Problem, RecipeError
from groundup.model import ModelConfig, count_parameters, preset, training_flops_per_token
from groundup.recipe import Recipe


def derived_values(recipe: Recipe) -> list[tuple[str, str, str]]:
    """What the recipe leaves open and what it becomes here, as (setting, value, reason)."""
    precision, evidence = training.choose_precision(recipe.pretrain.precision, current_world().device.type)
    config = preset(recipe.model.preset, **recipe.model.overrides(), vocab_size=recipe.tokenizer.vocab_size)
    settings = recipe.pretrain
    tokens, why_tokens = training.count_tokens(count_parameters(config), settings)
    length = settings.sequence_length or config.context_length
    steps = math.ceil(tokens / (settings.batch_size * length))
    # A character tokenizer's vocabulary is as large as its text's alphabet: known when the text is read.
    about = "about " if recipe.tokenizer.kind == "characters" else ""

    def chosen(asked: int | None, otherwise: int, reason: str) -> tuple[str, str]:
        return (f"{asked:,}", "as the recipe says") if asked is not None else (f"{otherwise:,}", reason)

    return [
        ("threads", *chosen(recipe.threads, torch.get_num_threads(), "cores that this process may use")),
        ("pretrain.precision", str(precision).removeprefix("torch."), evidence),
        *(
            (f"model.{name}", str(getattr(config, name)), f"preset {recipe.model.preset}")
            for name in ("context_length", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_model", "d_ff")
            if getattr(recipe.model, name) is None
        ),
        ("model parameters", f"{about}{count_parameters(config):,}", f"vocabulary of {about}{config.vocab_size:,}"),
        ("pretrain.tokens", f"{about if isinstance(settings.tokens, str) else ''}{tokens:,}", why_tokens),
        ("pretrain.sequence_length", *chosen(settings.sequence_length, length, "the model's context")),
        ("pretrain.steps", f"{steps:,}", f"{settings.batch_size} rows × {length} tokens a step"),
        ("pretrain.micro_batch_size", *chosen(settings.micro_batch_size, settings.batch_size, "the batch")),
        ("pretrain.eval_every", *chosen(settings.eval_every, max(1, math.ceil(steps / 20)), "20 over the run")),
        ("training FLOPs", f"{training_flops_per_token(config, length) * tokens:.2e}", "6 · matmul parameters a token"),
    ]


def check_recipe(recipe: Recipe, label: str) -> None:
    """Find what only the whole recipe shows: inputs that are missing, sizes that do not fit together.

    Raises:
        RecipeError: with every problem found.
        DataError: nothing is wrong but one input, such as a file that is not there.
    """
    problems: list[Problem] = []
    of_files: list[DataError] = []

    def attempt(where: str, check: Callable[[], object]) -> None:
        try:
            check()
        except RecipeError as error:
            problems.extend(error.problems)
        except GroundupError as error:
            # A message that begins with its place, as `[sft] data = "x": ...`, needs no other.
            place, _, rest = error.message.partition(": ") if error.message.startswith("[") else (where, "", "")
            problems.append(Problem(place, rest or error.message, error.fix))
            if isinstance(error, DataError) and where in ("[corpus] inputs", "[sft] data"):
                of_files.append(error)

    def model() -> ModelConfig:
        return preset(recipe.model.preset, **recipe.model.overrides(), vocab_size=recipe.tokenizer.vocab_size)

    attempt("[model]", model)
    if not problems:
        attempt("[pretrain]", lambda: training.sequence_length(model(), recipe.pretrain))
    attempt("[corpus] inputs", lambda: find_sources(recipe.corpus.inputs))
    attempt("[corpus] languages", lambda: check_languages(recipe.corpus.languages, recipe.corpus.language_model))
    attempt("[corpus] quality", lambda: rules_for(recipe.corpus.quality, recipe.corpus.thresholds))
    attempt("[corpus]", lambda: check_named_files(recipe.corpus))
    if (sft := recipe.sft) is not None:
        attempt("[sft] data", lambda: alignment.data_fingerprint(sft))
    attempt("[evaluate] tasks", lambda: evaluation.check_tasks(recipe.evaluate.tasks))
    if len(problems) == len(of_files) == 1:
        raise of_files[0]
    if problems:
        raise RecipeError(label, problems)


def smoke_profile(recipe: Recipe) -> Recipe:
    """The same road in a fraction of the time: it shows that everything works, not how good it gets."""
    less = {"eval_every": 20, "eval_tokens": 5_000}
    small = recipe.pretrain.model_copy(
        update={"tokens": min(_whole(recipe.pretrain.tokens), 160_000), "sample_tokens": 16, **less}
    )
    changes: dict[str, Any] = {"name": f"{recipe.name}-smoke", "pretrain": small}
    gates = recipe.evaluate.gates
    loosened = gates.model_copy(
        update={
            "min_bits_per_byte_drop": 0.1 if gates.min_bits_per_byte_drop is not None else None,
            "min_exact_match": 0.02 if gates.min_exact_match is not None else None,
        }
    )
    changes["evaluate"] = recipe.evaluate.model_copy(update={"limit": 100, "gates": loosened})
    if recipe.sft is not None:
        changes["sft"] = recipe.sft.model_copy(
            update={"examples": min(recipe.sft.examples, 2000), "epochs": 2.0, **less}
        )
    return recipe.model_copy(update=changes)


def _whole(tokens: int | str) -> int:
    return tokens if isinstance(tokens, int) else 10**12
