"""Proximal policy optimization from a reward model or a function (arXiv:1707.06347; for language: arXiv:1909.08593,
arXiv:2203.02155).

A language model is a policy: the state is a prompt and what was written so far, an action is the next token. Each
buffer, the policy π_old writes answers y to prompts x, which get a score r(x, y). Then

    R_t = −β (log π_old − log π_ref)(y_t) + [t is the last] r(x, y)      stay near the model it started from
    A   = GAE(γ, λ) of R and the values V, whitened over the buffer      how much better than expected
    L_π = mean_t max(−A_t ρ_t, −A_t clip(ρ_t, 1 ± ε)),   ρ = π / π_old
    L_V = ½ mean_t max((V − R̂)², (clip(V, V_old ± ε_V) − R̂)²),   R̂ = A + V_old
    L   = L_π + c_V L_V

for some epochs over the buffer, in minibatches; then the next buffer is written. V is a model of its own that begins as
a copy of the policy (or a head on the policy, `shared_trunk`), and predicts what is still to come at every token.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from groundup.alignment import losses
from groundup.alignment.lora import freeze, merge
from groundup.alignment.method import Inputs
from groundup.alignment.on_policy import (
    STAT,
    OnPolicySettings,
    PolicyMethod,
    PolicyObjective,
    RolloutSource,
    answer_kl,
    passes,
    reference_logprobs,
)
from groundup.model import ModelConfig, OutputLayer, Transformer
from groundup.model.cost import forward_flops, parameter_shapes
from groundup.recipe import setting
from groundup.stage import Stage
from groundup.training import IGNORED, Batch
from groundup.training.objective import Term
from groundup.training.optimizers import Shapes


class PPOSettings(OnPolicySettings):
    """A model and a reward to a model that earns more of it."""

    epochs: int = setting(2, "passes over each buffer", ge=1)
    kl_coef: float = setting(0.05, "β: how much staying near the start is worth", ge=0.0)
    kl_target: float | None = setting(
        None, "adapt β so that an answer's KL divergence to the start comes to this, in nats (unset: β stays)", gt=0.0
    )
    gamma: float = setting(1.0, "γ: what a reward one token later is worth", gt=0.0, le=1.0)
    lam: float = setting(
        0.95, "λ of the advantages: 1: unbiased and noisy, 0: from the value model alone", ge=0.0, le=1.0
    )
    clip: float = setting(0.2, "ε: a token's probability moves no further from the buffer's than by this share", gt=0.0)
    value_clip: float | None = setting(0.2, "ε_V of the value model, in units of reward", gt=0.0)
    value_coef: float = setting(0.5, "c_V: the weight of the value model's loss", ge=0.0)
    shared_trunk: bool = setting(False, "values come from a head on the policy: half the memory, and less stable")
    reward_clip: float | None = setting(10.0, "the most that a score counts, either way", gt=0.0)


class ValueModel(nn.Module):
    """What is still to be earned, at every token: a Transformer with a head that begins at zero.

    Args:
        model: its weights are taken, not copied.
    """

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model, self.head = model, value_head(model.config)
        if model.lm_head is not None:
            freeze(model.lm_head)  # it has no gradient

    def forward(self, ids: Int[Tensor, "rows seq"]) -> Float[Tensor, "rows seq"]:
        """Values in float32: at t, of the state after token t, before the next is drawn."""
        return self.model(ids, head=lambda hidden, _: self.head(hidden.float())[..., 0])


def value_head(config: ModelConfig) -> nn.Linear:
    """A head whose values are 0 at first."""
    head = nn.Linear(config.d_model, 1)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    return head


class PPORollouts(RolloutSource):
    """Answers with advantages and returns."""

    settings: PPOSettings

    def learn_from(self, modules: Mapping[str, Any], batch: Batch, last: Batch) -> tuple[Batch, float]:
        """Rewards of tokens, values, advantages; the same on any number of processes."""
        settings, world, mask = self.settings, self.world, batch["targets"] != IGNORED
        reference = reference_logprobs(modules, batch, settings.temperature)
        values = torch.cat([self._values(modules, part["ids"][:, :-1]) for part in passes(batch)]).where(mask, 0.0)
        kl, coef = answer_kl(batch, reference), self._kl_coef(last)
        most = math.inf if settings.reward_clip is None else settings.reward_clip
        scores = batch["rewards"].nan_to_num(0.0).clamp(-most, most)
        rewards = losses.token_rewards(scores, losses.kl_estimate(batch["old"], reference), mask, kl_coef=coef)
        mask &= ~batch["rewards"].isnan()[:, None]  # nothing is learned from an answer without a reward
        batch["targets"][~mask] = IGNORED
        advantages, returns = losses.gae(rewards, values, mask, gamma=settings.gamma, lam=settings.lam)
        everyone = [world.gather(part) for part in (advantages, returns, values, mask)]
        whitened = losses.whiten(everyone[0], everyone[3])[world.rows(self.buffer_rows)]
        explained = float(losses.explained_variance(everyone[2], everyone[1], everyone[3]))
        of_all = torch.ones(len(mask))
        flops = (1 + (not settings.shared_trunk)) * len(mask) * forward_flops(modules["model"].config, self.width)
        return {
            "advantages": whitened, "returns": returns, "values": values, STAT + "kl": kl,
            STAT + "kl_coef": coef * of_all, STAT + "explained_variance": explained * of_all,
        }, flops  # fmt: skip

    def _values(self, modules: Mapping[str, Any], ids: Tensor) -> Float[Tensor, "rows seq"]:
        value, model = modules["value"], modules["model"]
        ids = ids.to(next(model.parameters()).device)
        if self.settings.shared_trunk:
            return model(ids, head=lambda hidden, _: value(hidden.float())[..., 0]).cpu()
        return value(ids).cpu()

    def _kl_coef(self, last: Batch) -> float:
        settings = self.settings
        if not last:
            return settings.kl_coef
        before = float(last[STAT + "kl_coef"][0])
        if settings.kl_target is None:
            return before
        kl = float(last[STAT + "kl"].mean())
        return losses.adaptive_kl_coef(before, kl, target=settings.kl_target, horizon=10_000, n=self.buffer_rows)


class PPO(PolicyObjective):
    """The clipped losses of policy and values."""

    settings: PPOSettings

    def divisors(self, mask: Bool[Tensor, "rows seq"]) -> dict[str, float]:
        """Tokens of answers."""
        return dict.fromkeys(("policy", "value"), int(mask.sum()))

    def losses(
        self, modules: Mapping[str, Any], batch: Batch, mask: Bool[Tensor, "rows seq"]
    ) -> tuple[losses.TokenStatistics, losses.PolicyLoss, dict[str, Term]]:
        """One pass of the policy, and one of the value model."""
        settings, ids = self.settings, batch["ids"][:, :-1]
        statistics = losses.logprobs_head(batch["targets"], settings.temperature)

        def both(hidden: Tensor, output: OutputLayer) -> tuple[losses.TokenStatistics, Tensor]:
            return statistics(hidden, output), modules["value"](hidden.float())[..., 0]

        if settings.shared_trunk:
            found, values = modules["model"](ids, head=both)
        else:
            found, values = modules["model"](ids, head=statistics), modules["value"](ids)
        policy = losses.ppo_policy_loss(found.logprobs, batch["old"], batch["advantages"], clip=settings.clip)
        value = losses.ppo_value_loss(values, batch["values"], batch["returns"], clip=settings.value_clip)
        loss, value_loss = policy.losses.where(mask, 0.0).sum(), value.where(mask, 0.0).sum()
        terms = {
            "policy": Term(loss, loss.detach()),
            "value": Term(value_loss, value_loss.detach(), settings.value_coef),
        }
        return found, policy, terms

    def flops(self, config: ModelConfig, shape: Sequence[int]) -> float:
        """Policy and value model."""
        return super().flops(config, shape) * (1 if self.settings.shared_trunk else 2)


class PPOMethod(PolicyMethod):
    """The stage: reinforcement learning from a reward."""

    name = "ppo"
    settings = PPOSettings
    source, objective = PPORollouts, PPO
    title = "Proximal policy optimization"
    curves = ("reward held_out_right kl", "held_out_reward", "entropy", "clipped", "explained_variance")

    def modules(self, inputs: Inputs) -> dict[str, nn.Module]:
        """The value model."""
        if inputs.settings.shared_trunk:
            return {"value": value_head(inputs.model.config)}
        trunk = copy.deepcopy(inputs.model)
        merge(trunk)
        return {"value": ValueModel(trunk)}

    def beside(self, stage: Stage, config: ModelConfig) -> dict[str, Shapes]:
        """The value model's shapes."""
        head = {"weight": (1, config.d_model), "bias": (1,)}
        if stage.settings.shared_trunk:
            return {"value": head}
        trunk = {f"model.{name}": shape for name, shape in parameter_shapes(config).items()}
        return {"value": {f"head.{name}": shape for name, shape in head.items()} | trunk}


PPO_METHOD = PPOMethod()
ppo = PPO_METHOD.train
