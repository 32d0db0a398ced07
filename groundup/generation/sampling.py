"""From logits to tokens: penalties, temperature, filters, an exact draw, and the log-probabilities to report.

Order of operations, each on what the one before left:

1. logit bias, then repetition, frequency and presence penalty, then masks, on the raw logits (as in vLLM);
2. temperature (before the filters, as in transformers and vLLM; llama.cpp applies it last);
3. top-k, typical, top-p, min-p (llama.cpp's order; transformers: top-k, top-p, min-p, typical; vLLM: min-p first).

Tokens of equal logits are treated alike: a filter keeps everything that ties with the last token it needs. A token
is where the cumulative distribution passes a uniform number that is a pure function of the request's seed and the
token's position, so that a text never depends on what else is in the batch, and no generator has a state to keep.
"""

from __future__ import annotations

import functools
import math
import numbers
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int
from torch import Tensor

from groundup.errors import GroundupError

MOST_SAMPLES = 128  # n and best_of of one request
MOST_LOGPROBS = 20  # alternatives reported for a token
BAN = -100.0  # a logit bias of this excludes the token
_BLOCK = 128  # tokens that are summed at once before a draw looks inside


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are drawn, and when its text ends.

    Attributes:
        temperature: divides the logits; 0: always the most probable token (of several, the first).
        top_k: draw among the k most probable tokens (ties with the last one are kept); 0: all.
        top_p: draw among the fewest most probable tokens that hold this mass (ties as above); 1: all.
        max_tokens: most tokens to write.
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

    def __post_init__(self) -> None:
        least_best_of = self.n if _is_whole(self.n, 1, MOST_SAMPLES) else 1
        most_min_tokens = self.max_tokens if _is_whole(self.max_tokens, 1) else 2**63 - 1
        is_stop = isinstance(self.stop, tuple) and all(isinstance(text, str) and text for text in self.stop)
        is_stop_ids = isinstance(self.stop_ids, tuple) and all(_is_whole(token, 0) for token in self.stop_ids)
        is_bias = isinstance(self.logit_bias, Mapping) and all(
            _is_whole(token, 0) and _is_real(bias, BAN, -BAN) for token, bias in self.logit_bias.items()
        )
        best_of = self.best_of is None or _is_whole(self.best_of, least_best_of, MOST_SAMPLES)
        logprobs = self.logprobs is None or _is_whole(self.logprobs, 0, MOST_LOGPROBS)
        rules = [
            ("temperature", _is_real(self.temperature, 0), "a number of at least 0"),
            ("top_k", _is_whole(self.top_k, 0), "a whole number of at least 0 (0: all tokens)"),
            ("top_p", _is_real(self.top_p, 0, 1) and self.top_p > 0, "over 0 and at most 1"),
            ("max_tokens", _is_whole(self.max_tokens, 0), "a whole number of at least 0"),
            ("seed", self.seed is None or _is_whole(self.seed, 0), "a whole number of at least 0 and below 2^63"),
            ("stop", is_stop, "a tuple of texts, none of them empty"),
            ("min_p", _is_real(self.min_p, 0, 1), "from 0 to 1"),
            ("typical_p", _is_real(self.typical_p, 0, 1) and self.typical_p > 0, "over 0 and at most 1"),
            ("repetition_penalty", _is_real(self.repetition_penalty, 0) and self.repetition_penalty > 0, "over 0"),
            ("presence_penalty", _is_real(self.presence_penalty, -2, 2), "from -2 to 2"),
            ("frequency_penalty", _is_real(self.frequency_penalty, -2, 2), "from -2 to 2"),
            ("logit_bias", is_bias, "a mapping from token ids to numbers from -100 to 100"),
            ("stop_ids", is_stop_ids, "a tuple of token ids"),
            ("ignore_eos", isinstance(self.ignore_eos, bool), "true or false"),
            ("min_tokens", _is_whole(self.min_tokens, 0, most_min_tokens), "a whole number from 0 to max_tokens"),
            ("n", _is_whole(self.n, 1, MOST_SAMPLES), f"a whole number from 1 to {MOST_SAMPLES}"),
            ("best_of", best_of, f"a whole number from n to {MOST_SAMPLES}"),
            ("logprobs", logprobs, f"a whole number from 0 to {MOST_LOGPROBS}"),
        ]
        wrong = [f"{name} = {getattr(self, name)!r}: must be {rule}." for name, fits, rule in rules if not fits]
        if wrong:
            raise GroundupError(" ".join(wrong))

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse ids that a model of this vocabulary does not have.

        Raises:
            GroundupError: `logit_bias` or `stop_ids` names such an id.
        """
        for name in ("logit_bias", "stop_ids"):
            if unknown := sorted(token for token in getattr(self, name) if token >= vocab_size):
                raise GroundupError(f"{name} has the token id {unknown[0]}: the model has ids 0 to {vocab_size - 1}.")

    @property
    def needs_history(self) -> bool:
        """Whether what may be drawn depends on the tokens before: then a `History` must be at hand."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.min_tokens)

    @property
    def is_filtered(self) -> bool:
        """Whether some filter is on."""
        return bool(self.top_k or self.top_p < 1 or self.min_p or self.typical_p < 1)

    @functools.cached_property
    def _bias(self) -> tuple[Tensor, Tensor]:
        values = [-math.inf if bias == BAN else float(bias) for bias in self.logit_bias.values()]
        return torch.tensor([*self.logit_bias], dtype=torch.int64), torch.tensor(values)


