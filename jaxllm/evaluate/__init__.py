"""Evaluation: perplexity, choice and generation tasks, cost, and the report."""

from jaxllm.evaluate.efficiency import Size, size
from jaxllm.evaluate.perplexity import Perplexity, perplexity

__all__ = ["Perplexity", "Size", "perplexity", "size"]
