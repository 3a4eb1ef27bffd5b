"""What an op should give: float64 for the matmuls, float32 in full for the rest."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantized_matmul.reference import dequantize

OUTPUTS = 512  # random columns of a matmul's result that are compared


def error(op, case, arguments, result, seed: int) -> dict[str, object]:
    """The relative error (Frobenius norm) of ``result``, and against what."""
    exact = {"quantized_matmul": _quantized, "scaled_matmul": _scaled}.get(op.name)
    if exact is None:
        wide = jax.tree.map(_wide, arguments)
        try:
            with jax.default_matmul_precision("highest"):
                want = op.reference(*wide, **case.options)
        except jax.errors.JaxRuntimeError as full:  # scores of long contexts
            return {"error": None, "against": f"no room: {str(full)[:200]}"}
        pairs = zip(jax.tree.leaves(result), jax.tree.leaves(want), strict=True)
        kind = "reference in float32"
    else:
        outputs = result.shape[-1]
        rng = np.random.default_rng(seed)
        chosen = rng.permutation(outputs)[: min(OUTPUTS, outputs)]
        pairs = [(result[..., chosen], exact(case, arguments, chosen))]
        kind = f"float64, {len(chosen)} outputs"
    return {"error": max(_relative(a, b) for a, b in pairs), "against": kind}


def _quantized(case, arguments, chosen):
    x, planes, scale, zero, *low_rank = arguments
    o = case.options
    w = dequantize(
        tuple(plane[chosen] for plane in planes),
        scale[chosen],
        None if zero is None else zero[chosen],
        bits=o["bits"],
        block=o["block"],
        count=x.shape[-1],
        levels=o.get("levels"),
        offset=o.get("offset"),
    )
    y = _float64(x) @ _float64(w).T
    for left, right in low_rank:
        y = y + _float64(x) @ _float64(left) @ _float64(right[:, chosen])
    return y


def _scaled(case, arguments, chosen):
    x, w, x_scale, w_scale = arguments
    block = case.options.get("block") or x.shape[-1]
    spread = np.repeat(_float64(w_scale[chosen]), block, axis=1)[:, : x.shape[-1]]
    return _float64(x) @ (_float64(w[chosen]) * spread).T * _float64(x_scale)


def _float64(a) -> np.ndarray:
    return np.asarray(a.astype(jnp.float32)).astype(np.float64)


def _wide(a):
    return a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a


def _relative(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))
