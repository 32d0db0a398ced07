"""Rotary frequencies and sinusoids: the values of their papers, of transformers and of the textbook."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_parts import normal
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from groundup.errors import RecipeError
from groundup.model import RopeScaling, preset
from groundup.model.positions import rotary_frequencies, rotate, rotation_table, sinusoids
from groundup.reference import positions as reference

LLAMA_31 = RopeScaling(kind="llama3", factor=8, original_context=8192, low_frequency_factor=1, high_frequency_factor=4)
YARN = RopeScaling(kind="yarn", factor=16, original_context=4096)
SCALINGS = [None, RopeScaling(kind="linear", factor=4), RopeScaling(kind="ntk", factor=4), YARN, LLAMA_31]


def of_transformers(kind: str, rotated: int, base: float, seq_len: int | None = None, **fields: object):
    """Frequencies and attention factor as transformers computes them."""
    config = LlamaConfig(
        hidden_size=4 * rotated,
        num_attention_heads=4,
        max_position_embeddings=131_072,
        rope_parameters={"rope_type": kind, "rope_theta": base, **fields},
    )
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len)


@pytest.mark.parametrize("rotated", [2, 8, 64, 128])
@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
@pytest.mark.parametrize("factor", [1.0, 2.5, 8.0, 40.0])
def test_scalings_are_those_of_transformers(rotated: int, base: float, factor: float) -> None:
    def same(kind: str, scaling: RopeScaling, seq_len: int | None = None, **fields: object) -> None:
        found, found_factor = rotary_frequencies(rotated, base, scaling)
        expected, expected_factor = of_transformers(kind, rotated, base, seq_len, **fields)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        assert found_factor == pytest.approx(expected_factor)

    same("linear", RopeScaling(kind="linear", factor=factor), factor=factor)
    context = {"original_max_position_embeddings": 4096}
    same("yarn", RopeScaling(kind="yarn", factor=factor, original_context=4096), factor=factor, **context)
    narrow = RopeScaling(
        kind="yarn", factor=factor, original_context=4096, beta_fast=8, beta_slow=2, attention_factor=1.5
    )
    same("yarn", narrow, factor=factor, beta_fast=8, beta_slow=2, attention_factor=1.5, **context)
    borders = {"low_freq_factor": 1.5, "high_freq_factor": 6.0}
    llama = RopeScaling(
        kind="llama3", factor=factor, original_context=4096, low_frequency_factor=1.5, high_frequency_factor=6
    )
    same("llama3", llama, factor=factor, **borders, **context)
    if rotated > 2:  # its dynamic form at a text `factor` times as long is the NTK-aware one
        same("dynamic", RopeScaling(kind="ntk", factor=factor), seq_len=int(131_072 * factor), factor=1.0)


@pytest.mark.parametrize("rotated", [2, 8, 64])
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda one: one.kind if one else "none")
def test_frequencies_are_the_textbooks(rotated: int, scaling: RopeScaling | None) -> None:
    plain = reference.rope_frequencies(rotated, 10_000.0)
    expected = {
        "none": plain,
        "linear": reference.linear_scaling(plain, 4),
        "ntk": reference.ntk_scaling(rotated, 10_000.0, 4),
        "yarn": reference.yarn_scaling(rotated, 10_000.0, 16, 4096),
        "llama3": reference.llama3_scaling(plain, 8, 8192),
    }[scaling.kind if scaling else "none"]
    found, factor = rotary_frequencies(rotated, 10_000.0, scaling)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=0)
    assert factor == (pytest.approx(reference.yarn_attention_factor(16)) if scaling is YARN else 1.0)


def test_plain_frequencies_by_hand() -> None:
    """arXiv:2104.09864, section 3.2.2: θᵢ = 10000^(−2(i−1)/d)."""
    assert rotary_frequencies(4, 10_000.0)[0].tolist() == pytest.approx([1, 0.01])
    assert rotary_frequencies(6, 1_000_000.0)[0].tolist() == pytest.approx([1, 0.01, 0.0001])


@given(st.floats(1, 64), st.integers(0, 4000))
def test_interpolation_reads_positions_between(factor: float, position: int) -> None:
    """arXiv:2306.15595, equation 4: f'(x, m) = f(x, m L / L')."""
    scaled, _ = rotary_frequencies(16, 10_000.0, RopeScaling(kind="linear", factor=factor))
    plain, _ = rotary_frequencies(16, 10_000.0)
    torch.testing.assert_close(position * scaled.double(), position / factor * plain.double(), rtol=1e-6, atol=0)


@given(st.sampled_from([4, 16, 128]), st.floats(1, 64))
def test_ntk_keeps_the_fastest_and_divides_the_slowest(rotated: int, factor: float) -> None:
    """arXiv:2309.00071, section 3.1: b' is chosen so that the last dimension is that of interpolation."""
    scaled, _ = rotary_frequencies(rotated, 10_000.0, RopeScaling(kind="ntk", factor=factor))
    plain, _ = rotary_frequencies(rotated, 10_000.0)
    assert scaled[0] == plain[0] == 1
    assert scaled[-1].item() == pytest.approx(plain[-1].item() / factor, rel=1e-5)
    assert ((scaled <= plain * (1 + 1e-6)) & (scaled >= plain / factor * (1 - 1e-6))).all()


