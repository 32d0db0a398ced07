"""Model and batches to a trained model: objective, optimizers, schedule, precision, loop, checkpoints."""

from groundup.training.batches import ShardBatches, batched_rows, pad_rows
from groundup.training.job import OnPolicySource, Source, TrainingJob
from groundup.training.loop import forget_checkpoints, train
from groundup.training.objective import (
    IGNORED,
    Batch,
    Loss,
    NextToken,
    Objective,
    Term,
    cross_entropy_sum,
    head_loss,
    pass_flops,
)
from groundup.training.optimizers import check_optimizer, describe_groups, group_parameters
from groundup.training.planning.memory import Workload, device_memory
from groundup.training.precision import check_precision, choose_precision, native_bfloat16
from groundup.training.pretrain import TrainedModel, pretrain
from groundup.training.process import peak_memory_bytes
from groundup.training.schedule import count_tokens, sequence_length

__all__ = [
    "IGNORED",
    "Batch",
    "Loss",
    "NextToken",
    "Objective",
    "OnPolicySource",
    "ShardBatches",
    "Source",
    "Term",
    "TrainedModel",
    "TrainingJob",
    "Workload",
    "batched_rows",
    "check_optimizer",
    "check_precision",
    "choose_precision",
    "count_tokens",
    "cross_entropy_sum",
    "describe_groups",
    "device_memory",
    "forget_checkpoints",
    "group_parameters",
    "head_loss",
    "native_bfloat16",
    "pad_rows",
    "pass_flops",
    "peak_memory_bytes",
    "pretrain",
    "sequence_length",
    "train",
]
