"""A tool that a model can learn to use: arithmetic, exactly, as the text that stands for the result."""

from __future__ import annotations

import ast
import contextlib
import json
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

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
    return f'<tool>{{"name": "calculate", "arguments": {{"expression": {json.dumps(expression)}}}}}</tool>'


def read_call(text: str) -> str | None:
    """The expression of an answer that is a call of the calculator, or None."""
    found = re.fullmatch(r"\s*<tool>(\{.*\})</tool>\s*", text, flags=re.DOTALL)
    with contextlib.suppress(ValueError, RecursionError):
        call = json.loads(found[1]) if found else None
        if isinstance(call, dict) and call.get("name") == "calculate" and isinstance(call.get("arguments"), dict):
            expression = call["arguments"].get("expression")
            return expression if isinstance(expression, str) else None
    return None


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
