"""Constrained output: which tokens may come next so that the text fits a JSON schema, a regular expression or a choice.

The grammars are llguidance's (MIT), which refuses what it cannot hold instead of ignoring it, and never fetches a
remote `$ref`. Tokens are told to it as bytes, so any tokenizer serves. An end token is allowed exactly where the text
may end.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from groundup.errors import GroundupError
from groundup.tokenizer import Tokenizer

MOST_CHARACTERS = 65_536  # of a schema, a pattern or all choices: a bound on the time to compile and the memory kept
_SPACE = "[ ]?"  # between the parts of JSON: a model could go on with blanks forever


@dataclass(frozen=True)
class Constraint:
    """What a text must be; made by `json_schema`, `regex` or `choices`.

    Attributes:
        kind: "json_schema", "regex" or "choices".
        source: the schema as JSON, the pattern, or the choices as a JSON list.
    """

    kind: str
    source: str

    @classmethod
    def json_schema(cls, schema: str | bool | Mapping[str, Any]) -> Constraint:
        """JSON that is valid against a schema (draft 2020-12), with at most one space between its parts.

        Keywords that restrict, but that a grammar cannot hold, are refused by name: `not`, `if`, `then`, `else`,
        `contains`, `minContains`, `maxContains`, `uniqueItems`, `propertyNames`, `dependentRequired`,
        `dependentSchemas`, `unevaluatedItems`, `unevaluatedProperties`, `$dynamicRef`, `$dynamicAnchor`, a `oneOf`
        whose branches may overlap, overlapping `patternProperties`, and unknown formats. `$ref` must stay inside.

        Args:
            schema: as text, or as what `json.loads` makes of it.

        Raises:
            GroundupError: no schema, too long, never satisfied, or with a keyword that is refused.
        """
        try:
            schema = json.loads(schema) if isinstance(schema, str) else schema
            schema = {} if schema is True else schema
            if not isinstance(schema, Mapping):
                raise ValueError("a schema is an object, or true")
            source = json.dumps(dict(schema))  # not sorted: properties are written in the schema's order
        except (ValueError, TypeError, RecursionError) as error:
            raise GroundupError(f"json_schema = {str(schema)[:80]!r}: {error}.") from None
        return cls("json_schema", source)._checked()

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        """A text that the whole pattern matches, in Rust's syntax: no look-around, no references back.

        Raises:
            GroundupError: not such a pattern, or too long.
        """
        return cls("regex", pattern)._checked()

    @classmethod
    def choices(cls, choices: Sequence[str]) -> Constraint:
        """One of some texts.

        Raises:
            GroundupError: no list of texts, an empty one, or too long.
        """
        is_list = not isinstance(choices, str) and all(isinstance(text, str) and text for text in choices)
        if not is_list or not choices:
            raise GroundupError(f"choices = {choices!r}: must be texts, none of them empty.")
        return cls("choices", json.dumps(list(choices)))._checked()

    def compile(self, tokenizer: Tokenizer, vocab_size: int) -> Matcher:
        """A matcher at the text's beginning; what was compiled lately is kept.

        Rows of logits, `vocab_size` in all, that stand for no token are never allowed.

        Raises:
            GroundupError: the grammar is too complex.
        """
        return Matcher(_compiled(self, tokenizer, vocab_size).deep_copy(), vocab_size)

    def _checked(self) -> Constraint:
        if not isinstance(self.source, str):
            raise GroundupError(f"{self.kind} = {self.source!r}: must be a text.")
        if len(self.source) > MOST_CHARACTERS:
            raise GroundupError(f"{self.kind}: {len(self.source)} characters; must be at most {MOST_CHARACTERS}.")
        try:
            problem = _llguidance().LLMatcher.validate_grammar(self._grammar(), None)
        except ValueError as error:  # such as a schema that is nested too deeply
            problem = str(error)
        if problem:
            raise self._error(problem)
        return self

    def _error(self, problem: str) -> GroundupError:
        return GroundupError(f"{self.kind} = {self.source[:80]!r}: {_reason(problem)}.")

    def _grammar(self) -> str:
        matcher = _llguidance().LLMatcher
        if self.kind == "regex":
            return str(matcher.grammar_from_regex(self.source))
        if self.kind == "choices":
            branches = [json.dumps(text, ensure_ascii=False) for text in json.loads(self.source)]
            return str(matcher.grammar_from_lark(f"start: {' | '.join(branches)}"))
        return str(matcher.grammar_from_json_schema(self.source, overrides={"whitespace_pattern": _SPACE}))


class Matcher:
    """Where a text stands in its grammar, by llguidance's matcher."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def mask(self) -> Bool[Tensor, " vocab"]:
        """The tokens that may come next, those that end the text among them.

        Raises:
            GroundupError: the grammar is too complex at this place.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(bits, count=self._vocab_size, bitorder="little")
        return torch.from_numpy(allowed.view(np.bool_))

    def advance(self, token: int) -> None:
        """The token that was drawn, which the mask must have allowed.

        Raises:
            GroundupError: the mask did not allow it, or the grammar is too complex at this place.
        """
        self._matcher.consume_token(token)
        self._check()

    def rollback(self, n_tokens: int) -> None:
        """Take back the last tokens, such as those of a draft that was not accepted."""
        self._matcher.rollback(n_tokens)
        self._check()

    @property
    def is_complete(self) -> bool:
        """Whether the text may end here."""
        return bool(self._matcher.is_accepting())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GroundupError(f"the grammar cannot be followed: {_reason(self._matcher.get_error())}.")


def _reason(problem: str) -> str:
    """The line of llguidance's error that says it."""
    if problem.startswith("NoExtension"):
        return "no token of the vocabulary fits"
    lines = problem.splitlines()
    return next((line for line in lines if line.startswith("error: ")), lines[0]).removeprefix("error: ")[:200]


