"""SliceGPT: turn the residual stream to its principal axes and drop the smallest."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import transform
from jaxllm.core.width import principal_slice

card = Card(
    "SliceGPT",
    paper="arXiv:2401.15024",
    claims=(
        # Its head is a leaf of its own: the baseline keeps more channels.
        Claim("slicegpt(0.34, multiple=1)", "minitron(width=0.25, hidden=0, heads=0)"),
    ),
    composes="first, on dense weights of a model with RMS norms; then any other",
)


@transform
def slicegpt(sparsity: float = 0.25, multiple: int = 8):
    """W -> D QT W for readers, W Q DT for writers, Q the principal axes (section 3).

    The paper turns every block by its own Q and pays with two matrices per block in
    the residual path; here one Q serves the whole model, so that the result is an
    ordinary transformer of ``multiple`` x n channels that exports as its family.
    """
    return principal_slice(sparsity, multiple)
