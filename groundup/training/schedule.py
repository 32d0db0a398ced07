"""The learning rate over a run, as a share of its peak.

Warm-up is linear. Then: `wsd` stays at the peak and decays linearly over the last part (arXiv:2404.06395,
arXiv:2405.18392), `cosine` falls along half a cosine (arXiv:1608.03983), `constant` stays.
"""

from __future__ import annotations

import math

from groundup.recipe import OptimizerSettings


def learning_rate_share(settings: OptimizerSettings, step: int, n_steps: int) -> float:
    """The share of the peak learning rate at `step` of 0 … n_steps−1, in (0, 1]."""
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
    return 1.0
