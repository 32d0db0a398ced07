"""Sampling against the brute-force reference, transformers' own warpers, and the exact distribution."""

import itertools
import math

import numpy as np
import pytest
import torch
from generation_models import chi_square
from hypothesis import example, given
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs

from groundup.errors import GroundupError
from groundup.generation import SamplingParams
from groundup.generation.sampling import (
    History,
    _draw_row,
    _draw_rows,
    _weigh_batch,
    draw,
    request_seed,
    sample,
    token_logprobs,
    uniforms,
    warp,
)
from groundup.reference import sampling as reference

# Few distinct values make ties at every border likely.
tied_logits = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=12)
# Steps of 1/64, so that logits that differ have probabilities that differ.
free_logits = st.lists(st.integers(-1280, 1280).map(lambda step: step / 64), min_size=1, max_size=12)
temperatures = st.sampled_from([0.3, 0.7, 1.0, 2.5])
# Filters one by one, then all together.
FILTERS = [
    {"top_k": 7},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"typical_p": 0.6},
    {"top_k": 30, "typical_p": 0.9, "top_p": 0.9, "min_p": 0.02, "temperature": 1.3},
]


def seeded(n):
    return {"seeds": [5] * n, "positions": range(n)}


def random_logits(rows, vocab, scale=2.0, seed=0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


@given(tied_logits | free_logits, temperatures, st.integers(0, 14))
def test_top_k_equals_the_reference_ties_included(logits, temperature, k):
    found = warp(torch.tensor([logits]), SamplingParams(temperature=temperature, top_k=k)).exp()[0]
    probabilities = reference.softmax(logits, temperature)
    expected = reference.top_k(probabilities, k) if k else probabilities
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-4)


def on_a_border(probabilities, mass):
    """Whether the side of the border on which a token falls is a matter of rounding."""
    sums = torch.tensor(sorted(probabilities, reverse=True), dtype=torch.float64).cumsum(0)
    return bool((sums - mass).abs().min() < 1e-6)


@given(tied_logits | free_logits, temperatures, st.floats(0.01, 0.999))
@example([0.0, 0.0, 0.0, 0.0], 1.0, 0.51)
@example([2.0, 1.0, 1.0, -3.0], 1.0, 0.7)
def test_top_p_equals_the_reference_ties_included(logits, temperature, p):
    probabilities = reference.softmax(logits, temperature)
    if not on_a_border(probabilities, p):
        found = warp(torch.tensor([logits]), SamplingParams(temperature=temperature, top_p=p)).exp()[0]
        torch.testing.assert_close(found, torch.tensor(reference.top_p(probabilities, p)), atol=1e-5, rtol=1e-4)


@given(tied_logits, st.integers(1, 12), st.floats(0.05, 0.99), st.sampled_from([0.0, 0.013, 0.31]))
def test_top_p_then_min_p_are_applied_to_what_top_k_leaves(logits, k, p, share):
    kept = reference.top_k(reference.softmax(logits), k)
    if not on_a_border(kept, p):
        found = warp(torch.tensor([logits]), SamplingParams(top_k=k, top_p=p, min_p=share)).exp()[0]
        expected = reference.min_p(reference.top_p(kept, p), share)
        torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-4)


