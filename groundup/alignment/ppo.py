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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from groundup.alignment.lora import freeze
from groundup.alignment.losses import (
    adaptive_kl_coef,
    explained_variance,
    gae,
    kl_estimate,
    logprobs_head,
    ppo_policy_loss,
    ppo_value_loss,
    token_rewards,
    whiten,
)
from groundup.alignment.on_policy import (
    STAT,
    OnPolicySettings,
    PolicyMethod,
    RolloutSource,
    answer_kl,
    check_first_ratio,
    passes,
    reference_logprobs,
    stat_counts,
    stat_terms,
    train_policy,
    trimmed,
)
from groundup.alignment.rewards import FunctionReward, Prompts
from groundup.console import Console
from groundup.distributed import World
from groundup.interop.start import starting_config
from groundup.model import ModelConfig, OutputLayer, Transformer
from groundup.model.cost import forward_flops, parameter_shapes
from groundup.recipe import setting
from groundup.stage import Stage
from groundup.tokenizer import Tokenizer
from groundup.training import IGNORED, Batch, TrainedModel
from groundup.training.objective import Term, pass_flops
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


def ppo(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Prompts,
    reward: FunctionReward | nn.Module,
    settings: PPOSettings | None = None,
    *,
    out: str | Path,
    seed: int = 1,
    start: str = "fresh",
    name: str = "ppo",
    world: World | None = None,
    console: Console | None = None,
) -> TrainedModel:
    """Train a model by PPO; go on from a checkpoint in `out` if there is one.

    Args:
        model: the policy, trained in place; the reference and the value model begin as copies of it.
        tokenizer: of the model.
        prompts: to answer.
        reward: a function, or a reward model: called with (ids, lengths), gives a score for each row.
        settings: what `[align.NAME]` with `method = "ppo"` says; its `start`, `data` and `reward` load nothing.
        out: the folder for logs, checkpoints, answers and the model.
        seed: of the order and of the answers.
        start: what stands for the weights of model and reward.
        name: of the stage, in messages.
        world: the processes to train on (default: those of `torchrun`, or this one).
        console: where progress is shown.

    Raises:
        DataError: the reward fails for every answer.
        GroundupError: the engine and the trainer disagree; or what `train` raises.
        Interrupted: asked to stop; everything is saved.
    """
    settings = settings or PPOSettings()
    value = nn.Linear(model.config.d_model, 1) if settings.shared_trunk else ValueModel(copy.deepcopy(model))
    if isinstance(value, nn.Linear):
        nn.init.zeros_(value.weight), nn.init.zeros_(value.bias)

    def source(**options: Any) -> RolloutSource:
        return PPORollouts(settings=settings, **options)

    return train_policy(
        model, tokenizer, prompts, reward, settings, source=source,
        objective=lambda rollouts: PPO(settings, rollouts), trained={"value": value}, out=out, seed=seed, start=start,
        name=name, world=world, console=console,
    )  # fmt: skip


class ValueModel(nn.Module):
    """What is still to be earned, at every token: a Transformer with a head that begins at zero.

    Args:
        model: its weights are taken, not copied.
    """

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model, self.head = model, nn.Linear(model.config.d_model, 1)
        if model.lm_head is not None:
            freeze(model.lm_head)  # it has no gradient
        nn.init.zeros_(self.head.weight), nn.init.zeros_(self.head.bias)

    def forward(self, ids: Int[Tensor, "rows seq"]) -> Float[Tensor, "rows seq"]:
        """Values in float32: at t, of the state after token t, before the next is drawn."""
        return self.model(ids, head=lambda hidden, _: self.head(hidden.float())[..., 0])


class PPORollouts(RolloutSource):
    """Answers with advantages and returns."""

    settings: PPOSettings

    def learn_from(self, modules: Mapping[str, nn.Module], batch: Batch, last: Batch) -> tuple[Batch, float]:
        """Rewards of tokens, values, advantages; the same on any number of processes."""
        settings, world, mask = self.settings, self._world, batch["targets"] != IGNORED
        reference = reference_logprobs(modules["reference"], batch, settings.temperature)
        values = torch.cat([_values(modules, part).cpu() for part in passes(batch)]).where(mask, 0.0)
        kl = answer_kl(batch, reference)
        coef = self._kl_coef(last)
        most = math.inf if settings.reward_clip is None else settings.reward_clip
        scores = batch["rewards"].nan_to_num(0.0).clamp(-most, most)
        rewards = token_rewards(scores, kl_estimate(batch["old"], reference), mask, kl_coef=coef)
        mask &= ~batch["rewards"].isnan()[:, None]  # nothing is learned from an answer without a reward
        batch["targets"][~mask] = IGNORED
        advantages, returns = gae(rewards, values, mask, gamma=settings.gamma, lam=settings.lam)
        everyone = [world.gather(part) for part in (advantages, returns, values, mask)]
        whitened = whiten(everyone[0], everyone[3])[world.rows(self.buffer_rows)]
        explained = float(explained_variance(everyone[2], everyone[1], everyone[3]))
        of_all = torch.ones(len(mask))
        flops = (1 + (not settings.shared_trunk)) * len(mask) * forward_flops(_config(modules), self.width)
        return {
            "advantages": whitened, "returns": returns, "values": values, STAT + "kl": kl,
            STAT + "kl_coef": coef * of_all, STAT + "explained_variance": explained * of_all,
        }, flops  # fmt: skip

    def _kl_coef(self, last: Batch) -> float:
        settings = self.settings
        if not last:
            return settings.kl_coef
        before = float(last[STAT + "kl_coef"][0])
        if settings.kl_target is None:
            return before
        kl = float(last[STAT + "kl"].mean())
        return adaptive_kl_coef(before, kl, target=settings.kl_target, horizon=10_000, n=self.buffer_rows)


