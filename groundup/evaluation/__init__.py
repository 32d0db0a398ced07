"""Models to scores with error bars, and the tasks to score them by. Knows nothing of training."""

from groundup.evaluation.harness import Scores, check_tasks, score_model
from groundup.evaluation.metrics import Answer, Estimate, bits_per_byte, exact_match
from groundup.evaluation.table import compare, evaluation_checks, read_comparison, write_comparison
from groundup.evaluation.tasks import Task, generate_tasks, reward, verify

__all__ = [
    "Answer",
    "Estimate",
    "Scores",
    "Task",
    "bits_per_byte",
    "check_tasks",
    "compare",
    "evaluation_checks",
    "exact_match",
    "generate_tasks",
    "read_comparison",
    "reward",
    "score_model",
    "verify",
    "write_comparison",
]