class History:
    """What penalties and `min_tokens` need of one request's tokens; takes a new token in constant time.

    Args:
        prompt: its tokens.
        ends: tokens that end the text; none is drawn before `min_tokens` are written.
    """

    def __init__(self, prompt: Sequence[int] = (), ends: Collection[int] = ()) -> None:
        self._ends = torch.tensor(sorted(ends), dtype=torch.int64)
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        self._ids = np.array([*self._places, *[0] * 64], np.int64)  # distinct tokens of prompt and output, then room
        self._counts = np.zeros(len(self._ids), np.float32)  # of each in the output
        self.n_written = 0

    def add(self, token: int) -> None:
        """The next token of the output."""
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token
        self._counts[place] += 1
        self.n_written += 1

    def after(self, tokens: Iterable[int]) -> History:
        """Another history, with these tokens added: of a draft that is not yet accepted."""
        other = History.__new__(History)
        other._ends, other._places, other.n_written = self._ends, dict(self._places), self.n_written
        other._ids, other._counts = self._ids.copy(), self._counts.copy()
        for token in tokens:
            other.add(token)
        return other

    def penalize(self, logits: Float32[Tensor, " vocab"], params: SamplingParams) -> None:
        """Change a row of logits in place."""
        size, device = len(self._places), logits.device
        ids, counts = (torch.from_numpy(part[:size]).to(device) for part in (self._ids, self._counts))
        values = logits[ids]
        if params.repetition_penalty != 1:
            penalty = params.repetition_penalty
            values = torch.where(values > 0, values / penalty, values * penalty)
        logits[ids] = values - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
        if self.n_written < params.min_tokens:
            logits[self._ends.to(device)] = -math.inf
            logits[list(params.stop_ids)] = -math.inf


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """What the model held of a token that was drawn.

    Attributes:
        token: its id.
        logprob: its log-probability (nats) by the model's own logits, before penalties, temperature and filters.
        top: the most probable tokens and their log-probabilities, most probable first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def sample(
    logits: Float[Tensor, "rows vocab"],
    params: SamplingParams | Sequence[SamplingParams],
    seeds: Sequence[int],
    positions: Sequence[int],
    histories: Sequence[History | None] | None = None,
    masks: Sequence[Bool[Tensor, " vocab"] | None] | None = None,
) -> Int[Tensor, " rows"]:
    """One token for each row.

    Args:
        logits: of the model.
        params: of each row, or one for all.
        seeds: of each row's request (not `params.seed`, which may be None).
        positions: how many tokens each request has written before.
        histories: of rows whose `params.needs_history`.
        masks: tokens that a row may draw, such as those a grammar allows; None: all.

    Raises:
        GroundupError: the logits are not numbers, or a row may draw no token.
    """
    rows = _per_row(params, len(logits))
    adjusted = _adjust(logits, rows, histories, masks)
    if all(row.temperature == 0 for row in rows):
        return _most_probable(adjusted)
    weights = _weights(adjusted, rows)
    return _draw(weights, uniforms(seeds, positions).to(weights.device))


def warp(
    logits: Float[Tensor, "rows vocab"],
    params: SamplingParams | Sequence[SamplingParams],
    histories: Sequence[History | None] | None = None,
    masks: Sequence[Bool[Tensor, " vocab"] | None] | None = None,
) -> Float32[Tensor, "rows vocab"]:
    """Log-probabilities of what `sample` draws; −inf for tokens that cannot be drawn.

    To verify a draft, every position of a request is a row with a history of its own (`History.after`). Arguments
    and errors as `sample`.
    """
    rows = _per_row(params, len(logits))
    weights = _weights(_adjust(logits, rows, histories, masks), rows)
    return (weights / weights.sum(dim=-1, keepdim=True)).log()


def draw(logprobs: Float[Tensor, "rows vocab"], uniform: Float64[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """The token at which each row's cumulative distribution passes its uniform number of [0, 1)."""
    return _draw(logprobs.exp(), uniform)


