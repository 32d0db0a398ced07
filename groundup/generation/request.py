"""A prompt and how it is to be continued, and each of its texts while it is written."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from groundup.generation.detokenizer import Detokenizer
from groundup.generation.grammar import Matcher
from groundup.generation.params import SamplingParams
from groundup.generation.sampling import History, TokenLogprob, request_seed
from groundup.generation.slots import Lease
from groundup.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass
class Generation:
    """What was written for one prompt.

    Attributes:
        ids: new tokens; a stop token is left out, the tokens of a stop text are not.
        finish_reason: "stop": a stop token or text; "length": max_tokens or the context's end; "cancelled".
        text: filled in where a tokenizer is at hand; ends before the stop text.
        logprobs: of every new token, where they were asked for.
        prompt_logprobs: of the prompt's tokens from the second on, where they were asked for.
        offsets: of each token in the text, in characters, where a tokenizer is at hand.
        guesses: of each new token: what a draft had guessed to stand there. Where its first is another token, all of
            them were thrown away.
        score: of `beam_search`, and of `best_of` the mean log-probability, that of the stop token included.
        end_id: the stop token that ended it, or None; `end_logprob`: its log-probability, where they were asked for.
    """

    ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    guesses: list[tuple[int, ...]] = field(default_factory=list, compare=False)
    score: float = 0.0
    end_id: int | None = None
    end_logprob: float = math.nan

    @property
    def n_tokens(self) -> int:
        """Number of new tokens."""
        return len(self.ids)


@dataclass(frozen=True)
class Chunk:
    """What became certain of one text in one step.

    Attributes:
        index: which of the request's `n` texts.
        text: of the tokens, as far as later ones cannot change it.
        ids: new tokens.
        logprobs: of them, where they were asked for.
        finish_reason: of the text's last chunk.
        guesses: of each of them, as in `Generation`.
    """

    index: int
    text: str
    ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    guesses: tuple[tuple[int, ...], ...] = ()


@dataclass(eq=False)
class Request:
    """A prompt and how it is to be continued; the engine fills in the results.

    Attributes:
        ids: the prompt.
        params: how tokens are drawn.
        seed: instead of `params.seed`.
        client: whose request it is: the engine is fair between clients, and none can use another's prefixes.
        slides: go on past the context's end, reading the last half again, instead of finishing with "length".
        shown: names of control tokens that stand in the text where they are written, such as those of tool calls.
        prompt_logprobs: number of alternatives to report for the prompt's own tokens; None: they are not scored.
        results: `params.n` texts, when all are finished.
        error: why they are not whole.
    """

    ids: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    seed: int | None = None
    client: str = ""
    slides: bool = False
    shown: Collection[str] = ()
    prompt_logprobs: int | None = None
    results: list[Generation] = field(default_factory=list, init=False)
    error: Exception | None = field(default=None, init=False)
    _texts: list[Text] = field(default_factory=list, init=False, repr=False)
    _on_chunk: Callable[[Chunk | None], object] | None = field(default=None, init=False, repr=False)
    _number: int = field(default=0, init=False, repr=False)
    _finished: threading.Event = field(default_factory=threading.Event, init=False, repr=False)

    @property
    def is_finished(self) -> bool:
        """All its texts are finished, or it failed."""
        return self._finished.is_set()


class Text:
    """One of a request's texts, while it is written.

    Attributes:
        ids: prompt and output.
        offset: where in them the part begins that the model reads; not 0 after sliding.
        n_stored: tokens of that part whose entries stand in the cache.
        lease: its part of the cache; None while it waits.
        has_begun: it had a part of the cache at some time.
    """

    def __init__(
        self, request: Request, index: int, ends: Collection[int], tokenizer: Tokenizer | None, vocab_size: int
    ) -> None:
        params = request.params
        self.request, self.index, self.params = request, index, params
        self.ids, self.n_prompt, self.offset, self.n_stored = list(request.ids), len(request.ids), 0, 0
        self.seed = request_seed(params.seed if request.seed is None else request.seed, index)
        self.ends = frozenset(ends)
        self.matcher: Matcher | None = None
        if params.constraint is not None and tokenizer is not None:
            self.matcher = params.constraint.compile(tokenizer, vocab_size)
            self.ends |= tokenizer.end_ids  # a text that is complete has to end
        self.history = History(request.ids, self.ends) if params.needs_history else None
        self.detokenizer = None if tokenizer is None else Detokenizer(tokenizer, params.stop, request.shown)
        self.wants_logprobs = params.logprobs is not None or (params.best_of or params.n) > params.n
        self.lease: Lease | None = None
        self.has_begun = False
        self.result = Generation()
        self.is_finished = False
        self._told = 0
        self._piece = ""

    @property
    def slot(self) -> int:
        """Of the cache."""
        assert self.lease is not None
        return self.lease.slot

    @property
    def unread(self) -> list[int]:
        """Tokens that are not stored."""
        return self.ids[self.offset + self.n_stored :]

    @property
    def is_writing(self) -> bool:
        """All but the newest token are stored, and that one was drawn, or is the last of the prompt."""
        return len(self.ids) - self.offset - self.n_stored == 1 and len(self.ids) > self.n_prompt

    def take(self, token: int, logprob: TokenLogprob | None, guesses: Sequence[int] = ()) -> None:
        """The next token, and what a draft had guessed."""
        result = self.result
        if token in self.ends:
            result.end_id, result.end_logprob = token, math.nan if logprob is None else logprob.logprob
            self.finish("stop")
            return
        result.ids.append(token)
        result.guesses.append(tuple(guesses))
        self.ids.append(token)
        if logprob is not None:
            result.logprobs.append(logprob)
        if self.history is not None:
            self.history.add(token)
        if self.matcher is not None:
            self.matcher.advance(token)
        if self.detokenizer is not None:
            self._piece += self.detokenizer.add(token)
        if self.detokenizer is not None and self.detokenizer.stopped:
            self.finish("stop")
        elif len(result.ids) >= self.params.max_tokens:
            self.finish("stop" if self.matcher is not None and self.matcher.is_complete else "length")

    def finish(self, reason: FinishReason) -> None:
        """No token follows."""
        self.result.finish_reason, self.is_finished = reason, True
        if self.detokenizer is not None:
            self._piece += self.detokenizer.finish()
            self.result.text, self.result.offsets = self.detokenizer.text, self.detokenizer.offsets

    def chunk(self) -> Chunk | None:
        """What is new since the last call."""
        result, told = self.result, self._told
        if not self.is_finished and len(result.ids) == told:
            return None
        self._told = len(result.ids)
        piece, self._piece = self._piece, ""
        reason = result.finish_reason if self.is_finished else None
        new = slice(told, None)
        ids, logprobs, guesses = tuple(result.ids[new]), tuple(result.logprobs[new]), tuple(result.guesses[new])
        return Chunk(self.index, piece, ids, logprobs, reason, guesses)
