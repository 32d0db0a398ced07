"""Conversations to token ids: which ids a chat has, and which of them the assistant learns.

In: messages. Out: `<|user|>text<|end|><|assistant|>text<|end|>` as ids. Every message is encoded by itself
and its control tokens are added as ids, so that no message can end itself or speak in another role.
The Jinja template that is saved with the tokenizer gives the same ids in transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

from groundup.errors import DataError
from groundup.tokenizer.special import ROLE_TOKENS
from groundup.tokenizer.tokenizer import Tokenizer


class Message(TypedDict):
    """One turn of a conversation; a tool's is what it gave back."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as ids.

    Attributes:
        ids: its tokens.
        loss_mask: one flag per token, true on what the assistant says and on the `<|end|>` behind it.
    """

    ids: list[int]
    loss_mask: list[bool]


def render(tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> Rendered:
    """Lay out a conversation.

    Args:
        tokenizer: of the model.
        messages: the turns.
        add_generation_prompt: end with `<|assistant|>`, for the model to go on.

    Raises:
        DataError: an unknown role, or content that is not text.
    """
    openings = {role: tokenizer.role_id(role) for role in ROLE_TOKENS}
    for place, message in enumerate(messages):
        if message.get("role") not in openings or not isinstance(message.get("content"), str):
            raise DataError(
                f"message {place} of {len(messages)} = {dict(message)!r:.120}: not a message.",
                'Write {"role": "system" | "user" | "assistant" | "tool", "content": "text"}.',
            )
    ids: list[int] = []
    loss_mask: list[bool] = []
    contents = tokenizer.encode_batch([message["content"] for message in messages])
    for message, content in zip(messages, contents, strict=True):
        is_learned = message["role"] == "assistant"
        ids += [openings[message["role"]], *content, tokenizer.end_id]
        loss_mask += [False, *[is_learned] * (len(content) + 1)]
    if add_generation_prompt:
        ids.append(openings["assistant"])
        loss_mask.append(False)
    return Rendered(ids, loss_mask)
