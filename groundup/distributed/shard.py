"""Sharding a model over the world with FSDP2, and moving tensors between shards and wholes.

Order: every block, then the root (embeddings, final norm, output layer). Parameters, gradients and optimizer
state are split over the processes; each block is gathered when it computes (arXiv:2304.11277).
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from groundup.distributed.world import World
from groundup.model import Transformer


def shard_model(model: Transformer, world: World) -> Transformer:
    """Shard the model in place over the world's mesh; in a world of one it stays as it is."""
    model.to(world.device)
    if world.mesh is not None:
        for block in model.layers:
            fully_shard(block, mesh=world.mesh)
        fully_shard(model, mesh=world.mesh)
    return model


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor (all processes must call it); a plain tensor is returned as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like_parameter(whole: Tensor, parameter: Tensor) -> Tensor:
    """`whole`, which every process holds, sharded as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return whole.to(parameter.device)
    return distribute_tensor(
        whole.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
