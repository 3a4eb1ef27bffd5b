"""Number formats of weights and activations."""

from jaxllm.core.formats.activation import ActivationFormat, Encoded, Log2
from jaxllm.core.formats.base import TINY, Choice, Format, Integer, Levels
from jaxllm.core.formats.mixed import MixedActivation
from jaxllm.core.formats.tables import (
    balanced,
    bipolar,
    extended_float,
    float_format,
    normal_float,
    parse_format,
    power_levels,
    powers,
    searched_float,
    shifts,
    ternary,
)

__all__ = [
    "TINY",
    "ActivationFormat",
    "Choice",
    "Encoded",
    "Format",
    "Integer",
    "Levels",
    "Log2",
    "MixedActivation",
    "balanced",
    "bipolar",
    "extended_float",
    "float_format",
    "normal_float",
    "parse_format",
    "power_levels",
    "powers",
    "searched_float",
    "shifts",
    "ternary",
]