@given(tied_logits | free_logits, temperatures, st.floats(0.01, 0.99))
def test_typical_equals_the_reference_ties_included(logits, temperature, mass):
    probabilities = reference.softmax(logits, temperature)
    entropy = -sum(p * math.log(p) for p in probabilities if p > 0)
    distances = torch.tensor([abs(-math.log(max(p, 1e-300)) - entropy) for p in probabilities])
    apart = distances.sort().values.diff()
    sums = torch.tensor(probabilities)[distances.argsort()].cumsum(0)
    if (sums - mass).abs().min() < 1e-5 or bool(((apart > 0) & (apart < 1e-4)).any()):
        return
    found = warp(torch.tensor([logits]), SamplingParams(temperature=temperature, typical_p=mass)).exp()[0]
    torch.testing.assert_close(found, torch.tensor(reference.typical(probabilities, mass)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scale", [0.05, 1.0, 6.0])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_a_large_vocabulary_is_filtered_as_by_transformers(filters, scale):
    # Flat rows keep thousands of tokens, sharp ones a handful. Random logits hold no ties to speak of.
    logits = random_logits(3, 3000, scale, seed=1)
    expected = logits / filters.get("temperature", 1.0)
    chain = [
        ("top_k", theirs.TopKLogitsWarper),
        ("typical_p", theirs.TypicalLogitsWarper),
        ("top_p", theirs.TopPLogitsWarper),
        ("min_p", theirs.MinPLogitsWarper),
    ]
    for name, warper in chain:
        if name in filters:
            expected = warper(filters[name])(None, expected)
    expected = expected.softmax(dim=-1)
    found = warp(logits, SamplingParams(**filters)).exp()
    # Sums are rounded differently there: the last token may be on either side of a border.
    differing = (found > 0) != (expected > 0)
    assert differing.sum(dim=-1).max() <= (1 if len(filters) == 1 else 3)
    torch.testing.assert_close(found[~differing], expected[~differing], atol=1e-6, rtol=3e-3)


def test_ties_at_the_border_are_all_kept_where_transformers_keeps_some():
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]])
    kept = {
        name: int((warp(logits, SamplingParams(**{name: value})) > -math.inf).sum())
        for name, value in [("top_k", 2), ("top_p", 0.8)]
    }
    assert kept == {"top_k": 4, "top_p": 4}
    assert int((theirs.TopKLogitsWarper(2)(None, logits) > -math.inf).sum()) == 4
    assert int((theirs.TopPLogitsWarper(0.8)(None, logits) > -math.inf).sum()) == 3


@pytest.mark.parametrize("filters", [*FILTERS, {"temperature": 0}, {"temperature": 0.01}, {}], ids=str)
@pytest.mark.parametrize("vocab", [5, 129, 3001])
def test_rows_on_the_cpu_are_weighed_as_batches_on_a_device(filters, vocab):
    logits = random_logits(6, vocab)
    logits[3, 1:3] = -math.inf
    params = SamplingParams(**filters)
    expected = _weigh_batch(logits, params)
    expected = (expected / expected.sum(dim=-1, keepdim=True)).log()
    torch.testing.assert_close(warp(logits, params), expected, atol=1e-4, rtol=1e-4)


@given(free_logits, st.floats(0.05, 1.0), st.integers(0, 5))
def test_temperature_zero_is_argmax_whatever_the_filters(logits, p, k):
    params = SamplingParams(temperature=0, top_p=p, top_k=k, seed=3)
    expected = torch.tensor(logits).argmax().item()
    assert sample(torch.tensor([logits]), params, **seeded(1)).item() == expected
    assert warp(torch.tensor([logits]), params).exp()[0].tolist() == [
        float(place == expected) for place in range(len(logits))
    ]


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 5e-324])
def test_a_temperature_near_zero_approaches_argmax(temperature):
    logprobs = warp(torch.tensor([[3.0, -2.0, 3.5, 1.0]]), SamplingParams(temperature=temperature))
    assert logprobs.exp().tolist() == [[0.0, 0.0, 1.0, 0.0]]


@pytest.mark.parametrize("filters", [{}, {"temperature": 0.6}, *FILTERS], ids=str)
def test_drawn_tokens_have_the_exact_distribution(filters):
    n, params = 20_000, SamplingParams(**filters)
    logits = random_logits(1, 200, 1.5, seed=2)
    counts = sample(logits.expand(n, -1), params, **seeded(n)).bincount(minlength=200)
    probabilities = reference.softmax(logits[0].tolist(), params.temperature)
    if params.top_k:
        probabilities = reference.top_k(probabilities, params.top_k)
    if params.typical_p < 1:
        probabilities = reference.typical(probabilities, params.typical_p)
    if params.top_p < 1:
        probabilities = reference.top_p(probabilities, params.top_p)
    if params.min_p:
        probabilities = reference.min_p(probabilities, params.min_p)
    exact = torch.tensor(probabilities, dtype=torch.float64)
    assert counts[exact == 0].sum() == 0
    assert chi_square(counts, n * exact) < 4
    # The same test tells a temperature that is a twelfth off.
    off = torch.tensor(reference.softmax(logits[0].tolist(), params.temperature * 13 / 12), dtype=torch.float64)
    assert chi_square(counts, n * off) > 4


@given(free_logits, st.floats(0, 1, exclude_max=True))
def test_a_draw_is_where_the_running_sum_passes_the_uniform_number(logits, uniform):
    logprobs = torch.tensor([logits]).log_softmax(dim=-1)
    probabilities = (logprobs.double().exp() / logprobs.double().exp().sum())[0].tolist()
    borders = torch.tensor(probabilities, dtype=torch.float64).cumsum(0)
    if (borders - uniform).abs().min() > 1e-6:
        found = draw(logprobs.exp(), torch.tensor([uniform], dtype=torch.float64)).item()
        assert found == reference.draw(probabilities, uniform)


