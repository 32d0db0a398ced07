"""The losses of alignment: golden figures (TRL's in data/alignment_losses.json), laws, and exact enumerations."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, tensor

import groundup as gu
from groundup.alignment import losses
from groundup.alignment.losses import (
    adaptive_kl_coef,
    aggregate,
    aggregate_count,
    bradley_terry_loss,
    dpo_loss,
    entropy,
    explained_variance,
    gae,
    group_advantages,
    gspo_policy_loss,
    hinge_loss,
    ipo_loss,
    kl_estimate,
    kto_loss,
    logprobs_head,
    masked_mean,
    orpo_loss,
    ppo_policy_loss,
    ppo_value_loss,
    robust_dpo_loss,
    sequence_logprobs,
    simpo_loss,
    token_logprobs,
    token_rewards,
    whiten,
)
from groundup.model import Transformer, preset
from groundup.training import IGNORED

GOLDEN = json.loads((Path(__file__).parent / "data" / "alignment_losses.json").read_text(encoding="utf-8"))
MAX_TOKENS = 8  # of the golden groups' answers


def close(found: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(wanted), atol=tolerance, rtol=tolerance)


def padded(*rows: list[float]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([tensor(row) for row in rows], batch_first=True)


def test_the_losses_are_at_hand() -> None:
    assert gu.alignment.losses.dpo_loss is losses.dpo_loss


# TRL


def check_golden(part: str, kept: dict[str, Any]) -> None:
    """Our losses on these inputs are TRL's."""
    {"pairs": _pairs, "unpaired": _unpaired, "averaged": _averaged, "reward": _reward, "supervised": _supervised,
     "group": _group}[part](kept)  # fmt: skip


def _pairs(kept: dict[str, Any]) -> None:
    mask = tensor(kept["mask"])
    both = [
        (sequence_logprobs(tensor(kept["policy"]), mask, average=average)
         - sequence_logprobs(tensor(kept["reference"]), mask, average=average)).chunk(2)
        for average in (False, True)
    ]  # fmt: skip
    summed, mean = both
    close(dpo_loss(*summed, beta=0.1).mean(), kept["losses"]["sigmoid"])
    close(hinge_loss(*summed, beta=0.1).mean(), kept["losses"]["hinge"])
    close(ipo_loss(*mean, beta=0.1).mean(), kept["losses"]["ipo"])
    close(robust_dpo_loss(*summed, beta=0.1, label_smoothing=0.1).mean(), kept["losses"]["robust"])


def _unpaired(kept: dict[str, Any]) -> None:
    kl = tensor(kept["mismatched"]).mean().clamp(min=0)
    ratios, good = tensor(kept["logratios"]), tensor(kept["is_desirable"])
    close(kto_loss(ratios, good, kl, beta=0.1, desirable_weight=1.5).mean(), kept["loss"])


def _averaged(kept: dict[str, Any]) -> None:
    chosen, rejected = tensor(kept["chosen"]), tensor(kept["rejected"])
    close(simpo_loss(chosen, rejected, beta=2.0, gamma=0.5), kept["simpo"])
    close(0.1 * orpo_loss(chosen, rejected), kept["orpo"])


def _reward(kept: dict[str, Any]) -> None:
    for centering, loss in kept["losses"].items():
        scores = tensor(kept["chosen"]), tensor(kept["rejected"])
        close(bradley_terry_loss(*scores, centering=float(centering)).mean(), loss)


def _supervised(kept: dict[str, Any]) -> None:
    for name, loss in kept["losses"].items():
        close(-masked_mean(tensor(kept[name]["logprobs"]), tensor(kept[name]["mask"])), loss)


def _group(kept: dict[str, Any]) -> None:
    policy, old, reference, mask = (tensor(kept[name]) for name in ("policy", "old", "reference", "mask"))
    advantages = tensor(kept["advantages"])[:, None]
    for name, loss in kept["losses"].items():
        how, level, beta = name.split()
        if level == "token":
            parts, ratio = ppo_policy_loss(policy, old, advantages).losses, policy - old
        else:
            parts = gspo_policy_loss(policy, old, advantages, mask, clip=0.2, clip_high=0.2).losses
            ratio = sequence_logprobs(policy - old, mask, average=True)[:, None]
        parts = parts + float(beta) * kl_estimate(policy, reference, "k3") * ratio.exp()
        close(aggregate(parts, mask, how) / aggregate_count(mask, how, MAX_TOKENS), loss)


