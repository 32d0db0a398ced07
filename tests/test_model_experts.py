"""Mixtures of experts: equal to their textbook and to dense layers, and the laws of the loss that balances them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from model_parts import distance, normal, random_model, tiny, tokens

from groundup.errors import RecipeError
from groundup.model import Transformer
from groundup.model.experts import Experts, load_balance
from groundup.model.feedforward import FeedForward, make_feedforward
from groundup.reference import experts as reference
from groundup.reference.feedforward import swiglu
from groundup.training.compilation import set_checkpointing


def layer(**overrides: object) -> Experts:
    """Experts whose every weight is random, in training mode."""
    made = make_feedforward(tiny(**{"n_experts": 4, **overrides}))
    assert isinstance(made, Experts)
    with torch.no_grad():
        for place, parameter in enumerate(made.parameters()):
            parameter.copy_(0.4 * normal(*parameter.shape, seed=20 + place))
    return made.train()


def share_weights(experts: Experts) -> FeedForward:
    """Make all experts equal; returns the dense layer that they are."""
    dense = FeedForward(
        tiny(activation="swiglu" if experts.gate_proj else "relu2", bias=experts.up_proj.bias is not None)
    )
    with torch.no_grad():
        for name in ("gate_proj", "up_proj", "down_proj"):
            stacked, plain = getattr(experts, name), getattr(dense, name)
            if stacked is not None:
                stacked.weight.copy_(stacked.weight[:1].expand_as(stacked.weight))
                plain.weight.copy_(stacked.weight[0])
                if stacked.bias is not None:
                    stacked.bias.copy_(stacked.bias[:1].expand_as(stacked.bias))
                    plain.bias.copy_(stacked.bias[0])
    return dense


@pytest.mark.parametrize(("n", "k"), [(1, 1), (4, 1), (4, 2), (4, 4), (7, 3)])
def test_a_mixture_and_its_loss_are_the_textbooks_forward_and_backward(n: int, k: int) -> None:
    experts, x = layer(n_experts=n, experts_per_token=k), normal(2, 9, 24, dtype=torch.float32)
    out = experts(x)
    assert experts.balance is not None
    ((out * normal(2, 9, 24, seed=1).float()).sum() + experts.balance).backward()
    exact = [parameter.detach().double().requires_grad_() for parameter in experts.parameters()]
    router, gate, up, down = exact
    flat = x.double().flatten(0, 1)
    each = [lambda row, i=i: swiglu(row, gate[i], up[i], down[i]) for i in range(n)]
    expected = reference.mixture(flat, router, each, k)
    balance = reference.load_balance(flat, router, k) * len(flat)
    ((expected * normal(2, 9, 24, seed=1).flatten(0, 1)).sum() + balance).backward()
    assert distance(out.flatten(0, 1), expected) < 1e-5
    assert distance(experts.balance, balance) < 1e-5
    for ours, theirs in zip(experts.parameters(), exact, strict=True):
        assert distance(ours.grad, theirs.grad) < 1e-4


@pytest.mark.parametrize("fields", [{}, {"activation": "relu2"}, {"bias": True}], ids=["gated", "plain", "biased"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_equal_experts_are_one_dense_layer(fields: dict[str, object], k: int) -> None:
    """The weights of the chosen sum to 1, so that whoever is chosen, the result is the dense layer's."""
    experts = layer(experts_per_token=k, **fields)
    dense, x = share_weights(experts), normal(2, 9, 24, dtype=torch.float32)
    assert distance(experts(x), dense(x)) < 1e-6


def test_one_expert_is_a_dense_layer_whatever_the_router_says() -> None:
    experts = layer(n_experts=1, experts_per_token=1)
    dense, x = share_weights(experts), normal(5, 24, dtype=torch.float32)
    assert distance(experts(x), dense(x)) < 1e-6


def test_no_token_is_dropped_or_moved_when_all_want_one_expert() -> None:
    experts, x = layer(experts_per_token=1), normal(30, 24, dtype=torch.float32).abs()
    with torch.no_grad():
        experts.router.weight.copy_(torch.tensor([-1.0, -1, 5, -1])[:, None].expand(4, 24))
    dense = FeedForward(tiny())
    with torch.no_grad():
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(dense, name).weight.copy_(getattr(experts, name).weight[2])
    assert distance(experts(x), dense(x)) < 1e-6
    assert experts.balance is not None
    assert experts.balance.item() == pytest.approx(4 * 30, rel=1e-3)


def test_batches_do_not_mix_tokens() -> None:
    experts, x = layer().eval(), normal(3, 5, 24, dtype=torch.float32)
    whole = experts(x)
    for row in range(3):
        for place in range(5):
            torch.testing.assert_close(experts(x[row, place]), whole[row, place], atol=1e-5, rtol=1e-5)


def test_experts_of_no_tokens_are_nothing() -> None:
    """The last slice of a batch may be empty."""
    experts = layer()
    assert experts(torch.empty(0, 24)).shape == (0, 24)


