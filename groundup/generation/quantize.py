"""A model whose matrices are integers of 8 or 4 bits: which ones, how they compute, and how a model becomes one.

A token that is written alone takes as long as the weights take to be read, so fewer bits are more tokens a second.
Matrices are quantized: the linear layers of the blocks, the embedding and the output layer. Norms, biases, learned
positions and routers of experts stay as they are: they are small, and an error in them hurts most. With 4 bits, the
output layer, an embedding that is tied to it, and rows that groups do not divide have 8, as in llama.cpp.

Numbers and layouts are in `rounding.py`. Here weights are dequantized and multiplied in the activations' dtype; with
`activations = "int8"` both sides of the product are integers, each token with its own scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from groundup.errors import GroundupError
from groundup.generation.gptq import gptq
from groundup.generation.rounding import RUN, Bits, dequantize, pack, round_to_nearest, to_values
from groundup.model import Transformer
from groundup.model.cost import Shape
from groundup.model.experts import StackedLinear
from groundup.model.linear import product

QuantizationMethod = Literal["rtn", "gptq"]
"""Round to nearest, or GPTQ."""

_IN_TURN = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
            ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))  # fmt: skip
"""A block's matrices in the order of the computation; those in one bracket have the same inputs."""

_BATCH_TOKENS = 8192  # of calibration, at once


