"""A recipe before anything runs: what it becomes on this machine, what is wrong with it, a quick version of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection
from typing import Any

import torch

from groundup import alignment, evaluation, training
from groundup.corpus.inputs import check_named_files
from groundup.corpus.quality.language import check_languages
from groundup.corpus.quality.rules import rules_for
from groundup.corpus.reading.sources import find_sources
from groundup.distributed import current_world
from groundup.errors import DataError, GroundupError, Problem, RecipeError
from groundup.model import ModelConfig, count_parameters, training_flops_per_token
from groundup.model.cost import parameter_shapes
from groundup.model.ladder import shape_choices
from groundup.recipe import DEFAULT_PRESET, Recipe, choices
from groundup.tokenizer.pretrained import PretrainedTokenizer


def derived_values(recipe: Recipe) -> list[tuple[str, str, str]]:
    """What the recipe leaves open and what it becomes here, as (setting, value, reason)."""
    precision, evidence = training.choose_precision(recipe.pretrain.precision, current_world().device.type)
    config, whence = _model(recipe)
    reasons = {} if recipe.init or not recipe.model.follows_from_one_number else {
        choice.name: choice.reason for choice in shape_choices(config, whence)
    }  # fmt: skip
    followed = [
        (choice.name, choice.value, choice.reason) for choice in choices(recipe) if choice.name != "pretrain.tokens"
    ]  # fmt: skip
    settings = recipe.pretrain
    tokens, why_tokens = training.count_tokens(count_parameters(config), settings)
    length = settings.sequence_length or config.context_length
    room, n_devices = training.device_memory(current_world()), current_world().size
    micro, why_micro = training.choose_micro_batch(config, settings, length, room, n_devices)
    needed = training.need(config, settings, training.step_of(settings, length, room, n_devices, micro))
    steps = math.ceil(tokens / (settings.batch_size * length))
    # A character tokenizer's vocabulary is as large as its text's alphabet: known when the text is read.
    about = "about " if recipe.tokenizer.kind == "characters" else ""

    def chosen(asked: int | None, otherwise: int, reason: str) -> tuple[str, str]:
        return (f"{asked:,}", "as the recipe says") if asked is not None else (f"{otherwise:,}", reason)

    return [
        ("threads", *chosen(recipe.threads, torch.get_num_threads(), "cores that this process may use")),
        ("pretrain.precision", str(precision).removeprefix("torch."), evidence),
        *training.describe_groups(parameter_shapes(config), settings),
        *(
            (f"model.{name}", str(getattr(config, name)), reasons.get(f"model.{name}", whence))
            for name in ("context_length", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_model", "d_ff")
            if getattr(recipe.model, name) is None
        ),
        *((name, _shown(value), reason) for name, value, reason in followed),
        ("model parameters", f"{about}{count_parameters(config):,}", f"vocabulary of {about}{config.vocab_size:,}"),
        ("pretrain.tokens", f"{about if isinstance(settings.tokens, str) else ''}{tokens:,}", why_tokens),
        ("pretrain.sequence_length", *chosen(settings.sequence_length, length, "the model's context")),
        ("pretrain.steps", f"{steps:,}", f"{settings.batch_size} rows × {length} tokens a step"),
        ("pretrain.micro_batch_size", *chosen(settings.micro_batch_size, micro, why_micro)),
        ("pretrain.eval_every", *chosen(settings.eval_every, max(1, math.ceil(steps / 20)), "20 over the run")),
        (
            "training FLOPs",
            f"{training_flops_per_token(config, length) * tokens:.2e}",
            "6 a matmul parameter and token; attention",
        ),
        (
            "training memory",
            f"{needed.total / 2**20:,.0f} MiB",
            f"about, at its fullest, {micro} rows at a time; groundup plan shows the parts",
        ),
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

    attempt("[model]" if recipe.init is None else "init", lambda: _model(recipe))
    if not problems and (recipe.sft is None or recipe.sft.init is None):
        attempt("[pretrain]", lambda: training.sequence_length(_model(recipe)[0], recipe.pretrain))
    shapes = None if problems else parameter_shapes(_model(recipe)[0])
    for stage, settings in (("pretrain", recipe.pretrain), ("sft", recipe.sft)):
        if settings is not None and (stage == "sft" or recipe.sft is None or recipe.sft.init is None):
            device_type, n_processes = current_world().device.type, current_world().size
            checks: list[Callable[[], object]] = [
                functools.partial(training.check_precision, settings.precision, device_type, stage),
                functools.partial(training.check_optimizer, settings, stage, n_processes),
            ]
            if shapes is not None:
                checks.append(functools.partial(training.group_parameters, shapes, settings, stage))
            for check in checks:
                attempt(f"[{stage}]", check)
    attempt("[tokenizer]", lambda: _check_tokenizer(recipe))
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


def check_memory(recipe: Recipe, stages: Collection[str]) -> None:
    """Hold that what is to be trained can fit into memory, before anything of it is made.

    Args:
        recipe: the recipe.
        stages: that are to be done.

    Raises:
        GroundupError: it is certain that it cannot; with the parts and the ways out.
    """
    world = current_world()
    room = training.device_memory(world)
    for name, settings in (("pretrain", recipe.pretrain), ("sft", recipe.sft)):
        if name in stages and settings is not None:
            config, _ = _model(recipe)
            length = training.sequence_length(config, recipe.pretrain) if name == "pretrain" else config.context_length
            training.refuse_what_cannot_fit(config, settings, length, room, world.size, name)


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
    smaller = recipe.model_copy(update=changes)
    # Read again, so that what follows from the model's size follows from the smaller budget.
    return Recipe.model_validate(smaller.model_dump(exclude_unset=True))


def _model(recipe: Recipe) -> tuple[ModelConfig, str]:
    """The model that the recipe asks for, and where its shape comes from."""
    model = recipe.model
    if recipe.init is not None:
        return training.start_config(recipe.init, model), f"init {recipe.init}"
    config = model.config(recipe.tokenizer.vocab_size)
    if model.size is not None:
        return config, f"size {model.size}"
    return config, f"depth {model.depth}" if model.depth is not None else f"preset {model.preset or DEFAULT_PRESET}"


def _check_tokenizer(recipe: Recipe) -> None:
    """Hold that a tokenizer that is given fits the model to start from, and what is to be made of it."""
    given = training.given_tokenizer(recipe.tokenizer.use, recipe.init)
    if given is not None and recipe.sft is not None and isinstance(given, PretrainedTokenizer):
        raise DataError(
            f"[sft]: the tokenizer of {recipe.tokenizer.use or recipe.init} has no tokens for the roles of a chat.",
            "Leave [sft] out: the model goes on learning from text alone.",
        )
    if given is not None and recipe.init is not None and recipe.tokenizer.use is not None:
        training.check_vocabulary(training.start_tokenizer(recipe.init), given, recipe.init)


def _shown(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _whole(tokens: int | str) -> int:
    return tokens if isinstance(tokens, int) else 10**12
