"""SVD-LLM: whitened by the Gram matrix's Cholesky factor, truncation is optimal."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import compress, transform
from jaxllm.core.metrics import gram
from jaxllm.core.solvers import svd as truncate

card = Card(
    "SVD-LLM",
    paper="arXiv:2403.07378",
    claims=(
        Claim("svd_llm(0.8)", "svd(0.8)"),
        Claim("svd_llm(0.6)", "svd(0.6)"),
        Claim("svd_llm(0.8)", "svd(0.8)", model="twin", margin=0.1),
        Claim("svd_llm(0.8)", "svd(0.8)", model="builtin", margin=0.02),
        Claim("svd_llm(0.6)", "svd(0.6)", model="builtin"),
    ),
    composes="on dense weights; its factors are not compressed further",
)


@transform
def svd_llm(ratio: float | None = 0.8, rank: int | None = None, damping: float = 0.01):
    """W = S^-1 trunc_r(S W) with S ST = E[x xT] (section 3.1, theorem 3.2).

    ``ratio`` is the share of parameters kept. Each layer is whitened with the inputs
    of the already compressed prefix. The paper then tunes the two factors in turn by
    LoRA (section 3.2); that is not here.
    """
    return compress(truncate(rank, ratio if rank is None else None, gram(damping)))