@pytest.mark.parametrize("vocab", [128, 1000, 32_000])
def test_a_draw_by_blocks_is_that_by_a_running_sum(vocab):
    logprobs = random_logits(64, vocab, 3.0).masked_fill(random_logits(64, vocab, seed=1) > 2, -math.inf)
    sums = logprobs.exp().cumsum(dim=-1, dtype=torch.float64)
    uniform = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True)[:, 0]
    assert torch.equal(draw(logprobs.exp(), uniform), expected)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2.0**-53])
@pytest.mark.parametrize("share", [0.5, 0.01, 0.0])
def test_no_uniform_number_draws_an_impossible_token(uniform, share):
    possible = torch.rand(50, 700, generator=torch.Generator().manual_seed(1)) < share
    possible[torch.arange(50), torch.arange(50) * 14] = True
    logprobs = random_logits(50, 700, 4.0).masked_fill(~possible, -math.inf)
    drawn = draw(logprobs.exp(), torch.full((50,), uniform, dtype=torch.float64))
    assert possible.gather(1, drawn[:, None]).all()


MIXED = [
    SamplingParams(),
    SamplingParams(temperature=0),
    SamplingParams(top_p=0.7, temperature=1.3),
    SamplingParams(top_k=9, min_p=0.01),
    SamplingParams(typical_p=0.5),
    SamplingParams(logit_bias={3: 5.0, 4: -100}),
    SamplingParams(repetition_penalty=1.4, frequency_penalty=0.5),
]


@pytest.mark.parametrize("vocab", [333, 50_257])
def test_a_row_depends_on_nothing_else_in_its_batch(vocab):
    logits = random_logits(len(MIXED), vocab, 4.0)
    histories = [History([1, 2, 2, 9]) for _ in MIXED]
    for history in histories:
        history.add(7)
    seeds, positions = range(len(MIXED)), range(10, 10 + len(MIXED))
    together = sample(logits, MIXED, seeds, positions, histories).tolist()
    warped = warp(logits, MIXED, histories)
    for row, params in enumerate(MIXED):
        only = slice(row, row + 1)
        assert [together[row]] == sample(
            logits[only].clone(), params, seeds[only], positions[only], histories[only]
        ).tolist()
        assert torch.equal(warped[only], warp(logits[only].clone(), [params], histories[only]))


def test_verification_of_a_draft_warps_as_plain_decoding_does():
    params = SamplingParams(
        repetition_penalty=1.3, frequency_penalty=0.7, presence_penalty=0.2, top_p=0.9, min_tokens=3
    )
    logits, draft, ends = random_logits(4, 50), [7, 7, 9, 3], [0, 5]
    history = History([1, 7], ends)
    positions = [history.after(draft[:n]) for n in range(4)]
    together = warp(logits, [params] * 4, positions)
    for row, token in enumerate(draft):
        assert torch.equal(together[row], warp(logits[row : row + 1], params, [history])[0])
        assert bool((together[row, ends] == -math.inf).all()) or row == 3
        history.add(token)


@pytest.mark.parametrize("n_tokens", [0, 5, 300])
def test_penalties_are_those_of_transformers_and_openai(n_tokens):
    logits = random_logits(1, 40, 3.0)
    prompt, output = [1, 2, 2, 30], np.random.default_rng(1).integers(0, 40, n_tokens).tolist()
    history = History(prompt)
    for token in output:
        history.add(token)
    params = SamplingParams(repetition_penalty=1.7, presence_penalty=0.6, frequency_penalty=-0.4)
    expected = theirs.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + output]), logits.clone())
    counts = torch.tensor(output, dtype=torch.int64).bincount(minlength=40)
    expected = expected - counts * -0.4 - (counts > 0) * 0.6
    torch.testing.assert_close(warp(logits, params, [history]), expected.log_softmax(dim=-1))


