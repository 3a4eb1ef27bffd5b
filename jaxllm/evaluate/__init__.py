"""Evaluation: perplexity, choice and generation tasks, cost, and the report."""

from jaxllm.evaluate.choice import Question, choose, load_questions, loglikelihoods
from jaxllm.evaluate.compare import Comparison, compare
from jaxllm.evaluate.efficiency import (
    Size,
    Speed,
    cache_bytes_per_token,
    disk_bytes,
    size,
    speed,
    speed_up,
)
from jaxllm.evaluate.harness import harness_model
from jaxllm.evaluate.perplexity import Perplexity, perplexity
from jaxllm.evaluate.report import Report, report
from jaxllm.evaluate.score import Score
from jaxllm.evaluate.tasks import Problem, exact_match, load_problems

__all__ = [
    "Comparison",
    "Perplexity",
    "Problem",
    "Question",
    "Report",
    "Score",
    "Size",
    "Speed",
    "cache_bytes_per_token",
    "choose",
    "compare",
    "disk_bytes",
    "exact_match",
    "harness_model",
    "load_problems",
    "load_questions",
    "loglikelihoods",
    "perplexity",
    "report",
    "size",
    "speed",
    "speed_up",
]
