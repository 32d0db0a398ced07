"""Digests of a model's files: written with the model, held before it is used.

One flipped bit in the weights, the configuration or the tokenizer still loads, and the model writes nonsense. A folder
of another program has no digests and loads without; so does one that transformers has saved again, over ours.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from groundup.errors import ArtifactError
from groundup.files import MARK, file_digest, write_json
from groundup.untrusted import MOST_CONFIG_BYTES, file_inside, read_object, reading

DIGESTS_FILE = "digests.json"
_FIX = f"Get or make the model again. If the change was meant, remove {DIGESTS_FILE} from the folder."


def write_digests(folder: Path) -> None:
    """Write the size and digest of every file of a folder; the last thing before it appears."""
    paths = sorted(path for path in folder.iterdir() if path.name not in (MARK, DIGESTS_FILE))
    entries = {path.name: {"bytes": path.stat().st_size, "xxh3_128": file_digest(path)} for path in paths}
    write_json(folder / DIGESTS_FILE, entries)


def is_saved_again(values: Mapping[str, Any]) -> bool:
    """Whether transformers wrote this `config.json`: it always says so, and groundup never does."""
    return "transformers_version" in values


def check_digests(folder: Path, values: Mapping[str, Any]) -> None:
    """Hold that a model's files are those that were written with it, if the folder says what these were.

    Args:
        folder: of the model.
        values: of its `config.json`.

    Raises:
        ArtifactError: a file is missing, or another.
    """
    if is_saved_again(values) or not os.path.lexists(folder / DIGESTS_FILE):
        return
    for name, entry in read_object(file_inside(folder, DIGESTS_FILE), MOST_CONFIG_BYTES).items():
        path = folder / name
        with reading(str(path), fix=_FIX):
            size = file_inside(folder, name).stat().st_size
            expected = entry if isinstance(entry, dict) else {}
            if size == expected.get("bytes") and file_digest(path) == expected.get("xxh3_128"):
                continue
        raise ArtifactError(
            f"{path}: damaged, or changed since it was written ({DIGESTS_FILE} has another size or digest of it).",
            _FIX,
        )