@functools.lru_cache(maxsize=64)
def _compiled(constraint: Constraint, tokenizer: Tokenizer, vocab_size: int) -> Any:
    library, vocabulary = _llguidance(), _vocabulary(tokenizer, vocab_size)
    limits = library.LLParserLimits(initial_lexer_fuel=200_000, step_lexer_fuel=100_000, max_lexer_states=20_000)
    matcher = library.LLMatcher(vocabulary, constraint._grammar(), log_level=0, limits=limits)
    matcher.compute_bitmask()  # a grammar that no text fits is an error only here
    if matcher.is_error():
        raise constraint._error(matcher.get_error())
    return matcher


@functools.lru_cache(maxsize=8)
def _vocabulary(tokenizer: Tokenizer, vocab_size: int) -> Any:
    library = _llguidance()
    return library.LLTokenizer(
        library.TokenizerWrapper(_Vocabulary(tokenizer)), n_vocab=vocab_size, eos_token=sorted(tokenizer.end_ids)
    )


class _Vocabulary:
    """A tokenizer as llguidance asks for it; control tokens are marked by a byte that no text has."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        vocabulary = tokenizer.vocab()
        names = [vocabulary.get(index, "") for index in range(max(vocabulary) + 1)]
        self.tokens = [b"\xff" + name.encode() if isinstance(name, str) else name for name in names]
        self.special_token_ids = sorted(tokenizer.special_ids)
        self.bos_token_id, self.eos_token_id = None, min(tokenizer.end_ids)
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        """Tokens of a text that is forced; none where the vocabulary cannot spell it."""
        ids = self._tokenizer.encode(text.decode("utf-8", errors="replace"))
        return ids if b"".join(map(self._tokenizer.token_bytes, ids)) == text else []


def _llguidance() -> Any:
    try:
        return importlib.import_module("llguidance")
    except ImportError:
        raise GroundupError("constrained output needs llguidance.", "pip install 'groundup[grammar]'") from None
