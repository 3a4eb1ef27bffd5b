"""GPTQ in plain PyTorch, as published: what the benchmark compares with.

Algorithm 1 of arXiv:2210.17323: Cholesky factor of the inverse Hessian, blocks of 128
columns, lazy updates of what follows a block; asymmetric minimum and maximum grids per
group, 1 % damping. Layers that read the same input share their Hessian here, which the
authors' code computes for each of them.
"""

from __future__ import annotations

import time

import torch

BLOCK = 128
DAMPING = 0.01
# The linear maps of a Llama block by the input that they share, in order.
SHARED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def quantize(model, tokens: torch.Tensor, bits: int, group: int) -> list[float]:
    """All linear maps of the blocks in place, block by block; the seconds of each.

    ``tokens`` [samples, length] calibrate. As ours, a block's Hessians are those of its
    inputs before it is changed, and the next block sees the changed block's outputs.
    """
    base = model.model
    positions = torch.arange(tokens.shape[1])[None]
    batches = [base.embed_tokens(part) for part in tokens.split(2)]
    turn = base.rotary_emb(batches[0], positions)
    mask = torch.full((tokens.shape[1],) * 2, float("-inf")).triu(1)[None, None]
    seconds = []
    for block in base.layers:
        start = time.perf_counter()
        run = lambda x, block=block: _first(  # noqa: E731
            block(x, attention_mask=mask, position_embeddings=turn)
        )
        hessians = _hessians(block, batches, run)
        for names in SHARED:
            factor, dead = _factor(hessians[names[0]])
            for name in names:
                weight = block.get_submodule(name).weight
                weight.data = _sweep(weight.data, factor, dead, bits, group)
        batches = [run(x) for x in batches]
        seconds.append(round(time.perf_counter() - start, 4))
    return seconds


def _first(output):
    return output[0] if isinstance(output, tuple) else output


def _hessians(block, batches, run) -> dict[str, torch.Tensor]:
    """E[x xT] of each shared input."""
    found: dict[str, torch.Tensor] = {}
    count = sum(x.shape[0] * x.shape[1] for x in batches)

    def hook(name):
        def add(module, inputs):
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            if name not in found:
                found[name] = torch.zeros(x.shape[-1], x.shape[-1])
            found[name].addmm_(x.T, x, alpha=1 / count)

        return add

    firsts = [names[0] for names in SHARED]
    handles = [
        block.get_submodule(n).register_forward_pre_hook(hook(n)) for n in firsts
    ]
    for x in batches:
        run(x)
    for handle in handles:
        handle.remove()
    return found


def _factor(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The upper Cholesky factor of the damped inverse, and the inputs never seen."""
    diagonal = h.diagonal()
    dead = diagonal == 0
    diagonal += torch.where(dead, 1.0, 0.0)
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    return torch.linalg.cholesky(inverse, upper=True), dead


def _sweep(w, u, dead, bits: int, group: int) -> torch.Tensor:
    """The rounded weight [out, in]."""
    w, q = w.clone(), torch.zeros_like(w)
    w[:, dead] = 0
    most = 2**bits - 1
    for low in range(0, w.shape[1], BLOCK):
        high = min(low + BLOCK, w.shape[1])
        part, errors = w[:, low:high], torch.zeros_like(w[:, low:high])
        for i in range(high - low):
            if (low + i) % group == 0:
                here = w[:, low + i : low + i + group]
                floor = here.amin(1, keepdim=True).clamp(max=0)
                ceiling = here.amax(1, keepdim=True).clamp(min=0)
                scale = ((ceiling - floor) / most).clamp(min=1e-12)
                zero = (-floor / scale).round().clamp(0, most)
            column = part[:, i : i + 1]
            code = (column / scale + zero).round().clamp(0, most)
            q[:, low + i : low + i + 1] = (code - zero) * scale
            error = (column - q[:, low + i : low + i + 1]) / u[low + i, low + i]
            part[:, i + 1 :] -= error @ u[low + i, low + i + 1 : high][None]
            errors[:, i : i + 1] = error
        w[:, high:] -= errors @ u[low:high, high:]
    return q
