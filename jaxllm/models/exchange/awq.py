"""The AWQ checkpoint (GEMM): ``qweight``, ``qzeros``, ``scales`` per linear map.

Four bits along the outputs, eight codes to a word in the order 0 2 4 6 1 3 5 7 that
the original kernel unpacks in pairs; zero points alike; scales are float16. As
AutoAWQ writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxllm.models.exchange.affine import Affine, Scheme, Stored, exact
from jaxllm.models.exchange.packing import (
    Field,
    Packing,
    Settings,
    check_settings,
    setting,
    uniform,
)
from jaxllm.models.exchange.words import from_words, to_words
from jaxllm.models.hub.safetensors import Tensor

BITS, PER_WORD = 4, 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs each place of a word holds


class AWQ(Packing):
    """``quant_method`` awq, version gemm, always with zero points."""

    name = "awq"
    key = "qweight"
    accepts = (
        "integers of 4 bits with one group size that divides the inputs and float16 "
        "scales, outputs in multiples of 8, in every linear map but the head"
    )

    head = False

    def refusal(self, scheme: Scheme) -> str | None:
        if scheme.inputs is not None:
            return "rounds its inputs"
        if scheme.bits != BITS:
            return f"has codes of {scheme.bits} bits"
        if scheme.ordered:
            return "has its inputs in another order"
        if scheme.features % (scheme.block or 1) or scheme.outputs % PER_WORD:
            return f"is {scheme.features} x {scheme.outputs} in groups {scheme.block}"
        return None

    def doubts(self, stored: Stored) -> str | None:
        if not exact(stored.scale, np.float16):
            return "has scales outside float16"
        return None

    def fields(self, scheme: Scheme, settings: Settings) -> Mapping[str, Field]:
        s, words = scheme, scheme.outputs // PER_WORD
        codes = lambda stored: _interleaved(stored.codes)  # noqa: E731
        zeros = lambda stored: _interleaved(stored.zero)  # noqa: E731
        scales = lambda stored: stored.scale.astype(np.float16)  # noqa: E731
        return {
            "qweight": Field(np.int32, (s.features, words), codes),
            "qzeros": Field(np.int32, (s.groups, words), zeros),
            "scales": Field(np.float16, (s.groups, s.outputs), scales),
        }

    def settings(
        self, modules: Mapping[str, Stored], dense: tuple[str, ...]
    ) -> dict[str, Any]:
        shared = uniform(modules, self.name)
        return dict(
            quant_method=self.name,
            bits=BITS,
            group_size=shared.block or -1,
            zero_point=True,
            version="gemm",
            modules_to_not_convert=list(dense) or None,
        )

    def reader(self, settings: Settings) -> Callable[[str, int, int], Scheme]:
        accepted = dict(bits=(BITS,), version=("gemm", "GEMM"), zero_point=(True,))
        check_settings(settings, accepted)
        size = setting(settings, "group_size")
        block = None if size == -1 else size
        return lambda name, *shape: Scheme(BITS, False, block, *shape)

    def read(
        self, scheme: Scheme, tensors: Mapping[str, Tensor], settings: Settings
    ) -> Affine:
        codes, zero = (
            _separate(tensors[name].read_codes(), scheme.outputs)
            for name in ("qweight", "qzeros")
        )
        return Affine(scheme, codes, tensors["scales"].read(), zero)


def _interleaved(codes: np.ndarray) -> np.ndarray:
    """Words of codes [rows, out] in AWQ's order."""
    eights = codes.reshape(len(codes), -1, PER_WORD)[..., ORDER]
    return to_words(eights.reshape(codes.shape), BITS)


def _separate(words: np.ndarray, outputs: int) -> np.ndarray:
    """Codes [rows, out] of words in AWQ's order (inverse of ``_interleaved``)."""
    eights = from_words(words, BITS, outputs).reshape(len(words), -1, PER_WORD)
    return eights[..., np.argsort(ORDER)].reshape(len(words), outputs)
