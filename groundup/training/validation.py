"""What happens at intervals while a model trains: loss on held-out rows, benchmarks, samples, the best model so far.

By the averaged weights, where there are some. All of it is left early when the run is asked to stop, and done again
when it goes on: the checkpoint was written before. A benchmark that fails is a warning, here and in the metrics: the
first process alone is asked, with a whole copy of a sharded model, so that a failure leaves no other one waiting.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from groundup.console import Console
from groundup.distributed import World, fill_copy
from groundup.model import Transformer
from groundup.recipe import OptimizerSettings
from groundup.training.checkpoint import CheckpointWriter, Progress, TrainingState, weights_of
from groundup.training.job import TrainingJob
from groundup.training.objective import micro_batches

EVAL_TOKENS = 50_000
"""Scored in a pass, unless the recipe says otherwise."""
PASSES = 20
"""Over a run, unless the recipe says otherwise."""


def validation_interval(settings: OptimizerSettings, n_steps: int) -> int:
    """Steps between two passes."""
    return settings.eval_every or max(1, math.ceil(n_steps / PASSES))


@dataclass
class Validation:
    """The validation of one run."""

    job: TrainingJob  # what is trained
    state: TrainingState  # of it
    writer: CheckpointWriter  # of the best model
    world: World  # the processes
    console: Console  # is told the loss
    note: Callable[[str, dict[str, Any]], None]  # writes a line to a log of this name
    leave_if_asked: Callable[[Progress], None]  # raises `Interrupted` where someone asked to stop
    whole: Transformer | None = None  # of the first of several processes: the model unsharded, empty in between

    def run(self, progress: Progress) -> Progress:
        """One pass; `progress` with the lowest loss so far, which is the objective's first term."""
        step, job = progress.step, self.job
        averaged = self.state.average.in_place() if self.state.average is not None else contextlib.nullcontext()
        with averaged:
            found = self.terms(progress)
            loss = next(iter(found.values()), math.nan)
            scores: dict[str, Any] = {f"val_{name}": value for name, value in found.items()}
            if found and job.bytes_per_token is not None:
                scores["val_bits_per_byte"] = loss / math.log(2) / job.bytes_per_token
            scores |= self.benchmarks(progress)
            if scores:
                self.note("metrics", {"step": step, "tokens": progress.tokens, **scores})
                self.console.log({"step": f"{step}/{job.n_steps}", **scores})
            if job.continue_text is not None:
                for place, prompt in enumerate(job.samples):
                    if place:
                        self.leave_if_asked(progress)
                    text = job.continue_text(job.model.eval(), prompt)
                    self.note("samples", {"step": step, "prompt": prompt, "text": text})
            is_better = progress.best_loss is None or loss < progress.best_loss
            if step > 0 and math.isfinite(loss) and is_better:
                progress = replace(progress, best_loss=loss)
                if job.settings.keep_best:
                    self.writer.save_best(weights_of(self.state.trained), progress)
        return progress

    def benchmarks(self, progress: Progress) -> dict[str, Any]:
        """Figures of what `[….evaluate]` names, where they are due; of what failed, the error."""
        job, asked, found = self.job, self.job.settings.evaluate, dict[str, Any]()
        interval = 0 if asked is None else asked.every * validation_interval(job.settings, job.n_steps)
        if asked is None or job.score is None or (progress.step % interval and progress.step != job.n_steps):
            return found
        with self.whole_model() as model:
            for name in asked.tasks:
                self.leave_if_asked(progress)
                one = json.loads(self.world.first_says(functools.partial(self.scored, model, name)))
                if (error := one.get(f"val_{name}_error")) is not None:
                    self.console.warn(f"{job.name}, step {progress.step}: {name} was not scored: {error}")
                found |= one
        return found

    @contextlib.contextmanager
    def whole_model(self) -> Iterator[Transformer | Exception]:
        """The model, for the first process to ask by itself, or why it cannot be; every process must enter it."""
        given: Transformer | Exception = self.job.model
        if self.whole is not None:
            try:
                given = self.whole.to_empty(device=self.world.device)
                given.compute_dtype = self.job.model.compute_dtype
            except Exception as error:
                given = error
        if self.world.size > 1:
            fill_copy(self.job.model, given if given is self.whole else None)
        try:
            yield given
        finally:
            if self.whole is not None:
                self.whole.to_empty(device="meta")

    def scored(self, model: Transformer | Exception, name: str) -> str:
        """Figures of a task, or the error, as JSON."""
        try:
            if isinstance(model, Exception):
                raise model
            assert self.job.score is not None
            figures = self.job.score(model.eval(), name)
            return json.dumps({f"val_{figure}": value for figure, value in figures.items()})
        except Exception as error:  # whatever it is, the run is worth more
            return json.dumps({f"val_{name}_error": f"{type(error).__name__}: {error}"})

    @torch.no_grad()
    def terms(self, progress: Progress) -> dict[str, float]:
        """The objective's terms over all held-out rows; none if the source holds none out."""
        job, device, modules = self.job, self.world.device, self.job.all_modules
        for module in modules.values():
            module.eval()
        share = self.world.rows(job.settings.batch_size)
        counts: dict[str, float] = {}
        sums = torch.zeros(0, dtype=torch.float64, device=device)
        for whole in job.source.validation(job.settings.batch_size, job.settings.eval_tokens or EVAL_TOKENS):
            self.leave_if_asked(progress)
            batch = {name: tensor[share] for name, tensor in whole.items()}
            own = job.objective.counts(batch)
            counts = {name: counts.get(name, 0.0) + count for name, count in own.items()}
            sums = sums if len(sums) else sums.new_zeros(len(own))
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            for part in micro_batches(batch, job.micro_rows):
                terms = job.objective.terms(modules, part)
                sums += torch.stack([terms[name].reported for name in own])
        if not counts:
            return {}
        both = torch.cat([sums, torch.tensor(list(counts.values()), dtype=torch.float64, device=device)])
        totals, divisors = self.world.sum(both).view(2, -1).tolist()
        return {name: total / count for name, total, count in zip(counts, totals, divisors, strict=True) if count}


def check_initial_loss(job: TrainingJob, loss: float, console: Console) -> None:
    """Warn where a fresh model's first loss is not what its initialization gives: then something is wrong."""
    expected = job.expected_initial_loss
    if expected is not None and abs(loss / expected - 1) > 0.02:
        console.warn(
            f"{job.name}: the first loss is {loss:.3f}, but a model that knows nothing gives {expected:.3f}. "
            "Look at the initialization, the targets and the vocabulary's size."
        )
