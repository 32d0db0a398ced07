"""The same model on many devices: the world of processes, and sharding over it."""

from groundup.distributed.shard import full_tensor, like_parameter, shard_module
from groundup.distributed.world import AXES, World, current_world, end_process

__all__ = ["AXES", "World", "current_world", "end_process", "full_tensor", "like_parameter", "shard_module"]