def uniforms(seeds: Sequence[int], positions: Sequence[int], stream: int = 0) -> Float64[Tensor, " rows"]:
    """Numbers of [0, 1), each a function of a seed and a position (SplitMix64, doi:10.1145/2714064.2660195).

    Args:
        seeds: of requests, from 0 to 2^63 − 1.
        positions: of tokens in the requests' outputs.
        stream: 0 to 3, independent numbers for one token, such as a draft's, a verdict's and its replacement's.
    """
    counters = 4 * np.array(positions, np.uint64) + np.uint64(stream + 1)
    hashes = _mix(_mix(np.array(seeds, np.uint64) + _GAMMA) + _GAMMA * counters)
    return torch.from_numpy((hashes >> np.uint64(11)) * 2.0**-53)


def request_seed(seed: int | None, index: int = 0) -> int:
    """The seed of a request's `index`-th text: the first has the request's own; without one, another each time."""
    if seed is None:
        return secrets.randbits(63)
    return seed if index == 0 else int(_mix(_mix(np.array([seed], np.uint64)) + np.uint64(index))[0] >> np.uint64(1))


def token_logprobs(logits: Float[Tensor, "rows vocab"], tokens: Sequence[int], n_top: int) -> list[TokenLogprob]:
    """Log-probabilities of the tokens that were drawn, and of the `n_top` most probable ones.

    A drawn token that is among the most probable stands in `top`, with the same float.

    Args:
        logits: of the model, before any change.
        tokens: one for each row.
        n_top: 0 to the vocabulary's size.
    """
    logits = logits.float()
    totals = logits.logsumexp(dim=-1, keepdim=True)
    drawn = (logits.gather(-1, torch.tensor(tokens, device=logits.device)[:, None]) - totals)[:, 0].tolist()
    best = logits.topk(min(n_top, logits.shape[-1]), dim=-1)
    found = []
    for token, logprob, ids, values in zip(
        tokens, drawn, best.indices.tolist(), (best.values - totals).tolist(), strict=True
    ):
        if ids and token not in ids and logprob >= values[-1]:
            ids[-1] = token  # of several that tie for the last place, the one that was drawn
        found.append(TokenLogprob(token, logprob, tuple(zip(ids, values, strict=True))))
    return found


def _per_row(params: SamplingParams | Sequence[SamplingParams], n_rows: int) -> Sequence[SamplingParams]:
    rows = [params] * n_rows if isinstance(params, SamplingParams) else params
    assert len(rows) == n_rows, f"{len(rows)} params for {n_rows} rows"
    return rows


def _adjust(
    logits: Float[Tensor, "rows vocab"],
    rows: Sequence[SamplingParams],
    histories: Sequence[History | None] | None,
    masks: Sequence[Bool[Tensor, " vocab"] | None] | None,
) -> Float32[Tensor, "rows vocab"]:
    """Logits after bias, penalties and masks; a copy where anything changes."""
    adjusted = logits.float()
    for number, params in enumerate(rows):
        mask = masks[number] if masks else None
        if not (params.logit_bias or params.needs_history or mask is not None):
            continue
        if adjusted is logits:
            adjusted = logits.clone()
        row = adjusted[number]
        if params.logit_bias:
            ids, bias = params._bias
            row[ids.to(row.device)] += bias.to(row.device)
        if params.needs_history:
            history = histories[number] if histories else None
            assert history is not None, "penalties and min_tokens need a history"
            history.penalize(row, params)
        if mask is not None:
            row.masked_fill_(~mask, -math.inf)
    return adjusted