distributions = st.integers(2, 6).flatmap(
    lambda n: st.lists(st.lists(st.floats(-4, 4), min_size=n, max_size=n), min_size=1, max_size=12)
)


@given(distributions, st.data())
def test_laws_of_the_balancing_loss(scores: list[list[float]], data: st.DataObject) -> None:
    probabilities = torch.tensor(scores, dtype=torch.float64).softmax(dim=-1)
    n = probabilities.shape[1]
    k = data.draw(st.integers(1, n))
    chosen = probabilities.topk(k, dim=-1).indices
    loss = load_balance(probabilities.float(), chosen).item()
    assert 0 < loss <= n + 1e-4
    if k == n:  # everyone is chosen: nothing to balance
        assert loss == pytest.approx(n, abs=1e-5)
    # Experts have no order, and a batch twice is the same batch.
    order = torch.tensor(data.draw(st.permutations(range(n))))
    place = torch.argsort(order)
    assert load_balance(probabilities[:, order].float(), place[chosen]).item() == pytest.approx(loss, abs=1e-5)
    twice = load_balance(probabilities.repeat(2, 1).float(), chosen.repeat(2, 1)).item()
    assert twice == pytest.approx(loss, abs=1e-5)


def test_the_loss_is_k_in_balance_and_n_in_collapse() -> None:
    even = torch.full((8, 4), 0.25)
    assert load_balance(even, torch.arange(8)[:, None] % 4).item() == pytest.approx(1)
    assert load_balance(even, torch.arange(16).view(8, 2) % 4).item() == pytest.approx(2)
    one = torch.eye(4)[[2] * 8]
    assert load_balance(one, torch.full((8, 1), 2)).item() == pytest.approx(4)


def test_the_loss_is_mixtrals() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = normal(50, 6, dtype=torch.float32)
    probabilities = logits.softmax(dim=-1)
    for k in (1, 2, 3):
        theirs = load_balancing_loss_func((logits,), num_experts=6, top_k=k)
        ours = load_balance(probabilities, probabilities.topk(k, dim=-1).indices)
        torch.testing.assert_close(ours, theirs)


def test_the_loss_of_a_model_is_the_mean_over_layers_times_tokens() -> None:
    config = tiny(n_experts=4, router_aux_loss_coef=0.5)
    model, ids = random_model(config), tokens(config, 3, 7)
    assert model.eval()(ids) is not None
    assert model.balance_loss() is None  # nothing to train
    model.train()(ids)
    by_layer = [block.mlp.balance.item() for block in model.layers]
    assert len(set(by_layer)) == 2
    assert model.balance_loss().item() == pytest.approx(0.5 * sum(by_layer) / 2)
    assert all(0 < one <= 4 * 21 for one in by_layer)
    dense = random_model(tiny()).train()
    dense(ids)
    assert dense.balance_loss() is None


def test_descending_the_loss_balances_a_collapsed_router() -> None:
    experts, x = layer(experts_per_token=1), normal(200, 24, dtype=torch.float32)
    with torch.no_grad():
        experts.router.weight.mul_(0.1)
        experts.router.weight[1] += 0.5 * x.mean(dim=0) / x.mean(dim=0).norm()
    x = x + 2 * x.mean(dim=0) / x.mean(dim=0).norm()
    optimizer = torch.optim.Adam([experts.router.weight], lr=0.02)
    losses = []
    for _ in range(100):
        experts(x)
        assert experts.balance is not None
        loss = experts.balance / len(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.5
    assert losses[-1] < 1.1


def test_a_mixture_trains() -> None:
    config = tiny(n_experts=4, d_model=32)
    model, ids = Transformer(config).train(), tokens(config, 4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        balance = model.balance_loss()
        assert balance is not None
        optimizer.zero_grad()
        (loss + balance / 64).backward()
        optimizer.step()
    assert loss.item() < 0.5


@pytest.mark.parametrize("k", [0, 5])
def test_more_choices_than_experts_are_refused(k: int) -> None:
    with pytest.raises(RecipeError, match=rf"experts_per_token = {k}.*from 1 to n_experts = 4"):
        tiny(n_experts=4, experts_per_token=k)


def test_what_is_computed_again_is_not_kept() -> None:
    """With recomputed blocks the balance stays the first pass's: the second's graph would hold all it computed."""
    model = Transformer(tiny(n_experts=4, experts_per_token=2)).train()
    set_checkpointing(model, "full")
    loss = model(tokens(model.config, 2, 8)).square().mean() + model.balance_loss()
    kept = [block.mlp.balance for block in model.blocks]
    loss.backward()
    assert all(block.mlp.balance is one for block, one in zip(model.blocks, kept, strict=True))
    model(tokens(model.config, 2, 8, seed=1))
    assert all(block.mlp.balance is not one for block, one in zip(model.blocks, kept, strict=True))
