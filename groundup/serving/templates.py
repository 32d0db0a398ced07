"""A conversation to token ids, by the model's own layout.

A model of ours has `tokenizer.chat`. An imported one brings a Jinja template, which is a program of a stranger: it runs
in a sandbox, as transformers runs it, and sees plain data only. What a client wrote stays text: where it spells a
control token, a mark that no text has breaks the name before rendering and is taken out again before encoding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any, ClassVar, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from groundup.errors import DataError
from groundup.generation.tools import OURS, ToolCall, ToolFormat, describe_tools, format_of
from groundup.tokenizer import Message, Tokenizer, render
from groundup.tokenizer.pretrained import PretrainedTokenizer

_MOST_CHARACTERS = 1 << 24  # of a rendered conversation
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # code points that are no characters


class ChatTemplate:
    """The layout of a model's conversations."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._templates: dict[str, jinja2.Template] = {}
        names = sorted(tokenizer.control_tokens, key=len, reverse=True)  # where one begins another, the longer is meant
        self._names = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")
        self.tools: ToolFormat | None = OURS
        if isinstance(tokenizer, PretrainedTokenizer):
            sources = tokenizer.chat_templates
            self._templates = {name: _environment().from_string(source) for name, source in sources.items()}
            self.tools = format_of("".join(sources.values()))

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
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise DataError("this model has no chat template.", "Continue texts with it: /v1/completions.")
        return self._of_template(self._tokenizer, self._templates[name], turns, tools)

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
        self, tokenizer: PretrainedTokenizer, template: jinja2.Template, messages: Any, tools: Any
    ) -> list[int]:
        turns = []
        for one in messages:
            calls = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in one["tool_calls"]
            ]
            turn = {**one, "tool_calls": calls or None}
            turns.append({name: value for name, value in turn.items() if value is not None})
        said = json.dumps([turns, tools], ensure_ascii=False)
        mark = next((mark for mark in _MARKS if mark not in said), None)
        if mark is None:
            raise DataError("the conversation has code points that are no characters.")
        pieces: list[str] = []
        size = 0
        try:
            for piece in template.generate(
                messages=self._broken(turns, mark), tools=self._broken(list(tools), mark) or None, documents=None,
                add_generation_prompt=True, **tokenizer.named_tokens,
            ):  # fmt: skip
                pieces.append(piece)
                size += len(piece)
                if size > _MOST_CHARACTERS:
                    raise DataError("the conversation is too long once it is laid out.")
        except DataError:
            raise
        except jinja2.TemplateError as error:
            raise DataError(f"the model's chat template refuses this conversation: {str(error)[:200]}.") from None
        except Exception as error:  # of a program of somebody else's, on data that it did not expect
            raise DataError(f"the model's chat template fails on this conversation ({type(error).__name__}).") from None
        text = "".join(pieces)
        if mark not in text:
            return tokenizer.encode_template(text)
        parts = self._names.split(text)  # text, name, text, …
        contents = iter(tokenizer.encode_batch([part.replace(mark, "") for part in parts[::2]]))
        return [
            index
            for place, part in enumerate(parts)
            for index in ([tokenizer.control_tokens[part]] if place % 2 else next(contents))
        ]

    def _broken(self, value: Any, mark: str) -> Any:
        """With a mark behind the first letter of each name of a control token."""
        if isinstance(value, str):
            return self._names.sub(lambda found: found[0][0] + mark + found[0][1:], value)
        if isinstance(value, list):
            return [self._broken(one, mark) for one in value]
        if isinstance(value, dict):
            return {self._broken(name, mark): self._broken(one, mark) for name, one in value.items()}
        return value


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


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks what is learned, means nothing here."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """What stands between the marks."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """As Jinja's, without names that begin as Python's own do."""

    def __init__(*args: Any, **attributes: Any) -> None:
        jinja2.utils.Namespace.__init__(*args, **attributes)
        if any(str(name).startswith("_") for name in dict(*args[1:], **attributes)):
            raise jinja2.exceptions.SecurityError("names of a namespace cannot begin with _")

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError("names of a namespace cannot begin with _")
        super().__setitem__(name, value)


class _Sandbox(ImmutableSandboxedEnvironment):
    """As Jinja's, and texts cannot be multiplied without bound."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuse what could fill the memory."""
        are_numbers = all(isinstance(one, int | float) and abs(one) < 1 << 32 for one in (left, right))
        if not are_numbers or (operator == "**" and abs(right) > 64):
            raise jinja2.exceptions.SecurityError(f"{operator} of such values is not allowed")
        return super().call_binop(context, operator, left, right)


def _environment() -> _Sandbox:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
        sort_keys: bool = False,
    ) -> str:  # fmt: skip
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["dict"] = lambda *args, **more: dict(*args, **more)  # not the class, which has more to it
    environment.globals["namespace"] = _Namespace
    return environment
