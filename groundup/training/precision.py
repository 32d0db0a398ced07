"""Which arithmetic the machine does natively, and the choice that follows, with its reason.

bfloat16 needs hardware: AVX512-BF16 or AMX on x86, BF16 on Arm, compute capability 8.0 on NVIDIA. Without it
bfloat16 is slower than float32 on a CPU; float16 has no fast path on any CPU and is never chosen there. float8 is
bfloat16 with the blocks' products in 8 bits (`fp8.py`), where the recipe asks for it.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch

from groundup.recipe import PrecisionName
from groundup.training.fp8 import check_float8


@functools.cache
def native_bfloat16(device_type: str = "cpu") -> tuple[bool, str]:
    """Whether the device multiplies bfloat16 natively, and what says so."""
    if device_type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return major >= 8, f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"
    if device_type == "mps":
        return False, "MPS: float32 is the safe choice"
    flags = _cpu_flags()
    for flag, name in (("amx_bf16", "AMX-BF16"), ("avx512_bf16", "AVX512-BF16"), ("bf16", "Arm BF16")):
        if flag in flags:
            return True, name
    return False, "this CPU has neither AVX512-BF16, AMX nor Arm BF16"


def check_precision(setting: PrecisionName, device_type: str, stage: str = "pretrain") -> None:
    """Hold that this machine can do the arithmetic that a recipe asks for; nothing is allocated.

    Raises:
        GroundupError: it cannot.
    """
    if setting == "float8":
        check_float8(device_type, stage)


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


def _cpu_flags() -> frozenset[str]:
    """The CPU's feature flags as Linux names them; empty elsewhere."""
    if not sys.platform.startswith("linux"):
        return frozenset()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
