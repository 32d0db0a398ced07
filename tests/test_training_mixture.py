"""What pretraining can be told of its rows: other shards by weight, and documents that do not see each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from shards_bytes import opened

from groundup.console import Console
from groundup.model import Transformer, preset
from groundup.recipe import PretrainSettings
from groundup.training.pretrain import pretraining_job

QUIET = Console(quiet=True)
OWN = ["".join(chr(97 + (n * k) % 26) for k in range(n * 7 % 61)) for n in range(25)]
SMALL = {"vocab_size": 257, "context_length": 24, "n_layers": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of three texts: lowercase, the digit 7 and the digit 8; validation is lowercase."""
    root = tmp_path_factory.mktemp("shards")
    opened(root / "own", OWN, validation=["held out " * 20])
    for digit in "78":
        opened(root / digit, [digit * 300])
    return root


def rows_with(digit: str, ids: torch.Tensor) -> int:
    return int((ids == ord(digit) + 1).any(dim=1).sum())


def job_of(folder: Path, out: Path, **settings: object):
    options = {"tokens": 40 * 8 * 24, "batch_size": 8, "precision": "float32", "sample_tokens": 0} | settings
    return pretraining_job(
        Transformer(preset("ground-nano", **SMALL)), folder / "own", PretrainSettings(**options), out, None, 1, QUIET
    )
