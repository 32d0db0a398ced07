"""Initialization: the table is what is drawn, signals are what theory says, the number of processes changes nothing."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from model_parts import exact_weights, normal, tiny, tokens
from pairwise import pairwise
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import _clear_sharding_prop_cache as clear_sharding_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from groundup.model import ModelConfig, Transformer
from groundup.model.initialization import expected_initial_loss, initialize, standard_deviation
from groundup.reference.feedforward import gelu, relu2, swish
from groundup.reference.initialization import activation_means, predicted_variances

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import initialization as benchmark

EVERY_PART = [
    {"n_experts": 4, "bias": True, "norm": "layernorm", "position": "learned", "tied_embeddings": False},
    {"bias": True, "vocab_multiple": 64},
    {"norm_placement": "post", "tied_embeddings": False, "vocab_multiple": 64, "activation": "gelu", "qk_norm": False},
]


@pytest.mark.parametrize("initialization", ["scaled", "gpt2"])
@pytest.mark.parametrize("fields", EVERY_PART)
def test_every_parameter_has_the_tables_distribution(initialization: str, fields: dict[str, object]) -> None:
    """Its mean is 0 and its standard deviation the table's, within five standard errors; ones are ones, zeros zeros."""
    config = tiny(initialization=initialization, **fields)
    for name, parameter in Transformer(config, seed=5).named_parameters():
        expected = standard_deviation(name, tuple(parameter.shape), initialization, config.n_layers)
        drawn = parameter.detach()
        if name.startswith(("embed_tokens.", "lm_head.")):
            assert (drawn[config.vocab_size :] == 0).all()
            drawn = drawn[: config.vocab_size]
        if expected is None:
            assert (drawn == 1).all(), name
        else:
            n = drawn.numel()
            assert drawn.mean().abs() <= 5 * expected / math.sqrt(n), name
            assert abs(drawn.square().mean().sqrt() - expected) <= 5 * expected / math.sqrt(2 * n), name


def test_the_table_by_hand() -> None:
    def row(name: str, *shape: int) -> tuple[float | None, float | None]:
        return standard_deviation(name, shape, "scaled", 8), standard_deviation(name, shape, "gpt2", 8)

    assert row("embed_tokens.weight", 100, 64) == (0.02, 0.02)
    assert row("embed_positions.weight", 100, 64) == (0.02, 0.02)
    assert row("layers.3.self_attn.q_proj.weight", 32, 64) == (1 / 8, 0.02)
    assert row("layers.3.mlp.up_proj.weight", 4, 256, 64) == (1 / 8, 0.02)  # of 4 experts
    assert row("layers.3.mlp.router.weight", 4, 64) == (0.02, 0.02)
    assert row("layers.3.self_attn.o_proj.weight", 64, 64) == (0.0, 0.02 / 4)  # 0.02 / sqrt(2 · 8)
    assert row("layers.3.mlp.down_proj.weight", 64, 256) == (0.0, 0.02 / 4)
    assert row("layers.3.mlp.down_proj.bias", 64) == (0.0, 0.0)
    assert row("lm_head.weight", 100, 64) == (0.0, 0.02)
    assert row("layers.3.self_attn.q_norm.weight", 32) == (None, None)


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("initialization", ["scaled", "gpt2"])
def test_signals_are_what_the_table_predicts_layer_by_layer(initialization: str, placement: str) -> None:
    """Forward and backward, at every block, at a quarter of the size of `benchmarks/initialization.py`."""
    config = benchmark.shape(initialization, placement, n_layers=6, width=128, length=32)
    forward, backward = benchmark.measure(config, range(1, 9))
    predicted_forward, predicted_backward = predicted_variances(benchmark.blocks(config), 2 * 0.02**2, 32)
    assert forward == pytest.approx(predicted_forward, rel=0.05)
    assert backward == pytest.approx(predicted_backward, rel=0.08)
    if initialization == "gpt2" and placement == "pre":  # the others are flat: this one must be seen to move
        assert predicted_forward[-1] > 3 * predicted_forward[0]
        assert predicted_backward[0] > 3 * predicted_backward[-1]


@pytest.mark.parametrize("activation", ["swiglu", "relu2", "gelu"])
def test_predictions_hold_for_other_feedforward_layers(activation: str) -> None:
    config = benchmark.shape("gpt2", "pre", n_layers=3, width=128, length=32)
    config = ModelConfig(**{**vars(config), "activation": activation, "d_ff": 1024, "norm": "rmsnorm"})
    forward, backward = benchmark.measure(config, range(1, 9))
    predicted_forward, predicted_backward = predicted_variances(benchmark.blocks(config), 2 * 0.02**2, 32)
    assert forward == pytest.approx(predicted_forward, rel=0.05)
    assert backward == pytest.approx(predicted_backward, rel=0.08)


@pytest.mark.parametrize("activation", [gelu, swish, relu2])
@pytest.mark.parametrize("correlation", [0.0, 0.5, 1.0])
def test_gaussian_means_are_those_of_drawn_numbers(activation: object, correlation: float) -> None:
    x = normal(400_000)
    y = correlation * x + (1 - correlation**2) ** 0.5 * normal(400_000, seed=1)
    x, y = (1.5 * part for part in (x, y))
    slopes = []
    for part in (x, y):
        part.requires_grad_()
        (slope,) = torch.autograd.grad(activation(part).sum(), part)
        slopes.append(slope)
    matrix = 2.25 * torch.tensor([[1, correlation], [correlation, 1]], dtype=torch.float64)
    means, slope_means = activation_means(activation, matrix)
    assert means[0, 1].item() == pytest.approx((activation(x) * activation(y)).mean().item(), rel=0.05, abs=0.01)
    assert slope_means[0, 1].item() == pytest.approx((slopes[0] * slopes[1]).mean().item(), rel=0.05, abs=0.01)


