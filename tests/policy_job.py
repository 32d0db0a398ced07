"""A small on-policy job: a model draws tokens, every drawn `LUCKY` is rewarded, and a policy gradient follows.

Run as a program in tests, by torchrun or alone: `FOLDER ... kill KIND N` trains in each folder, but in the last
the process ends by SIGKILL at the N-th forward pass of a kind: `train`, or `collect` (in the midst of making a buffer).
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from groundup.console import Console
from groundup.distributed import World, current_world, end_process
from groundup.model import ModelConfig, Transformer, preset
from groundup.recipe import OptimizerSettings
from groundup.training import Batch, Term, TrainingJob, pass_flops, train

N_TOKENS, VOCAB, LUCKY = 6, 16, 3
BUFFER, EVERY, BATCH = 32, 2, 16


class Draws:
    """Rows that the model draws; each buffer serves `EVERY` steps, of which each takes other rows."""

    fingerprint = "draws"
    buffer_rows = BUFFER

    def is_due(self, place: int) -> bool:
        return place % EVERY == 0

    def collect(self, modules: Mapping[str, nn.Module], place: int, rows: slice, last: Batch) -> tuple[Batch, float]:
        model, numbers = modules["model"], range(rows.start, rows.stop)
        # Each row's luck is its own, so that it does not matter which process draws it.
        luck = [torch.rand(N_TOKENS, generator=torch.Generator().manual_seed(1000 * place + row)) for row in numbers]
        ids = torch.zeros(len(numbers), 1, dtype=torch.int64)
        for number in range(N_TOKENS):
            sums = model(ids)[:, -1].double().softmax(-1).cumsum(-1)
            drawn = (sums < torch.stack(luck)[:, number, None]).sum(-1, keepdim=True).clamp(max=VOCAB - 1)
            ids = torch.cat([ids, drawn], dim=1)
        flops = len(numbers) * pass_flops(model.config, range(1, N_TOKENS + 1)) / 3
        return {"ids": ids, "rewards": (ids[:, 1:] == LUCKY).float().mean(1)}, flops

    def minibatch(self, place: int, n_rows: int) -> Tensor:
        order = torch.randperm(BUFFER, generator=torch.Generator().manual_seed(place // EVERY))
        return order[place % EVERY * n_rows :][:n_rows]

    def validation(self, batch_size: int, limit_tokens: int | None) -> Iterator[Batch]:
        yield from ()


class PolicyGradient:
    """Σ −(reward − 1/2) log π(drawn token), per token; and what the rewards are, per row."""

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"policy": N_TOKENS * len(batch["ids"]), "reward": len(batch["ids"])}

    def terms(self, modules: Mapping[str, nn.Module], batch: Batch) -> dict[str, Term]:
        logprobs = modules["model"](batch["ids"][:, :-1]).log_softmax(-1)
        chosen = logprobs.gather(2, batch["ids"][:, 1:, None]).squeeze(2)
        loss = -((batch["rewards"] - 0.5)[:, None] * chosen).sum()
        return {
            "policy": Term(loss, loss.detach()),
            "reward": Term(batch["rewards"].sum(), batch["rewards"].sum(), weight=0.0),
        }

    def flops(self, config: ModelConfig, lengths: Sequence[int]) -> float:
        return pass_flops(config, [length - 1 for length in lengths])


def policy_job(folder: Path, **settings: Any) -> TrainingJob:
    folder.mkdir(parents=True, exist_ok=True)
    options = {"batch_size": BATCH, "precision": "float32", "optimizer": "adamw", "lr": 0.01, "checkpoint_seconds": 1e9}
    return TrainingJob(
        name="policy",
        modules={"model": Transformer(preset("ground-nano", n_layers=1, vocab_size=VOCAB, context_length=8))},
        objective=PolicyGradient(),
        source=Draws(),
        settings=OptimizerSettings(**options | settings),
        n_rows=40 * BATCH,
        folder=folder,
    )


def run(folder: Path, world: World, kill: tuple[str, int] | None = None, **settings: Any) -> dict[str, Any]:
    """Train the job; the process ends at the forward pass that `kill` names."""
    job = policy_job(folder, **settings)
    passes = {"train": itertools.count(1), "collect": itertools.count(1)}

    def count(model: nn.Module, arguments: object) -> None:
        kind = "train" if model.training else "collect"
        if (kind, next(passes[kind])) == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    job.model.register_forward_pre_hook(count)
    return train(job, world, Console(quiet=True)) | {"job": job}


if __name__ == "__main__":
    torch.set_num_threads(1)
    *folders, kill, kind, number = sys.argv[1:]
    assert kill == "kill"
    world = current_world()
    for folder in folders[:-1]:
        run(Path(folder), world)
    run(Path(folders[-1]), world, (kind, int(number)))
    end_process(0)
