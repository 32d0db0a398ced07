"""Models to scores with error bars, and the tasks to score them by. Knows nothing of training."""

from groundup.evaluation.metrics import Estimate, bits_per_byte
from groundup.evaluation.scorecard import Scores, score_model
from groundup.evaluation.table import compare, evaluation_checks, read_comparison, write_comparison
from groundup.evaluation.tasks import Task, generate_tasks, verify

__all__ = [
    "Estimate",
    "Scores",
    "Task",
    "bits_per_byte",
    "compare",
    "evaluation_checks",
    "generate_tasks",
    "read_comparison",
    "score_model",
    "verify",
    "write_comparison",
]
