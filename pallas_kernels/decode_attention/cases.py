"""Named inputs: dense, paged and quantized caches; Llama-3-8B at 32k to 128k."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.cases import attention_case
from pallas_kernels.decode_attention.reference import QuantizedCache
from pallas_kernels.planes import parts
from pallas_kernels.shapes import LLAMA3_8B_HEADS, QWEN25_7B_HEADS, TINY_HEADS

# Slots and channels that share a scale.
PER_TOKEN, PER_BLOCK, PER_CHANNEL, LONG = (1, None), (1, 32), (32, 1), (128, 1)


def quantized(key, shape, bits: int, shared, dtype) -> QuantizedCache:
    """Random codes with scales for about unit variance and zeros near the middle."""
    codes_key, scale_key, zero_key = jax.random.split(key, 3)
    planes = tuple(
        jax.random.bits(codes_key, (*shape[:3], shape[3] * part // 8), jnp.uint8)
        for part in parts(bits)
    )
    tokens, channels = shared[0], shared[1] or shape[3]
    blocks = (shape[0], shape[1] // tokens, shape[2], shape[3] // channels)
    unit = 12**0.5 / 2**bits
    scale = jax.random.uniform(scale_key, blocks, dtype, 0.5 * unit, 1.5 * unit)
    middle = 2 ** (bits - 1)
    spread = max(1, middle // 4)
    zero = jax.random.randint(zero_key, blocks, middle - spread, middle + spread)
    return QuantizedCache(planes, scale, zero.astype(jnp.uint8), bits)


def make(key, *, heads, batch, slots, page, bits, key_scales, sinks, dtype):
    """A query a row, caches, lengths (the last row's full, others shorter), pages."""
    q_key, k_key, v_key, page_key = jax.random.split(key, 4)
    q = jax.random.normal(q_key, (batch, heads.queries, heads.width), dtype)
    lengths = slots - (jnp.arange(batch)[::-1] * (slots // (batch + 1) + 1))
    lengths = lengths.astype(jnp.int32)
    rows, length, pages = batch, slots, None
    if page is not None:
        rows, length = batch * slots // page + 2, page
        ids = jax.random.permutation(page_key, rows)[: batch * slots // page]
        pages = ids.reshape(batch, -1).astype(jnp.int32)
    shape = (rows, length, heads.groups, heads.width)
    if bits is None:
        keys = jax.random.normal(k_key, shape, dtype)
        values = jax.random.normal(v_key, shape, dtype)
    else:
        keys = quantized(k_key, shape, bits, key_scales, jnp.bfloat16)
        shared = PER_TOKEN if key_scales[0] > 1 else key_scales
        values = quantized(v_key, shape, bits, shared, jnp.bfloat16)
    logits = jax.random.normal(key, (heads.queries,), dtype) if sinks else None
    return q, keys, values, lengths, pages, logits


def case(
    name, heads, slots, *, batch=1, page=None, bits=None, key_scales=PER_TOKEN,
    sinks=False, **options,
):  # fmt: skip
    """One case; its name says what the cache is, options are the op's."""
    inputs = dict(batch=batch, slots=slots, page=page, bits=bits)
    inputs |= dict(key_scales=key_scales, sinks=sinks)
    return attention_case(name, heads, make, options, batch * slots, **inputs)


def _tiny():
    heads = TINY_HEADS
    yield case("dense", heads, 256, batch=3)
    yield case("window-cap", heads, 256, batch=2, window=40, soft_cap=20.0)
    yield case("sums", heads, 256, batch=2, sums=True)
    yield case("sinks", heads, 200, sinks=True, scale=0.25)
    yield case("paged", heads, 128, batch=2, page=32)
    yield case("int8", heads, 256, batch=2, bits=8, sums=True)
    yield case("int4", heads, 256, batch=2, bits=4)
    yield case("int4-blocks", heads, 128, bits=4, key_scales=PER_BLOCK)
    yield case("kivi4", heads, 128, batch=2, bits=4, key_scales=PER_CHANNEL)
    yield case("paged-int8", heads, 128, batch=2, page=32, bits=8)
    kivi = dict(key_scales=PER_CHANNEL)
    yield case("kivi8-window-sums", heads, 224, bits=8, window=70, sums=True, **kivi)
    yield case("paged-kivi4", heads, 128, batch=2, page=32, bits=4, **kivi)
    yield case("kivi4-long", heads, 256, batch=2, bits=4, key_scales=LONG)


def _real():
    llama = LLAMA3_8B_HEADS
    for length in (32768, 131072):
        name = f"{length // 1024}k"
        yield case(f"dense/{name}", llama, length)
        yield case(f"int8/{name}", llama, length, bits=8)
        yield case(f"int4/{name}", llama, length, bits=4)
        yield case(f"kivi8/{name}", llama, length, bits=8, key_scales=PER_CHANNEL)
        yield case(f"kivi4/{name}", llama, length, bits=4, key_scales=PER_CHANNEL)
    yield case("dense/32k/b8", llama, 32768, batch=8)
    yield case("sums/32k", llama, 32768, sums=True)
    yield case("window4k/32k", llama, 32768, window=4096)
    yield case("int4-blocks/32k", llama, 32768, bits=4, key_scales=PER_BLOCK)
    yield case("kivi2/32k", llama, 32768, bits=2, key_scales=PER_CHANNEL)
    yield case("kivi4-long/32k", llama, 32768, bits=4, key_scales=LONG)
    yield case("paged64/32k/b8", llama, 32768, batch=8, page=64)
    yield case("paged64-int8/32k/b8", llama, 32768, batch=8, page=64, bits=8)
    shared = dict(batch=8, page=64, bits=4, key_scales=PER_CHANNEL)
    yield case("paged64-kivi4/32k/b8", llama, 32768, **shared)
    yield case("dense/32k", QWEN25_7B_HEADS, 32768)


CASES = (*_tiny(), *_real())