@pytest.mark.parametrize("part", [name for name in GOLDEN if name != "trl"])
def test_golden_figures_of_trl(part: str) -> None:
    check_golden(part, GOLDEN[part])


def test_figures_worked_out_by_hand() -> None:
    chosen, rejected = tensor([-1.2, -0.7, -2.0]), tensor([-1.5, -0.9, -1.1])
    close(simpo_loss(chosen, rejected, beta=2.0, gamma=0.5), [0.644397, 0.744397, 2.395545])
    close(0.1 * orpo_loss(chosen, rejected), [0.051065, 0.052741, 0.143220])
    lengths = tensor([[-1.0, -1.0, -1.0, -1.0], [-2.0, -1.0, 0.0, 0.0]]), padded([1.0] * 4, [1.0] * 2) > 0
    close(sequence_logprobs(*lengths), [-4.0, -3.0])
    close(sequence_logprobs(*lengths, average=True), [-1.0, -1.5])


# Log-probabilities


def test_logprobs_entropy_and_temperature() -> None:
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(7, (2, 5), generator=torch.Generator().manual_seed(1))
    targets[0, :2] = IGNORED
    found = token_logprobs(logits, targets, 0.7)
    assert (found[0, :2] == 0).all()
    wanted = torch.distributions.Categorical(logits=logits / 0.7)
    close(found[1], wanted.log_prob(targets.clamp(min=0))[1])
    close(entropy(logits, 0.7), wanted.entropy())
    close(entropy(torch.zeros(8)), math.log(8))


