"""The length of a run, and the learning rate and the batch over it.

Warm-up is linear. Then: `wsd` stays at the peak and decays linearly over the last part (arXiv:2404.06395,
arXiv:2405.18392), `cosine` falls along half a cosine (arXiv:1608.03983), `linear` along a line, `constant` stays.

A batch may grow over the first part of a run (GPT-3, arXiv:2005.14165, appendix B): while the gradient is large beside
its noise, small batches say as much (arXiv:1812.06162).
"""

from __future__ import annotations

import math

from groundup.errors import DataError
from groundup.model import ModelConfig
from groundup.model.ladder import TOKENS_PER_PARAMETER
from groundup.recipe import OptimizerSettings, PretrainSettings


def learning_rate_share(settings: OptimizerSettings, step: int, n_steps: int) -> float:
    """The share of the peak learning rate at `step` of 0 … n_steps−1, in (0, 1]; later ones keep the last."""
    step = min(step, max(0, n_steps - 1))
    warmup = round(settings.warmup_share * n_steps)
    if step < warmup:
        return (step + 1) / warmup
    final = settings.final_lr_share
    if settings.schedule == "cosine":
        progress = (step - warmup) / max(1, n_steps - warmup)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
    if settings.schedule == "wsd":
        decay = max(1, round(settings.decay_share * n_steps))
        left = n_steps - step
        return final + (1 - final) * min(1.0, left / decay)
    if settings.schedule == "linear":
        return final + (1 - final) * (n_steps - step) / max(1, n_steps - warmup)
    return 1.0


class BatchPlan:
    """Which rows of the endless order every step takes.

    Args:
        batch_size: rows of a step, once grown.
        n_rows: rows that the run needs at least.
        batch_warmup_from: rows of the first step (default: no ramp). Batches grow by as many.
        batch_warmup_share: share of the rows over which they grow.
    """

    def __init__(
        self, batch_size: int, n_rows: int, batch_warmup_from: int | None = None, batch_warmup_share: float = 0.0
    ) -> None:
        self.batch_size = batch_size
        self._ramp: list[int] = [0]  # where each step of the ramp begins, and where the ramp ends
        if batch_warmup_from is not None:
            while (size := self._grown(batch_warmup_from, batch_warmup_share * n_rows)) < batch_size and self._ramp[
                -1
            ] < n_rows:
                self._ramp.append(self._ramp[-1] + size)
        left = n_rows - self._ramp[-1]
        self.n_steps = len(self._ramp) - 1 + max(0, -(-left // batch_size))

    def rows(self, step: int) -> tuple[int, int]:
        """First and last + 1 of the rows of a step."""
        n_ramp = len(self._ramp) - 1
        if step < n_ramp:
            return self._ramp[step], self._ramp[step + 1]
        first = self._ramp[-1] + (step - n_ramp) * self.batch_size
        return first, first + self.batch_size

    def _grown(self, batch_warmup_from: int, ramp_rows: float) -> int:
        """Rows of the ramp's next step: in proportion to what was seen, in multiples of `batch_warmup_from`."""
        share = self._ramp[-1] / ramp_rows if ramp_rows else 1.0
        size = batch_warmup_from + (self.batch_size - batch_warmup_from) * min(1.0, share)
        return min(self.batch_size, math.floor(size / batch_warmup_from) * batch_warmup_from)


def sequence_length(config: ModelConfig, settings: PretrainSettings) -> int:
    """Tokens in a training row: the recipe's, or the model's context.

    Raises:
        DataError: longer than the model can see.
    """
    context = config.context_length
    if settings.sequence_length is not None and settings.sequence_length > context:
        raise DataError(
            f"[pretrain] sequence_length = {settings.sequence_length}: longer than the model's context of {context}.",
            f"Lower it, or set [model] context_length = {settings.sequence_length}.",
        )
    return settings.sequence_length or context


def count_tokens(n_parameters: int, settings: PretrainSettings) -> tuple[int, str]:
    """Tokens to train on, and the reason."""
    if settings.tokens == "compute-optimal":
        return TOKENS_PER_PARAMETER * n_parameters, f"{TOKENS_PER_PARAMETER} for each of {n_parameters:,} parameters"
    return settings.tokens, "as the recipe says"
