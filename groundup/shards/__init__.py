"""Documents and a tokenizer to binary token shards, and shards to batches in a shuffled, resumable order."""

from groundup.shards.load import Batch, WindowLoader, validation_windows
from groundup.shards.order import Permutation
from groundup.shards.read import TokenShards
from groundup.shards.write import write_shards

VERSION = 1
"""Raised when the code's results change; part of the stage's fingerprint."""

__all__ = ["VERSION", "Batch", "Permutation", "TokenShards", "WindowLoader", "validation_windows", "write_shards"]
