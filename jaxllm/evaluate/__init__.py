"""Evaluation: perplexity, choice and generation tasks, cost, and the report."""

from jaxllm.evaluate.choice import Question, choose, load_questions, loglikelihoods
from jaxllm.evaluate.efficiency import (
    Size,
    Speed,
    cache_bytes_per_token,
    disk_bytes,
    size,
    speed,
    speed_up,
)
from jaxllm.evaluate.perplexity import Perplexity, perplexity
from jaxllm.evaluate.score import Score
from jaxllm.evaluate.tasks import Problem, exact_match, load_problems

__all__ = [
    "Perplexity",
    "Problem",
    "Question",
    "Score",
    "Size",
    "Speed",
    "cache_bytes_per_token",
    "choose",
    "disk_bytes",
    "exact_match",
    "load_problems",
    "load_questions",
    "loglikelihoods",
    "perplexity",
    "size",
    "speed",
    "speed_up",
]
