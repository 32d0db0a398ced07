"""More tokens for a trained model: new rows of the embedding and of the output layer, each the mean of the old ones.

A row drawn at random can have a logit far above all others at once, and its gradients shake the rest; with the mean,
the model's distribution over the old tokens stays as it was but for the factor that makes room for the new ones, and
the divergence from the old distribution is bounded (Hewitt, "Initializing new word embeddings for pretrained language
models", 2021).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from groundup.errors import GroundupError
from groundup.model.transformer import Transformer


@torch.no_grad()
def extend_vocabulary(model: Transformer, vocab_size: int) -> None:
    """Give a model more tokens, in place; ids and rows of the old ones stay.

    Args:
        model: whole, on one device.
        vocab_size: tokens from now on.

    Raises:
        GroundupError: fewer than there are.
    """
    before = model.config.vocab_size
    if vocab_size < before:
        raise GroundupError(
            f"vocab_size = {vocab_size}: the model has {before} tokens already.", "Rows are added, never taken away."
        )
    config = dataclasses.replace(model.config, vocab_size=vocab_size)
    model.embed_tokens.weight = _extended(model.embed_tokens.weight, before, vocab_size, config.padded_vocab_size)
    model.embed_tokens.num_embeddings = config.padded_vocab_size
    if model.lm_head is not None:
        model.lm_head.weight = _extended(model.lm_head.weight, before, vocab_size, config.padded_vocab_size)
        model.lm_head.out_features = config.padded_vocab_size
    model.config = config


def _extended(weight: Tensor, before: int, after: int, n_rows: int) -> nn.Parameter:
    rows = weight.new_zeros(n_rows, weight.shape[1])  # rows that stand for no token are zeros
    rows[:before] = weight[:before]
    rows[before:after] = weight[:before].double().mean(dim=0).to(weight.dtype)
    return nn.Parameter(rows, requires_grad=weight.requires_grad)
