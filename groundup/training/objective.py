"""What training minimizes: terms with denominators of their own, and next-token cross-entropy.

An objective makes the model passes of one micro-batch and returns terms, each a sum over items (tokens, pairs, rows)
with a count of its own. The loop divides each sum by its count over micro-batches and processes together, so that
uneven masks weigh every item alike and every denominator is right whatever the layout: the loss of a step is Σ_terms
weight · (Σ total) / (Σ count).

Cross-entropy: the logits of (batch · seq) × vocab are the largest tensor of training; here they exist one slice of rows
at a time. The gradient with respect to logits is known in closed form, so it is taken in the forward pass, slice by
slice, and only the gradients of the hidden states and of the output matrix are kept (as in Liger Kernel,
arXiv:2410.10989, section 3.2). A slice is large, so that its products are efficient and the output matrix's gradient is
read and written seldom; on a CPU what is done to its logits one by one is done to pieces that stay in the cache
(benchmarks/training_speed.py).

With logits z of V tokens, target y, label smoothing ε (arXiv:1512.00567, section 7) and z-loss ζ (PaLM,
arXiv:2204.02311, section 5), what is minimized is

    (1 − ε) (lse(z) − z_y) + ε (lse(z) − mean(z)) + ζ lse(z)²
    gradient: softmax(z) (1 + 2 ζ lse(z)) − (1 − ε) onehot(y) − ε / V

where ε = ζ = 0 is plain cross-entropy. What is reported is always the plain one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from groundup.model import ModelConfig, OutputLayer
from groundup.model.cost import training_flops

Batch = dict[str, Tensor]
"""Named tensors, whose first dimension is the rows; `ids` (rows, seq) int64 is always there."""

IGNORED = -100
"""The target of a position that is not predicted."""

SLICE_BYTES = 96 << 20
"""Logits held at once, in the compute dtype."""
SLICE_ROWS = 64
"""Of which a slice is a multiple: what matrix units work on at once."""
PIECE_LOGITS = 1 << 18
"""Logits worked on at once on a CPU: 1 MiB in float32."""
PIECE_WEIGHTS = 1 << 21
"""Of the output matrix's gradient, what is added at once on a CPU: 4 MiB in bfloat16."""

MOSTLY_VALID = 0.75
"""From this share of valid targets on, logits are made of the others' positions too, instead of leaving them out."""
VALID_STEP = 128
"""Of which the positions that are kept are a multiple: oneDNN keeps a compiled product for each number that it met."""


class Term(NamedTuple):
    """One part of what is minimized, summed over the items of a micro-batch."""

    total: Float[Tensor, ""]  # what is minimized; has the gradient
    reported: Float[Tensor, ""]  # what logs show in its place, without gradient
    weight: float = 1.0  # in the sum of all terms; 0: only reported


