"""Conversations to token ids: which ids a chat has, and which of them the assistant learns.

In: messages. Out: `<|user|>text<|end|><|assistant|>text<|end|>` as ids. Every message is encoded by itself
and its control tokens are added as ids, so that no message can end itself or speak in another role.
The Jinja template that is saved with the tokenizer gives the same ids and the same mask in transformers.
The chats of an imported model are laid out by a template of its own (`template.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

from groundup.errors import DataError
from groundup.tokenizer.pretrained import PretrainedTokenizer
from groundup.tokenizer.special import ROLE_TOKENS
from groundup.tokenizer.template import Rendered
from groundup.tokenizer.tokenizer import Tokenizer


class Message(TypedDict):
    """One turn of a conversation; a tool's is what it gave back."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


def render(
    tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = False, learned_from: int = 0
) -> Rendered:
    """Lay out a conversation: by our control tokens, or by the program that an imported model brings.

    Args:
        tokenizer: of the model.
        messages: the turns.
        add_generation_prompt: end with what opens an answer, for the model to go on.
        learned_from: the number of the first message of which something may be learned.

    Raises:
        DataError: an unknown role, content that is not text, or no chat template, or one that refuses the conversation.
    """
    for place, message in enumerate(messages):
        if message.get("role") not in ROLE_TOKENS or not isinstance(message.get("content"), str):
            raise DataError(
                f"message {place} of {len(messages)} = {dict(message)!r:.120}: not a message.",
                'Write {"role": "system" | "user" | "assistant" | "tool", "content": "text"}.',
            )
    if isinstance(tokenizer, PretrainedTokenizer):
        template = tokenizer.chat_template()
        if add_generation_prompt:
            return tokenizer.encode_laid_out(template.lay_out(messages, add_generation_prompt=True))
        return tokenizer.encode_laid_out(template.lay_out_to_learn(messages, learned_from))
    ids: list[int] = []
    loss_mask: list[bool] = []
    contents = tokenizer.encode_batch([message["content"] for message in messages])
    for place, (message, content) in enumerate(zip(messages, contents, strict=True)):
        is_learned = message["role"] == "assistant" and place >= learned_from
        ids += [tokenizer.role_id(message["role"]), *content, tokenizer.end_id]
        loss_mask += [False, *[is_learned] * (len(content) + 1)]
    if add_generation_prompt:
        ids.append(tokenizer.role_id("assistant"))
        loss_mask.append(False)
    return Rendered(ids, loss_mask)
