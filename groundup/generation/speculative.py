"""Speculative decoding: guess the next tokens cheaply, and let the model check all guesses in one step.

With the target's law p and the draft's law q, both after temperature and filters, a guess x ~ q is kept with
probability min(1, p(x) / q(x)); at the first that is not, the token is drawn from the rest, (p − q)₊ normalized, and
behind guesses that were all kept another is drawn from p (arXiv:2211.17192, algorithm 1; arXiv:2302.01318). What is
written then has the target's law exactly. A guess that is certain (q(x) = 1: a copied token, or a greedy draft) needs
no q: the model's own token is drawn, and guesses are kept as long as they are that token, so even the sample is the
one that plain decoding would draw.

How many tokens are guessed follows from what it costs: the share of guesses that were right lately, α, and the
seconds that plain steps, guesses and their verification take, which are measured all the time. Where no number of
guesses is expected to pay, none is made, but for a try now and then that costs at most a fiftieth of the time.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from statistics import median
from typing import Literal, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from groundup.errors import DataError
from groundup.generation.cache import KVCache
from groundup.generation.request import Text
from groundup.generation.sampling import History, draw, sample, uniforms, warp
from groundup.generation.step import ModelStep, Row, inference_copy
from groundup.model import Transformer

MOST_GUESSES = 8
_ENDINGS = (4, 3, 2)
"""Tokens of an ending that is looked up, the longest first."""
_MARGIN = 1.05
"""Times as fast as without, below which no guess is made."""
_FIRST, _EVERY = 3, 32
"""Steps in the beginning and one of so many later that are plain, so that it is known what they take."""
_TRIED, _TRIES = 2, 0.015
"""Guesses of a try, and the share of the time that tries may cost while no guesses pay."""
_ACCEPTED, _REPLACED, _GUESSED = 1, 2, 3
"""Streams of uniform numbers; plain draws have stream 0."""


class Draft(NamedTuple):
    """Guesses of a text's next tokens.

    Attributes:
        ids: the guesses.
        laws: (n, vocab): probabilities that each was drawn from; None: each is certain.
    """

    ids: list[int]
    laws: Tensor | None = None


class Drafter(Protocol):
    """Makes guesses."""

    def read(self, texts: Sequence[Text]) -> None:
        """Catch up with what was written without it."""
        return

    def propose(self, texts: Sequence[Text], most: Sequence[int]) -> list[Draft]:
        """Up to so many for each text, which was read."""
        ...


def verify(
    target: Float[Tensor, "n_plus_1 vocab"],
    guesses: Sequence[int],
    draft: Float[Tensor, "n vocab"],
    accepted: Float64[Tensor, " n"],
    replaced: Float64[Tensor, " n"],
    last: Float64[Tensor, " 1"],
) -> list[int]:
    """Tokens with the target's law: the guesses that are kept, and one more.

    Args:
        target: log-probabilities behind each guess's predecessor, and behind the last guess.
        guesses: drawn from the draft.
        draft: probabilities that they were drawn from.
        accepted: a uniform number for each guess's verdict.
        replaced: a uniform number for the token instead of each.
        last: a uniform number for the token behind the last.
    """
    for place, guess in enumerate(guesses):
        if float(accepted[place]) * float(draft[place, guess]) < math.exp(float(target[place, guess])):
            continue
        p = target[place].exp()
        rest = (p - draft[place]).clamp(min=0)
        law = rest if rest.sum() > 0 else p  # p = q up to rounding
        return [*guesses[:place], int(draw(law[None], replaced[place : place + 1])[0])]
    return [*guesses, int(draw(target[-1:].exp(), last)[0])]


def verified(text: Text, draft: Draft, logits: Float[Tensor, "n_plus_1 vocab"]) -> list[int]:
    """What a text goes on with: the guesses that are kept, and a token of the model's own."""
    n, first = len(draft.ids), len(text.ids) - text.n_prompt
    params, seeds, positions = [text.params] * (n + 1), [text.seed] * (n + 1), range(first, first + n + 1)
    histories = [_history(text, draft.ids[:place]) for place in range(n + 1)]
    masks = _masks(text, draft.ids)
    if draft.laws is None:
        own = sample(logits, params, seeds, positions, histories, masks).tolist()
        n_kept = next((place for place in range(n) if own[place] != draft.ids[place]), n)
        return own[: n_kept + 1]
    target = warp(logits, params, histories, masks)
    accepted, replaced = (uniforms(seeds[:n], positions[:n], stream) for stream in (_ACCEPTED, _REPLACED))
    return verify(target, draft.ids, draft.laws, accepted, replaced, uniforms(seeds[n:], positions[n:]))


