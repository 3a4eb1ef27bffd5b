"""Rotary embeddings in ``config.json``: every spelling in, the oldest one out.

In: ``rope_parameters`` (one, or one per layer type) or ``rope_scaling`` with
``rope_theta`` beside it. Out: ``rope_theta`` and ``rope_scaling``, which old and new
versions of transformers read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxllm.models.config import Rope, RopeScaling
from jaxllm.models.hub.families import RopeKeys

# Accepted keys of each kind, and our field.
YARN = {
    "factor": "factor",
    "original_max_position_embeddings": "original_length",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
}
KINDS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": YARN,
    "longrope": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "attention_factor": "attention_factor",
        "short_factor": "short",
        "long_factor": "long",
    },
}
DERIVED = {"mscale", "mscale_all_dim", "truncate"}  # of yarn, beyond its fields
LAYER_TYPES = ("full_attention", "sliding_attention")


def read_rope(
    raw: dict[str, Any], keys: RopeKeys, max_length: int
) -> tuple[Rope, Rope | None]:
    """(rotary embedding, that of windowed layers or None); takes its keys from ``raw``.

    Raises ``ValueError`` for a kind, a key or a fraction that is not supported.
    """
    theta = float(_take(raw, keys.theta, keys.default_theta))
    local_theta = _take(raw, keys.local_theta, keys.default_local_theta)
    fraction = float(_take(raw, keys.fraction, keys.default_fraction))
    original = raw.pop("original_max_position_embeddings", None)
    old, new = raw.pop("rope_scaling", None), raw.pop("rope_parameters", None)
    given = dict(new or old or {})
    for kind, value in given.items():
        if isinstance(value, Mapping) and kind not in LAYER_TYPES:
            some = " or ".join(map(repr, LAYER_TYPES))
            raise ValueError(f"rope_parameters has {kind!r}; accepted: {some}")

    def read(part: Mapping, base: float) -> Rope:
        rope = _read(part, base, fraction, original, max_length)
        if rope.fraction != 1.0 and not keys.partial:
            raise ValueError(
                f"config key {keys.fraction!r} = {rope.fraction}; accepted: 1.0, since "
                "this family turns whole heads"
            )
        return rope

    if any(kind in given for kind in LAYER_TYPES):
        full = read(given.get("full_attention") or {}, theta)
        local = given.get("sliding_attention")
        return full, None if local is None else read(local, float(local_theta))
    if keys.local_theta is None:
        return read(given, theta), None
    return read(given, theta), read({}, float(local_theta))


def _take(raw: dict, name: str | None, default):
    value = raw.pop(name, None) if name else None
    return default if value is None else value


def _read(given: Mapping, theta, fraction, original, max_length: int) -> Rope:
    given = {k: v for k, v in given.items() if v is not None}
    kind = given.pop("rope_type", given.get("type", "default"))
    given.pop("type", None)
    kind = "longrope" if kind == "su" else kind
    theta = float(given.pop("rope_theta", theta))
    fraction = float(given.pop("partial_rotary_factor", fraction))
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise ValueError(f"rope type {kind!r} is not supported; accepted: {known}")
    if kind == "default":
        _refuse_others(given, kind, {})
        return Rope(theta, fraction)
    if "original_length" in KINDS[kind].values():
        longest = given.get("original_max_position_embeddings", max_length)
        given["original_max_position_embeddings"] = original or longest
    scaling = _scaling(kind, given, max_length)
    return Rope(theta, fraction, scaling=scaling)


def _scaling(kind: str, given: dict, max_length: int) -> RopeScaling:
    names = KINDS[kind]
    _refuse_others(given, kind, names.keys() | (DERIVED if kind == "yarn" else set()))
    if given.get("truncate", True) is not True:
        raise ValueError(f"yarn's truncate {given['truncate']!r}; accepted: True")
    if kind in ("yarn", "longrope"):
        given["attention_factor"] = _attention_factor(kind, given, max_length)
    if kind == "longrope":
        given.pop("factor", None)
    missing = set(names) - set(given) - {"factor", "beta_fast", "beta_slow"}
    if missing or (kind != "longrope" and "factor" not in given):
        missing = sorted(missing) or ["factor"]
        raise ValueError(f"rope type {kind!r} lacks {missing[0]!r}")
    fields = {names[k]: _number(v) for k, v in given.items() if k in names}
    return RopeScaling(kind, **fields)


def _number(value):
    if isinstance(value, list):
        return tuple(map(float, value))
    return value if isinstance(value, int) else float(value)


def _attention_factor(kind: str, given: Mapping, max_length: int) -> float:
    """The gain on cosine and sine: given, or as YaRN and LongRoPE derive it."""
    if "attention_factor" in given:
        return float(given["attention_factor"])
    original = given["original_max_position_embeddings"]
    factor = given.get("factor", max_length / original)
    if kind == "longrope":
        longer = 1 + math.log(factor) / math.log(original)
        return math.sqrt(longer) if factor > 1 else 1.0
    over, under = given.get("mscale"), given.get("mscale_all_dim")
    gain = lambda m: 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0  # noqa: E731
    return gain(over) / gain(under) if over and under else gain(1.0)


def _refuse_others(given: Mapping, kind: str, accepted) -> None:
    for key, value in given.items():
        if key not in accepted:
            named = ", ".join(sorted(accepted)) or "none"
            raise ValueError(
                f"rope type {kind!r} has key {key!r} = {value!r}; accepted: {named}"
            )


def write_rope(
    rope: Rope, local: Rope | None, keys: RopeKeys, max_length: int
) -> dict[str, Any]:
    """The keys of ``config.json`` that ``read_rope`` reads back."""
    out: dict[str, Any] = {keys.theta: rope.theta}
    if rope.fraction != 1.0 or keys.default_fraction != 1.0:
        out[keys.fraction] = rope.fraction
    if keys.local_theta is not None:
        out[keys.local_theta] = (local or rope).theta
    s = rope.scaling
    if s is None:
        return out
    fields = {k: getattr(s, ours) for k, ours in KINDS[s.kind].items()}
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
    if s.kind == "longrope":
        del fields["factor"]
        out["original_max_position_embeddings"] = s.original_length
        derived = {k: v for k, v in fields.items() if k != "attention_factor"}
        if _attention_factor("longrope", derived, max_length) == s.attention_factor:
            fields = derived
        fields.pop("original_max_position_embeddings")
    return out | {"rope_scaling": {"rope_type": s.kind, **fields}}
