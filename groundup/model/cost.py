"""What a model costs, counted from its configuration alone: parameters, FLOPs, bytes. All integers are exact.

Everything stands on one table, `parameter_shapes`. FLOPs are those of matrix products, two for each multiply-add, as
in torch's counter and in every published figure: products with weights, and attention's two products for each pair of
positions that see each other. Backward takes twice as many as forward (arXiv:2204.02311, appendix B, but with the
pairs counted one by one: s · (s + 1) / 2 for causal attention over s positions, fewer for windows and sparse patterns).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from groundup.model.config import ModelConfig

Shape = tuple[int, ...]
OptimizerName = Literal["muon", "adamw", "lion", "adafactor"]


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every parameter of the model by name, in the order of `named_parameters`."""
    d, ff, q, kv = config.d_model, config.d_ff, *_attention_widths(config)
    norm: dict[str, Shape] = {}
    if config.norm_weight:
        norm["weight"] = (d,)
    if config.norm == "layernorm" and config.has_bias("norm"):
        norm["bias"] = (d,)

    def linear(name: str, rows: int, columns: int, has_bias: bool, *stack: int) -> dict[str, Shape]:
        return {f"{name}.weight": (*stack, rows, columns)} | ({f"{name}.bias": (*stack, rows)} if has_bias else {})

    attention = {
        **linear("q_proj", q, d, config.has_bias("qkv")),
        **linear("k_proj", kv, d, config.has_bias("qkv")),
        **linear("v_proj", kv, d, config.has_bias("qkv")),
        **linear("o_proj", d, q, config.has_bias("o")),
    }
    if config.qk_norm and config.norm_weight:
        attention |= {"q_norm.weight": (config.head_dim,), "k_norm.weight": (config.head_dim,)}
    stack = (config.n_experts,) if config.n_experts else ()
    feedforward = linear("router", config.n_experts, d, False) if config.n_experts else {}
    if config.is_gated:
        feedforward |= linear("gate_proj", ff, d, config.has_bias("ff"), *stack)
    feedforward |= linear("up_proj", ff, d, config.has_bias("ff"), *stack)
    feedforward |= linear("down_proj", d, ff, config.has_bias("ff"), *stack)

    shapes: dict[str, Shape] = {"embed_tokens.weight": (config.padded_vocab_size, d)}
    if config.position == "learned":
        shapes["embed_positions.weight"] = (config.context_length, d)
    parts = {
        "input_layernorm": norm,
        "self_attn": attention,
        "post_attention_layernorm": norm,
        "mlp": feedforward,
    }
    for layer in range(config.n_layers):
        for part, inner in parts.items():
            shapes |= {f"layers.{layer}.{part}.{name}": shape for name, shape in inner.items()}
    if config.norm_placement == "pre":
        shapes |= {f"norm.{name}": shape for name, shape in norm.items()}
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.padded_vocab_size, d)
    return shapes


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters; a tied embedding counts once, rows that stand for no token not at all."""
    n_matrices = 1 if config.tied_embeddings else 2
    idle = (config.padded_vocab_size - config.vocab_size) * config.d_model * n_matrices
    return weight_bytes(config, 1) - idle


def vocabulary_parameters(config: ModelConfig) -> int:
    """Those of them in embeddings and output layer; the rest is what scaling laws call non-embedding parameters."""
    positions = config.context_length * config.d_model if config.position == "learned" else 0
    return config.vocab_size * config.d_model * (1 if config.tied_embeddings else 2) + positions


def active_parameters(config: ModelConfig) -> int:
    """Parameters that compute one token: all, but of the experts only the chosen ones."""
    if not config.n_experts:
        return count_parameters(config)
    idle = config.n_experts - config.experts_per_token
    return count_parameters(config) - config.n_layers * idle * _feedforward_parameters(config)


def matmul_parameters(config: ModelConfig) -> int:
    """Parameters that take part in a matrix product for every token (the output layer included)."""
    q, kv = _attention_widths(config)
    feedforward = (3 if config.is_gated else 2) * config.d_model * config.d_ff
    if config.n_experts:
        feedforward = config.experts_per_token * feedforward + config.n_experts * config.d_model
    block = config.d_model * (q + 2 * kv) + q * config.d_model + feedforward
    return config.n_layers * block + config.padded_vocab_size * config.d_model


def visible_pairs(config: ModelConfig, layer: int, length: int) -> int:
    """Pairs of a query and a key that it sees, in a row of `length` positions."""
    pattern, stride = config.pattern(layer), config.stride or 0
    causal = length * (length + 1) // 2
    if pattern == "window":
        window, sinks = min(config.window or 0, length), config.sink_tokens
        near = window * (window + 1) // 2 + (length - window) * window
        # Query i sees, beyond its window, as many of the sinks as lie before position i − window + 1.
        first, last = 1, length - window
        rising = min(sinks, last)
        return near + (first + rising) * rising // 2 + max(0, last - sinks) * sinks if last > 0 else near
    if pattern == "strided":
        near, far = min(stride, length), length - stride
        pairs = near * (near + 1) // 2 + max(0, far) * stride
        # and every stride-th key behind those: query i has i // stride of them.
        return pairs + sum(length - n for n in range(stride, length, stride))
    if pattern == "fixed":
        blocks, rest = divmod(length, stride)
        inside = blocks * (stride * (stride + 1) // 2) + rest * (rest + 1) // 2
        earlier = config.summary * (stride * blocks * (blocks - 1) // 2 + rest * blocks)
        return inside + earlier
    return causal


def forward_flops(config: ModelConfig, length: int, *, whole_square: bool = False) -> int:
    """FLOPs of the forward pass over one row, logits of every position included.

    Args:
        config: the model.
        length: positions in the row.
        whole_square: count attention's products for all pairs, seen or not, as kernels that take a mask compute
            them (and torch's counter counts them).
    """
    pairs = sum(
        length * length if whole_square else visible_pairs(config, layer, length) for layer in range(config.n_layers)
    )
    return 2 * matmul_parameters(config) * length + 4 * config.n_heads * config.head_dim * pairs


def training_flops(config: ModelConfig, length: int, *, whole_square: bool = False) -> int:
    """FLOPs of forward and backward over one row."""
    return 3 * forward_flops(config, length, whole_square=whole_square)


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs of forward and backward for one token in a row of `sequence_length`."""
    return training_flops(config, sequence_length) / sequence_length


def decoding_flops(config: ModelConfig, cached: int) -> int:
    """FLOPs to compute one more token behind `cached` ones, with a cache that holds them all."""
    attention = 4 * config.n_heads * config.head_dim * (cached + 1) * config.n_layers
    return 2 * matmul_parameters(config) + attention


def weight_bytes(config: ModelConfig, bytes_per_value: int = 4) -> int:
    """Bytes of the weights in memory, rows that fill up the vocabulary included; 4 a value while training."""
    return bytes_per_value * sum(math.prod(shape) for shape in parameter_shapes(config).values())


def optimizer_bytes(config: ModelConfig, optimizer: OptimizerName = "muon") -> int:
    """Bytes of the optimizers' state; with Muon, AdamW has what is no matrix of a block."""
    total = 0
    for name, shape in parameter_shapes(config).items():
        is_matrix = name.startswith("layers.") and len(shape) >= 2 and not name.endswith("bias")
        total += state_bytes("adamw" if optimizer == "muon" and not is_matrix else optimizer, shape)
    return total


def state_bytes(optimizer: OptimizerName, shape: Sequence[int]) -> int:
    """Of one tensor, float32: AdamW keeps two moments and a step, Muon and Lion one momentum.

    Adafactor keeps a mean of squares for every row and every column, and a step.
    """
    n = math.prod(shape)
    if optimizer in ("muon", "lion"):
        return 4 * n
    if optimizer == "adafactor":
        return 4 + 4 * (n // shape[-1] + n // shape[-2] if len(shape) >= 2 else n)
    return 8 * n + 4


def kv_cache_bytes(config: ModelConfig, length: int, batch: int = 1, bytes_per_value: int = 2) -> int:
    """Bytes of the key/value cache of `batch` rows of `length` tokens (default: in bfloat16)."""
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * length * batch * bytes_per_value


def _attention_widths(config: ModelConfig) -> tuple[int, int]:
    """Width of all queries, and of all keys."""
    return config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim


def _feedforward_parameters(config: ModelConfig) -> int:
    """Of one feed-forward layer (one expert), biases included."""
    n_in = 2 if config.is_gated else 1
    biases = (n_in * config.d_ff + config.d_model) * config.has_bias("ff")
    return (n_in + 1) * config.d_model * config.d_ff + biases
