"""One engine that makes tokens, for everything that wants them: chat, server, rollouts, evaluation.

    results = Engine(model, tokenizer).run([Request(ids, SamplingParams(temperature=0))])      # rollouts, evaluation
    for chunk in engine.stream(request): print(chunk.text, end="")                             # chat
    async for chunk in engine.astream(request): …                                              # server

Requests join and leave the batch at every step (continuous batching; Orca, Yu et al. 2022). A step reads a chunk of
prompts that are not read yet, so that a long one delays nobody for long, and then adds a token to each text that is
being written, or several that a draft guessed right (`speculative.py`). A request's tokens depend on its own prompt,
settings and seed, never on what else is in the batch.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from groundup.errors import DataError, GroundupError
from groundup.generation.cache import KVCache
from groundup.generation.detokenizer import Detokenizer
from groundup.generation.sampling import (
    History,
    SamplingParams,
    TokenLogprob,
    request_seed,
    sample,
    token_logprobs,
)
from groundup.generation.slots import RUN, Lease, PagePool, SlotPool
from groundup.generation.step import ModelStep, Row, inference_copy
from groundup.model import Transformer
from groundup.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "cancelled"]


class EngineBusy(GroundupError):
    """As many requests wait as may wait: try again later."""


@dataclass
class Generation:
    """What was written for one prompt.

    Attributes:
        ids: new tokens; a stop token is left out, the tokens of a stop text are not.
        finish_reason: "stop": a stop token or text; "length": max_tokens or the context's end; "cancelled".
        text: filled in where a tokenizer is at hand; ends before the stop text.
        logprobs: of every new token, where they were asked for.
        prompt_logprobs: of the prompt's tokens from the second on, where they were asked for.
    """

    ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)

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
    """

    index: int
    text: str
    ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(eq=False)
class Request:
    """A prompt and how it is to be continued; the engine fills in the results.

    Attributes:
        ids: the prompt.
        params: how tokens are drawn.
        seed: instead of `params.seed`.
        stop_ids: tokens that end a text and are not written (default: the engine's).
        client: whose request it is: the engine is fair between clients, and none can use another's prefixes.
        slides: go on past the context's end, reading the last half again, instead of finishing with "length".
        prompt_logprobs: number of alternatives to report for the prompt's own tokens; None: they are not scored.
        results: `params.n` texts, when all are finished.
        error: why there are none.
    """

    ids: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    seed: int | None = None
    stop_ids: Collection[int] | None = None
    client: str = ""
    slides: bool = False
    prompt_logprobs: int | None = None
    results: list[Generation] = field(default_factory=list, init=False)
    error: GroundupError | None = field(default=None, init=False)
    _texts: list[_Text] = field(default_factory=list, init=False, repr=False)
    _on_chunk: Callable[[Chunk | None], object] | None = field(default=None, init=False, repr=False)
    _is_cancelled: bool = field(default=False, init=False, repr=False)
    _finished: threading.Event = field(default_factory=threading.Event, init=False, repr=False)

    @property
    def is_finished(self) -> bool:
        """All its texts are finished, or it failed."""
        return self._finished.is_set()


@dataclass
class EngineStats:
    """What an engine has done so far.

    Attributes:
        steps: calls of the model.
        prompt_tokens: read.
        reused_tokens: of prompts, found in the cache instead.
        new_tokens: written.
        drafted_tokens: guessed by a draft.
        accepted_tokens: of them, right.
        finished: texts, by reason.
    """

    steps: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)


