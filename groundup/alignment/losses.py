"""The losses of alignment: pure functions on tensors, without any state of training.

Per-token tensors are (batch, seq), with a mask that is true on the tokens of the response, its end token included; what
stands elsewhere never counts, not even NaN. Per-answer tensors are (batch,). Losses come without reduction, one value a
token or an answer, so that whoever calls them divides by the count of the whole step; `aggregate` and `masked_mean`
are the reductions.

    s(y) = Σ_t log π(y_t | x, y_<t)                 log-probability of an answer
    r(y) = s_policy(y) − s_reference(y)             log-ratio
    Δ    = r(chosen) − r(rejected)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from groundup.model import OutputLayer
from groundup.training.objective import IGNORED, SLICE_BYTES

Estimator = Literal["k1", "k2", "k3"]
Advantages = Literal["grpo", "dr_grpo", "rloo"]
Aggregation = Literal["grpo", "bnpo", "dapo", "dr_grpo"]
Values: TypeAlias = Float[Tensor, "*batch"]
Pairs: TypeAlias = Float[Tensor, " pairs"]
Tokens: TypeAlias = Float[Tensor, "batch seq"]
Mask: TypeAlias = Bool[Tensor, "batch seq"]


# Log-probabilities and masked statistics


class TokenStatistics(NamedTuple):
    """Of each target, (batch, seq), float32; 0 where there is none."""

    logprobs: Tokens  # log p(target)
    entropy: Tokens  # of the distribution that it is of, in nats, without gradient


def token_logprobs(
    logits: Float[Tensor, "*batch vocab"], targets: Int[Tensor, "*batch"], temperature: float = 1.0
) -> Values:
    """log softmax(logits / temperature) at the targets; 0 where a target is `IGNORED`."""
    is_target = targets != IGNORED
    logprobs = (logits.float() / temperature).log_softmax(-1)
    return logprobs.gather(-1, targets.where(is_target, 0)[..., None])[..., 0].where(is_target, 0.0)


def entropy(logits: Float[Tensor, "*batch vocab"], temperature: float = 1.0) -> Values:
    """−Σ p log p of softmax(logits / temperature), in nats."""
    logprobs = (logits.float() / temperature).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def logprobs_head(
    targets: Int[Tensor, "batch seq"], temperature: float = 1.0
) -> Callable[[Tensor, OutputLayer], TokenStatistics]:
    """`token_logprobs` and `entropy` in the form that `Transformer.forward(head=…)` takes.

    Logits are made of positions with a target only, and where they are many, slice by slice and again in the backward
    pass, so that they are never held whole.
    """

    def piece(rows: Tensor, wanted: Tensor, output: OutputLayer) -> tuple[Tensor, Tensor]:
        logits = output.logits(rows)
        return token_logprobs(logits, wanted, temperature), entropy(logits.detach(), temperature)

    def statistics(hidden: Float[Tensor, "batch seq d_model"], output: OutputLayer) -> TokenStatistics:
        where = (targets != IGNORED).nonzero(as_tuple=True)
        n_slice = max(1, SLICE_BYTES // (4 * output.vocab_size))
        slices = [*zip(*(torch.split(part[where], n_slice) for part in (hidden, targets)), strict=True)]
        make = piece if len(slices) == 1 else functools.partial(checkpoint, piece, use_reentrant=False)
        found = zip(*(make(part, wanted, output) for part, wanted in slices), strict=True)
        empty = torch.zeros(targets.shape, device=hidden.device)
        return TokenStatistics(*(empty.index_put(where, torch.cat(values)) for values in found))

    return statistics


def sequence_logprobs(
    logprobs: Float[Tensor, "*batch seq"], mask: Bool[Tensor, "*batch seq"], *, average: bool = False
) -> Values:
    """Σ_t log p over the masked tokens of each row, or their mean."""
    total = logprobs.where(mask, 0.0).sum(-1)
    return total / mask.sum(-1).clamp(min=1) if average else total


def masked_mean(
    values: Values, mask: Bool[Tensor, "*batch"], *, count: float | Tensor | None = None
) -> Float[Tensor, ""]:
    """Σ masked values / count.

    Args:
        values: any; what is not masked does not count.
        mask: what counts.
        count: of the whole step, over micro-batches and processes (default: the mask's own).
    """
    return values.where(mask, 0.0).sum() / (mask.sum().clamp(min=1) if count is None else count)


def whiten(values: Values, mask: Bool[Tensor, "*batch"], *, shift_mean: bool = True, unbiased: bool = True) -> Values:
    """Masked values with mean 0 and variance 1; 0 elsewhere.

    Args:
        values: of the whole rollout batch, not of one minibatch.
        mask: what counts.
        shift_mean: false keeps the mean, as rewards need it: their sign means something.
        unbiased: the variance is divided by n − 1, not n.
    """
    count = mask.sum()
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean).square(), mask) * (count / (count - 1).clamp(min=1) if unbiased else 1.0)
    whitened = (values - mean) * (variance + 1e-8).rsqrt()
    return (whitened if shift_mean else whitened + mean).where(mask, 0.0)


# Preferences


def bradley_terry_loss(
    chosen: Pairs, rejected: Pairs, *, margin: float | Tensor = 0.0, centering: float = 0.0
) -> Pairs:
    """−log σ(chosen − rejected − margin) + centering · (chosen + rejected)²: a reward model's loss.

    arXiv:2203.02155, equation 1; margin: arXiv:2307.09288, section 3.2.2; centering: arXiv:2312.09244, section 3.
    """
    return -F.logsigmoid(chosen - rejected - margin) + centering * (chosen + rejected).square()


def dpo_loss(chosen: Pairs, rejected: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Pairs:
    """−(1 − ε) log σ(β Δ) − ε log σ(−β Δ) of log-ratios (arXiv:2305.18290, equation 7; ε: cDPO)."""
    margin = beta * (chosen - rejected)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def robust_dpo_loss(chosen: Pairs, rejected: Pairs, *, beta: float, label_smoothing: float) -> Pairs:
    """`dpo_loss` without bias where a share ε < 1/2 of the preferences are flipped (arXiv:2403.00409, equation 10)."""
    margin = beta * (chosen - rejected)
    kept, flipped = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo_loss(chosen: Pairs, rejected: Pairs, *, beta: float) -> Pairs:
    """(Δ − 1 / (2 β))² (arXiv:2310.12036, equation 17); of log-ratios averaged over tokens it is TRL's."""
    return (chosen - rejected - 1 / (2 * beta)).square()


def hinge_loss(chosen: Pairs, rejected: Pairs, *, beta: float) -> Pairs:
    """max(0, 1 − β Δ) (SLiC-HF, arXiv:2305.10425, with log-ratios, as in arXiv:2309.06657)."""
    return F.relu(1 - beta * (chosen - rejected))


def kto_loss(
    logratios: Float[Tensor, " batch"], is_desirable: Bool[Tensor, " batch"], kl: float | Tensor,
    *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0,
) -> Float[Tensor, " batch"]:  # fmt: skip
    """λ (1 − σ(±β (r − z₀))): answers that are good or bad by themselves, in no pairs (arXiv:2402.01306, equation 8).

    Args:
        logratios: r of each answer.
        is_desirable: which are good: their sign is +.
        kl: z₀ = max(0, mean r of prompts with other prompts' answers), without gradient.
        beta: how fast an answer's value saturates.
        desirable_weight: λ of the good ones.
        undesirable_weight: λ of the bad ones.
    """
    signed = (logratios - kl) * torch.where(is_desirable, 1.0, -1.0)
    return (1 - torch.sigmoid(beta * signed)) * torch.where(is_desirable, desirable_weight, undesirable_weight)


def simpo_loss(chosen: Pairs, rejected: Pairs, *, beta: float, gamma: float) -> Pairs:
    """−log σ(β (s(w)/|w| − s(l)/|l|) − γ) of averaged log-probabilities, no reference (arXiv:2405.14734, eq. 6)."""
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def orpo_loss(chosen: Pairs, rejected: Pairs) -> Pairs:
    """−log σ(log odds(w) − log odds(l)), odds = p / (1 − p), of averaged log-probabilities (arXiv:2403.07691, eq. 7).

    Beside the chosen answer's cross-entropy; no reference.
    """
    return -F.logsigmoid((chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected)))


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 − eˣ) for x < 0, exact on both ends; a probability of 1 is taken for the one just below it."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -0.6931472
    far = torch.log1p(-x.where(~near, -1.0).exp())
    return torch.where(near, torch.log(-torch.expm1(x.where(near, -0.5))), far)


