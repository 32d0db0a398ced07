"""Group-relative policy optimization with verifiable rewards (arXiv:2402.03300; Dr. GRPO: arXiv:2503.20783).

No value model: each prompt gets a group of answers, and an answer is as good as it is better than its group,

    A_i = R_i − mean(R)                                    Dr. GRPO, the default; over std(R): GRPO; leave-one-out: RLOO
    L   = (1 / (answers · longest)) Σ_i Σ_t max(−A_i ρ_it, −A_i clip(ρ_it, 1 − ε, 1 + ε_high)) + β KL(π ‖ π_ref)

with ρ = π / π_old by token, or by answer (GSPO). A group whose rewards are all alike says nothing and has no gradient:
its share is reported as `silent_groups`. Dividing by std gives groups that are nearly all right or all wrong too much
weight, and dividing by an answer's own length rewards long wrong answers; so neither is the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import model_validator
from torch import Tensor

from groundup.alignment import losses
from groundup.alignment.on_policy import STAT, OnPolicyAlgorithm, OnPolicySettings, PolicyMethod, TokenLosses
from groundup.recipe import setting
from groundup.training import Batch


class GRPOSettings(OnPolicySettings):
    """A model and a verifier to a model that is right more often."""

    group: int = setting(8, "answers to each prompt, compared with each other", ge=1, le=1024)
    advantages: losses.Advantages = setting(
        "dr_grpo", "dr_grpo: reward − mean; grpo: over the standard deviation; rloo: − mean of the others"
    )
    aggregation: losses.Aggregation = setting(
        "dr_grpo", "what a token's loss is divided by: dr_grpo: longest answers; dapo: all tokens; grpo: its answer's; "
        "bnpo: its micro-batch's",
    )  # fmt: skip
    ratio: Literal["token", "answer"] = setting("token", "what is clipped: each token's ratio, or an answer's (GSPO)")
    clip: float = setting(0.2, "ε downwards (answer: try 3e-4)", gt=0.0)
    clip_high: float | None = setting(None, "ε upwards (unset: the same; DAPO takes 0.28)", gt=0.0)
    kl_coef: float = setting(0.0, "β: how much staying near the start is worth", ge=0.0)

    @model_validator(mode="after")
    def _whole_groups(self) -> GRPOSettings:
        if self.rollouts % self.group:
            raise ValueError(f"group {self.group} does not divide rollouts {self.rollouts}")
        return self


class GRPO(OnPolicyAlgorithm):
    """Answers in groups, and their clipped loss by what they are worth in the group."""

    settings: GRPOSettings

    def learn_from(self, modules: Mapping[str, Any], batch: Batch, reference: Tensor, last: Batch) -> Batch:
        """Advantages within each group, wherever its answers were written."""
        settings, world = self.settings, self.inputs.world
        rewards = world.gather(batch["rewards"]).view(-1, settings.group)
        advantages = losses.group_advantages(rewards, settings.advantages)
        silent = (advantages == 0).all(1, keepdim=True).float().expand_as(rewards)
        advantages, silent = (part.flatten()[world.rows(self.buffer_rows)] for part in (advantages, silent))
        return batch | {"advantages": advantages, "reference": reference, STAT + "silent_groups": silent.contiguous()}

    @property
    def weights(self) -> dict[str, float]:
        """L = L_π + β KL, each put together as `settings.aggregation` says."""
        return {"policy": 1.0, "divergence": self.settings.kl_coef}

    def token_losses(self, modules: Mapping[str, Any], batch: Batch, mask: losses.Mask) -> TokenLosses:
        """One pass of the policy."""
        settings, old, advantages = self.settings, batch["old"], batch["advantages"][:, None]
        clip, high = settings.clip, settings.clip_high
        head = losses.logprobs_head(batch["targets"], settings.temperature)
        found = modules["model"](batch["ids"][:, :-1], head=head)
        if settings.ratio == "answer":
            policy = losses.gspo_policy_loss(found.logprobs, old, advantages, mask, clip=clip, clip_high=high)
        else:
            policy = losses.ppo_policy_loss(found.logprobs, old, advantages, clip=clip, clip_high=high)
        # k3 times the ratio has the gradient of KL(π ‖ π_ref); k3 alone has that of the other direction.
        divergence = losses.kl_estimate(found.logprobs, batch["reference"], "k3", old=old)
        return found, policy, {"divergence": divergence}


class GRPOMethod(PolicyMethod):
    """The stage: reinforcement learning within groups of answers."""

    name = "grpo"
    settings = GRPOSettings
    algorithm = GRPO
    title = "Group-relative policy optimization"
    curves = ("reward", "held_out_reward", "silent_groups", "kl", "entropy", "clipped")


GRPO_METHOD = GRPOMethod()
grpo = GRPO_METHOD.train