class _Text:
    """One of a request's texts, while it is written.

    Attributes:
        ids: prompt and output.
        offset: where in them the part begins that the model reads; not 0 after sliding.
        n_stored: tokens of that part whose entries stand in the cache.
        lease: its part of the cache; None while it waits.
    """

    def __init__(self, request: Request, index: int, ends: Collection[int], tokenizer: Tokenizer | None) -> None:
        params = request.params
        self.request, self.index, self.params = request, index, params
        self.ids, self.n_prompt, self.offset, self.n_stored = list(request.ids), len(request.ids), 0, 0
        self.seed = request_seed(params.seed if request.seed is None else request.seed, index)
        self.ends = frozenset(ends)
        self.history = History(request.ids, ends) if params.needs_history else None
        self.matcher = None
        self.detokenizer = None if tokenizer is None else Detokenizer(tokenizer, params.stop)
        self.wants_logprobs = params.logprobs is not None or (params.best_of or params.n) > params.n
        self.lease: Lease | None = None
        self.result = Generation()
        self.is_finished = False
        self._told = 0
        self._piece = ""

    @property
    def unread(self) -> list[int]:
        """Tokens that are not stored."""
        return self.ids[self.offset + self.n_stored :]

    @property
    def is_writing(self) -> bool:
        """All but the newest token are stored, and that one was drawn, or is the last of the prompt."""
        return len(self.ids) - self.offset - self.n_stored == 1 and len(self.ids) > self.n_prompt

    def take(self, token: int, logprob: TokenLogprob | None) -> None:
        """The next token."""
        result = self.result
        if token in self.ends:
            self.finish("stop")
            return
        result.ids.append(token)
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
            self.finish("length")

    def finish(self, reason: FinishReason) -> None:
        """No token follows."""
        self.result.finish_reason, self.is_finished = reason, True
        if self.detokenizer is not None:
            self._piece += self.detokenizer.finish()
            self.result.text = self.detokenizer.text

    def chunk(self) -> Chunk | None:
        """What is new since the last call."""
        result, told = self.result, self._told
        if not self.is_finished and len(result.ids) == told:
            return None
        self._told = len(result.ids)
        piece, self._piece = self._piece, ""
        reason = result.finish_reason if self.is_finished else None
        return Chunk(self.index, piece, tuple(result.ids[told:]), tuple(result.logprobs[told:]), reason)