class Speculation:
    """A drafter, how many guesses it is asked for, and what they cost by a clock."""

    def __init__(self, drafter: Drafter, clock: Callable[[], float]) -> None:
        self._drafter, self._clock = drafter, clock
        self._costs: defaultdict[int, _Costs] = defaultdict(_Costs)  # by texts in the batch
        self._rates: WeakKeyDictionary[Text, _Rate] = WeakKeyDictionary()
        self._overall = _Rate()
        self._n_waited, self._wait = 0, 16.0
        self._begin = self._drafted = 0.0
        self._n_texts = self._n_guessed = self._n_kept = 0
        self._is_try = False

    def propose(self, texts: Sequence[Text], room: Sequence[int]) -> list[Draft]:
        """A step begins: guesses for each text, no more than it has room for."""
        self._begin = self._drafted = self._clock()
        self._n_texts, self._n_guessed, self._n_kept, self._is_try = len(texts), 0, 0, False
        costs = self._costs[len(texts)]
        costs.n_steps += 1
        self._n_waited += 1
        if len(costs.plain) < _FIRST or costs.n_steps % _EVERY == 0:
            return [Draft([]) for _ in texts]
        wanted = [min(free, self._n_guesses(text, len(texts))) for text, free in zip(texts, room, strict=True)]
        if not any(wanted):
            return [Draft([]) for _ in texts]
        self._drafter.read([text for text, n in zip(texts, wanted, strict=True) if n])
        start = self._clock()
        drafts = self._drafter.propose(texts, wanted)
        self._drafted = self._clock()
        if n_guesses := max(len(draft.ids) for draft in drafts):
            costs.guess.append((self._drafted - start) / n_guesses)
        return drafts

    def learn(self, text: Text, n_guessed: int, n_kept: int) -> None:
        """How many of a text's guesses were right."""
        self._n_guessed += n_guessed
        self._n_kept += n_kept
        for rate in (self._rate(text), self._overall):
            self._is_try |= rate.best.get(self._n_texts) == 0
            rate.add(n_guessed, n_kept)

    def end(self) -> None:
        """The step is over: what it took."""
        now, costs = self._clock(), self._costs[self._n_texts]
        if not self._n_guessed:
            costs.plain.append(now - self._drafted)
            return
        plain = median(costs.plain)
        costs.check.append((now - self._drafted - plain) / self._n_guessed)
        if self._is_try:  # what it has cost, in plain steps, decides when the next one may be made
            lost = (now - self._begin) / plain - 1 - self._n_kept / self._n_texts
            self._wait, self._n_waited = min(max(lost / _TRIES, 1.0), 512.0), 0

    def _rate(self, text: Text) -> _Rate:
        if (found := self._rates.get(text)) is None:
            found = self._rates[text] = _Rate(self._overall.share)
        return found

    def _n_guesses(self, text: Text, n_texts: int) -> int:
        """The number that is expected to write most tokens a second; now and then some where none would pay."""
        rate = self._rate(text)
        if n_texts not in rate.best:
            rate.best[n_texts] = self._costs[n_texts].best(rate.share, n_texts)
        return rate.best[n_texts] or (_TRIED if self._n_waited >= self._wait else 0)


class _Costs:
    """What the newest steps with so many texts took: seconds of a plain one, of a guess for all texts, of its check.

    The middle one of each counts, since other programs disturb some.
    """

    def __init__(self) -> None:
        self.n_steps = 0
        self.plain, self.guess, self.check = (deque[float](maxlen=9) for _ in range(3))

    def best(self, share: float, n_texts: int) -> int:
        """How many guesses promise most tokens a second, where so large a share of them is right."""
        if not self.check:
            return _TRIED
        plain, each = median(self.plain), median(self.check) + median(self.guess) / n_texts
        best, fastest, expected = 0, _MARGIN * n_texts / plain, 1.0
        for n in range(1, MOST_GUESSES + 1):
            expected += share**n
            if (rate := (n_texts - 1 + expected) / (plain + n * each)) > fastest:
                best, fastest = n, rate
        return best


