"""Every two choices of any two parts together: the model against the textbook, the cache, packing and itself.

The rows are a covering array (`pairwise.py`): whatever two choices there are, some row has both.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from model_parts import distance, exact_weights, random_model, tiny, tokens
from pairwise import all_pairs, pairwise_rows

from groundup.generation import KVCache
from groundup.model import ModelConfig, RopeScaling
from groundup.reference.transformer import transformer

LENGTH = 13

CHOICES: dict[str, list[dict[str, object]]] = {
    "position": [
        {"position": "rope"},
        {"position": "rope", "partial_rotary_factor": 0.5, "rope_theta": 500.0},
        {"position": "rope", "rope_scaling": RopeScaling(kind="linear", factor=2.5)},
        {"position": "rope", "rope_scaling": RopeScaling(kind="ntk", factor=4)},
        {"position": "rope", "rope_scaling": RopeScaling(kind="yarn", factor=4, original_context=16, beta_fast=2)},
        {"position": "rope", "rope_scaling": RopeScaling(kind="llama3", factor=8, original_context=16)},
        {"position": "learned"},
        {"position": "sinusoidal"},
        {"position": "alibi"},
        {"position": "none"},
    ],
    "attention": [
        {"attention": ("full",)},
        {"attention": ("window",), "window": 3},
        {"attention": ("window",), "window": LENGTH + 5},
        {"attention": ("window", "full"), "window": 4},
        {"attention": ("full", "window"), "window": 2, "sink_tokens": 2},
        {"attention": ("strided",), "stride": 3},
        {"attention": ("fixed",), "stride": 4, "summary": 2},
        {"attention": ("strided", "fixed"), "stride": 5},
    ],
    "normalization": [
        {"norm": "rmsnorm"},
        {"norm": "rmsnorm", "norm_weight": False},
        {"norm": "layernorm"},
        {"norm": "layernorm", "norm_bias": True},
        {"norm": "layernorm", "norm_weight": False},
    ],
    "placement": [{"norm_placement": "pre"}, {"norm_placement": "post"}],
    "qk_norm": [{"qk_norm": True}, {"qk_norm": False}],
    "heads": [{"n_kv_heads": 4}, {"n_kv_heads": 2}, {"n_kv_heads": 1}],
    "activation": [{"activation": name} for name in ("swiglu", "geglu", "gelu", "gelu_tanh", "relu2")],
    "experts": [
        {},
        {"n_experts": 4},
        {"n_experts": 3, "experts_per_token": 1},
        {"n_experts": 3, "experts_per_token": 3},
    ],
    "bias": [{}, {"bias": True}, {"qkv_bias": True}, {"bias": True, "o_bias": False, "qkv_bias": False}],
    "scores": [{}, {"attention_softcap": 1.5}, {"attention_scale": 0.9, "logit_softcap": 3.0}],
    "embedding": [
        {"tied_embeddings": True},
        {"tied_embeddings": False},
        {"tied_embeddings": True, "vocab_multiple": 64},
        {"tied_embeddings": False, "vocab_multiple": 16},
    ],
}  # fmt: skip

ROWS = pairwise_rows(CHOICES)


@pytest.fixture(params=ROWS, ids=lambda row: "-".join(str(row[name]) for name in CHOICES))
def config(request: pytest.FixtureRequest) -> ModelConfig:
    fields = [CHOICES[name][value] for name, value in request.param.items()]
    return tiny(**dict(itertools.chain.from_iterable(choice.items() for choice in fields)))


def test_the_rows_have_every_pair_and_are_few() -> None:
    met = {frozenset(pair) for row in ROWS for pair in itertools.combinations(row.items(), 2)}
    assert met == all_pairs(CHOICES)
    assert len(ROWS) < 1.2 * 80  # no fewer than the two longest lists have pairs


def test_logits_and_gradients_are_the_textbooks(config: ModelConfig) -> None:
    model, ids = random_model(config), tokens(config, 1, LENGTH)
    weights = exact_weights(model)
    expected = transformer(ids[0].tolist(), weights, config)
    found = model(ids)[0]
    assert found.shape == (LENGTH, config.vocab_size)
    assert distance(found, expected) < 1e-5
    F.cross_entropy(found[:-1], ids[0, 1:]).backward()
    F.cross_entropy(expected[:-1], ids[0, 1:]).backward()
    whole = torch.stack([weight.grad.norm() for weight in weights.values() if weight.grad is not None]).norm()
    for name, parameter in model.named_parameters():
        gradient = weights[name].grad
        if gradient is None:  # an expert that nobody chose, or one that gets no gradient from the textbook
            assert parameter.grad is None or parameter.grad.abs().max() == 0, name
        else:
            assert parameter.grad is not None, name
            assert (parameter.grad - gradient).norm() < 1e-4 * gradient.norm() + 1e-6 * whole, name


@torch.inference_mode()
def test_cached_logits_are_the_uncached_ones(config: ModelConfig) -> None:
    model, ids = random_model(config), tokens(config, 2, LENGTH)
    whole, cache = model(ids), KVCache(config, batch=2, length=LENGTH)
    # A prompt, a few tokens at once, then one by one.
    for begin, end in itertools.pairwise([0, 5, 8, *range(9, LENGTH + 1)]):
        positions = torch.arange(begin, end).expand(2, -1)
        logits = model(ids[:, begin:end], positions=positions, cache=cache)
        assert distance(logits, whole[:, begin:end]) < 1e-5


@torch.inference_mode()
def test_packed_documents_are_as_alone(config: ModelConfig) -> None:
    model = random_model(config)
    lengths = [[5, 1, LENGTH - 6], [2, LENGTH - 2]]
    ids = tokens(config, 2, LENGTH)
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    documents = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])
    packed = model(ids, positions=positions, documents=documents)
    for row, cuts in enumerate(lengths):
        begin = 0
        for length in cuts:
            alone = model(ids[row : row + 1, begin : begin + length])[0]
            assert distance(packed[row, begin : begin + length], alone) < 1e-5
            begin += length
