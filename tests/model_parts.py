"""Tiny models of any shape, with weights that hide nothing, for the tests of the model."""

from __future__ import annotations

import torch
from torch import Tensor

from groundup.model import ModelConfig, Transformer

SHAPE = {
    "vocab_size": 61,
    "context_length": 48,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 8,
    "d_model": 24,
    "d_ff": 40,
}


def tiny(**overrides: object) -> ModelConfig:
    """A configuration of widths that are all different, with some fields replaced."""
    return ModelConfig(**{**SHAPE, **overrides})  # type: ignore[arg-type]


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model whose every weight matters; rows that stand for no token would spoil whatever they touched."""
    model = Transformer(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.3 * drawn if is_norm else 0.3 * drawn)
            if name.startswith(("embed_tokens.", "lm_head.")):
                parameter[config.vocab_size :] = 100.0
    return model


def exact_weights(model: Transformer) -> dict[str, Tensor]:
    """The weights by name, in float64, each a leaf that takes gradients."""
    return {name: value.detach().double().requires_grad_() for name, value in model.named_parameters()}


def tokens(config: ModelConfig, *shape: int, seed: int = 0) -> Tensor:
    """Random ids."""
    return torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def distance(found: Tensor, expected: Tensor) -> float:
    """How far from the expected, as a share of its length, or of 1 where that is more."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp(min=1))
