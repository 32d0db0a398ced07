"""Beam search: the texts that are most probable as a whole, as far as a few candidates a step can find them.

Of all continuations of the k best unfinished texts by one token, the 2k most probable are looked at: those that end
are finished, the best k others go on. Finished texts are compared by their sum of log-probabilities over their length
to the power `length_penalty` (arXiv:1609.08144, section 7, in the plain form that transformers has). The search is
over when k texts are finished and no unfinished one, at its present length, is better than the worst of them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from groundup.errors import GroundupError
from groundup.generation.cache import KVCache
from groundup.generation.request import Generation
from groundup.generation.step import ModelStep, Row, inference_copy
from groundup.model import Transformer
from groundup.tokenizer import Tokenizer


@torch.inference_mode()
def beam_search(
    model: Transformer,
    tokenizer: Tokenizer | None,
    prompt: Sequence[int],
    *,
    n_beams: int = 4,
    max_tokens: int = 128,
    length_penalty: float = 1.0,
    stop_ids: Collection[int] | None = None,
) -> list[Generation]:
    """The `n_beams` best continuations that were found, best first, each with its `score`.

    Args:
        model: put into evaluation mode.
        tokenizer: of the model; None: results have no text.
        prompt: token ids.
        n_beams: k.
        max_tokens: of a continuation.
        length_penalty: above 0 favours long texts, below 0 short ones; 0: sums are compared as they are.
        stop_ids: tokens that end a text and are not in its ids (default: the tokenizer's). They count in its length.

    Raises:
        GroundupError: values out of range, no room for the prompt, or logits that are not numbers.
    """
    context, vocab = model.config.context_length, model.config.vocab_size
    if n_beams < 1 or max_tokens < 1:
        raise GroundupError(f"n_beams = {n_beams}, max_tokens = {max_tokens}: both must be at least 1.")
    if not 0 < len(prompt) <= context:
        raise GroundupError(f"a prompt has {len(prompt)} tokens: there is room for 1 to {context}.")
    ends = set(stop_ids if stop_ids is not None else () if tokenizer is None else tokenizer.end_ids)
    unused = list(() if tokenizer is None else tokenizer.unused_ids(vocab))
    model = inference_copy(model)
    device = next(model.parameters()).device
    cache = KVCache(model.config, 2 * n_beams, context, model.compute_dtype, device)
    step = ModelStep(model, cache)
    beams: list[tuple[float, list[int], int]] = [(0.0, [], 0)]  # sum of log-probabilities, new tokens, slot
    finished: list[Generation] = []
    logits = step([Row(0, prompt, 0)])
    for length in range(1, max_tokens + 1):
        logits[:, unused] = -torch.inf
        sums = logits.log_softmax(dim=-1).double() + torch.tensor([beam[0] for beam in beams], device=device)[:, None]
        if not sums.max().isfinite():  # a NaN counts as the largest
            raise GroundupError("the model gave logits that are not numbers: its weights are damaged, or diverged.")
        best = sums.flatten().topk(min(2 * n_beams, sums.numel()))
        parents = beams
        beams = []
        used = {slot for _, _, slot in parents}
        free = [slot for slot in range(2 * n_beams) if slot not in used]
        taken: set[int] = set()
        for rank, (total, place) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            _, ids, slot = parents[place // vocab]
            token = place % vocab
            if token in ends:
                if rank < n_beams:
                    finished.append(Generation(ids, "stop", score=total / length**length_penalty))
            elif len(beams) < n_beams and total > -torch.inf:
                if slot in taken:
                    slot, source = free.pop(), slot
                    cache.copy(source, slot, len(prompt) + length - 1)
                taken.add(slot)
                beams.append((total, [*ids, token], slot))
        finished = sorted(finished, key=lambda one: -one.score)[:n_beams]
        is_full = len(prompt) + length > context
        is_over = len(finished) == n_beams and (not beams or beams[0][0] / length**length_penalty <= finished[-1].score)
        if is_over or is_full or not beams or length == max_tokens:
            break
        logits = step([Row(slot, ids[-1:], len(prompt) + length - 1) for _, ids, slot in beams])
    finished += [Generation(ids, "length", score=total / len(ids) ** length_penalty) for total, ids, _ in beams]
    results = sorted(finished, key=lambda one: -one.score)[:n_beams]
    if tokenizer is not None:
        for result in results:
            result.text = tokenizer.decode(result.ids)
    return results
