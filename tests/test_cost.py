"""What a model costs, by hand and against torch's own counters: every parameter, FLOP and byte."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lengths import examples
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from groundup.generation.cache import KVCache
from groundup.model import ModelConfig, Transformer, activation_bytes, cost, count_parameters, preset, preset_names
from groundup.model.attention import KEPT_UP_TO, PRODUCTS_UP_TO
from groundup.model.masks import AttentionRule
from groundup.recipe import OptimizerSettings
from groundup.training.objective import head_loss
from groundup.training.optimizers import Optimizers

BASE = {
    "vocab_size": 101,
    "context_length": 64,
    "n_layers": 2,
    "n_heads": 3,
    "n_kv_heads": 3,
    "head_dim": 16,
    "d_model": 48,
    "d_ff": 80,
}
PARTS = {
    "llama": {"qk_norm": False},
    "qwen3": {},
    "gpt2": {"norm": "layernorm", "position": "learned", "qk_norm": False, "activation": "gelu_tanh", "bias": True},
    "norms without weight": {"norm_weight": False},
    "LayerNorm without bias": {"norm": "layernorm", "position": "none"},
    "ReLU², untied": {"activation": "relu2", "position": "none", "qk_norm": False, "tied_embeddings": False},
    "grouped": {"n_kv_heads": 1},
    "wide heads": {"head_dim": 32, "partial_rotary_factor": 0.5},
    "experts": {"n_experts": 4, "qk_norm": False},
    "experts with biases": {"n_experts": 4, "experts_per_token": 1, "activation": "gelu", "bias": True},
    "capped": {"attention_softcap": 5.0, "logit_softcap": 3.0},
    "sinusoidal": {"position": "sinusoidal", "qkv_bias": True},
    "ALiBi": {"position": "alibi", "qk_norm": False},
    "post-norm": {"norm_placement": "post", "qk_norm": False, "n_layers": 3},
    "windows": {"attention": ("full", "window"), "window": 5, "n_kv_heads": 1},
    "strided": {"attention": ("strided", "fixed"), "stride": 4},
    "dropout, padded": {"dropout": 0.1, "vocab_multiple": 64},
}


def config_of(parts: str, **changes: object) -> ModelConfig:
    return ModelConfig(**{**BASE, **PARTS[parts], **changes})


def some_ids(config: ModelConfig, batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("parts", PARTS)
def test_the_table_of_shapes_is_the_built_model(parts):
    config = config_of(parts)
    built = [
        (name, tuple(parameter.shape)) for name, parameter in Transformer(config, device="meta").named_parameters()
    ]
    assert list(cost.parameter_shapes(config).items()) == built


@pytest.mark.parametrize("name", preset_names())
def test_the_table_of_shapes_is_the_built_preset(name):
    config = preset(name)
    built = {name: tuple(parameter.shape) for name, parameter in Transformer(config, device="meta").named_parameters()}
    assert cost.parameter_shapes(config) == built


def test_parameters_by_hand():
    """Mixtral 8x7B: its paper says 47 billion in all, of which 13 billion compute a token."""
    config = preset("mixtral-8x7b")
    attention = 2 * 4096 * 4096 + 2 * 4096 * 1024
    expert = 3 * 4096 * 14336
    vocabulary = 2 * 32_000 * 4096
    norms = 65 * 4096
    assert count_parameters(config) == vocabulary + norms + 32 * (attention + 8 * expert + 8 * 4096)
    assert cost.active_parameters(config) == vocabulary + norms + 32 * (attention + 2 * expert + 8 * 4096)
    assert cost.vocabulary_parameters(config) == vocabulary
    assert cost.vocabulary_parameters(preset("gpt2")) == (50_257 + 1024) * 768
    assert cost.active_parameters(preset("gpt2")) == count_parameters(preset("gpt2"))


def test_flops_by_hand():
    """GPT-2 at 1024 tokens: 12 blocks of 12 · 768² weights, the output layer, and half of each square of scores."""
    weights = 12 * 12 * 768**2 + 50_257 * 768
    pairs = 1024 * 1025 // 2
    assert cost.forward_flops(preset("gpt2"), 1024) == 2 * weights * 1024 + 12 * 4 * 768 * pairs
    assert cost.training_flops(preset("gpt2"), 1024) == 3 * cost.forward_flops(preset("gpt2"), 1024)
    assert cost.training_flops_per_token(preset("gpt2"), 1024) * 1024 == cost.training_flops(preset("gpt2"), 1024)
    assert cost.decoding_flops(preset("gpt2"), 1023) == 2 * weights + 12 * 4 * 768 * 1024


@settings(max_examples=examples(60), deadline=None)
@given(
    pattern=st.sampled_from(["full", "window", "strided", "fixed"]),
    length=st.integers(1, 40),
    window=st.integers(1, 45),
    stride=st.integers(1, 45),
    summary=st.integers(1, 45),
    sinks=st.integers(0, 45),
)
def test_pairs_that_see_each_other_are_counted_one_by_one(pattern, length, window, stride, summary, sinks):
    config = ModelConfig(
        **BASE, attention=(pattern,), window=window, stride=stride, summary=min(summary, stride), sink_tokens=sinks
    )
    place = torch.arange(length)
    seen = AttentionRule.of_layer(config, 0).visible(place[:, None], place[None, :])
    assert cost.visible_pairs(config, 0, length) == int(seen.sum())


@pytest.mark.parametrize("parts", PARTS)
def test_flops_are_those_that_torch_counts(parts):
    """Kernels that hold all scores compute the whole square, and torch counts it."""
    config, batch, length = config_of(parts), 2, 24
    ids = some_ids(config, batch, length)
    model = Transformer(config, seed=2).train()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        model.eval()(ids)
    assert forward.get_total_flops() == batch * cost.forward_flops(config, length, whole_square=True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as both:
        model.train()(ids, head=head_loss(ids)).objective.backward()
    assert both.get_total_flops() == batch * cost.training_flops(config, length, whole_square=True)


@pytest.mark.parametrize("parts", PARTS)
def test_one_more_token_costs_what_torch_counts(parts):
    config = config_of(parts)
    model, ids = Transformer(config, seed=2).eval(), some_ids(config, 1, 21)
    cache = KVCache(config, 1, 21)
    with torch.no_grad():
        model(ids[:, :20], cache=cache)
        with FlopCounterMode(display=False) as counter:
            model(ids[:, 20:], positions=torch.tensor([[20]]), cache=cache)
    assert counter.get_total_flops() == cost.decoding_flops(config, 20)


def kept_for_backward(config: ModelConfig, batch: int, length: int, dtype: torch.dtype) -> int:
    """Bytes of every storage that autograd saves in a training step's forward pass, weights themselves left out."""
    model = Transformer(config, seed=2).train()
    model.compute_dtype = dtype
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            held.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    ids = some_ids(config, batch, length)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids, head=head_loss(ids)).objective
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("parts", PARTS)
def test_activations_are_those_that_autograd_keeps(parts, dtype):
    config = config_of(parts)
    for batch, length in ((2, 24), (3, 17)):
        kept = kept_for_backward(config, batch, length, getattr(torch, dtype))
        assert sum(activation_bytes(config, batch, length, dtype).values()) == kept


