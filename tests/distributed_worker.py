"""Trains a tiny model on random rows in each of some folders; a program that torchrun runs, or in this process.

A file `stop-at` in a folder names the step at which one process is asked to stop, `micro-batch-size` the rows of a
micro-batch, `settings.json` other settings, `fails-on` the process in which a task of `evaluate` fails, in the midst of
a forward pass. The trained weights go to `weights.safetensors`, what each process was warned of to `warnings-RANK`.
"""

import itertools
import json
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from training_rows import RandomRows

from groundup.console import Console
from groundup.distributed import World, current_world, end_process, full_tensor
from groundup.model import Transformer, preset
from groundup.recipe import OptimizerSettings
from groundup.training import NextToken, TrainingJob, train


class Warned(Console):
    def __init__(self, path: Path) -> None:
        super().__init__(quiet=True)
        self.path = path

    def warn(self, text: str) -> None:
        with self.path.open("a") as lines:
            lines.write(f"{text}\n")


def train_in(folder: Path, world: World) -> None:
    folder.mkdir(exist_ok=True)
    micro = int((folder / "micro-batch-size").read_text()) if (folder / "micro-batch-size").exists() else 2
    job = TrainingJob(
        name="test",
        modules={"model": Transformer(preset("ground-nano", vocab_size=63, context_length=16, tied_embeddings=False))},
        objective=NextToken(),
        source=RandomRows(vocab_size=63, learnable=True),
        settings=OptimizerSettings(
            **{"batch_size": 4, "micro_batch_size": micro, "precision": "float32", "eval_every": 5, "warmup_share": 0.2}
            | (json.loads((folder / "settings.json").read_text()) if (folder / "settings.json").exists() else {})
        ),
        n_rows=80,
        folder=folder,
    )
    passes = itertools.count()

    def stop(model, arguments):
        at = 2 * int((folder / "stop-at").read_text()) // world.size  # two micro-batches a step, over all processes
        if model.training and next(passes) == at and world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    if (folder / "stop-at").exists():
        job.model.register_forward_pre_hook(stop)

    def probe(model, name):
        def fail(block, arguments):
            raise MemoryError("no memory left")

        if world.rank == int((folder / "fails-on").read_text()):
            model.layers[1].register_forward_pre_hook(fail)
        with torch.inference_mode():
            return {"probe": float(model(torch.arange(12)[None]).logsumexp(dim=-1).sum())}

    if job.settings.evaluate is not None:
        job.score = probe
    train(job, world, Warned(folder / f"warnings-{world.rank}"))
    trained = {name: full_tensor(parameter).detach() for name, parameter in job.model.named_parameters()}
    if world.is_first:
        save_file(trained, folder / "weights.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    world = current_world()
    for argument in sys.argv[1:]:
        train_in(Path(argument), world)
    end_process(0)
