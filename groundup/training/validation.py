"""What happens at intervals while a model trains: the loss on held-out rows, samples, and which model was best so far.

By the averaged weights, where there are some. All of it is left early when the run is asked to stop, and done again
when it goes on: the checkpoint was written before.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from groundup.console import Console
from groundup.distributed import World
from groundup.training.checkpoint import CheckpointWriter, Progress, TrainingState, weights_of
from groundup.training.job import TrainingJob
from groundup.training.objective import head_loss, valid_tokens

EVAL_TOKENS = 50_000
"""Scored in a pass, unless the recipe says otherwise."""


@dataclass
class Validation:
    """The validation of one run.

    Attributes:
        job: what is trained.
        state: of it.
        writer: of the best model.
        world: the processes.
        console: is told the loss.
        note: writes a line to a log of this name.
        leave_if_asked: raises `Interrupted` where someone asked to stop.
    """

    job: TrainingJob
    state: TrainingState
    writer: CheckpointWriter
    world: World
    console: Console
    note: Callable[[str, dict[str, Any]], None]
    leave_if_asked: Callable[[Progress], None]

    def run(self, progress: Progress) -> Progress:
        """One pass; `progress` with the lowest loss so far."""
        step, job = progress.step, self.job
        averaged = self.state.average.in_place() if self.state.average is not None else contextlib.nullcontext()
        with averaged:
            loss = self.validation_loss(progress)
            line: dict[str, Any] = {"step": step, "tokens": progress.tokens, "val_loss": loss}
            if job.bytes_per_token is not None:
                line["val_bits_per_byte"] = loss / math.log(2) / job.bytes_per_token
            self.note("metrics", line)
            self.console.log(
                {"step": f"{step}/{job.n_steps}", **{k: v for k, v in line.items() if k.startswith("val")}}
            )
            if job.continue_text is not None:
                for place, prompt in enumerate(job.samples):
                    if place:
                        self.leave_if_asked(progress)
                    text = job.continue_text(self.state.model, prompt)
                    self.note("samples", {"step": step, "prompt": prompt, "text": text})
            is_better = progress.best_loss is None or loss < progress.best_loss
            if step > 0 and math.isfinite(loss) and is_better:
                progress = replace(progress, best_loss=loss)
                if job.settings.keep_best:
                    self.writer.save_best(weights_of(self.state.model), progress)
        return progress

    @torch.no_grad()
    def validation_loss(self, progress: Progress) -> float:
        """Mean loss in nats over the validation targets."""
        model, settings, device = self.state.model.eval(), self.job.settings, self.world.device
        share = self.world.rows(settings.batch_size)
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for ids, targets in self.job.source.validation(settings.batch_size, settings.eval_tokens or EVAL_TOKENS):
            self.leave_if_asked(progress)
            mine_ids, mine = ids[share].to(device), targets[share].to(device)
            for first in range(0, len(mine), self.job.micro_rows):
                part = slice(first, first + self.job.micro_rows)
                sums[0] += model(mine_ids[part], head=head_loss(mine[part])).nats
            sums[1] += valid_tokens(targets[share])
        total, count = self.world.sum(sums).tolist()
        return total / count


def check_initial_loss(job: TrainingJob, loss: float, console: Console) -> None:
    """Warn where a fresh model's first loss is not what its initialization gives: then something is wrong."""
    expected = job.expected_initial_loss
    if expected is not None and abs(loss / expected - 1) > 0.02:
        console.warn(
            f"{job.name}: the first loss is {loss:.3f}, but a model that knows nothing gives {expected:.3f}. "
            "Look at the initialization, the targets and the vocabulary's size."
        )
