"""Rollouts: answers that a model writes to prompts, as tensors to learn from or to score.

PPO, GRPO, online DPO and rejection sampling take theirs here. A row is a prompt, the answer, and the token that ended
it, which is part of the answer: a model has to learn to stop. A row's answer is a function of its prompt and seed,
whatever else is written beside it, so that any process can make any row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from groundup.errors import DataError
from groundup.generation.calculator import tool_turn
from groundup.generation.engine import Engine
from groundup.generation.params import SamplingParams
from groundup.generation.request import Generation, Request
from groundup.generation.sampling import request_seed
from groundup.tokenizer import Message, Tokenizer, render

UseTool = Callable[[str], Sequence[int] | None]
"""What a tool says to an answer that calls it, as ids: its turn, and what opens the next answer. None: no call."""


@dataclass(frozen=True)
class Rollouts:
    """Answers to prompts, one a row, padded on the right."""

    ids: Int[Tensor, "rows seq"]  # prompt, answer and end
    is_answer: Bool[Tensor, "rows seq"]  # which of them are the answer's, the end included
    # Of the answer's tokens, log π(token | all before it) as the engine had it, at temperature 1; else 0
    logprobs: Float[Tensor, "rows seq"]
    is_ended: Bool[Tensor, " rows"]  # whether an end was written, or the answer was cut off
    texts: list[str]  # the answers; of rows that used a tool, what follows it

    @property
    def lengths(self) -> Int[Tensor, " rows"]:
        """Tokens of each row, padding left out."""
        return self.ids.shape[1] - self.is_answer.flip(1).int().argmax(1)


def roll_out(
    engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int | None],
    *, width: int | None = None, pad_id: int = 0, use_tool: UseTool | None = None,
) -> Rollouts:  # fmt: skip
    """Have a model answer each prompt once.

    Args:
        engine: over the model, with its tokenizer.
        prompts: ids, one for each row.
        params: how tokens are drawn, and how many at most.
        seeds: of the rows.
        width: of the result (default: as wide as needed).
        pad_id: behind the end.
        use_tool: an answer that calls a tool is followed by what that says and by another answer, once; it is not the
            answer's and counts among the tokens that a row may have.

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
    rows = [_given(prompt) for prompt in prompts]
    requests = [Request(ids, params, seed=seed) for ids, seed in zip(prompts, seeds, strict=True)]
    answers = _answer(engine, requests, rows)
    if use_tool is not None:
        again: dict[int, Request] = {}
        for place, (row, request, answer) in enumerate(zip(rows, requests, answers, strict=True)):
            said = use_tool(answer.text) if answer.end_id is not None else None
            left = params.max_tokens - (len(row) - len(request.ids)) - len(said or ())
            if said is not None and left > 0:
                row += _given(said)
                seed = None if request.seed is None else request_seed(request.seed, 1)
                again[place] = Request([token for token, *_ in row], replace(params, max_tokens=left), seed=seed)
        second = _answer(engine, [*again.values()], [rows[place] for place in again])
        for place, answer in zip(again, second, strict=True):
            answers[place] = answer
    shape = len(rows), width or longest
    ids, is_answer, logprobs = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
    for place, row in enumerate(rows):
        parts = map(torch.tensor, zip(*row, strict=True))
        ids[place, : len(row)], is_answer[place, : len(row)], logprobs[place, : len(row)] = parts
    is_ended = torch.tensor([answer.end_id is not None for answer in answers])
    return Rollouts(ids, is_answer, logprobs, is_ended, [answer.text for answer in answers])


_Row = list[tuple[int, bool, float]]
"""Of each token its id, whether it is the answer's, and its log-probability."""


def _given(ids: Sequence[int]) -> _Row:
    return [(token, False, 0.0) for token in ids]


def _answer(engine: Engine, requests: Sequence[Request], rows: Sequence[_Row]) -> list[Generation]:
    """The answers, each put behind its row."""
    answers = [answer for answer, *_ in engine.run(requests)]
    for row, answer in zip(rows, answers, strict=True):
        row += [(token, True, one.logprob) for token, one in zip(answer.ids, answer.logprobs, strict=True)]
        row += [] if answer.end_id is None else [(answer.end_id, True, answer.end_logprob)]
    return answers


def use_calculator(tokenizer: Tokenizer) -> UseTool:
    """The turn of the calculator behind an answer that is a call of it."""

    def use(text: str) -> list[int] | None:
        if (result := tool_turn(text)) is None:
            return None
        said: list[Message] = [{"role": "user", "content": ""}, {"role": "assistant", "content": text}, result]
        try:
            n_before = render(tokenizer, said[:2]).n_answered
            return render(tokenizer, said, add_generation_prompt=True).ids[n_before:]
        except DataError:  # the template of an imported model that has no tools
            return None

    return use
