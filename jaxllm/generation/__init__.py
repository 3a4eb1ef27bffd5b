"""Generation: sampling and the compiled loop."""

from jaxllm.generate.loop import Generation, generate
from jaxllm.generate.sampling import Sampler

__all__ = ["Generation", "Sampler", "generate"]
