"""What a request may ask of sampling: checked once, when it is made."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Annotated, Self

import numpy as np
from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from groundup.errors import GroundupError
from groundup.generation.grammar import Constraint

MOST_SAMPLES = 128  # n and best_of of one request
MOST_LOGPROBS = 20  # alternatives reported for a token
BAN = -100.0  # a logit bias of this excludes the token

_Whole = Annotated[int, Field(ge=0, lt=2**63)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Mass = Annotated[float, Field(gt=0, le=1)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_Text = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, config=ConfigDict(strict=True, arbitrary_types_allowed=True))
class SamplingParams:
    """How one request's tokens are drawn, and when its text ends.

    Attributes:
        temperature: divides the logits; 0: always the most probable token (of several, the first).
        top_k: draw among the k most probable tokens (ties with the last one are kept); 0: all.
        top_p: draw among the fewest most probable tokens that hold this mass (ties as above); 1: all.
        max_tokens: most tokens to write; 0: the prompt is only read.
        seed: the same seed gives the same text; None: another each time.
        stop: texts before which writing stops.
        min_p: draw among tokens at least this share as probable as the most probable one (arXiv:2407.01082); 0: all.
        typical_p: draw among the tokens whose surprise is nearest the entropy, as many as hold this mass
            (arXiv:2202.00666); 1: all.
        repetition_penalty: positive logits of tokens in the prompt or output are divided by it, negative ones
            multiplied (arXiv:1909.05858); 1: none.
        presence_penalty: subtracted from the logits of tokens in the output.
        frequency_penalty: subtracted from the logits of tokens in the output, once for each occurrence.
        logit_bias: added to the logits of these token ids; −100 excludes a token.
        stop_ids: tokens that end the text and are not written, besides the tokenizer's end tokens.
        ignore_eos: write on past the tokenizer's end tokens; `stop_ids` alone end the text.
        min_tokens: tokens before which none that ends the text is drawn.
        n: texts to return.
        best_of: texts to write, of which the `n` with the highest mean log-probability are returned; None: n.
        constraint: what the text must be: `Constraint.json_schema`, `.regex` or `.choices`.
        logprobs: report each token's log-probability and so many of the most probable tokens'; None: none of it.

    Raises:
        GroundupError: values out of range, all of them named.
    """

    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    top_k: _Whole = 0
    top_p: _Mass = 1.0
    max_tokens: _Whole = 128
    seed: _Whole | None = None
    stop: tuple[_Text, ...] = ()
    min_p: _Share = 0.0
    typical_p: _Mass = 1.0
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    presence_penalty: _Penalty = 0.0
    frequency_penalty: _Penalty = 0.0
    logit_bias: Mapping[_Whole, Annotated[float, Field(ge=BAN, le=-BAN)]] = field(default_factory=dict, hash=False)
    stop_ids: tuple[_Whole, ...] = ()
    ignore_eos: bool = False
    min_tokens: _Whole = 0
    n: Annotated[int, Field(ge=1, le=MOST_SAMPLES)] = 1
    best_of: Annotated[int, Field(ge=1, le=MOST_SAMPLES)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    constraint: Constraint | None = None

    @model_validator(mode="wrap")
    @classmethod
    def _in_words(cls, values: ArgsKwargs, validate: Callable[[ArgsKwargs], Self]) -> Self:
        given = dict(zip(cls.__dataclass_fields__, values.args, strict=False)) | (values.kwargs or {})
        try:
            return validate(values)
        except ValidationError as error:
            wrong = {str(one["loc"][0]): one["msg"].replace("Input should be", "must be") for one in error.errors()}
            raise GroundupError(
                " ".join(f"{name} = {given.get(name)!r}: {said}." for name, said in wrong.items())
            ) from None

    def __post_init__(self) -> None:
        if self.min_tokens > self.max_tokens:
            raise GroundupError(f"min_tokens = {self.min_tokens}: must be at most max_tokens = {self.max_tokens}.")
        if self.best_of is not None and self.best_of < self.n:
            raise GroundupError(f"best_of = {self.best_of}: must be at least n = {self.n}.")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse ids that a model of this vocabulary does not have.

        Raises:
            GroundupError: `logit_bias` or `stop_ids` names such an id.
        """
        for name in ("logit_bias", "stop_ids"):
            if unknown := sorted(token for token in getattr(self, name) if token >= vocab_size):
                raise GroundupError(f"{name} has the token id {unknown[0]}: the model has ids 0 to {vocab_size - 1}.")

    @functools.cached_property
    def needs_history(self) -> bool:
        """Whether what may be drawn depends on the tokens before: then a `History` must be at hand."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.min_tokens)

    @functools.cached_property
    def has_filters(self) -> bool:
        """Whether a token may be excluded because of what the others are."""
        filters = (self.temperature == 0, self.top_k, self.typical_p, self.top_p, self.min_p)
        return filters != (False, 0, 1, 1, 0)

    @functools.cached_property
    def bias(self) -> tuple[np.ndarray, np.ndarray]:
        """`logit_bias` as ids and values, −inf for a token that is excluded."""
        values = [-math.inf if bias == BAN else bias for bias in self.logit_bias.values()]
        return np.array([*self.logit_bias], np.int64), np.array(values, np.float32)
