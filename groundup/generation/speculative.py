"""Speculative decoding: guess the next tokens cheaply, and let the model check all guesses in one step.

With the target's law p and the draft's law q, both after temperature and filters, a guess x ~ q is kept with
probability min(1, p(x) / q(x)); at the first that is not, the token is drawn from the rest, (p − q)₊ normalized, and
behind guesses that were all kept another is drawn from p (arXiv:2211.17192, algorithm 1; arXiv:2302.01318). What is
written then has the target's law exactly. A guess that is certain (q(x) = 1: a copied token, or a greedy draft) needs
no q: the model's own token is drawn, and guesses are kept as long as they are that token, so even the sample is the
one that plain decoding would draw.

How many tokens are guessed follows from what it costs: the share of guesses that were right lately, α, and the time
of a step with so many tokens, which is measured. Where no number of guesses is expected to pay, none is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
_ACCEPTED, _REPLACED, _GUESSED = 1, 2, 3
"""Streams of uniform numbers; plain draws have stream 0."""


class Draft(NamedTuple):
    """Guesses of a text's next tokens.

    Attributes:
        ids: the guesses.
        logprobs: (n, vocab): of the law that each was drawn from; None: each is certain.
    """

    ids: list[int]
    logprobs: Tensor | None = None


class Drafter(Protocol):
    """Makes guesses."""

    def propose(self, texts: Sequence[Text], most: Sequence[int]) -> list[Draft]:
        """Up to so many for each text."""
        ...

    def seconds(self, n_texts: int) -> float:
        """What one guess for each of so many texts takes."""
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
        draft: log-probabilities that they were drawn from.
        accepted: a uniform number for each guess's verdict.
        replaced: a uniform number for the token instead of each.
        last: a uniform number for the token behind the last.
    """
    for place, guess in enumerate(guesses):
        p, q = target[place].double().exp(), draft[place].double().exp()
        if accepted[place] * q[guess] < p[guess]:
            continue
        rest = (p - q).clamp(min=0)
        law = rest if rest.sum() > 0 else p  # p = q up to rounding
        return [*guesses[:place], int(draw(law[None], replaced[place : place + 1])[0])]
    return [*guesses, int(draw(target[-1:].exp(), last)[0])]


def verified(text: Text, draft: Draft, logits: Float[Tensor, "n_plus_1 vocab"]) -> list[int]:
    """What a text goes on with: the guesses that are kept, and a token of the model's own."""
    n, first = len(draft.ids), len(text.ids) - text.n_prompt
    params, seeds, positions = [text.params] * (n + 1), [text.seed] * (n + 1), range(first, first + n + 1)
    histories = [_history(text, draft.ids[:place]) for place in range(n + 1)]
    masks = _masks(text, draft.ids)
    if draft.logprobs is None:
        own = sample(logits, params, seeds, positions, histories, masks).tolist()
        n_kept = next((place for place in range(n) if own[place] != draft.ids[place]), n)
        return own[: n_kept + 1]
    target = warp(logits, params, histories, masks)
    accepted, replaced = (uniforms(seeds[:n], positions[:n], stream) for stream in (_ACCEPTED, _REPLACED))
    return verify(target, draft.ids, draft.logprobs, accepted, replaced, uniforms(seeds[n:], positions[n:]))


class Speculation:
    """A drafter, and how many guesses it is asked for.

    Args:
        drafter: makes the guesses.
        seconds: of the target's step with so many tokens.
    """

    def __init__(self, drafter: Drafter, seconds: Callable[[int], float]) -> None:
        self._drafter, self._seconds = drafter, seconds
        self._rates: WeakKeyDictionary[Text, _Rate] = WeakKeyDictionary()
        self._overall = _Rate()

    def propose(self, texts: Sequence[Text], room: Sequence[int]) -> list[Draft]:
        """Guesses for each text, no more than it has room for."""
        wanted = [min(free, self._n_guesses(text, len(texts))) for text, free in zip(texts, room, strict=True)]
        if not any(wanted):
            return [Draft([]) for _ in texts]
        return self._drafter.propose(texts, wanted)

    def learn(self, text: Text, n_guessed: int, n_kept: int) -> None:
        """How many of a text's guesses were right."""
        for rate in (self._rate(text), self._overall):
            rate.add(n_guessed, n_kept)

    def _rate(self, text: Text) -> _Rate:
        if (found := self._rates.get(text)) is None:
            found = self._rates[text] = _Rate(self._overall.share)
        return found

    def _n_guesses(self, text: Text, n_texts: int) -> int:
        """The number that is expected to write most tokens a second; now and then one where none would pay."""
        rate = self._rate(text)
        if n_texts not in rate.best:
            rate.best[n_texts] = self._best(rate.share, n_texts)
        return rate.best[n_texts] or rate.try_again()

    def _best(self, share: float, n_texts: int) -> int:
        plain = n_texts / self._seconds(n_texts)
        best, fastest = 0, plain * _MARGIN
        expected = 1.0
        for n in range(1, MOST_GUESSES + 1):
            expected += share**n
            seconds = self._seconds(n_texts + n) + n * self._drafter.seconds(n_texts) / n_texts
            if (n_texts - 1 + expected) / seconds > fastest:
                best, fastest = n, (n_texts - 1 + expected) / seconds
        return best


