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
from groundup.model.linear import Linear
from groundup.recipe import GroupSettings, OptimizerSettings, Section, Texts, setting
from groundup.untrusted import file_inside, read_object, reading

ADAPTER_FOLDER = "adapter"
_CONFIG, _WEIGHTS, _PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
_MAGNITUDE = "lora_magnitude_vector"


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

    def __init__(self, base: nn.Module, settings: LoraSettings, name: str, seed: int) -> None:
        super().__init__()
        weight = base.weight
        assert isinstance(weight, Tensor)
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
        if isinstance(self.base, Quantized):
            y = _FrozenProduct.apply(x, self.base)  # type: ignore[no-untyped-call]
        else:
            y = F.linear(x, self._weight().to(x.dtype))
        if self.is_on:
            inputs = F.dropout(x, self.dropout, self.training) if self.dropout else x
            update = F.linear(F.linear(inputs, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
            y = torch.add(y, update, alpha=self.scale)
            if self.magnitude is not None:
                length = (self._weight() + self.scale * (self.lora_B @ self.lora_A)).detach().norm(dim=1)
                y = y * (self.magnitude / length).to(x.dtype)
        return y if bias is None else y + bias.to(x.dtype)

    @torch.no_grad()
    def merged_weight(self) -> Float[Tensor, "d_out d_in"]:
        """W with the adapter in it, float32; every process must call it."""
        weight = self._weight().float() + self.scale * (full_tensor(self.lora_B) @ full_tensor(self.lora_A))
        if self.magnitude is None:
            return weight
        return weight * (full_tensor(self.magnitude) / weight.norm(dim=1))[:, None]

    def _weight(self) -> Tensor:
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight


class _FrozenProduct(torch.autograd.Function):
    """x Wᵀ for a quantized W, which is dequantized again in the backward pass instead of being kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Quantized) -> Tensor:
        ctx.base = base
        return F.linear(x, base.weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.base.weight.to(gradients[0].dtype), None


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
        base = model.get_submodule(name)
        _put(model, name, LoraLinear(base, settings, name, seed).train(base.training))


def target_layers(shapes: dict[str, tuple[int, ...]], settings: LoraSettings) -> list[str]:
    """The names of the linear layers that get an adapter, from the shapes of a model's parameters by name.

    Raises:
        GroundupError: a target that no layer has the name of.
    """
    layers = [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.startswith("layers.") and name.endswith("_proj.weight") and len(shape) == 2
    ]
    known = {*layers, *(name.rpartition(".")[2] for name in layers)}
    unknown = [target for target in settings.targets if target not in known]
    if unknown:
        parts = sorted({name.rpartition(".")[2] for name in layers})
        near = difflib.get_close_matches(unknown[0], parts, n=1)
        raise GroundupError(
            f"lora targets {', '.join(unknown)}: no linear layer of the model's blocks has that name.",
            f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(parts)}.",
        )
    return [name for name in layers if not settings.targets or {name, name.rpartition(".")[2]} & {*settings.targets}]


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


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
        _put(model, name, _plain(layer))
    try:
        yield
    finally:
        for name, layer in layers.items():
            _put(model, name, layer)


def merge(model: Transformer) -> None:
    """Put the adapters into the matrices for good, in place: an ordinary model again; every process must call it."""
    for name, layer in adapters(model).items():
        _put(model, name, _plain(layer))
    for name, module in [*model.named_modules()]:
        if isinstance(module, Quantized):
            made = _Rows(module.weight) if name == "embed_tokens" else _linear(module.weight, module.bias)
            _put(model, name, made.train(module.training))
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


class _Rows(nn.Embedding):
    """An embedding of these rows."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__(*rows.shape, device="meta")
        self.weight = nn.Parameter(rows)


def _plain(layer: LoraLinear) -> Linear:
    return _linear(layer.merged_weight(), layer.base.bias).train(layer.training)


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


def memory_settings(settings: OptimizerSettings, lora: LoraSettings | None, *, is_tied: bool) -> OptimizerSettings:
    """Settings with which memory is estimated: with adapters, matrices have neither gradients nor optimizer state."""
    if lora is None:
        return settings
    patterns = ("layers.*.self_attn.*", "layers.*.mlp.*", "embed_*", *(() if is_tied else ("lm_head*",)))
    return settings.model_copy(update={"groups": tuple(GroupSettings(match=one, frozen=True) for one in patterns)})


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
    world = world or current_world()
    names = _names_in_file(model)
    tensors: dict[str, Tensor] = {}
    for name, layer in adapters(model).items():
        parts: dict[str, Tensor | None] = {
            "lora_A.weight": layer.lora_A, "lora_B.weight": layer.lora_B, _MAGNITUDE: layer.magnitude
        }  # fmt: skip
        for kind, part in parts.items():
            if part is not None:
                tensors[f"{_PREFIX}{names[name]}.{kind}"] = full_tensor(part).detach().cpu().contiguous()
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": settings.rank, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout, "bias": "none",
        "use_dora": settings.dora, "fan_in_fan_out": False,
        "target_modules": sorted({names[name].rpartition(".")[2] for name in adapters(model)}),
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
    folder = Path(folder)
    values = read_object(file_inside(folder, _CONFIG))
    with reading(str(folder / _CONFIG)):
        rank, alpha = int(values["r"]), float(values["lora_alpha"])
        if values.get("use_rslora"):
            alpha *= math.sqrt(rank)
        strange = [
            name
            for name in ("rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication")
            if values.get(name)
        ]
        strange += [f"bias = {values['bias']}"] if values.get("bias", "none") != "none" else []
        strange += [f"peft_type = {values['peft_type']}"] if values.get("peft_type") != "LORA" else []
        if strange:
            raise ArtifactError(f"{folder / _CONFIG}: {', '.join(strange)}: groundup does not compute this.")
        tensors = load_file(file_inside(folder, _WEIGHTS))
        ours = {outside: name for name, outside in _names_in_file(model).items()}
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            module, kind = _split(key)
            if module not in ours:
                raise ArtifactError(f"{folder / _WEIGHTS}: {key} belongs to no linear layer of this model.")
            found.setdefault(ours[module], {})[kind] = tensor
        settings = LoraSettings(
            rank=rank, alpha=alpha, targets=tuple(found), dropout=float(values.get("lora_dropout", 0.0)),
            dora=bool(values.get("use_dora", False)),
        )  # fmt: skip
    add_adapters(model, settings)
    kinds = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B"}
    kinds |= {_MAGNITUDE: "magnitude"} if settings.dora else {}
    with torch.no_grad():
        for name, layer in adapters(model).items():
            for kind, own in kinds.items():
                parameter, stored = getattr(layer, own), found[name].get(kind)
                if stored is None or stored.shape != parameter.shape or len(found[name]) != len(kinds):
                    raise ArtifactError(
                        f"{folder / _WEIGHTS}: {name}: its tensors do not fit the layer and rank {rank}."
                    )
                parameter.copy_(stored)
    return settings


def _split(key: str) -> tuple[str, str]:
    """A key of PEFT's file: the module in its model's file, and which part of the adapter."""
    key = key.removeprefix(_PREFIX)
    for kind in ("lora_A.weight", "lora_B.weight", _MAGNITUDE):
        for ending in (f".{kind}", f".{kind}.weight"):  # as some versions write the magnitude
            if key.endswith(ending):
                return key.removesuffix(ending), kind
    return key, ""


def _names_in_file(model: Transformer) -> dict[str, str]:
    """What the layers that can have an adapter are called in the family's files, where each has a tensor of its own."""
    shapes = parameter_shapes(model.config)
    layout = target_layout(model.config, shapes_in_file(shapes, model.config))
    found = {}
    for name in target_layers(shapes, LoraSettings()):
        place, tensors = layout.places[f"{name}.weight"], layout.sources[f"{name}.weight"]
        is_alone = len(tensors) == 1 and place.slots == 1 and not place.transposed
        found[name] = tensors[0].removesuffix(".weight") if is_alone else f"model.{name}"
    return found
