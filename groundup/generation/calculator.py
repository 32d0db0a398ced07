"""A tool that a model can learn to use: arithmetic, exactly, as the text that stands for the result."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

from groundup.generation.tools import OURS, ToolCall
from groundup.tokenizer import Message

MOST_CHARACTERS = 200
MOST_DIGITS = 50
_OPERATIONS: dict[Any, Callable[..., Fraction]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip


def calculate(expression: str) -> str:
    """The value of an expression of numbers, + - * / // % and parentheses; "error: …" if it has none.

    Nothing else is evaluated: no names, no calls, no powers. Fractions are exact; what does not end is rounded to six
    places.
    """
    try:
        if len(expression) > MOST_CHARACTERS:
            raise ValueError("too long")
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (ArithmeticError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"error: {str(error) or type(error).__name__}"
    if value.denominator == 1:
        return str(value.numerator)
    return f"{float(value):.6f}".rstrip("0").rstrip(".")


def write_call(expression: str) -> str:
    """How a model asks for it."""
    return OURS.write([ToolCall("calculate", {"expression": expression})])


def read_call(text: str) -> str | None:
    """The expression of an answer that is one call of the calculator, or None."""
    text = text.strip()
    is_whole = text.startswith(OURS.opening) and text.endswith(OURS.closing)
    calls = OURS.read(text) if is_whole else []
    expression = calls[0].arguments.get("expression") if [call.name for call in calls] == ["calculate"] else None
    return expression if isinstance(expression, str) else None


def tool_turn(answer: str) -> Message | None:
    """What the calculator says to an answer that is one call of it, or None."""
    expression = read_call(answer)
    return None if expression is None else {"role": "tool", "content": calculate(expression)}


def with_calculator(ask: Callable[[Sequence[Message]], Iterator[str]], turns: list[Message]) -> Iterator[str]:
    """An answer, piece by piece, in which one call of the calculator is run.

    Of the call a reader sees "[3 * 4 = 12] ", and then what the model says to the result.

    Args:
        ask: the model's answer to a conversation, piece by piece.
        turns: the conversation; the assistant's turns and the calculator's are added to it, as far as they have come.
    """
    for may_call in (True, False):
        asked, answer, held = [*turns], Message(role="assistant", content=""), ""
        turns.append(answer)
        for piece in ask(asked):
            answer["content"] += piece
            held += piece
            if not (may_call and OURS.begins(answer["content"].lstrip()) == 0):
                yield held
                held = ""
        if not may_call or (expression := read_call(answer["content"])) is None:
            if held:
                yield held
            return
        turns.append({"role": "tool", "content": calculate(expression)})
        yield f"[{expression} = {turns[-1]['content']}] "


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return _bounded(Fraction(str(node.value)))
    operation = _OPERATIONS.get(type(getattr(node, "op", None)))
    if operation is None:
        raise ValueError("not arithmetic")
    if isinstance(node, ast.BinOp):
        return _bounded(Fraction(operation(_value(node.left), _value(node.right))))
    assert isinstance(node, ast.UnaryOp)
    return Fraction(operation(_value(node.operand)))


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) >= 10**MOST_DIGITS:
        raise ValueError("too large")
    return value
