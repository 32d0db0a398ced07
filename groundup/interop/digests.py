"""Digests of a model's files: written with the model, held before it is used.

One flipped bit in the weights, the configuration or the tokenizer still loads, and the model writes nonsense. A folder
of another program has no digests and loads without; so does one that transformers has saved again, over ours.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from groundup.files import write_json
from groundup.integrity import check_files, record_files
from groundup.untrusted import MOST_CONFIG_BYTES, file_inside, read_object, reading

DIGESTS_FILE = "digests.json"
_FIX = f"Get or make the model again. If the change was meant, remove {DIGESTS_FILE} from the folder."


def write_digests(folder: Path) -> None:
    """Write the size and digest of every file of a folder; the last thing before it appears."""
    write_json(folder / DIGESTS_FILE, record_files(folder, sorted(path.name for path in folder.glob("[!.]*"))))


def is_saved_again(values: Mapping[str, Any]) -> bool:
    """Whether transformers wrote this `config.json`: it always says so, and groundup never does."""
    return "transformers_version" in values


def check_digests(folder: Path, values: Mapping[str, Any]) -> None:
    """Hold that a model's files are those that were written with it, if the folder says what these were.

    `values` are those of its `config.json`.
    """
    if is_saved_again(values) or not os.path.lexists(folder / DIGESTS_FILE):
        return
    entries = read_object(file_inside(folder, DIGESTS_FILE), MOST_CONFIG_BYTES)
    with reading(str(folder / DIGESTS_FILE), fix=_FIX):
        records = {name: (int(size), str(digest)) for name, (size, digest) in entries.items()}
    check_files(folder, records, _FIX)
