"""Training checkpoints: everything a run needs to go on with the same bits.

A checkpoint is a folder `step-00000120/` with safetensors of whole tensors by parameter name, so that any number of
devices can load them (`weights`, `optimizer`, `average`; of on-policy jobs `buffer`), `config.json`, and `state.json`
with the step, the spikes, the settings' fingerprint, the files' digests and its own. It appears whole; the newest
undamaged one is resumed. `best/`, beside their folder and never removed with it, is the model of the lowest validation
loss. Writing may go on beside training: what is written was copied first.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, with_config
from safetensors.torch import load_file
from torch import Tensor, nn

from groundup.console import Console
from groundup.distributed import World, full_tensor, like_parameter
from groundup.errors import ArtifactError, GroundupError
from groundup.files import (
    atomic_folder,
    file_digest,
    remove_folder,
    value_digest,
    write_json,
    write_tensors,
)
from groundup.model import ModelConfig
from groundup.training.optimizers import Optimizers, WeightAverage
from groundup.training.precision import LossScaler
from groundup.training.spikes import SpikeDetector
from groundup.untrusted import file_inside, read_object, reading

BEST = "best"
_STATE = "state.json"
_CONFIG = "config.json"
_WEIGHTS = "weights"
_TENSORS = ".safetensors"


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int  # optimizer steps done
    tokens: int  # target tokens seen
    seconds: float  # wall-clock seconds of training so far
    fingerprint: str  # digest of model, data order and settings; another one must not be resumed from this
    threads: int  # CPU threads used; another number may round differently
    world_size: int  # number of processes; likewise
    shift: int = 0  # steps whose batches were passed over, by going back behind them
    best_loss: float | None = None  # lowest validation loss so far, or None
    spikes: dict[str, Any] = field(default_factory=dict)  # what loss-spike handling remembers
    scaler: dict[str, Any] = field(default_factory=dict)  # what float16's loss scaler remembers
    compiled: bool | None = None  # whether the model is compiled, which rounds otherwise; None: not decided yet
    flops: float = 0.0  # of training and of making rows, over all processes
    # Place of the batch before which the on-policy buffer was made; None: there is none
    buffer_place: int | None = None


Stateful = Mapping[str, Callable[[], dict[str, Tensor]]]
"""Parts of a checkpoint by the name of their file: each gives whole tensors, and every process must call it."""


class CheckpointWriter:
    """Writes a run's checkpoints and keeps the newest few.

    Args:
        folder: where they are.
        world: the first process writes.
        config: of the model, so that `gu.load` reads a checkpoint too.
        keep: how many of the newest stay.
        beside: write while training goes on, from copies.
    """

    def __init__(self, folder: Path, world: World, config: ModelConfig, keep: int, *, beside: bool) -> None:
        self._folder, self._world, self._keep = folder, world, keep
        self._config = {"groundup": config.to_dict()}
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint") if beside and world.is_first else None
        self._writing: concurrent.futures.Future[None] | None = None

    def save(self, parts: Stateful, progress: Progress, *, at_once: bool = False) -> None:
        """Write a checkpoint; every process must call it.

        Args:
            parts: what it is made of.
            progress: how far the run has come.
            at_once: have it on disk before returning.

        Raises:
            GroundupError: this one (or, beside training, the one before) could not be written.
        """
        self.wait()
        tensors = {name: give() for name, give in parts.items()}
        if self._world.is_first:
            if self._thread is None or at_once:
                self._write(tensors, progress)
            else:
                copies = {name: {key: t.clone() for key, t in part.items()} for name, part in tensors.items()}
                self._writing = self._thread.submit(self._write, copies, progress)
        self._world.wait()

    def wait(self) -> None:
        """Return when nothing is being written any more.

        Raises:
            GroundupError: it could not be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """End the thread; what it writes is written to its end."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)

    def save_best(self, weights: Mapping[str, Tensor], progress: Progress) -> None:
        """Write whole weights, and nothing else, as the best model so far."""
        if self._world.is_first:
            with atomic_folder(self._folder.parent / BEST) as partial:
                write_tensors(partial / f"{_WEIGHTS}{_TENSORS}", weights)
                write_json(partial / _CONFIG, self._config)
                write_json(partial / _STATE, {"step": progress.step, "val_loss": progress.best_loss})
        self._world.wait()

    def _write(self, tensors: Mapping[str, Mapping[str, Tensor]], progress: Progress) -> None:
        target = self._folder / f"step-{progress.step:08d}"
        with atomic_folder(target) as partial:
            for name, part in tensors.items():
                write_tensors(partial / f"{name}{_TENSORS}", part)
            write_json(partial / _CONFIG, self._config)
            digests = {path.name: file_digest(path) for path in sorted(partial.glob("[!.]*"))}
            values = {**asdict(progress), "digests": digests}
            write_json(partial / _STATE, {**values, "digest": value_digest(values)})
        # What stands before the newest in their order was passed over when the run went on: damaged, or of other
        # settings. It must not push out those of this run.
        found = complete_checkpoints(self._folder)
        place = found.index(target)
        for old in [*found[:place], *found[place + self._keep :]]:
            remove_folder(old)


def load_checkpoint(
    folder: Path, fingerprint: str, parts: Collection[str], console: Console
) -> tuple[Progress, dict[str, dict[str, Tensor]]] | None:
    """The newest undamaged checkpoint of this fingerprint: progress and parts; None if there is none.

    Args:
        folder: where the checkpoints are.
        fingerprint: of the run that is to go on.
        parts: names of those that it must have.
        console: on which every one that is passed over is named, with the reason.
    """
    found = complete_checkpoints(folder)
    for place, path in enumerate(found):
        try:
            progress, read = _read_checkpoint(path)
            lacking = sorted({*parts} - read.keys())
            if progress.fingerprint == fingerprint and not lacking:
                return progress, read
            what = f"{path}: of other settings, another model or other data."
            if lacking:
                what = f"{path}: cannot be read (it lacks {', '.join(lacking)})."
        except GroundupError as error:
            what = error.message
        is_last = place == len(found) - 1
        console.warn(f"{what} {'Training begins anew.' if is_last else 'Going back to the checkpoint before it.'}")
    return None


def complete_checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints, newest first; those that were being written when it was killed are none."""
    return sorted((path for path in folder.glob("step-????????") if path.is_dir()), reverse=True)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights as whole tensors by name (every process must call it)."""
    return {name: full_tensor(p).detach().cpu().contiguous() for name, p in model.named_parameters()}


@torch.no_grad()
def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into a model, sharded or not.

    Raises:
        ArtifactError: a parameter is missing, left over or of another shape.
    """
    parameters = dict(model.named_parameters())
    if parameters.keys() != weights.keys():
        odd = sorted(parameters.keys() ^ weights.keys())
        raise ArtifactError(f"the checkpoint's weights are of another model: {', '.join(odd[:4])}.")
    for name, parameter in parameters.items():
        if parameter.shape != weights[name].shape:
            raise ArtifactError(f"{name}: shape {tuple(weights[name].shape)}, expected {tuple(parameter.shape)}.")
        parameter.copy_(like_parameter(weights[name], parameter))


