"""What a time or a sum of money buys: tokens for the recipe's model, and the size on the ladder that makes most of it.

On this machine the probe's FLOP/s are carried over to every size; of a device in the table each size has its own. With
a scaling law the best size is the one of the lowest predicted loss; without one the compute-optimal one, nearest to 20
tokens for each parameter (arXiv:2203.15556).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from groundup.errors import RecipeError
from groundup.model import ModelConfig, ladder_config
from groundup.model.cost import count_parameters, training_flops_per_token
from groundup.model.ladder import TOKENS_PER_PARAMETER
from groundup.recipe import OptimizerSettings
from groundup.training.planning.fit import LADDER, Room, step_of
from groundup.training.planning.memory import step_memory
from groundup.training.scaling.law import ScalingLaw


@dataclass(frozen=True)
class Candidate:
    """A size on the ladder and what a budget makes of it.

    Attributes:
        size: as for [model] size.
        parameters: exactly.
        tokens: that fit into the budget.
        loss: predicted, nats per token; None without a law.
        fits: in memory, one row at a time at least.
    """

    size: str
    parameters: int
    tokens: int
    loss: float | None
    fits: bool

    @property
    def tokens_per_parameter(self) -> float:
        """20 is compute-optimal."""
        return self.tokens / self.parameters


def candidates(
    seconds: float, speed: Callable[[ModelConfig], float], settings: OptimizerSettings, vocab_size: int | None,
    room: Room, n_devices: int, law: ScalingLaw | None,
) -> list[Candidate]:  # fmt: skip
    """Every size of the ladder with at least one token a parameter in so many seconds of training.

    Args:
        seconds: of training alone.
        speed: a model's training FLOP/s.
        settings: optimizer and checkpointing, for memory.
        vocab_size: of the tokenizer; None: what the ladder gives each size.
        room: memory of a device.
        n_devices: how many.
        law: for losses.
    """
    found: list[Candidate] = []
    for size in LADDER:
        config = _rung(size, vocab_size)
        if config is None:
            continue
        length, n = config.context_length, count_parameters(config)
        tokens = int(seconds * speed(config) / training_flops_per_token(config, length))
        if tokens < n:
            break
        if found and found[-1].parameters == n:
            continue  # with this vocabulary the ladder has no other
        step = step_of(settings, length, room, n_devices, 1)
        fits = step_memory(config, settings.model_copy(update={"groups": ()}), step).total <= room.usable
        found.append(Candidate(size, n, tokens, None if law is None else law.loss(n, tokens), fits))
    return found


@functools.cache
def _rung(size: str, vocab_size: int | None) -> ModelConfig | None:
    try:
        return ladder_config(size=size, **({} if vocab_size is None else {"vocab_size": vocab_size}))
    except RecipeError:
        return None


def best(found: list[Candidate]) -> Candidate | None:
    """The one that makes most of the budget, of those that fit in memory."""
    fitting = [one for one in found if one.fits]
    if not fitting:
        return None
    if fitting[0].loss is not None:
        return min(fitting, key=lambda one: one.loss if one.loss is not None else math.inf)
    return min(fitting, key=lambda one: abs(math.log(one.tokens_per_parameter / TOKENS_PER_PARAMETER)))


def neighbours(found: list[Candidate], how_many: int = 2) -> list[Candidate]:
    """The best and so many on each side."""
    chosen = best(found)
    if chosen is None:
        return found[-(2 * how_many + 1) :]
    place = found.index(chosen)
    return found[max(0, place - how_many) : place + how_many + 1]
