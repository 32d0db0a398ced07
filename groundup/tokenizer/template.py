"""A model's own chat template: a Jinja program of somebody else's, from messages to text.

It runs in a sandbox, as transformers runs it, and sees plain data only. What was said stays text: where it spells a
control token, a mark that no text has breaks the name before the program runs, and is taken out again before encoding.

What the assistant learns is found by segments, never by looking for words in the text. A template with
`{% generation %}` says it. Of others, an answer is what changes in the text when its message does: it begins behind
what the template writes to ask for it (`add_generation_prompt`), and ends with the control token that stands behind it.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar, NamedTuple, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from groundup.errors import DataError

_MOST_CHARACTERS = 1 << 24  # of a conversation that is laid out
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class LaidOut:
    """A conversation as text.

    Attributes:
        text: with `mark` inside of every name of a control token that somebody said.
        mark: one character, to be taken out.
        learned: what the assistant learns, as spans of characters (first, behind the last).
    """

    text: str
    mark: str
    learned: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as ids.

    Attributes:
        ids: its tokens.
        loss_mask: one flag per token, true on what the assistant says and on the end behind it.
    """

    ids: list[int]
    loss_mask: list[bool]

    @property
    def n_answered(self) -> int:
        """How many tokens there are up to the end of the last answer: some templates write a line end behind it."""
        return max((place + 1 for place, flag in enumerate(self.loss_mask) if flag), default=len(self.ids))


class ChatTemplate:
    """A program that lays out conversations.

    Args:
        source: the program, in Jinja.
        control_tokens: the names of the model's.
        named_tokens: what the program may name: "bos_token" and so on.
    """

    def __init__(self, source: str, control_tokens: Collection[str], named_tokens: Mapping[str, str]) -> None:
        self.source, self._named = source, named_tokens
        names = sorted(control_tokens, key=len, reverse=True)  # where one begins another, the longer is meant
        self.names = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")

    def lay_out(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = (), *, add_generation_prompt: bool = False
    ) -> LaidOut:
        """A conversation as text, nothing of which is learned.

        Raises:
            DataError: the program refuses the conversation, or fails.
        """
        marks = _unused_marks([*messages, *tools])
        return LaidOut(self._plain(messages, marks, tools, add_generation_prompt), marks.said, [])

    def lay_out_to_learn(self, messages: Sequence[Mapping[str, Any]], first: int = 0) -> LaidOut:
        """The same, with what the assistant learns from the message with the number `first` on.

        Raises:
            DataError: as `lay_out`; or no control token stands behind an answer: nobody could learn to end.
        """
        if self.end is None:
            raise DataError(
                "the model's chat template writes no control token behind an answer: the model could not learn to end.",
                "Give it one that does (chat_template.jinja in the model's folder).",
            )
        marks = _unused_marks(messages)
        if _GENERATION.search(self.source):
            text, spans = _spans(self._text(messages, marks), marks)
            n_before = len(_spans(self._text(messages[:first], marks), marks)[1]) if first else 0
            return LaidOut(text, marks.said, spans[n_before:])
        text = self._plain(messages, marks)
        places = [place for place in range(first, len(messages)) if messages[place]["role"] == "assistant"]
        return LaidOut(text, marks.said, [self._answer(text, messages, place, marks) for place in places])

    @functools.cached_property
    def end(self) -> str | None:
        """The control token behind an answer; None: there is none."""
        talk, marks = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], _unused_marks(())
        text = self._plain(talk, marks)
        found = re.compile(rf"\s*{self.names.pattern}").match(text, self._content(text, talk, 1, marks)[1])
        return None if found is None else found[1]

    def _answer(self, text: str, messages: Sequence[Mapping[str, Any]], place: int, marks: _Marks) -> tuple[int, int]:
        """Where in a text an answer stands, with the end behind it."""
        first, last = self._content(text, messages, place, marks)
        if place:
            asked = self._plain(messages[:place], marks, add_generation_prompt=True)
            if len(asked) <= first and text.startswith(asked):
                first = len(asked)
        end = re.compile(rf"\s*{re.escape(str(self.end))}").match(text, last)
        return first, last if end is None else end.end()

    def _content(self, text: str, messages: Sequence[Mapping[str, Any]], place: int, marks: _Marks) -> tuple[int, int]:
        """Where in a text the words of a message stand: where another word stands when the message is that."""
        others = [*messages[:place], {**messages[place], "content": marks.other}, *messages[place + 1 :]]
        before, _, behind = self._plain(others, marks).partition(marks.other)
        if not (text.startswith(before) and text[len(before) :].endswith(behind)):
            raise DataError(
                "the model's chat template lays a conversation out otherwise when an answer has other words.",
                "Mark what is learned in it: {% generation %} … {% endgeneration %}.",
            )
        return len(before), len(text) - len(behind)

    def _plain(
        self, messages: Sequence[Mapping[str, Any]], marks: _Marks, tools: Sequence[Any] = (),
        add_generation_prompt: bool = False,
    ) -> str:  # fmt: skip
        return _spans(self._text(messages, marks, tools, add_generation_prompt), marks)[0]

    def _text(
        self, messages: Sequence[Mapping[str, Any]], marks: _Marks, tools: Sequence[Any] = (),
        add_generation_prompt: bool = False,
    ) -> str:  # fmt: skip
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._program.generate(
                messages=self._broken(list(messages), marks.said), tools=self._broken(list(tools), marks.said) or None,
                documents=None, add_generation_prompt=add_generation_prompt, generation_marks=marks[1:3], **self._named,
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
        return "".join(pieces)

    @functools.cached_property
    def _program(self) -> jinja2.Template:
        return _environment().from_string(self.source)

    def _broken(self, value: Any, mark: str) -> Any:
        """With a mark behind the first letter of each name of a control token."""
        if isinstance(value, str):
            return self.names.sub(lambda found: found[0][0] + mark + found[0][1:], value)
        if isinstance(value, list):
            return [self._broken(one, mark) for one in value]
        if isinstance(value, dict):
            return {self._broken(name, mark): self._broken(one, mark) for name, one in value.items()}
        return value


class _Marks(NamedTuple):
    """Code points that are no characters, and that nobody said.

    Attributes:
        said: breaks the names of control tokens that were said.
        begin, end: around what a template says is learned.
        other: another message.
    """

    said: str
    begin: str
    end: str
    other: str


def _unused_marks(messages: Sequence[Any]) -> _Marks:
    said = json.dumps(messages, ensure_ascii=False)
    marks = [mark for code in range(0xFDD0, 0xFDF0) if (mark := chr(code)) not in said]
    if len(marks) < 4:
        raise DataError("the conversation has code points that are no characters.")
    return _Marks(*marks[:4])


def _spans(text: str, marks: _Marks) -> tuple[str, list[tuple[int, int]]]:
    """A text without the marks of what is learned, and what stood between them."""
    plain, *parts = text.split(marks.begin)
    spans = []
    for part in parts:
        learned, _, rest = part.partition(marks.end)
        spans.append((len(plain), len(plain) + len(learned)))
        plain += learned + rest
    return plain, spans


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: what stands in it is learned."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """A block that is given to `_marked`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked", [jinja2.nodes.ContextReference()])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _marked(self, context: jinja2.runtime.Context, caller: Callable[[], str]) -> str:
        begin, end = context["generation_marks"]
        return f"{begin}{caller()}{end}"


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