def test_a_bias_is_added_before_the_penalties_and_minus_100_excludes():
    logits, history = torch.tensor([[1.0, -1.0, 0.5, 0.0]]), History([0, 1])
    params = SamplingParams(logit_bias={0: -2.0, 2: -100, 3: -99.0}, repetition_penalty=2.0)
    expected = torch.tensor([[(1.0 - 2.0) * 2, -1.0 * 2, -math.inf, -99.0]]).log_softmax(dim=-1)
    torch.testing.assert_close(warp(logits, params, [history]), expected, atol=0.01, rtol=0)


def test_no_end_is_drawn_before_min_tokens():
    logits = torch.tensor([[9.0, 8.0, 0.0, 1.0]])
    params, history = SamplingParams(temperature=0, min_tokens=2, stop_ids=(1,), max_tokens=5), History([2], ends=[0])
    drawn = []
    for position in range(3):
        drawn += sample(logits, params, [0], [position], [history]).tolist()
        history.add(drawn[-1])
    assert drawn == [3, 3, 0]


def test_a_mask_excludes_tokens_whatever_the_filters():
    logits = random_logits(4, 30)
    masks = [None, *(torch.arange(30) % n == 0 for n in (2, 3, 5))]
    rows = [SamplingParams(top_p=0.9), SamplingParams(temperature=0), SamplingParams(top_k=2), SamplingParams()]
    warped = warp(logits, rows, masks=masks)
    for row, mask in enumerate(masks[1:], 1):
        assert (warped[row][~mask] == -math.inf).all()
    assert torch.equal(warped[0], warp(logits[:1], rows[0])[0])
    assert torch.equal(logits, random_logits(4, 30))
    with pytest.raises(GroundupError, match="no token may be drawn"):
        sample(logits, rows, masks=[None, None, None, torch.zeros(30, dtype=torch.bool)], **seeded(4))


def test_uniform_numbers_are_uniform_and_independent():
    numbers = uniforms(range(512), [0] * 512), uniforms([3] * 512, range(512))
    grid = torch.stack([uniforms([seed] * 256, range(256)) for seed in range(256)])
    streams = torch.stack([uniforms([3] * 65536, range(65536), stream) for stream in range(4)])
    for values in (*numbers, grid.flatten(), streams.flatten()):
        assert chi_square((values * 64).long().bincount(minlength=64), torch.full((64,), len(values) / 64)) < 4
    # Neighbours in seed, in position and in stream are not related.
    for first, second in [(grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1]), *itertools.combinations(streams, 2)]:
        pairs = ((first * 16).long() * 16 + (second * 16).long()).flatten()
        assert chi_square(pairs.bincount(minlength=256), torch.full((256,), len(pairs) / 256)) < 4
        assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 4 / len(pairs) ** 0.5
    assert len(set(streams.flatten().tolist())) == streams.numel()
    assert uniforms([2**63 - 1], [2**40]).item() < 1


def test_a_uniform_number_is_splitmix64s():
    # The published generator, started at a hash of the seed; its outputs for state 0 are known.
    def published(state):
        while True:
            state = (state + 0x9E3779B97F4A7C15) % 2**64
            z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
            yield z ^ (z >> 31)

    assert next(published(0)) == 0xE220A8397B1DCDAF
    outputs = published(next(published(11)))
    expected = [(next(outputs) >> 11) / 2**53 for _ in range(12)]
    assert uniforms([11] * 3, range(3)).tolist() == expected[::4]
    assert uniforms([11] * 3, range(3), stream=1).tolist() == expected[1::4]


def test_texts_of_one_request_have_seeds_of_their_own():
    assert request_seed(7) == 7
    own = [request_seed(seed, index) for seed in range(50) for index in range(128)]
    assert len(set(own)) == len(own)
    assert own == [request_seed(seed, index) for seed in range(50) for index in range(128)]
    assert all(0 <= seed < 2**63 for seed in own)
    assert len({request_seed(None) for _ in range(20)}) == 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_the_models_and_name_the_drawn_token_exactly(dtype):
    logits = random_logits(200, 50).to(dtype)  # bfloat16 makes ties at every place
    tokens = sample(logits, SamplingParams(), **seeded(200)).tolist()
    exact = logits.double().log_softmax(dim=-1)
    for row, found in enumerate(token_logprobs(logits, tokens, 5)):
        assert (found.token, len(found.top)) == (tokens[row], 5)
        assert found.logprob == pytest.approx(exact[row, found.token].item(), abs=1e-5)
        values = [value for _, value in found.top]
        assert values == sorted(values, reverse=True)
        torch.testing.assert_close(torch.tensor(values).double(), exact[row].topk(5).values, atol=1e-5, rtol=0)
        if found.logprob >= values[-1]:
            assert dict(found.top)[found.token] == found.logprob


