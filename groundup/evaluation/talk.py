"""How an assistant talks: answers to first messages, and the style of its answers when it draws them.

`groundup:first-messages` asks 200 things that people type first (`data/first_messages.toml`): a greeting, who are you,
a story, what it cannot know, nonsense. An answer fits if it says what such an answer must say, by patterns; declining
what can be answered is counted by itself. `groundup:style` draws answers to short questions at temperature 1, and says
how they differ from the answers of the model that this one started from.
"""

from __future__ import annotations

import functools
import math
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import torch
from jaxtyping import Float
from torch import Tensor

from groundup.evaluation.metrics import Answer, Estimate, mean, share
from groundup.evaluation.tasks import Task, verify
from groundup.generation import Engine, SamplingParams
from groundup.generation.rollouts import Rollouts, roll_out, use_calculator
from groundup.model import Transformer
from groundup.tokenizer import Message, Tokenizer, render

CANNOT = ("unknown", "nonsense")
"""Kinds of first messages that may be declined."""
_ROWS = 32


@dataclass(frozen=True)
class FirstMessage:
    """Something that people type first.

    Attributes:
        kind: of message, "greeting".
        text: what they type.
        fits: patterns, of which one must be found in an answer.
        least_words: that an answer must have.
    """

    kind: str
    text: str
    fits: tuple[str, ...]
    least_words: int

    def is_fitting(self, answer: str) -> bool:
        """Whether an answer says what it must; a story is none if it is declined."""
        if len(answer.split()) < self.least_words or (self.least_words and is_refusal(answer)):
            return False
        return any(re.search(pattern, answer, re.IGNORECASE) for pattern in self.fits)


@functools.cache
def first_messages() -> tuple[FirstMessage, ...]:
    """All of them."""
    found = []
    for kind, group in _lists().items():
        if isinstance(group, dict):
            for message in group["messages"]:
                text, fits = (message, group["fits"]) if isinstance(message, str) else (message[0], [message[1]])
                found.append(FirstMessage(kind, text, tuple(fits), group.get("least_words", 0)))
    return tuple(found)


def is_refusal(answer: str) -> bool:
    """Whether an answer declines."""
    return re.search(_lists()["refusal"], answer, re.IGNORECASE) is not None


@functools.cache
def _lists() -> dict:  # type: ignore[type-arg]
    text = (resources.files("groundup") / "data" / "first_messages.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def score_first_messages(
    model: Transformer, tokenizer: Tokenizer, max_tokens: int = 96, *, limit: int | None = None
) -> tuple[dict[str, Estimate], list[Answer]]:
    """The share of fitting answers, and of those that decline what can be answered; greedily.

    With a limit, every so many-th message is asked, so that each kind is.
    """
    messages = first_messages()
    messages = messages[:: math.ceil(len(messages) / (limit or len(messages)))]
    texts = answers_to(model, tokenizer, [message.text for message in messages], max_tokens).texts
    fitting = [message.is_fitting(text) for message, text in zip(messages, texts, strict=True)]
    declined = [is_refusal(text) for message, text in zip(messages, texts, strict=True) if message.kind not in CANNOT]
    answers = [
        Answer(message.kind, message.text, "", text, fits)
        for message, text, fits in zip(messages, texts, fitting, strict=True)
    ]
    return {"fitting_share": share(fitting), "refusal_rate": share(declined)}, answers


def score_style(
    model: Transformer, tokenizer: Tokenizer, tasks: Sequence[Task], *, start: Transformer | None = None,
    max_tokens: int = 32, seed: int = 1,
) -> dict[str, Estimate]:  # fmt: skip
    """How answers are that are drawn at temperature 1.

    Args:
        model: put into evaluation mode.
        tokenizer: of the model.
        tasks: that are asked.
        start: the model that it was trained from.
        max_tokens: of an answer.
        seed: of the answers.

    Returns:
        `polite_share` of answers in the polite style, right or not; `exact_match_sampled`; `answer_words`; `entropy` in
        nats a token; with a start `kl_to_start`, nats an answer, estimated from the answers.
    """
    rolled = answers_to(model, tokenizer, [task.prompt for task in tasks], max_tokens, temperature=1.0, seed=seed)
    polite = [_is_polite(task, text) for task, text in zip(tasks, rolled.texts, strict=True)]
    right = [
        ended and verify(task, text)
        for task, text, ended in zip(tasks, rolled.texts, rolled.is_ended.tolist(), strict=True)
    ]
    nats = -rolled.logprobs[rolled.is_answer]
    found = {
        "polite_share": share(polite),
        "exact_match_sampled": share(right),
        "answer_words": mean([len(text.split()) for text in rolled.texts], "answers"),
        "entropy": mean(nats.tolist(), "tokens"),
    }
    if start is not None:
        gaps = rolled.logprobs.sum(1) - _answer_logprobs(start, rolled)
        found["kl_to_start"] = mean(gaps.tolist(), "answers")
    return found


def answers_to(
    model: Transformer, tokenizer: Tokenizer, questions: Sequence[str], max_tokens: int, *, temperature: float = 0.0,
    seed: int = 1,
) -> Rollouts:  # fmt: skip
    """An answer to each question, with the calculator at hand."""
    asked: list[Message] = [{"role": "user", "content": question} for question in questions]
    prompts = [render(tokenizer, [message], add_generation_prompt=True).ids for message in asked]
    max_tokens = max(1, min(max_tokens, model.config.context_length - max(map(len, prompts))))
    engine = Engine(model, tokenizer, slots=min(64, len(prompts)))
    params = SamplingParams(temperature=temperature, max_tokens=max_tokens)
    seeds = range(seed << 32, (seed << 32) + len(prompts))
    return roll_out(engine, prompts, params, seeds, use_tool=use_calculator(tokenizer))


@torch.inference_mode()
def _answer_logprobs(model: Transformer, rolled: Rollouts) -> Float[Tensor, " rows"]:
    model.eval()
    found = []
    for ids, mask in zip(torch.split(rolled.ids, _ROWS), torch.split(rolled.is_answer, _ROWS), strict=True):
        logprobs = model(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        found.append(logprobs.where(mask[:, 1:], 0.0).sum(1))
    return torch.cat(found)


def _is_polite(task: Task, answer: str) -> bool:
    before, _, after = task.form.partition("{}")
    said = answer.strip()
    return said.startswith(before) and said.endswith(after) and len(said) > len(before) + len(after)
