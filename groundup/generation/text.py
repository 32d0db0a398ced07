"""Text in, text out: `generate` whole, `stream` piece by piece, and the same for a conversation.

A plain text begins behind `<|endoftext|>`, as documents do in training, and slides past the context's end. An
answer in a conversation ends at the context's end; the oldest turns are left out so that it has room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

from groundup.errors import GroundupError
from groundup.generation.calculator import with_calculator
from groundup.generation.engine import Engine
from groundup.generation.params import SamplingParams
from groundup.generation.request import Generation, Request
from groundup.model import Transformer
from groundup.tokenizer import Message, Tokenizer, render

_SLOTS = 128
"""Most texts that are written at the same time."""


@overload
def generate(model: Transformer, tokenizer: Tokenizer, prompt: str, **options: Any) -> Generation: ...


@overload
def generate(model: Transformer, tokenizer: Tokenizer, prompt: Sequence[str], **options: Any) -> list[Generation]: ...


def generate(
    model: Transformer, tokenizer: Tokenizer, prompt: str | Sequence[str], **options: Any
) -> Generation | list[Generation]:
    """Continue a text, or several in one batch; it ends at `<|endoftext|>`, a stop text or `max_tokens`.

    An empty prompt begins a new document. Of a prompt longer than the model's context, the end is read. The
    options are those of `SamplingParams`, and so are the errors; `stop` may be one text.
    """
    params = _params(options)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    ids = [prompt_ids(tokenizer, text) for text in prompts]
    results = generate_batch(model, tokenizer, ids, params, slides=True)
    return results[0] if isinstance(prompt, str) else results


def stream(model: Transformer, tokenizer: Tokenizer, prompt: str, **options: Any) -> Iterator[str]:
    """As `generate` for one text, piece by piece; the pieces put together are the same text."""
    params = _params(options)
    request = text_request(model, tokenizer, prompt, params)
    return _pieces(Engine(model, tokenizer, slots=1, length=len(request.ids) + params.max_tokens), request)


def chat_reply(
    model: Transformer,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    params: SamplingParams,
    on_left_out: Callable[[int], None] | None = None,
) -> Generation:
    """The assistant's answer; where it called the calculator, ids and log-probabilities are those behind the result.

    Arguments, text and errors as `stream_chat`.
    """
    _check_single(params.n)
    used, replies = Engine(model, tokenizer, slots=1), list[Generation]()

    def ask(turns: Sequence[Message]) -> Iterator[str]:
        replies.append(used.run([chat_request(model, tokenizer, turns, params, on_left_out)])[0][0])
        yield replies[-1].text

    text = "".join(with_calculator(ask, [*messages]))
    replies[-1].text = text
    return replies[-1]


def stream_chat(
    model: Transformer,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    params: SamplingParams,
    on_left_out: Callable[[int], None] | None = None,
    *,
    engine: Engine | None = None,
) -> Iterator[str]:
    """The assistant's answer, piece by piece. Where it calls the calculator, that is "[3 * 4 = 12]", and what it says
    then follows.

    Args:
        model: an assistant.
        tokenizer: of the model.
        messages: the conversation; what does not fit into the context is left out from the oldest turn on, a
            system message stays.
        params: how tokens are drawn; `max_tokens`, but no more than half the context, are kept free.
        on_left_out: called with the number of messages that were left out, if any.
        engine: of this model; one that is kept reads a conversation's earlier turns once.

    Raises:
        GroundupError: not even the last message fits, or several texts are asked for.
    """
    used = engine or Engine(model, tokenizer, slots=1)

    def ask(turns: Sequence[Message]) -> Iterator[str]:
        return _pieces(used, chat_request(model, tokenizer, turns, params, on_left_out))

    return with_calculator(ask, [*messages])


def generate_batch(
    model: Transformer,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    seeds: Sequence[int | None] | None = None,
    slides: bool = False,
) -> list[Generation]:
    """Continue token ids, each prompt once.

    Args:
        model: put into evaluation mode.
        tokenizer: of the model; None: results have no text.
        prompts: at least one token each; of one as long as the context, the end is read, so that `max_tokens` more
            have room, or at least half the context remains.
        params: how tokens are drawn.
        seeds: of each prompt (default: `params.seed`).
        slides: go on past the context's end, reading the last half again, instead of finishing with "length".

    Raises:
        DataError: an empty prompt, or an id the model does not have.
        GroundupError: the model's logits are not numbers, or `params.n` is not 1.
    """
    _check_single(params.n)
    if not prompts:
        return []
    context = model.config.context_length
    seeds = [None] * len(prompts) if seeds is None else seeds
    requests = [
        Request(_fit(prompt, context, params.max_tokens), params, seed, slides=slides)
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    length = max(len(request.ids) for request in requests) + params.max_tokens
    engine = Engine(model, tokenizer, slots=min(len(prompts), _SLOTS), length=length)
    return [results[0] for results in engine.run(requests)]


def chat_prompt(tokenizer: Tokenizer, messages: Sequence[Message], most_tokens: int) -> tuple[list[int], int]:
    """A conversation up to the assistant's turn, in at most so many tokens.

    Returns:
        Its ids, and how many of the oldest messages were left out (a question always with its answer).

    Raises:
        GroundupError: not even the last message fits.
    """
    first = [message for message in messages[:1] if message.get("role") == "system"]
    turns = list(messages[len(first) :])
    n_left_out = 0
    while True:
        ids = render(tokenizer, [*first, *turns[n_left_out:]], add_generation_prompt=True).ids
        if len(ids) <= most_tokens:
            return ids, n_left_out
        if len(turns) - n_left_out <= 1:
            raise GroundupError(
                f"the message is {len(ids)} tokens long, the model's context leaves room for {most_tokens}.",
                "Say it in fewer words.",
            )
        n_left_out += 1
        while n_left_out < len(turns) - 1 and turns[n_left_out]["role"] != "user":
            n_left_out += 1


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A plain prompt as the start of a document."""
    return [tokenizer.end_of_text_id, *tokenizer.encode(prompt)]


