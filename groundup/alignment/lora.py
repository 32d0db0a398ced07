"""LoRA: a few trained numbers beside frozen matrices (arXiv:2106.09685), for every stage that trains.

    h = W x + b + (α / r) B A x        A (r, in) drawn as in PEFT, B (out, r) = 0: at first the model is as it was

DoRA (arXiv:2402.09353) trains the length m of each output's row apart from its direction; the length that it divides by
is taken for a constant (section 4.3):

    h = m ⊙ (W + (α / r) B A) x / ‖W + (α / r) B A‖_row + b

With `base_bits` the frozen matrices are kept in 8 or 4 bits, dequantized for each product and again in the backward
pass (QLoRA, arXiv:2305.14314); what is merged in the end is the dequantized base, on which the adapters were trained.

What is frozen becomes a buffer: optimizers, gradient norms and checkpoints see the adapters alone. Adapters switched
off, the model is the one that the stage started from. `adapter/` has PEFT's names and files.
"""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import xxhash
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from groundup.distributed import World, current_world, full_tensor
from groundup.errors import ArtifactError, GroundupError
from groundup.files import atomic_folder, write_json, write_tensors
from groundup.generation.quantize import Quantization, Quantized, quantize
from groundup.interop.layouts import shapes_in_file
from groundup.interop.stored import target_layout
from groundup.model import ModelConfig, Transformer
from groundup.model.cost import parameter_shapes
from groundup.model.linear import Linear, product
from groundup.recipe import Section, Texts, setting
from groundup.untrusted import file_inside, read_object, reading

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PARTS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


class LoraSettings(Section):
    """Adapters beside frozen matrices."""

    rank: int = setting(8, "r: of the update of each matrix", ge=1, le=4096)
    alpha: float = setting(16.0, "the update is multiplied by alpha / rank", gt=0.0)
    targets: Texts = setting((), "names of the linear layers, such as q_proj and v_proj (unset: all of the blocks)")
    dropout: float = setting(0.0, "of what goes into the adapters", ge=0.0, lt=1.0)
    dora: bool = setting(False, "train the rows' lengths apart from their directions")
    base_bits: Literal[4, 8] | None = setting(None, "keep what is frozen in so many bits (unset: as it is)")


class AdapterSettings(Section):
    """What every stage can be told that can train adapters instead of the whole model."""

    lora: LoraSettings | None = setting(None, "train adapters of this rank and so on, instead of all weights")

    def fingerprint_values(self) -> dict[str, Any]:
        """Without adapters it is as if there were no such setting."""
        values = super().fingerprint_values()
        return values if self.lora is not None else {name: v for name, v in values.items() if name != "lora"}


