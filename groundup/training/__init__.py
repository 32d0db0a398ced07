"""Model and batches to a trained model: objective, optimizers, schedule, precision, loop, checkpoints."""

from groundup.training.batches import ShardBatches
from groundup.training.job import Source, TrainingJob
from groundup.training.loop import forget_checkpoints, train
from groundup.training.objective import (
    IGNORED,
    Batch,
    NextToken,
    Objective,
    Term,
    cross_entropy_sum,
    head_loss,
    pass_flops,
)
from groundup.training.precision import choose_precision
from groundup.training.pretrain import TrainedModel, pretrain
from groundup.training.process import peak_memory_bytes

__all__ = [
    "IGNORED",
    "Batch",
    "NextToken",
    "Objective",
    "ShardBatches",
    "Source",
    "Term",
    "TrainedModel",
    "TrainingJob",
    "choose_precision",
    "cross_entropy_sum",
    "forget_checkpoints",
    "head_loss",
    "pass_flops",
    "peak_memory_bytes",
    "pretrain",
    "train",
]
