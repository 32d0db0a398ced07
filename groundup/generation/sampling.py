"""From logits to a token: temperature, top-k, top-p (nucleus, arXiv:1904.09751), and an exact draw.

The order is that of the field: temperature, then top-k, then top-p on what is left, then renormalize. Tokens of
equal logits are treated alike: both filters keep everything that ties with the last token they need. The draw
inverts the cumulative distribution at a uniform number from the request's own generator, so that a request's
text depends on its seed only, never on what else is in the batch.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from groundup.errors import GroundupError

_NUCLEUS_CANDIDATES = (256, 4096)  # tokens among which a nucleus is sought before all are sorted


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are drawn.

    Attributes:
        temperature: divides the logits; 0: always the most probable token (of several, the first).
        top_k: draw among the k most probable tokens (ties with the last one are kept); 0: all.
        top_p: draw among the fewest most probable tokens that hold this mass (ties as above); 1: all.
        max_tokens: most tokens to write.
        seed: the same seed gives the same text; None: another each time.
        stop: texts before which writing stops.

    Raises:
        GroundupError: values out of range, all of them named.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int = 128
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        is_stop = isinstance(self.stop, tuple) and all(isinstance(text, str) and text for text in self.stop)
        rules = [
            ("temperature", _is_real(self.temperature, 0, math.inf), "a number of at least 0"),
            ("top_k", _is_whole(self.top_k, 0), "a whole number of at least 0 (0: all tokens)"),
            ("top_p", _is_real(self.top_p, 0, 1) and self.top_p > 0, "over 0 and at most 1"),
            ("max_tokens", _is_whole(self.max_tokens, 1), "a whole number of at least 1"),
            ("seed", self.seed is None or _is_whole(self.seed, 0), "a whole number of at least 0 and below 2^63"),
            ("stop", is_stop, "a tuple of texts, none of them empty"),
        ]
        wrong = [f"{name} = {getattr(self, name)!r}: must be {rule}." for name, fits, rule in rules if not fits]
        if wrong:
            raise GroundupError(" ".join(wrong))


def sample(
    logits: Float[Tensor, "batch vocab"], params: SamplingParams, generators: Sequence[torch.Generator]
) -> Int[Tensor, " batch"]:
    """One token for each row, drawn with the row's own generator.

    Raises:
        GroundupError: the logits are not numbers.
    """
    if params.temperature == 0:
        _check_numbers(logits)
        return logits.argmax(dim=-1)
    uniforms = torch.cat([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
    return draw(warp(logits, params), uniforms.to(logits.device))


def warp(logits: Float[Tensor, "*batch vocab"], params: SamplingParams) -> Float[Tensor, "*batch vocab"]:
    """Log-probabilities after temperature, top-k and top-p; −inf for tokens that cannot be drawn.

    Raises:
        GroundupError: the logits are not numbers.
    """
    largest = _check_numbers(logits)
    if params.temperature == 0:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.full_like(logits, -math.inf, dtype=torch.float32).scatter(-1, best, 0.0)
    # The largest becomes 0 first, so that a temperature near 0 cannot make infinities of both signs.
    logits = (logits.float() - largest[..., None].float()) / max(params.temperature, torch.finfo(torch.float32).tiny)
    if 0 < params.top_k < logits.shape[-1]:
        last = logits.topk(params.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < last, -math.inf)
    if params.top_p < 1:
        logits = logits.masked_fill(logits < _nucleus_border(logits, params.top_p), -math.inf)
    return logits.log_softmax(dim=-1)


def draw(logprobs: Float[Tensor, "batch vocab"], uniforms: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """The token at which the cumulative distribution passes each uniform number of [0, 1)."""
    cumulative = logprobs.exp().cumsum(dim=-1, dtype=torch.float64)
    # u · total rounds to less than the total for every double u < 1, and the first sum over it belongs to a token
    # that has added something: the index is that of a possible token.
    targets = uniforms.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0]


def seeded_generator(seed: int | None) -> torch.Generator:
    """A request's source of randomness; without a seed, another each time."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def _check_numbers(logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch"]:
    """Each row's largest logit, which is finite unless the row has a NaN, a +inf or nothing but −inf."""
    largest = logits.amax(dim=-1)
    if not torch.isfinite(largest).all():
        raise GroundupError(
            "the model gave logits that are not numbers (NaN or infinite): its weights are damaged, or diverged.",
            "Take an earlier checkpoint, or train again with a lower learning rate.",
        )
    return largest


def _nucleus_border(logits: Float[Tensor, "*batch vocab"], top_p: float) -> Float[Tensor, "*batch 1"]:
    """The logit of the last token that is needed to hold the mass `top_p`.

    A sort of the whole vocabulary would cost more than a step of a small model; a few hundred candidates hold the
    mass nearly always, and where they do not, all are sorted: the border is the same.
    """
    vocab = logits.shape[-1]
    log_total = logits.logsumexp(dim=-1, keepdim=True)
    for n_candidates in (*(n for n in _NUCLEUS_CANDIDATES if n < vocab), vocab):
        ordered = logits.topk(n_candidates, dim=-1).values
        held = (ordered - log_total).double().exp().cumsum(dim=-1)
        if bool((held[..., -1] >= top_p).all()):
            break
    n_before = (held < top_p).sum(dim=-1, keepdim=True).clamp(max=n_candidates - 1)
    return ordered.gather(-1, n_before)


def _is_real(value: object, least: float, most: float) -> bool:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and least <= value <= most  # type: ignore[arg-type,operator]


def _is_whole(value: object, least: int) -> bool:
    is_number = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return is_number and least <= int(value) < 2**63  # type: ignore[call-overload]
