"""What is measured: the specs of all claims, and each method at the standard sizes.

A method takes part by being discovered. Its sizes follow from its signature (bits,
sparsity or share of parameters, in the house's group size); ``SPECIAL`` has those of
methods whose size is set in another way.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from jaxllm import methods
from jaxllm.core.card import Entry

# Families that do not compress the weights of a given model.
OTHERS = {
    *("tune", "cache", "tokens", "mixers", "decode", "optimize", "distill"),
    *("prefer", "reinforce", "data", "federate", "serve"),
}
GROUP = 32
SIZES = {
    "bits": (4, 3, 2),
    "sparsity": (0.5, "2:4"),
    "ratio": (0.8, 0.6),
}
UNITS = (0.2, 0.25)  # shares of heads and channels that structured methods remove
SPECIAL = {
    "dfloat11": ("dfloat11()",),
    "gptvq": ("gptvq(2, 6)", "gptvq(4, 8)"),
    "flatquant": ("flatquant(kv_bits=None, epochs=1)",),
    "microscaling": tuple(
        f"microscaling('{name}')" for name in ("mxfp4", "nvfp4", "mxfp6", "mxint8")
    ),
    "minitron": ("minitron()",),
    "mobilequant": tuple(
        f"mobilequant({bits}, epochs=3, rates=(0.01, 0.02, 0.01))" for bits in (8, 4, 3)
    ),
    "pb_llm": ("pb_llm(0.1, 32)",),
    "pst": ("pst(0.5)",),
    "ptqtp": ("ptqtp(2, 32)", "ptqtp(1, 32)"),
    "rtn": (
        *(f"rtn({bits}, 32)" for bits in (8, 4, 3, 2)),
        *(f"rtn({bits}, None)" for bits in (8, 4, 3, 2)),
        "rtn(format='e2m1', group_size=32)",
    ),
    "shortgpt": ("shortgpt(1)",),
    "smoothquant": ("smoothquant(0.5, bits=8)",),
    "spinquant": ("spinquant(solver='rtn', steps=16)",),
    "vptq": ("vptq(2, 6)", "vptq(4, 8)"),
    "wina": ("wina(0.5)",),
    "ziplm": ("ziplm(1.25, cost='weights')", "ziplm(1.3333, cost='weights')"),
}


def entries() -> dict[str, Entry]:
    """The weight methods."""
    return {n: e for n, e in methods.entries().items() if e.family not in OTHERS}


def canonical(spec: str) -> str:
    """One spelling for all specs of the same transform.

    >>> canonical("gptq(4, group_size=32)")
    'gptq(group_size=32)'
    """
    return repr(methods.parse(spec))


def accepts(spec: str) -> bool:
    """Whether a method knows a size (not all have 2 bits, or patterns)."""
    try:
        return bool(methods.parse(spec))
    except (ValueError, TypeError):
        return False


def sizes(entry: Entry) -> tuple[str, ...]:
    """The standard sizes of one method; its defaults where it has none of them."""
    if entry.name in SPECIAL:
        return SPECIAL[entry.name]
    accepted = inspect.signature(entry.make).parameters
    group = f", group_size={GROUP}" if "group_size" in accepted else ""
    for name, values in SIZES.items():
        if name in accepted and accepted[name].default is not None:
            values = UNITS if entry.family == "structure" else values
            specs = (f"{entry.name}({name}={v!r}{group})" for v in values)
            return tuple(filter(accepts, specs))
    return (f"{entry.name}({group.removeprefix(', ')})",)


def claimed() -> dict[str, tuple[str, ...]]:
    """The specs of all claims and their baselines, by the model of the claim."""
    found: dict[str, dict[str, None]] = {}
    for entry in methods.entries().values():
        for claim in entry.card.claims:
            mine = found.setdefault(claim.model, {})
            mine |= {canonical(claim.spec): None, canonical(claim.over): None}
    return {model: tuple(specs) for model, specs in found.items()}


def plan(models: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(model, spec) of all rows, what matters most first.

    Empty specs are the models as they are. Claims come before the standard sizes;
    models of equal shapes follow each other, since they share compiled programs.
    """
    made = claimed()
    every = dict.fromkeys(s for specs in made.values() for s in specs)
    standard = dict.fromkeys(canonical(s) for e in entries().values() for s in sizes(e))
    small = [model for model in models if model != "builtin"]
    large = [model for model in models if model == "builtin"]
    rows = [(model, "") for model in models]
    for specs in (every, standard):
        rows += [(model, spec) for spec in specs for model in small]
        rows += [(model, spec) for model in large for spec in specs]
    yield from dict.fromkeys(rows)