@pytest.mark.parametrize("slice_bytes", [1 << 30, 1 << 13])
def test_logprobs_in_slices_are_those_of_all_logits(slice_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "SLICE_BYTES", slice_bytes)
    model = Transformer(preset("ground-nano", n_layers=1, vocab_size=320, context_length=16))
    ids = torch.randint(320, (3, 16), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(-1, 1).where(torch.arange(16) > 6, IGNORED)
    found = model(ids, head=logprobs_head(targets, 0.9))
    logits = model(ids)
    close(found.logprobs, token_logprobs(logits, targets, 0.9))
    close(found.entropy, entropy(logits, 0.9).where(targets != IGNORED, 0.0))
    gradients = [
        torch.autograd.grad(values.square().sum(), [*model.parameters()], retain_graph=True)
        for values in (found.logprobs, token_logprobs(logits, targets, 0.9))
    ]
    for own, wanted in zip(*gradients, strict=True):
        close(own, wanted)


def test_a_step_is_divided_by_its_whole_count() -> None:
    """Micro-batches of 3 and 17 tokens: the mean of their means is another number."""
    values, mask = torch.arange(20.0), torch.ones(20, dtype=torch.bool)
    parts = [masked_mean(values[cut], mask[cut], count=20) for cut in (slice(0, 3), slice(3, 20))]
    close(sum(parts), values.mean())
    close(masked_mean(tensor([1.0, math.nan]), tensor([True, False])), 1.0)


# Preferences


def test_reference_is_policy() -> None:
    """The loss is ln 2 and the gradient is not zero."""
    ratios = torch.zeros(2, 3, requires_grad=True)
    for found in (
        dpo_loss(*ratios, beta=0.1), dpo_loss(*ratios, beta=0.1, label_smoothing=0.1), bradley_terry_loss(*ratios)
    ):  # fmt: skip
        close(found, [math.log(2)] * 3)
        (gradient,) = torch.autograd.grad(found.sum(), ratios, retain_graph=True)
        assert (gradient[0] < 0).all()
        assert torch.equal(gradient[0], -gradient[1])
    close(ipo_loss(*ratios, beta=0.1), [25.0] * 3)
    close(hinge_loss(*ratios, beta=0.1), [1.0] * 3)
    close(kto_loss(ratios[0], tensor([True, False, True]), 0.0, beta=0.1), [0.5] * 3)


@given(st.floats(-50, 50), st.floats(-50, 50), st.floats(0.01, 2.0))
def test_swapping_the_sides(chosen: float, rejected: float, beta: float) -> None:
    w, l = tensor([chosen], dtype=torch.float64), tensor([rejected], dtype=torch.float64)  # noqa: E741
    close(dpo_loss(w, l, beta=beta) - dpo_loss(l, w, beta=beta), -beta * (w - l), 1e-7)
    close(bradley_terry_loss(w, l) - bradley_terry_loss(l, w), -(w - l), 1e-7)
    close(dpo_loss(w, l, beta=beta, label_smoothing=0.5), dpo_loss(l, w, beta=beta, label_smoothing=0.5), 1e-7)


def test_far_away_nothing_overflows() -> None:
    far = tensor([-2000.0]), tensor([2000.0])
    assert dpo_loss(*far, beta=0.5).item() == pytest.approx(2000)
    sure = tensor([0.0, -1e-9, -80.0], requires_grad=True)
    found = orpo_loss(sure, sure.flip(0))
    assert found.isfinite().all()
    assert torch.autograd.grad(found.sum(), sure)[0].isfinite().all()


def test_robust_dpo_undoes_the_noise() -> None:
    """Where a share of the preferences is flipped, its mean is the clean loss."""
    w, l = tensor([1.3]), tensor([-0.4])  # noqa: E741
    noisy = [robust_dpo_loss(*pair, beta=0.5, label_smoothing=0.2) for pair in ((w, l), (l, w))]
    close(0.8 * noisy[0] + 0.2 * noisy[1], dpo_loss(w, l, beta=0.5))


def test_kto_pulls_good_answers_up_and_bad_ones_down() -> None:
    ratios = torch.zeros(2, requires_grad=True)
    kto_loss(ratios, tensor([True, False]), 0.3, beta=0.5, undesirable_weight=2.0).sum().backward()
    assert ratios.grad is not None
    assert ratios.grad[0] < 0 < ratios.grad[1]


# Policy gradients

LOGP, REFERENCE = padded([-1, -0.5, -2, -0.3], [-0.7, -1.5]), padded([-1.2, -0.4, -1, -0.8], [-0.9, -1.1])
MASK = padded([1.0] * 4, [1.0] * 2) > 0
VALUES, SCORES = padded([0.1, 0.2, 0.3, 0.4], [-0.1, 0.05]), tensor([2.0, -1.0])
ADVANTAGES = padded([1.675491, 1.668938, 1.646250, 1.575], [-0.8385, -1.03])
MOVED = padded([0.3, -0.3, 0.05, 0], [0.1, -0.25])


def test_ppo_on_the_golden_rollout() -> None:
    rewards = token_rewards(SCORES, kl_estimate(LOGP, REFERENCE), MASK, kl_coef=0.05)
    close(rewards, padded([-0.01, 0.005, 0.05, 1.975], [-0.01, -0.98]))
    advantages, returns = gae(rewards, VALUES, MASK, gamma=1.0, lam=0.95)
    close(advantages, ADVANTAGES)
    close(returns, padded([1.775491, 1.868938, 1.946250, 1.975], [-0.9385, -0.98]))
    whitened = whiten(advantages, MASK)
    close(whitened, padded([0.670179, 0.665258, 0.648225, 0.594731], [-1.217308, -1.361085]))
    biased = padded([0.734144, 0.728754, 0.710095, 0.651495], [-1.333494, -1.490994])
    close(whiten(advantages, MASK, unbiased=False), biased)
    policy = ppo_policy_loss(LOGP + MOVED, LOGP, whitened)
    close(masked_mean(policy.losses, MASK), -0.0231732)
    close(aggregate(policy.losses, MASK, "grpo") / 2, 0.2868953)
    close(masked_mean(policy.is_clipped.float(), MASK), 1 / 3)
    values = VALUES + padded([0.5, -0.1, 0.05, 0.3], [0.4, 0])
    close(masked_mean(ppo_value_loss(values, VALUES, returns), MASK), 1.0283028)
    for estimator, wanted in (("k1", -0.1166667), ("k2", 0.1729167), ("k3", 0.2078258)):
        close(masked_mean(kl_estimate(LOGP + MOVED, REFERENCE, estimator), MASK), wanted)


@given(st.integers(0, 10_000), st.floats(0.5, 1.0), st.floats(0.0, 1.0))
def test_gae_is_its_definition(seed: int, gamma: float, lam: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, 3, 6, generator=draw, dtype=torch.float64)
    mask = torch.rand(3, 6, generator=draw) < 0.7
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row in range(3):
        steps = mask[row].nonzero()[:, 0].tolist()
        v = [float(values[row, t]) for t in steps] + [0.0]
        deltas = [float(rewards[row, t]) + gamma * v[k + 1] - v[k] for k, t in enumerate(steps)]
        for k, t in enumerate(steps):
            wanted = sum((gamma * lam) ** i * delta for i, delta in enumerate(deltas[k:]))
            assert float(advantages[row, t]) == pytest.approx(wanted, abs=1e-9)
            assert float(returns[row, t]) == pytest.approx(wanted + v[k], abs=1e-9)
    assert (advantages[~mask] == 0).all()


def test_padding_leaks_into_nothing() -> None:
    def wide(values: Tensor, fill: float) -> Tensor:
        return torch.nn.functional.pad(values, (1, 3), value=fill)

    mask = torch.nn.functional.pad(MASK, (1, 3))
    rewards = token_rewards(SCORES, kl_estimate(LOGP, REFERENCE), MASK, kl_coef=0.05)
    wanted = gae(rewards, VALUES, MASK)
    for fill in (7.0, math.nan):
        padded_rewards = token_rewards(SCORES, wide(LOGP - REFERENCE, fill), mask, kl_coef=0.05)
        close(padded_rewards[:, 1:-3], rewards)
        for found, part in zip(gae(padded_rewards, wide(VALUES, fill), mask), wanted, strict=True):
            close(found[:, 1:-3], part)
        close(whiten(wide(VALUES, fill), mask)[:, 1:-3], whiten(VALUES, MASK))


def test_values_of_zero_give_discounted_rewards() -> None:
    rewards = tensor([[1.0, 2.0, 3.0]])
    advantages, _ = gae(rewards, torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool), gamma=0.5, lam=1.0)
    close(advantages, [[1 + 0.5 * 2 + 0.25 * 3, 2 + 0.5 * 3, 3.0]])