class Engine:
    """A model that continues texts, many at a time.

    Args:
        model: put into evaluation mode; not copied where its weights have the dtype of the arithmetic.
        tokenizer: of the model; without one, results have no text, and stop texts are refused.
        slots: most texts that are written at the same time.
        length: most tokens of a text, prompt included (default: the model's context).
        dtype: of the arithmetic (default: the model's).
        pages: the cache is made of pages, shared between texts that begin alike, instead of a slot's whole length.
        cache_tokens: with pages: tokens for which there is room in all (default: slots · length).
        is_int8_cache: keys and values are kept in 8 bits.
        chunk: most tokens of prompts that are read in one step.
        most_waiting: requests that may wait; more are refused with `EngineBusy`.
        is_native: the step in C may be used (`native.py`).

    Raises:
        GroundupError: what does not fit together.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        slots: int = 16,
        length: int | None = None,
        dtype: torch.dtype | None = None,
        pages: bool = False,
        cache_tokens: int | None = None,
        is_int8_cache: bool = False,
        chunk: int = 512,
        most_waiting: int = 1024,
        is_native: bool = True,
    ) -> None:
        self.config, self.tokenizer, self.stats = model.config, tokenizer, EngineStats()
        self.length = min(length or model.config.context_length, model.config.context_length)
        self._source, self._dtype, self._is_native, self._chunk = model, dtype, is_native, chunk
        self._most_waiting = most_waiting
        unused = () if tokenizer is None else tokenizer.unused_ids(model.config.vocab_size)
        self._unused = torch.tensor(sorted(unused), dtype=torch.int64)  # ids of the model that stand for no token
        self._ends = frozenset(() if tokenizer is None else tokenizer.end_ids)
        device = next(model.parameters()).device
        arithmetic = dtype or model.compute_dtype
        n_pages = None if cache_tokens is None else -(-cache_tokens // RUN)
        self._cache = KVCache(
            model.config, slots, self.length, arithmetic, device, block_size=RUN if pages else None,
            n_blocks=n_pages, chunk=None if pages else chunk, is_int8=is_int8_cache,
        )  # fmt: skip
        self._pool = PagePool(self._cache) if pages else SlotPool(self._cache)
        self._inbox: deque[Request] = deque()
        self._waiting: list[_Text] = []
        self._running: list[_Text] = []
        self._stepping = threading.Lock()
        self._work, self._thread, self._is_stopping = threading.Condition(), None, False
        self.refresh()

    def refresh(self) -> None:
        """The model's weights have changed: take the new ones, and forget what was computed with the old."""
        with self._stepping:
            self._model_step = ModelStep(
                inference_copy(self._source, self._dtype), self._cache, is_native=self._is_native
            )
            self._pool.clear()

    # One line for the common cases.

    def run(self, requests: Sequence[Request]) -> list[list[Generation]]:
        """Continue prompts; the texts of each, in order.

        Raises:
            DataError: a prompt that the model cannot read.
            GroundupError: the model's logits are not numbers.
        """
        for request in requests:
            self._check(request)
        for request in requests:
            self._add(request)
        try:
            for request in requests:
                self._wait(request)
        except BaseException:
            for request in requests:
                self.cancel(request)
            raise
        return [request.results for request in requests]

    def stream(self, request: Request) -> Iterator[Chunk]:
        """Continue a prompt, step by step; it is cancelled when the iteration is closed. Errors as `run`."""
        chunks: deque[Chunk | None] = deque()
        self.submit(request, chunks.append)
        try:
            while True:
                while not chunks:
                    if not self._advance():
                        request._finished.wait(0.01)
                if (chunk := chunks.popleft()) is None:
                    break
                yield chunk
            _raise_error(request)
        finally:
            self.cancel(request)

    async def agenerate(self, request: Request) -> list[Generation]:
        """`run` for one request, in an event loop; needs `start`."""
        async for _ in self.astream(request):
            pass
        return request.results

    async def astream(self, request: Request) -> AsyncIterator[Chunk]:
        """`stream` in an event loop; needs `start`."""
        loop = asyncio.get_running_loop()
        chunks: asyncio.Queue[Chunk | None] = asyncio.Queue()
        self.submit(request, lambda chunk: loop.call_soon_threadsafe(chunks.put_nowait, chunk))
        try:
            while (chunk := await chunks.get()) is not None:
                yield chunk
            _raise_error(request)
        finally:
            self.cancel(request)

    # Requests come and go, from any thread.

    def submit(self, request: Request, on_chunk: Callable[[Chunk | None], object] | None = None) -> None:
        """Add a request to those that wait.

        Args:
            request: new.
            on_chunk: called in the engine's thread with what became certain in a step, and with None at the end.

        Raises:
            DataError: a prompt that the model cannot read.
            EngineBusy: too many wait.
        """
        self._check(request)
        if len(self._waiting) + len(self._inbox) >= self._most_waiting:
            raise EngineBusy(f"{self._most_waiting} requests are waiting already.", "Try again later.")
        request._on_chunk = on_chunk
        self._add(request)

    def cancel(self, request: Request) -> None:
        """Stop writing; its part of the cache is free when this returns, or after the step that is being taken."""
        if request.is_finished:
            return
        request._is_cancelled = True
        if self._stepping.acquire(blocking=False):
            try:
                self._take_in()
                self._drop_cancelled()
            finally:
                self._stepping.release()
        with self._work:
            self._work.notify()

    @property
    def n_running(self) -> int:
        """Texts that are being written."""
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        """Texts and requests that wait."""
        return len(self._waiting) + len(self._inbox)

    @property
    def n_used(self) -> int:
        """Slots, or pages, in use."""
        return self._pool.n_used

    def start(self) -> Engine:
        """Take steps in a thread of its own, until `stop`."""
        if self._thread is None:
            self._is_stopping = False
            self._thread = threading.Thread(target=self._serve, name="groundup-engine", daemon=True)
            self._thread.start()
        return self

    def stop(self, *, drain: bool = False) -> None:
        """Stop the thread; `drain` finishes what was submitted, otherwise it is cancelled."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        if not drain:
            for request in {text.request for text in [*self._running, *self._waiting]} | {*self._inbox}:
                self.cancel(request)
        self._is_stopping = True
        with self._work:
            self._work.notify()
        thread.join()

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    # One step.

    def step(self) -> bool:
        """Read a chunk of the prompts that wait, add to every text that is being written; False: nothing to do."""
        with self._stepping:
            self._take_in()
            self._drop_cancelled()
            self._admit()
            if not self._running:
                return False
            touched = [text for text in self._running if not text.is_writing]
            writing = [text for text in self._running if text.is_writing]
            try:
                self._read(touched)
                self._write(writing)
            except GroundupError as error:
                self._fail(error)
                return True
            self._settle()
            return True

    def _take_in(self) -> None:
        while self._inbox:
            request = self._inbox.popleft()
            self._waiting += request._texts

    def _drop_cancelled(self) -> None:
        if any(text.request._is_cancelled for text in (*self._waiting, *self._running)):
            for text in (*self._waiting, *self._running):
                if text.request._is_cancelled:
                    text.finish("cancelled")
            self._settle()

    def _admit(self) -> None:
        """Give waiting texts a part of the cache: the client with the fewest first, then who came first."""
        running = Counter(text.request.client for text in self._running)
        while self._waiting:
            ready = [text for text in self._waiting if _may_begin(text)]
            if not ready:
                return
            text = min(ready, key=lambda text: running[text.request.client])
            most = self.length if text.request.slides else min(self.length, text.n_prompt + text.params.max_tokens)
            scored = text.request.prompt_logprobs is not None and text.index == 0
            text.lease = self._pool.lease(text.ids, most, text.request.client, reuse=not scored)
            if text.lease is None:
                return
            text.n_stored = text.lease.n_stored
            self.stats.reused_tokens += text.n_stored
            running[text.request.client] += 1
            self._waiting.remove(text)
            self._running.append(text)

    def _read(self, texts: Sequence[_Text]) -> None:
        """A chunk of the prompts: as many rows as fit into it, padding included."""
        rows: list[Row] = []
        chosen: list[_Text] = []
        longest = 0
        for text in texts:
            unread = text.unread[: self._chunk]
            if rows and (len(rows) + 1) * max(longest, len(unread)) > self._chunk:
                continue
            longest = max(longest, len(unread))
            scored = self._is_scored(text)
            is_whole = text.n_stored + len(unread) == len(text.ids) - text.offset
            assert text.lease is not None
            rows.append(Row(text.lease.slot, unread, text.n_stored, len(unread) if scored else int(is_whole)))
            chosen.append(text)
        if not rows:
            return
        logits = self._logits(rows)
        first, ready, last = 0, [], []
        for text, row in zip(chosen, rows, strict=True):
            if self._is_scored(text):
                self._score(text, row, logits[first : first + row.n_logits])
            first += row.n_logits
            text.n_stored += len(row.ids)
            self.stats.prompt_tokens += len(row.ids)
            if text.n_stored == len(text.ids) - text.offset:
                self._record(text)
                ready.append(text)
                last.append(first - 1)
        if ready:
            self._draw(ready, logits[last] if len(last) < len(logits) else logits)

    def _is_scored(self, text: _Text) -> bool:
        return text.request.prompt_logprobs is not None and text.index == 0 and not text.result.ids

    def _score(self, text: _Text, row: Row, logits: Float[Tensor, "seq vocab"]) -> None:
        """Log-probabilities of the prompt's tokens behind those of a chunk."""
        targets = text.ids[row.start + 1 : row.start + 1 + len(row.ids)]
        n_top = text.request.prompt_logprobs or 0
        text.result.prompt_logprobs += token_logprobs(logits[: len(targets)], targets, n_top)

    def _write(self, texts: Sequence[_Text]) -> None:
        """Another token for each text, or several."""
        if not texts:
            return
        logits = self._logits([Row(_slot(text), text.ids[-1:], text.n_stored) for text in texts])
        for text in texts:
            text.n_stored += 1
        self._draw(texts, logits)

    def _logits(self, rows: Sequence[Row]) -> Float[Tensor, "wanted vocab"]:
        self.stats.steps += 1
        logits = self._model_step(rows)
        if len(self._unused):
            logits[:, self._unused] = -torch.inf
        return logits

    def _draw(self, texts: Sequence[_Text], logits: Float[Tensor, "batch vocab"]) -> None:
        """Draw each text's next token from its logits."""
        done = [text for text in texts if text.params.max_tokens == 0]
        for text in done:
            text.finish("length")
        if done:
            keep = [place for place, text in enumerate(texts) if not text.is_finished]
            texts, logits = [texts[place] for place in keep], logits[keep]
            if not texts:
                return
        tokens = sample(
            logits,
            [text.params for text in texts],
            [text.seed for text in texts],
            [len(text.result.ids) for text in texts],
            [text.history for text in texts],
            [None if text.matcher is None else text.matcher.mask() for text in texts],
        ).tolist()
        self.stats.new_tokens += len(texts)
        for place, (text, token) in enumerate(zip(texts, tokens, strict=True)):
            logprob = None
            if text.wants_logprobs:
                logprob = token_logprobs(logits[place : place + 1], [token], text.params.logprobs or 0)[0]
            text.take(token, logprob)

    def _settle(self) -> None:
        """Slide, finish, free, and tell whoever listens."""
        for text in self._running:
            if text.is_finished or len(text.ids) - text.offset <= self.length:
                continue
            if text.request.slides and self.length > 1:
                # The newest token has no place: the half before it is read again, and the token behind that.
                text.offset, text.n_stored = len(text.ids) - 1 - self.length // 2, 0
            else:
                text.finish("length")
        texts = {id(text): text for text in (*self._running, *self._waiting)}.values()
        for text in texts:
            if text.is_finished and text.lease is not None:
                self._record(text)
                self._pool.free(text.lease)
                text.lease = None
        self._running = [text for text in self._running if not text.is_finished]
        self._waiting = [text for text in self._waiting if not text.is_finished]
        for text in texts:
            if text.request._on_chunk is not None and (chunk := text.chunk()) is not None:
                text.request._on_chunk(chunk)
            if text.is_finished:
                self.stats.finished[text.result.finish_reason] += 1
                _close(text.request)

    def _record(self, text: _Text) -> None:
        if not text.offset and text.lease is not None:
            self._pool.record(text.lease, text.ids[: text.n_stored], text.request.client)

    def _fail(self, error: GroundupError) -> None:
        """The model cannot be used: every request in the batch ends with the error."""
        for text in self._running:
            text.request.error = error
            text.request._is_cancelled = True
        self._drop_cancelled()

    def _check(self, request: Request) -> None:
        ids, vocab = request.ids, self.config.vocab_size
        if not len(ids):
            raise DataError("a prompt has no tokens.", "Begin with <|endoftext|>: an empty text starts a new document.")
        if min(ids) < 0 or max(ids) >= vocab:
            raise DataError(
                f"a prompt has the token id {min(ids) if min(ids) < 0 else max(ids)}: the model has ids 0 to "
                f"{vocab - 1}.",
                "Use the tokenizer that the model was trained with.",
            )
        if len(ids) > self.length:
            raise DataError(
                f"a prompt has {len(ids)} tokens: there is room for {self.length}.", "Shorten it, or leave turns out."
            )
        request.params.check_vocabulary(vocab)
        if request.params.stop and self.tokenizer is None:
            raise DataError("stop texts need a tokenizer.", "Give the engine the model's, or use stop_ids.")

    def _add(self, request: Request) -> None:
        params = request.params
        ends = self._ends if request.stop_ids is None else frozenset(request.stop_ids)
        ends = frozenset(params.stop_ids) | (frozenset() if params.ignore_eos else ends)
        n = params.best_of or params.n
        request._texts = [_Text(request, index, ends, self.tokenizer) for index in range(n)]
        self._inbox.append(request)
        with self._work:
            self._work.notify()

    def _advance(self) -> bool:
        """Take a step, unless the engine's own thread does."""
        return self._thread is None and self.step()

    def _wait(self, request: Request) -> None:
        while not request.is_finished:
            if not self._advance():
                request._finished.wait(0.05)
        _raise_error(request)

    def _serve(self) -> None:
        while True:
            if self.step():
                continue
            with self._work:
                if self._is_stopping and not self._inbox:
                    return
                if not self._inbox:
                    self._work.wait(0.5)


def _slot(text: _Text) -> int:
    assert text.lease is not None
    return text.lease.slot


def _may_begin(text: _Text) -> bool:
    """Texts of one prompt wait until the first has read it, so that they find it in the cache."""
    first = text.request._texts[0]
    return text is first or len(text.ids) <= RUN or first.is_finished or bool(first.result.ids)


def _close(request: Request) -> None:
    """Fill in a request's results, if its last text is finished."""
    if request.is_finished or not all(text.is_finished for text in request._texts):
        return
    texts = request._texts
    if len(texts) > request.params.n:
        texts = sorted(texts, key=_mean_logprob, reverse=True)[: request.params.n]
    request.results = [text.result for text in texts]
    request._finished.set()
    if request._on_chunk is not None:
        request._on_chunk(None)


def _mean_logprob(text: _Text) -> float:
    logprobs = text.result.logprobs
    return sum(one.logprob for one in logprobs) / max(1, len(logprobs))


def _raise_error(request: Request) -> None:
    if request.error is not None:
        raise request.error