@pytest.mark.parametrize("fields", EVERY_PART[:2])
def test_scaled_blocks_begin_as_the_identity_and_still_learn(fields: dict[str, object]) -> None:
    """The projections back are 0 but their gradients are not; whatever lies behind them has none yet."""
    config = tiny(**{**fields, "tied_embeddings": True, "bias": False})
    model, ids = Transformer(config), tokens(config, 2, 16)
    x = torch.randn(2, 16, config.d_model)
    assert all(torch.equal(block(x, None), x) for block in model.layers)
    F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert parameter.grad.abs().max() > 0, name
        elif "self_attn" in name or "mlp" in name:
            assert parameter.grad is None or parameter.grad.abs().max() == 0, name


TRAINED = [
    {"norm_placement": placement, "initialization": initialization, "norm": norm, **more}
    for placement, initialization, norm, more in pairwise(
        ("pre", "post"),
        ("scaled", "gpt2"),
        ("rmsnorm", "layernorm"),
        ({}, {"position": "learned", "activation": "gelu", "bias": True, "qk_norm": False}),
    )
]


@pytest.mark.parametrize("fields", TRAINED, ids=lambda fields: "-".join(map(str, fields.values())))
def test_every_placement_and_initialization_trains_without_divergence(fields: dict[str, object]) -> None:
    """Rows that count by ones or by twos: the loss starts at ln V and falls far below, and nothing explodes."""
    config = tiny(n_layers=3, d_model=32, vocab_size=16, tied_embeddings=False, **fields)
    model = Transformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    generator, losses, norms = torch.Generator().manual_seed(0), [], []
    for step in range(60):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1, (step + 1) / 10)
        begin, stride = torch.randint(0, 16, (2, 8, 1), generator=generator)
        ids = (begin + (1 + stride % 2) * torch.arange(17)) % 16
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf).item())
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(16), rel=0.1)
    assert max(losses) < losses[0] + 0.1
    assert losses[-1] < 0.5
    assert max(norms) < 50


@pytest.fixture
def pretend_world() -> Iterator[object]:
    """Makes this process rank r of a world of n that does not talk; drawing weights needs no talk."""

    def become(rank: int, size: int) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        clear_sharding_cache()  # it takes the meshes of two ranks for one
        dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())

    yield become
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("fields", EVERY_PART)
def test_weights_are_the_same_whatever_the_number_of_processes(
    pretend_world, size: int, fields: dict[str, object]
) -> None:
    """Built without memory, sharded, then drawn: the processes' shards joined are the weights of one process."""
    config = tiny(initialization="gpt2", **fields)
    whole = dict(Transformer(config, seed=3).named_parameters())
    shards: dict[str, list[torch.Tensor]] = {name: [] for name in whole}
    for rank in range(size):
        pretend_world(rank, size)
        mesh = dist.init_device_mesh("cpu", (size,))
        model = Transformer(config, device="meta")
        for block in model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.to_empty(device="cpu")
        initialize(model, config, seed=3)
        for name, parameter in model.named_parameters():
            shards[name].append(parameter.to_local().detach().clone())
    for name, parameter in whole.items():
        assert torch.equal(torch.cat(shards[name]), parameter), name


def test_weights_are_the_same_for_a_compiled_model() -> None:
    config = tiny()
    plain, wrapped = Transformer(config, seed=2), Transformer(config, seed=9)
    wrapped.layers[0] = torch.compile(wrapped.layers[0])  # parameters get another name; nothing is compiled yet
    initialize(wrapped, config, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True))


def test_tokens_rows_do_not_depend_on_how_many_rows_fill_up() -> None:
    plain, filled = Transformer(tiny()), Transformer(tiny(vocab_multiple=128))
    assert filled.embed_tokens.weight.shape[0] == 128
    assert torch.equal(plain.embed_tokens.weight, filled.embed_tokens.weight[:61])
    assert filled.n_parameters == plain.n_parameters


def test_a_model_on_the_meta_device_holds_nothing() -> None:
    model = Transformer(tiny(n_layers=200, d_model=4096, d_ff=16_384), device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.n_parameters > 40_000_000_000
    assert set(dict(model.named_parameters())) > set(exact_weights(Transformer(tiny())))


@pytest.mark.parametrize(
    "fields",
    [
        {"d_model": 64, "n_heads": 2},
        {"d_model": 512, "n_heads": 8},
        {"d_model": 768, "n_heads": 12, "vocab_size": 4096},
        {"d_model": 512, "n_heads": 8, "position": "learned", "norm": "layernorm"},
        {"d_model": 512, "n_heads": 8, "position": "sinusoidal"},
        {"d_model": 512, "n_heads": 8, "logit_softcap": 8.0},
        {"d_model": 512, "n_heads": 8, "norm_placement": "post"},
        {"d_model": 512, "n_heads": 8, "tied_embeddings": False},
    ],
    ids=str,
)
def test_the_first_loss_is_the_one_that_is_expected(fields: dict[str, object]) -> None:
    config = ModelConfig(**{"vocab_size": 1000, "context_length": 128, "n_layers": 2, "n_kv_heads": fields["n_heads"],
                            "head_dim": 32, "d_ff": 64, "tied_embeddings": True, **fields})  # fmt: skip
    ids = torch.randint(0, config.vocab_size, (8, 129), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = Transformer(config)(ids[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    assert loss == pytest.approx(expected_initial_loss(config), rel=0.01)
    if not config.tied_embeddings:
        assert expected_initial_loss(config) == math.log(config.vocab_size)
