"""Structured pruning: which heads and channels matter, and what mends their loss.

A score is called as ``score(part)`` and gives one number per unit, larger for what
should stay. A mend is called as ``mend(w, kept, stats)`` for the weight [in, out] that
reads the units and the channels that stay; it gives their new rows and a bias or None.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxllm.core.arrays import traced
from jaxllm.core.compose import Context, inside
from jaxllm.core.model import Model, Params, Units, get, put
from jaxllm.core.slicing import Kept, channels, cut_units, dense
from jaxllm.core.slopes import Slopes, slopes
from jaxllm.core.spec import expression
from jaxllm.core.stats import Stats
from jaxllm.core.walk import Seen, walk

GRADIENT = "gradient"  # what a score needs besides statistics of inputs


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a model as a score sees it: its units, weights, and statistics."""

    units: Units
    params: Params
    stats: Stats = dataclasses.field(default_factory=lambda: Stats({}))
    slopes: Slopes = dataclasses.field(default_factory=dict)

    @property
    def w(self) -> Float[Array, "in out"]:
        """The weight that reads the units, float32."""
        return dense(self.params, self.units.input).astype(jnp.float32)

    @property
    def rows(self) -> int:
        """Channels that the units have together."""
        return self.w.shape[-2]

    def per_unit(self, values: Float[Array, "in"]) -> Float[Array, "units"]:
        """Sums of a value per channel over each unit's channels."""
        return values.reshape(self.units.count, -1).sum(-1)

    def total(self, values: Callable[[str], Array]) -> Float[Array, "units"]:
        """Sums of a value per weight entry over all that goes with each unit."""
        count = self.units.count
        out = self.per_unit(values(self.units.input).sum(-1))
        for path in self.units.outputs:
            out = out + values(path).sum(-2).reshape(count, -1).sum(-1)
        return out

    def size(self) -> int:
        """Weight entries per unit."""
        paths = (*self.units.outputs, self.units.input)
        return sum(dense(self.params, p).size for p in paths) // self.units.count


@expression
def coupled_norm():
    """Sum of w^2 over all weights that go with a unit: magnitude pruning."""

    def score(part: Part):
        return part.total(lambda p: dense(part.params, p).astype(jnp.float32) ** 2)

    return score


@expression(needs=("moments",))
def salience():
    """Sum of |w_ij| sqrt(E[x_i^2]) over a unit's inputs: Wanda's score, summed."""

    def score(part: Part):
        norm = jnp.sqrt(part.stats.moments.mean_square)
        return part.per_unit(jnp.abs(part.w).sum(-1) * norm)

    return score


@expression(needs=("moments",))
def activity():
    """Sum of E|x_i| over a unit's channels (Minitron, arXiv:2407.14679, eq. 2)."""
    return lambda part: part.per_unit(part.stats.moments.mean_absolute)


@expression(needs=("moments",))
def fluctuation(standardize: bool = True):
    """Var(x_i) |W_i|^2: the loss that no bias can mend (FLAP, arXiv:2312.11983, eq. 4).

    ``standardize`` makes parts comparable: mean 0 and deviation 1 over the channels
    of a part (eq. 5). A unit's score is the mean over its channels.
    """

    def score(part: Part):
        found = part.stats.moments.variance * (part.w**2).sum(-1)
        if standardize:
            found = (found - found.mean()) / jnp.maximum(found.std(), 1e-12)
        return part.per_unit(found) * part.units.count / part.rows

    return score


@expression(needs=(GRADIENT,))
def taylor(second: bool = False):
    """Sum of |w g| over a unit's weights, g the gradient of the language-model loss.

    ``second`` takes |w g - w^2 f / 2| with f the Fisher diagonal (LLM-Pruner,
    arXiv:2305.11627, eq. 5); see ``slopes``.
    """

    def score(part: Part):
        def entries(path: str):
            w = dense(part.params, path).astype(jnp.float32)
            g, square = part.slopes[path]
            return jnp.abs(w * g - 0.5 * w**2 * square if second else w * g)

        return part.total(entries)

    return score


@expression(needs=("gram",))
def leverage(ridge: float = 0.01):
    """Ridge leverage [C (C + l I)^-1]_ii, summed over a unit's channels.

    C = E[x xT], l = ``ridge`` mean(diag C): how little the other channels say about
    this one (MoDeGPT, arXiv:2408.09632, algorithm 1).
    """
    if ridge <= 0:
        raise ValueError(f"ridge {ridge}; accepted: above 0")

    def score(part: Part):
        c = part.stats.gram.mean
        shift = ridge * jnp.diagonal(c).mean() + 1e-12
        inverse = jnp.linalg.inv(c + shift * jnp.eye(len(c)))
        return part.per_unit(1 - shift * jnp.diagonal(inverse))

    return score


@expression(needs=("moments",))
def bias_fix():
    """The mean of what was removed becomes a bias: E[x_r] W_r (FLAP, eq. 3)."""

    def mend(w, kept, stats):
        mean = stats.moments.mean
        return w[kept], mean @ w - mean[kept] @ w[kept]

    return mend


