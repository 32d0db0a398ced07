"""Rows that hold several documents: which are computed together, so that no scores between documents exist.

Documents of about one length are padded to one width, behind their ends, where causal attention never looks. Widths are
few and numbers of documents powers of two: oneDNN makes, and keeps, a program for each shape that it meets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from groundup.model.masks import AttentionRule, attention_bias

WIDTHS = (16, 32, 64)
"""To which documents are padded, or to a multiple of the last."""


@dataclass(frozen=True)
class DocumentPlan:
    """Where the tokens of some rows, (batch, seq, heads), stand in batches of texts of one width.

    A text is one head of a document. Slots are numbered (documents, heads, width), one batch behind the other.
    """

    batches: list[tuple[int, int, Float[Tensor, "width width"]]]  # texts, their width, and the bias of their scores
    token: Int[Tensor, " slots"]  # whose slot it is; anyone's, where it is empty
    slot: Int[Tensor, " tokens"]  # of each token
    empty: Int[Tensor, " padding"]  # slots behind the ends of documents

    def to_slots(self, x: Float[Tensor, "tokens head_dim"]) -> Float[Tensor, "slots head_dim"]:
        """Tokens in their slots, and zeros in empty ones."""
        return x.index_select(0, self.token).index_fill_(0, self.empty, 0)

    def texts(self, *parts: Float[Tensor, "slots head_dim"]) -> Iterator[tuple[Any, ...]]:
        """Of each batch its texts in each part, (texts, width, head_dim), and the bias, (width, width)."""
        sizes = [n * width for n, width, _ in self.batches]
        for (n, width, bias), *own in zip(self.batches, *(torch.split(part, sizes) for part in parts), strict=True):
            yield *(part.view(n, width, -1) for part in own), bias


def plan_documents(
    documents: Int[Tensor, "batch seq"], rule: AttentionRule, heads: int, dtype: torch.dtype
) -> DocumentPlan:
    """The plan of a rule's layers.

    Args:
        documents: which document of its row each token belongs to; each stands in one piece.
        rule: of the layers, without ALiBi; patterns count from a document's first token.
        heads: of the queries.
        dtype: of the arithmetic.
    """
    first = documents.diff(dim=1, prepend=documents[:, :1] - 1).flatten().nonzero().flatten()
    length = first.diff(append=first.new_tensor([documents.numel()]))
    choice = [*WIDTHS, *range(2 * WIDTHS[-1], documents.shape[1] + WIDTHS[-1], WIDTHS[-1])]
    which = torch.bucketize(length, length.new_tensor(choice))
    where = torch.arange(choice[int(which.max())], device=documents.device)
    head, bias = torch.arange(heads, device=documents.device)[:, None], attention_bias(rule, where, where, dtype)[0]
    batches, tokens, filled = [], [], []
    for number in sorted(set(which.tolist())):
        own, width = (which == number).nonzero(), choice[number]
        for some in own[..., None].split([1 << bit for bit in range(32) if len(own) >> bit & 1]):
            token = (first[some] + where[:width]) * heads + head  # (documents, heads, width)
            tokens.append(token.flatten())
            filled.append((where[:width] < length[some]).expand_as(token).flatten())
            batches.append((len(some) * heads, width, bias[:width, :width]))
    is_filled = torch.cat(filled)
    token = torch.cat(tokens).where(is_filled, 0)
    slots = is_filled.nonzero().flatten()
    slot = slots.new_empty(documents.numel() * heads).index_copy_(0, token[slots], slots)
    return DocumentPlan(batches, token, slot, (~is_filled).nonzero().flatten())
