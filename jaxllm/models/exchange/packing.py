"""What a packed format of Hugging Face folders is: one class, three members."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxllm.models.exchange.affine import Affine, Scheme, Stored
from jaxllm.models.hub.safetensors import Tensor

Settings = Mapping[str, Any]  # what stands under ``quantization_config``


@dataclasses.dataclass(frozen=True)
class Field:
    """One tensor of a packed module: its type, its shape, and how it is made."""

    dtype: Any
    shape: tuple[int, ...]
    make: Callable[[Stored], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


class Packing(abc.ABC):
    """How linear maps of integer codes lie in safetensors, and what config.json says.

    Members are stateless. ``key`` is the tensor that only a packed module has.
    """

    name: str
    key: str
    accepts: str
    layouts: tuple[str, ...] = ("linear", "heads")  # of the plan's entries
    head: bool = True  # whether it may be packed

    @abc.abstractmethod
    def refusal(self, scheme: Scheme) -> str | None:
        """Why a scheme cannot be written; None if it can."""

    @abc.abstractmethod
    def doubts(self, stored: Stored) -> str | None:
        """Why these scales and zero points cannot be written; None if they can."""

    @abc.abstractmethod
    def fields(self, scheme: Scheme, settings: Settings) -> Mapping[str, Field]:
        """The tensors of a module, by the name behind the module's."""

    @abc.abstractmethod
    def settings(
        self, modules: Mapping[str, Stored], dense: tuple[str, ...]
    ) -> dict[str, Any]:
        """The ``quantization_config``, of packed modules, and linears left dense.

        Raises ``ValueError`` when one configuration cannot describe all modules.
        """

    @abc.abstractmethod
    def reader(self, settings: Settings) -> Callable[[str, int, int], Scheme]:
        """``(module name, features, outputs) -> Scheme`` of a file's settings.

        Raises ``ValueError`` naming a setting that is not supported.
        """

    @abc.abstractmethod
    def read(
        self, scheme: Scheme, tensors: Mapping[str, Tensor], settings: Settings
    ) -> Affine:
        """The numbers of one module, whose tensors have the shapes of ``fields``.

        Raises ``ValueError`` with the reason where they mean no such numbers.
        """


def uniform(modules: Mapping[str, Stored], packing: str) -> Scheme:
    """The scheme whose bits and group size all modules have.

    Raises ``ValueError`` naming two modules that differ.
    """
    first, *others = modules
    scheme = modules[first].scheme
    for name in others:
        other = modules[name].scheme
        if (other.bits, other.block) != (scheme.bits, scheme.block):
            raise ValueError(
                f"{name} is {other} and {first} is {scheme}: {packing} has one number "
                "of bits and one group size for all layers"
            )
    return scheme


def check_settings(settings: Settings, accepted: Mapping[str, tuple]) -> None:
    """Refuse a setting that changes the layout: ``accepted`` has the values we read."""
    for key, values in accepted.items():
        if key in settings and settings[key] not in values:
            some = " or ".join(map(repr, values))
            raise ValueError(
                f"quantization_config: {key!r} = {settings[key]!r}; accepted: {some}"
            )


def setting(settings: Settings, key: str):
    """A setting that must be there."""
    if key not in settings:
        raise ValueError(f"quantization_config lacks {key!r}")
    return settings[key]
