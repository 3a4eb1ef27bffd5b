"""The test grounds: three small models, their calibration, and the house protocol.

``stories`` is stories260K, a real pretrained Llama; ``twin`` the same function with
outlier channels; ``builtin`` the model that comes with the package. Claims and
leaderboards are measured here and nowhere else, so that their numbers agree.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxllm.core import weights
from jaxllm.core.model import Model, weight
from jaxllm.data.calibration import Calibration, calibrate
from jaxllm.data.corpora import documents
from jaxllm.data.tokenizers import Tokenizer, load_tokenizer
from jaxllm.evaluate.perplexity import Perplexity, perplexity
from jaxllm.evaluate.twin import outlier_twin
from jaxllm.models import hub

NAMES = ("stories", "twin", "builtin")
LIMIT = 48  # documents of the house protocol
SAMPLES, LENGTH = 32, 256  # of calibration
SAME = 1e-4  # of the largest output


@dataclasses.dataclass(frozen=True)
class Ground:
    """A test model with its tokenizer, calibration set and held-out documents."""

    name: str
    model: Model
    tokenizer: Tokenizer
    calibration: Calibration
    texts: tuple[str, ...]

    def perplexity(self, model: Model) -> Perplexity:
        """That of a model made from this one: each held-out document by itself."""
        model = expanded(model)
        settings = dict(protocol="documents", limit=LIMIT, progress=False)
        return perplexity(model, self.tokenizer, list(self.texts), **settings)

    def bytes(self, model: Model) -> tuple[int, int]:
        """Stored bytes of a model's linear maps, and of all its parameters."""
        paths = model.config.linears()
        linear = sum(weights.nbytes(weight(model, path)) for path in paths)
        return linear, weights.nbytes(model.params)

    def bits(self, model: Model) -> tuple[float, float]:
        """The same in bits per weight: of this model's linear maps, of all of it.

        Weights that were cut away count in the denominators.
        """
        linear, whole = self.bytes(model)
        all_linear, all_weights = (n / 4 for n in self.bytes(self.model))  # float32
        return 8 * linear / all_linear, 8 * whole / all_weights


def expanded(model: Model) -> Model:
    """The model with dense arrays in place of its packed weights, where that is the
    same function (inputs are neither rounded nor gated): all such models then share
    one compiled program, where each kind of weight would have its own.
    """
    kinds: dict = {}
    for path in model.config.linears():
        w = weight(model, path)
        if weights.compressed(w):
            kinds.setdefault(jax.tree.structure(w), w)
    if not kinds or not all(map(multiplies_by_its_array, kinds.values())):
        return model
    dense = lambda x: _materialize(x) if weights.compressed(x) else x  # noqa: E731
    params = jax.tree.map(dense, model.params, is_leaf=weights.compressed)
    return model.replace(params=params)


# A program for each kind of weight, not one in which every weight has a part.
_materialize = jax.jit(weights.materialize)


@jax.jit
def _agrees(x, w):
    expected = x @ weights.materialize(w).astype(x.dtype)
    wrong = jnp.abs(weights.dot(x, w) - expected).max()
    return wrong <= SAME * jnp.abs(expected).max()


def multiplies_by_its_array(w) -> bool:
    """Whether x W is that of the dense array: no rule acts on x."""
    x = jax.random.normal(jax.random.key(0), (16, weights.shape(w)[0]))
    return bool(_agrees(x, w))


def ground(name: str, data: str | Path | None = None) -> Ground:
    """The test ground of a name.

    Args:
      name: ``stories``, ``twin`` or ``builtin``.
      data: The folder with ``models/stories260K`` and ``text``; ``builtin`` needs none.

    Raises:
      ValueError: Another name, or no folder where one is needed.
      FileNotFoundError: The folder lacks a file.
    """
    if name not in NAMES:
        raise ValueError(f"test model {name!r}; accepted: {', '.join(NAMES)}")
    if name == "builtin":
        source: str | Path = "builtin:"
        model, tokenizer = hub.load_builtin(), load_tokenizer("builtin:tiny")
    elif data is None:
        raise ValueError(f"the test model {name!r} needs its data folder, got None")
    else:
        folder = Path(data) / "models" / "stories260K"
        source = Path(data) / "text" / "tinystories.txt"
        model = hub.load_llama2c(folder / "stories260K.bin")
        tokenizer = load_tokenizer(folder / "tok512.bin")
    calibration = calibrate(source, tokenizer, samples=SAMPLES, length=LENGTH)
    if name == "twin":
        model = outlier_twin(model, next(iter(calibration)))
    texts = tuple(documents(source, "eval"))
    return Ground(name, model, tokenizer, calibration, texts)