class Objective(Protocol):
    """Which model passes are made, and what of them is minimized.

    The first term is the one by which loss spikes are found and the best model is chosen; its count is what a run's
    progress is told in.
    """

    def counts(self, batch: Batch) -> dict[str, float]:
        """What each term is divided by, of these rows, by the term's name; called on the host before the passes."""
        ...

    def terms(self, modules: Mapping[str, nn.Module], batch: Batch) -> dict[str, Term]:
        """The passes over one micro-batch, and the terms by the names that `counts` gives.

        Modules are called as a whole, never a part of one: the weights of sharded ones are there only then.
        """
        ...

    def flops(self, config: ModelConfig, lengths: Sequence[int]) -> float:
        """FLOPs of all its passes, forward and backward, over texts of these lengths; see `pass_flops`."""
        ...


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of the next token, in nats: the objective of pretraining and of supervised fine-tuning.

    A batch has `ids`, `targets` (the next token of each, or `IGNORED`) and, where rows hold several documents,
    `documents` (which one each token belongs to) and `positions` (its place there).
    """

    label_smoothing: float = 0.0  # ε above
    z_loss: float = 0.0  # ζ above

    def counts(self, batch: Batch) -> dict[str, float]:
        """How many targets are predicted."""
        return {"loss": int((batch["targets"] != IGNORED).sum())}

    def terms(self, modules: Mapping[str, nn.Module], batch: Batch) -> dict[str, Term]:
        """One forward pass; the loss of its routers is added to what is minimized."""
        model = modules["model"]
        head = head_loss(batch["targets"], label_smoothing=self.label_smoothing, z_loss=self.z_loss)
        loss = model(batch["ids"], positions=batch.get("positions"), documents=batch.get("documents"), head=head)
        balance = model.balance_loss()  # type: ignore[operator]
        return {"loss": Term(loss.objective if balance is None else loss.objective + balance, loss.nats)}

    def flops(self, config: ModelConfig, lengths: Sequence[int]) -> float:
        """One forward and one backward pass."""
        return pass_flops(config, lengths)


def pass_flops(config: ModelConfig, lengths: Sequence[int]) -> float:
    """FLOPs of one forward and one backward pass over texts of so many tokens, each of which sees itself alone."""
    return float(sum(_text_flops(config, length) for length in lengths))


def row_lengths(batch: Batch) -> Int[Tensor, "*texts"]:
    """Positions of each row, or of each text in it where a row is several: up to the last that something depends on."""
    if "ends" in batch:  # the last token of each text; −1: there is none
        return batch["ends"] + 1
    if "targets" not in batch:
        return torch.full(batch["ids"].shape[:-1], batch["ids"].shape[-1])
    targets = batch["targets"]
    return ((targets != IGNORED) * torch.arange(1, targets.shape[-1] + 1)).amax(-1)


def text_lengths(batch: Batch) -> list[int]:
    """Tokens of each text of a batch, one beside the other in a row or packed into it; padding is none."""
    if (documents := batch.get("documents")) is None:
        return [length for length in row_lengths(batch).flatten().tolist() if length]
    numbers = documents + torch.arange(len(documents))[:, None] * documents.shape[1]  # of documents, over all rows
    return [length for length in numbers[documents >= 0].bincount().tolist() if length]


def longest_first(batch: Batch) -> Int[Tensor, " rows"]:
    """The rows by their lengths, so that those of about one length come into one micro-batch."""
    return row_lengths(batch).view(len(batch["ids"]), -1).amax(1).argsort(stable=True, descending=True)


def weighted_sum(terms: Mapping[str, Term], factors: Mapping[str, Tensor | float]) -> Float[Tensor, ""]:
    """Σ total · factor · weight, over the terms that have a factor and a weight."""
    parts = [
        terms[name].total * (factor * terms[name].weight) for name, factor in factors.items() if terms[name].weight
    ]
    return functools.reduce(torch.add, parts)


def micro_batches(batch: Batch, n_rows: int) -> Iterator[Batch]:
    """A batch in pieces of at most so many rows."""
    for first in range(0, len(batch["ids"]), n_rows):
        yield {name: tensor[first : first + n_rows] for name, tensor in batch.items()}


@functools.lru_cache(maxsize=1024)
def _text_flops(config: ModelConfig, length: int) -> int:
    return training_flops(config, length)


class Loss(NamedTuple):
    """A loss over a batch's valid targets, in nats, float32."""

    objective: Float[Tensor, ""]  # what is minimized; has the gradient
    nats: Float[Tensor, ""]  # plain cross-entropy, Σ −log p(target); without a gradient