def test_yarn_keeps_what_turns_often_and_divides_what_does_not_turn_once() -> None:
    """arXiv:2309.00071, section 3.2, with its α = 1 and β = 32 for Llama; section 3.4 for √(1/t)."""
    plain, _ = rotary_frequencies(128, 10_000.0)
    scaled, factor = rotary_frequencies(128, 10_000.0, YARN)
    turns = 4096 * plain / (2 * math.pi)
    share = scaled / plain
    assert (share[turns > 40] == 1).all()
    assert torch.allclose(share[turns < 0.8], torch.tensor(1 / 16))
    assert (share.diff() <= 1e-6).all()
    assert factor == pytest.approx(0.1 * math.log(16) + 1)
    assert rotary_frequencies(128, 10_000.0, RopeScaling(kind="yarn", factor=1, original_context=4096))[1] == 1


def test_llama31_divides_wavelengths_over_8192_and_keeps_those_under_2048() -> None:
    """As Meta's reference code (apply_scaling) with its four constants."""
    plain, _ = rotary_frequencies(128, 500_000.0)
    scaled, _ = rotary_frequencies(128, 500_000.0, LLAMA_31)
    waves = 2 * math.pi / plain
    assert torch.equal(scaled[waves < 2048], plain[waves < 2048])
    torch.testing.assert_close(scaled[waves > 8192], plain[waves > 8192] / 8)
    middle = (waves > 2048) & (waves < 8192)
    assert middle.any()
    smooth = (8192 / waves[middle] - 1) / (4 - 1)
    torch.testing.assert_close(scaled[middle], (1 - smooth) * plain[middle] / 8 + smooth * plain[middle])


@pytest.mark.parametrize("rotated", [2, 6, 8])
def test_rotation_is_the_textbooks_and_leaves_the_rest(rotated: int) -> None:
    x, where = normal(5, 8), torch.tensor([0, 1, 2, 17, 300])
    expected = reference.rope(x, where, reference.rope_frequencies(rotated, 10_000.0))
    found = rotate(x[None, None], rotation_table(where, rotated, 10_000.0, torch.float64))[0, 0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(found[:, rotated:], x[:, rotated:])


def test_yarn_multiplies_scores_by_its_factor_squared() -> None:
    q, k, where = normal(1, 1, 6, 16), normal(1, 1, 6, 16, seed=1), torch.arange(6)
    hot = RopeScaling(kind="yarn", factor=16, original_context=4096, attention_factor=1.0)
    scores = [
        rotate(q, table) @ rotate(k, table).mT
        for table in (rotation_table(where, 16, 1e4, torch.float64, scaling) for scaling in (YARN, hot))
    ]
    torch.testing.assert_close(scores[0], scores[1] * reference.yarn_attention_factor(16) ** 2, rtol=1e-5, atol=1e-6)


def test_sinusoids_are_the_papers() -> None:
    """arXiv:1706.03762, section 3.5, and what follows: PE(p) · PE(p + k) depends on k alone."""
    where = torch.tensor([0, 1, 2, 50, 2000])
    torch.testing.assert_close(sinusoids(where, 12).double(), reference.sinusoids(where, 12), atol=2e-4, rtol=0)
    assert sinusoids(torch.tensor([0]), 6).tolist() == [[0, 1, 0, 1, 0, 1]]
    table = sinusoids(torch.arange(40), 16)
    products = table @ table.T
    for k in (1, 7, 30):
        torch.testing.assert_close(products.diagonal(k), products[0, k].expand(40 - k), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "yarn", "factor": 4.0}, "original_context.*is missing; yarn needs it"),
        ({"kind": "llama3", "factor": 4.0}, "original_context.*is missing; llama3 needs it"),
        ({"kind": "yarm", "factor": 4.0}, "Did you mean 'yarn'"),
        ({"kind": "linear", "factor": 0.5}, "factor = 0.5.*at least 1"),
        ({"kind": "linear", "factor": math.nan}, "factor = nan.*at least 1"),
        ({"kind": "yarn", "factor": 4.0, "original_context": 64, "beta_fast": 1.0}, "above beta_slow"),
        (
            {"kind": "llama3", "factor": 4.0, "original_context": 64, "high_frequency_factor": 0.5},
            "above low_frequency_factor",
        ),
        ({"kind": "linear", "factors": 4.0}, "factors.*Fields: kind, factor"),
    ],
)
def test_wrong_scalings_are_refused_in_words(fields: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        preset("llama-nano", rope_scaling=fields)