@dataclass(frozen=True)
class PPO:
    """The clipped losses of policy and values.

    Attributes:
        settings: of the stage.
        source: says whether a minibatch is the first of its buffer.
    """

    settings: PPOSettings
    source: RolloutSource

    def counts(self, batch: Batch) -> dict[str, float]:
        """Tokens of answers, and rows that have the other figures."""
        n = int((batch["targets"] != IGNORED).sum())
        return {**dict.fromkeys(("policy", "value", "entropy", "clipped"), n), **stat_counts(batch)}

    def terms(self, modules: Mapping[str, nn.Module], batch: Batch) -> dict[str, Term]:
        """One pass of the policy, and one of the value model."""
        settings, stats = self.settings, stat_terms(batch)
        batch = trimmed(batch)
        targets, mask = batch["targets"], batch["targets"] != IGNORED
        statistics = logprobs_head(targets, settings.temperature)
        if settings.shared_trunk:

            def both(hidden: Tensor, output: OutputLayer) -> tuple[Any, Tensor]:
                return statistics(hidden, output), modules["value"](hidden.float())[..., 0]

            found, values = modules["model"](batch["ids"][:, :-1], head=both)
        else:
            found = modules["model"](batch["ids"][:, :-1], head=statistics)
            values = modules["value"](batch["ids"][:, :-1])
        dtype: torch.dtype = modules["model"].compute_dtype  # type: ignore[assignment]
        if modules["model"].training:
            check_first_ratio(self.source.is_first, found.logprobs, batch["old"], mask, dtype)
        policy = ppo_policy_loss(found.logprobs, batch["old"], batch["advantages"], clip=settings.clip)
        value = ppo_value_loss(values, batch["values"], batch["returns"], clip=settings.value_clip)
        losses, value_losses = policy.losses.where(mask, 0.0).sum(), value.where(mask, 0.0).sum()
        entropy, clipped = found.entropy.where(mask, 0.0).sum(), (policy.is_clipped & mask).sum()
        return {
            "policy": Term(losses, losses.detach()),
            "value": Term(value_losses, value_losses.detach(), settings.value_coef),
            "entropy": Term(entropy, entropy, 0.0),
            "clipped": Term(clipped, clipped, 0.0),
            **stats,
        }

    def flops(self, config: ModelConfig, shape: Sequence[int]) -> float:
        """Policy and value model."""
        return pass_flops(config, shape) * (1 if self.settings.shared_trunk else 2)


def _values(modules: Mapping[str, nn.Module], batch: Batch) -> Float[Tensor, "rows seq"]:
    value, model = modules["value"], modules["model"]
    ids = batch["ids"].to(next(model.parameters()).device)[:, :-1]
    if isinstance(value, nn.Linear):
        return model(ids, head=lambda hidden, _: value(hidden.float())[..., 0])
    return value(ids)


def _config(modules: Mapping[str, nn.Module]) -> ModelConfig:
    model = modules["model"]
    assert isinstance(model, Transformer)
    return model.config


class PPOMethod(PolicyMethod):
    """The stage: reinforcement learning from a reward."""

    settings = PPOSettings
    run = staticmethod(ppo)

    def shapes(self, stage: Stage) -> Shapes:
        """Policy and value model."""
        config, found = starting_config(stage)[0], super().shapes(stage)
        head = {"weight": (1, config.d_model), "bias": (1,)}
        value = {f"head.{name}": shape for name, shape in head.items()}
        value |= {f"model.{name}": shape for name, shape in parameter_shapes(config).items()}
        value = head if stage.settings.shared_trunk else value
        return {
            f"{module}.{name}": shape
            for module, part in (("model", found), ("value", value))
            for name, shape in part.items()
        }

    title = "Proximal policy optimization"
    curves = ("reward", "kl", "held_out_reward", "held_out_right", "entropy", "clipped", "explained_variance")


PPO_METHOD = PPOMethod()
