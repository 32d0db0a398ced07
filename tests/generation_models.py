"""Tiny models and tokenizers for the tests of generation and evaluation, and the test of a distribution."""

from __future__ import annotations

import functools
import math

import torch

from groundup.model import Transformer, preset
from groundup.tokenizer import Tokenizer

NANO = ["ground-nano", "gpt2-nano", "llama-nano"]

TEXT = (
    "Once upon a time there was a small house at the edge of the forest. In the house lived an old woman and a "
    "cat. Every morning the cat sat at the window and looked at the birds. 1234567890 naïve café 東京 🙂 "
)


def random_model(name: str = "ground-nano", seed: int = 0, std: float = 0.2, **overrides: float) -> Transformer:
    """A model whose every weight matters: fresh ones have zero projections, which would hide faults."""
    model = Transformer(preset(name, **overrides), seed=1).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std, generator=generator)
    return model


@functools.cache
def small_tokenizer(kind: str = "bpe") -> Tokenizer:
    """Trained on `TEXT`; characters outside ASCII take several tokens."""
    return Tokenizer.train([TEXT] * 3, kind=kind, vocab_size=320, spare_tokens=0)


def random_prompts(lengths: list[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """How many standard deviations the chi-square statistic is above its mean; cells under 5 are put together."""
    large = expected >= 5
    counts = torch.cat([counts[large], counts[~large].sum()[None]]).double()
    expected = torch.cat([expected[large], expected[~large].sum()[None]]).double()
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic, freedom = ((counts - expected) ** 2 / expected).sum().item(), len(expected) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)
