"""Products in 8 bits (arXiv:2209.05433) for the blocks' linear layers, through torchao; all else stays in bfloat16.

Input, weight and gradient of each product are scaled by their largest value and cast (e4m3 forward, e5m2 for gradients)
right before it; weights and gradients that the optimizer sees stay float32. Output layer, embeddings, routers and
stacked experts keep bfloat16. Only tensor cores of compute capability 8.9 and later multiply 8 bits.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from groundup.errors import GroundupError
from groundup.model import Transformer

MULTIPLE = 16
"""Both sides of a weight must be a multiple of it: the kernels work in tiles."""
LEAST_CAPABILITY = (8, 9)

_EMULATED = False
"""Whether products are rounded to 8 bits but taken in float32, which any device can; for tests."""


def check_float8(device_type: str, stage: str = "pretrain") -> None:
    """Hold that this device multiplies 8 bits and torchao is there; nothing is allocated.

    Raises:
        GroundupError: one of them is not so.
    """
    if _EMULATED:
        return
    where, fix = f'[{stage}] precision = "float8"', 'Choose precision = "auto".'
    if device_type != "cuda":
        raise GroundupError(f"{where}: needs an NVIDIA GPU with 8-bit tensor cores, and this is a {device_type}.", fix)
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        name, (major, minor) = torch.cuda.get_device_name(), capability
        needed = ".".join(map(str, LEAST_CAPABILITY))
        raise GroundupError(f"{where}: needs compute capability {needed}; {name} has {major}.{minor}.", fix)
    if importlib.util.find_spec("torchao") is None:
        raise GroundupError(f"{where}: torchao is not installed.", f"Run: pip install 'groundup[fp8]'. {fix}")


def float8_layers(model: Transformer) -> list[str]:
    """Names of the linear layers whose products will be taken in 8 bits."""
    return [
        name
        for name, module in model.named_modules()
        if name.startswith("layers.") and isinstance(module, nn.Linear) and _is_converted(module, name)
    ]


@contextlib.contextmanager
def float8_products(model: Transformer, stage: str = "pretrain") -> Iterator[list[str]]:
    """Within this block the model's linear layers multiply in 8 bits; gives their names. Parameters keep theirs.

    To be entered before the model is sharded or compiled.

    Raises:
        GroundupError: no layer can be converted.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    names = float8_layers(model)
    if not names:
        raise GroundupError(
            f'[{stage}] precision = "float8": no linear layer of the blocks has sides in multiples of {MULTIPLE}.',
            "Choose such a d_model and d_ff, or another precision.",
        )
    plain = {name: model.get_submodule(name) for name in names}
    # Rows of a batch need not be a multiple of 16: zeros fill them up.
    config = Float8LinearConfig(emulate=_EMULATED, pad_inner_dim=True)
    convert_to_float8_training(
        model.layers, config=config, module_filter_fn=lambda module, name: _is_converted(module, name)
    )
    try:
        yield names
    finally:
        if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):  # else FSDP holds the layers
            for name, module in plain.items():
                converted = model.get_submodule(name)
                module.weight, module.bias = converted.weight, converted.bias
                model.set_submodule(name, module)


def _is_converted(module: nn.Module, name: str) -> bool:
    return (
        isinstance(module, nn.Linear)
        and name.rpartition(".")[2] != "router"
        and module.in_features % MULTIPLE == module.out_features % MULTIPLE == 0
    )