@expression(needs=("gram",))
def regression(damping: float = 0.01):
    """The rows that stay take over what the others can be predicted to give.

    W_k + (G_kk + damping mean(diag) I)^-1 G_kr W_r with G = E[x xT]: the least output
    error of any rows on these inputs, when damping is zero.
    """
    if damping < 0:
        raise ValueError(f"damping {damping}; accepted: at least 0")

    def mend(w, kept, stats):
        g = stats.gram.mean
        gone = w.at[kept].set(0.0)
        inner = g[kept][:, kept]
        extra = damping * jnp.diagonal(g).mean() + 1e-12
        inner = inner + extra * jnp.eye(len(kept))
        return w[kept] + jnp.linalg.solve(inner, g[kept] @ gone), None

    return mend


@expression
def prune_units(
    score,
    sparsity: float,
    *,
    scope: str = "part",
    only: str | None = None,
    mend=None,
    protect=(0, 0),
):
    """The body that removes heads and channels of least score.

    ``scope`` "part" removes the share ``sparsity`` of each part's units, "model" the
    units of least score in all parts until that share of their weights is gone (its
    shapes depend on the data; where only shapes are known it counts as "part"). One
    unit of each part always stays. ``only`` takes "heads" or "channels", ``protect``
    leaves the first and last layers alone.
    Scores and mends read the statistics of the dense model.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity}; accepted: 0 <= sparsity < 1")
    if scope not in ("part", "model"):
        raise ValueError(f"scope {scope!r}; accepted: 'part', 'model'")
    if only not in (None, "heads", "channels"):
        raise ValueError(f"only {only!r}; accepted: None, 'heads', 'channels'")

    def run(model: Model, context: Context) -> Model:
        parts = look(model, context, {*score.needs, *(mend.needs if mend else ())})
        parts = [p for p in parts if only in (None, p.units.kind)]
        parts = [p for p in parts if not _protected(model, p, protect)]
        scores = [score(part) for part in parts]
        known = scope == "model" and not traced(scores)
        choose = weakest_of_model if known else same_share
        kept = choose(parts, scores, sparsity)
        return cut_and_mend(model, parts, kept, mend)

    return run


def look(model: Model, context: Context, needs: set[str]) -> list[Part]:
    """The parts whose weights are all selected, with what ``needs`` names of them."""
    chosen = set(context.paths(model))
    every = model.config.units()
    mine = [u for u in every if chosen.issuperset((*u.outputs, u.input))]
    if not mine:
        raise ValueError(
            "no whole part is selected; units go with "
            + ", ".join(u.path for u in every[:4])
        )
    stats = observe(model, context, tuple(sorted(needs - {GRADIENT})))
    slope: Slopes = {}
    if GRADIENT in needs:
        paths = tuple(p for u in mine for p in (*u.outputs, u.input))
        slope = slopes(model, context.calibration, paths)
    return [Part(u, model.params, stats.get(u.tap, Stats({})), slope) for u in mine]


def observe(model: Model, context: Context, needs: tuple[str, ...]) -> dict[str, Stats]:
    """Statistics of every linear input of the model as it is, by tap."""
    found: dict[str, Stats] = {}

    def visit(params, path, seen: Seen):
        found.update(seen.stats)
        return params

    if needs:
        walk(model, context.calibration, needs, visit, label="observe")
    return found


def cut_and_mend(model: Model, parts: list[Part], kept: Kept, mend=None) -> Model:
    """The model without the other units, their readers mended."""
    made = cut_units(model, kept)
    for part in parts if mend else ():
        units = part.units
        stay = channels(units, part.rows, kept[units.path])
        w, bias = mend(part.w, stay, part.stats)
        group = get(made.params, units.input)
        group = group | {"weight": w.astype(group["weight"].dtype)}
        if bias is not None and len(stay) < part.rows:
            had = jnp.asarray(group.get("bias", 0.0)).astype(bias.dtype)
            group["bias"] = (bias + had).astype(w.dtype)
        made = made.replace(params=put(made.params, units.input, group))
    return made


def _protected(model: Model, part: Part, protect) -> bool:
    paths = [path for path, _ in model.config.blocks()]
    first, last = protect
    free = paths[first : len(paths) - last]
    return not any(inside(part.units.path, path) for path in free)


def strongest(score: Float[Array, "units"], count: int) -> Array:
    """Numbers of the ``count`` units of largest score, sorted."""
    return jnp.sort(jnp.argsort(-score, stable=True)[:count])


def same_share(parts: list[Part], scores, sparsity: float) -> Kept:
    """The same share of every part."""
    keep = lambda n: max(1, n - int(sparsity * n + 0.5))  # noqa: E731
    return {
        p.units.path: strongest(s, keep(p.units.count))
        for p, s in zip(parts, scores, strict=True)
    }


def weakest_of_model(parts: list[Part], scores, sparsity: float) -> Kept:
    """Units go by rising score, over all parts, until enough weights are gone."""
    goal = sparsity * sum(p.size() * p.units.count for p in parts)
    left = {p.units.path: p.units.count for p in parts}
    ranked = sorted(
        (float(value), i) for i, s in enumerate(scores) for value in np.asarray(s)
    )
    gone = 0
    for _, i in ranked:
        path, size = parts[i].units.path, parts[i].size()
        if left[path] > 1 and gone + size <= goal:
            left[path] -= 1
            gone += size
    pairs = zip(parts, scores, strict=True)
    return {p.units.path: strongest(s, left[p.units.path]) for p, s in pairs}
