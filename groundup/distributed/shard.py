"""Sharding a model over the world with FSDP2, and moving tensors between shards and wholes.

Order: every block, then the root (embeddings, final norm, output layer). Parameters, gradients and optimizer
state are split over the processes; each block is gathered when it computes (arXiv:2304.11277).
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from groundup.distributed.world import World
from groundup.model.initialization import is_sharded
from groundup.model.transformer import Block

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def shard_module(module: nn.Module, world: World) -> None:
    """Shard a module (a model, or a head of one) in place over the world's mesh; a world of one leaves it as it is."""
    module.to(world.device)
    if world.mesh is not None:
        from torch.distributed.fsdp import fully_shard

        for block in [part for part in module.modules() if isinstance(part, Block)]:
            fully_shard(block, mesh=world.mesh)
        fully_shard(module, mesh=world.mesh)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor (all processes must call it); a plain tensor is returned as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def like_parameter(whole: Tensor, parameter: Tensor) -> Tensor:
    """`whole`, which every process holds, sharded as `parameter` is."""
    if not is_sharded(parameter):
        return whole.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        whole.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def empty_copy(module: AnyModule) -> AnyModule:
    """A copy of a module that is not sharded yet, whose parameters and buffers have shapes only (on "meta")."""
    shapes: dict[int, Tensor] = {id(buffer): buffer.to("meta") for buffer in module.buffers()}
    shapes |= {id(one): nn.Parameter(one.detach().to("meta"), one.requires_grad) for one in module.parameters()}
    return copy.deepcopy(module, shapes)


@torch.no_grad()
def fill_copy(module: nn.Module, whole: nn.Module | None) -> None:
    """Copy a module's parameters and buffers into a whole one, if there is one here; every process must call it."""
    own = {} if whole is None else {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        value = full_tensor(tensor)
        if name in own:
            own[name].copy_(value)
