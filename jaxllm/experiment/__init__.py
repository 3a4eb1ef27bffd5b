"""Experiments: a YAML file in, a measured report and a checkpoint out."""

from jaxllm.experiment.runner import run
from jaxllm.experiment.schema import Experiment, load

__all__ = ["Experiment", "load", "run"]
