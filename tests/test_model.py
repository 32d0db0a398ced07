"""The model against laws and against transformers' own classes."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from groundup.errors import RecipeError
from groundup.model import ModelConfig, Transformer, count_parameters, preset, preset_names, training_flops_per_token
from groundup.model.attention import attend_to_cache
from groundup.model.masks import AttentionRule, attention_bias
from groundup.model.positions import rotate, rotation_table

NANO = ["ground-nano", "gpt2-nano", "llama-nano"]


def tokens(config: ModelConfig, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", preset_names())
def test_counted_parameters_are_those_of_the_built_model(name):
    config = preset(name)
    assert Transformer(config, device="meta").n_parameters == count_parameters(config)


def test_published_sizes_to_the_unit():
    assert count_parameters(preset("gpt2")) == 124_439_808
    assert count_parameters(preset("llama-160m")) == 162_417_408


@pytest.mark.parametrize("name", NANO)
def test_initial_loss_is_ln_v(name):
    config = preset(name)
    model = Transformer(config, seed=3).eval()
    ids = tokens(config, 8, 65)
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(config.vocab_size), rel=0.02)


@pytest.mark.parametrize("name", NANO)
def test_a_token_sees_only_itself_and_what_came_before(name):
    config = preset(name)
    model = Transformer(config).eval()
    # Zero output projections would hide a leak.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    ids = tokens(config, 1, 20)
    changed = ids.clone()
    changed[0, 12] = (changed[0, 12] + 1) % config.vocab_size
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"norm_placement": "post"},
        {"n_experts": 4, "experts_per_token": 2},
        {"n_kv_heads": 1, "qk_norm": True, "partial_rotary_factor": 0.5, "bias": True, "tied_embeddings": False},
        {"position": "learned", "norm": "layernorm", "activation": "gelu", "attention_softcap": 5.0},
        {"attention": ("window",), "window": 8},
        {"position": "alibi", "activation": "geglu"},
    ],
)
def test_results_that_are_wanted_are_those_of_the_whole(change):
    config = preset("ground-nano", **change)
    model = Transformer(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    ids = tokens(config, 3, 20)
    whole = model(ids)  # with gradients: without them, several parts are computed in other ways
    few, all_of_them = (torch.tensor([0, 2, 2]), torch.tensor([19, 0, 7])), torch.where(ids >= 0)
    with torch.no_grad():
        assert torch.allclose(model(ids), whole, atol=1e-5)
        for wanted in (few, all_of_them):
            assert torch.allclose(model(ids, wanted=wanted)[0], whole[wanted], atol=1e-5)


def test_same_seed_same_weights_other_seed_others():
    config = preset("ground-nano")
    one, same, other = (dict(Transformer(config, seed=seed).named_parameters()) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    drawn = [name for name in one if one[name].std() > 0]
    assert drawn
    assert not any(torch.equal(one[name], other[name]) for name in drawn)


def test_weights_do_not_depend_on_what_else_is_in_the_model():
    small = dict(Transformer(preset("ground-nano", n_layers=1)).named_parameters())
    large = dict(Transformer(preset("ground-nano", n_layers=3)).named_parameters())
    assert all(torch.equal(small[name], large[name]) for name in small)


@pytest.mark.parametrize("name", NANO)
def test_every_parameter_is_initialized_exactly_once(name, monkeypatch):
    from groundup.model import initialization

    drawn = []
    original = initialization._draw
    monkeypatch.setattr(initialization, "_draw", lambda name, *rest: drawn.append(name) or original(name, *rest))
    model = Transformer(preset(name))
    assert sorted(drawn) == sorted(name for name, _ in model.named_parameters())
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_initialization_table():
    gpt2 = dict(Transformer(preset("gpt2-nano", d_model=256, n_heads=4)).named_parameters())
    assert gpt2["layers.0.mlp.up_proj.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert gpt2["layers.0.mlp.down_proj.weight"].std().item() == pytest.approx(0.02 / 2, rel=0.05)
    assert gpt2["layers.0.mlp.up_proj.bias"].abs().max() == 0
    scaled = dict(Transformer(preset("ground-nano", d_model=256, n_heads=4)).named_parameters())
    assert scaled["layers.0.self_attn.q_proj.weight"].std().item() == pytest.approx(1 / 16, rel=0.05)
    assert scaled["layers.0.self_attn.o_proj.weight"].abs().max() == 0
    assert (scaled["layers.0.input_layernorm.weight"] == 1).all()


@given(shift=st.integers(0, 500), length=st.integers(2, 12))
def test_rotation_keeps_lengths_and_depends_on_distance_only(shift, length):
    generator = torch.Generator().manual_seed(length)
    q, k = torch.randn(2, 1, 1, length, 16, generator=generator, dtype=torch.float64)
    here = rotation_table(torch.arange(length), 16, 10_000.0, torch.float64)
    there = rotation_table(torch.arange(length) + shift, 16, 10_000.0, torch.float64)
    scores = rotate(q, here) @ rotate(k, here).mT
    moved = rotate(q, there) @ rotate(k, there).mT
    torch.testing.assert_close(rotate(q, here).norm(dim=-1), q.norm(dim=-1), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(scores, moved, atol=2e-4, rtol=2e-4)


def test_rotation_at_position_zero_is_the_identity():
    x = torch.randn(1, 2, 1, 8)
    assert torch.equal(rotate(x, rotation_table(torch.zeros(1, dtype=torch.int64), 8, 1e4, torch.float32)), x)


def test_attention_to_a_cache_is_grouped_query_attention():
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    positions = torch.tensor([[2, 3, 4, 5, 6], [4, 5, 6, 7, 8]])
    mask = torch.arange(9) <= positions[..., None]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=True)
    bias = attention_bias(AttentionRule(), positions, torch.arange(9), torch.float32)
    torch.testing.assert_close(attend_to_cache(q, k, v, bias, 8**-0.5), expected, atol=1e-5, rtol=1e-5)


def test_dropout_acts_while_training_only():
    config = preset("ground-nano", dropout=0.5)
    model, ids = Transformer(config), tokens(config, 2, 16)
    model.eval()
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


def test_one_batch_can_be_overfitted():
    config = preset("ground-nano")
    model, ids = Transformer(config), tokens(config, 4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_wrong_shapes_are_refused_in_words():
    with pytest.raises(RecipeError, match=r"n_kv_heads = 3.*does not divide n_heads = 4"):
        preset("ground-1m", n_kv_heads=3)
    with pytest.raises(RecipeError, match=r"ground-2m.*Did you mean 'ground-"):
        preset("ground-2m")
    with pytest.raises(RecipeError, match=r"head_dim = 7.*odd"):
        preset("ground-nano", head_dim=7)
    with pytest.raises(RecipeError, match="multiple of n_heads"):
        preset("ground-nano", d_model=33)
    with pytest.raises(RecipeError, match="Did you mean 'n_layers'"):
        preset("ground-nano", n_layer=3)


def test_widths_that_follow_are_derived_again():
    config = preset("ground-1m", d_model=256)
    assert (config.head_dim, config.d_ff) == (64, 768)
    assert preset("ground-1m", n_heads=8).n_kv_heads == 8


def test_flops_are_six_per_matmul_weight_plus_attention():
    config = preset("llama-nano")
    block = 32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 96
    assert training_flops_per_token(config, 64) == 6 * (2 * block + 512 * 32) + 6 * 2 * 32 * 65


def test_arithmetic_in_bfloat16_stays_near_float32():
    config = preset("ground-nano")
    model, ids = Transformer(config).eval(), tokens(config, 2, 32)
    exact = model(ids)
    model.compute_dtype = torch.bfloat16
    rough = model(ids)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.1
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
