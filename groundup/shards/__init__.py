"""Documents and a tokenizer to binary token shards, and shards to batches in a shuffled, resumable order."""

from groundup.shards.export_ids import export_shards
from groundup.shards.import_ids import import_ids
from groundup.shards.load import Batch, WindowLoader, validation_windows
from groundup.shards.mixture import MixtureLoader
from groundup.shards.order import Permutation
from groundup.shards.packing import PackedBatch, PackedLoader
from groundup.shards.read import TokenShards
from groundup.shards.stats import shard_stats
from groundup.shards.verify import verify_shards
from groundup.shards.write import SMALL_BYTES, write_shards, write_shards_from_file

__all__ = [
    "SMALL_BYTES",
    "Batch",
    "MixtureLoader",
    "PackedBatch",
    "PackedLoader",
    "Permutation",
    "TokenShards",
    "WindowLoader",
    "export_shards",
    "import_ids",
    "shard_stats",
    "validation_windows",
    "verify_shards",
    "write_shards",
    "write_shards_from_file",
]
