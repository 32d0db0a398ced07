"""Answers: /v1/completions and /v1/chat/completions, whole or as a stream of server-sent events.

The engine's thread says what is new; it is written to the client in the event loop. A client that leaves, or takes too
long, gives its part of the cache back with the next step. A stream ends with a finish reason and `[DONE]`, or with an
error that says why it did not.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import orjson
from starlette.requests import Request as HTTPRequest
from starlette.types import Message, Receive, Scope, Send

from groundup.errors import GroundupError
from groundup.generation import Chunk, Constraint, Detokenizer, Generation, Request, TokenLogprob
from groundup.generation.tools import ToolReader, call_schema
from groundup.serving.protocol import (
    MOST_TEXTS,
    APIError,
    ChatBody,
    CompletionBody,
    NamedChoice,
    SamplingBody,
    api_error,
    json_response,
    read_body,
)
from groundup.serving.state import ServedModel, State

_DONE = b"data: [DONE]\n\n"


async def completions(http: HTTPRequest) -> Reply:
    """POST /v1/completions."""
    state: State = http.state.server
    body = CompletionBody.model_validate(await read_body(http))
    served = state.find(body.model)
    begun = body.add_special_tokens is not False
    prompts = await asyncio.to_thread(served.prompts, body.prompt, "prompt", is_begun=begun)
    if len(prompts) * (body.n or 1) > MOST_TEXTS:
        raise APIError(400, f"prompts times n: at most {MOST_TEXTS} texts.", "invalid_value", "n")
    if body.stream and body.echo and body.logprobs is not None:
        raise APIError(400, "echo with logprobs is not supported in a stream.", "invalid_value", "stream")
    max_tokens = 16 if body.max_tokens is None else body.max_tokens
    params = body.params(max_tokens, body.logprobs, None)
    scored = body.logprobs if body.echo else None
    # What ends a text is left out of it. Where one token is asked for with its log-probability, it is to be seen.
    if max_tokens == 1 and body.logprobs is not None:
        params = replace(params, ignore_eos=True)
    requests = [Request(ids, params, client=_client(http, body), prompt_logprobs=scored) for ids in prompts]
    return TextReply(state, served, body, requests)


async def chat_completions(http: HTTPRequest) -> Reply:
    """POST /v1/chat/completions."""
    state: State = http.state.server
    body = ChatBody.model_validate(await read_body(http))
    served = state.find(body.model)
    request, begun = await asyncio.to_thread(_chat_request, served, body, _client(http, body))
    return ChatReply(state, served, body, [request], begun)


def _client(http: HTTPRequest, body: SamplingBody) -> str:
    """Whose request it is: a key's, an address's, and of them a user's."""
    return f"{http.state.client}/{body.user or ''}"


def _chat_request(served: ServedModel, body: ChatBody, client: str) -> tuple[Request, str]:
    """The conversation as a request, and what of the answer stands in its prompt already."""
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    choice = body.tool_choice
    tools = [] if choice == "none" else tools
    template, tokenizer = served.template, served.tokenizer
    ids = template.ids([message.model_dump(exclude_none=True) for message in body.messages], tools)
    ids += body.answer_ids or ()
    served.check_length(ids, "messages")
    begun, shown = "", tuple[str, ...]()
    constraint = None if body.response_format is None else body.response_format.constraint
    if tools and template.tools is not None:
        form = template.tools
        shown = tuple(name for name in form.marks if name in tokenizer.control_tokens)
        if choice == "required" or isinstance(choice, NamedChoice):
            wanted = [one for one in tools if choice == "required" or one["function"]["name"] == choice.function.name]
            constraint = Constraint.json_schema(call_schema(wanted, form))
            begun = form.opening
            ids = [*ids, *tokenizer.encode(begun, allowed_special=shown)]
    room = max(1, served.engine.length - len(ids))
    wanted_tokens = body.max_completion_tokens or (room if body.max_tokens is None else body.max_tokens)
    logprobs = body.top_logprobs or 0 if body.logprobs else None
    params = body.params(min(wanted_tokens, room), logprobs, constraint)
    if constraint is not None:  # may take a while, and is kept
        constraint.compile(tokenizer, served.model.config.vocab_size)
    return Request(ids, params, client=client, shown=shown), begun


