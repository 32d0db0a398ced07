"""The files of a tokenizer, as Hugging Face names them, and the text of `tokenizer.json`."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Engine

from groundup.untrusted import file_inside, read_bytes

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILES = (
    TOKENIZER_FILE, CONFIG_FILE, SPECIAL_TOKENS_FILE, GENERATION_FILE, "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""What a tokenizer can consist of; how a text is generated also says which tokens end it."""


def read_files(folder: Path, names: Collection[str]) -> dict[str, bytes]:
    """The contents of those files that are there.

    Raises:
        ArtifactError: one is no ordinary file of this folder, or too large.
    """
    found = [name for name in names if (folder / name).exists() or (folder / name).is_symlink()]
    return {name: read_bytes(file_inside(folder, name)) for name in found}


def contents(engine: Engine) -> dict[str, Any]:
    """What the engine would write to `tokenizer.json`."""
    spec: dict[str, Any] = json.loads(engine.to_str())
    return spec


def as_json(spec: dict[str, Any]) -> str:
    """`tokenizer.json` as text."""
    return json.dumps(spec, ensure_ascii=False, indent=2) + "\n"
