"""Which tokens a model's heads look at in one text, kept beside its scores for the report."""

from __future__ import annotations

from pathlib import Path

from groundup.errors import DataError
from groundup.files import write_json
from groundup.generation import prompt_ids
from groundup.model import Transformer
from groundup.serving.inspect import inspect
from groundup.tokenizer import Tokenizer

ATTENTION_FILE = "attention.json"
N_TOKENS, MOST_HEADS = 24, 8


def write_attention(model: Transformer, tokenizer: Tokenizer, text: str, folder: Path) -> None:
    """Write `attention.json`: the attention of the first, middle and last layer on a text's first tokens, in percent.

    A model whose attention cannot be told (`DataError` of `inspect`) leaves none.
    """
    try:
        seen = inspect(model, tokenizer, prompt_ids(tokenizer, text)[:N_TOKENS], top=1)
    except DataError:
        return
    last = len(seen.attention) - 1
    layers = [
        {"layer": layer + 1, "heads": (100 * seen.attention[layer, :MOST_HEADS]).round().int().tolist()}
        for layer in sorted({0, last // 2, last})
    ]
    write_json(folder / ATTENTION_FILE, {"tokens": [token.shown for token in seen.tokens], "layers": layers})
