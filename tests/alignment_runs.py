"""Tiny runs of the methods that learn from records of a file; as a program, one of them, which may be killed.

KIND FOLDER            train to the end
KIND FOLDER kill N     SIGKILL at the N-th forward pass in training
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from model_parts import random_model
from shards_bytes import document

from groundup.alignment import SFTSettings, fine_tune
from groundup.alignment.classify import ClassifySettings, train_classifier
from groundup.alignment.dpo import DPOSettings, train_dpo
from groundup.alignment.rejection import RejectionSettings, rejection_sampling
from groundup.alignment.reward import RewardSettings, train_reward
from groundup.alignment.rewards import FunctionReward
from groundup.console import Console
from groundup.distributed import World, current_world, end_process
from groundup.model import Transformer, preset
from groundup.recipe import ShardsSettings
from groundup.shards import write_shards
from groundup.tokenizer import Tokenizer
from groundup.training import TrainedModel

QUIET = Console(quiet=True)
COLOURS = ("red", "blue", "green", "grey")
OPTIONS: dict[str, Any] = {
    "batch_size": 8, "precision": "float32", "checkpoint_seconds": 1e9, "eval_every": 6, "lr": 3e-3, "epochs": 2.0
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "dpo": {}, "dpo-lora": {"lora": {"rank": 4, "dropout": 0.1}, "lr": 1e-2}, "kto": {"loss": "kto"},
    "reward": {}, "classify": {}, "sft": {"replay": 0.3},
    "rejection": {"replay": 0.3, "prompts": 24, "samples": 4, "keep": 2, "least": -8.0, "max_tokens": 6, "epochs": 4.0},
}  # fmt: skip
SHORT = "def score(messages, answer, known):\n    return -float(len(answer))\n"


def records(n: int = 90) -> list[dict[str, Any]]:
    """What is preferred: an answer that ends politely, whatever it says."""
    draw = random.Random(1)
    said = [draw.choice(COLOURS) for _ in range(n)]
    return [
        {"prompt": f"Name colour {number}.", "chosen": f"It is {colour}, my lord.", "rejected": f"It is {colour}!"}
        for number, colour in enumerate(said)
    ]


def colour_of(record: dict[str, Any]) -> str:
    return str(record["chosen"].split()[2].strip(","))


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train([" ".join(one.values()) for one in records()], vocab_size=320)


def model(**shape: Any) -> Transformer:
    size = {"vocab_size": tokenizer().vocab_size, "context_length": 64, "n_layers": 2}
    config = preset("ground-nano", **size | shape)
    with torch.no_grad():
        made = random_model(config)
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.3)
    return made.requires_grad_(True)


def data(folder: Path, lines: list[dict[str, Any]] | None = None) -> str:
    path = folder / "data.jsonl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(one) + "\n" for one in lines or records()), encoding="utf-8")
    return str(path)


def run(kind: str, folder: Path, world: World | None = None, kill: int | None = None, **more: Any) -> TrainedModel:
    """Train one of them; the process ends at the `kill`-th forward pass in training."""
    made, passes = model(tied_embeddings=kind not in ("reward", "classify")), itertools.count(1)

    def count(module: torch.nn.Module, arguments: object) -> None:
        if module.training and next(passes) == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    made.register_forward_pre_hook(count)
    settings = OPTIONS | KINDS[kind] | more
    world = world or current_world()
    common: dict[str, Any] = {"out": folder / "out", "world": world, "console": QUIET}
    if kind in ("sft", "rejection"):
        talks = [{"prompt": one["prompt"], "response": one["chosen"]} for one in records()]
        if world.is_first and not (folder / "shards").exists():
            data(folder, talks), (folder / "short.py").write_text(SHORT)
            texts = [document(f"{one['rejected']} {one['chosen']}") for one in records(40)]
            write_shards([*texts, document("It is.", "validation")], tokenizer(), folder / "shards", ShardsSettings())
        world.wait()
        common["replay_shards"] = folder / "shards"
        if kind == "sft":
            return fine_tune(made, tokenizer(), SFTSettings(data=data(folder), **settings), **common)
        with torch.no_grad():
            made.embed_tokens.weight[tokenizer().end_id] *= 8  # so that some answers end
        reward = FunctionReward(f"{folder / 'short.py'}:score", "[align.x] reward")
        return rejection_sampling(
            made, tokenizer(), RejectionSettings(data=data(folder), **settings), reward=reward, **common
        )
    if kind == "reward":
        return train_reward(made, tokenizer(), RewardSettings(data=data(folder), **settings), **common)
    if kind == "classify":
        texts = [{"text": f"{one['prompt']} {one['chosen']}", "label": colour_of(one)} for one in records()]
        labelled = ClassifySettings(data=data(folder, texts), **settings)
        return train_classifier(made, tokenizer(), labelled, **common)
    return train_dpo(made, tokenizer(), DPOSettings(data=data(folder), **settings), **common)


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, where, *how = sys.argv[1:]
    more = json.loads(how.pop()) if how and how[-1].startswith("{") else {}
    run(what, Path(where), kill=int(how[1]) if how else None, **more)
    end_process(0)
