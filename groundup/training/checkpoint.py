"""Training checkpoints: everything a run needs to go on with the same bits.

A checkpoint is a folder `step-00000120/` with safetensors of whole tensors by parameter name, so that any number of
devices can load them (`weights`, `optimizer`, `average`), and `state.json` with the step, the guard, the settings'
fingerprint and the files' digests. It appears whole; the newest undamaged one is resumed. `best/`, beside their folder
and never removed with it, is the model of the lowest validation loss. Writing may go on beside training: what is
written was copied first.
"""

from __future__ import annotations

import concurrent.futures
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from groundup.console import Console
from groundup.distributed import World, full_tensor, like_parameter
from groundup.errors import ArtifactError, GroundupError
from groundup.files import atomic_folder, file_digest, read_json, write_json, write_tensors
from groundup.model import ModelConfig

BEST = "best"
_STATE = "state.json"
_WEIGHTS = "weights"


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: optimizer steps done.
        tokens: target tokens seen.
        seconds: wall-clock seconds of training so far.
        fingerprint: digest of model, data order and settings; another one must not be resumed from this.
        threads: CPU threads used; another number may round differently.
        world_size: number of processes; likewise.
        shift: steps whose batches were passed over, by going back behind them.
        best_loss: lowest validation loss so far, or None.
        guard: what the guard remembers.
        scaler: what float16's loss scaler remembers.
    """

    step: int
    tokens: int
    seconds: float
    fingerprint: str
    threads: int
    world_size: int
    shift: int = 0
    best_loss: float | None = None
    guard: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)


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
                write_tensors(partial / f"{_WEIGHTS}.safetensors", weights)
                write_json(partial / "config.json", self._config)
                write_json(partial / _STATE, {"step": progress.step, "val_loss": progress.best_loss})
        self._world.wait()

    def _write(self, tensors: Mapping[str, Mapping[str, Tensor]], progress: Progress) -> None:
        target = self._folder / f"step-{progress.step:08d}"
        with atomic_folder(target) as partial:
            for name, part in tensors.items():
                write_tensors(partial / f"{name}.safetensors", part)
            digests = {path.name: file_digest(path) for path in sorted(partial.iterdir())}
            write_json(partial / "config.json", self._config)
            write_json(partial / _STATE, {**asdict(progress), "digests": digests})
        for old in complete_checkpoints(self._folder)[self._keep :]:
            shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(
    folder: Path, fingerprint: str, console: Console
) -> tuple[Progress, dict[str, dict[str, Tensor]]] | None:
    """The newest undamaged checkpoint of this fingerprint: progress and parts; None if there is none."""
    for path in complete_checkpoints(folder):
        try:
            progress, parts = _read_checkpoint(path)
        except GroundupError as error:
            console.warn(f"{error.message} Going back to the checkpoint before it.")
            continue
        if progress.fingerprint == fingerprint:
            return progress, parts
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
    values = read_json(path / _STATE)
    try:
        parts = {}
        for name, digest in values.pop("digests").items():
            if file_digest(path / name) != digest:
                raise ArtifactError(f"{path / name}: damaged (its digest is not the one written down).")
            parts[name.removesuffix(".safetensors")] = load_file(path / name)
        return Progress(**values), parts
    except (OSError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}).") from error
