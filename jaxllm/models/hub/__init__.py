"""Import and export of pretrained models."""

from jaxllm.models.hub.llama2c import load_llama2c

__all__ = ["load_llama2c"]
