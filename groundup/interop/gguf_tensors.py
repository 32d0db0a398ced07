"""A model's weights under llama.cpp's names and in its layouts, one at a time.

In: a model, and its llama.cpp architecture. Out: `GGUFTensor`s, each with a shape known beforehand and a function that
makes the values when they are needed, so that no more than one tensor exists twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from groundup.generation.quantize import Quantized
from groundup.interop.gguf_architecture import Architecture
from groundup.model import ModelConfig, Transformer
from groundup.model.attention import Attention
from groundup.model.experts import Experts
from groundup.model.feedforward import FeedForward
from groundup.model.positions import rotary_frequencies
from groundup.model.transformer import Block


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of the file.

    Attributes:
        name: llama.cpp's.
        shape: with the features of the input last.
        make: its values, float32.
        is_matrix: multiplied with, so that it may be kept in fewer bits; norms, biases, positions and routers are not.
        bits: of a quantized matrix; 0: it is none.
        make_packed: a quantized matrix's packed values and scales.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    is_matrix: bool = False
    bits: int = 0
    make_packed: Callable[[], tuple[Tensor, Tensor]] | None = None

    @property
    def n_values(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


def tensors_of(model: Transformer, architecture: Architecture) -> Iterator[GGUFTensor]:
    """All tensors of the file, in the order of the computation."""
    config = model.config
    needs_bias = architecture.name == "gpt2"
    n_rows = config.vocab_size  # rows that stand for no token stay here
    yield from _linear("token_embd", _Rows(model.embed_tokens, lambda rows: rows[:n_rows]), n_rows=n_rows)
    if model.embed_positions is not None:
        yield _piece("position_embd.weight", model.embed_positions.weight[: architecture.context_length])
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        yield _piece("rope_freqs.weight", _wavelength_factors(config))
    for layer, block in enumerate(model.layers):
        assert isinstance(block, Block)
        yield from _norm(f"blk.{layer}.attn_norm", block.input_layernorm, config.d_model, needs_bias)
        yield from _attention(f"blk.{layer}", block.self_attn, config, architecture)
        yield from _norm(f"blk.{layer}.ffn_norm", block.post_attention_layernorm, config.d_model, needs_bias)
        yield from _feedforward(f"blk.{layer}", block.mlp, needs_bias)
    assert model.norm is not None
    yield from _norm("output_norm", model.norm, config.d_model, needs_bias)
    if model.lm_head is not None:
        yield from _linear("output", _Rows(model.lm_head, lambda rows: rows[:n_rows]), n_rows=n_rows)


def interleaved(rows: Float[Tensor, "rows ..."], n_heads: int) -> Float[Tensor, "rows ..."]:
    """Rows of queries or keys in another order: of each head i, i + half becomes 2i, 2i + 1.

    Meta's Llama rotates neighbours, Hugging Face's (and ours) halves; llama.cpp's "llama" is Meta's. At position 0
    nothing is rotated, so a wrong order shows from the second token on only.
    """
    heads = rows.reshape(n_heads, 2, -1, *rows.shape[1:])  # (heads, 2, half, …)
    return heads.transpose(1, 2).reshape(rows.shape)


def _piece(name: str, values: Tensor) -> GGUFTensor:
    return GGUFTensor(name, tuple(values.shape), lambda: values)


def _norm(name: str, norm: nn.Module, width: int, needs_bias: bool) -> Iterator[GGUFTensor]:
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    yield _piece(f"{name}.weight", torch.ones(width) if weight is None else weight)
    if needs_bias:
        yield _piece(f"{name}.bias", torch.zeros(width) if bias is None else bias)


@dataclass(frozen=True)
class _Rows:
    """A linear layer (or one for each expert) as it shall stand in the file: its rows in an order, times a factor."""

    linear: nn.Module
    order: Callable[[Tensor], Tensor] = lambda rows: rows
    factor: float = 1.0

    def take(self, kind: str) -> Tensor:
        """Its weight, bias (zeros, if it has none), scales or packed values."""
        found = getattr(self.linear, kind)
        if found is None:
            return torch.zeros(_shape(self.linear)[:-1], device=next(self.linear.parameters()).device)
        rows = self.order(found)
        return rows if self.factor == 1 or kind == "packed" else rows * self.factor


def _linear(name: str, *parts: _Rows, needs_bias: bool = False, n_rows: int | None = None) -> Iterator[GGUFTensor]:
    """A matrix, of several one below the other, and its bias if there is one or must be."""
    first = parts[0].linear
    bits = first.bits if isinstance(first, Quantized) else 0
    shapes = [_shape(part.linear) for part in parts]
    rows = (*shapes[0][:-2], n_rows or sum(shape[-2] for shape in shapes))

    def joined(kind: str) -> Tensor:
        found = [part.take(kind) for part in parts]
        return found[0] if len(found) == 1 else torch.cat(found)

    packed = (lambda: (joined("packed"), joined("scales"))) if bits else None
    yield GGUFTensor(f"{name}.weight", (*rows, shapes[0][-1]), lambda: joined("weight"), True, bits, packed)
    if needs_bias or getattr(first, "bias", None) is not None:
        yield GGUFTensor(f"{name}.bias", rows, lambda: joined("bias"))


def _shape(linear: nn.Module) -> tuple[int, ...]:
    if isinstance(linear, Quantized):
        return (*linear.packed.shape[:-1], linear.packed.shape[-1] * 8 // linear.bits)
    assert isinstance(linear.weight, Tensor)
    return tuple(linear.weight.shape)


def _attention(
    name: str, attention: Attention, config: ModelConfig, architecture: Architecture
) -> Iterator[GGUFTensor]:
    # llama.cpp divides products by sqrt(head_dim). What our scale differs by goes into whatever makes queries last.
    factor = attention.scale * config.head_dim**0.5
    if math.isclose(factor, 1.0, rel_tol=1e-12):
        factor = 1.0

    def order(rows: Tensor, n_heads: int) -> Tensor:
        return interleaved(rows, n_heads) if architecture.name == "llama" else rows

    q = _Rows(attention.q_proj, lambda rows: order(rows, config.n_heads), 1.0 if config.qk_norm else factor)
    k = _Rows(attention.k_proj, lambda rows: order(rows, config.n_kv_heads))
    v = _Rows(attention.v_proj)
    if architecture.name == "gpt2":
        yield from _linear(f"{name}.attn_qkv", q, k, v, needs_bias=True)
    else:
        for letter, part in (("q", q), ("k", k), ("v", v)):
            yield from _linear(f"{name}.attn_{letter}", part, needs_bias=architecture.name == "qwen2")
    for letter, norm, scale in (("q", attention.q_norm, factor), ("k", attention.k_norm, 1.0)):
        if norm is not None:
            weight = torch.ones(config.head_dim) if norm.weight is None else norm.weight
            yield _piece(f"{name}.attn_{letter}_norm.weight", weight if scale == 1 else weight * scale)
    yield from _linear(f"{name}.attn_output", _Rows(attention.o_proj), needs_bias=architecture.name == "gpt2")


def _feedforward(name: str, layer: nn.Module, needs_bias: bool) -> Iterator[GGUFTensor]:
    assert isinstance(layer, FeedForward | Experts)
    ending = ""
    if isinstance(layer, Experts):
        yield _piece(f"{name}.ffn_gate_inp.weight", layer.router.weight)
        ending = "_exps"
    for part, linear in (("gate", layer.gate_proj), ("up", layer.up_proj), ("down", layer.down_proj)):
        if linear is not None:
            yield from _linear(f"{name}.ffn_{part}{ending}", _Rows(linear), needs_bias=needs_bias)


def _wavelength_factors(config: ModelConfig) -> Float[Tensor, " half"]:
    """What llama.cpp divides each pair's frequency by, for Llama 3.1's scaling."""
    plain, _ = rotary_frequencies(config.rotated, config.rope_theta)
    scaled, _ = rotary_frequencies(config.rotated, config.rope_theta, config.rope_scaling)
    return plain / scaled