class _Rate:
    """The share of guesses that were kept, the newest counting most; and the best number, by texts in the batch."""

    def __init__(self, share: float = 0.7) -> None:
        self.share, self.best = share, dict[int, int]()

    def add(self, n_guessed: int, n_kept: int) -> None:
        n_judged = n_kept + (n_kept < n_guessed)  # guesses behind the first wrong one say nothing
        if n_judged:
            weight = 0.9**n_judged
            self.best.clear()
            self.share = weight * self.share + (1 - weight) * n_kept / n_judged


def speculation_with(
    draft: Literal["ngrams"] | int | Transformer | None, step: ModelStep, cache: KVCache, chunk: int, *, is_native: bool
) -> Speculation | None:
    """What an engine with this step and this cache is told of its draft.

    Raises:
        DataError: there is no such draft, or its tokens are others.
    """
    config = cache.config
    drafter: Drafter
    if draft is None:
        return None
    if draft == "ngrams":
        drafter = NGramDrafter()
    elif isinstance(draft, Transformer):
        if draft.config.vocab_size != config.vocab_size:
            raise DataError(
                f"the draft has {draft.config.vocab_size} tokens, the model {config.vocab_size}.",
                "Both must have the same tokenizer.",
            )
        drafter = ModelDrafter(draft, cache, chunk, is_native=is_native)
    elif isinstance(draft, int) and 0 < draft < config.n_layers:
        drafter = EarlyExitDrafter(step, draft)
    else:
        raise DataError(
            f"draft = {draft!r} is no draft.",
            f'Give "ngrams", a model, or a number of blocks from 1 to {config.n_layers - 1}.',
        )
    # On a CPU the thread's own time, in which no other program counts.
    return Speculation(drafter, time.thread_time if cache.device.type == "cpu" else time.perf_counter)


class NGramDrafter(Drafter):
    """Prompt lookup: what followed the last few tokens where they stood before (Saxena, 2023)."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Text, int, dict[tuple[int, ...], int]]] = {}  # by slots, which are few

    def propose(self, texts: Sequence[Text], most: Sequence[int]) -> list[Draft]:
        """Copies of what stands behind the newest earlier place."""
        return [Draft(self._continuation(text)[:n] if n else []) for text, n in zip(texts, most, strict=True)]

    def _continuation(self, text: Text) -> list[int]:
        ids = text.ids
        known, done, places = self._seen.get(text.slot, (text, 0, {}))
        if known is not text:
            done, places = 0, {}
        for end in range(max(done, 1), len(ids)):  # an ending that something follows already
            for size in _ENDINGS:
                if size <= end:
                    places[tuple(ids[end - size : end])] = end
        self._seen[text.slot] = text, len(ids), places
        for size in _ENDINGS:
            if (place := places.get(tuple(ids[-size:]))) is not None and size <= len(ids):
                return ids[place : place + MOST_GUESSES]
        return []


class ModelDrafter(Drafter):
    """A smaller model with the same tokens guesses, over a cache like the engine's."""

    def __init__(self, model: Transformer, like: KVCache, chunk: int, *, is_native: bool) -> None:
        model, config = inference_copy(model), model.config
        self._chunk, self.length = chunk, min(like.length, config.context_length)
        cache = KVCache(config, like.n_slots, self.length, model.compute_dtype, like.device)
        self._step = ModelStep(model, cache, is_native=is_native)
        self._stored: WeakKeyDictionary[Text, tuple[int, list[int]]] = WeakKeyDictionary()

    def read(self, texts: Sequence[Text]) -> None:
        """All but the last two tokens, so that what follows takes the same time whatever was written without it."""
        for text in texts:
            start, last = self._n_stored(text), min(len(text.ids), self.length) - 1
            while last - start > 1:
                end = min(start + self._chunk, last)
                self._step([Row(text.slot, text.ids[start:end], start, 0)])
                start = end
                self._stored[text] = start, []

    def propose(self, texts: Sequence[Text], most: Sequence[int]) -> list[Draft]:
        """Guesses drawn one after the other, for all texts together."""
        most = [min(n, self.length - len(text.ids)) for text, n in zip(texts, most, strict=True)]
        starts = [self._n_stored(text) for text in texts]
        rows = [Row(text.slot, text.ids[start:], start) for text, start in zip(texts, starts, strict=True)]
        drafts = _guess(self._step, texts, rows, most)
        for text, draft in zip(texts, drafts, strict=True):
            if draft.ids:
                self._stored[text] = len(text.ids), draft.ids[:-1]
        return drafts

    def _n_stored(self, text: Text) -> int:
        """Tokens in the draft's cache, those of its guesses that were right among them; at most all but one."""
        n, guesses = self._stored.get(text, (0, []))
        pairs = enumerate(zip(guesses, text.ids[n:], strict=False))
        right = next((place for place, (guess, token) in pairs if guess != token), len(guesses))
        return min(n + right, len(text.ids) - 1)


