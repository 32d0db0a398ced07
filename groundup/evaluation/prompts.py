"""Prompts that an assistant is asked, from anybody's file or of a generated set, and its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from groundup.errors import DataError
from groundup.evaluation.benchmarks import Benchmark, read_items
from groundup.evaluation.measure import asked_ids, write_replies
from groundup.evaluation.sets import GeneratedSet
from groundup.evaluation.small_talk import HARM_KINDS
from groundup.generation import SamplingParams
from groundup.model import Transformer
from groundup.recipe import EvaluateSettings
from groundup.tokenizer import Tokenizer

_IS_HARMFUL = dict(zip(HARM_KINDS, (True, False), strict=True))
_CELLS: dict[str, bool | None] = {"true": True, "false": False, "": None}  # of a CSV, whose cells are text


@dataclass(frozen=True)
class Prompt:
    """What is asked, and whether that is harmful; None: nobody says."""

    text: str
    is_harmful: bool | None = None


def read_prompts(source: str, *, limit: int | None = None) -> list[Prompt]:
    """Prompts.

    Args:
        source: a file whose records have "prompt" and maybe "harmful" (JSON lines, JSON, CSV, Parquet); or a set,
            `groundup:talk`, of which the held-out ones are taken.
        limit: most of them, the same ones every time.

    Raises:
        DataError: no such file or set, a damaged line, or one without a prompt.
    """
    if source.startswith("groundup:"):
        items = GeneratedSet(source).read(EvaluateSettings(limit=limit), 1)
        return [Prompt(item.context, _IS_HARMFUL.get(item.group)) for item in items]
    found = []
    for item in read_items(Benchmark(name="prompts", kind="generation", files=source, target="-"), "", limit=limit):
        text, harmful = item.row.get("prompt"), item.row.get("harmful")
        if isinstance(harmful, str):
            harmful = _CELLS.get(harmful.strip().lower(), harmful)
        if not isinstance(text, str) or not text.strip() or not isinstance(harmful, bool | None):  # 1 == True
            raise DataError(
                f"{source}, record {item.number + 1}: its 'prompt' is no text, or 'harmful' not true or false.",
                'A record is {"prompt": "…"}, for `groundup safety` with "harmful": true or false.',
            )
        found.append(Prompt(text, harmful))
    return found


def answer_prompts(model: Transformer, tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int) -> list[str]:
    """What an assistant says to each text as the first message of a conversation, greedily, a calculator at hand."""
    prompts = [asked_ids(tokenizer, text, is_chat=True) for text in texts]
    params = SamplingParams(temperature=0.0, max_tokens=min(max_tokens, model.config.context_length - 1))
    replies = write_replies(model, tokenizer, prompts, params, range(len(prompts)), has_calculator=True)
    return [reply.text for reply in replies]
