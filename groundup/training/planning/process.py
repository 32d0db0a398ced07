"""What a training process takes on a CPU beside its tensors: the program itself, and the holes of its heap.

The program (interpreter, torch, our modules, threads, kernels' buffers) is measured once on a machine, in a process of
its own that trains the smallest model. Holes: buffers are kept for the next step (`memory.py`), and glibc before 2.38
cannot put an aligned buffer into the place of a freed one of the same size (its bug 14581), so that what a step
allocates in all, kept or not, leaves holes in proportion. The shares are measured (benchmarks/plan.py).
"""

from __future__ import annotations

import subprocess
import sys

import torch

from groundup.model import ModelConfig
from groundup.model.activations import activation_bytes
from groundup.recipe import OptimizerSettings
from groundup.training.measured import measured_once
from groundup.training.planning.memory import Step

PROCESS_BYTES = 400 << 20
"""The program, where it is not measured."""

# Of the activations of a step without checkpointing: (float32, two-byte arithmetic).
_HOLES = {"none": (0.15, 0.27), "selective": (0.31, 0.32), "full": (0.43, 0.34)}

_SMALLEST_RUN = """
import sys, torch
torch.set_num_threads(int(sys.argv[1]))
import groundup.report, groundup.road
from groundup.model import Transformer, preset
from groundup.recipe import OptimizerSettings
from groundup.training.optimizers import Optimizers, clip_gradients
from groundup.training.objective import head_loss
from groundup.training.summary import peak_memory_bytes
model = Transformer(preset("ground-nano"))
optimizers = Optimizers(model, OptimizerSettings(), torch.float32)
for dtype in (torch.float32, getattr(torch, sys.argv[2])):
    model.compute_dtype = dtype
    ids = torch.zeros((2, 32), dtype=torch.int64)
    model(ids, head=head_loss(ids)).objective.backward()
    clip_gradients(optimizers.parameters(), 1.0, lambda values: values)
    optimizers.step(1.0)
print(peak_memory_bytes())
"""


def heap_bytes(config: ModelConfig, settings: OptimizerSettings, step: Step) -> int:
    """Bytes of holes in the heap of a process that trains on a CPU."""
    allocated = sum(activation_bytes(config, step.micro, step.length, step.dtype).values())
    return round(_HOLES[settings.activation_checkpointing][step.dtype != "float32"] * allocated)


def process_bytes(dtype: str, *, measure: bool = True) -> int:
    """Resident bytes of the program itself.

    Args:
        dtype: of the arithmetic, whose kernels are loaded.
        measure: in a process of its own, unless that was done here before; else a usual value.
    """
    if not measure:
        return PROCESS_BYTES
    key = {"dtype": dtype, "run": _SMALLEST_RUN}
    return int(measured_once("process", key, torch.device("cpu"), lambda: {"bytes": _measure(dtype)})["bytes"])


def _measure(dtype: str) -> int:
    command = [sys.executable, "-c", _SMALLEST_RUN, str(torch.get_num_threads()), dtype]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return int(done.stdout.split()[-1])
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return PROCESS_BYTES
