"""Which runs a sweep is made of: sizes of the ladder, each with several token budgets.

In: a recipe, sizes, budgets. Out: runs, the cheapest first. All have the recipe's architecture, context and training
settings; width, depth, batch and learning rates follow the ladder (`model.ladder`), for each its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from groundup.errors import DataError
from groundup.model import ModelConfig, count_parameters
from groundup.model.cost import training_flops_per_token
from groundup.model.ladder import parse_size, shape_on_line, training_choices
from groundup.model.presets import reshaped
from groundup.recipe import PretrainSettings, Recipe
from groundup.training.pretrain import sequence_length

DEFAULT_SIZES = ("200k", "500k", "1m", "2m")
N_BUDGETS = 4
"""Token budgets of a sweep that names none: each half of the next."""
TOKENS_PER_PARAMETER = 1.5
"""Of the middle size, for the largest default budget: few, so that the sweep of the demo takes minutes."""
MOST_EPOCHS = 4
"""Up to so many passes, text teaches nearly as much as new text: arXiv:2305.16264."""
_SHAPE = ("n_layers", "n_heads", "n_kv_heads", "head_dim", "d_model", "d_ff")
_NEVER = 1_000_000_000


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        config: its model.
        settings: how it is trained; `tokens` is its budget.
        tokens: the same.
        sequence_length: tokens in a row.
        n_parameters: all parameters of the model.
        flops: of its training, about.
    """

    config: ModelConfig
    settings: PretrainSettings
    tokens: int
    sequence_length: int
    n_parameters: int
    flops: float

    @property
    def name(self) -> str:
        """`n344256-d770000`: parameters and tokens."""
        return f"n{self.n_parameters}-d{self.tokens}"


def sweep_runs(
    recipe: Recipe, sizes: Sequence[int | str], tokens: Sequence[int], vocab_size: int
) -> tuple[list[SweepRun], list[str]]:
    """Every size with every budget, the cheapest first; and what is to be said of sizes that fell together.

    Raises:
        DataError: a budget that is none.
        RecipeError: a size that the ladder does not have.
    """
    notes, configs = [], {}
    for size in sizes:
        config = config_of(recipe, size, vocab_size)
        n_parameters = count_parameters(config)
        if n_parameters in configs:
            notes.append(f"Size {size} is {n_parameters:,} parameters with this vocabulary, as another: trained once.")
        configs[n_parameters] = config
    for budget in tokens:
        if budget < 1:
            raise DataError(f"--tokens {budget}: no budget.", "Give positive numbers.")
    runs = [_run(recipe, config, budget) for config in configs.values() for budget in sorted(set(tokens))]
    return sorted(runs, key=lambda run: run.flops), notes


def config_of(recipe: Recipe, size: int | str, vocab_size: int) -> ModelConfig:
    """The recipe's architecture in the shape that the ladder gives a size.

    Raises:
        RecipeError: a size that the ladder does not have, or an architecture that does not go with its shape.
    """
    shape = _shape_of(parse_size(str(size)), vocab_size)
    return reshaped(recipe.model.config(vocab_size).to_dict(), {name: shape[name] for name in _SHAPE})


def default_tokens(recipe: Recipe, sizes: Sequence[int | str], vocab_size: int, train_tokens: int) -> list[int]:
    """Budgets that suit these sizes and this much text."""
    logs = [math.log(count_parameters(config_of(recipe, size, vocab_size))) for size in sizes]
    middle = math.exp(sum(logs) / max(1, len(logs)))
    return halved(min(TOKENS_PER_PARAMETER * middle, MOST_EPOCHS * train_tokens))


def halved(most: float) -> list[int]:
    """A largest budget, its half, and so on, in two digits; the smallest first."""
    return [int(float(f"{most / 2**power:.1e}")) for power in reversed(range(N_BUDGETS))]


@functools.cache  # a search along the whole ladder
def _shape_of(size: int, vocab_size: int) -> dict[str, Any]:
    return shape_on_line(size, vocab_size)


def _run(recipe: Recipe, config: ModelConfig, tokens: int) -> SweepRun:
    given = recipe.pretrain
    length = sequence_length(config, given)
    choices = training_choices(config, tokens=tokens, sequence_length=length, optimizer=given.optimizer)
    chosen = {choice.name.removeprefix("pretrain."): choice.value for choice in choices}
    # Validation at the start and at the end only, and no batch that a ramp or a micro-batch would not divide.
    plain = {"tokens": tokens, "eval_every": _NEVER, "samples": (), "track": (), "keep_best": False}
    settings = PretrainSettings.model_validate(
        {**given.model_dump(), **chosen, **plain, "micro_batch_size": None, "ramp_from": None}
    )
    flops = tokens * training_flops_per_token(config, length)
    return SweepRun(config, settings, tokens, length, count_parameters(config), flops)