def _read_checkpoint(path: Path) -> tuple[Progress, dict[str, dict[str, Tensor]]]:
    """Progress and parts, after every byte was held against its digest.

    Raises:
        ArtifactError: damaged: which file, and how.
    """
    with reading(str(path)):
        values = read_object(file_inside(path, _STATE))
        if values.pop("digest", None) != value_digest(values):
            raise ArtifactError(f"{path / _STATE}: damaged (its digest is not the one written down).")
        parts = {}
        for name, digest in values.pop("digests").items():
            file = file_inside(path, name)
            if file_digest(file) != digest:
                raise ArtifactError(f"{file}: damaged (its digest is not the one written down).")
            if name.endswith(_TENSORS):
                parts[name.removesuffix(_TENSORS)] = load_file(file)
        progress: Progress = TypeAdapter(Progress).validate_python(values)
    if path.name != f"step-{progress.step:08d}":
        raise ArtifactError(f"{path}: holds step {progress.step}, which is not the one of its name.")
    return progress, parts


@dataclass
class TrainingState:
    """What a step changes."""

    trained: nn.Module  # weights, of all modules that are trained
    optimizers: Optimizers  # their moments
    spikes: SpikeDetector  # the losses that loss-spike handling remembers
    scaler: LossScaler | None = None  # float16's, or None
    average: WeightAverage | None = None  # of the weights, or None
    buffer: dict[str, Tensor] = field(default_factory=dict)  # rows that the model has made; empty: none

    def parts(self) -> Stateful:
        """The checkpoint's files of tensors."""
        parts = {"weights": lambda: weights_of(self.trained), "optimizer": self.optimizers.state_dict}
        if self.average is not None:
            parts["average"] = self.average.state_dict
        if self.buffer:
            parts["buffer"] = self.buffer.copy
        return parts

    def remembered(self, progress: Progress) -> Progress:
        """`progress` with what is no tensor."""
        scaler = {} if self.scaler is None else self.scaler.state_dict()
        return replace(progress, spikes=self.spikes.state_dict(), scaler=scaler)

    def restore(self, folder: Path, fingerprint: str, console: Console) -> Progress | None:
        """Take back the newest undamaged checkpoint of this fingerprint; None if there is none.

        Raises:
            ArtifactError: it is of another model or other optimizers.
        """
        found = load_checkpoint(folder, fingerprint, self.parts().keys(), console)
        if found is None:
            return None
        progress, parts = found
        load_weights(self.trained, parts["weights"])
        self.optimizers.load_state_dict(parts["optimizer"])
        self.spikes.load_state_dict(progress.spikes)
        if self.scaler is not None:
            self.scaler.load_state_dict(progress.scaler)
        if self.average is not None:
            self.average.load_state_dict(parts["average"])
        self.buffer = parts.get("buffer", {})
        return progress
