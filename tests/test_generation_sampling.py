"""Sampling against the brute-force reference, and against the exact distribution."""

import math

import pytest
import torch
from generation_models import chi_square
from hypothesis import example, given
from hypothesis import strategies as st

from groundup.errors import GroundupError
from groundup.generation import SamplingParams, draw, sample, warp
from groundup.reference import sampling as reference

# Few distinct values make ties at every border likely.
tied_logits = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=12)
# Steps of 1/64, so that logits that differ have probabilities that differ.
free_logits = st.lists(st.integers(-1280, 1280).map(lambda step: step / 64), min_size=1, max_size=12)
temperatures = st.sampled_from([0.3, 0.7, 1.0, 2.5])


def generators(n: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed)] * n  # one stream of numbers for all rows


@given(tied_logits | free_logits, temperatures, st.integers(0, 14))
def test_top_k_equals_the_reference_ties_included(logits, temperature, k):
    found = warp(torch.tensor([logits]), SamplingParams(temperature=temperature, top_k=k)).exp()[0]
    probabilities = reference.softmax(logits, temperature)
    expected = reference.top_k(probabilities, k) if k else probabilities
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-4)


@given(tied_logits | free_logits, temperatures, st.floats(0.01, 0.999))
@example([0.0, 0.0, 0.0, 0.0], 1.0, 0.5)
@example([2.0, 1.0, 1.0, -3.0], 1.0, 0.7)
def test_top_p_equals_the_reference_ties_included(logits, temperature, p):
    probabilities = reference.softmax(logits, temperature)
    sums = torch.tensor(sorted(probabilities, reverse=True), dtype=torch.float64).cumsum(0)
    if (sums - p).abs().min() < 1e-6:
        return  # which side of the border a token falls on is a matter of rounding
    found = warp(torch.tensor([logits]), SamplingParams(temperature=temperature, top_p=p)).exp()[0]
    torch.testing.assert_close(found, torch.tensor(reference.top_p(probabilities, p)), atol=1e-5, rtol=1e-4)


@given(tied_logits, st.integers(1, 12), st.floats(0.05, 0.99))
def test_top_p_is_applied_to_what_top_k_leaves(logits, k, p):
    kept = reference.top_k(reference.softmax(logits), k)
    sums = torch.tensor(sorted(kept, reverse=True), dtype=torch.float64).cumsum(0)
    if (sums - p).abs().min() < 1e-6:
        return
    found = warp(torch.tensor([logits]), SamplingParams(top_k=k, top_p=p)).exp()[0]
    torch.testing.assert_close(found, torch.tensor(reference.top_p(kept, p)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sharpness", [0.05, 1.0, 6.0])
def test_a_nucleus_of_a_large_vocabulary_is_the_same_however_many_tokens_it_takes(sharpness):
    # Flat rows need thousands of tokens, sharp ones a handful; together they must not disturb each other.
    logits = torch.randn(3, 3000, generator=torch.Generator().manual_seed(1)) * torch.tensor([[sharpness], [1], [6]])
    found = warp(logits, SamplingParams(top_p=0.9)).exp()
    for row, probabilities in zip(logits, found, strict=True):
        expected = torch.tensor(reference.top_p(reference.softmax(row.tolist()), 0.9))
        assert int((probabilities > 0).sum()) == int((expected > 0).sum())
        torch.testing.assert_close(probabilities, expected, atol=1e-6, rtol=1e-3)


@given(free_logits, st.floats(0.05, 1.0), st.integers(0, 5))
def test_temperature_zero_is_argmax_whatever_the_filters(logits, p, k):
    params = SamplingParams(temperature=0, top_p=p, top_k=k, seed=3)
    expected = torch.tensor(logits).argmax().item()
    assert sample(torch.tensor([logits]), params, generators(1)).item() == expected
    assert warp(torch.tensor([logits]), params).exp()[0].tolist() == [
        float(place == expected) for place in range(len(logits))
    ]


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 5e-324])
def test_a_temperature_near_zero_approaches_argmax(temperature):
    logprobs = warp(torch.tensor([[3.0, -2.0, 3.5, 1.0]]), SamplingParams(temperature=temperature))
    assert logprobs.exp().tolist() == [[0.0, 0.0, 1.0, 0.0]]


