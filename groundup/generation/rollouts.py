"""Rollouts: answers that a model writes to prompts, as tensors to learn from or to score.

PPO, GRPO, rejection sampling and evaluation take theirs here. A row is a prompt, the answer, and the token that ended
it, which is part of the answer: a model has to learn to stop. A row's answer is a function of its prompt and seed,
whatever else is written beside it, so that any process can make any row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from groundup.errors import DataError
from groundup.generation.engine import Engine
from groundup.generation.params import SamplingParams
from groundup.generation.request import Request


@dataclass(frozen=True)
class Rollouts:
    """Answers to prompts, one a row, padded on the right.

    Attributes:
        ids: prompt, answer and end.
        is_answer: which of them are the answer's, the end included.
        logprobs: of the answer's tokens, log π(token | all before it) as the engine had it, at temperature 1; else 0.
        is_ended: whether an end was written, or the answer was cut off.
        texts: the answers.
    """

    ids: Int[Tensor, "rows seq"]
    is_answer: Bool[Tensor, "rows seq"]
    logprobs: Float[Tensor, "rows seq"]
    is_ended: Bool[Tensor, " rows"]
    texts: list[str]


def roll_out(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    seeds: Sequence[int | None],
    *,
    width: int | None = None,
    pad_id: int = 0,
) -> Rollouts:
    """Have a model answer each prompt once.

    Args:
        engine: over the model, with its tokenizer.
        prompts: ids, one for each row.
        params: how tokens are drawn, and how many at most.
        seeds: of the rows.
        width: of the result (default: as wide as needed).
        pad_id: behind the end.

    Raises:
        DataError: a prompt and its answer have no room in the model's context, or in `width`.
    """
    longest = max(map(len, prompts)) + params.max_tokens
    room = min(engine.length, width or engine.length)
    if longest > room:
        raise DataError(
            f"a prompt of {longest - params.max_tokens} tokens and {params.max_tokens} more for the answer: there is "
            f"room for {room}.",
            "Lower max_tokens, or leave long prompts out.",
        )
    params = replace(params, n=1, best_of=None, logprobs=params.logprobs or 0)
    requests = [Request(ids, params, seed=seed) for ids, seed in zip(prompts, seeds, strict=True)]
    results = [texts[0] for texts in engine.run(requests)]
    shape = len(prompts), width or longest
    ids, is_answer = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.bool)
    logprobs = torch.zeros(shape)
    for row, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        end = [] if result.end_id is None else [result.end_id]
        values = [one.logprob for one in result.logprobs] + [result.end_logprob] * len(end)
        answer = slice(len(prompt), len(prompt) + len(values))
        ids[row, : answer.stop] = torch.tensor([*prompt, *result.ids, *end])
        is_answer[row, answer] = True
        logprobs[row, answer] = torch.tensor(values)
    ended = torch.tensor([result.end_id is not None for result in results])
    return Rollouts(ids, is_answer, logprobs, ended, [result.text for result in results])