def cross_entropy_sum(
    hidden: Float[Tensor, "*batch d_model"],
    weight: Float[Tensor, "padded_vocab d_model"],
    targets: Int[Tensor, "*batch"],
    vocab_size: int | None = None,
    softcap: float | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Loss:
    """Sums over valid targets; see the head of this file.

    Args:
        hidden: last hidden states, in the compute dtype, in which the products are taken.
        weight: the output matrix, float32.
        targets: token ids, or `IGNORED`.
        vocab_size: rows of `weight` that stand for tokens (default: all).
        softcap: logits z become softcap · tanh(z / softcap).
        label_smoothing: ε.
        z_loss: ζ.
    """
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if rows.requires_grad and rows.device.type == "cpu":  # a GPU would have to be waited for to know how many they are
        is_valid = targets != IGNORED
        n = -(-int(is_valid.sum()) // VALID_STEP) * VALID_STEP
        if n < MOSTLY_VALID * len(targets):
            kept = (~is_valid).byte().argsort(stable=True)[:n]  # the valid ones first
            rows, targets = rows[kept], targets[kept]
    objective, nats = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        rows, weight, targets, vocab_size or weight.shape[0], softcap, label_smoothing, z_loss
    )
    return Loss(objective, nats)


def head_loss(
    targets: Int[Tensor, "batch seq"], *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> Callable[[Tensor, OutputLayer], Loss]:
    """`cross_entropy_sum` for these targets, in the form that `Transformer.forward(head=…)` takes."""

    def loss(hidden: Float[Tensor, "batch seq d_model"], output: OutputLayer) -> Loss:
        return cross_entropy_sum(
            hidden, output.weight, targets, output.vocab_size, output.softcap,
            label_smoothing=label_smoothing, z_loss=z_loss,
        )  # fmt: skip

    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor,
        vocab_size: int, softcap: float | None, smoothing: float, z_loss: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        cast = weight.to(hidden.dtype)
        wants_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        d_hidden = torch.empty_like(hidden)
        is_trained = ctx.needs_input_grad[1]
        d_weight = torch.empty(weight.shape if is_trained else 0, dtype=torch.float32, device=hidden.device)
        sums = torch.zeros(2, dtype=torch.float32, device=hidden.device)  # objective, nats
        n_slice = slice_rows(hidden.shape[0], cast.element_size() * cast.shape[0])
        n_piece = max(1, PIECE_LOGITS // cast.shape[0]) if hidden.device.type == "cpu" else n_slice
        n_columns = max(1, PIECE_WEIGHTS // cast.shape[1]) if hidden.device.type == "cpu" else cast.shape[0]
        held = hidden.new_empty(n_slice, cast.shape[0])
        for start in range(0, max(1, hidden.shape[0]), n_slice):  # of no rows, one slice: the gradient is zero
            rows = hidden[start : start + n_slice]
            parts = torch.split(targets[start : start + n_slice], n_piece)
            logits = held[: len(rows)]  # (rows, padded_vocab); become their own gradient
            torch.mm(rows, cast.T, out=logits)
            for piece, target in zip(torch.split(logits, n_piece), parts, strict=True):
                loss, gradient = _piece(piece, target, vocab_size, softcap, smoothing, z_loss, wants_gradient)
                sums += loss
                if gradient is not None:
                    piece.copy_(gradient)
            if wants_gradient:
                torch.mm(logits, cast, out=d_hidden[start : start + n_slice])
            if is_trained:
                pairs = zip(torch.split(logits, n_columns, dim=1), torch.split(d_weight, n_columns), strict=True)
                for columns, d_part in pairs:
                    product = columns.T @ rows
                    d_part.add_(product) if start else d_part.copy_(product)
        objective, nats = sums.unbind()
        if wants_gradient:
            ctx.save_for_backward(d_hidden, d_weight)
        ctx.mark_non_differentiable(nats)
        return objective, nats

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors  # in place: a copy of the output matrix's would be the step's largest
        d_weight = d_weight.mul_(outputs[0]) if ctx.needs_input_grad[1] else None
        return d_hidden.mul_(outputs[0]), d_weight, None, None, None, None, None


def slice_rows(n_rows: int, row_bytes: int) -> int:
    """Rows of a slice: as few slices as `SLICE_BYTES` allows, about equally large."""
    most = max(1, SLICE_BYTES // row_bytes)
    n_rows = max(1, n_rows)
    share = -(-n_rows // -(-n_rows // most))
    return min(most, n_rows, -(-share // SLICE_ROWS) * SLICE_ROWS)


def _piece(
    scores: Tensor, target: Tensor, vocab_size: int, softcap: float | None, smoothing: float, z_loss: float,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Sums over some rows of (objective, nats), and the objective's gradient by the rows' scores, float32."""
    logits = scores.to(torch.float32, copy=True)
    if softcap is not None:
        bend = torch.tanh_(logits.div_(softcap))
        logits = bend * softcap
    logits[:, vocab_size:] = float("-inf")
    valid = (target != IGNORED)[:, None]
    index = target[:, None].where(valid, 0)
    at_target, largest = logits.gather(1, index), logits.amax(dim=-1, keepdim=True)
    mean = logits[:, :vocab_size].mean(dim=-1, keepdim=True) if smoothing else None
    powers = logits.sub_(largest).exp_()
    total = powers.sum(dim=-1, keepdim=True)
    log_normalizer = total.log().add_(largest)
    nats = loss = log_normalizer - at_target
    if mean is not None:
        loss = (1 - smoothing) * loss + smoothing * (log_normalizer - mean)
    if z_loss:
        loss = loss + z_loss * log_normalizer.square()
    sums = torch.stack([(loss * valid).sum(), (nats * valid).sum()])
    if not wants_gradient:
        return sums, None
    counts = valid.to(torch.float32)
    gradient = powers.mul_(counts / total * (1 + 2 * z_loss * log_normalizer) if z_loss else counts / total)
    gradient.scatter_add_(1, index, counts * (smoothing - 1))
    if smoothing:
        gradient[:, :vocab_size] -= counts * (smoothing / vocab_size)
    if softcap is not None:
        gradient.mul_(bend.square_().neg_().add_(1))
    return sums, gradient