@pytest.mark.parametrize(
    "params",
    [SamplingParams(), SamplingParams(temperature=0.6), SamplingParams(top_k=7), SamplingParams(top_p=0.8)],
)
def test_drawn_tokens_have_the_exact_distribution(params):
    n, logits = 40_000, torch.randn(60, generator=torch.Generator().manual_seed(2)) * 1.5
    counts = sample(logits.expand(n, -1), params, generators(n, seed=4)).bincount(minlength=60)
    probabilities = reference.softmax(logits.tolist(), params.temperature)
    if params.top_k:
        probabilities = reference.top_k(probabilities, params.top_k)
    if params.top_p < 1:
        probabilities = reference.top_p(probabilities, params.top_p)
    exact = torch.tensor(probabilities, dtype=torch.float64)
    assert counts[exact == 0].sum() == 0
    assert chi_square(counts, n * exact) < 4
    # The same test tells a temperature that is a twentieth off.
    off = torch.tensor(reference.softmax(logits.tolist(), params.temperature * 1.05), dtype=torch.float64)
    assert chi_square(counts, n * off) > 4


@given(free_logits, st.floats(0, 1, exclude_max=True))
def test_a_draw_is_where_the_running_sum_passes_the_uniform_number(logits, uniform):
    logprobs = torch.tensor([logits]).log_softmax(dim=-1)
    probabilities = (logprobs.double().exp() / logprobs.double().exp().sum())[0].tolist()
    borders = torch.tensor(probabilities, dtype=torch.float64).cumsum(0)
    if (borders - uniform).abs().min() > 1e-9:
        found = draw(logprobs, torch.tensor([uniform], dtype=torch.float64)).item()
        assert found == reference.draw(probabilities, uniform)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2.0**-53])
def test_no_uniform_number_draws_an_impossible_token(uniform):
    possible = torch.tensor([[False, True, False, True, False], [False, False, True, False, False]])
    logprobs = torch.zeros(2, 5).masked_fill(~possible, -math.inf).log_softmax(dim=-1)
    drawn = draw(logprobs, torch.tensor([uniform, uniform], dtype=torch.float64))
    assert possible.gather(1, drawn[:, None]).all()


def test_each_row_draws_from_its_own_generator():
    logits = torch.randn(1, 50)
    own = [torch.Generator().manual_seed(seed) for seed in (7, 8, 9)]
    together = sample(logits.expand(3, -1), SamplingParams(), own).tolist()
    alone = [sample(logits, SamplingParams(), generators(1, seed)).item() for seed in (7, 8, 9)]
    assert together == alone


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_numbers_are_an_error(bad, temperature):
    logits = torch.zeros(2, 5)
    logits[1, 3] = bad
    with pytest.raises(GroundupError, match="not numbers"):
        sample(logits, SamplingParams(temperature=temperature), generators(2))
    with pytest.raises(GroundupError, match="not numbers"):
        warp(torch.full((1, 4), -math.inf), SamplingParams(temperature=temperature))


def test_a_token_that_is_ruled_out_is_never_drawn():
    logits = torch.tensor([[0.0, -math.inf, 1.0]]).expand(500, -1)
    assert set(sample(logits, SamplingParams(), generators(500)).tolist()) == {0, 2}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("top_k", -1),
        ("top_k", 2.5),
        ("max_tokens", 0),
        ("max_tokens", None),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 1.5),
        ("stop", ("",)),
        ("stop", "a text of its own"),
    ],
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(GroundupError) as error:
        SamplingParams(**{field: value})
    assert f"{field} = {value!r}" in str(error.value)


def test_all_problems_are_told_at_once():
    with pytest.raises(GroundupError, match=r"temperature = -1.*top_k = -1.*top_p = 0.*max_tokens = 0"):
        SamplingParams(temperature=-1, top_k=-1, top_p=0, max_tokens=0)
