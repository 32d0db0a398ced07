"""Rollouts: answers that a model writes to prompts, as tensors to learn from or to score.

PPO, GRPO, rejection sampling and evaluation take theirs here. A row is a prompt, the answer, and the token that ended
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
from groundup.generation.calculator import calculate, read_call
from groundup.generation.engine import Engine
from groundup.generation.params import SamplingParams
from groundup.generation.request import Generation, Request
from groundup.generation.sampling import request_seed
from groundup.tokenizer import Message, Tokenizer, render


@dataclass(frozen=True)
class Rollouts:
    """Answers to prompts, one a row, padded on the right.

    Attributes:
        ids: prompt, answer and end.
        is_answer: which of them are the answer's, the end included.
        logprobs: of the answer's tokens, log π(token | all before it) as the engine had it, at temperature 1; else 0.
        is_ended: whether an end was written, or the answer was cut off.
        texts: the answers; of rows that used a tool, what follows it.
    """

    ids: Int[Tensor, "rows seq"]
    is_answer: Bool[Tensor, "rows seq"]
    logprobs: Float[Tensor, "rows seq"]
    is_ended: Bool[Tensor, " rows"]
    texts: list[str]


UseTool = Callable[[str], Sequence[int] | None]
"""What a tool says to an answer that calls it, as ids: its turn, and what opens the next answer. None: no call."""


def roll_out(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    seeds: Sequence[int | None],
    *,
    width: int | None = None,
    pad_id: int = 0,
    use_tool: UseTool | None = None,
) -> Rollouts:
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
    rows = [_Row(list(prompt), [False] * len(prompt), [0.0] * len(prompt)) for prompt in prompts]
    requests = [Request(ids, params, seed=seed) for ids, seed in zip(prompts, seeds, strict=True)]
    for row, (result, *_) in zip(rows, engine.run(requests), strict=True):
        row.add(result)
    if use_tool is not None:
        again = []
        for row, prompt, seed in zip(rows, prompts, seeds, strict=True):
            said = use_tool(row.text) if row.is_ended else None
            left = params.max_tokens - (len(row.ids) - len(prompt)) - len(said or ())
            if said is not None and left > 0:
                row.ids += said
                row.is_answer += [False] * len(said)
                row.logprobs += [0.0] * len(said)
                second = None if seed is None else request_seed(seed, 1)
                again.append((row, Request(row.ids, replace(params, max_tokens=left), seed=second)))
        for (row, _), (result, *_) in zip(again, engine.run([request for _, request in again]), strict=True):
            row.add(result)
    shape = len(rows), width or longest
    ids, is_answer = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.bool)
    logprobs = torch.zeros(shape)
    for place, row in enumerate(rows):
        n = len(row.ids)
        ids[place, :n], is_answer[place, :n] = torch.tensor(row.ids), torch.tensor(row.is_answer)
        logprobs[place, :n] = torch.tensor(row.logprobs)
    ended = torch.tensor([row.is_ended for row in rows])
    return Rollouts(ids, is_answer, logprobs, ended, [row.text for row in rows])


def use_calculator(tokenizer: Tokenizer) -> UseTool:
    """The turn of the calculator behind an answer that is a call of it."""

    def use(text: str) -> list[int] | None:
        expression = read_call(text)
        if expression is None:
            return None
        said: list[Message] = [
            {"role": "user", "content": ""},
            {"role": "assistant", "content": text},
            {"role": "tool", "content": calculate(expression)},
        ]
        try:
            n_before = render(tokenizer, said[:2]).n_answered
            return render(tokenizer, said, add_generation_prompt=True).ids[n_before:]
        except DataError:  # the template of an imported model that has no tools
            return None

    return use


@dataclass
class _Row:
    ids: list[int]
    is_answer: list[bool]
    logprobs: list[float]
    text: str = ""
    is_ended: bool = False

    def add(self, result: Generation) -> None:
        """An answer, behind what is there."""
        end = [] if result.end_id is None else [result.end_id]
        self.ids += [*result.ids, *end]
        self.is_answer += [True] * (len(result.ids) + len(end))
        self.logprobs += [one.logprob for one in result.logprobs] + [result.end_logprob] * len(end)
        self.text, self.is_ended = result.text, bool(end)