# Policy gradients


def kl_estimate(
    logprobs: Values, reference: Values, estimator: Estimator = "k1", *, old: Values | None = None
) -> Values:
    """KL(policy ‖ reference) from tokens that the policy drew (Schulman, "Approximating KL divergence", 2020).

    With d = log π − log π_ref: k1 = d, k2 = d² / 2, k3 = e⁻ᵈ − 1 + d. As values, k1 and k3 have the KL as their mean,
    and k2 has not. As *losses*, differentiated, they differ: the gradient of k1 is 0 on average, that of k2 is the
    KL's, that of k3 is the gradient of KL(reference ‖ policy). With `old`, the log-probabilities with which the tokens
    were drawn, the estimate is multiplied by π / π_old: then k3 has the KL's gradient, too (and k1).
    """
    d = logprobs - reference
    found = d if estimator == "k1" else d.square() / 2 if estimator == "k2" else torch.expm1(-d) + d
    return found if old is None else found * (logprobs - old).exp()


def adaptive_kl_coef(coef: float, kl: float, *, target: float, horizon: float, n: int) -> float:
    """The next coefficient: coef · (1 + clip(kl / target − 1, ±0.2) · n / horizon) (arXiv:1909.08593, sec. 2.2)."""
    return coef * (1 + max(-0.2, min(0.2, kl / target - 1)) * n / horizon)