@pytest.mark.parametrize("length", [KEPT_UP_TO + 8, PRODUCTS_UP_TO + 8])
def test_activations_of_long_rows_have_no_square(length):
    config = config_of("qwen3", n_layers=1, context_length=2048)
    counted = activation_bytes(config, 1, length, "bfloat16")
    assert sum(counted.values()) == kept_for_backward(config, 1, length, torch.bfloat16)
    twice = activation_bytes(config, 1, 2 * length, "bfloat16")
    assert twice["attention"] < 2.5 * counted["attention"]  # a square would make it 3.3 times as much


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("parts", ["qwen3", "gpt2", "experts with biases", "ReLU², untied", "dropout, padded"])
def test_weights_gradients_and_optimizer_state_are_as_counted(parts, optimizer):
    config = config_of(parts)
    model = Transformer(config, seed=2)
    optimizers = Optimizers(model, OptimizerSettings(optimizer=optimizer), torch.float32)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert weights == cost.weight_bytes(config) == 2 * cost.weight_bytes(config, 2)
    assert sum(parameter.grad.nbytes for parameter in model.parameters()) == cost.weight_bytes(config)
    optimizers.step(1.0)
    state = sum(value.nbytes for value in optimizers.state_dict().values())
    assert state == cost.optimizer_bytes(config, optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_is_as_large_as_counted(dtype):
    config = config_of("grouped")
    cache = KVCache(config, batch=3, length=50, dtype=dtype)
    assert cache.n_bytes == cost.kv_cache_bytes(config, 50, 3, dtype.itemsize)
    assert cost.kv_cache_bytes(preset("llama-3.1-8b"), 1) == 131_072  # 128 KiB a token: 2 · 32 · 8 · 128 · 2 bytes
