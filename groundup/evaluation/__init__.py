"""Models to scores with error bars, and the tasks to score them by. Knows nothing of training."""

from groundup.evaluation.harness import Scores, check_tasks, score_model
from groundup.evaluation.metrics import Answer, Estimate, bits_per_byte, exact_match
from groundup.evaluation.table import compare
from groundup.evaluation.tasks import Task, generate_tasks, reward, verify

VERSION = 1
"""Raised when the code's results change; part of the stage's fingerprint."""

__all__ = [
    "VERSION",
    "Answer",
    "Estimate",
    "Scores",
    "Task",
    "bits_per_byte",
    "check_tasks",
    "compare",
    "exact_match",
    "generate_tasks",
    "reward",
    "score_model",
    "verify",
]