class Wakeups:
    """One call into the event loop for all that a step has brought: each costs both threads a switch."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._is_called = loop, False
        self._inboxes = deque[Inbox]()

    def wake(self, inbox: Inbox) -> None:
        """Something has come into an inbox; from any thread."""
        self._inboxes.append(inbox)
        if not self._is_called:
            self._is_called = True
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._is_called = False  # before they are taken: one that comes now calls again
        while self._inboxes:
            waiter = self._inboxes.popleft().waiter
            if waiter is not None and not waiter.done():
                waiter.set_result(None)


class Inbox:
    """What an engine says of a reply's requests, until it is written: at most so many chunks, 0: only that it ended."""

    def __init__(self, wakeups: Wakeups, n_requests: int, most: int) -> None:
        self._wakeups, self._n_open, self._most = wakeups, n_requests, most
        self._items = deque[tuple[int, Chunk]]()
        self.waiter: asyncio.Future[None] | None = None
        self._error: APIError | None = None
        self.first: float | None = None

    def put(self, number: int, chunk: Chunk | None) -> None:
        """What is new of a request, in the engine's thread; None: it has ended."""
        if chunk is None:
            self._n_open -= 1
        else:
            self.first = self.first or time.perf_counter()
            if not self._most:
                return
            if len(self._items) >= self._most:
                self._error = APIError(408, "the stream was read too slowly.", "slow_reader")
                self._wakeups.wake(self)
                raise self._error  # which ends the request
            self._items.append((number, chunk))
        self._wakeups.wake(self)

    async def take(self) -> list[tuple[int, Chunk]]:
        """What has come since the last call; nothing once all requests have ended.

        Raises:
            APIError: too much has waited.
        """
        while True:
            self.waiter = asyncio.get_running_loop().create_future()  # before looking: what comes now wakes it
            if self._error is not None:
                raise self._error
            if self._items or not self._n_open:
                return [self._items.popleft() for _ in range(len(self._items))]
            await self.waiter


