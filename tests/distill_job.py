"""A tiny student that learns a teacher's answers; run by tests in their process, or by torchrun: folder and teacher."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from shards_bytes import document

from groundup.alignment.distill import DistillSettings, distill
from groundup.console import Console
from groundup.distributed import end_process
from groundup.interop import load
from groundup.model import Transformer, preset
from groundup.recipe import ShardsSettings
from groundup.shards import write_shards
from groundup.tokenizer import Tokenizer
from groundup.training import TrainedModel

TEXTS = [f"{number} times the cat sat on the mat, and then it left." * (number % 4 + 1) for number in range(40)]
FAST: dict[str, Any] = {
    "optimizer": "adamw", "lr": 2e-2, "batch_size": 4, "compile": False, "eval_tokens": 64, "eval_every": 100
}  # fmt: skip


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=320)


def random(name: str, seed: int, **overrides: Any) -> Transformer:
    model = Transformer(preset(name, vocab_size=tokenizer().vocab_size, context_length=32, **overrides), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def made_shards(folder: Path) -> Path:
    texts = [*map(document, TEXTS), document("The cat sat on the mat.", "validation")]
    write_shards(texts, tokenizer(), folder, ShardsSettings())
    return folder


def questions(path: Path, n: int) -> str:
    path.write_text("".join(json.dumps({"prompt": f"{n} times?", "response": "unknown"}) + "\n" for n in range(n)))
    return str(path)


def run(folder: Path, teacher: Path) -> TrainedModel:
    """With the shards and the questions that lie beside the teacher."""
    settings = DistillSettings(
        level="sequence", prompts=(str(teacher / "asked.jsonl"),), own_share=0.8, tokens=2000, temperature=0.7,
        precision="float32", **FAST,
    )  # fmt: skip
    given = {"teacher": load(teacher / "model").model, "shards": teacher / "shards"}
    return distill(random("ground-nano", 2), tokenizer(), settings, out=folder, console=Console(quiet=True), **given)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(*map(Path, sys.argv[1:]))
    end_process(0)
