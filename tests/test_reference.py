"""The textbook forms against torch, and the rooms' fast forms against the textbook."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from groundup.model import preset
from groundup.model.attention import attend_to_cache
from groundup.model.feedforward import FeedForward
from groundup.model.masks import AttentionRule, attention_bias
from groundup.model.normalization import LayerNorm, RMSNorm
from groundup.model.positions import rotate, rotation_table
from groundup.reference import sampling
from groundup.reference.attention import causal_attention
from groundup.reference.experts import load_balance, mixture
from groundup.reference.feedforward import geglu, gelu, gelu_tanh, relu2, swiglu, swish
from groundup.reference.normalization import layernorm, rmsnorm
from groundup.reference.objective import cross_entropy, regularized_cross_entropy
from groundup.reference.optimizers import adamw_step, muon_step
from groundup.reference.positions import rope, rope_frequencies
from groundup.training.muon import Muon
from groundup.training.objective import cross_entropy_sum


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(layer: torch.nn.Module) -> torch.nn.Module:
    """One of our layers in float64, every parameter random."""
    layer = layer.double()
    with torch.no_grad():
        for place, parameter in enumerate(layer.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=10 + place))
    return layer


def test_norms():
    x, weight, bias = normal(3, 4, 16) * 5 + 1, normal(16, seed=1), normal(16, seed=2)
    torch.testing.assert_close(rmsnorm(x, weight, 1e-5), F.rms_norm(x, (16,), weight, 1e-5))
    torch.testing.assert_close(layernorm(x, weight, bias, 1e-5), F.layer_norm(x, (16,), weight, bias, 1e-5))
    rms, layer = filled(RMSNorm(16, 1e-3)), filled(LayerNorm(16, 1e-3, has_bias=True))
    torch.testing.assert_close(rms(x), rmsnorm(x, rms.weight, 1e-3))
    torch.testing.assert_close(layer(x), layernorm(x, layer.weight, layer.bias, 1e-3))
    torch.testing.assert_close(RMSNorm(16, 1e-3, has_weight=False)(x), rmsnorm(x, 1.0, 1e-3))
    torch.testing.assert_close(LayerNorm(16, 1e-3, has_weight=False)(x), layernorm(x, 1.0, 0.0, 1e-3))


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attention(kv_heads):
    q, k, v = normal(6, 9, 4), normal(kv_heads, 9, 4, seed=1), normal(kv_heads, 9, 4, seed=2)
    expected = causal_attention(q, k, v)
    fast = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
    torch.testing.assert_close(fast, expected)
    bias = attention_bias(AttentionRule(), torch.arange(9), torch.arange(9), torch.float32)
    cached = attend_to_cache(*(x[None].float() for x in (q, k, v)), bias, 4**-0.5)[0]
    torch.testing.assert_close(cached, expected.float(), atol=1e-5, rtol=1e-5)


def test_rope():
    x, positions = normal(5, 8), torch.tensor([0, 1, 2, 17, 300])
    expected = rope(x, positions, rope_frequencies(8, 10_000.0))
    turned = rotate(x[None, None], rotation_table(positions, 8, 10_000.0, torch.float64))[0, 0]
    torch.testing.assert_close(turned, expected, atol=1e-4, rtol=1e-4)
    # As a product of complex numbers, first half real and second imaginary.
    angles = positions[:, None].double() * 10_000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    complex_form = torch.complex(x[:, :4], x[:, 4:]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(torch.cat([complex_form.real, complex_form.imag], dim=-1), expected)


@pytest.mark.parametrize(("form", "activation", "name"), [(swiglu, F.silu, "swiglu"), (geglu, F.gelu, "geglu")])
def test_gates(form, activation, name):
    x, gate, up, down = normal(3, 8), normal(12, 8, seed=1), normal(12, 8, seed=2), normal(8, 12, seed=3)
    torch.testing.assert_close(form(x, gate, up, down), F.linear(activation(F.linear(x, gate)) * F.linear(x, up), down))
    ours, wide = filled(FeedForward(preset("ground-nano", activation=name))), normal(3, 32)
    parts = ours.gate_proj.weight, ours.up_proj.weight, ours.down_proj.weight
    torch.testing.assert_close(ours(wide), form(wide, *parts))


@pytest.mark.parametrize(
    ("form", "torchs", "name"),
    [
        (gelu, F.gelu, "gelu"),
        (gelu_tanh, lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"),
        (relu2, lambda x: F.relu(x).square(), "relu2"),
    ],
)
def test_activations(form, torchs, name):
    x, ours = normal(5, 32) * 3, filled(FeedForward(preset("gpt2-nano", activation=name)))
    torch.testing.assert_close(form(x), torchs(x))
    torch.testing.assert_close(ours(x), ours.down_proj(form(ours.up_proj(x))))


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=8), st.floats(0, 1e4))
def test_large_numbers_stay_finite_forwards_and_backwards(values, scale):
    """Scores of hundreds overflow a plain exponential, and so does its gradient."""
    x = torch.tensor(values, dtype=torch.float64)[:, None]
    router = torch.tensor([[1.0], [-1.0], [0.5]], dtype=torch.float64)
    experts = [lambda x, factor=factor: x * factor for factor in (1.0, 2.0, 3.0)]

    def mixed(x, scale):
        best, which = (x @ router.T * scale).topk(2, dim=-1)
        return x * (best.softmax(dim=-1) * (which + 1)).sum(dim=-1, keepdim=True)

    pairs = [
        (lambda x: swish(x), lambda x: F.silu(x)),
        (
            lambda x: causal_attention(x[None] * scale, x[None], x[None]),
            lambda x: F.scaled_dot_product_attention(x[None] * scale, x[None], x[None], is_causal=True),
        ),
        (lambda x: mixture(x, router * scale, experts, 2), lambda x: mixed(x, scale)),
        (lambda x: load_balance(x, router * scale, 3), lambda x: 3 * (x @ router.T * scale).softmax(-1).mean(0).sum()),
    ]
    for ours, torchs in pairs:
        found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
        outputs = ours(found), torchs(expected)
        torch.testing.assert_close(*outputs)
        torch.autograd.backward([output.sum() for output in outputs])
        assert found.grad.isfinite().all()
        assert ours is not pairs[0][0] or torch.allclose(found.grad, expected.grad)


def test_activations_by_hand():
    x = torch.tensor([-2.0, 0.0, 1.0], dtype=torch.float64)
    assert swish(x).tolist() == pytest.approx([-2 / (1 + math.e**2), 0, 1 / (1 + 1 / math.e)])
    assert gelu(x).tolist() == pytest.approx([-2 * 0.0227501, 0, 0.8413447], abs=1e-6)  # x Φ(x), from a table of Φ
    assert relu2(x).tolist() == [0, 0, 1]
    wide = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    assert 1e-4 < (gelu(wide) - gelu_tanh(wide)).abs().max() < 5e-4  # what the approximation costs


def test_cross_entropy():
    hidden, weight = normal(7, 6), normal(11, 6, seed=1) * 30  # logits too large for a plain exponential
    targets = torch.tensor([3, -100, 0, 10, 10, -100, 5])
    expected = cross_entropy(hidden @ weight.T, targets)
    torch.testing.assert_close(F.cross_entropy(hidden @ weight.T, targets), expected)
    fast = cross_entropy_sum(hidden.float(), weight.float(), targets).objective / 5
    torch.testing.assert_close(fast, expected.float(), rtol=1e-5, atol=1e-5)


def test_label_smoothing_and_z_loss():
    logits, targets = normal(5, 9) * 3, torch.tensor([3, -100, 0, 8, 8])
    torch.testing.assert_close(regularized_cross_entropy(logits, targets, 0.0, 0.0), cross_entropy(logits, targets))
    smoothed = regularized_cross_entropy(logits, targets, 0.1, 0.0)
    torch.testing.assert_close(F.cross_entropy(logits, targets, label_smoothing=0.1), smoothed)
    pulled = regularized_cross_entropy(logits, targets, 0.0, 0.5) - cross_entropy(logits, targets)
    torch.testing.assert_close(pulled, 0.5 * logits.logsumexp(dim=-1)[targets >= 0].square().mean())


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("vocab", [8, 11])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.3), (0.2, 0.1)])
def test_cross_entropy_never_holding_all_logits(softcap, vocab, smoothing, z_loss, monkeypatch):
    """In slices of four rows and pieces of two, with idle rows of the matrix, capped logits and both regularizers."""
    monkeypatch.setattr("groundup.training.objective.SLICE_BYTES", 4 * 4 * 11)
    monkeypatch.setattr("groundup.training.objective.PIECE_LOGITS", 22)
    targets = torch.tensor([3, -100, 0, 7, 7, -100, 5])
    hidden, weight = normal(7, 6).float().requires_grad_(), normal(11, 6, seed=1).float().requires_grad_()
    exact, exact_weight = (part.detach().double().requires_grad_() for part in (hidden, weight))
    logits = exact @ exact_weight[:vocab].T
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    expected = regularized_cross_entropy(logits, targets, smoothing, z_loss) * 5
    fast = cross_entropy_sum(hidden, weight, targets, vocab, softcap, label_smoothing=smoothing, z_loss=z_loss)
    torch.testing.assert_close(fast.objective, expected.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fast.nats, cross_entropy(logits, targets).float() * 5, rtol=1e-5, atol=1e-5)
    fast.objective.backward()
    expected.backward()
    for ours, textbook in ((hidden, exact), (weight, exact_weight)):
        torch.testing.assert_close(ours.grad, textbook.grad.float(), rtol=1e-4, atol=1e-5)


def test_adamw():
    weight = torch.nn.Parameter(normal(4, 3))
    settings = {"lr": 0.02, "eps": 1e-8, "weight_decay": 0.3}
    optimizer = torch.optim.AdamW([weight], betas=(0.8, 0.95), **settings)
    expected, m, v = weight.detach().clone(), torch.zeros(4, 3), torch.zeros(4, 3)
    for step in range(1, 8):
        weight.grad = normal(4, 3, seed=step)
        optimizer.step()
        expected, m, v = adamw_step(expected, weight.grad, m, v, step, beta1=0.8, beta2=0.95, **settings)
        torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (8, 8)])
def test_muon(shape):
    start = normal(*shape).float()
    ours, torchs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    settings = {"lr": 0.02, "weight_decay": 0.5}
    fast = Muon([ours], momentum=0.9, **settings)
    theirs = torch.optim.Muon([torchs], momentum=0.9, nesterov=True, ns_steps=5, **settings)
    expected, momentum = start.double(), torch.zeros(shape, dtype=torch.float64)
    for step in range(1, 6):
        gradient = normal(*shape, seed=step)
        ours.grad, torchs.grad = gradient.float(), gradient.float()
        fast.step()
        theirs.step()
        expected, momentum = muon_step(expected, gradient, momentum, beta=0.9, **settings)
    torch.testing.assert_close(ours.detach(), expected.float(), atol=1e-5, rtol=1e-4)
    # torch computes its steps in bfloat16.
    assert (torchs - expected).norm() < 0.05 * (expected - start).norm()


def test_muon_of_a_stack_is_muon_of_each_matrix():
    """Experts' matrices lie in one tensor, and each is orthogonalized by itself."""
    stack, gradient = torch.nn.Parameter(normal(3, 8, 5).float()), normal(3, 8, 5, seed=1)
    gradient[1] *= 100
    expected = [
        muon_step(weight.double(), part, torch.zeros(8, 5), lr=0.02, beta=0.9, weight_decay=0.1)[0]
        for weight, part in zip(stack.detach(), gradient, strict=True)
    ]
    stack.grad = gradient.float()
    Muon([stack], lr=0.02, momentum=0.9, weight_decay=0.1).step()
    torch.testing.assert_close(stack.detach(), torch.stack(expected).float(), atol=1e-5, rtol=1e-4)


