"""The arithmetic of training: which dtype, why, and what float16 and float8 need beside it.

bfloat16 needs hardware: AVX512-BF16 or AMX on x86, BF16 on Arm, compute capability 8.0 on NVIDIA. Without it bfloat16
is slower than float32 on a CPU; float16 has no fast path on any CPU and is never chosen there.

float8 (arXiv:2209.05433) takes the products of the blocks' linear layers in 8 bits, through torchao; all else stays in
bfloat16. Input, weight and gradient of each product are scaled by their largest value and cast (e4m3 forward, e5m2 for
gradients) right before it; weights and gradients that the optimizer sees stay float32. Output layer, embeddings,
routers and stacked experts keep bfloat16. Only tensor cores of compute capability 8.9 and later multiply 8 bits.

float16 needs dynamic loss scaling (arXiv:1710.03740, section 3.2), which keeps small gradients from becoming zero: the
loss is multiplied by a scale before the backward pass and gradients are divided by it afterwards. Where they were too
large, the step is left out and the scale halved; after `GROWTH_STEPS` good steps it is doubled.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from groundup.environment import cpu_features
from groundup.errors import ArtifactError, GroundupError
from groundup.model import Transformer
from groundup.model.initialization import is_sharded
from groundup.recipe import PrecisionName


@functools.cache
def native_bfloat16(device_type: str = "cpu") -> tuple[bool, str]:
    """Whether the device multiplies bfloat16 natively, and what says so."""
    if device_type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return major >= 8, f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"
    if device_type == "mps":
        return False, "MPS: float32 is the safe choice"
    flags = cpu_features().split()
    for flag, name in (("amx_bf16", "AMX-BF16"), ("avx512_bf16", "AVX512-BF16"), ("bf16", "Arm BF16")):
        if flag in flags:
            return True, name
    return False, "this CPU has neither AVX512-BF16, AMX nor Arm BF16"


def check_precision(setting: PrecisionName, device_type: str, stage: str = "pretrain") -> None:
    """Hold that this machine can do the arithmetic that a recipe asks for; nothing is allocated.

    Raises:
        GroundupError: float8, and the device does not multiply 8 bits or torchao is not there.
    """
    if setting != "float8" or _EMULATED:
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


def choose_precision(setting: PrecisionName, device_type: str = "cpu") -> tuple[torch.dtype, str]:
    """The dtype of the model's arithmetic and the reason for it (`check_precision` says whether it can be)."""
    native, evidence = native_bfloat16(device_type)
    if setting == "float8":
        return torch.bfloat16, "float8 in the blocks' linear layers, as the recipe says"
    if setting == "auto":
        return (torch.bfloat16 if native else torch.float32), evidence
    if setting == "float16":
        slow = "as the recipe says; no CPU multiplies float16 fast" if device_type == "cpu" else "as the recipe says"
        return torch.float16, slow
    if setting == "bfloat16" and not native:
        return torch.bfloat16, f"as the recipe says; slow here: {evidence}"
    return (torch.bfloat16 if setting == "bfloat16" else torch.float32), "as the recipe says"


MULTIPLE = 16
"""Both sides of a weight must be a multiple of it: the kernels work in tiles."""
LEAST_CAPABILITY = (8, 9)

_EMULATED = False
"""Whether products are rounded to 8 bits but taken in float32, which any device can; for tests."""


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
        if not any(is_sharded(parameter) for parameter in model.parameters()):  # else FSDP holds the layers
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


FIRST_SCALE = 2.0**16
GROWTH_STEPS = 2000


class LossScaler:
    """The scale, and how it changes.

    Attributes:
        scale: what the loss is multiplied by.
    """

    def __init__(self) -> None:
        self.scale = FIRST_SCALE
        self._n_good = 0

    @torch.no_grad()
    def unscale(self, parameters: Sequence[Tensor]) -> None:
        """Divide every gradient by the scale."""
        gradients = [getattr(p.grad, "_local_tensor", p.grad) for p in parameters if p.grad is not None]
        torch._foreach_mul_(gradients, 1.0 / self.scale)

    def judge(self, grad_norm: float) -> bool:
        """Whether the step counts, by the norm of all unscaled gradients; the scale changes accordingly."""
        if not math.isfinite(grad_norm):
            if self.scale == 1.0:
                return True  # it is not the scale: loss-spike handling is to judge
            self.scale, self._n_good = max(1.0, self.scale / 2), 0
            return False
        self._n_good += 1
        if self._n_good == GROWTH_STEPS:
            self.scale, self._n_good = self.scale * 2, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"scale": self.scale, "n_good": self._n_good}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            ArtifactError: it is something else.
        """
        try:
            self.scale, self._n_good = float(state["scale"]), int(state["n_good"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"the checkpoint's loss scale is damaged ({error!r}).") from error
