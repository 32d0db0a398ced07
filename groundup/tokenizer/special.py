"""Control tokens, and the layout of a chat that is made of them.

Control tokens carry structure, never text: they stand at fixed ids from 0 on, in every tokenizer, and
no text can contain one. Each of the four roles opens its messages with its own token, a tool's result too:
`<|user|>How warm is it?<|end|><|assistant|>{"look": "thermometer"}<|end|><|tool|>21<|end|><|assistant|>`.
Spare ones are kept for what later stages may need (thoughts, parts of a file), so that a trained model
never has to grow its vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
SYSTEM = "<|system|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
END = "<|end|>"
TOOL = "<|tool|>"

CONTROL_TOKENS = (END_OF_TEXT, PAD, SYSTEM, USER, ASSISTANT, END, TOOL)
"""In the order of their ids."""

ROLE_TOKENS = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT, "tool": TOOL}
"""What opens a message, by the role of who speaks."""

REPLACEMENT = "\ufffd"
"""What stands for a character that has no token, and for a lone surrogate."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% elif message['role'] in ['system', 'user', 'tool'] %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% else %}{{ raise_exception('The role of a message is system, user, assistant or tool.') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""`chat.render` in Jinja, for transformers; what lies between the generation marks is learned."""


def spare_token(index: int) -> str:
    """The name of a spare control token, numbered from 0."""
    return f"<|spare_{index}|>"


def control_tokens(spare_tokens: int, own: Sequence[str] = ()) -> list[str]:
    """All control tokens in the order of their ids: those of every tokenizer, the user's own, the spare ones."""
    return [*CONTROL_TOKENS, *own, *(spare_token(index) for index in range(spare_tokens))]


def control_token(name: str) -> AddedToken:
    """A control token as the engine wants it: found as it stands, before any change of the text."""
    return AddedToken(name, special=True, normalized=False)