def token_rewards(scores: Float[Tensor, " batch"], kl: Tokens, mask: Mask, *, kl_coef: float) -> Tokens:
    """−kl_coef · KL at every token of the answer, and the answer's score at its last one (arXiv:1909.08593, eq. 2)."""
    place = torch.arange(mask.shape[1], device=mask.device)
    is_last = mask & (place == place.where(mask, -1).amax(-1, keepdim=True))
    return (-kl_coef * kl).where(mask, 0.0) + scores[:, None].where(is_last, 0.0)


def gae(rewards: Tokens, values: Tokens, mask: Mask, *, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tokens, Tokens]:
    """Generalized advantage estimates, and returns = advantages + values (arXiv:1506.02438, equation 16).

        δ_t = R_t + γ V_{t+1} − V_t        A_t = Σ_k (γ λ)ᵏ δ_{t+k}

    The steps of an episode are the masked tokens: what lies between them (a tool's output) or behind them (padding) is
    passed over, and beyond the last one the value is 0. `values` at t are of the state before token t is drawn.
    """
    advantages = torch.zeros_like(values)
    following = following_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        own = mask[:, t]
        delta = rewards[:, t] + gamma * following_value - values[:, t]
        following = torch.where(own, delta + gamma * lam * following, following)
        following_value = torch.where(own, values[:, t], following_value)
        advantages[:, t] = following.where(own, 0.0)
    return advantages, (advantages + values).where(mask, 0.0)


class PolicyLoss(NamedTuple):
    """Of each token, (batch, seq)."""

    losses: Tokens  # what is minimized; has the gradient
    ratio: Tokens  # π / π_old, without gradient
    is_clipped: Mask  # where the clipped form is the larger one, so that the token has no gradient


def ppo_policy_loss(
    logprobs: Tokens, old: Tokens, advantages: Float[Tensor, "#batch #seq"],
    *, clip: float = 0.2, clip_high: float | None = None,
) -> PolicyLoss:  # fmt: skip
    """max(−A ρ, −A clip(ρ, 1 − clip, 1 + clip_high)) with ρ = π / π_old (arXiv:1707.06347, equation 7).

    At ρ = 1 its gradient is that of −A log π: REINFORCE.

    Args:
        logprobs: of the tokens, now.
        old: when they were drawn.
        advantages: of each token, or one for all of its row.
        clip: ε.
        clip_high: ε upwards (default: the same; arXiv:2503.14476, section 3.1, takes more).
    """
    ratio = (logprobs - old).exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    return PolicyLoss(torch.maximum(plain, clipped), ratio.detach(), clipped > plain)


