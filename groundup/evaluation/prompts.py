"""Prompts that models are asked: from anybody's file, or of a set that the package generates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from groundup.errors import DataError
from groundup.evaluation.benchmarks import Benchmark, read_items
from groundup.evaluation.sets import read_set
from groundup.evaluation.small_talk import HARM_KINDS
from groundup.evaluation.talk import first_messages
from groundup.generation import SamplingParams, generate_batch
from groundup.model import Transformer
from groundup.tokenizer import Tokenizer, render

FIRST_MESSAGES = "groundup:first-messages"
_GENERATED = 2_000


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
    if source == FIRST_MESSAGES:
        return [Prompt(one.text) for one in first_messages()][:limit]
    if source.startswith("groundup:"):
        made = [one for one in read_set(source, _GENERATED, 1) if one.split == "held_out"]
        harm, harmless = HARM_KINDS
        return [Prompt(one.prompt, {harm: True, harmless: False}.get(one.kind)) for one in made][:limit]
    found = []
    for item in read_items(Benchmark(name="prompts", kind="generation", files=source, target="-"), "", limit=limit):
        text, harmful = item.row.get("prompt"), item.row.get("harmful")
        if not isinstance(text, str) or not text.strip() or harmful not in (None, True, False):
            raise DataError(
                f"{source}, record {item.number + 1}: its 'prompt' is no text, or 'harmful' not true or false.",
                'A record is {"prompt": "…"}, for `groundup safety` with "harmful": true or false.',
            )
        found.append(Prompt(text, harmful))
    return found


def answer_prompts(model: Transformer, tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int) -> list[str]:
    """What an assistant says to each text as the first message of a conversation, greedily."""
    ids = [render(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True).ids for text in texts]
    most = min(max_tokens, model.config.context_length - 1)
    return [one.text for one in generate_batch(model, tokenizer, ids, SamplingParams(temperature=0.0, max_tokens=most))]