@given(st.lists(st.floats(-1e5, 1e5), min_size=1, max_size=10), st.floats(0.1, 5))
def test_softmax(logits, temperature):
    expected = (torch.tensor(logits, dtype=torch.float64) / temperature).softmax(dim=-1)
    torch.testing.assert_close(torch.tensor(sampling.softmax(logits, temperature), dtype=torch.float64), expected)


def test_filters_by_hand():
    probabilities = [0.1, 0.4, 0.2, 0.2, 0.1]
    assert sampling.top_k(probabilities, 1) == [0, 1, 0, 0, 0]
    assert sampling.top_k(probabilities, 2) == pytest.approx([0, 0.5, 0.25, 0.25, 0])  # two tie for the second place
    assert sampling.top_k(probabilities, 9) == pytest.approx(probabilities)
    assert sampling.top_p(probabilities, 0.39) == [0, 1, 0, 0, 0]
    assert sampling.top_p(probabilities, 0.41) == pytest.approx([0, 0.5, 0.25, 0.25, 0])
    assert sampling.top_p(probabilities, 1.0) == pytest.approx(probabilities)


def test_min_p_by_hand():
    probabilities = [0.1, 0.4, 0.2, 0.2, 0.1]
    assert sampling.min_p(probabilities, 1.0) == [0, 1, 0, 0, 0]
    assert sampling.min_p(probabilities, 0.5) == pytest.approx([0, 0.5, 0.25, 0.25, 0])
    assert sampling.min_p(probabilities, 0.0) == pytest.approx(probabilities)


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=10), st.floats(0.01, 1), st.integers(1, 12))
def test_filters_keep_the_most_probable_and_the_ratios(logits, share, k):
    """Whatever is kept is at least as probable as whatever is not, and no two tokens change places."""
    before = sampling.softmax(logits)
    for after in (sampling.top_k(before, k), sampling.top_p(before, share), sampling.min_p(before, share)):
        assert math.fsum(after) == pytest.approx(1)
        kept = [place for place, probability in enumerate(after) if probability]
        assert before.index(max(before)) in kept
        worst = min(before[place] for place in kept)
        assert all(before[place] < worst for place in range(len(before)) if place not in kept)
        scale = after[kept[0]] / before[kept[0]]
        assert [after[place] for place in kept] == pytest.approx([before[place] * scale for place in kept])


def test_draws_by_hand():
    probabilities = [0.25, 0.0, 0.5, 0.25]
    assert [sampling.draw(probabilities, uniform) for uniform in (0, 0.24, 0.25, 0.74, 0.75)] == [0, 0, 2, 2, 3]
    assert sampling.draw([1 / 3] * 3 + [0.0], math.nextafter(1, 0)) == 2
