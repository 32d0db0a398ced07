"""A tiny policy that is rewarded for long words, by PPO or GRPO; run by tests in their process, or by torchrun.

As a program: the folder, the method, and after how many buffers the process kills itself (0: never).
"""

from __future__ import annotations

import functools
import itertools
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from groundup.alignment.grpo import GRPOSettings, grpo
from groundup.alignment.online_dpo import OnlineDPOSettings, online_dpo
from groundup.alignment.ppo import PPOSettings, ppo
from groundup.alignment.rewards import FunctionReward, Prompts, load_prompts
from groundup.console import Console
from groundup.distributed import end_process
from groundup.model import Transformer, preset
from groundup.tokenizer import Tokenizer
from groundup.training import TrainedModel

KINDS: dict[str, Any] = {
    "ppo": (ppo, PPOSettings, {}), "grpo": (grpo, GRPOSettings, {}),
    "online-dpo": (online_dpo, OnlineDPOSettings, {"batch_size": 8}),
}  # fmt: skip
REWARD = """
def score(messages, answer, known):
    return sum(letter.isascii() and letter.isalpha() for letter in answer) / 8
"""
COMMON: dict[str, Any] = {
    "buffers": 6, "rollouts": 32, "batch_size": 16, "max_tokens": 6, "lr": 0.01, "optimizer": "adamw",
    "precision": "float32", "compile": False, "held_out": 16, "held_out_every": 2, "schedule": "constant",
    "checkpoint_seconds": 1e9,
}  # fmt: skip


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["It is a cat. The dog ran up the hill. yes no"] * 20, vocab_size=300)


@functools.cache
def prompts() -> Prompts:
    return load_prompts(["groundup:tasks"], 120, 1, tokenizer(), 80, "align.rl")


def policy(**shape: Any) -> Transformer:
    shape = {"vocab_size": tokenizer().vocab_size, "context_length": 96, **shape}
    return Transformer(preset("ground-nano", **shape), seed=1)


def run(folder: Path, method: str = "ppo", kill_after: int = 0, **settings: Any) -> TrainedModel:
    """Train; the process ends after so many buffers are made."""
    code = folder.with_name(f"{folder.name}-reward.py")
    code.write_text(REWARD, encoding="utf-8")
    call, kind, own = KINDS[method]
    reward = FunctionReward(f"{code}:score", "[align.rl] reward")
    calls, rewards = itertools.count(1), FunctionReward.__call__

    def counted(self: FunctionReward, *arguments: Any) -> list[float]:
        if next(calls) == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return rewards(self, *arguments)

    if kill_after:
        FunctionReward.__call__ = counted  # type: ignore[method-assign]
    return call(
        policy(),
        tokenizer(),
        kind(**COMMON | own | settings),
        prompts=prompts(),
        reward=reward,
        out=folder,
        console=Console(quiet=True),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    where, method, kill_after = sys.argv[1:]
    run(Path(where), method, int(kill_after))
    end_process(0)
