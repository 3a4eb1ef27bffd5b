"""Generation: sampling and the compiled loop."""

from jaxllm.generation.loop import Generation, generate
from jaxllm.generation.sampling import Sampler

__all__ = ["Generation", "Sampler", "generate"]