def test_of_tied_tokens_the_drawn_one_is_named_among_the_most_probable():
    found = token_logprobs(torch.zeros(4, 4), [0, 1, 2, 3], 1)
    assert [result.top for result in found] == [((token, found[token].logprob),) for token in range(4)]
    assert [result.top for result in token_logprobs(torch.zeros(1, 4), [2], 0)] == [()]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_numbers_are_an_error(bad, temperature):
    logits = torch.zeros(2, 5)
    logits[1, 3] = bad
    for function in (sample, warp):
        with pytest.raises(GroundupError, match="not numbers"):
            function(logits, SamplingParams(temperature=temperature), **(seeded(2) if function is sample else {}))
    with pytest.raises(GroundupError, match="no token may be drawn"):
        warp(torch.full((1, 4), -math.inf), SamplingParams(temperature=temperature))


def test_a_token_that_is_ruled_out_is_never_drawn():
    logits = torch.tensor([[0.0, -math.inf, 1.0]]).expand(500, -1)
    assert set(sample(logits, SamplingParams(), **seeded(500)).tolist()) == {0, 2}


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
        ("max_tokens", -1),
        ("max_tokens", None),
        ("max_tokens", True),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 1.5),
        ("stop", ("",)),
        ("stop", "a text of its own"),
        ("min_p", 1.5),
        ("min_p", math.nan),
        ("typical_p", 0.0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", False),
        ("logit_bias", {3: 101}),
        ("logit_bias", {-1: 1}),
        ("logit_bias", {"3": 1}),
        ("logit_bias", {3: math.nan}),
        ("logit_bias", [3]),
        ("stop_ids", (-1,)),
        ("stop_ids", [1]),
        ("ignore_eos", 1),
        ("min_tokens", -1),
        ("min_tokens", 129),
        ("n", 0),
        ("n", 129),
        ("best_of", 0),
        ("best_of", 129),
        ("logprobs", 21),
        ("logprobs", True),
    ],
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(GroundupError) as error:
        SamplingParams(**{field: value})
    assert f"{field} = {value!r}" in str(error.value)


def test_all_problems_are_told_at_once():
    with pytest.raises(GroundupError, match=r"temperature = -1.*top_k = -1.*top_p = 0.*max_tokens = -1.*n = 2.5"):
        SamplingParams(temperature=-1, top_k=-1, top_p=0, max_tokens=-1, n=2.5)
    with pytest.raises(GroundupError, match="best_of = 2: must be at least n = 3"):
        SamplingParams(n=3, best_of=2)


def test_ids_that_the_model_does_not_have_are_named():
    SamplingParams(logit_bias={9: 1}, stop_ids=(9,)).check_vocabulary(10)
    with pytest.raises(GroundupError, match="logit_bias has the token id 10: the model has ids 0 to 9"):
        SamplingParams(logit_bias={10: 1}).check_vocabulary(10)
    with pytest.raises(GroundupError, match="stop_ids has the token id 10"):
        SamplingParams(stop_ids=(10,)).check_vocabulary(10)


def test_equal_params_are_equal_and_can_be_keys():
    one, other = (SamplingParams(logit_bias={1: 2.0}, top_k=3) for _ in range(2))
    assert one == other
    assert len({one, other}) == 1


@pytest.mark.parametrize("vocab", [5, 128, 2048, 3001])
def test_many_rows_without_filters_draw_to_the_bit_what_each_draws_alone(vocab):
    logits = random_logits(64, vocab) * 3
    logits[:, 1:3] = -math.inf
    rows = [SamplingParams(temperature=(1, 0.7, 1e-6)[row % 3], top_k=row % 5 // 4) for row in range(64)]
    seeds, positions = range(64), range(64)
    alone = [sample(logits[row : row + 1], rows[row], [row], [row]).item() for row in range(64)]
    assert sample(logits, rows, seeds, positions).tolist() == alone
    uniform = np.concatenate([[0, np.nextafter(1, 0)], np.random.default_rng(0).random(62)])
    weights = np.exp(logits.numpy() - logits.numpy().max(axis=-1, keepdims=True))
    expected = [_draw_row(row, number) for row, number in zip(weights, uniform, strict=True)]
    assert _draw_rows(logits.numpy(), [1] * 64, uniform).tolist() == expected
