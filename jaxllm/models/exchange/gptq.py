"""The GPTQ checkpoint: ``qweight``, ``qzeros``, ``scales``, ``g_idx`` per linear map.

Codes are a stream of bits along the inputs, zero points one along the outputs, each
stored less one modulo 2^b (``checkpoint_format`` ``gptq``) or as it is (``gptq_v2``);
scales are float16; ``g_idx`` has the group of each input. As AutoGPTQ and GPTQModel
write it.
"""

from __future__ import annotations

import re
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

BITS = (2, 3, 4, 8)
ALIGNED = 32  # inputs and outputs, for whole words at any number of bits
HEADS = ("lm_head", "embed_out")


class GPTQ(Packing):
    """``quant_method`` gptq: version 1 when all is symmetric, else version 2.

    A zero point of 0, stored less one, would run into its neighbours in version 1.
    """

    name = "gptq"
    key = "qweight"
    accepts = (
        "integers of 2, 3, 4 or 8 bits with one group size and float16 scales, inputs "
        "and outputs in multiples of 32"
    )
    layouts = ("linear", "heads", "conv")

    def refusal(self, scheme: Scheme) -> str | None:
        if scheme.inputs is not None:
            return "rounds its inputs"
        if scheme.bits not in BITS:
            return f"has codes of {scheme.bits} bits"
        if scheme.features % ALIGNED or scheme.outputs % ALIGNED:
            return f"is {scheme.features} x {scheme.outputs}"
        return None

    def doubts(self, stored: Stored) -> str | None:
        if not exact(stored.scale, np.float16):
            return "has scales outside float16"
        return None

    def fields(self, scheme: Scheme, settings: Settings) -> Mapping[str, Field]:
        s, less = scheme, np.uint8(_less(settings))
        words = lambda count: count * s.bits // 32  # noqa: E731

        def zeros(stored: Stored) -> np.ndarray:
            return to_words((stored.zero - less) & np.uint8(2**s.bits - 1), s.bits)

        def codes(stored: Stored) -> np.ndarray:
            return to_words(_own_order(stored.codes, stored.order), s.bits, 0)

        def groups(stored: Stored) -> np.ndarray:
            return _own_order(_groups(s), stored.order)

        scales = lambda stored: stored.scale.astype(np.float16)  # noqa: E731
        return {
            "qweight": Field(np.int32, (words(s.features), s.outputs), codes),
            "qzeros": Field(np.int32, (s.groups, words(s.outputs)), zeros),
            "scales": Field(np.float16, (s.groups, s.outputs), scales),
            "g_idx": Field(np.int32, (s.features,), groups),
        }

    def settings(
        self, modules: Mapping[str, Stored], dense: tuple[str, ...]
    ) -> dict[str, Any]:
        shared = uniform(modules, self.name)
        schemes = [stored.scheme for stored in modules.values()]
        symmetric = all(s.symmetric for s in schemes)
        out = dict(
            quant_method=self.name,
            bits=shared.bits,
            group_size=shared.block or -1,
            desc_act=any(s.ordered for s in schemes),
            sym=symmetric,
            lm_head=any(name.endswith(HEADS) for name in modules),
            checkpoint_format="gptq" if symmetric else "gptq_v2",
            pack_dtype="int32",
        )
        left = [name for name in dense if not name.endswith(HEADS)]
        if left:
            out["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in left}
        return out

    def reader(self, settings: Settings) -> Callable[[str, int, int], Scheme]:
        accepted = dict(
            checkpoint_format=("gptq", "gptq_v2"),
            pack_dtype=("int32",),
            bits=BITS,
            is_marlin_format=(False,),
        )
        check_settings(settings, accepted)
        bits, size = setting(settings, "bits"), setting(settings, "group_size")
        for pattern, changes in (settings.get("dynamic") or {}).items():
            if not pattern.startswith("-:") and changes:
                raise ValueError(
                    f"quantization_config: dynamic {pattern!r} changes {changes!r}; "
                    "accepted: patterns of layers that are left out, '-:...'"
                )
        block = None if size == -1 else size
        symmetric = bool(settings.get("sym"))
        return lambda name, *shape: Scheme(bits, symmetric, block, *shape)

    def read(
        self, scheme: Scheme, tensors: Mapping[str, Tensor], settings: Settings
    ) -> Affine:
        s, mask = scheme, np.uint8(2**scheme.bits - 1)
        codes = from_words(tensors["qweight"].read_codes(), s.bits, s.features, 0)
        zero = from_words(tensors["qzeros"].read_codes(), s.bits, s.outputs)
        zero = (zero + np.uint8(_less(settings))) & mask
        groups = np.array(tensors["g_idx"].read_codes())
        order = None
        if not np.array_equal(groups, _groups(s)):
            order = np.argsort(groups, kind="stable")
            codes = codes[order]
            if not np.array_equal(groups[order], _groups(s)):
                raise ValueError(f"g_idx is not {s.groups} groups of {s.block} inputs")
        return Affine(s, codes, tensors["scales"].read(), zero, order)


def _less(settings: Settings) -> int:
    """By how much stored zero points are less than the real ones."""
    return int(settings.get("checkpoint_format", "gptq") == "gptq")


def _groups(s: Scheme) -> np.ndarray:
    """The group of each input, when the inputs of a group are neighbours."""
    return np.arange(s.features, dtype=np.int32) // (s.block or s.features)


def _own_order(rows: np.ndarray, order: np.ndarray | None) -> np.ndarray:
    """Rows that are listed in ``order`` back in the order of the inputs."""
    return rows if order is None else rows[np.argsort(order)]
