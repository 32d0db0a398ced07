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

import copy
import functools
import math
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int
from torch import Tensor

from groundup.errors import ArtifactError, GroundupError
from groundup.generation.params import SamplingParams

_BLOCK = 128  # tokens that are summed at once before a draw looks inside
_TOGETHER = 4  # rows without filters that are faster together than in turn
_COLDEST = 1e-30  # a temperature at which no difference of logits is too small, and no quotient overflows
_WORD, _GAMMA = 2**64 - 1, 0x9E3779B97F4A7C15  # SplitMix64's


class History:
    """What penalties and `min_tokens` need of one request's tokens.

    Args:
        prompt: its tokens.
        ends: tokens that end the text; none is drawn before `min_tokens` are written.
    """

    def __init__(self, prompt: Sequence[int] = (), ends: Collection[int] = ()) -> None:
        self._ends = sorted(ends)
        self._counts = dict.fromkeys(prompt, 0)  # of the tokens of prompt and output, how often each is in the output
        self.n_written = 0

    def add(self, token: int) -> None:
        """The next token of the output."""
        self._counts[token] = self._counts.get(token, 0) + 1
        self.n_written += 1

    def after(self, tokens: Iterable[int]) -> History:
        """Another history, with these tokens added: of a draft that is not yet accepted."""
        other = copy.copy(self)
        other._counts = dict(self._counts)
        for token in tokens:
            other.add(token)
        return other

    def penalize(self, logits: np.ndarray, params: SamplingParams) -> None:
        """Change a row of logits, float32 (vocab,), in place."""
        size = len(self._counts)
        ids, counts = np.fromiter(self._counts, np.int64, size), np.fromiter(self._counts.values(), np.float32, size)
        values = logits[ids]
        if params.repetition_penalty != 1:
            penalty = params.repetition_penalty
            values = np.where(values > 0, values / penalty, values * penalty)
        logits[ids] = values - params.frequency_penalty * counts - params.presence_penalty * np.minimum(counts, 1)
        if self.n_written < params.min_tokens:
            logits[[*self._ends, *params.stop_ids]] = -math.inf


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
    rows = [params] * len(logits) if isinstance(params, SamplingParams) else params
    changed = _adjusted(logits, rows, histories, masks)
    if logits.device.type != "cpu":
        logits = _whole(logits, changed)
        if any(own.temperature for own in rows):
            return draw(_weights(logits, rows), uniforms(seeds, positions))
        best = logits.argmax(dim=-1)
        _check(logits.gather(-1, best[:, None]).flatten().tolist())  # a NaN counts as the largest
        return best
    array, tokens = logits.detach().float().numpy(), np.empty(len(rows), np.int64)
    greedy = [row for row, own in enumerate(rows) if own.temperature == 0 and row not in changed]
    if greedy:
        tokens[greedy] = (array if len(greedy) == len(rows) else array[greedy]).argmax(axis=-1)
        _check(array[greedy, tokens[greedy]].tolist())
    if len(greedy) < len(rows):
        uniform = uniforms(seeds, positions).numpy()
        together = [row for row, own in enumerate(rows) if not own.has_filters and row not in changed]
        if len(together) < _TOGETHER:
            together = []
        weights = np.empty(logits.shape[-1], np.float32)  # of one row: it stays in the cache
        for row in sorted(set(range(len(rows))).difference(greedy, together)):
            _weigh_row(changed.get(row, array[row]), rows[row], weights)
            tokens[row] = _draw_row(weights, uniform[row])
        if together:
            temperatures = [rows[row].temperature for row in together]
            same = array if len(together) == len(rows) else array[together]
            tokens[together] = _draw_rows(same, temperatures, uniform[together])
    return torch.from_numpy(tokens)


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
    rows = [params] * len(logits) if isinstance(params, SamplingParams) else params
    weights = _weights(_whole(logits, _adjusted(logits, rows, histories, masks)), rows)
    return (weights / weights.sum(dim=-1, keepdim=True)).log()