class LoraLinear(nn.Module):
    """A frozen linear layer and its adapter.

    Attributes:
        base: the layer; its weights are buffers.
        lora_A, lora_B, magnitude: the adapter; `magnitude` is DoRA's m, or None.
        is_on: false: the layer is its base.
    """

    def __init__(self, base: Linear | Quantized, settings: LoraSettings, name: str, seed: int) -> None:
        super().__init__()
        weight = base.weight
        d_out, d_in = weight.shape
        draw = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(f"{seed}/{name}.lora_A".encode()) >> 1)
        drawn = (2 * torch.rand(settings.rank, d_in, generator=draw) - 1) / math.sqrt(d_in)
        self.base, self.is_on = base, True
        self.scale, self.dropout = settings.alpha / settings.rank, settings.dropout
        self.lora_A = nn.Parameter(drawn.to(weight.device))
        self.lora_B = nn.Parameter(torch.zeros(d_out, settings.rank, device=weight.device))
        self.magnitude = nn.Parameter(weight.detach().norm(dim=1)) if settings.dora else None

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Apply the layer, in x's dtype."""
        bias = self.base.bias
        y = product(x, self.base)
        if self.is_on:
            inputs = F.dropout(x, self.dropout, self.training) if self.dropout else x
            update = F.linear(F.linear(inputs, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
            y = torch.add(y, update, alpha=self.scale)
            if self.magnitude is not None:
                length = (self.base.weight + self.scale * (self.lora_B @ self.lora_A)).detach().norm(dim=1)
                y = y * (self.magnitude / length).to(x.dtype)
        return y if bias is None else y + bias.to(x.dtype)

    @torch.no_grad()
    def merged(self) -> Linear:
        """A plain layer with the adapter in its matrix, float32; every process must call it."""
        weight = self.base.weight.float() + self.scale * (full_tensor(self.lora_B) @ full_tensor(self.lora_A))
        if self.magnitude is not None:
            weight = weight * (full_tensor(self.magnitude) / weight.norm(dim=1))[:, None]
        return _linear(weight, self.base.bias).train(self.training)


def add_adapters(model: Transformer, settings: LoraSettings, seed: int = 1) -> None:
    """Freeze a model, in place, and put adapters beside its matrices.

    Args:
        model: whole, on one device; with `base_bits` its matrices are quantized.
        settings: which matrices, and how.
        seed: of A; each is drawn from a generator of (seed, its name).

    Raises:
        GroundupError: a target that no layer has the name of, or the model has adapters already.
    """
    if any(isinstance(module, LoraLinear) for module in model.modules()):
        raise GroundupError("The model has adapters already.", "Merge them first: groundup.alignment.lora.merge.")
    chosen = target_layers(parameter_shapes(model.config), settings)
    if settings.base_bits is not None:
        if model.config.n_experts:
            raise GroundupError("lora base_bits: a model with experts is trained beside a float base only.")
        quantize(model, Quantization(settings.base_bits))
    freeze(model)
    for name in chosen:
        base: Any = model.get_submodule(name)
        model.set_submodule(name, LoraLinear(base, settings, name, seed).train(base.training))


def target_layers(shapes: dict[str, tuple[int, ...]], settings: LoraSettings) -> list[str]:
    """The names of the linear layers that get an adapter, from the shapes of a model's parameters by name.

    Raises:
        GroundupError: a target that no layer has the name of.
    """
    layers = {
        name.removesuffix(".weight"): name.split(".")[-2]
        for name, shape in shapes.items()
        if name.startswith("layers.") and name.endswith("_proj.weight") and len(shape) == 2
    }
    parts = sorted({*layers.values()})
    if unknown := [target for target in settings.targets if target not in (*layers, *parts)]:
        near = difflib.get_close_matches(unknown[0], parts, n=1)
        raise GroundupError(
            f"lora targets {', '.join(unknown)}: no linear layer of the model's blocks has that name.",
            f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(parts)}.",
        )
    return [name for name, part in layers.items() if not settings.targets or {name, part} & {*settings.targets}]


def adapters(model: nn.Module) -> dict[str, LoraLinear]:
    """The adapted layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within this block the model is the one that the adapters were put beside: a reference that takes no memory."""
    layers = adapters(model).values()
    for layer in layers:
        layer.is_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.is_on = True


@contextlib.contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Within this block the adapters are in the matrices, so that text is made at the plain model's speed.

    Behind it the layers are the very same again. Every process must enter it.
    """
    layers = adapters(model)
    for name, layer in layers.items():
        model.set_submodule(name, layer.merged())
    try:
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)


def merge(model: Transformer) -> None:
    """Put the adapters into the matrices for good, in place: an ordinary model again; every process must call it."""
    for name, layer in adapters(model).items():
        model.set_submodule(name, layer.merged())
    for name, module in [*model.named_modules()]:
        if isinstance(module, Quantized):
            weight, is_embedding = module.weight, name == "embed_tokens"
            made = nn.Embedding(*weight.shape, _weight=weight) if is_embedding else _linear(weight, module.bias)
            model.set_submodule(name, made.train(module.training))
    model.__dict__.pop("quantization", None)
    thaw(model)


def freeze(module: nn.Module) -> None:
    """Make buffers of a module's parameters, in place: whoever trains it does not see them."""
    for part in module.modules():
        for name, parameter in [*part._parameters.items()]:
            if parameter is not None:
                del part._parameters[name]
                part.register_buffer(name, parameter.detach())
        if isinstance(part, Quantized):
            part.is_frozen_base = True


def thaw(module: nn.Module) -> None:
    """Undo `freeze`: parameters again, that take gradients."""
    for part in module.modules():
        for name, buffer in [*part._buffers.items()]:
            if buffer is not None:
                del part._buffers[name]
                part.register_parameter(name, nn.Parameter(buffer))
    module.requires_grad_(True)


def _linear(weight: Tensor, bias: Tensor | nn.Module | None) -> Linear:
    plain = Linear(weight.shape[1], weight.shape[0], bias=isinstance(bias, Tensor), device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if isinstance(bias, Tensor):
        plain.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return plain


def adapter_shapes(config: ModelConfig, lora: LoraSettings | None) -> dict[str, tuple[int, ...]]:
    """Shapes of all that is trained, by name: the adapters, or without them the whole model.

    Raises:
        GroundupError: a target that no layer has the name of.
    """
    shapes = parameter_shapes(config)
    if lora is None:
        return shapes
    found: dict[str, tuple[int, ...]] = {}
    for name in target_layers(shapes, lora):
        d_out, d_in = shapes[f"{name}.weight"]
        found |= {f"{name}.lora_A": (lora.rank, d_in), f"{name}.lora_B": (d_out, lora.rank)}
        found |= {f"{name}.magnitude": (d_out,)} if lora.dora else {}
    return found


# PEFT's files


def save_adapter(
    folder: str | Path, model: Transformer, settings: LoraSettings, base: str = "", *, world: World | None = None
) -> None:
    """Write the adapters alone, as `peft` loads them; every process must call it.

    Args:
        folder: appears whole.
        model: with adapters.
        settings: with which they were made.
        base: the model that they belong to, for people and for PEFT.
        world: the processes; the first one writes.
    """
    world, keys = world or current_world(), _keys_in_file(model)
    parts = {keys[name]: part for name, part in model.named_parameters() if name in keys}
    tensors = {key: full_tensor(part).detach().cpu().contiguous() for key, part in parts.items()}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": settings.rank, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout, "bias": "none",
        "use_dora": settings.dora, "fan_in_fan_out": False,
        "target_modules": sorted({key.split(".")[-3] for key in tensors if key.endswith(".lora_A.weight")}),
    }  # fmt: skip
    if world.is_first:
        with atomic_folder(Path(folder)) as partial:
            write_tensors(partial / _WEIGHTS, tensors)
            write_json(partial / _CONFIG, config)
    world.wait()


def load_adapter(folder: str | Path, model: Transformer) -> LoraSettings:
    """Put adapters of PEFT's files, ours or another program's, beside a model's matrices; their settings.

    Raises:
        ArtifactError: damaged, of another model, or with a part that is not computed here.
    """
    folder, keys = Path(folder), _keys_in_file(model)
    values = read_object(file_inside(folder, _CONFIG))
    with reading(str(folder / _CONFIG)):
        usual: dict[str, Any] = {
            "peft_type": "LORA", "bias": "none", "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
            "layer_replication": None,
        }  # fmt: skip
        strange = [f"{name} = {values[name]}" for name, value in usual.items() if (values.get(name) or value) != value]
        if strange:
            raise ArtifactError(f"{folder / _CONFIG}: {', '.join(strange)}: groundup does not compute this.")
        read, magnitude = load_file(file_inside(folder, _WEIGHTS)), _PARTS["magnitude"]
        # Some versions write the magnitude with an ending.
        tensors = {key.replace(f"{magnitude}.weight", magnitude): tensor for key, tensor in read.items()}
        rank, alpha = int(values["r"]), float(values["lora_alpha"])
        settings = LoraSettings(
            rank=rank, alpha=alpha * math.sqrt(rank) if values.get("use_rslora") else alpha,
            targets=tuple(name.removesuffix(".lora_A") for name, key in keys.items()
                          if name.endswith(".lora_A") and key in tensors),
            dropout=float(values.get("lora_dropout", 0.0)), dora=bool(values.get("use_dora", False)),
        )  # fmt: skip
    shapes = adapter_shapes(model.config, settings)
    wanted = {keys[name]: shape for name, shape in shapes.items()}
    wrong = {key for key, tensor in tensors.items() if wanted.get(key) != tensor.shape} | (wanted.keys() - tensors)
    if wrong or not tensors:
        raise ArtifactError(
            f"{folder / _WEIGHTS}: {min(wrong, default='nothing in it')}: does not fit the model's layers and rank "
            f"{rank}."
        )
    add_adapters(model, settings)
    model.load_state_dict({name: tensors[keys[name]] for name in shapes}, strict=False)
    return settings


def _keys_in_file(model: Transformer) -> dict[str, str]:
    """What the parameters that adapters can have are called in PEFT's file.

    Their layers have there the names of the family's files, where each has a tensor of its own.
    """
    shapes = parameter_shapes(model.config)
    layout = target_layout(model.config, shapes_in_file(shapes, model.config))
    found: dict[str, str] = {}
    for name in target_layers(shapes, LoraSettings()):
        place, tensors = layout.places[f"{name}.weight"], layout.sources[f"{name}.weight"]
        is_alone = len(tensors) == 1 and place.slots == 1 and not place.transposed
        outside = tensors[0].removesuffix(".weight") if is_alone else f"model.{name}"
        found |= {f"{name}.{own}": f"base_model.model.{outside}.{part}" for own, part in _PARTS.items()}
    return found