@dataclass(frozen=True)
class Quantization:
    """How a model's matrices are kept.

    Attributes:
        bits: per weight.
        group_size: inputs per scale, a multiple of 32; None: the whole row with 8 bits, 32 with 4.
        activations: "float", or "int8": rounded for each product, token by token, on CPUs (8 bits, whole rows).

    Raises:
        GroundupError: not these values.
    """

    bits: Bits = 8
    group_size: int | None = None
    activations: Literal["float", "int8"] = "float"

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in (8, 4) or self.activations not in ("float", "int8"):
            raise GroundupError(
                f"bits = {self.bits!r}, activations = {self.activations!r}: bits are 8 or 4, activations float or int8."
            )
        size = self.group_size
        if size is not None and (type(size) is not int or size < RUN or size % RUN):
            raise GroundupError(f"group_size = {size!r}: must be a multiple of {RUN}.")
        if self.activations == "int8" and (self.bits, size) != (8, None):
            raise GroundupError(
                f'activations = "int8": need bits = 8 and no group_size (bits = {self.bits}, group_size = {size}).'
            )

    def matrices(self, shapes: Mapping[str, Shape]) -> dict[str, tuple[Bits, int]]:
        """Which modules of a model are quantized: their bits and inputs per scale.

        Args:
            shapes: of the model's parameters with float weights, as `parameter_shapes` gives them.
        """
        output = "lm_head" if "lm_head.weight" in shapes else "embed_tokens"
        found: dict[str, tuple[Bits, int]] = {}
        for name, shape in shapes.items():
            module, _, kind = name.rpartition(".")
            if kind != "weight" or len(shape) < 2 or module == "embed_positions" or module.endswith(".router"):
                continue
            size = self.group_size or (RUN if self.bits == 4 else shape[-1])
            is_divided = shape[-1] % size == 0
            if self.bits == 4 and is_divided and module != output:
                found[module] = (4, size)
            else:
                found[module] = (8, size if self.bits == 8 and is_divided else shape[-1])
        return found

    def tensors(self, shapes: Mapping[str, Shape]) -> dict[str, tuple[Shape, torch.dtype | None]]:
        """Shapes of all tensors of the quantized model, with the dtypes of those that are no float weights.

        Args:
            shapes: as for `matrices`.
        """
        found: dict[str, tuple[Shape, torch.dtype | None]] = {}
        matrices = self.matrices(shapes)
        for name, shape in shapes.items():
            module = name.removesuffix(".weight")
            if module not in matrices:
                found[name] = (shape, None)
                continue
            bits, size = matrices[module]
            *rows, d_in = shape
            found[f"{module}.packed"] = ((*rows, d_in * bits // 8), torch.int8 if bits == 8 else torch.uint8)
            found[f"{module}.scales"] = ((*rows, d_in // size), torch.float16)
        return found


class Quantized(nn.Module):
    """What quantized matrices share; they cannot be trained.

    Attributes:
        is_frozen_base: adapters beside it are trained, so that it may be in a model that is.
        bits: per weight.
        group_size: inputs per scale.
        packed: the values; see `pack`.
        scales: float16 (*rows, d_in / group_size); they keep their dtype when the model is moved to another.
        bias: float, or None.
    """

    packed: Tensor
    is_frozen_base = False

    def __init__(self, packed: Tensor, scales: Tensor, bits: Bits, bias: Tensor | None = None) -> None:
        super().__init__()
        self.bits: Bits = bits
        self.group_size = packed.shape[-1] * (8 // bits) // scales.shape[-1]
        self.register_buffer("packed", packed)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight(self) -> Float[Tensor, "*rows d_in"]:
        """The dequantized weights, float32."""
        return dequantize(self.packed, self.scales, self.bits)

    def train(self, mode: bool = True) -> Self:
        """Refuse training: gradients would pass by the weights, which are integers."""
        if mode and not self.is_frozen_base:
            raise GroundupError("A quantized model cannot be trained.", "Train the model that it was made from.")
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = self.scales.data
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not kept.is_meta or self.packed.is_meta:
            self.scales.data = kept.to(self.packed.device)
        return self


class QuantizedLinear(Quantized):
    """x Wᵀ + b in x's dtype.

    Attributes:
        rounds_activations: each token of x is rounded to int8 by its largest value, so that the products are integers.
    """

    rounds_activations = False

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Apply the layer."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.rounds_activations and not x.is_cuda and x.numel():
            y = self._integer_product(x).to(x.dtype)
            return y if bias is None else y + bias
        return product(x, self, bias)

    def _integer_product(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        rows = x.reshape(-1, x.shape[-1]).float()
        scales = rows.abs().amax(dim=-1, keepdim=True) / 127
        # oneDNN's product; the scale of a row of weights is that of an output.
        product = torch._int_mm(to_values(rows, scales, 8), self.packed.T).float()
        return product.mul_(scales).mul_(self.scales.float().T).view(*x.shape[:-1], -1)


class QuantizedStackedLinear(Quantized):
    """One linear layer for each expert: packed is (n_experts, d_out, …)."""

    def forward(self, x: Float[Tensor, "tokens d_in"], index: int) -> Float[Tensor, "tokens d_out"]:
        """Apply one expert's layer."""
        weight = dequantize(self.packed[index], self.scales[index], self.bits).to(x.dtype)
        return F.linear(x, weight, None if self.bias is None else self.bias[index].to(x.dtype))


class QuantizedEmbedding(Quantized):
    """Rows of an embedding; only those that are looked up are dequantized."""

    def forward(self, ids: Int[Tensor, " *batch"]) -> Float[Tensor, "*batch width"]:
        """Look ids up."""
        return dequantize(self.packed[ids], self.scales[ids], self.bits)


def quantization_of(model: Transformer) -> Quantization | None:
    """How a model's matrices are kept; None: as floats."""
    found = getattr(model, "quantization", None)
    return found if isinstance(found, Quantization) else None


@torch.no_grad()
def quantize(
    model: Transformer,
    quantization: Quantization | None = None,
    *,
    method: QuantizationMethod = "rtn",
    calibration: Int[Tensor, "windows seq"] | None = None,
) -> Transformer:
    """Quantize a model's matrices in place, and return it.

    Args:
        model: with float weights, on one device; put into evaluation mode.
        quantization: bits and groups; None: 8 bits.
        method: "rtn", or "gptq": layer by layer, each for the inputs that the quantized layers before it give. GPTQ is
            of the blocks' matrices; embedding and output layer are rounded to the nearest.
        calibration: token ids of text as the model will see it, for GPTQ.

    Raises:
        GroundupError: the model is quantized already, or there is no text to calibrate with.
        ArtifactError: a weight is not finite.
    """
    quantization = quantization or Quantization()
    if quantization_of(model) is not None:
        raise GroundupError("The model is quantized already.", "Quantize the model that it was made from.")
    if method not in ("rtn", "gptq"):
        raise GroundupError(f"method = {method!r}: is neither rtn nor gptq.")
    chosen = quantization.matrices({name: tuple(made.shape) for name, made in model.named_parameters()})
    model.eval().requires_grad_(requires_grad=False)
    if method == "gptq":
        if calibration is None or not len(calibration):
            raise GroundupError("GPTQ needs text to calibrate with.", 'Give some, or choose method = "rtn".')
        _round(model, "embed_tokens", *chosen.pop("embed_tokens"))
        for name, grams in _layer_inputs(model, chosen, calibration):
            _round(model, name, *chosen.pop(name), grams)
    for name, (bits, size) in chosen.items():
        _round(model, name, bits, size)
    _finish(model, quantization)
    return model


def prepare(model: Transformer, quantization: Quantization) -> None:
    """Put quantized matrices of the right shapes into a model with float ones, to be filled with what was saved."""
    shapes = {name: tuple(made.shape) for name, made in model.named_parameters()}
    tensors = {
        name: torch.empty(shape, dtype=dtype, device="meta")
        for name, (shape, dtype) in quantization.tensors(shapes).items()
    }
    for name, (bits, _) in quantization.matrices(shapes).items():
        _replace(model, name, tensors[f"{name}.packed"], tensors[f"{name}.scales"], bits)
    _finish(model, quantization)


def _finish(model: Transformer, quantization: Quantization) -> None:
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.rounds_activations = quantization.activations == "int8"
    model.quantization = quantization  # type: ignore[assignment]
    model.eval().requires_grad_(requires_grad=False)


def _replace(model: Transformer, name: str, packed: Tensor, scales: Tensor, bits: Bits) -> None:
    before = model.get_submodule(name)
    kind = (
        QuantizedStackedLinear if isinstance(before, StackedLinear)
        else QuantizedEmbedding if isinstance(before, nn.Embedding) else QuantizedLinear
    )  # fmt: skip
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, kind(packed, scales, bits, getattr(before, "bias", None)).eval())


def _round(model: Transformer, name: str, bits: Bits, size: int, grams: list[Tensor] | None = None) -> None:
    """Quantize one module, by GPTQ if XᵀX of its inputs is given, one for each expert."""
    weight = model.get_parameter(f"{name}.weight")
    if grams is None:
        values, scales = round_to_nearest(weight, bits, size, name=name)
    elif weight.ndim == 2:
        values, scales = gptq(weight, grams[0], bits, size, name=name)
    else:
        both = [gptq(one, gram, bits, size, name=name) for one, gram in zip(weight, grams, strict=True)]
        values, scales = (torch.stack(parts) for parts in zip(*both, strict=True))
    _replace(model, name, pack(values, bits), scales, bits)


def _layer_inputs(
    model: Transformer, chosen: Mapping[str, Any], calibration: Tensor
) -> Iterator[tuple[str, list[Tensor]]]:
    """The blocks' matrices in order, each with XᵀX of its inputs; to be quantized before the next is asked for."""
    states: list[Tensor] = []  # what goes into the next block, batch by batch
    told: dict[int, tuple[Any, ...]] = {}  # what each block is told of positions and masks

    def note(layer: int, inputs: tuple[Any, ...]) -> None:
        told[layer] = inputs[1:]
        if layer == 0:
            states.append(inputs[0])

    hooks = [
        block.register_forward_pre_hook(lambda _, inputs, layer=layer: note(layer, inputs))
        for layer, block in enumerate(model.blocks)
    ]
    rows = max(1, _BATCH_TOKENS // calibration.shape[1])
    for batch in torch.split(calibration.to(next(model.parameters()).device), rows):
        model(batch, head=lambda hidden, output: None)
    for hook in hooks:
        hook.remove()
    for layer, block in enumerate(model.blocks):
        for part in _IN_TURN:
            names = [name for name in part if f"layers.{layer}.{name}" in chosen]
            first = block.get_submodule(names[0])
            weight = first.weight
            assert isinstance(weight, Tensor)
            grams = weight.new_zeros(1 if weight.ndim == 2 else len(weight), weight.shape[-1], weight.shape[-1])

            def add(_: nn.Module, inputs: tuple[Any, ...], grams: Tensor = grams) -> None:
                rows = inputs[0].reshape(-1, grams.shape[-1]).to(grams.dtype)
                grams[inputs[1] if len(inputs) > 1 else 0].addmm_(rows.T, rows)

            hook = first.register_forward_pre_hook(add)
            for x in states:
                block(x, *told[layer])
            hook.remove()
            yield from ((f"layers.{layer}.{name}", list(grams)) for name in names)
        states = [block(x, *told[layer]) for x in states]
