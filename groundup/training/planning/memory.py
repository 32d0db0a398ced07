"""Bytes that training needs on one device, part by part, before anything is allocated.

In: a model's configuration, settings, rows and tokens of a micro-batch. Out: what is alive at the fullest moment of a
step. Weights, gradients and optimizer state are counted from shapes, activations tensor by tensor
(`model/activations.py`); what else is alive depends on the moment, of which there are six, see `_moments`. A test
compares them with torch's own record of every allocation. On a CPU the C library's heap comes on top: it keeps freed
pieces that nothing fits into again (`process.py`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from groundup.model import ModelConfig
from groundup.model.activations import (
    Arithmetic,
    Checkpointing,
    Device,
    activation_bytes,
    attention_squares,
    block_bytes,
    last_norm_bytes,
    score_block_bytes,
    score_bytes,
)
from groundup.model.cost import parameter_shapes
from groundup.recipe import OptimizerSettings
from groundup.training.groups import Grouping, group_parameters
from groundup.training.muon import BATCH_BYTES
from groundup.training.objective import PIECE_LOGITS, PIECE_WEIGHTS, slice_rows


@dataclass(frozen=True)
class Step:
    """What one device does between two updates.

    Attributes:
        rows: of the batch, on this device.
        micro: rows in one forward pass.
        length: tokens in a row.
        dtype: of the arithmetic.
        device: whose kernels.
        n_devices: over which weights, gradients and optimizer state are spread.
    """

    rows: int
    micro: int
    length: int
    dtype: Arithmetic
    device: Device = "cpu"
    n_devices: int = 1


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the fullest moment of a step.

    Attributes:
        weights: float32, and what is gathered of them for a moment where they are spread.
        gradients: those that are there at this moment.
        optimizer: its state.
        average: of the weights, if one is kept.
        activations: what the forward pass keeps for the backward pass, and the gradients of it at this moment.
        logits: the slice of them that is there, with its gradient.
        other: what an update needs for a moment.
        moment: which one it is.
        all_gradients: of all parameters; where `gradients` is less, they come when activations have gone.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    logits: int
    other: int
    moment: str
    all_gradients: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """The bytes by name."""
        return {
            "weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer,
            "averaged weights": self.average, "activations": self.activations, "logits slice": self.logits,
            "other": self.other,
        }  # fmt: skip


def step_memory(config: ModelConfig, settings: OptimizerSettings, step: Step, stage: str = "pretrain") -> Memory:
    """What training holds at the fullest moment of a step, validation included.

    Args:
        config: the model.
        settings: optimizer, frozen groups, average, checkpointing.
        step: what one device does.
        stage: named in messages.

    Raises:
        RecipeError: a group's pattern matches no parameter.
    """
    shapes = parameter_shapes(config)
    grouping = group_parameters(shapes, settings, stage)
    sizes = {name: 4 * math.prod(shape) for name, shape in shapes.items()}
    weights = sum(sizes.values())
    gradients = weights - sum(sizes[name] for name in grouping.frozen)
    spread = step.n_devices
    gathered = _gathered(config, sizes) if spread > 1 else 0
    moments = _moments(config, settings, step, gradients // spread, sizes, grouping)
    moment, (held, activations, logits, other) = max(moments.items(), key=lambda item: sum(item[1]))
    return Memory(
        weights=weights // spread + gathered,
        gradients=held,
        optimizer=_optimizer_state(shapes, grouping) // spread,
        average=weights // spread if settings.ema else 0,
        activations=activations,
        logits=logits,
        other=other,
        moment=moment,
        all_gradients=gradients // spread,
    )


def _moments(
    config: ModelConfig, settings: OptimizerSettings, step: Step, gradients: int, sizes: Mapping[str, int],
    grouping: Grouping,
) -> dict[str, tuple[int, int, int, int]]:  # fmt: skip
    """(gradients, activations, logits, other) alive at each moment that can be the fullest.

    The forward pass fills up activations; the backward pass takes them down block by block while gradients come, so
    that its fullest moment is in the last block or at its end. Within a block it is where the feed-forward layer's
    gradients are (of both factors of its product), where the softmax's are if it is held, or where a norm's are.
    """
    kind = settings.activation_checkpointing
    rows, length, dtype, device = step.micro, step.length, step.dtype, step.device
    size = 4 if dtype == "float32" else 2
    n_tokens = rows * length
    stream = n_tokens * config.d_model * size  # one value for each feature of the residual stream
    matrix = sizes["embed_tokens.weight"]
    kept = sum(activation_bytes(config, rows, length, dtype, kind, device).values())
    again, block = _computed_again(config, rows, length, dtype, kind, device)
    # In the last block, what came behind it is gone: the last norm's and the hidden states' gradient.
    in_block = kept - last_norm_bytes(config, n_tokens, dtype, device) - stream + again
    squares = attention_squares(config, config.n_layers - 1, rows, length, dtype, device)
    norm = 4 * n_tokens * config.d_model * 4 if config.norm == "rmsnorm" and device == "cpu" else 2 * stream
    # With several micro-batches the gradients of those before are there all the time, and each new one for a moment.
    earlier = gradients + max(sizes.values()) if step.micro < step.rows else 0
    inner = config.d_model * config.d_ff * 4 * max(1, config.n_experts)  # of a feed-forward layer's matrix
    moments = {
        "end of the forward pass": (earlier, kept + stream, _logits(config, n_tokens, dtype, device), 0),
        "backward pass, last norm": (earlier, kept + norm - stream, 0, 0),
        "backward pass, feed-forward": (
            earlier or inner,
            in_block + stream + _inner_gradients(config, n_tokens, size),
            0,
            0,
        ),
        "end of the backward pass": (gradients + matrix, 2 * n_tokens * config.d_model * 4, 0, 0),
        "update": (gradients, 0, 0, _update(config, grouping, dtype, device)),
    }
    scores = 2 * squares or 3 * score_block_bytes(config, config.n_layers - 1, rows, length, dtype, device)
    if scores:
        gone = block["feedforward"] + block["norms"] // 4
        moments["backward pass, attention"] = (earlier or 3 * inner, in_block - gone + scores + 2 * stream, 0, 0)
    return moments


def _computed_again(
    config: ModelConfig, rows: int, length: int, dtype: Arithmetic, kind: Checkpointing, device: Device
) -> tuple[int, dict[str, int]]:
    """Bytes that checkpointing computes again in the last block's backward pass, and what a block keeps without it."""
    layer = config.n_layers - 1
    whole = block_bytes(config, layer, rows, length, dtype, "none", device)
    if kind != "selective":
        return (sum(whole.values()) if kind == "full" else 0), whole
    size = 4 if dtype == "float32" else 2
    n_tokens, ways = (
        rows * length,
        (2 if config.is_gated else 1) * max(1, config.experts_per_token * bool(config.n_experts)),
    )
    # Of what a block keeps, these are results of products, which are there already.
    there = ways * config.d_ff + config.d_model
    if config.qk_norm and (size == 4 or device == "cuda"):
        there += (config.n_heads + config.n_kv_heads) * config.head_dim
    scores = score_bytes(config, layer, rows, length, dtype, device)
    if not scores:
        there += (config.n_heads + config.n_kv_heads) * config.head_dim  # result and values
    return sum(whole.values()) - n_tokens * there * size - scores, whole  # scores make place for the softmax


