"""Text in, text out: `generate` whole, `stream` piece by piece, and the same for a conversation.

A plain text begins behind `<|endoftext|>`, as documents do in training, and slides past the context's end. An
answer in a conversation ends at the context's end; the oldest turns are left out so that it has room.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import overload

from groundup.errors import GroundupError
from groundup.generation.decode import Generation, decode, generate_ids
from groundup.generation.detokenizer import Detokenizer
from groundup.generation.params import SamplingParams
from groundup.model import Transformer
from groundup.tokenizer import Message, Tokenizer, render


@overload
def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
) -> Generation: ...


@overload
def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: Sequence[str],
    *,
    max_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
) -> list[Generation]: ...


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str | Sequence[str],
    *,
    max_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
) -> Generation | list[Generation]:
    """Continue a text, or several in one batch; it ends at `<|endoftext|>`, a stop text or `max_tokens`.

    An empty prompt begins a new document. Of a prompt longer than the model's context, the end is read. The
    arguments are those of `SamplingParams`, and so are the errors.
    """
    params = SamplingParams(temperature, top_k, top_p, max_tokens, seed, _texts(stop))
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    ids = [prompt_ids(tokenizer, text) for text in prompts]
    results = generate_batch(model, tokenizer, ids, params, slides=True)
    return results[0] if isinstance(prompt, str) else results


def stream(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
) -> Iterator[str]:
    """As `generate` for one text, piece by piece; the pieces put together are the same text."""
    params = SamplingParams(temperature, top_k, top_p, max_tokens, seed, _texts(stop))
    return _stream_ids(model, tokenizer, prompt_ids(tokenizer, prompt), params, slides=True)


def chat_reply(
    model: Transformer,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    params: SamplingParams,
    on_left_out: Callable[[int], None] | None = None,
) -> Generation:
    """The assistant's answer. Arguments and errors as `stream_chat`."""
    ids = _chat_ids(model, tokenizer, messages, params, on_left_out)
    return generate_batch(model, tokenizer, [ids], params)[0]


def stream_chat(
    model: Transformer,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    params: SamplingParams,
    on_left_out: Callable[[int], None] | None = None,
) -> Iterator[str]:
    """The assistant's answer, piece by piece.

    Args:
        model: an assistant.
        tokenizer: of the model.
        messages: the conversation; what does not fit into the context is left out from the oldest turn on, a
            system message stays.
        params: how tokens are drawn; `max_tokens`, but no more than half the context, are kept free.
        on_left_out: called with the number of messages that were left out, if any.

    Raises:
        GroundupError: not even the last message fits.
    """
    ids = _chat_ids(model, tokenizer, messages, params, on_left_out)
    return _stream_ids(model, tokenizer, ids, params)


def generate_batch(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    stop_ids: Collection[int] | None = None,
    *,
    seeds: Sequence[int | None] | None = None,
    slides: bool = False,
) -> list[Generation]:
    """`generate_ids` with stop texts, and with the text of what was written."""
    watched = [Detokenizer(tokenizer, params.stop) for _ in prompts]

    def on_token(row: int, token: int) -> bool:
        watched[row].add(token)
        return watched[row].stopped

    stop_ids = end_ids(tokenizer) if stop_ids is None else stop_ids
    unused = tokenizer.unused_ids(model.config.vocab_size)
    results = generate_ids(model, prompts, params, stop_ids, on_token, seeds=seeds, slides=slides, never=unused)
    for result, detokenizer in zip(results, watched, strict=True):
        detokenizer.finish()
        result.text = detokenizer.text
    return results


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
        while n_left_out < len(turns) - 1 and turns[n_left_out]["role"] == "assistant":
            n_left_out += 1


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A plain prompt as the start of a document."""
    return [tokenizer.end_of_text_id, *tokenizer.encode(prompt)]


def end_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end an answer or a document."""
    return tokenizer.end_ids


def _chat_ids(
    model: Transformer,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    params: SamplingParams,
    on_left_out: Callable[[int], None] | None,
) -> list[int]:
    context = model.config.context_length
    ids, n_left_out = chat_prompt(tokenizer, messages, context - min(params.max_tokens, context // 2))
    if n_left_out and on_left_out is not None:
        on_left_out(n_left_out)
    return ids


def _stream_ids(
    model: Transformer, tokenizer: Tokenizer, ids: Sequence[int], params: SamplingParams, *, slides: bool = False
) -> Iterator[str]:
    detokenizer = Detokenizer(tokenizer, params.stop)
    pieces: list[str] = []

    def on_token(row: int, token: int) -> bool:
        pieces.append(detokenizer.add(token))
        return detokenizer.stopped

    unused = tokenizer.unused_ids(model.config.vocab_size)
    for _ in decode(model, [ids], params, end_ids(tokenizer), on_token, slides=slides, never=unused):
        if pieces and pieces[-1]:
            yield pieces[-1]
        pieces.clear()
    if rest := detokenizer.finish():
        yield rest


def _texts(stop: str | Sequence[str]) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop)
