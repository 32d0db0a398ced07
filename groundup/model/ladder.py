"""One number, a whole model: the ladder `ground-1m` … `ground-1b`.

In: `size` (parameters in all) or `depth` (blocks). Out: a Qwen3-shaped configuration, and how to train it: learning
rates, batch, tokens. Every value comes with its reason and its source. The rules, by the width they give:

    depth → width     32 · depth below 8 blocks, then 256 · (depth // 4 − 1): 8 → 256, 16 → 768, 32 → 1792. The share
                      width / depth rises from 32 to 56; loss hardly depends on it (arXiv:2001.08361, section 3.1).
    size → both       of an even depth and a width the pair that is nearest to the size and to that rule
    feed-forward      3 · width, as Qwen3-0.6B
    heads             of 32 features under width 256, 64 under 1024, 128 from there on; from there on half as many
                      key/value heads (grouped-query attention), as Qwen3-0.6B
    vocabulary        grows slower than the rest of the model (arXiv:2407.13623)
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from typing import Any

from groundup.errors import Problem, RecipeError
from groundup.model.config import ModelConfig
from groundup.model.cost import OptimizerName, count_parameters, vocabulary_parameters
from groundup.model.presets import reshaped

SMALLEST, LARGEST = 200_000, 10_000_000_000
"""Sizes that the ladder has."""

DEPTHS = range(2, 65)
"""Depths that it has."""

TOKENS_PER_PARAMETER = 20
"""Compute-optimal: Hoffmann et al., arXiv:2203.15556, approach 1."""

_WIDTHS = (64, 128, 192, *range(256, 4097, 256))
_VOCABULARY = ((128, 2048), (192, 4096), (256, 8192), (512, 16_384), (1024, 32_768), (4096, 65_536))
_CONTEXT = ((192, 256), (256, 512), (512, 1024), (4096, 2048))
_UNITS = {"k": 1e3, "m": 1e6, "b": 1e9}


@dataclass(frozen=True)
class Choice:
    """One derived value."""

    name: str  # of the setting, as in a recipe: `model.d_model`, `pretrain.lr`
    value: int | float | str  # what it is set to
    reason: str  # why this


def parse_size(text: str) -> int:
    """Parameters that "10m", "1.5b", "300k" or "10_000_000" mean.

    Raises:
        RecipeError: no such number, or not on the ladder.
    """
    size = parse_count(text) or 0
    if not SMALLEST <= size <= LARGEST:
        what = "is no number of parameters from 200k to 10b."
        raise RecipeError("model", [Problem(f"[model] size = {text!r}", what, 'Write it as "10m" or "1.5b".')])
    return size


def parse_count(text: str) -> int | None:
    """The number that such a text means; None: it is none."""
    match = re.fullmatch(r"([0-9][0-9_]*(?:\.[0-9]+)?)\s*([kmb]?)", text.strip().lower())
    return round(float(match[1].replace("_", "")) * _UNITS.get(match[2], 1)) if match else None


def ladder_config(*, size: str | None = None, depth: int | None = None, **overrides: Any) -> ModelConfig:
    """The configuration of a size or a depth, with some fields replaced as by `reshaped`.

    Raises:
        RecipeError: not on the ladder, no such field, or values that do not fit together.
    """
    assert (size is None) != (depth is None), "a size or a depth"
    if size is not None:
        return reshaped(shape_of_size(parse_size(size), overrides.get("vocab_size")), overrides)
    assert depth is not None
    return reshaped(shape_of_depth(depth), overrides)


def shape_of_depth(depth: int) -> dict[str, Any]:
    """The fields of a model with so many blocks.

    Raises:
        RecipeError: not on the ladder.
    """
    if depth not in DEPTHS:
        what = f"the ladder has {DEPTHS[0]} to {DEPTHS[-1]} blocks."
        raise RecipeError("model", [Problem(f"[model] depth = {depth}", what, "For other shapes set n_layers.")])
    return _shape(depth, _width(depth))


def shape_of_size(size: int, vocab_size: int | None = None) -> dict[str, Any]:
    """The fields of the model that is nearest to a size.

    Args:
        size: parameters in all, the embedding among them.
        vocab_size: tokens (default: what the ladder gives each width).
    """

    counts = _counts(vocab_size)

    def distance(pair: tuple[int, int]) -> float:
        depth, width = pair
        return abs(math.log(counts[pair] / size)) + 0.25 * abs(math.log(depth / _usual_depth(width)))

    return _shape(*min(counts, key=distance))


def shape_on_line(size: int, vocab_size: int) -> dict[str, Any]:
    """The fields of the model nearest to a size whose depth is the one that its width usually has.

    Between the rungs of `shape_of_size` depth and width jump in turn; along this line only the size changes, as a
    comparison of sizes needs.
    """
    widths = (*range(64, 256, 32), *range(256, 1024, 128), *range(1024, 4097, 256))
    line = [_shape(round(_usual_depth(width)), width) for width in widths]
    counts = [count_parameters(ModelConfig(**{**shape, "vocab_size": vocab_size})) for shape in line]
    return min(zip(line, counts, strict=True), key=lambda pair: abs(math.log(pair[1] / size)))[0]


def shape_choices(config: ModelConfig, asked: str) -> list[Choice]:
    """Why a configuration of the ladder is as it is.

    Args:
        config: of `shape_of_depth` or `shape_of_size`.
        asked: the number it came from, as in a recipe: "size 10m".
    """
    width, heads = config.d_model, config.n_heads
    ratio = "half the query heads from width 1024 on" if config.n_kv_heads < heads else "as many as query heads"
    values = {
        "n_layers": (config.n_layers, f"{asked}: {count_parameters(config):,} parameters with this vocabulary"),
        "d_model": (width, f"{width / config.n_layers:.0f} a block; loss hardly depends on it (arXiv:2001.08361)"),
        "head_dim": (config.head_dim, "32 under width 256, 64 under 1024, 128 from there on, as Qwen3"),
        "n_heads": (heads, f"{width} / {config.head_dim}"),
        "n_kv_heads": (config.n_kv_heads, f"{ratio} (arXiv:2305.13245; Qwen3)"),
        "d_ff": (config.d_ff, "3 · width, as Qwen3-0.6B"),
        "context_length": (config.context_length, "256 tokens under width 256, up to 2048 from 768 on"),
    }
    return [Choice(f"model.{name}", value, reason) for name, (value, reason) in values.items()]


def training_choices(
    config: ModelConfig,
    *,
    tokens: int | None = None,
    sequence_length: int | None = None,
    optimizer: OptimizerName = "muon",
) -> list[Choice]:
    """How to train a model from its start: tokens, batch and learning rates.

    Args:
        config: the model.
        tokens: the budget, where it is given.
        sequence_length: tokens in a row (default: the model's context).
        optimizer: of the blocks' matrices.
    """
    n_parameters = count_parameters(config)
    inner = n_parameters - vocabulary_parameters(config)
    budget = tokens if tokens is not None else TOKENS_PER_PARAMETER * n_parameters
    length = sequence_length or config.context_length
    best = 0.58 * budget**0.571
    rows = max(8, 2 ** round(math.log2(best / length)))
    choices = [] if tokens is not None else [
        Choice("pretrain.tokens", "compute-optimal", f"{TOKENS_PER_PARAMETER} for each of {n_parameters:,} parameters "
               f"= {budget:,} (arXiv:2203.15556)"),
    ]  # fmt: skip
    reason = f"0.58 · tokens^0.571 = {best:,.0f} tokens (Step Law, arXiv:2503.04715), as a power of two of rows"
    choices.append(Choice("pretrain.batch_size", rows, reason))
    if optimizer == "adamw":
        law = 1.79 * inner**-0.713 * budget**0.307
        found = f"1.79 · N^-0.713 · tokens^0.307 = {law:.2g} at N = {inner:,}"
        reason = f"{found} (Step Law, arXiv:2503.04715), at most 0.003"
        choices.append(Choice("pretrain.lr", _rounded(min(3e-3, law)), reason))
    elif optimizer == "muon":
        lr = _rounded(3e-3 * math.sqrt(128 / config.d_model))
        reason = "AdamW for embeddings and norms: 0.003 at width 128 (measured: recipes/demo), falling as 1/√width"
        choices.append(Choice("pretrain.lr", lr, reason))
        reason = "for every width: orthogonal updates change outputs alike in all (arXiv:2310.17813; recipes/demo)"
        choices.append(Choice("pretrain.muon_lr", 0.02, reason))
    elif optimizer == "lion":
        lr = _rounded(1e-3 * math.sqrt(128 / config.d_model))
        reason = "a third of AdamW's (arXiv:2302.06675, section 5): 0.001 at width 128, falling as 1/√width"
        choices.append(Choice("pretrain.lr", lr, reason))
    else:
        choices.append(Choice("pretrain.lr", 0.03, "a share of the weights' own size (arXiv:1804.04235, section 8)"))
    return choices


@functools.cache
def _counts(vocab_size: int | None) -> dict[tuple[int, int], int]:
    """Parameters of every shape that a size can lead to, by depth and width."""
    own = {} if vocab_size is None else {"vocab_size": vocab_size}
    pairs = [(depth, width) for depth in DEPTHS[::2] for width in _WIDTHS if 16 <= width / depth <= 128]
    return {pair: count_parameters(ModelConfig(**_shape(*pair) | own)) for pair in pairs}


def _width(depth: int) -> int:
    return 32 * depth if depth < 8 else 256 * (depth // 4 - 1)


def _usual_depth(width: int) -> float:
    """The depth at which the rule above gives this width."""
    return width / 32 if width < 256 else 4 * (width / 256 + 1)


def _shape(depth: int, width: int) -> dict[str, Any]:
    head_dim = 32 if width < 256 else 64 if width < 1024 else 128
    heads = width // head_dim
    return {
        "vocab_size": next(size for most, size in _VOCABULARY if width <= most),
        "context_length": next(length for most, length in _CONTEXT if width <= most),
        "n_layers": depth,
        "n_heads": heads,
        "n_kv_heads": heads // 2 if width >= 1024 else heads,
        "head_dim": head_dim,
        "d_model": width,
        "d_ff": 3 * width,
    }


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")
