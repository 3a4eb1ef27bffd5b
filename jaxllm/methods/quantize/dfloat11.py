"""DFloat11: bfloat16 weights without loss, their exponents entropy-coded."""

from jaxllm.core.arrays import traced
from jaxllm.core.card import Card
from jaxllm.core.compose import Context, transform
from jaxllm.core.model import Model, get, put
from jaxllm.core.spec import marked
from jaxllm.core.weights import EntropyCoded, compressed

card = Card(
    "DFloat11",
    paper="arXiv:2504.11651",
    composes="on dense bfloat16 weights; nothing may follow",
)


@transform
def dfloat11():
    """w = (-1)^s 2^e (1 + m): e as a Huffman code, s and m in a byte (section 2.2).

    Exact for weights that are bfloat16 numbers, others are refused: about 11 bits
    instead of 16. A scan decodes chunks of 256 weights side by side. The paper cuts
    the stream, not the weights, into equal pieces. Expert weights are refused. Where
    only shapes are known (``plan``), weights stay as they are.
    """

    def run(model: Model, context: Context) -> Model:
        params = model.params
        for path in context.paths(model):
            w = get(params, f"{path}.weight")
            if compressed(w) or w.ndim != 2:
                raise TypeError(f"{path}: dfloat11 takes dense matrices only")
            if not traced(w):
                params = put(params, f"{path}.weight", _encoded(path, w))
        return model.replace(params=params)

    return marked(run, adaptive=True)


def _encoded(path: str, w) -> EntropyCoded:
    try:
        return EntropyCoded.of(w)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
