"""The same model on many devices: the world of processes, and sharding over it."""

from groundup.distributed.shard import empty_copy, fill_copy, full_tensor, like_parameter, shard_module
from groundup.distributed.world import AXES, World, current_world, end_process

__all__ = [
    "AXES",
    "World",
    "current_world",
    "empty_copy",
    "end_process",
    "fill_copy",
    "full_tensor",
    "like_parameter",
    "shard_module",
]
