"""Other people's kernels on the same shapes: XLA, torch, gemlite, torchao and others.

Each peer builds, for one case and input set, a function without arguments; torch runs
as a CUDA graph over all sets. A peer that is not installed, or that refuses the shape,
says so.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
import timing

PACKAGES = ("torch", "transformers", "gemlite", "torchao", "bitsandbytes")
Builder = Callable[[object, dict], Callable]


def versions() -> dict[str, str]:
    """Installed versions of the peers' packages, or "not installed"."""
    return {name: _version(name) for name in PACKAGES}


def measure(op: str, case, platform: str) -> dict[str, object]:
    """Seconds a call of each peer of ``op`` on this case, or why there is none."""
    if platform == "cpu":
        return {"none": "the tiny cases on a CPU have no peers"}
    count = timing.set_count(case.shapes)
    found: dict[str, object] = {}
    for name, build in XLA.get(op, {}).items():
        found[name] = _attempt(lambda b=build: _xla_seconds(b(case), count))
    for name, (package, build) in TORCH.get(op, {}).items():
        missing = [p for p in ("torch", package) if not _installed(p)]
        if missing:
            found[name] = f"{missing[0]} is not installed"
        elif platform != "gpu":
            found[name] = f"measured on GPUs, not on {platform}"
        else:
            found[name] = _attempt(lambda b=build: _torch_seconds(b, case, count))
    return found


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _version(name: str) -> str:
    return importlib.metadata.version(name) if _installed(name) else "not installed"


def _attempt(run: Callable[[], float]) -> object:
    """Seconds, or the first line of the peer's error: it must not end the run."""
    try:
        return run()
    except Exception as error:  # of any peer's own class
        return f"{type(error).__name__}: {str(error).splitlines()[:1]}"


def _xla_seconds(built, count: int) -> float:
    function, make = built
    shapes = jax.eval_shape(make, jax.random.key(0))
    program = timing.compiled(function, shapes, count)
    return timing.seconds(program, [make(k) for k in jax.random.split(_key(), count)])


def _key():
    return jax.random.key(1)


def _torch_seconds(build, case, count: int) -> float:
    """A CUDA graph over all input sets, replayed; the slope cancels its launch."""
    import torch

    calls = [build(torch, case) for _ in range(count)]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def run(repeats: int) -> None:
        for _ in range(repeats):
            graph.replay()
        torch.cuda.synchronize()

    return timing.slope(run, count)


def sizes(case) -> tuple[int, int, int]:
    """(rows, inputs, outputs) of a matmul case."""
    x, w = case.shapes[:2]
    planes = w if isinstance(w, tuple) else (w,)
    return x.shape[0], x.shape[1], planes[0].shape[0]


# XLA


def _dense(case):
    m, k, n = sizes(case)

    def make(key):
        one, two = jax.random.split(key)
        dtype = jnp.bfloat16
        return jax.random.normal(one, (m, k), dtype), jax.random.normal(
            two, (n, k), dtype
        )

    return (lambda x, w: x @ w.T), make


def _scaled(case):
    """XLA's own 8-bit product; float8 with scales becomes one library call."""

    def multiply(x, w, x_scale, w_scale):
        if x.dtype == jnp.int8:
            y = jnp.einsum("mk,nk->mn", x, w, preferred_element_type=jnp.int32)
            return (y * (x_scale * w_scale.T)).astype(jnp.bfloat16)
        y = jnp.einsum("mk,nk->mn", x, w, preferred_element_type=jnp.float32)
        return (y * x_scale * w_scale.T).astype(jnp.bfloat16)

    if case.options.get("block") is not None:
        raise NotImplementedError("XLA has no product with scales per block")
    return multiply, case.make


def _cudnn(case):
    options = case.options
    if len(case.shapes) > 3 or set(options) - {"causal", "scale"}:
        raise NotImplementedError("only plain and causal attention is compared")

    def attend(q, k, v):
        causal = options.get("causal", True)
        kind = dict(is_causal=causal, implementation="cudnn")
        return jax.nn.dot_product_attention(q, k, v, **kind)

    return attend, lambda key: case.make(key)[:3]


XLA = {
    "nm_matmul": {"XLA bfloat16": _dense},
    "plane_matmul": {"XLA bfloat16": _dense},
    "quantized_matmul": {"XLA bfloat16": _dense},
    "scaled_matmul": {"XLA bfloat16": _dense, "XLA 8-bit": _scaled},
    "table_matmul": {"XLA bfloat16": _dense},
    "flash_attention": {"cuDNN through JAX": _cudnn},
}


# torch


