"""DPO on the model's own answers (arXiv:2402.04792, with any reward in the annotator's place).

Pairs that somebody else's model wrote are soon far from what this one would say. Here each buffer the policy answers
every prompt some times; the answer with the highest reward is chosen, the one with the lowest is rejected, and both go
into DPO's loss (`dpo.py`), against the model that the stage starts from. A prompt whose answers are all worth the same
says nothing and has no gradient: the share of such prompts is reported as `silent_groups`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import model_validator
from torch import Tensor

from groundup.alignment import on_policy
from groundup.alignment.dpo import DPOSettings, PreferenceLoss
from groundup.alignment.losses import sequence_logprobs
from groundup.alignment.on_policy import STAT
from groundup.recipe import setting
from groundup.training import IGNORED, Batch, Term


class OnlineDPOSettings(on_policy.OnPolicySettings):
    """A model and a reward to a model that prefers its better answers."""

    batch_size: int = setting(8, "pairs in one optimizer step, over all devices", ge=1)
    group: int = setting(4, "answers to each prompt, of which the best and the worst are a pair", ge=2, le=1024)
    beta: float = setting(0.1, "β: how strongly the model is held to the reference", gt=0.0)

    @model_validator(mode="after")
    def _whole_pairs(self) -> OnlineDPOSettings:
        if self.rollouts % self.group or self.rollouts // self.group % self.batch_size:
            raise ValueError(
                f"rollouts {self.rollouts}: are no whole groups of {self.group}, or these no whole batches of "
                f"{self.batch_size} pairs"
            )
        return self

    @property
    def buffer_rows(self) -> int:
        """A pair for each prompt."""
        return self.rollouts // self.group


class OnlineDPO(on_policy.OnPolicyAlgorithm):
    """Answers in groups, of which two are a row: ids and targets are (pairs, 2, seq); and DPO's loss of the pairs."""

    settings: OnlineDPOSettings

    def learn_from(self, modules: Mapping[str, Any], batch: Batch, reference: Tensor, last: Batch) -> Batch:
        """The pairs, and what the reference gives for each answer."""
        if self.settings.temperature != 1:  # DPO is about what the model says at 1
            reference = on_policy.reference_logprobs(modules, batch, 1.0)
        sums = sequence_logprobs(reference, batch["targets"] != IGNORED)
        pairs, is_silent = best_and_worst(batch["rewards"].view(-1, self.group))
        both = pairs + self.group * torch.arange(len(pairs))[:, None]
        figures = {name: t.view(-1, self.group).nanmean(1) for name, t in batch.items() if name.startswith(STAT)}
        return {
            "ids": batch["ids"][both][..., :-1], "reference": sums[both],
            "targets": batch["targets"][both].where(~is_silent[:, None, None], IGNORED),
            **figures, STAT + "silent_groups": is_silent.float(),
        }  # fmt: skip

    def counts(self, batch: Batch) -> dict[str, float]:
        """All pairs, silent ones too; those that say something; those that have a figure."""
        return self._dpo.counts(batch) | {"loss": len(batch["ids"])} | on_policy.stat_counts(batch)

    def terms(self, modules: Mapping[str, Any], batch: Batch) -> dict[str, Term]:
        """One forward pass over both sides together."""
        return self._dpo.terms(modules, on_policy.trimmed(batch)) | on_policy.stat_terms(batch)

    @functools.cached_property
    def _dpo(self) -> PreferenceLoss:
        return PreferenceLoss(DPOSettings(beta=self.settings.beta))


def best_and_worst(
    rewards: Float[Tensor, "groups size"],
) -> tuple[Int[Tensor, "groups 2"], Bool[Tensor, " groups"]]:
    """The places of the highest and the lowest reward of each group, and where all that are known are alike."""
    most, best = rewards.nan_to_num(-math.inf).max(1)
    least, worst = rewards.nan_to_num(math.inf).min(1)
    return torch.stack([best, worst], dim=1), ~(most > least)


class OnlineDPOMethod(on_policy.PolicyMethod):
    """The stage: preference optimization on the model's own answers."""

    name = "online-dpo"
    settings = OnlineDPOSettings
    algorithm = OnlineDPO
    row_sequences, unit = 2, "pairs"
    title = "Preference optimization on its own answers"
    curves = ("reward", "held_out_reward", "accuracy", "chosen", "rejected", "kl", "silent_groups")


ONLINE_DPO = OnlineDPOMethod()
online_dpo = ONLINE_DPO.train
