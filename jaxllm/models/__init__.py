"""Flax definitions of the language models; families differ by configuration only."""

from jaxllm.models.config import MLP, Attention, Layer, MoE, Norm, Policy, Rope
from jaxllm.models.hub import load_llama2c
from jaxllm.models.transformer import Transformer, init

__all__ = [
    "MLP",
    "Attention",
    "Layer",
    "MoE",
    "Norm",
    "Policy",
    "Rope",
    "Transformer",
    "init",
    "load_llama2c",
]
