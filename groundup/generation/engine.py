"""One engine that makes tokens, for everything that wants them: chat, server, rollouts, evaluation.

    results = Engine(model, tokenizer).run([Request(ids, SamplingParams(temperature=0))])      # rollouts, evaluation
    for chunk in engine.stream(request): print(chunk.text, end="")                             # chat
    async for chunk in engine.astream(request): …                                              # server

Requests join and leave the batch at every step (continuous batching; Orca, Yu et al. 2022). A step reads a chunk of
prompts that are not read yet, so that a long one delays nobody for long, and then adds a token to each text that is
being written, or several that a draft guessed right (`speculative.py`). A request's tokens depend on its own prompt,
settings and seed, never on what else is in the batch; but where a draft draws its guesses, that is true of their law
only: how many it makes depends on the batch and on the machine.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from groundup.errors import DataError, GroundupError
from groundup.generation.cache import KVCache
from groundup.generation.request import Chunk, Generation, Request, Text
from groundup.generation.sampling import TokenLogprob, sample, token_logprobs
from groundup.generation.slots import RUN, Pool
from groundup.generation.speculative import Draft, Speculation, speculation_with, verified
from groundup.generation.step import ModelStep, Row, inference_copy
from groundup.model import Transformer
from groundup.tokenizer import Tokenizer


class EngineBusy(GroundupError):
    """As many requests wait as may wait: try again later."""


@dataclass
class EngineStats:
    """What an engine has done so far."""

    steps: int = 0  # calls of the model
    prompt_tokens: int = 0  # read
    reused_tokens: int = 0  # of prompts, found in the cache instead
    new_tokens: int = 0  # written
    drafted_tokens: int = 0  # guessed by a draft
    accepted_tokens: int = 0  # of them, right
    finished: Counter[str] = field(default_factory=Counter)  # texts, by reason


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
        is_native: the step in C (`native.py`), or CUDA graphs on a GPU, may be used.
        draft: what guesses the next tokens (`speculative.py`): "ngrams": what followed the last few tokens before; a
            number: the model's first so many blocks; a smaller model with the same tokens. None: nothing.

    Raises:
        DataError: values out of range, or what does not fit together.
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
        draft: Literal["ngrams"] | int | Transformer | None = None,
    ) -> None:
        self.config, self.tokenizer, self.stats = model.config, tokenizer, EngineStats()
        context = model.config.context_length
        self.length = min(length or context, context, cache_tokens or context)
        self.model, self._dtype, self._is_native, self._chunk = model, dtype, is_native, chunk
        self._most_waiting = most_waiting
        if min(slots, self.length, chunk) < 1 or (cache_tokens is not None and (cache_tokens < 1 or not pages)):
            raise DataError(
                f"slots = {slots}, length = {self.length}, chunk = {chunk}, cache_tokens = {cache_tokens}: "
                "each must be at least 1, and cache_tokens needs pages."
            )
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
        self._pool = Pool(self._cache)
        self._inbox: deque[Request] = deque()
        self._queues: dict[str, deque[Text]] = {}
        self._cancelled: deque[Request] = deque()
        self._n_submitted = self._n_begun = 0
        self._running: list[Text] = []
        self._stepping = threading.Lock()
        self._telling: int | None = None  # the thread in which a listener runs
        self._work, self._is_stopping = threading.Condition(), False
        self._thread: threading.Thread | None = None
        self._draft = draft
        self._speculation: Speculation | None = None
        self.refresh()

    def refresh(self) -> None:
        """The model's weights have changed: take the new ones, and read again what was read with the old."""
        self._refuse_listener("refresh")
        with self._stepping:
            for text in reversed(self._running):
                self._read_again(text)
            self._running.clear()
            self._model_step = ModelStep(
                inference_copy(self.model, self._dtype), self._cache, is_native=self._is_native
            )
            self._pool.clear()
            self._speculation = speculation_with(
                self._draft, self._model_step, self._cache, self._chunk, is_native=self._is_native
            )

    # One line for the common cases.

    def run(self, requests: Sequence[Request]) -> list[list[Generation]]:
        """Continue prompts; the texts of each, in order.

        Raises:
            DataError: a prompt that the model cannot read.
            GroundupError: the model's logits are not numbers.
        """
        self._refuse_listener("run")
        for request in requests:
            self._check(request)
        try:
            for request in requests:
                self._add(request)
            for request in requests:
                self._wait(request)
        except BaseException:
            for request in requests:
                self.cancel(request)
            raise
        return [request.results for request in requests]

    def stream(self, request: Request) -> Iterator[Chunk]:
        """Continue a prompt, step by step; it is cancelled when the iteration is closed. Errors as `run`."""
        self._refuse_listener("stream")
        chunks: SimpleQueue[Chunk | None] = SimpleQueue()
        self.submit(request, chunks.put)
        try:
            while True:
                try:
                    chunk = chunks.get(block=self._thread is not None, timeout=0.05)
                except Empty:
                    if self._thread is None:
                        self.step()
                    continue
                if chunk is None:
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
        if self._thread is None:
            raise GroundupError("the engine takes no steps of its own.", "Call start() first.")
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
            on_chunk: called in the engine's thread with what became certain in a step, and with None at the end; what
                it raises ends the request. It may submit and cancel requests, but not wait for any.

        Raises:
            DataError: a prompt that the model cannot read, or a request that was submitted before.
            EngineBusy: too many wait.
        """
        self._check(request)
        if self.n_waiting >= self._most_waiting:
            raise EngineBusy(f"{self._most_waiting} requests are waiting already.", "Try again later.")
        request._on_chunk = on_chunk
        self._add(request)

    def cancel(self, request: Request) -> None:
        """Stop writing; its part of the cache is free when this returns, or after the step that is being taken."""
        if not request.is_finished:
            self._cancelled.append(request)
            self._free_cancelled()

    @property
    def n_running(self) -> int:
        """Texts that are being written."""
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        """Requests that wait."""
        return self._n_submitted - self._n_begun

    @property
    def n_used(self) -> int:
        """Slots, or pages, in use."""
        return self._pool.n_used

    @property
    def capacity(self) -> int:
        """Slots, or pages, in all."""
        return self._cache.n_blocks

    @property
    def is_alive(self) -> bool:
        """Its thread takes steps."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def why_slow(self) -> str | None:
        """Why PyTorch's forward pass computes every step, where that is slower than need be; None: it does not."""
        return self._model_step.reason

    def start(self) -> Engine:
        """Take steps in a thread of its own, until `stop`."""
        if self._thread is None:
            self._is_stopping = False
            self._thread = threading.Thread(target=self._serve, name="groundup-engine", daemon=True)
            self._thread.start()
        return self

    def stop(self, *, drain: bool = False) -> None:
        """Stop the thread; `drain` finishes what was submitted, otherwise it is cancelled."""
        self._refuse_listener("stop")
        thread, self._thread = self._thread, None
        if thread is None:
            return
        if not drain:
            with self._stepping:
                self._take_in()
                texts = [*self._running, *(text for queue in self._queues.values() for text in queue)]
            for request in {text.request for text in texts}:
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
        self._refuse_listener("step")
        with self._stepping:
            self._take_in()
            self._drop_cancelled()
            self._admit()
            reading, writing = list[Text](), list[Text]()
            for text in self._running:
                (writing if text.is_writing else reading).append(text)
            try:
                self._read(reading)
                self._write(writing)
            except Exception as error:  # of the model: nothing in the batch can go on
                self._fail(self._running, error)
            self._settle()
        self._free_cancelled()
        return bool(reading or writing)

    def _free_cancelled(self) -> None:
        """Unless a step is being taken: whoever takes it calls this at its end."""
        while self._cancelled and self._stepping.acquire(blocking=False):
            try:
                self._take_in()
                self._drop_cancelled()
            finally:
                self._stepping.release()

    def _take_in(self) -> None:
        while self._inbox:
            request = self._inbox.popleft()
            # The other texts of a long prompt wait until the first has read it: then they find it in the cache.
            texts = request._texts if len(request.ids) <= RUN else request._texts[:1]
            self._queues.setdefault(request.client, deque()).extend(texts)

    def _drop_cancelled(self) -> None:
        if not self._cancelled:
            return
        gone = []
        while self._cancelled:
            request = self._cancelled.popleft()
            for text in request._texts:
                if not text.is_finished:
                    text.finish("cancelled")
                    gone.append(text)
                    if text in (queue := self._queues.get(request.client, deque())):
                        queue.remove(text)
                        self._count_begun(text)
        self._settle(gone)

    def _admit(self) -> None:
        """Give waiting texts a part of the cache: the client with the fewest first, and then who came first."""
        running = Counter(text.request.client for text in self._running)
        while queues := {client: queue for client, queue in self._queues.items() if queue}:
            client = min(queues, key=lambda client: (running[client], queues[client][0].request._number))
            text = queues[client][0]
            most = self.length if text.request.slides else min(self.length, text.n_prompt + text.params.max_tokens)
            text.lease = self._pool.lease(text.unread, most, client, reuse=not self._is_scored(text))
            if text.lease is None:
                break
            queues[client].popleft()
            self._count_begun(text)
            text.n_stored = text.lease.n_stored
            self.stats.reused_tokens += text.n_stored
            running[client] += 1
            self._running.append(text)
        self._queues = queues

    def _count_begun(self, text: Text) -> None:
        """A request waits until its first text begins, which can wait again later."""
        self._n_begun += text.index == 0 and not text.has_begun
        text.has_begun = True

    def _read_again(self, text: Text) -> None:
        """What stands in the cache is of no use any more. It is given back, since other texts may share it."""
        assert text.lease is not None
        self._pool.free(text.lease)
        text.lease, text.n_stored = None, 0
        if not text.result.ids:
            text.result.prompt_logprobs.clear()
        self._queues.setdefault(text.request.client, deque()).appendleft(text)

    def _read(self, texts: Sequence[Text]) -> None:
        """A chunk of the prompts: as many rows as fit into it, padding included."""
        rows: list[Row] = []
        chosen: list[Text] = []
        longest = 0
        for text in texts:
            unread = text.unread[: self._chunk]
            if rows and (len(rows) + 1) * max(longest, len(unread)) > self._chunk:
                continue
            longest = max(longest, len(unread))
            scored = self._is_scored(text)
            is_whole = text.n_stored + len(unread) == len(text.ids) - text.offset
            rows.append(Row(text.slot, unread, text.n_stored, len(unread) if scored else int(is_whole)))
            chosen.append(text)
        if not rows:
            return
        logits = self._logits(chosen, rows)
        first, ready, last = 0, [], []
        for text, row in zip(chosen, rows, strict=True):
            if self._is_scored(text):
                self._score(text, row, logits[first : first + row.n_logits])
            first += row.n_logits
            text.n_stored += len(row.ids)
            self.stats.prompt_tokens += len(row.ids)
            if text.n_stored == len(text.ids) - text.offset:
                self._record(text)
                if not text.index and not text.result.ids and len(text.request.ids) > RUN:
                    self._queues.setdefault(text.request.client, deque()).extendleft(text.request._texts[:0:-1])
                if text.params.max_tokens:
                    ready.append(text)
                    last.append(first - 1)
                else:
                    text.finish("length")
        if ready:
            self._draw(ready, logits[last] if len(last) < len(logits) else logits)

    def _is_scored(self, text: Text) -> bool:
        return text.request.prompt_logprobs is not None and text.index == 0 and not text.result.ids

    def _score(self, text: Text, row: Row, logits: Float[Tensor, "seq vocab"]) -> None:
        """Log-probabilities of the prompt's tokens behind those of a chunk."""
        targets = text.ids[row.start + 1 : row.start + 1 + len(row.ids)]
        n_top = text.request.prompt_logprobs or 0
        text.result.prompt_logprobs += token_logprobs(logits[: len(targets)], targets, n_top)

    def _write(self, texts: Sequence[Text]) -> None:
        """Another token for each text, or several."""
        if not texts:
            return
        drafts: list[Draft] = []
        if self._speculation is not None:
            drafts = self._speculation.propose(texts, [self._room(text) for text in texts])
        if any(draft.ids for draft in drafts):
            rows = [
                Row(text.slot, [text.ids[-1], *draft.ids], text.n_stored, 1 + len(draft.ids))
                for text, draft in zip(texts, drafts, strict=True)
            ]
            self._verify(texts, drafts, self._logits(texts, rows))
        else:
            logits = self._logits(texts, [Row(text.slot, text.ids[-1:], text.n_stored) for text in texts])
            for text in texts:
                text.n_stored += 1
            self._draw(texts, logits)
        if self._speculation is not None:
            self._speculation.end()

    def _room(self, text: Text) -> int:
        """Most tokens that can be guessed: one more is drawn behind them, and all must have a place."""
        left = text.params.max_tokens - len(text.result.ids)
        return max(0, min(left - 1, self.length - text.n_stored - 1, self._chunk - 1))

    def _verify(self, texts: Sequence[Text], drafts: Sequence[Draft], logits: Float[Tensor, "wanted vocab"]) -> None:
        """Keep of each text's guesses what the model agrees with, and add a token of its own."""
        first = 0
        for text, draft in zip(texts, drafts, strict=True):
            n = len(draft.ids)
            own = logits[first : first + n + 1]
            first += n + 1
            try:
                tokens = verified(text, draft, own)
            except GroundupError as error:
                self._fail([text], error)
                continue
            if self._speculation is not None:
                self._speculation.learn(text, n, len(tokens) - 1)
            self.stats.drafted_tokens += n
            self.stats.accepted_tokens += len(tokens) - 1
            logprobs = (
                token_logprobs(own[: len(tokens)], tokens, text.params.logprobs or 0) if text.wants_logprobs else []
            )
            for place, token in enumerate(tokens):
                guesses = [token] if place < len(tokens) - 1 else draft.ids[place:]
                self._take(text, token, logprobs[place] if logprobs else None, guesses)
                if text.is_finished:
                    break
            text.n_stored = min(text.n_stored + len(tokens), len(text.ids) - text.offset)

    def _logits(self, texts: Sequence[Text], rows: Sequence[Row]) -> Float[Tensor, "wanted vocab"]:
        self.stats.steps += 1
        for text, row in zip(texts, rows, strict=True):
            if text.lease is not None:
                self._pool.will_write(text.lease, row.start + len(row.ids))
        logits = self._model_step(rows)
        if len(self._unused):
            with torch.inference_mode():  # where PyTorch computed the step, they can be changed nowhere else
                logits[:, self._unused] = -torch.inf
        return logits

    def _draw(self, texts: Sequence[Text], logits: Float[Tensor, "batch vocab"]) -> None:
        """Draw each text's next token from its logits."""
        try:
            tokens = sample(
                logits,
                [text.params for text in texts],
                [text.seed for text in texts],
                [len(text.result.ids) for text in texts],
                [text.history for text in texts],
                [None if text.matcher is None else text.matcher.mask() for text in texts],
            ).tolist()
        except GroundupError as error:
            if len(texts) == 1:
                self._fail(texts, error)
            else:  # one text that can draw nothing is no fault of the others
                for place, text in enumerate(texts):
                    self._draw([text], logits[place : place + 1])
            return
        logprobs: dict[int, TokenLogprob] = {}
        for n_top in {text.params.logprobs or 0 for text in texts if text.wants_logprobs}:
            of = [n for n, text in enumerate(texts) if text.wants_logprobs and (text.params.logprobs or 0) == n_top]
            chosen = logits if len(of) == len(logits) else logits[of]
            logprobs.update(zip(of, token_logprobs(chosen, [tokens[n] for n in of], n_top), strict=True))
        for place, (text, token) in enumerate(zip(texts, tokens, strict=True)):
            self._take(text, token, logprobs.get(place))

    def _take(self, text: Text, token: int, logprob: TokenLogprob | None, guesses: Sequence[int] = ()) -> None:
        self.stats.new_tokens += 1
        try:
            text.take(token, logprob, guesses)
        except GroundupError as error:  # its grammar has become too complex
            self._fail([text], error)

    def _settle(self, gone: Sequence[Text] = ()) -> None:
        """Slide, finish, free, and tell whoever listens, of texts that never began too."""
        texts = [*self._running, *(text for text in gone if text.lease is None)]
        for text in self._running:
            if not text.is_finished and len(text.ids) - text.offset > self.length:
                if text.request.slides and self.length > 1:
                    # The newest token has no place: the half before it is read again, and the token behind that.
                    text.offset = len(text.ids) - 1 - self.length // 2
                    self._read_again(text)
                else:
                    text.finish("length")
            if text.is_finished and text.lease is not None:
                self._record(text)
                self._pool.free(text.lease)
                text.lease = None
        self._running = [text for text in self._running if text.lease is not None]
        self._telling = threading.get_ident()
        try:
            for text in texts:
                if text.request._on_chunk is not None and (chunk := text.chunk()) is not None:
                    _tell(text.request, chunk)
                if text.is_finished:
                    self.stats.finished[text.result.finish_reason] += 1
                    _close(text.request)
                elif text.request.error is not None:
                    self._cancelled.append(text.request)
        finally:
            self._telling = None

    def _record(self, text: Text) -> None:
        if text.lease is not None:
            stored = text.ids[text.offset : text.offset + text.n_stored]
            self._pool.record(text.lease, stored, text.request.client)

    def _fail(self, texts: Sequence[Text], error: Exception) -> None:
        """Texts that cannot go on end their requests with an error."""
        for text in texts:
            text.request.error = text.request.error or error

    def _refuse_listener(self, method: str) -> None:
        """Of a listener, which is called within a step: it would wait for itself."""
        if self._telling == threading.get_ident():
            raise GroundupError(
                f"{method}() was called by a listener of the engine's, within a step.",
                "Call it from another thread; a listener may submit and cancel.",
            )

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
        if (request.params.stop or request.params.constraint) and self.tokenizer is None:
            raise DataError("stop texts and constraints need a tokenizer.", "Give the engine the model's.")

    def _add(self, request: Request) -> None:
        if request._texts:
            raise DataError("a request was submitted before: it can be used once.", "Make another.")
        params = request.params
        ends = frozenset(params.stop_ids) | (frozenset() if params.ignore_eos else self._ends)
        n = params.best_of or params.n
        request._texts = [Text(request, index, ends, self.tokenizer, self.config.vocab_size) for index in range(n)]
        with self._work:
            request._number = self._n_submitted
            self._n_submitted += 1
            self._inbox.append(request)
            self._work.notify()

    def _wait(self, request: Request) -> None:
        while not request.is_finished:
            if self._thread is not None or not self.step():
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


def _tell(request: Request, chunk: Chunk | None) -> None:
    """Call whoever listens; one that fails is called no more, and ends its request."""
    listener = request._on_chunk
    if listener is None:
        return
    try:
        listener(chunk)
    except Exception as error:
        request._on_chunk, request.error = None, error


def _close(request: Request) -> None:
    """Fill in a request's results, if its last text is finished."""
    if request.is_finished or not all(text.is_finished for text in request._texts):
        return
    results = [text.result for text in request._texts]
    if len(results) > request.params.n:
        for result in results:
            found = [one.logprob for one in result.logprobs]
            found += [result.end_logprob] * (result.end_id is not None)
            result.score = sum(found) / max(1, len(found))
        results = sorted(results, key=lambda result: -result.score)[: request.params.n]
    request.results = results
    request._finished.set()
    _tell(request, None)


def _raise_error(request: Request) -> None:
    if request.error is not None:
        raise request.error
