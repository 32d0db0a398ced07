"""Prompts to tokens: one pass over the prompts, then one token a step for the whole batch.

A row that is finished leaves the batch. What a row writes depends on its own prompt and seed alone. At the
context's end a row stops, or slides: its last half is read again and writing goes on from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from groundup.errors import DataError
from groundup.generation.cache import KVCache
from groundup.generation.params import SamplingParams
from groundup.generation.sampling import request_seed, sample
from groundup.model import OutputLayer, Transformer

FinishReason = Literal["stop", "length"]
OnToken = Callable[[int, int], bool]
"""Called with (row, token) for every token that is written; True stops that row."""


@dataclass
class Generation:
    """What was written for one prompt.

    Attributes:
        ids: new tokens; a stop token is left out, the tokens of a stop text are not.
        finish_reason: "stop": a stop token or text; "length": max_tokens or the context's end.
        text: filled in where a tokenizer is at hand; ends before the stop text.
    """

    ids: list[int]
    finish_reason: FinishReason
    text: str = ""

    @property
    def n_tokens(self) -> int:
        """Number of new tokens."""
        return len(self.ids)


def generate_ids(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    stop_ids: Collection[int] = (),
    on_token: OnToken | None = None,
    *,
    seeds: Sequence[int | None] | None = None,
    slides: bool = False,
    never: Collection[int] = (),
) -> list[Generation]:
    """Continue each prompt.

    Args:
        model: put into evaluation mode.
        prompts: token ids, at least one each; of any lengths. One of `context_length` or more is cut on the left,
            so that `max_tokens` more have room, or at least half the context remains.
        params: how tokens are drawn; stop texts are handled by `text.py`, which knows the tokenizer.
        stop_ids: tokens that end a row and are not written.
        on_token: called with every token; may stop a row.
        seeds: one for each row (default: `params.seed` for every row).
        slides: go on past the context's end instead of finishing with "length".
        never: ids that are not drawn, such as those of the model that stand for no token.

    Raises:
        DataError: an empty prompt, or an id the model does not have.
        GroundupError: the model's logits are not numbers.
    """
    results: list[Generation] = []
    steps = decode(model, prompts, params, stop_ids, on_token, seeds=seeds, slides=slides, never=never)
    for results in steps:  # noqa: B007
        pass
    return results


@torch.inference_mode()
def decode(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    stop_ids: Collection[int] = (),
    on_token: OnToken | None = None,
    *,
    seeds: Sequence[int | None] | None = None,
    slides: bool = False,
    never: Collection[int] = (),
) -> Iterator[list[Generation]]:
    """As `generate_ids`, but yields the texts so far after every step; generation stops when iteration does."""
    if not prompts:
        return
    model.eval()
    context = model.config.context_length
    seen = [_fit(prompt, model.config.vocab_size, context, params.max_tokens) for prompt in prompts]
    results = [Generation([], "length") for _ in seen]
    own_seeds = [request_seed(seed) for seed in (seeds if seeds is not None else [params.seed] * len(seen))]
    cache = _new_cache(model, len(seen), min(context, max(map(len, seen)) + params.max_tokens))
    logits = _read(model, seen, cache)
    masked = torch.tensor(sorted(never), dtype=torch.int64, device=logits.device)
    alive = list(range(len(seen)))  # which prompt each row of the batch belongs to
    positions = [len(prompt) for prompt in seen]  # where each row's next token stands
    for n_written in range(1, params.max_tokens + 1):
        if never:
            logits = logits.index_fill(-1, masked, -math.inf)
        drawn = sample(logits, params, [own_seeds[number] for number in alive], [n_written - 1] * len(alive))
        tokens = drawn.tolist()
        keep = []
        for row, (number, token) in enumerate(zip(alive, tokens, strict=True)):
            result = results[number]
            if token in stop_ids:
                result.finish_reason = "stop"
                continue
            result.ids.append(token)
            seen[number].append(token)
            if on_token is not None and on_token(number, token):
                result.finish_reason = "stop"
            elif slides or positions[row] < context:
                keep.append(row)
        yield results
        if not keep or n_written == params.max_tokens:
            return
        if len(keep) < len(alive):
            cache.keep(torch.tensor(keep, device=logits.device))
            alive, positions = [alive[row] for row in keep], [positions[row] for row in keep]
        _slide_back(model, [seen[number] for number in alive], positions, cache)
        logits = _step(model, [seen[number][-1] for number in alive], positions, cache)
        positions = [position + 1 for position in positions]


def _read(model: Transformer, prompts: Sequence[Sequence[int]], cache: KVCache) -> Float[Tensor, "batch vocab"]:
    """Put whole prompts into an empty cache; the logits behind each one's last token."""
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    # Padding stands behind a prompt: no token attends to it, and tokens written later replace it.
    padded = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
    rows = torch.arange(len(prompts), device=device)
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)

    def logits_of_last(hidden: Float[Tensor, "batch seq d_model"], output: OutputLayer) -> Tensor:
        return output.logits(hidden[rows, last])

    return model(padded, cache=cache, head=logits_of_last)


def _step(
    model: Transformer, tokens: Sequence[int], positions: Sequence[int], cache: KVCache
) -> Float[Tensor, "batch vocab"]:
    """Add one token to each row; the logits behind it."""
    device = next(model.parameters()).device
    ids, where = torch.tensor([tokens, positions], device=device)
    return model(ids[:, None], positions=where[:, None], cache=cache)[:, -1]


def _slide_back(model: Transformer, seen: Sequence[list[int]], positions: list[int], cache: KVCache) -> None:
    """Rows whose newest token has no place left: read the half before it again, and place it behind that."""
    context = model.config.context_length
    half = context // 2
    full = [row for row, position in enumerate(positions) if position == context]
    if not full:
        return
    if half:
        again = _new_cache(model, len(full), half)
        _read(model, [seen[row][-half - 1 : -1] for row in full], again)
        cache.overwrite(torch.tensor(full, device=next(model.parameters()).device), again)
    for row in full:
        positions[row] = half


def _new_cache(model: Transformer, batch: int, length: int) -> KVCache:
    return KVCache(model.config, batch, length, model.compute_dtype, next(model.parameters()).device)


def _fit(prompt: Sequence[int], vocab_size: int, context: int, max_tokens: int) -> list[int]:
    """A prompt that the model can read: ids it knows, cut on the left where no room is left to write."""
    ids = list(prompt)
    if not ids:
        raise DataError("a prompt has no tokens.", "Begin with <|endoftext|>: an empty text starts a new document.")
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise DataError(
            f"a prompt has the token id {min(ids) if min(ids) < 0 else max(ids)}: the model has ids 0 to "
            f"{vocab_size - 1}.",
            "Use the tokenizer that the model was trained with.",
        )
    return ids if len(ids) < context else ids[-(context - min(max_tokens, context // 2)) :]