def text_request(model: Transformer, tokenizer: Tokenizer, prompt: str, params: SamplingParams) -> Request:
    """A plain prompt as the start of a document that may pass the context's end; of a long one the end is read."""
    ids = _fit(prompt_ids(tokenizer, prompt), model.config.context_length, params.max_tokens)
    return Request(ids, params, slides=True)


def _fit(prompt: Sequence[int], context: int, max_tokens: int) -> list[int]:
    """A prompt, cut on the left where no room is left to write."""
    ids = list(prompt)
    return ids if len(ids) < context else ids[-(context - min(max_tokens, context // 2)) :]


def chat_request(
    model: Transformer,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    params: SamplingParams,
    on_left_out: Callable[[int], None] | None = None,
) -> Request:
    """A conversation up to the assistant's turn. Arguments and errors as `stream_chat`."""
    context = model.config.context_length
    ids, n_left_out = chat_prompt(tokenizer, messages, context - min(params.max_tokens, context // 2))
    if n_left_out and on_left_out is not None:
        on_left_out(n_left_out)
    return Request(ids, params)


def _pieces(engine: Engine, request: Request) -> Iterator[str]:
    _check_single(request.params.best_of or request.params.n)
    return (chunk.text for chunk in engine.stream(request) if chunk.text)


def _check_single(n: int) -> None:
    """Hold that no text is left out, or mixed with another's pieces."""
    if n > 1:
        raise GroundupError(f"{n} texts of a prompt were asked for: one is returned.", "Engine.run returns all.")


def _params(options: dict[str, Any]) -> SamplingParams:
    stop = options.get("stop", ())
    return SamplingParams(**{**options, "stop": (stop,) if isinstance(stop, str) else tuple(stop)})