def _most_probable(logits: Float32[Tensor, "rows vocab"]) -> Int[Tensor, " rows"]:
    if logits.device.type == "cpu":  # ten times as fast as torch's
        tokens = torch.from_numpy(logits.numpy().argmax(axis=-1))
    else:
        tokens = logits.argmax(dim=-1)
    _check_largest(logits.gather(-1, tokens[:, None]))  # a NaN counts as the largest
    return tokens


def _weights(logits: Float32[Tensor, "rows vocab"], rows: Sequence[SamplingParams]) -> Float32[Tensor, "rows vocab"]:
    """Each token's probability over the most probable one's; 0 for tokens that cannot be drawn."""
    if logits.device.type == "cpu":
        weights = torch.empty_like(logits)
        for row, params, target in zip(logits.numpy(), rows, weights.numpy(), strict=True):
            _weigh_row(row, params, target)
        return weights
    kinds: dict[tuple[float, ...], list[int]] = {}
    for number, params in enumerate(rows):
        kind = (params.temperature, params.top_k, params.typical_p, params.top_p, params.min_p)
        kinds.setdefault(kind, []).append(number)
    if len(kinds) == 1:
        return _weigh_batch(logits, rows[0])
    weights = torch.empty_like(logits)
    for numbers_ in kinds.values():
        where = torch.tensor(numbers_, device=logits.device)
        weights[where] = _weigh_batch(logits[where], rows[numbers_[0]])
    return weights


def _weigh_row(logits: np.ndarray, params: SamplingParams, weights: np.ndarray) -> None:
    """`_weigh_batch` for one row on the CPU: without sorting the vocabulary, and bit for bit as in any batch."""
    largest = logits.max()
    _check_largest(largest)
    if params.temperature == 0:
        weights.fill(0)
        weights[logits.argmax()] = 1
        return
    # The largest becomes 0 first, so that a temperature near 0 cannot make infinities of both signs.
    keys = logits - largest
    if params.temperature != 1:
        with np.errstate(over="ignore"):
            keys /= max(params.temperature, np.finfo(np.float32).tiny)
    if 0 < params.top_k < len(keys):
        keys[keys < _border(keys, None, params.top_k)] = -np.inf
    np.exp(keys, out=weights)
    if params.typical_p < 1:
        total = weights.sum(dtype=np.float64)
        surprises = np.float32(math.log(total)) - keys
        possible = weights > 0
        entropy = (weights[possible] * surprises[possible]).sum(dtype=np.float64) / total
        nearness = -np.abs(surprises - np.float32(entropy))
        weights *= nearness >= _border(nearness, weights, params.typical_p * total)
    if params.top_p < 1:
        weights *= keys >= _border(keys, weights, params.top_p * weights.sum(dtype=np.float64))
    if params.min_p > 0:
        weights *= weights >= params.min_p * weights.max()


def _border(keys: np.ndarray, weights: np.ndarray | None, mass: float) -> float:
    """The key of the last token that is needed to hold a mass, taking tokens from the largest key down.

    A sort of the whole vocabulary would cost more than a step of a small model. So a band below the largest key is
    widened until it holds the mass, and only what is in it is sorted. Keys are in nats.

    Args:
        keys: (vocab,) float32.
        weights: (vocab,) float32; None: 1 for each token.
        mass: a sum of weights.
    """
    best, width = keys.max(), np.float32(2)
    while width < 256:
        near = keys >= best - width
        if (np.count_nonzero(near) if weights is None else weights[near].sum(dtype=np.float64)) >= mass:
            keys = keys[near]
            weights = None if weights is None else weights[near]
            break
        width *= np.float32(1.5)
    order = np.argsort(-keys)
    held = np.arange(1, len(keys) + 1) if weights is None else weights[order].cumsum(dtype=np.float64)
    return keys[order[min(held.searchsorted(mass), len(keys) - 1)]]


