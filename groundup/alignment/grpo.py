"""Group-relative policy optimization with verifiable rewards (arXiv:2402.03300; Dr. GRPO: arXiv:2503.20783).

No value model: each prompt gets a group of answers, and an answer is as good as it is better than its group,

    A_i = R_i − mean(R)                                    Dr. GRPO, the default; over std(R): GRPO; leave-one-out: RLOO
    L   = (1 / (answers · longest)) Σ_i Σ_t max(−A_i ρ_it, −A_i clip(ρ_it, 1 − ε, 1 + ε_high)) + β KL(π ‖ π_ref)

with ρ = π / π_old by token, or by answer (GSPO). A group whose rewards are all alike says nothing and has no gradient:
its share is reported as `silent_groups`. Dividing by std gives groups that are nearly all right or all wrong too much
weight, and dividing by an answer's own length rewards long wrong answers; so neither is the default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import nn

from groundup.alignment.losses import (
    Advantages,
    Aggregation,
    aggregate,
    aggregate_count,
    group_advantages,
    gspo_policy_loss,
    kl_estimate,
    logprobs_head,
    ppo_policy_loss,
)
from groundup.alignment.on_policy import (
    STAT,
    OnPolicySettings,
    PolicyMethod,
    RolloutSource,
    answer_kl,
    check_first_ratio,
    reference_logprobs,
    stat_counts,
    stat_terms,
    train_policy,
    trimmed,
)
from groundup.alignment.rewards import FunctionReward, Prompts
from groundup.console import Console
from groundup.distributed import World
from groundup.model import ModelConfig, Transformer
from groundup.model.cost import forward_flops
from groundup.recipe import setting
from groundup.tokenizer import Tokenizer
from groundup.training import IGNORED, Batch, TrainedModel
from groundup.training.objective import Term, pass_flops


class GRPOSettings(OnPolicySettings):
    """A model and a verifier to a model that is right more often."""

    group: int = setting(8, "answers to each prompt, compared with each other", ge=1, le=1024)
    advantages: Advantages = setting(
        "dr_grpo", "dr_grpo: reward − mean; grpo: over the standard deviation; rloo: − mean of the others"
    )
    aggregation: Aggregation = setting(
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


def grpo(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Prompts,
    reward: FunctionReward | nn.Module,
    settings: GRPOSettings | None = None,
    *,
    out: str | Path,
    seed: int = 1,
    start: str = "fresh",
    name: str = "grpo",
    world: World | None = None,
    console: Console | None = None,
) -> TrainedModel:
    """Train a model by GRPO; go on from a checkpoint in `out` if there is one. Arguments and errors as of `ppo`."""
    settings = settings or GRPOSettings()

    def source(**options: Any) -> RolloutSource:
        return GroupRollouts(settings=settings, group=settings.group, **options)

    return train_policy(
        model, tokenizer, prompts, reward, settings, source=source, objective=lambda rollouts: GRPO(settings, rollouts),
        trained={}, out=out, seed=seed, start=start, name=name, world=world, console=console,
    )  # fmt: skip


class GroupRollouts(RolloutSource):
    """Answers in groups, with advantages."""

    settings: GRPOSettings

    def learn_from(self, modules: Mapping[str, nn.Module], batch: Batch, last: Batch) -> tuple[Batch, float]:
        """Advantages within each group, wherever its answers were written."""
        settings, world = self.settings, self._world
        rewards = world.gather(batch["rewards"]).view(-1, settings.group)
        advantages = group_advantages(rewards, settings.advantages)
        silent = (advantages == 0).all(1, keepdim=True).float().expand_as(rewards)
        share = world.rows(self.buffer_rows)
        reference = reference_logprobs(modules["reference"], batch, settings.temperature)
        model = modules["model"]
        assert isinstance(model, Transformer)
        return {
            "advantages": advantages.flatten()[share], "reference": reference, STAT + "kl": answer_kl(batch, reference),
            STAT + "silent_groups": silent.flatten()[share].contiguous(),
        }, len(reference) * forward_flops(model.config, self.width)  # fmt: skip


@dataclass(frozen=True)
class GRPO:
    """The clipped loss of answers, by their advantages in the group.

    Attributes:
        settings: of the stage.
        source: says whether a minibatch is the first of its buffer.
    """

    settings: GRPOSettings
    source: RolloutSource

    def counts(self, batch: Batch) -> dict[str, float]:
        """What the aggregation divides by; tokens; rows that have the other figures."""
        mask = batch["targets"] != IGNORED
        count = aggregate_count(mask, self.settings.aggregation, self.settings.max_tokens)
        n = int(mask.sum())
        return {"policy": count, "divergence": count, "entropy": n, "clipped": n, **stat_counts(batch)}

    def terms(self, modules: Mapping[str, nn.Module], batch: Batch) -> dict[str, Term]:
        """One pass of the policy."""
        settings, stats = self.settings, stat_terms(batch)
        batch = trimmed(batch)
        targets, mask, advantages = batch["targets"], batch["targets"] != IGNORED, batch["advantages"][:, None]
        found = modules["model"](batch["ids"][:, :-1], head=logprobs_head(targets, settings.temperature))
        dtype: torch.dtype = modules["model"].compute_dtype  # type: ignore[assignment]
        if modules["model"].training:
            check_first_ratio(self.source.is_first, found.logprobs, batch["old"], mask, dtype)
        clip, high = settings.clip, settings.clip_high
        if settings.ratio == "answer":
            policy = gspo_policy_loss(found.logprobs, batch["old"], advantages, mask, clip=clip, clip_high=high)
        else:
            policy = ppo_policy_loss(found.logprobs, batch["old"], advantages, clip=clip, clip_high=high)
        # k3 times the ratio has the gradient of KL(π ‖ π_ref); k3 alone has that of the other direction.
        divergence = kl_estimate(found.logprobs, batch["reference"], "k3", old=batch["old"])
        losses, kl = (aggregate(part, mask, settings.aggregation) for part in (policy.losses, divergence))
        entropy, clipped = found.entropy.where(mask, 0.0).sum(), (policy.is_clipped & mask).sum()
        return {
            "policy": Term(losses, losses.detach()),
            "divergence": Term(kl, kl.detach(), settings.kl_coef),
            "entropy": Term(entropy, entropy, 0.0),
            "clipped": Term(clipped, clipped, 0.0),
            **stats,
        }

    def flops(self, config: ModelConfig, shape: Sequence[int]) -> float:
        """The policy's forward and backward pass."""
        return pass_flops(config, shape)


class GRPOMethod(PolicyMethod):
    """The stage: reinforcement learning within groups of answers."""

    settings = GRPOSettings
    run = staticmethod(grpo)
    title = "Group-relative policy optimization"
    curves = ("reward", "held_out_reward", "silent_groups", "kl", "entropy", "clipped")


GRPO_METHOD = GRPOMethod()