def draw(weights: Float[Tensor, "rows vocab"], uniform: Float64[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """The token at which the running sum of each row's weights passes its uniform number of [0, 1) times their sum."""
    if weights.device.type == "cpu":
        return torch.tensor([_draw_row(row, u) for row, u in zip(weights.numpy(), uniform.tolist(), strict=True)])
    sums = weights.cumsum(dim=-1, dtype=torch.float64)
    # u · total rounds to less than the total for every double u < 1, and the first sum over it belongs to a token
    # that has added something: the index is that of a possible token.
    return torch.searchsorted(sums, uniform[:, None].to(sums) * sums[:, -1:], right=True)[:, 0]


def uniforms(seeds: Sequence[int], positions: Sequence[int], stream: int = 0) -> Float64[Tensor, " rows"]:
    """Numbers of [0, 1), each a function of a seed and a position (SplitMix64, doi:10.1145/2714064.2660195).

    Args:
        seeds: of requests, from 0 to 2^63 − 1.
        positions: of tokens in the requests' outputs.
        stream: 0 to 3: independent numbers for one token, such as its draft's, the verdict's and its replacement's.
    """
    if len(seeds) > 8:  # the same on arrays, which wrap around by themselves
        every = np.array(seeds, np.uint64), np.array(positions, np.uint64)
        return torch.from_numpy((_mix(_mix(every[0] + _GAMMA) + _GAMMA * (4 * every[1] + stream + 1)) >> 11) * 2.0**-53)
    pairs = zip(seeds, positions, strict=True)
    hashes = [_mix(_mix(seed + _GAMMA) + _GAMMA * (4 * position + stream + 1)) for seed, position in pairs]
    return torch.tensor([(value >> 11) * 2.0**-53 for value in hashes], dtype=torch.float64)


def request_seed(seed: int | None, index: int = 0) -> int:
    """The seed of a request's `index`-th text: the first has the request's own; without one, another each time."""
    if seed is None:
        return secrets.randbits(63)
    return seed if index == 0 else _mix(_mix(seed) + index) >> 1


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
    if not n_top:
        return [TokenLogprob(token, logprob, ()) for token, logprob in zip(tokens, drawn, strict=True)]
    best = logits.topk(min(n_top, logits.shape[-1]), dim=-1)
    found = []
    for token, logprob, ids, values in zip(
        tokens, drawn, best.indices.tolist(), (best.values - totals).tolist(), strict=True
    ):
        if token not in ids and logprob >= values[-1]:
            ids[-1] = token  # of several that tie for the last place, the one that was drawn
        found.append(TokenLogprob(token, logprob, tuple(zip(ids, values, strict=True))))
    return found


def _adjusted(
    logits: Float[Tensor, "rows vocab"],
    rows: Sequence[SamplingParams],
    histories: Sequence[History | None] | None,
    masks: Sequence[Bool[Tensor, " vocab"] | None] | None,
) -> dict[int, np.ndarray]:
    """The rows that bias, penalties and masks change, float32 (vocab,), by their numbers."""
    changed = {}
    for number, params in enumerate(rows):
        mask = masks[number] if masks else None
        if not (params.logit_bias or params.needs_history or mask is not None):
            continue
        changed[number] = row = logits[number].detach().to("cpu", torch.float32, copy=True).numpy()
        if params.logit_bias:
            ids, bias = params.bias
            row[ids] += bias
        if params.needs_history:
            history = histories[number] if histories else None
            assert history is not None, "penalties and min_tokens need a history"
            history.penalize(row, params)
        if mask is not None:
            row[~mask.numpy()] = -math.inf
    return changed


def _whole(logits: Float[Tensor, "rows vocab"], changed: Mapping[int, np.ndarray]) -> Float32[Tensor, "rows vocab"]:
    """Logits with rows that were changed in their places."""
    whole = logits.detach().to(torch.float32, copy=bool(changed))
    for number, row in changed.items():
        whole[number] = torch.from_numpy(row)
    return whole


def _weights(logits: Float32[Tensor, "rows vocab"], params: Sequence[SamplingParams]) -> Float32[Tensor, "rows vocab"]:
    """Each token's probability over the most probable one's; 0 for tokens that cannot be drawn."""
    weights = torch.empty_like(logits)
    if logits.device.type == "cpu":
        for row, own, target in zip(logits.numpy(), params, weights.numpy(), strict=True):
            _weigh_row(row, own, target)
        return weights
    alike: dict[tuple[float, ...], list[int]] = {}
    for number, own in enumerate(params):
        alike.setdefault((own.temperature, own.top_k, own.typical_p, own.top_p, own.min_p), []).append(number)
    for rows in alike.values():
        where = torch.tensor(rows, device=logits.device)
        weights[where] = _weigh_batch(logits[where], params[rows[0]])
    return weights


def _weigh_batch(logits: Float32[Tensor, "rows vocab"], params: SamplingParams) -> Float32[Tensor, "rows vocab"]:
    """`_weights` of rows with the same settings, on any device."""
    largest = logits.amax(dim=-1, keepdim=True)
    _check(largest.flatten().tolist())
    if params.temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    # The largest becomes 0 first, so that a temperature near 0 cannot make infinities of both signs.
    keys = (logits - largest) / max(params.temperature, _COLDEST)
    if 0 < params.top_k < keys.shape[-1]:
        keys = keys.masked_fill(keys < keys.topk(params.top_k, dim=-1).values[:, -1:], -math.inf)
    weights = keys.exp()

    def keep_mass(keys: Tensor, share: float) -> Tensor:
        order = keys.argsort(dim=-1, descending=True)
        held = weights.gather(-1, order).cumsum(dim=-1, dtype=torch.float64)
        last = (held < share * held[:, -1:]).sum(dim=-1, keepdim=True).clamp(max=keys.shape[-1] - 1)
        return weights.masked_fill(keys < keys.gather(-1, order.gather(-1, last)), 0)

    if params.typical_p < 1:
        surprises = -keys.log_softmax(dim=-1)
        entropy = (surprises * surprises.neg().exp()).nan_to_num(nan=0.0).sum(dim=-1, keepdim=True)
        weights = keep_mass(-(surprises - entropy).abs(), params.typical_p)
    if params.top_p < 1:
        weights = keep_mass(keys, params.top_p)
    if params.min_p > 0:
        weights = weights.masked_fill(weights < params.min_p * weights.amax(dim=-1, keepdim=True), 0)
    return weights


def _weigh_row(logits: np.ndarray, params: SamplingParams, weights: np.ndarray) -> None:
    """`_weigh_batch` for one row on the CPU: without a sort of the vocabulary, and bit for bit as in any batch."""
    largest = logits.max()
    _check([float(largest)])
    if params.temperature == 0:
        weights.fill(0)
        weights[logits.argmax()] = 1
        return
    keys = logits - largest
    if params.temperature != 1:
        keys /= max(params.temperature, _COLDEST)
    np.exp(keys, out=weights)
    if 0 < params.top_k < len(keys):
        near = keys[keys >= -8] if len(keys) > 4096 else keys  # most often the k nearest are among them
        near = near if len(near) >= params.top_k else keys
        weights *= keys >= np.partition(near, -params.top_k)[-params.top_k]
    if params.typical_p < 1:
        total = weights.sum()
        surprises = np.log(total) - keys
        entropy = weights.dot(np.where(weights > 0, surprises, 0)) / total  # 0 · inf is no number
        nearness = -np.abs(surprises - entropy)
        weights *= nearness >= _border(nearness, weights, params.typical_p * total)
    if params.top_p < 1:
        weights *= keys >= _border(keys, weights, params.top_p * weights.sum())
    if params.min_p > 0:
        weights *= weights >= params.min_p * weights.max()


def _border(keys: np.ndarray, weights: np.ndarray, mass: float) -> np.floating:
    """The key of the last token that is needed to hold a mass, taking tokens from the largest key down.

    A sort of the whole vocabulary would take longer than a step of a small model. So a band below the largest key
    is widened until it holds the mass, then halved around the border, and only the tokens in it are sorted.

    Args:
        keys: (vocab,) float32, in nats.
        weights: (vocab,) float32.
        mass: a sum of weights.
    """
    best, width, before = keys.max(), 8.0, 0.0
    band = keys >= best - width
    while weights.dot(band) < mass and width < 256:  # further down all weights are 0
        width *= 2
        band = keys >= best - width
    above, below = best + 1, best - width
    for _ in range(12):
        if np.count_nonzero(band) <= 1024:
            break
        middle = (above + below) / 2
        held = weights.dot(keys >= middle)
        above, below, before = (above, middle, before) if held >= mass else (middle, below, held)
        band = (keys < above) & (keys >= below)
    keys, weights = keys[band], weights[band]
    order = np.argsort(-keys)
    sums = weights[order].cumsum(dtype=np.float64)
    return keys[order[min(int(sums.searchsorted(mass - before)), len(keys) - 1)]]


def _draw_row(weights: np.ndarray, uniform: float) -> int:
    """First the block of tokens, then the token in it: a running sum over the vocabulary would take longer."""
    sums = np.add.reduceat(weights, _block_starts(len(weights))).cumsum(dtype=np.float64)
    target = uniform * sums[-1]
    block = int(sums.searchsorted(target, side="right"))
    inside = weights[block * _BLOCK : (block + 1) * _BLOCK].cumsum(dtype=np.float64)
    place = inside.searchsorted(max(target - (sums[block - 1] if block else 0.0), 0.0), side="right")
    if place == len(inside):  # the two sums were rounded differently: the last token that has added something
        place = inside.searchsorted(inside[-1])
    return block * _BLOCK + int(place)


def _draw_rows(logits: np.ndarray, temperatures: Sequence[float], uniform: np.ndarray) -> np.ndarray:
    """`_weigh_row` and `_draw_row` of rows without filters, to the bit."""
    n, vocab_size = logits.shape
    largest = logits.max(axis=-1, keepdims=True)
    _check(largest[:, 0].tolist())
    blocks = np.zeros((n, -(-vocab_size // _BLOCK), _BLOCK), np.float32)
    weights = blocks.reshape(n, -1)[:, :vocab_size]
    np.subtract(logits, largest, out=weights)
    if any(temperature != 1 for temperature in temperatures):
        weights /= np.maximum(np.array(temperatures, np.float32), _COLDEST)[:, None]
    np.exp(weights, out=weights)
    sums = np.add.reduceat(weights, _block_starts(vocab_size), axis=-1).cumsum(axis=-1, dtype=np.float64)
    target, rows = uniform * sums[:, -1], np.arange(n)
    block = (sums <= target[:, None]).sum(axis=-1)
    inside = blocks[rows, block].cumsum(axis=-1, dtype=np.float64)
    target = np.maximum(target - np.where(block, sums[rows, block - 1], 0), 0)
    return block * _BLOCK + np.minimum((inside <= target[:, None]).sum(axis=-1), (inside < inside[:, -1:]).sum(axis=-1))


@functools.lru_cache(maxsize=8)
def _block_starts(vocab_size: int) -> np.ndarray:
    return np.arange(0, vocab_size, _BLOCK)


def _check(largest: Sequence[float]) -> None:
    """A row's largest logit is finite unless the row has a NaN, a +inf or nothing but −inf."""
    if -math.inf in largest:
        raise GroundupError(
            "no token may be drawn: the model's logits, logit_bias, min_tokens and the grammar together exclude all.",
            "Exclude fewer.",
        )
    if not all(map(math.isfinite, largest)):
        raise ArtifactError(
            "the model gave logits that are not numbers (NaN or infinite): its weights are damaged, or diverged.",
            "Take an earlier checkpoint, or train again with a lower learning rate.",
        )


def _mix(value: Any) -> Any:
    """SplitMix64's finalizer: each bit of the result depends on each of the value's lower 64 bits."""
    value = value & _WORD
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _WORD
    return value ^ (value >> 31)