def test_whitened_rewards_keep_their_mean() -> None:
    found = whiten(VALUES, MASK, shift_mean=False)
    close(masked_mean(found, MASK), masked_mean(VALUES, MASK))
    close(masked_mean(whiten(VALUES, MASK), MASK), 0.0)


def test_first_epoch_of_ppo_is_reinforce() -> None:
    logp = LOGP.clone().requires_grad_()
    first = ppo_policy_loss(logp, LOGP, ADVANTAGES)
    assert (first.ratio == 1).all()
    assert not first.is_clipped.any()
    gradients = [torch.autograd.grad(masked_mean(loss, MASK), logp)[0] for loss in (first.losses, -ADVANTAGES * logp)]
    assert torch.equal(*gradients)
    by_answer = ADVANTAGES[:, :1]
    sequence = gspo_policy_loss(logp, LOGP, by_answer, MASK).losses
    gradients = [torch.autograd.grad(aggregate(loss, MASK, "grpo"), logp)[0] for loss in (sequence, -by_answer * logp)]
    close(*gradients)


def test_clipping_stops_the_gradient_only_where_it_would_go_on() -> None:
    logp = tensor([[0.5, 0.5, -0.5, -0.5]], requires_grad=True)
    advantages = tensor([[1.0, -1.0, 1.0, -1.0]])
    policy = ppo_policy_loss(logp, torch.zeros(1, 4), advantages)
    policy.losses.sum().backward()
    assert logp.grad is not None
    assert (logp.grad != 0).tolist() == [[False, True, True, False]]
    assert (~policy.is_clipped).tolist() == [[False, True, True, False]]
    assert not ppo_policy_loss(logp, torch.zeros(1, 4), advantages, clip_high=1.0).is_clipped[0, 0]


def test_kl_estimators_by_enumeration() -> None:
    """Over all tokens: which estimates have the KL as their mean, and which have its gradient."""
    draw = torch.Generator().manual_seed(3)
    z, reference = torch.randn(2, 6, generator=draw, dtype=torch.float64)
    z.requires_grad_()
    logp, ref = z.log_softmax(-1), reference.log_softmax(-1)
    p = logp.exp().detach()
    kl, reverse = (logp.exp() * (logp - ref)).sum(), (ref.exp() * (ref - logp)).sum()

    def gradient(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, z, retain_graph=True)[0]

    means = {name: (p * kl_estimate(logp, ref, name)).sum() for name in ("k1", "k2", "k3")}
    close(means["k1"], kl, 1e-12)
    close(means["k3"], kl, 1e-12)
    assert abs(float((means["k2"] - kl).detach())) > 0.05
    close(gradient(means["k1"]), torch.zeros(6, dtype=torch.float64), 1e-12)
    close(gradient(means["k2"]), gradient(kl), 1e-12)
    close(gradient(means["k3"]), gradient(reverse), 1e-12)
    for name in ("k1", "k3"):
        close(gradient((p * kl_estimate(logp, ref, name, old=logp.detach())).sum()), gradient(kl), 1e-12)


