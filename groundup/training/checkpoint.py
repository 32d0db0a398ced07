"""Training checkpoints: everything a run needs to go on with the same bits.

A checkpoint is a folder `step-00000120/` with the weights and the optimizer state as safetensors (whole tensors
by parameter name, so that any number of devices can load them) and `state.json` with the step, the settings'
fingerprint and the files' digests. It appears whole; the newest undamaged one is resumed.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from groundup.console import Console
from groundup.distributed import World, full_tensor, like_parameter
from groundup.errors import ArtifactError, GroundupError
from groundup.files import atomic_folder, file_digest, read_json, write_json, write_tensors
from groundup.training.optimizers import Optimizers

KEPT = 2
_WEIGHTS, _OPTIMIZER, _STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


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
    """

    step: int
    tokens: int
    seconds: float
    fingerprint: str
    threads: int
    world_size: int


def save_checkpoint(folder: Path, model: nn.Module, optimizers: Optimizers, progress: Progress, world: World) -> None:
    """Write a checkpoint and drop all but the newest `KEPT`; every process must call it."""
    weights = {name: full_tensor(p).detach().cpu().contiguous() for name, p in model.named_parameters()}
    state = optimizers.state_dict()
    if world.is_first:
        target = folder / f"step-{progress.step:08d}"
        with atomic_folder(target) as partial:
            write_tensors(partial / _WEIGHTS, weights)
            write_tensors(partial / _OPTIMIZER, state)
            digests = {name: file_digest(partial / name) for name in (_WEIGHTS, _OPTIMIZER)}
            write_json(partial / _STATE, {**asdict(progress), "digests": digests})
        for old in _checkpoints(folder)[KEPT:]:
            shutil.rmtree(old, ignore_errors=True)
    world.wait()


def load_checkpoint(
    folder: Path, model: nn.Module, optimizers: Optimizers, fingerprint: str, console: Console
) -> Progress | None:
    """Load the newest undamaged checkpoint of this fingerprint into model and optimizers, or return None."""
    for path in _checkpoints(folder):
        try:
            progress, weights, state = _read_checkpoint(path)
        except GroundupError as error:
            console.warn(f"{error.message} Going back to the checkpoint before it.")
            continue
        if progress.fingerprint != fingerprint:
            continue
        load_weights(model, weights)
        optimizers.load_state_dict(state)
        return progress
    return None


@torch.no_grad()
def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
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


def _checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    return sorted((path for path in folder.glob("step-????????") if path.is_dir()), reverse=True)


def _read_checkpoint(path: Path) -> tuple[Progress, dict[str, Tensor], dict[str, Tensor]]:
    values = read_json(path / _STATE)
    try:
        for name, digest in values.pop("digests").items():
            if file_digest(path / name) != digest:
                raise ArtifactError(f"{path / name}: damaged (its digest is not the one written down).")
        return Progress(**values), load_file(path / _WEIGHTS), load_file(path / _OPTIMIZER)
    except (OSError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}).") from error
