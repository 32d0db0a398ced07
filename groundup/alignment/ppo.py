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
import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from pydantic import model_validator
from torch import Tensor, nn

from groundup.alignment import losses
from groundup.alignment.lora import freeze, merge
from groundup.alignment.method import Inputs
from groundup.alignment.on_policy import STAT, OnPolicyAlgorithm, OnPolicySettings, PolicyMethod, TokenLosses, in_passes
from groundup.model import ModelConfig, Transformer
from groundup.model.cost import parameter_shapes
from groundup.recipe import setting
from groundup.stage import Stage
from groundup.training import IGNORED, Batch
from groundup.training.optimizers import Shapes


class PPOSettings(OnPolicySettings):
    """A model and a reward to a model that earns more of it."""

    epochs: int = setting(2, "passes over each buffer", ge=1)
    kl_coef: float = setting(0.05, "β: how much staying near the start is worth", ge=0.0)
    kl_target: float | None = setting(
        None, "adapt β so that an answer's KL divergence to the start comes to this, in nats (unset: β stays)", gt=0.0
    )
    kl_horizon: int = setting(
        1_000, "kl_target: in so many answers β changes by a fifth, where the divergence is far from its target", ge=1
    )
    gamma: float = setting(1.0, "γ: what a reward one token later is worth", gt=0.0, le=1.0)
    lam: float = setting(
        0.95, "λ of the advantages: 1: unbiased and noisy, 0: from the value model alone", ge=0.0, le=1.0
    )
    clip: float = setting(
        0.2, "ε: beyond this share of the buffer's probability nothing pushes a token further", gt=0.0
    )
    value_clip: float | None = setting(0.2, "ε_V of the value model, in units of reward", gt=0.0)
    value_coef: float = setting(0.5, "c_V: the weight of the value model's loss", ge=0.0)
    shared_trunk: bool = setting(False, "values come from a head on the policy: half the memory, and less stable")
    reward_clip: float | None = setting(10.0, "the most that a score counts, either way", gt=0.0)

    @model_validator(mode="after")
    def _a_horizon_has_a_target(self) -> PPOSettings:
        if self.kl_target is None and "kl_horizon" in self.model_fields_set:
            raise ValueError("kl_horizon: β stays without kl_target: set it, or leave both unset")
        return self

    def fingerprint_values(self) -> dict[str, Any]:
        """Without a target it is as if there were no horizon."""
        values = super().fingerprint_values()
        return values if self.kl_target is not None else {name: v for name, v in values.items() if name != "kl_horizon"}


class ValueHead(nn.Linear):
    """What is still to be earned, in float32: at t, of the state after token t, before the next is drawn. 0 at first.

    Args:
        d_model: of the hidden states.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, 1)
        nn.init.zeros_(self.weight), nn.init.zeros_(self.bias)

    def forward(self, hidden: Float[Tensor, "rows seq d_model"], output: object = None) -> Float[Tensor, "rows seq"]:
        """Values, in the form that `Transformer.forward(head=…)` takes."""
        return super().forward(hidden.float())[..., 0]


class ValueModel(nn.Module):
    """A Transformer with a value head.

    Args:
        model: its weights are taken, not copied.
    """

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model, self.head = model, ValueHead(model.config.d_model)
        if model.lm_head is not None:
            freeze(model.lm_head)  # it has no gradient

    def forward(self, ids: Int[Tensor, "rows seq"]) -> Float[Tensor, "rows seq"]:
        """The values at every token."""
        return self.model(ids, head=self.head)


class PPO(OnPolicyAlgorithm):
    """Answers with advantages and returns, and the clipped losses of policy and values."""

    settings: PPOSettings

    @property
    def n_models(self) -> int:  # type: ignore[override]
        """The policy, and the value model."""
        return 1 if self.settings.shared_trunk else 2

    def learn_from(self, modules: Mapping[str, Any], batch: Batch, reference: Tensor, last: Batch) -> Batch:
        """Rewards of tokens, values, advantages; the same on any number of processes."""
        settings, world, mask = self.settings, self.inputs.world, batch["targets"] != IGNORED
        coef = float(last[STAT + "kl_coef"][0]) if last else settings.kl_coef
        if last and settings.kl_target is not None:
            kl = float(last[STAT + "kl"].mean())
            n, horizon = min(self.buffer_rows, settings.kl_horizon), settings.kl_horizon  # a fifth at most, or β < 0
            coef = losses.adaptive_kl_coef(coef, kl, target=settings.kl_target, horizon=horizon, n=n)
        most = math.inf if settings.reward_clip is None else settings.reward_clip
        scores = batch["rewards"].nan_to_num(0.0).clamp(-most, most)
        rewards = losses.token_rewards(scores, losses.kl_estimate(batch["old"], reference), mask, kl_coef=coef)
        values = in_passes(batch, functools.partial(self._values, modules)).where(mask, 0.0)
        mask &= ~batch["rewards"].isnan()[:, None]  # nothing is learned from an answer without a reward
        batch["targets"][~mask] = IGNORED
        advantages, returns = losses.gae(rewards, values, mask, gamma=settings.gamma, lam=settings.lam)
        everyone = [world.gather(part) for part in (advantages, returns, values, mask)]
        whitened = losses.whiten(everyone[0], everyone[3])[world.rows(self.buffer_rows)]
        explained = float(losses.explained_variance(everyone[2], everyone[1], everyone[3]))
        figures = {"kl_coef": coef, "explained_variance": explained}
        batch |= {STAT + name: torch.full((len(mask),), value) for name, value in figures.items()}
        return batch | {"advantages": whitened, "returns": returns, "values": values}

    def _values(self, modules: Mapping[str, Any], part: Batch) -> Float[Tensor, "rows seq"]:
        ids, value = part["ids"][:, :-1].to(next(modules["model"].parameters()).device), modules["value"]
        return modules["model"](ids, head=value) if self.settings.shared_trunk else value(ids)

    @property
    def weights(self) -> dict[str, float]:
        """L = L_π + c_V L_V, each a mean over the tokens of answers."""
        return {"policy": 1.0, "value": self.settings.value_coef}

    def token_losses(self, modules: Mapping[str, Any], batch: Batch, mask: losses.Mask) -> TokenLosses:
        """One pass of the policy, and one of the value model."""
        settings, ids, value = self.settings, batch["ids"][:, :-1], modules["value"]
        statistics = losses.logprobs_head(batch["targets"], settings.temperature)
        if settings.shared_trunk:
            both = modules["model"](ids, head=lambda hidden, output: (statistics(hidden, output), value(hidden)))
            found, values = both
        else:
            found, values = modules["model"](ids, head=statistics), value(ids)
        policy = losses.ppo_policy_loss(found.logprobs, batch["old"], batch["advantages"], clip=settings.clip)
        error = losses.ppo_value_loss(values, batch["values"], batch["returns"], clip=settings.value_clip)
        return found, policy, {"value": error}


class PPOMethod(PolicyMethod):
    """The stage: reinforcement learning from a reward."""

    name = "ppo"
    settings = PPOSettings
    algorithm = PPO
    title = "Proximal policy optimization"
    curves = ("reward held_out_right kl", "held_out_reward", "entropy", "clipped", "explained_variance")

    def modules(self, inputs: Inputs) -> dict[str, nn.Module]:
        """The value model."""
        if inputs.settings.shared_trunk:
            return {"value": ValueHead(inputs.model.config.d_model)}
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
