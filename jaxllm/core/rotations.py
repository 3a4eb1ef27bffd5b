"""Rotations of a whole model: exact folds of norms, and Hadamard matrices.

An op (``weights.Hadamard``) turns x into x M with M orthogonal. A weight that reads
the turned stream becomes MT W, one that writes to it W M; the function stays.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.core.arrays import to_rank
from jaxllm.core.model import Model, Params, Site, get, put, with_weight
from jaxllm.core.spec import expression, marked
from jaxllm.core.weights import Hadamard, PerHead, Transformed, compressed


@jax.jit
def reading(op, w):
    """MT W for a weight [in, out] whose input is turned."""
    return jnp.swapaxes(op.apply(jnp.swapaxes(w, -1, -2)), -1, -2)


@jax.jit
def writing(op, w):
    """W M for a weight (or bias) whose output is turned."""
    return op.apply(w)


def signed_hadamard(key: jax.Array, width: int) -> Hadamard:
    """A random-sign Hadamard rotation of [width] channels."""
    return Hadamard(jax.random.rademacher(key, (width,), jnp.float32))


def untie(model: Model) -> Model:
    """A model whose head is a leaf of its own (a copy of the embedding)."""
    if model.config.head_path == "head":
        return model
    params = model.params | {"head": {"weight": get(model.params, "embed.weight")}}
    return model.replace(params=params, config=model.config.untied())


def fold_norms(model: Model) -> Model:
    """Move every norm's scale into the weights that read it; norms become pure.

    Needs an untied head and RMS norms that write directly to the stream.
    """
    residual, params = model.config.residual(), model.params
    for (norm, readers), kind in zip(residual.readers, residual.kinds, strict=True):
        if norm is None:
            continue
        one = float(kind == "rms_plus_one")
        scale = get(params, norm)["scale"]
        for path in readers:
            w = _dense(params, path)
            rows = to_rank((scale + one)[:, None], w.ndim)
            folded = (w * rows).astype(w.dtype)
            params = put(params, f"{path}.weight", folded)
        params = put(params, f"{norm}.scale", jnp.full_like(scale, 1 - one))
    return model.replace(params=params)


def _dense(params: Params, path: str):
    w = get(params, f"{path}.weight")
    if compressed(w):
        raise TypeError(f"{path} is {type(w).__name__}: rotate before compressing it")
    return w


def _check_rotatable(model: Model) -> None:
    residual = model.config.residual()
    layer = [
        n
        for (n, _), k in zip(residual.readers, residual.kinds, strict=True)
        if k == "layer"
    ]
    if layer:
        raise ValueError(
            f"{layer[0]} is a layer norm: only RMS norms commute with rotations"
        )
    post = [n for n in residual.post_norms if n is not None]
    if post:
        raise ValueError(
            f"{post[0]} stands between a writer and the stream: cannot rotate"
        )


def rotate_residual(model: Model, op) -> Model:
    """The residual stream turned by an orthogonal op, folded everywhere.

    The head is untied first: its norm's scale goes into it and not into the embedding.
    """
    _check_rotatable(model)
    model = fold_norms(untie(model))
    residual, params = model.config.residual(), model.params
    for path in (p for _, readers in residual.readers for p in readers):
        w = _dense(params, path)
        params = put(params, f"{path}.weight", reading(op, w).astype(w.dtype))
    for path in residual.writers:
        params = put(params, path, _turned_output(op, get(params, path)))
    table = get(params, f"{residual.embed}.weight")
    params = put(params, f"{residual.embed}.weight", reading(op, table))
    if residual.positions is not None:
        rows = get(params, residual.positions)["table"]
        params = put(params, f"{residual.positions}.table", writing(op, rows))
    return model.replace(params=params)


def _turned_output(op, group: Params) -> Params:
    """A linear map's weight and bias with the output turned."""
    return {n: writing(op, x).astype(x.dtype) for n, x in group.items()}


def rotate_values(model: Model) -> Model:
    """Values and the attention output in a Hadamard basis.

    Within each head the rotation is folded into v and o; across heads it is online,
    in front of o, so that o reads a full Hadamard transform of its input.
    """
    for site in value_sites(model):
        (path,) = site.consumers
        model = turn_heads(model, site, Hadamard())
        across, o = Hadamard(group=site.head_dim), _dense(model.params, path)
        model = with_weight(model, path, Transformed(across, reading(across, o)))
    return model


def turn_heads(model: Model, site: Site, op) -> Model:
    """Each head of the values turned by an orthogonal op, folded into v and o."""
    inside, producer = PerHead(op, site.head_dim), site.producer or ""
    group = get(model.params, producer)
    params = put(model.params, producer, _turned_output(inside, group))
    for path in site.consumers:
        w = _dense(params, path)
        params = put(params, f"{path}.weight", reading(inside, w).astype(w.dtype))
    return model.replace(params=params)


def value_sites(model: Model) -> list[Site]:
    """Where attention mixes values: heads within which a rotation folds."""
    sites = model.config.sites()
    return [s for s in sites if s.head_dim > 1 and s.kind == "linear" and s.producer]


def rotate_hidden(model: Model) -> Model:
    """An online Hadamard transform in front of every down projection."""
    heads = {s.consumers for s in value_sites(model)}
    writers = set(model.config.residual().writers)
    for site in model.config.sites():
        inner = site.consumers not in heads and writers.issuperset(site.consumers)
        for path in site.consumers if inner else ():
            w = _dense(model.params, path)
            op = Hadamard()
            model = with_weight(model, path, Transformed(op, reading(op, w)))
    return model


@expression
def hadamard_rotation(online: bool = True):
    """The body that turns a model: residual stream, values, and inputs of down.

    ``online`` adds the transforms that cannot be folded. The result computes the
    same function; where the head was tied it has a leaf of its own.
    """

    def run(model: Model, context) -> Model:
        model = rotate_residual(model, signed_hadamard(context.key, model.config.width))
        return rotate_hidden(rotate_values(model)) if online else model

    return marked(run, whole=True)
