"""Learning-rate schedules: step -> rate, thin over optax."""

from __future__ import annotations

import difflib
import math

import optax


def constant(peak: float, steps: int, *, warmup: int = 0) -> optax.Schedule:
    """Linear warmup to ``peak``, then constant.

    >>> rate = constant(1.0, 10, warmup=4)
    >>> [float(rate(step)) for step in (0, 2, 4, 9)]
    [0.0, 0.5, 1.0, 1.0]
    """
    return _after_warmup(peak, warmup, optax.constant_schedule(peak))


def linear(
    peak: float, steps: int, *, warmup: int = 0, floor: float = 0.0
) -> optax.Schedule:
    """Warmup, then a straight line to ``floor * peak`` at ``steps``."""
    line = optax.linear_schedule(peak, floor * peak, steps - warmup)
    return _after_warmup(peak, warmup, line)


def cosine(
    peak: float, steps: int, *, warmup: int = 0, floor: float = 0.1
) -> optax.Schedule:
    """Warmup, then half a cosine to ``floor * peak`` (SGDR, arXiv:1608.03983)."""
    half = optax.cosine_decay_schedule(peak, steps - warmup, alpha=floor)
    return _after_warmup(peak, warmup, half)


def wsd(
    peak: float,
    steps: int,
    *,
    warmup: int = 0,
    decay: float | int = 0.2,
    floor: float = 0.0,
    shape: str = "sqrt",
) -> optax.Schedule:
    """Warmup, stable, decay (MiniCPM, arXiv:2404.06395).

    Until the decay begins the rates do not depend on ``steps``: a run can be made
    longer, or be ended early, from any checkpoint of its stable part.

    Args:
      decay: Length of the last part, a fraction of ``steps`` (float) or steps (int).
      floor: Last rate as a fraction of the peak.
      shape: "sqrt" (1 - sqrt(t), arXiv:2405.18392), "linear" or "exponential" (the
        paper's; ends at a hundredth of the peak when ``floor`` is 0).
    """
    share = isinstance(decay, float)
    length = max(round(decay * steps), decay > 0) if share else decay
    if not 0 < length <= steps - warmup:
        raise ValueError(
            f"a decay of {decay} does not fit {steps} steps with {warmup} of warmup; "
            "expected a fraction in (0, 1), or a number of steps"
        )
    shapes = {
        "sqrt": lambda t: 1 - (1 - floor) * t**0.5,
        "linear": lambda t: 1 - (1 - floor) * t,
        "exponential": lambda t: max(floor, 0.01) ** t,
    }
    if shape not in shapes:
        raise ValueError(f"shape is {shape!r}, expected one of {', '.join(shapes)}")

    def fall(count):
        clipped = optax.linear_schedule(0.0, 1.0, length)(count)
        return peak * shapes[shape](clipped)

    stable = optax.constant_schedule(peak)
    rest = optax.join_schedules([stable, fall], [steps - warmup - length])
    return _after_warmup(peak, warmup, rest)


SCHEDULES = dict(constant=constant, linear=linear, cosine=cosine, wsd=wsd)


def schedule(name: str, peak: float, steps: int, **options) -> optax.Schedule:
    """A schedule by name.

    Raises:
      ValueError: Unknown name (the nearest is given), a rate or warmup out of range.
      TypeError: An option that the schedule does not have.
    """
    if name not in SCHEDULES:
        near = difflib.get_close_matches(name, SCHEDULES, n=1, cutoff=0.0)[0]
        known = ", ".join(SCHEDULES)
        raise ValueError(f"schedule is {name!r}; did you mean {near!r}? known: {known}")
    if not (math.isfinite(peak) and peak > 0):
        raise ValueError(f"the peak learning rate is {peak}, expected a positive one")
    warmup = options.get("warmup", 0)
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup is {warmup}, expected 0 to {steps - 1} steps")
    return SCHEDULES[name](peak, steps, **options)


def _after_warmup(peak: float, warmup: int, rest: optax.Schedule) -> optax.Schedule:
    if warmup == 0:
        return rest
    rise = optax.linear_schedule(0.0, peak, warmup)
    return optax.join_schedules([rise, rest], [warmup])