def _random(torch, *shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _torch_dense(torch, case):
    m, k, n = sizes(case)
    x, w = _random(torch, m, k), _random(torch, n, k)
    return lambda: x @ w.T


def _int4pack(torch, case):
    m, k, n = sizes(case)
    bits, group = case.options["bits"], case.options["block"] or k
    if bits != 4 or group not in (32, 64, 128, 256):
        raise NotImplementedError("serves 4 bits in groups of 32 to 256")
    x = _random(torch, m, k)
    packed, scales = packed_int4(torch, n, k, group)
    return lambda: torch.ops.aten._weight_int4pack_mm(x, packed, group, scales)


def packed_int4(torch, n: int, k: int, group: int):
    """Random codes of a weight [n, k] as torch packs them, and scales with zeros."""
    codes = torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    return packed, _random(torch, k // group, n, 2)


def _gemlite(torch, case):
    import gemlite

    m, k, n = sizes(case)
    bits, group = case.options["bits"], case.options["block"] or k
    kind = gemlite.DType.BF16
    layer = gemlite.GemLiteLinear(
        bits, group, k, n, input_dtype=kind, output_dtype=kind
    )
    codes = torch.randint(0, 2**bits, (n, k), device="cuda", dtype=torch.uint8)
    scales, zeros = _random(torch, n, k // group), _random(torch, n, k // group)
    layer.pack(codes, scales, zeros)
    x = _random(torch, m, k)
    return lambda: layer(x)


def _torchao(torch, case):
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    m, k, n = sizes(case)
    if case.options["bits"] != 4:
        raise NotImplementedError("compared at 4 bits")
    layer = torch.nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16)
    quantize_(layer, Int4WeightOnlyConfig(group_size=case.options["block"] or k))
    x = _random(torch, m, k)
    return lambda: layer(x)


def _bitsandbytes(torch, case):
    import bitsandbytes as bnb

    m, k, n = sizes(case)
    if case.options["bits"] != 4:
        raise NotImplementedError("compared at 4 bits")
    layer = bnb.nn.Linear4bit(
        k, n, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16
    ).cuda()
    x = _random(torch, m, k)
    return lambda: layer(x)


def _int_mm(torch, case):
    m, k, n = sizes(case)
    if case.shapes[0].dtype != jnp.int8 or m <= 16:
        raise NotImplementedError("serves int8 with more than 16 rows")
    draw = dict(device="cuda", dtype=torch.int8)
    x, w = (torch.randint(-127, 128, (rows, k), **draw) for rows in (m, n))
    return lambda: torch._int_mm(x, w.T)


def _scaled_mm(torch, case):
    m, k, n = sizes(case)
    if case.shapes[0].dtype != jnp.float8_e4m3fn:
        raise NotImplementedError("serves float8")
    x, w = (_random(torch, rows, k).to(torch.float8_e4m3fn) for rows in (m, n))
    ones = lambda *shape: torch.ones(*shape, device="cuda")  # noqa: E731
    by_row, by_column = ones(m, 1), ones(1, n)
    options = dict(scale_a=by_row, scale_b=by_column, out_dtype=torch.bfloat16)
    return lambda: torch._scaled_mm(x, w.T, **options)


def _heads(torch, case):
    """q, k, v as torch wants them, [batch, heads, length, dim]."""
    q, k, v = case.shapes[:3]
    one = q.ndim == 3  # a single query
    q_shape = (q.shape[0], q.shape[1], 1, q.shape[2]) if one else _swapped(q.shape)
    return tuple(
        _random(torch, *shape)
        for shape in (q_shape, _swapped(k.shape), _swapped(v.shape))
    )


def _swapped(shape):
    return (shape[0], shape[2], shape[1], shape[3])


def _sdpa(torch, case):
    q, k, v = _heads(torch, case)
    if q.shape[0] != k.shape[0]:
        raise NotImplementedError("paged caches are not compared")
    attend = torch.nn.functional.scaled_dot_product_attention
    causal = q.shape[2] > 1 and case.options.get("causal", True)
    return lambda: attend(q, k, v, is_causal=causal, enable_gqa=True)


def _flex(torch, case):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = _heads(torch, case)
    if q.shape[0] != k.shape[0]:
        raise NotImplementedError("paged caches are not compared")
    window, late = case.options.get("window"), k.shape[2] - q.shape[2]

    def visible(b, h, i, j):
        near = j <= i + late
        return near if window is None else near & (i + late - j < window)

    mask = create_block_mask(visible, None, None, q.shape[2], k.shape[2], device="cuda")
    attend = torch.compile(flex_attention)
    return lambda: attend(q, k, v, block_mask=mask, enable_gqa=True)


def _flex_blocks(torch, case):
    """flex_attention on the blocks that the case lists, for its first input set."""
    import numpy as np
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    q, k, v = _heads(torch, case)
    index, count = (np.array(a) for a in case.make(_key())[3:5])
    block = (case.options["block_q"], case.options["block_k"])
    kept = torch.from_numpy(count).int().cuda()
    listed = torch.from_numpy(index).int().cuda()
    late = k.shape[2] - q.shape[2]
    mask = BlockMask.from_kv_blocks(
        kept,
        listed,
        BLOCK_SIZE=block,
        mask_mod=lambda b, h, i, j: j <= i + late,
        seq_lengths=(q.shape[2], k.shape[2]),
    )
    attend = torch.compile(flex_attention)
    return lambda: attend(q, k, v, block_mask=mask, enable_gqa=True)


TORCH: dict[str, dict[str, tuple[str, Builder]]] = {
    "quantized_matmul": {
        "torch bfloat16": ("torch", _torch_dense),
        "torch._weight_int4pack_mm": ("torch", _int4pack),
        "gemlite": ("gemlite", _gemlite),
        "torchao": ("torchao", _torchao),
        "bitsandbytes": ("bitsandbytes", _bitsandbytes),
    },
    "scaled_matmul": {
        "torch bfloat16": ("torch", _torch_dense),
        "torch._int_mm": ("torch", _int_mm),
        "torch._scaled_mm": ("torch", _scaled_mm),
    },
    "flash_attention": {
        "torch SDPA": ("torch", _sdpa),
        "torch flex_attention": ("torch", _flex),
    },
    "decode_attention": {"torch SDPA, bfloat16 cache": ("torch", _sdpa)},
    "block_sparse_attention": {
        "torch SDPA, dense": ("torch", _sdpa),
        "torch flex_attention": ("torch", _flex_blocks),
    },
}