def _weigh_batch(logits: Float32[Tensor, "rows vocab"], params: SamplingParams) -> Float32[Tensor, "rows vocab"]:
    """`_weights` of rows with the same settings, on any device."""
    largest = logits.amax(dim=-1, keepdim=True)
    _check_largest(largest)
    if params.temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    keys = (logits - largest) / max(params.temperature, torch.finfo(torch.float32).tiny)
    if 0 < params.top_k < keys.shape[-1]:
        keys = keys.masked_fill(keys < keys.topk(params.top_k, dim=-1).values[:, -1:], -math.inf)
    weights = keys.exp()
    if params.typical_p < 1:
        surprises = -keys.log_softmax(dim=-1)
        entropy = (surprises * weights).nan_to_num(nan=0.0).sum(dim=-1, keepdim=True) / weights.sum(-1, keepdim=True)
        nearness = -(surprises - entropy).abs()
        weights = weights.masked_fill(nearness < _borders(nearness, weights, params.typical_p), 0)
    if params.top_p < 1:
        weights = weights.masked_fill(keys < _borders(keys, weights, params.top_p), 0)
    if params.min_p > 0:
        weights = weights.masked_fill(weights < params.min_p * weights.amax(dim=-1, keepdim=True), 0)
    return weights


def _borders(
    keys: Float32[Tensor, "rows vocab"], weights: Float32[Tensor, "rows vocab"], share: float
) -> Float32[Tensor, "rows 1"]:
    """`_border` of every row, for a share of its weights."""
    order = keys.argsort(dim=-1, descending=True)
    held = weights.gather(-1, order).cumsum(dim=-1, dtype=torch.float64)
    n_before = (held < share * held[:, -1:]).sum(dim=-1, keepdim=True).clamp(max=keys.shape[-1] - 1)
    return keys.gather(-1, order.gather(-1, n_before))


def _draw(weights: Float[Tensor, "rows vocab"], uniform: Float64[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    if weights.device.type == "cpu":
        pairs = zip(weights.numpy(), uniform.tolist(), strict=True)
        return torch.tensor([_draw_row(row, number) for row, number in pairs])
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    # u · total rounds to less than the total for every double u < 1, and the first sum over it belongs to a token
    # that has added something: the index is that of a possible token.
    targets = uniform.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0]


def _draw_row(weights: np.ndarray, uniform: float) -> int:
    """The block of tokens first, then the token in it: a running sum over the vocabulary would take longer."""
    passed = np.add.reduceat(weights, _block_starts(len(weights)), dtype=np.float64).cumsum()
    target = uniform * passed[-1]
    block = int(passed.searchsorted(target, side="right"))
    inside = weights[block * _BLOCK : (block + 1) * _BLOCK].cumsum(dtype=np.float64)
    place = inside.searchsorted(max(target - (passed[block - 1] if block else 0.0), 0.0), side="right")
    if place == len(inside):  # the two sums were rounded differently: the last token that has added something
        place = inside.searchsorted(inside[-1])
    return block * _BLOCK + int(place)


@functools.lru_cache(maxsize=8)
def _block_starts(vocab_size: int) -> np.ndarray:
    return np.arange(0, vocab_size, _BLOCK)


def _check_largest(largest: Tensor | np.floating) -> None:
    """A row's largest logit is finite unless the row has a NaN, a +inf or nothing but −inf."""
    values = torch.as_tensor(largest)
    if bool(torch.isfinite(values).all()):
        return
    if bool((values == -math.inf).any()):
        raise GroundupError(
            "no token may be drawn: the model, the grammar, stop_ids with min_tokens and logit_bias exclude all.",
            "Exclude fewer.",
        )
    raise GroundupError(
        "the model gave logits that are not numbers (NaN or infinite): its weights are damaged, or diverged.",
        "Take an earlier checkpoint, or train again with a lower learning rate.",
    )


_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer: every bit of the result depends on every bit of the value."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _is_real(value: object, least: float, most: float = math.inf) -> bool:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and least <= value <= most  # type: ignore[arg-type,operator]


def _is_whole(value: object, least: int, most: int = 2**63 - 1) -> bool:
    is_number = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return is_number and least <= int(value) <= most  # type: ignore[call-overload]