def _inner_gradients(config: ModelConfig, n_tokens: int, size: int) -> int:
    """Gradients inside a feed-forward layer beside what it keeps: of both factors where it has a gate."""
    rows = n_tokens * config.experts_per_token / config.n_experts if config.n_experts else n_tokens
    streams = n_tokens * config.d_model * size if config.n_experts else 0
    return round(rows * config.d_ff * size * (2 if config.is_gated else 1)) + streams


def _logits(config: ModelConfig, n_tokens: int, dtype: Arithmetic, device: Device) -> int:
    """What the loss needs beside what it keeps (`objective.py`): a slice of logits, a piece, the output matrix."""
    size, vocabulary, d = 4 if dtype == "float32" else 2, config.padded_vocab_size, config.d_model
    rows = slice_rows(n_tokens, size * vocabulary)
    on_cpu = device == "cpu"
    piece = 4 * vocabulary * min(rows, max(1, PIECE_LOGITS // vocabulary) if on_cpu else rows)
    if config.logit_softcap is not None:
        piece *= 2  # what it was before it was bent
    # A piece of the output matrix's gradient; that of a second slice, in two-byte arithmetic, in float32 to be added.
    widened = 4 * (size == 2 and rows < n_tokens)
    gradient = d * min(vocabulary, max(1, PIECE_WEIGHTS // d) if on_cpu else vocabulary) * (size + widened)
    return rows * vocabulary * size + max(piece, gradient) + _cast(vocabulary * d, size)


def _optimizer_state(shapes: Mapping[str, tuple[int, ...]], grouping: Grouping) -> int:
    """Float32: AdamW two moments and a step, Muon and Lion one momentum, Adafactor means of rows and of columns."""
    total = 0
    for group in grouping.groups:
        for shape in (shapes[name] for name in group.names):
            n = math.prod(shape)
            if group.optimizer in ("muon", "lion"):
                total += 4 * n
            elif group.optimizer == "adafactor":
                total += 4 + 4 * (n // shape[-1] + n // shape[-2] if len(shape) >= 2 else n)
            else:
                total += 8 * n + 4
    return total


def _update(config: ModelConfig, grouping: Grouping, dtype: Arithmetic, device: Device) -> int:
    """What an update needs for a moment: fused AdamW nothing, Muon copies of a few matrices, the others of one."""
    shapes = parameter_shapes(config)
    size = 4 if dtype == "float32" else 2
    most = 0
    for group in grouping.groups:
        counts = Counter(shapes[name] for name in group.names)
        if group.optimizer == "muon":
            for shape, count in counts.items():
                n = math.prod(shape)
                together = n * min(count, max(1, BATCH_BYTES[device] // (n * size)))
                most = max(most, together * (14 + size))
        elif group.optimizer != "adamw":
            most = max(most, *(2 * 4 * math.prod(shape) for shape in counts))
    return most


def _cast(n_weights: int, size: int) -> int:
    return n_weights * 2 if size == 2 else 0


def _gathered(config: ModelConfig, sizes: Mapping[str, int]) -> int:
    """Where weights are spread: two whole blocks (one computes, one comes), and all that is in no block."""
    outside = sum(size for name, size in sizes.items() if not name.startswith("layers."))
    return outside + 2 * (sum(sizes.values()) - outside) // config.n_layers
