"""A model's folder: `model.safetensors`, `config.json` and the tokenizer's files, complete in itself.

Where transformers has the architecture, the folder is what it loads as it stands: its names and layouts, and its fields
in `config.json`, with our configuration beside them under the key "groundup". Other models have our names. Read are
those, and folders that Hugging Face's families come in. Nothing is pickled and nothing executes code from a file.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import torch
from torch import Tensor

from groundup.distributed import World, current_world, full_tensor
from groundup.files import atomic_folder, write_json
from groundup.generation.quantize import prepare, quantization_of
from groundup.interop.digests import write_digests
from groundup.interop.families import OURS, huggingface_config
from groundup.interop.layouts import make_layout, put_together, shapes_in_file
from groundup.interop.read_weights import WEIGHTS_FILE
from groundup.interop.stored import CONFIG_FILE, OURS_KEY, QUANT_FORMAT, QUANTIZATION_KEY, open_stored, target_layout
from groundup.interop.write_weights import TensorSpec, write_weights
from groundup.model import Transformer
from groundup.stage import find_model
from groundup.tokenizer import Tokenizer
from groundup.tokenizer.files import GENERATION_FILE
from groundup.tokenizer.pretrained import token_ids, tokenizer_beside

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "LoadedModel", "find_model", "load", "load_model", "save_model"]


def save_model(
    folder: str | Path, model: Transformer, tokenizer: Tokenizer | None = None, *, world: World | None = None
) -> None:
    """Write a model (and its tokenizer) as a folder that appears whole; every process must call it.

    Weights are written as float32, one after the other; quantized ones as they are, under our names, in a folder that
    transformers refuses to load.
    """
    world = world or current_world()
    config, quantization = model.config, quantization_of(model)
    parameters = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = shapes_in_file({name: tuple(parameter.shape) for name, parameter in parameters.items()}, config)
    layout = target_layout(config, shapes) if quantization is None else make_layout(OURS, shapes, config.n_experts)
    dtypes = {
        name: made.dtype if quantization is not None and name.endswith((".packed", ".scales")) else torch.float32
        for name, made in parameters.items()
    }
    specs = [TensorSpec(name, dtypes[made.pieces[0][0]], made.shape) for name, made in layout.tensors.items()]

    # An expert's file tensors take turns with its other matrices: three wholes are gathered once for all experts.
    @functools.lru_cache(maxsize=3 if config.n_experts else 0)
    def whole(name: str) -> Tensor:
        return full_tensor(parameters[name]).detach().to(dtypes[name]).cpu()[: shapes[name][0]]

    def parameter(name: str, expert: int | None) -> Tensor:
        return whole(name) if expert is None else whole(name)[expert]

    def tensor(name: str) -> Tensor:
        return put_together(layout.tensors[name], parameter)

    if world.is_first:
        with atomic_folder(Path(folder)) as partial:
            write_weights(partial, specs, tensor)
            if quantization is None:
                values = {**huggingface_config(config), OURS_KEY: config.to_dict()}
            else:
                how = {"format": QUANT_FORMAT, **dataclasses.asdict(quantization)}
                values = {QUANTIZATION_KEY: how, OURS_KEY: config.to_dict()}
            if "model_type" in values:
                values["dtype"] = "float32"
            if tokenizer is not None:
                ids = token_ids(tokenizer)
                values |= ids
                tokenizer.save(partial)
                if not (partial / GENERATION_FILE).exists():
                    write_json(partial / GENERATION_FILE, ids)
            write_json(partial / CONFIG_FILE, values)
            write_digests(partial)
    else:
        write_weights(None, specs, tensor)
    world.wait()


def load_model(folder: str | Path, *, verify: bool = True) -> tuple[Transformer, Tokenizer | None]:
    """Read a model's folder, groundup's or Hugging Face's; the model computes in float32 until `compute_dtype` is set.

    Args:
        folder: of the model.
        verify: compare the files with the digests that were written with them, if there are some.

    Raises:
        ArtifactError: a file is missing, damaged or does not fit the configuration; or the model is of a family, or
            has a part, that groundup does not compute.
    """
    stored = open_stored(Path(folder), verify=verify)
    model = Transformer(stored.config, device="meta")
    if stored.quantization is not None:
        prepare(model, stored.quantization)
    own = {name: _filled(stored.parameter(name), made) for name, made in model.state_dict().items()}
    model.load_state_dict(own, assign=True)
    model.requires_grad_(stored.quantization is None)
    model.eval()
    return model, tokenizer_beside(stored.folder)


def _filled(stored: Tensor, wanted: Tensor) -> Tensor:
    """A parameter of this shape, in memory of its own: rows that stand for no token are zeros.

    Floats become float32; a quantized matrix's tensors stay as they are.
    """
    shape, dtype = tuple(wanted.shape), wanted.dtype
    is_alone = stored.untyped_storage().nbytes() == stored.numel() * stored.itemsize and stored.is_contiguous()
    if is_alone and tuple(stored.shape) == shape and stored.dtype == dtype:
        return stored
    filled = torch.zeros(shape, dtype=dtype) if tuple(stored.shape) != shape else torch.empty(shape, dtype=dtype)
    filled[: len(stored)] = stored
    return filled


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready to be used, in evaluation mode; without a tokenizer if the `folder` it was read from has none."""

    model: Transformer
    tokenizer: Tokenizer | None
    folder: Path


def load(path: str | Path, *, stage: str | None = None, verify: bool = True) -> LoadedModel:
    """Load a run's model, a stage's model or a model folder, groundup's or Hugging Face's, whichever `path` is.

    Args:
        path: `runs/demo`, `runs/demo/pretrain`, `runs/demo/pretrain/model`, or a folder with a Llama in it.
        stage: of a run, by name (default: what chat takes, else the last one there is).
        verify: as for `load_model`.

    Raises:
        ArtifactError: no model there, a damaged one, or one of a family or with a part that groundup does not compute.
    """
    folder = find_model(path, stage=stage)
    model, tokenizer = load_model(folder, verify=verify)
    return LoadedModel(model, tokenizer, folder)
