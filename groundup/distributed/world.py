"""The world: this process's rank, the number of processes, the device, and how they communicate.

Started by `torchrun`, a process finds its rank and the world's size in the environment and joins the group
(gloo on CPU, NCCL on GPUs). Started alone, the world has one member and no group: the degenerate case of the
same code, in which every reduction returns its argument.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from groundup.errors import GroundupError

AXES = ("replicate", "shard", "tensor", "pipeline", "context")
"""The `[parallel]` axes over which a run can be spread."""


@dataclass(frozen=True)
class World:
    """One process's place among all.

    Attributes:
        rank: this process's number, 0 … size−1.
        size: number of processes.
        device: where this process computes.
        mesh: the mesh over which data and parameters are sharded; None in a world of one.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    @property
    def axes(self) -> frozenset[str]:
        """The `[parallel]` axes that these processes use."""
        return frozenset({"shard"} if self.size > 1 else ())

    def sum(self, values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The elementwise sum of a small tensor over all processes."""
        if self.size > 1:
            values = values.to(self.device)
            dist.all_reduce(values, op=dist.ReduceOp.SUM)
        return values

    def gather(self, share: Tensor) -> Tensor:
        """The shares of all processes, which are equally large, one behind the other; on the CPU. All must call it."""
        if self.size == 1:
            return share.cpu()
        share = share.to(self.device).contiguous()
        parts = [torch.empty_like(share) for _ in range(self.size)]
        dist.all_gather(parts, share)
        return torch.cat(parts).cpu()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all must call it."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor([float(flag)]))[0] > 0)

    def first_says(self, say: Callable[[], str]) -> str:
        """The text that `say` gives in the first process, which alone calls it; the others wait, for up to a day.

        All must call it. `say` may take long, but must not raise: the others would wait in vain.
        """
        if self.size == 1:
            return say()
        group = _patient_group()
        text = torch.tensor(list(say().encode()) if self.is_first else [], dtype=torch.uint8)
        n_bytes = torch.tensor([len(text)])
        dist.broadcast(n_bytes, 0, group=group)
        text = text if self.is_first else text.new_empty(int(n_bytes))
        dist.broadcast(text, 0, group=group)
        return bytes(text.tolist()).decode()

    def wait(self) -> None:
        """Return when every process has called it (a barrier)."""
        if self.size > 1:
            dist.barrier()

    def rows(self, batch_size: int) -> slice:
        """This process's share of a batch's rows.

        Raises:
            GroundupError: the batch does not divide among the processes.
        """
        if batch_size % self.size:
            fitting = -(-batch_size // self.size) * self.size
            raise GroundupError(
                f"batch_size = {batch_size} does not divide among {self.size} processes.",
                f"Choose a multiple of {self.size}: --set pretrain.batch_size={fitting}",
            )
        share = batch_size // self.size
        return slice(self.rank * share, (self.rank + 1) * share)


@functools.cache
def _patient_group() -> dist.ProcessGroup:
    """All processes once more, on the CPU, to wait in for longer than a hanging device may take."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=1))


@functools.cache
def current_world() -> World:
    """Join the group that `torchrun` announces, or be a world of one."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if size == 1:
        return World(rank=0, size=1, device=device, mesh=None)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
    mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("dp_shard",))
    return World(rank=dist.get_rank(), size=size, device=device, mesh=mesh)


def end_process(status: int) -> None:
    """End a process of a group here, with this exit status; a process without a group goes on.

    gloo's threads may still hold tensors when Python shuts down, and then abort the process (pytorch issue 190489).
    """
    if dist.is_available() and dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
