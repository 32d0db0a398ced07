"""Accelerators that are not here: their memory, and timings from peak, bandwidth and an assumed utilization.

`data/devices.toml` holds the figures. A step takes the longest of three: arithmetic at an assumed share of the peak;
starting its kernels, which decides for small models; and moving weights and gradients between devices. The update
moves weights, gradients and moments through memory once, and Muon's products come on top.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
from dataclasses import dataclass

from groundup.environment import device_table
from groundup.errors import GroundupError
from groundup.model import ModelConfig
from groundup.model.activations import Arithmetic
from groundup.model.cost import parameter_shapes, training_flops, weight_bytes
from groundup.recipe import OptimizerSettings
from groundup.training.optimizers import group_parameters
from groundup.training.planning.memory import DeviceMemory, Step
from groundup.training.planning.probe import Timings

KERNELS_PER_BLOCK = 140
"""That forward and backward pass of a block start, counted with torch's dispatcher; a third of them forward."""
KERNEL_SECONDS = 6e-6
"""To start one, assumed."""
DEVICES_A_MACHINE = 8
NETWORK = 5e10
"""Bytes/s of each device to those of other machines, one way, assumed: 400 Gbit/s."""
_MOST = 4096


@dataclass(frozen=True)
class Device:
    """One kind of accelerator; `data/devices.toml` says where the figures are from."""

    name: str  # as for --device
    bfloat16: float  # FLOP/s of dense products; 0: not native
    float16: float
    float32: float
    memory: float  # GiB
    bandwidth: float  # of the memory, bytes/s
    link: float  # to another device, bytes/s
    power: float  # watts at most
    price: float  # dollars an hour
    mfu: float  # assumed share of the peak

    @property
    def available(self) -> DeviceMemory:
        """Its memory."""
        return DeviceMemory(int(self.memory * 2**30), self.name, "cuda", self.bfloat16 > 0)

    def peak(self, dtype: Arithmetic) -> float:
        """FLOP/s of dense products; of float32's where it has no other."""
        rate: float = getattr(self, dtype)
        return rate or self.float32


@functools.cache
def devices() -> dict[str, Device]:
    """All of the table, by name."""
    return {name: Device(name=name, **values) for name, values in device_table().items()}


def find_device(text: str) -> tuple[Device, int]:
    """The device and the number of them that "h100x8" or "l4" means.

    Raises:
        GroundupError: no such device, or no such number of them.
    """
    name, count = text.strip().lower(), 1
    match = re.fullmatch(r"(.+)x(\d+)", name)
    if match and name not in devices():
        name, count = match[1], int(match[2])
    if name not in devices():
        near = difflib.get_close_matches(name, devices(), n=2, cutoff=0.4)
        meant = f" Did you mean {' or '.join(near)}?" if near else ""
        raise GroundupError(f"--device {text}: not in the table.{meant}", f"Known: {', '.join(devices())}.")
    if not 1 <= count <= _MOST:
        raise GroundupError(f"--device {text}: {count} devices.", f"Ask for 1 to {_MOST:,}.")
    return devices()[name], count


def table_timings(config: ModelConfig, settings: OptimizerSettings, step: Step, device: Device) -> Timings:
    """What the table says of a run on `step.n_devices` of a device."""
    rate = device.peak(step.dtype) * device.mfu
    n_micro = math.ceil(step.rows / step.micro)
    arithmetic = step.rows * training_flops(config, step.length) / rate
    kernels = n_micro * config.n_layers * KERNELS_PER_BLOCK * KERNEL_SECONDS
    weights, n = weight_bytes(config), step.n_devices
    link = device.link if n <= DEVICES_A_MACHINE else min(device.link, NETWORK)
    # For each micro-batch weights are gathered twice and gradients scattered once, float32.
    moving = n_micro * 3 * weights * (n - 1) / n / link
    passes = {"arithmetic": arithmetic, "starting kernels": kernels, "moving weights": moving}
    bound, seconds = max(passes.items(), key=lambda part: part[1])
    update = 7 * weights / n / device.bandwidth + _products_of_muon(config, settings) / rate
    forward = max(arithmetic, kernels) / 3 / step.rows / n
    token = max(config.n_layers * KERNELS_PER_BLOCK / 3 * KERNEL_SECONDS, weights / 2 / device.bandwidth)
    batch = step.rows * n
    flops = batch * training_flops(config, step.length) / seconds
    how = f"table: {device.mfu:.0%} of {device.peak(step.dtype) / 1e12:,.0f} TFLOP/s assumed, not measured"
    if bound != "arithmetic":
        how += f"; bound by {bound}"
    return Timings(
        row=seconds / batch, update=update, eval_row=forward, sample_token=token, save=0.0,
        begin=30.0, flops=flops, how=how, is_measured=False,
    )  # fmt: skip


def _products_of_muon(config: ModelConfig, settings: OptimizerSettings) -> float:
    """FLOPs of Newton-Schulz, five steps, which every device does for all matrices."""
    shapes = parameter_shapes(config)
    total = 0
    for group in group_parameters(shapes, settings).groups:
        for shape in (shapes[name] for name in group.names if group.optimizer == "muon"):
            small, large = min(shape[-2:]), max(shape[-2:])
            total += math.prod(shape[:-2]) * 5 * (4 * small * small * large + 2 * small**3)
    return float(total)