class EarlyExitDrafter(Drafter):
    """The model's own first blocks guess (self-speculation; arXiv:2404.16710)."""

    def __init__(self, step: ModelStep, n_layers: int) -> None:
        self._step, self._n_layers = step, n_layers

    def propose(self, texts: Sequence[Text], most: Sequence[int]) -> list[Draft]:
        """Guesses drawn one after the other; what they store is stored again when they are verified."""
        rows = [Row(text.slot, text.ids[-1:], text.n_stored) for text in texts]
        return _guess(self._step, texts, rows, most, self._n_layers)


def _guess(
    step: ModelStep, texts: Sequence[Text], rows: Sequence[Row], most: Sequence[int], n_layers: int | None = None
) -> list[Draft]:
    """Up to so many guesses for each text, behind a row that is not stored yet."""
    drafts = [Draft([]) for _ in texts]
    if not (places := [place for place, n in enumerate(most) if n > 0]):
        return drafts
    own, unread, limits = [texts[i] for i in places], [rows[i] for i in places], [most[i] for i in places]
    params, n = [text.params for text in own], max(limits)
    seeds = [text.seed for text in own for _ in range(n)]
    positions = [len(text.ids) - text.n_prompt + i for text in own for i in range(n)]
    uniform = uniforms(seeds, positions, _GUESSED).view(-1, n)
    found = None
    if not any(text.history is not None or text.params.logit_bias for text in own):
        found = step.guess(unread, limits, params, uniform, n_layers)
    tokens, laws = found or _guess_in_turn(step, own, unread, limits, uniform, n_layers)
    for number, place in enumerate(places):
        law = None if laws is None or not params[number].temperature else laws[number][: limits[number]]
        drafts[place] = Draft(tokens[number], law)
    return drafts


def _guess_in_turn(
    step: ModelStep,
    texts: Sequence[Text],
    rows: list[Row],
    most: Sequence[int],
    uniform: Float64[Tensor, "texts most"],
    n_layers: int | None,
) -> tuple[list[list[int]], list[Tensor]]:
    """Step by step, with whatever may change a law."""
    tokens: list[list[int]] = [[] for _ in texts]
    laws: list[list[Tensor]] = [[] for _ in texts]
    for place in range(max(most)):
        active = [number for number, n in enumerate(most) if n > place]
        logits = step([rows[number] for number in active], n_layers)
        histories = [_history(texts[number], tokens[number]) for number in active]
        drawn = warp(logits, [texts[number].params for number in active], histories).exp()
        ids = draw(drawn, uniform[active, place]).tolist()
        for number, token, law in zip(active, ids, drawn, strict=True):
            tokens[number].append(token)
            laws[number].append(law)
            rows[number] = Row(rows[number].slot, [token], rows[number].start + len(rows[number].ids))
    return tokens, [torch.stack(law) for law in laws]


def _masks(text: Text, guesses: Sequence[int]) -> list[Tensor | None]:
    """What a grammar allows behind each guess; nothing needs to be known behind one that it forbids, or an end."""
    if text.matcher is None:
        return [None] * (len(guesses) + 1)
    masks: list[Tensor | None] = [(mask := text.matcher.mask())]
    for guess in guesses:
        if guess in text.ends or not mask[guess]:
            break
        text.matcher.advance(guess)
        masks.append(mask := text.matcher.mask())
    text.matcher.rollback(len(masks) - 1)
    return masks + [None] * (len(guesses) + 1 - len(masks))


def _history(text: Text, guesses: Sequence[int]) -> History | None:
    return None if text.history is None else text.history.after(guesses)