class Reply:
    """The answer to one HTTP request, an ASGI application: asks the engine, a request for each prompt, and writes."""

    kind, chunk_kind, prefix = "", "", ""

    def __init__(self, state: State, served: ServedModel, body: SamplingBody, requests: Sequence[Request]) -> None:
        self.state, self.served, self.body, self.requests = state, served, body, requests
        self._n = body.n or 1
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}", "object": self.chunk_kind if body.stream else self.kind,
            "created": int(time.time()), "model": served.name,
        }  # fmt: skip
        self._counts_usage = bool(body.stream_options and body.stream_options.include_usage)
        # Of an event only the choice changes.
        self._before_choice = b"data: " + orjson.dumps(self._head)[:-1] + b',"choices":['
        self._behind_choice = b'],"usage":null}\n\n' if self._counts_usage else b"]}\n\n"
        self._begin = time.perf_counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        most = self.state.limits.unread * self._n * len(self.requests) if self.body.stream else 0
        inbox = Inbox(scope["state"]["wakeups"], len(self.requests), most)
        write = self._stream if self.body.stream else self._whole
        tasks: list[asyncio.Task[None]] = []
        try:
            for number, request in enumerate(self.requests):
                self.served.engine.submit(request, functools.partial(inbox.put, number))
            tasks = [asyncio.create_task(write(inbox, scope, receive, send)), asyncio.create_task(_left(receive))]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            except asyncio.CancelledError:  # the server has waited long enough: say so, if it can be heard
                self._cancel()
                await asyncio.wait(tasks[:1], timeout=1)
            if tasks[0].done():
                tasks[0].result()
        finally:
            self._cancel()
            for task in tasks:
                task.cancel()
            self._observe(inbox)

    def _cancel(self) -> None:
        for request in self.requests:
            self.served.engine.cancel(request)

    async def _whole(self, inbox: Inbox, scope: Scope, receive: Receive, send: Send) -> None:
        async with asyncio.timeout(self.state.limits.seconds):
            await inbox.take()
        self._raise_error()
        choices = [
            self.choice(number, index, text)
            for number, request in enumerate(self.requests)
            for index, text in enumerate(request.results)
        ]
        await json_response({**self._head, "choices": choices, "usage": self._usage()})(scope, receive, send)

    async def _stream(self, inbox: Inbox, scope: Scope, receive: Receive, send: Send) -> None:
        is_open = False

        async def write(body: bytes, *, more: bool = True) -> None:
            nonlocal is_open
            if not is_open:
                headers = [(b"content-type", b"text/event-stream"), (b"x-accel-buffering", b"no")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                is_open = True
            await send({"type": "http.response.body", "body": body, "more_body": more})

        try:
            async with asyncio.timeout(self.state.limits.seconds):
                while items := await inbox.take():  # nothing is sent before: an error has its status until then
                    told = b""
                    for number, chunk in items:
                        if chunk.finish_reason != "cancelled":
                            for choice in self.deltas(number, chunk):
                                told += self._before_choice + orjson.dumps(choice) + self._behind_choice
                    if told:
                        await write(told)
                self._raise_error()
            last = {**self._head, "choices": [], "usage": self._usage()}
            await write((b"data: " + orjson.dumps(last) + b"\n\n" if self._counts_usage else b"") + _DONE, more=False)
        except Exception as error:
            if is_open:
                value = orjson.dumps(api_error(error).value)
                with contextlib.suppress(TimeoutError):  # whoever reads too slowly may not read this either
                    async with asyncio.timeout(5):
                        await write(b"data: " + value + b"\n\n" + _DONE, more=False)
            if not is_open or not isinstance(error, GroundupError | TimeoutError):
                raise

    def _raise_error(self) -> None:
        for request in self.requests:
            if request.error is not None:
                raise request.error
            if any(text.finish_reason == "cancelled" for text in request.results):
                raise APIError(503, "the server is stopping.", "unavailable", retry_after="5")

    def _usage(self) -> dict[str, int]:
        prompt = sum(len(request.ids) for request in self.requests)
        written = sum(text.n_tokens for request in self.requests for text in request.results)
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    def _observe(self, inbox: Inbox) -> None:
        if inbox.first is None:
            return
        metrics, name = self.state.metrics, self.served.name
        metrics.first_token.labels(name).observe(inbox.first - self._begin)
        longest = max((text.n_tokens for request in self.requests for text in request.results), default=0)
        if longest > 1:
            metrics.per_token.labels(name).observe((time.perf_counter() - inbox.first) / (longest - 1))

    def choice(self, number: int, index: int, text: Generation) -> dict[str, Any]:
        """A whole text."""
        raise NotImplementedError

    def deltas(self, number: int, chunk: Chunk) -> list[dict[str, Any]]:
        """The choice of each event that tells what is new."""
        raise NotImplementedError


class TextReply(Reply):
    """Of /v1/completions."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, state: State, served: ServedModel, body: CompletionBody, requests: Sequence[Request]) -> None:
        super().__init__(state, served, body, requests)
        given = [body.prompt] if isinstance(body.prompt, str) or isinstance(body.prompt[0], int) else body.prompt
        # What stands before each text that is sent.
        self._before = [""] * len(requests)
        if body.echo:
            self._before = [
                one if isinstance(one, str) else served.tokenizer.decode(request.ids, skip_special=False)
                for one, request in zip(given, requests, strict=True)
            ]
        self._places: dict[int, Detokenizer] = {}  # of the tokens of streams, in their texts

    def choice(self, number: int, index: int, text: Generation) -> dict[str, Any]:
        """A whole text, behind its prompt if that was asked for."""
        request, reason = self.requests[number], text.finish_reason
        ids, logprobs = [*text.ids], list[TokenLogprob | None](text.logprobs)
        if ids and ids[-1] in self.served.tokenizer.end_ids and not self.body.ignore_eos:
            reason = "stop"  # shown though it ends the text
        if request.prompt_logprobs is not None:
            ids = [*request.ids, *ids]
            logprobs = [None, *request.results[0].prompt_logprobs, *logprobs]
        return self._choice(number, index, text.text, ids, logprobs, reason)

    def deltas(self, number: int, chunk: Chunk) -> list[dict[str, Any]]:
        """One event."""
        return [self._choice(number, chunk.index, chunk.text, chunk.ids, chunk.logprobs, chunk.finish_reason)]

    def _choice(
        self, number: int, index: int, text: str, ids: Sequence[int], scored: Sequence[TokenLogprob | None], reason: Any
    ) -> dict[str, Any]:
        place, logprobs = number * self._n + index, None
        if place not in self._places:
            self._places[place], text = Detokenizer(self.served.tokenizer), self._before[number] + text
        if self.requests[number].params.logprobs is not None:
            offsets = self._places[place].offsets
            for token in ids:
                self._places[place].add(token)
            logprobs = self._logprobs(ids, scored, offsets[len(offsets) - len(ids) :])
        return {"index": place, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(
        self, ids: Sequence[int], scored: Sequence[TokenLogprob | None], offsets: Sequence[int]
    ) -> dict[str, Any]:
        """In the older form. A token is among its own alternatives, with the same number."""
        texts = self.served.token_texts
        tops: list[dict[str, float] | None] = []
        for one in scored:
            top: dict[str, float] = {}
            for token, logprob in () if one is None else (*one.top, (one.token, one.logprob)):
                top.setdefault(texts[token], logprob)  # of two that read alike, the more probable one
            tops.append(None if one is None else top)
        return {
            "tokens": [texts[token] for token in ids], "token_logprobs": [one and one.logprob for one in scored],
            "top_logprobs": tops, "text_offset": list(offsets), "ids": list(ids),
        }  # fmt: skip


class ChatReply(Reply):
    """Of /v1/chat/completions; `begun` is what of the answer stands in the prompt already."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(
        self, state: State, served: ServedModel, body: ChatBody, requests: Sequence[Request], begun: str
    ) -> None:
        super().__init__(state, served, body, requests)
        self._begun = begun
        self._most_calls = 1 if body.parallel_tool_calls is False else None
        self._takes_tools = bool(body.tools) and body.tool_choice != "none"
        self._has_logprobs = requests[0].params.logprobs is not None
        self._readers: dict[int, ToolReader | None] = {}

    def choice(self, number: int, index: int, text: Generation) -> dict[str, Any]:
        """A whole message."""
        content, calls, reader = text.text, [], self._reader()
        if reader is not None:
            content = reader.add(text.text)
            rest, found = reader.finish()
            content, calls = content + rest, [call.value for call in found[: self._most_calls]]
        message = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
        return {
            "index": index, "message": message | ({"tool_calls": calls} if calls else {}),
            "logprobs": self._logprobs(text.logprobs, text.guesses) if self._has_logprobs else None,
            "finish_reason": "tool_calls" if calls else text.finish_reason,
        }  # fmt: skip

    def deltas(self, number: int, chunk: Chunk) -> list[dict[str, Any]]:
        """An event for the role, for what is new, and for the end."""
        index, events = chunk.index, []
        if index not in self._readers:
            self._readers[index] = self._reader()
            events.append(_delta(index, {"role": "assistant", "content": ""}))
        reader, piece, calls = self._readers[index], chunk.text, []
        if reader is not None:
            piece = reader.add(piece)
            if chunk.finish_reason is not None:
                rest, found = reader.finish()
                piece += rest
                calls = [{"index": at, **call.value} for at, call in enumerate(found[: self._most_calls])]
        if piece or chunk.logprobs:
            logprobs = self._logprobs(chunk.logprobs, chunk.guesses) if self._has_logprobs else None
            events.append(_delta(index, {"content": piece}, logprobs=logprobs))
        if calls:
            events.append(_delta(index, {"tool_calls": calls}))
        if chunk.finish_reason is not None:
            events.append(_delta(index, {}, reason="tool_calls" if calls else chunk.finish_reason))
        return events

    def _reader(self) -> ToolReader | None:
        form = self.served.template.tools
        return ToolReader(form, self._begun) if form is not None and self._takes_tools else None

    def _logprobs(self, scored: Sequence[TokenLogprob], guesses: Sequence[Sequence[int]]) -> dict[str, Any]:
        """OpenAI's entries, each with its token's id, and "accepted" or "rejected" where a draft had guessed."""
        content = []
        for one, guessed in zip(scored, guesses, strict=True):
            tops = [self._entry(*top) for top in one.top]
            entry = {**self._entry(one.token, one.logprob), "top_logprobs": tops}
            if guessed:
                is_right = guessed[0] == one.token
                entry |= {"accepted": True} if is_right else {"rejected": [self._entry(token) for token in guessed]}
            content.append(entry)
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None = None) -> dict[str, Any]:
        value = self.served.tokenizer.token_bytes(token)
        entry = {"token": self.served.token_texts[token], "logprob": logprob, "bytes": list(value), "id": token}
        return {name: one for name, one in entry.items() if one is not None}


def _delta(index: int, delta: dict[str, Any], *, logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


async def _left(receive: Receive) -> None:
    """Until the client has left."""
    message: Message = {"type": ""}
    while message["type"] != "http.disconnect":
        message = await receive()