class _Rate:
    """The share of guesses that were kept, the newest counting most; and the best number, by texts in the batch."""

    def __init__(self, share: float = 0.7) -> None:
        self.best: dict[int, int] = {}
        self.share, self._n_waited, self._wait = share, 0, 16

    def add(self, n_guessed: int, n_kept: int) -> None:
        n_judged = n_kept + (n_kept < n_guessed)  # guesses behind the first wrong one say nothing
        if n_judged:
            weight = 0.9**n_judged
            self.best.clear()
            self.share = weight * self.share + (1 - weight) * n_kept / n_judged
            self._wait = 16 if n_kept == n_guessed else min(256, self._wait * 2)

    def try_again(self) -> int:
        self._n_waited += 1
        if self._n_waited < self._wait:
            return 0
        self._n_waited = 0
        return 2


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
    return Speculation(drafter, step.seconds)


class NGramDrafter:
    """Prompt lookup: what followed the last few tokens where they stood before (Saxena, 2023)."""

    def __init__(self) -> None:
        self._seen: WeakKeyDictionary[Text, tuple[int, dict[tuple[int, ...], int]]] = WeakKeyDictionary()

    def propose(self, texts: Sequence[Text], most: Sequence[int]) -> list[Draft]:
        """Copies of what stands behind the newest earlier place."""
        return [Draft(self._continuation(text)[:n] if n else []) for text, n in zip(texts, most, strict=True)]

    def seconds(self, n_texts: int) -> float:
        """Next to nothing."""
        return 0.0

    def _continuation(self, text: Text) -> list[int]:
        ids = text.ids
        done, places = self._seen.get(text, (0, {}))
        for end in range(max(done, 1), len(ids)):  # an ending that something follows already
            for size in _ENDINGS:
                if size <= end:
                    places[tuple(ids[end - size : end])] = end
        self._seen[text] = len(ids), places
        for size in _ENDINGS:
            if (place := places.get(tuple(ids[-size:]))) is not None and size <= len(ids):
                return ids[place : place + MOST_GUESSES]
        return []


class ModelDrafter:
    """A smaller model with the same tokens guesses, over a cache like the engine's."""

    def __init__(self, model: Transformer, like: KVCache, chunk: int, *, is_native: bool) -> None:
        model, config = inference_copy(model), model.config
        self._chunk, self.length = chunk, min(like.length, config.context_length)
        cache = KVCache(config, like.n_slots, self.length, model.compute_dtype, like.device)
        self._step = ModelStep(model, cache, is_native=is_native)
        self._stored: WeakKeyDictionary[Text, list[int]] = WeakKeyDictionary()

    def seconds(self, n_texts: int) -> float:
        """Of a step of the draft."""
        return self._step.seconds(n_texts)

    def propose(self, texts: Sequence[Text], most: Sequence[int]) -> list[Draft]:
        """Guesses drawn one after the other, for all texts together."""
        rooms = [min(n, self.length - len(text.ids)) for text, n in zip(texts, most, strict=True)]
        rows = [self._unread(text) if n > 0 else None for text, n in zip(texts, rooms, strict=True)]
        drafts = _guess(self._step, texts, rows, rooms)
        for text, draft in zip(texts, drafts, strict=True):
            if draft.ids:
                self._stored[text] = [*text.ids, *draft.ids[:-1]]
        return drafts

    def _unread(self, text: Text) -> Row:
        """What the draft has not read of a text, less whole chunks, which are read here."""
        stored = self._stored.get(text, [])
        start = next(
            (place for place, (a, b) in enumerate(zip(stored, text.ids, strict=False)) if a != b),
            min(len(stored), len(text.ids)),
        )
        start = min(start, len(text.ids) - 1)
        while len(text.ids) - start > self._chunk:
            self._step([Row(text.slot, text.ids[start : start + self._chunk], start, 0)])
            start += self._chunk
        return Row(text.slot, text.ids[start:], start)


class EarlyExitDrafter:
    """The model's own first blocks guess (self-speculation; arXiv:2404.16710)."""

    def __init__(self, step: ModelStep, n_layers: int) -> None:
        self._step, self._n_layers, self._share = step, n_layers, step.share_of(n_layers)

    def seconds(self, n_texts: int) -> float:
        """Of a step of these blocks."""
        return self._share * self._step.seconds(n_texts)

    def propose(self, texts: Sequence[Text], most: Sequence[int]) -> list[Draft]:
        """Guesses drawn one after the other; what they store is stored again when they are verified."""
        rows = [Row(text.slot, text.ids[-1:], text.n_stored) for text in texts]
        return _guess(self._step, texts, rows, most, self._n_layers)


def _guess(
    step: ModelStep,
    texts: Sequence[Text],
    rows: Sequence[Row | None],
    most: Sequence[int],
    n_layers: int | None = None,
) -> list[Draft]:
    """Guess up to so many tokens for each text, beginning with rows that are not stored yet."""
    guesses: list[list[int]] = [[] for _ in texts]
    laws: list[list[Tensor]] = [[] for _ in texts]
    active = {place: row for place, (row, n) in enumerate(zip(rows, most, strict=True)) if row is not None and n > 0}
    while active:
        logits = step(list(active.values()), n_layers)
        histories = [_history(texts[place], guesses[place]) for place in active]
        logprobs = warp(logits, [texts[place].params for place in active], histories)
        seeds = [texts[place].seed for place in active]
        positions = [len(texts[place].ids) - texts[place].n_prompt + len(guesses[place]) for place in active]
        tokens = draw(logprobs.exp(), uniforms(seeds, positions, _GUESSED)).tolist()
        for number, (place, token) in enumerate(zip(list(active), tokens, strict=True)):
            guesses[place].append(token)
            laws[place].append(logprobs[number])
            row = active.pop(place)
            if len(guesses[place]) < most[place]:
                active[place] = Row(row.slot, [token], row.start + len(row.ids))
    return [
        Draft(ids, torch.stack(law) if law and text.params.temperature else None)
        for text, ids, law in zip(texts, guesses, laws, strict=True)
    ]


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
