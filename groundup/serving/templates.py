"""A conversation to token ids, by the model's own layout.

A model of ours has `tokenizer.chat`, an imported one a program of its own (`tokenizer.template`). What OpenAI's clients
send becomes the messages that those know, tools and their calls too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from groundup.errors import DataError
from groundup.generation.tools import OURS, ToolCall, ToolFormat, describe_tools, format_of
from groundup.tokenizer import Message, Tokenizer, render
from groundup.tokenizer.pretrained import PretrainedTokenizer


class ChatTemplate:
    """The layout of a model's conversations."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.tools: ToolFormat | None = OURS
        if isinstance(tokenizer, PretrainedTokenizer):
            self.tools = format_of("".join(tokenizer.chat_templates.values()))

    def ids(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """A conversation up to the assistant's turn.

        Args:
            messages: as OpenAI's clients send them.
            tools: that the assistant may call.

        Raises:
            DataError: the model has no such roles, tools or chats at all, or its template refuses them.
        """
        if tools and self.tools is None:
            raise DataError("this model's chat template has no tools.")
        turns = [
            {
                **one,
                "role": "system" if one["role"] == "developer" else one["role"],
                "content": _text(one.get("content")),
                "tool_calls": [_tool_call(call) for call in one.get("tool_calls") or ()],
            }
            for one in messages
        ]
        if not isinstance(self._tokenizer, PretrainedTokenizer):
            return self._of_ours(turns, tools)
        return self._of_template(self._tokenizer, turns, tools)

    def _of_ours(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[int]:
        turns: list[Message] = []
        for one in messages:
            if "name" in one:
                raise DataError("messages.name is not supported: this model's conversations have no names.")
            content = "\n".join(filter(None, (one["content"], OURS.write(one["tool_calls"]))))
            turns.append({"role": one["role"], "content": content})
        if tools:
            first = turns.pop(0)["content"] if turns[0]["role"] == "system" else ""
            turns.insert(0, {"role": "system", "content": "\n\n".join(filter(None, (first, describe_tools(tools))))})
        return render(self._tokenizer, turns, add_generation_prompt=True).ids

    def _of_template(
        self, tokenizer: PretrainedTokenizer, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]
    ) -> list[int]:
        turns = []
        for one in messages:
            calls = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in one["tool_calls"]
            ]
            turn = {**one, "tool_calls": calls or None}
            turns.append({name: value for name, value in turn.items() if value is not None})
        laid_out = tokenizer.chat_template(with_tools=bool(tools)).lay_out(turns, tools, add_generation_prompt=True)
        return tokenizer.encode_laid_out(laid_out).ids


def _text(content: Any) -> Any:
    """Of parts, the text; what a template gets where there is none depends on it."""
    return "\n".join(part["text"] for part in content) if isinstance(content, list) else content


def _tool_call(value: dict[str, Any]) -> ToolCall:
    function = value["function"]
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise DataError("tool_calls.function.arguments: must be the text of a JSON object.")
    return ToolCall(function["name"], arguments, value["id"])