def test_adaptive_kl() -> None:
    assert adaptive_kl_coef(0.2, 12.0, target=6.0, horizon=100, n=10) == pytest.approx(0.2 * 1.02)
    assert adaptive_kl_coef(0.2, 6.3, target=6.0, horizon=100, n=10) == pytest.approx(0.2 * 1.005)
    assert adaptive_kl_coef(0.2, 0.0, target=6.0, horizon=100, n=10) == pytest.approx(0.2 * 0.98)


def test_explained_variance() -> None:
    returns = padded([1.0, 2.0, 3.0], [4.0])
    mask = padded([1.0] * 3, [1.0]) > 0
    close(explained_variance(returns, returns, mask), 1.0)
    close(explained_variance(torch.full_like(returns, 9.0), returns, mask), 0.0)
    assert explained_variance(returns, torch.ones_like(returns), mask).isnan()


# Groups


def test_advantages_of_one_right_answer_in_four() -> None:
    rewards = tensor([[1.0, 0.0, 0.0, 0.0]])
    close(group_advantages(rewards, "grpo"), [[1.4997, *[-0.4999] * 3]], 1e-4)
    close(group_advantages(rewards, "dr_grpo"), [[0.75, *[-0.25] * 3]])
    close(group_advantages(rewards, "rloo"), [[1.0, *[-1 / 3] * 3]])


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_laws_of_groups(kind: losses.Advantages) -> None:
    rewards = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = group_advantages(rewards, kind)
    close(group_advantages(rewards + 3.5, kind), found, 1e-9)
    order = [2, 0, 3, 1]
    close(group_advantages(rewards[:, order], kind), found[:, order], 1e-9)
    close(found.sum(-1), torch.zeros(5, dtype=torch.float64), 1e-9)
    alike = tensor([[0.1] * 3, [0.7] * 3])
    assert (group_advantages(alike, kind) == 0).all()
    assert (group_advantages(tensor([[2.0]]), kind) == 0).all()
    failed = group_advantages(tensor([[1.0, math.nan, 0.0], [math.nan] * 3]), kind)
    assert failed.isfinite().all()
    close(failed[0, [0, 2]], group_advantages(tensor([[1.0, 0.0]]), kind)[0])
    assert failed[0, 1] == 0
    assert (failed[1] == 0).all()


@pytest.mark.parametrize("how", ["grpo", "bnpo", "dapo", "dr_grpo"])
def test_a_group_without_signal_has_no_gradient(how: losses.Aggregation) -> None:
    logp = LOGP.clone().requires_grad_()
    advantages = group_advantages(tensor([[0.3], [0.3]]))
    loss = aggregate(ppo_policy_loss(logp, LOGP, advantages).losses, MASK, how)
    assert (torch.autograd.grad(loss, logp)[0] == 0).all()


@pytest.mark.parametrize("how", ["grpo", "dapo", "dr_grpo"])
def test_however_a_batch_is_cut_its_loss_is_the_same(how: losses.Aggregation) -> None:
    values = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))

    def loss(*cuts: slice) -> Tensor:
        counts = sum(aggregate_count(MASK[cut], how, MAX_TOKENS) for cut in cuts)
        return sum((aggregate(values[cut], MASK[cut], how) for cut in cuts), torch.zeros(())) / counts

    close(loss(slice(0, 1), slice(1, 2)), loss(slice(0, 2)))


def test_which_tokens_weigh_more() -> None:
    """A gradient of one for each token: in grpo those of short answers are larger, in dr_grpo all are alike."""
    for how, wanted in (("grpo", [1 / 4, 1 / 2]), ("dapo", [1 / 6, 1 / 6]), ("dr_grpo", [1 / 16, 1 / 16])):
        values = torch.zeros(2, 4, requires_grad=True)
        loss = aggregate(values, MASK, how) / aggregate_count(MASK, how, MAX_TOKENS)
        gradient = torch.autograd.grad(loss, values)[0] * (2 if how == "grpo" else 1)
        close(gradient[:, 0], wanted)