def gspo_policy_loss(
    logprobs: Tokens, old: Tokens, advantages: Float[Tensor, "#batch #seq"],
    mask: Mask, *, clip: float = 3e-4, clip_high: float | None = 4e-4,
) -> PolicyLoss:  # fmt: skip
    """`ppo_policy_loss` with one ratio for all tokens of an answer: exp(mean_t log ρ_t) (arXiv:2507.18071, eq. 7)."""
    mean = sequence_logprobs(logprobs - old, mask, average=True)[:, None].expand_as(logprobs)
    return ppo_policy_loss(mean, torch.zeros_like(mean), advantages, clip=clip, clip_high=clip_high)


def ppo_value_loss(values: Tokens, old_values: Tokens, returns: Tokens, *, clip: float | None = 0.2) -> Tokens:
    """½ max((V − R)², (clip(V, V_old ± clip) − R)²); None: not clipped."""
    losses = (values - returns).square()
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        losses = torch.maximum(losses, (near - returns).square())
    return 0.5 * losses


def explained_variance(values: Values, returns: Values, mask: Bool[Tensor, "*batch"]) -> Float[Tensor, ""]:
    """1 − Var(R − V) / Var(R): 1 is a perfect value model, 0 one that says a constant; NaN if all returns are alike."""
    error, returns = (returns - values)[mask], returns[mask]
    return torch.where(returns.var() > 0, 1 - error.var() / returns.var(), torch.nan)


def group_advantages(
    rewards: Float[Tensor, "groups size"], kind: Advantages = "dr_grpo"
) -> Float[Tensor, "groups size"]:
    """How much better each answer is than the others to the same prompt.

        grpo      (R − mean) / (std + 1e-4), std divided by n − 1      arXiv:2402.03300, section 4.1.2
        dr_grpo   R − mean                                             arXiv:2503.20783, section 3.2
        rloo      R − mean of the others                               arXiv:2402.14740, equation 7

    A reward of NaN (its function failed) has advantage 0 and is in no mean. A group whose rewards are all alike, or
    that has one only, has no signal: exactly 0.
    """
    known = ~rewards.isnan()
    count = known.sum(-1, keepdim=True)
    found = rewards.where(known, 0.0)
    centred = (found - found.sum(-1, keepdim=True) / count.clamp(min=1)).where(known, 0.0)
    largest, least = rewards.nan_to_num(-torch.inf).amax(-1), rewards.nan_to_num(torch.inf).amin(-1)
    if kind == "grpo":
        centred = centred / ((centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt() + 1e-4)
    elif kind == "rloo":
        centred = centred * count / (count - 1).clamp(min=1)
    return centred.where((largest > least)[..., None], 0.0)


def aggregate(losses: Tokens, mask: Mask, how: Aggregation = "dr_grpo") -> Float[Tensor, ""]:
    """Per-token losses summed; divided by `aggregate_count` of the whole step it is the loss.

    grpo      mean over answers of the mean over tokens: short answers' tokens weigh more      arXiv:2402.03300
    bnpo      mean over the tokens of this micro-batch: depends on how a batch is cut
    dapo      mean over the tokens of the whole step                                           arXiv:2503.14476
    dr_grpo   sum over tokens / (answers · longest possible answer): no length bias            arXiv:2503.20783
    """
    losses = losses.where(mask, 0.0)
    if how == "grpo":
        return (losses.sum(-1) / mask.sum(-1).clamp(min=1)).sum()
    if how == "bnpo":
        return losses.sum() / mask.sum().clamp(min=1) * len(losses)
    return losses.sum()


def aggregate_count(mask: Mask, how: Aggregation, max_tokens: int) -> float:
    """What `aggregate` is divided by; of several micro-batches or processes, their sum.

    Args:
        mask: of the answers.
        how: as for `aggregate`.
        max_tokens: the longest that an answer may be; of dr_grpo.
    """
    if how == "dapo":
        return float(mask.sum())
    return float(len(mask) * (max_tokens if how == "dr_grpo" else 1))
