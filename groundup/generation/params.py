"""What a request may ask of sampling: checked once, when it is made."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from groundup.errors import GroundupError
from groundup.generation.grammar import Constraint

MOST_SAMPLES = 128  # n and best_of of one request
MOST_LOGPROBS = 20  # alternatives reported for a token
BAN = -100.0  # a logit bias of this excludes the token


@dataclass(frozen=True)
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
        stop_ids: tokens that end the text, besides those that end it anyway.
        ignore_eos: write on past the tokens that end a text or an answer (not past `stop_ids`).
        min_tokens: tokens before which none that ends the text is drawn.
        n: texts to return.
        best_of: texts to write, of which the `n` with the highest mean log-probability are returned; None: n.
        constraint: what the text must be: `Constraint.json_schema`, `.regex` or `.choices`.
        logprobs: report each token's log-probability and so many of the most probable tokens'; None: none of it.

    Raises:
        GroundupError: values out of range, all of them named.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int = 128
    seed: int | None = None
    stop: tuple[str, ...] = ()
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    n: int = 1
    best_of: int | None = None
    logprobs: int | None = None
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        are_stops = isinstance(self.stop, tuple) and all(isinstance(text, str) and text for text in self.stop)
        are_ids = isinstance(self.stop_ids, tuple) and all(_is_whole(token, 0) for token in self.stop_ids)
        are_biases = isinstance(self.logit_bias, Mapping) and all(
            _is_whole(token, 0) and _is_real(bias, BAN, -BAN) for token, bias in self.logit_bias.items()
        )
        n_at_least = self.n if _is_whole(self.n, 1) else 1
        most_min_tokens = self.max_tokens if _is_whole(self.max_tokens, 0) else 0
        has_best_of = self.best_of is None or _is_whole(self.best_of, n_at_least, MOST_SAMPLES)
        has_logprobs = self.logprobs is None or _is_whole(self.logprobs, 0, MOST_LOGPROBS)
        rules = [
            ("temperature", _is_real(self.temperature, 0), "a number of at least 0"),
            ("top_k", _is_whole(self.top_k, 0), "a whole number of at least 0 (0: all tokens)"),
            ("top_p", _is_real(self.top_p, 0, 1) and self.top_p > 0, "over 0 and at most 1"),
            ("max_tokens", _is_whole(self.max_tokens, 0), "a whole number of at least 0"),
            ("seed", self.seed is None or _is_whole(self.seed, 0), "a whole number of at least 0 and below 2^63"),
            ("stop", are_stops, "a tuple of texts, none of them empty"),
            ("min_p", _is_real(self.min_p, 0, 1), "from 0 to 1"),
            ("typical_p", _is_real(self.typical_p, 0, 1) and self.typical_p > 0, "over 0 and at most 1"),
            ("repetition_penalty", _is_real(self.repetition_penalty, 0) and self.repetition_penalty > 0, "over 0"),
            ("presence_penalty", _is_real(self.presence_penalty, -2, 2), "from -2 to 2"),
            ("frequency_penalty", _is_real(self.frequency_penalty, -2, 2), "from -2 to 2"),
            ("logit_bias", are_biases, "a mapping from token ids to numbers from -100 to 100"),
            ("stop_ids", are_ids, "a tuple of token ids"),
            ("ignore_eos", isinstance(self.ignore_eos, bool), "true or false"),
            ("min_tokens", _is_whole(self.min_tokens, 0, most_min_tokens), "a whole number from 0 to max_tokens"),
            ("n", _is_whole(self.n, 1, MOST_SAMPLES), f"a whole number from 1 to {MOST_SAMPLES}"),
            ("best_of", has_best_of, f"a whole number from n to {MOST_SAMPLES}"),
            ("constraint", self.constraint is None or isinstance(self.constraint, Constraint), "a Constraint"),
            ("logprobs", has_logprobs, f"a whole number from 0 to {MOST_LOGPROBS}"),
        ]
        if wrong := [f"{name} = {getattr(self, name)!r}: must be {rule}." for name, fits, rule in rules if not fits]:
            raise GroundupError(" ".join(wrong))

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
    def bias(self) -> tuple[Tensor, Tensor]:
        """`logit_bias` as ids and values, −inf for a token that is excluded."""
        values = [-math.inf if bias == BAN else float(bias) for bias in self.logit_bias.values()]
        return torch.tensor([*self.logit_bias], dtype=torch.int64), torch.tensor(values)


def _is_real(value: object, least: float, most: float = math.inf) -> bool:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and least <= value <= most  # type: ignore[arg-type,operator]


def _is_whole(value: object, least: int, most: int = 2**63 - 1) -> bool:
    is_number = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return is_number and least <= int(value) <= most  # type: ignore[call-overload]
