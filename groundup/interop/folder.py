"""A model's folder: `model.safetensors`, `config.json` and the tokenizer's files, complete in itself.

`config.json` carries our configuration under the key "groundup" and, where transformers has the architecture,
theirs beside it. Nothing is pickled and nothing executes code from a file.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pydantic
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from groundup.distributed import World, current_world, full_tensor
from groundup.errors import ArtifactError, RecipeError
from groundup.files import atomic_folder, read_json, write_json, write_tensors
from groundup.interop.huggingface import huggingface_config, inside_name, outside_name
from groundup.model import ModelConfig, Transformer
from groundup.tokenizer import Tokenizer
from groundup.tokenizer.tokenizer import TOKENIZER_FILE

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


def save_model(
    folder: str | Path, model: Transformer, tokenizer: Tokenizer | None = None, *, world: World | None = None
) -> None:
    """Write a model (and its tokenizer) as a folder that appears whole; every process must call it."""
    world = world or current_world()
    weights = {
        outside_name(name): full_tensor(parameter).detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
    }
    if world.is_first:
        config = {**huggingface_config(model.config), "groundup": model.config.to_dict()}
        if tokenizer is not None:
            config.update(
                bos_token_id=tokenizer.end_of_text_id,
                eos_token_id=[tokenizer.end_id, tokenizer.end_of_text_id],
                pad_token_id=tokenizer.pad_id,
            )
        with atomic_folder(Path(folder)) as partial:
            write_tensors(partial / WEIGHTS_FILE, weights)
            write_json(partial / CONFIG_FILE, config)
            if tokenizer is not None:
                tokenizer.save(partial)
                names = ("bos_token_id", "eos_token_id", "pad_token_id")
                write_json(partial / "generation_config.json", {name: config[name] for name in names})
    world.wait()


def load_model(folder: str | Path) -> tuple[Transformer, Tokenizer | None]:
    """Read what `save_model` wrote; the model's arithmetic is float32 until told otherwise.

    Raises:
        ArtifactError: a file is missing, damaged or does not fit the configuration.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG_FILE)
    try:
        weights = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{folder / WEIGHTS_FILE}: cannot be read ({error}).") from error
    model = Transformer(config, device="meta")
    expected = {outside_name(name): parameter for name, parameter in model.named_parameters()}
    if weights.keys() != expected.keys():
        odd = sorted(weights.keys() ^ expected.keys())
        raise ArtifactError(f"{folder / WEIGHTS_FILE}: not the weights of this configuration ({', '.join(odd[:4])}).")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise ArtifactError(
                f"{folder / WEIGHTS_FILE}: {name} has shape {tuple(tensor.shape)}, not {tuple(expected[name].shape)}."
            )
    own = {inside_name(name): tensor.to(torch.float32) for name, tensor in weights.items()}
    model.load_state_dict(own, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.eval()
    tokenizer = Tokenizer.load(folder) if (folder / TOKENIZER_FILE).is_file() else None
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ArtifactError(
            f"{folder / TOKENIZER_FILE}: has {tokenizer.vocab_size} tokens, the model beside it {config.vocab_size}.",
            "Put the tokenizer there that the model was trained with.",
        )
    return model, tokenizer


def _read_config(path: Path) -> ModelConfig:
    """Our configuration in a `config.json`, every value of it checked."""
    contents = read_json(path)
    values = contents.get("groundup") if isinstance(contents, dict) else None
    if not isinstance(values, dict):
        raise ArtifactError(f"{path}: no groundup model is described here.")
    unknown = sorted(values.keys() - {field.name for field in dataclasses.fields(ModelConfig)})
    if unknown:
        # Left out, it could be a part of the model that is then silently not computed.
        raise ArtifactError(
            f"{path}: describes a model that this version of groundup does not know ({', '.join(unknown)}).",
            "Install a newer groundup.",
        )
    try:
        return pydantic.TypeAdapter(ModelConfig).validate_python(values)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"{path}: {place} = {first['input']!r:.60}: {first['msg']}.") from error
    except RecipeError as error:
        raise ArtifactError(f"{path}: {'; '.join(map(str, error.problems))}") from error


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready to be used.

    Attributes:
        model: in evaluation mode.
        tokenizer: None if the folder has none.
        folder: where it was read from.
    """

    model: Transformer
    tokenizer: Tokenizer | None
    folder: Path


def load(path: str | Path, *, stage: str | None = None) -> LoadedModel:
    """Load a run's model, a stage's model or a model folder, whichever `path` is.

    Args:
        path: `runs/demo`, `runs/demo/pretrain` or `runs/demo/pretrain/model`.
        stage: of a run: "pretrain" or "sft" (default: the last one there is).

    Raises:
        ArtifactError: no model there, or a damaged one.
    """
    path = Path(path)
    stages = (stage,) if stage else ("sft", "pretrain")
    candidates = [path / name / "model" for name in stages]
    if stage is None:
        candidates = [path, path / "model", *candidates]
    for folder in candidates:
        if (folder / CONFIG_FILE).is_file():
            model, tokenizer = load_model(folder)
            return LoadedModel(model, tokenizer, folder)
    raise ArtifactError(
        f"{path}: no model here" + (f" of stage {stage!r}." if stage else "."),
        "Name a run (runs/demo) or a model's folder (runs/demo/sft/model); `groundup runs` lists the runs.",
    )
