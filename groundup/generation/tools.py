"""Tool calls: how each family of models writes them, and back from its text to names and arguments.

    ours     <tool>{"name": "add", "arguments": {"a": 1}}</tool>
    hermes   <tool_call>\\n{"name": "add", "arguments": {"a": 1}}\\n</tool_call>                 (Hermes, Qwen)
    llama    <|python_tag|>{"name": "add", "parameters": {"a": 1}}; {…}, or the object alone    (Llama 3)
    mistral  [TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}], or [TOOL_CALLS]add[ARGS]{"a": 1}

A text that is no whole call stays a text.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_DECODER = json.JSONDecoder()
_NAMED = re.compile(r"\s*([A-Za-z0-9_.\-]+)\s*(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{)")


@dataclass(frozen=True)
class ToolCall:
    """A function and its arguments.

    Attributes:
        name: of the function.
        arguments: by name.
        id: which the tool's result refers to; nine letters and digits, which Mistral's templates insist on.
    """

    name: str
    arguments: dict[str, Any]
    id: str = field(default_factory=lambda: secrets.token_hex(5)[:9], compare=False)

    @property
    def value(self) -> dict[str, Any]:
        """As OpenAI's clients expect it."""
        arguments = json.dumps(self.arguments, ensure_ascii=False)
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": arguments}}


@dataclass(frozen=True)
class ToolFormat:
    """How a family writes calls.

    Attributes:
        name: of the format.
        opening: what stands before a call.
        closing: what stands behind it.
        arguments: the key of the arguments.
        is_list: all calls are one JSON list.
        is_bare: an answer that is a JSON object from its beginning is a call, too.
        inside: what else may be a control token within a call.
    """

    name: str
    opening: str
    closing: str = ""
    arguments: str = "arguments"
    is_list: bool = False
    is_bare: bool = False
    inside: tuple[str, ...] = ()

    @property
    def marks(self) -> tuple[str, ...]:
        """What may be a control token, and must stand in the text to be found."""
        return tuple(one.strip() for one in (self.opening, self.closing, *self.inside) if one.strip())

    def write(self, calls: Sequence[ToolCall]) -> str:
        """Calls as the model writes them."""
        objects = [
            json.dumps({"name": call.name, self.arguments: call.arguments}, ensure_ascii=False) for call in calls
        ]
        if self.is_list:
            return f"{self.opening}[{', '.join(objects)}]"
        if self.is_bare:
            return self.opening + "; ".join(objects)
        return "\n".join(f"{self.opening}{one}{self.closing}" for one in objects)

    def read(self, text: str) -> list[ToolCall]:
        """The calls in a text that begins with one; none if it is not calls from beginning to end.

        A last closing mark may be missing: writing ends there.
        """
        mark, end = self.opening.strip(), self.closing.strip()
        calls: list[ToolCall] = []
        place = _behind(text, 0, mark)
        while place < len(text):
            name = _NAMED.match(text, place) if self.is_list else None
            try:
                found, place = _DECODER.raw_decode(text, _behind(text, name.end() if name else place))
            except (ValueError, RecursionError):
                return []
            objects = found if isinstance(found, list) and self.is_list else [found]
            for one in objects:
                call = ToolCall(name[1], one) if name and isinstance(one, dict) else self._call(one)
                if call is None:
                    return []
                calls.append(call)
            for skipped in (end, ";" if self.is_bare else "", "," if self.is_list else "", mark):
                place = _behind(text, place, skipped)
        return calls

    def begins(self, text: str, said: str = "") -> int:
        """Where in a text, behind what was said, a call begins or may begin as more comes; its length: nowhere."""
        mark = self.opening.strip()
        if (place := text.find(mark)) >= 0:
            return place
        if self.is_bare and (said + text).lstrip()[:1] in ("", "{"):
            return 0
        sizes = range(min(len(mark) - 1, len(text)), 0, -1)
        return len(text) - next((size for size in sizes if text.endswith(mark[:size])), 0)

    def _call(self, value: Any) -> ToolCall | None:
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            return None
        arguments: Any = next((value[key] for key in (self.arguments, "arguments", "parameters") if key in value), {})
        return ToolCall(value["name"], arguments) if isinstance(arguments, dict) else None


def _behind(text: str, place: int, mark: str = "") -> int:
    """The place behind blanks, and behind a mark and the blanks that follow it, if it stands there."""
    place += len(text[place:]) - len(text[place:].lstrip())
    return _behind(text, place + len(mark)) if mark and text.startswith(mark, place) else place


OURS = ToolFormat("ours", "<tool>", "</tool>")
HERMES = ToolFormat("hermes", "<tool_call>\n", "\n</tool_call>")
LLAMA = ToolFormat("llama", "<|python_tag|>", arguments="parameters", is_bare=True)
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS] ", is_list=True, inside=("[ARGS]", "[CALL_ID]"))


def format_of(template: str) -> ToolFormat | None:
    """What the chat template of a model speaks of; None: it has no tools."""
    if "<tool_call>" in template:
        return HERMES
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    return LLAMA if "python_tag" in template or "ipython" in template else None


def describe_tools(tools: Sequence[dict[str, Any]]) -> str:
    """What a model of ours is told of its tools, in a system message."""
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    example = OURS.write([ToolCall("NAME", {})])
    return f"Tools, one a line:\n{listed}\nTo call one, answer {example}; what it gives back follows."


def call_schema(tools: Sequence[dict[str, Any]], form: ToolFormat) -> dict[str, Any]:
    """The JSON schema of a call of one of these tools."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                form.arguments: tool["function"].get("parameters") or {"type": "object", "properties": {}},
            },
            "required": ["name", form.arguments],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return {"type": "array", "items": schema, "minItems": 1, "maxItems": 1} if form.is_list else schema


class ToolReader:
    """An answer as it comes, parted into text and calls.

    Args:
        form: how calls are written.
        begun: what of the answer stands at the end of the prompt already.
    """

    def __init__(self, form: ToolFormat, begun: str = "") -> None:
        self._form, self._held, self._is_begun = form, begun, bool(begun)
        self._said = ""

    def add(self, piece: str) -> str:
        """More of the answer; what of it is certain to be text."""
        self._held += piece
        if self._is_begun:
            return ""
        place = self._form.begins(self._held, self._said)
        text, self._held = self._held[:place], self._held[place:]
        self._is_begun = self._held.startswith(self._form.opening.strip())
        self._said += text
        return text

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The rest: text, or calls."""
        calls = self._form.read(self._held) if self._held.strip() else []
        return ("", calls) if calls else (self._held, [])
