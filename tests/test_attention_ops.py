"""Attention ops: what their meanings promise, and gradients of every argument."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_kernels_gpu import Word, numbered

import pallas_kernels
from jaxllm.core.formats import ActivationFormat
from pallas_kernels.block_sparse_attention import block_index, top_blocks
from pallas_kernels.block_sparse_attention.reference import listed
from pallas_kernels.decode_attention import QuantizedCache, gpu, gpu_codes
from pallas_kernels.flash_attention.cases import projections
from pallas_kernels.flash_attention.reference import visibility
from pallas_kernels.flash_attention.tpu import Mask
from pallas_kernels.shapes import TINY_HEADS

OPS = pallas_kernels.ops()
FLASH = OPS["flash_attention"].reference
SPARSE = OPS["block_sparse_attention"].reference
DECODE = OPS["decode_attention"].reference


def arrays(queries: int, keys: int, batch: int = 1):
    return projections(jax.random.key(3), TINY_HEADS, batch, queries, keys, jnp.float32)


def near(a, b, tolerance=2e-5):
    np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


class TestMeaning:
    """Identities between the three ops and their options."""

    def test_sinks_take_a_share_and_give_nothing(self):
        q, k, v = arrays(24, 24)
        logits = jnp.array([-1.0, 0.0, 1.0, 2.0])
        got = FLASH(q, k, jnp.ones_like(v), None, logits)
        keys = jnp.repeat(k, 2, axis=2)
        scores = jnp.einsum("bqhd,bthd->bhqt", q, keys) * q.shape[-1] ** -0.5
        scores = jnp.where(jnp.tri(24, dtype=bool)[None, None], scores, -jnp.inf)
        total = jnp.exp(scores).sum(-1)
        share = total / (total + jnp.exp(logits)[None, :, None])
        near(got[..., 0], jnp.swapaxes(share, 1, 2))

    def test_first_positions_outlive_the_window(self):
        q, k, v = arrays(32, 32)
        last = lambda v: FLASH(q, k, v, window=4, first=2)[0, -1].sum()  # noqa: E731
        felt = jnp.abs(jax.grad(last)(v)[0]).sum((1, 2)) > 0
        assert felt.nonzero()[0].tolist() == [0, 1, 28, 29, 30, 31]

    def test_padding_sees_and_shows_nothing(self):
        q, k, v = arrays(16, 16)
        ids = jnp.array([[1] * 6 + [2] * 6 + [0] * 4])
        out = FLASH(q, k, v, (ids, ids))
        assert not out[0, 12:].any()
        near(out[:, 6:12], FLASH(q[:, 6:12], k[:, 6:12], v[:, 6:12]))

    def test_all_blocks_is_exact_attention(self):
        q, k, v = arrays(48, 80)
        lists = top_blocks(q, k, block_q=16, block_k=16, keep=5)
        near(SPARSE(q, k, v, *lists, block_q=16, block_k=16), FLASH(q, k, v))

    def test_decoding_is_the_last_row(self):
        q, k, v = arrays(1, 40, batch=2)
        lengths = jnp.array([40, 13])
        got = DECODE(q[:, 0], k, v, lengths, window=9)
        near(got[:1], FLASH(q, k, v, window=9)[:1, 0])
        near(got[1:], FLASH(q[1:], k[1:, :13], v[1:, :13], window=9)[:, 0])

    def test_pages_are_the_cache_in_another_order(self):
        q, k, v = arrays(1, 32, batch=2)
        pages = jnp.array([[5, 0, 3, 6], [1, 7, 2, 4]])

        def pool(x):
            cut = x.reshape(2, 4, 8, *x.shape[2:])
            return jnp.zeros((8, *cut.shape[2:])).at[pages].set(cut)

        lengths = jnp.array([32, 9])
        paged = DECODE(q[:, 0], pool(k), pool(v), lengths, pages)
        near(paged, DECODE(q[:, 0], k, v, lengths))

    def test_sums_count_the_heads_of_a_group(self):
        q, k, v = arrays(1, 32, batch=2)
        lengths = jnp.array([32, 9])
        _, sums = DECODE(q[:, 0], k, v, lengths, sums=True)
        near(sums.sum(-1), jnp.full((2, 2), 2.0))
        assert not sums[1, :, 9:].any()

    @pytest.mark.parametrize("bits", [2, 4, 8])
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_quantized_cache_reads_the_models_format(self, bits, symmetric):
        x = jax.random.normal(jax.random.key(0), (2, 6, 2, 64))
        form = ActivationFormat(bits, symmetric, block=32)
        packed = form.encode(x)
        cache = QuantizedCache(packed.codes, packed.scale, packed.zero, bits)
        assert cache.shape == x.shape
        near(cache.dequantize(), form.decode(packed), 1e-6)


class TestLists:
    """Block masks, lists and their closed forms."""

    def test_index_and_mask_are_inverse(self):
        mask = jax.random.uniform(jax.random.key(1), (2, 3, 5, 7)) < 0.4
        mask = mask.at[0, 0, 0].set(False)
        index, count = block_index(mask)
        assert (listed(index, count, 7) == mask).all()
        assert (jnp.diff(index, axis=-1) >= 0).all()
        assert int(count[0, 0, 0]) == 0

    def test_top_blocks_keep_first_diagonal_and_best(self):
        q, k, _ = arrays(64, 64)
        k = k.at[:, 16:24].set(10 * jnp.repeat(q[:, -8:, :1], 2, axis=2))
        index, count = top_blocks(q, k, block_q=8, block_k=8, keep=3)
        assert count[0, 0].tolist() == [1, 2] + [3] * 6
        assert index[0, 0, -1].tolist() == [0, 2, 7]

    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize(("window", "first"), [(None, 0), (20, 0), (20, 3)])
    def test_blocks_of_a_mask(self, causal, window, first):
        mask = Mask(90, causal, window, first)
        low = np.arange(0, 64, 16) + 26
        seen = visibility(
            jnp.arange(26, 90),
            jnp.arange(96),
            causal=causal,
            window=window,
            first=first,
        )
        seen = seen & (jnp.arange(96) < 90)[None]
        blocks = np.asarray(seen).reshape(4, 16, 12, 8).any((1, 3))
        assert (mask.blocks(low, low + 15, 8, 12) == blocks).all()


class TestKernels:
    """What discovery does not ask of the kernels: other gradients, empty rows."""

    def test_flash_rows_that_see_nothing(self):
        q, k, v = arrays(128, 128)
        ids = jnp.where(jnp.arange(128) < 64, 1, 2)[None]
        kernel = lambda *a: OPS["flash_attention"].on(  # noqa: E731
            "tpu", *a, (ids, jnp.ones_like(ids)), interpret=True
        )
        assert not kernel(q, k, v)[0, 64:].any()
        grads = jax.grad(lambda *a: kernel(*a).sum(), argnums=(0, 1, 2))(q, k, v)
        assert all(bool(jnp.isfinite(g).all()) for g in grads)
        assert not grads[0][0, 64:].any()

    def test_flash_windows_that_hold_no_key(self):
        """Queries before the first key; whole blocks of them, and a part of one."""
        q, k, v = arrays(300, 40)
        options = dict(causal=False, window=20)

        def both(run):
            loss = lambda *a: (jnp.sin(run(*a, **options)).sum(), run(*a, **options))  # noqa: E731
            return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)

        kernel = functools.partial(OPS["flash_attention"].on, "tpu", interpret=True)
        ((_, got), slopes), ((_, want), expected) = both(kernel), both(FLASH)
        assert not got[:, :241].any()
        near(got, want)
        for slope, wanted in zip(slopes, expected, strict=True):
            near(slope, wanted, 1e-4)

    def test_no_keys_give_zeros(self):
        q, k, v = (a[:, :n] for a, n in zip(arrays(5, 5), (5, 0, 0), strict=True))
        lists = jnp.zeros((1, 4, 1, 0), jnp.int32), jnp.zeros((1, 4, 1), jnp.int32)
        blocks = dict(block_q=16, block_k=16)
        with pallas_kernels.backend("tpu", interpret=True):
            made = [
                OPS["flash_attention"](q, k, v),
                OPS["block_sparse_attention"](q, k, v, *lists, **blocks),
                *OPS["decode_attention"](q[:, 0], k, v, jnp.array([3]), sums=True),
            ]
        assert [a.shape for a in made] == [q.shape, q.shape, (1, 4, 64), (1, 2, 0)]
        assert not any(a.any() for a in made)

    @pytest.mark.parametrize(
        ("name", "case", "wanted"),
        [
            ("flash_attention", "tiny/sinks-window", (1, 2, 4)),
            ("block_sparse_attention", "tiny/cap", (1, 2)),
        ],
    )
    def test_gradients_of_keys_values_and_sinks(self, name, case, wanted):
        op = OPS[name]
        (case,) = (c for c in op.cases if c.name == case)
        args = case.make(jax.random.key(5))

        def gradients(function):
            def loss(*chosen):
                changed = list(args)
                for place, value in zip(wanted, chosen, strict=True):
                    changed[place] = value
                return jnp.sin(function(*changed)).sum()

            places = tuple(range(len(wanted)))
            return jax.grad(loss, argnums=places)(*(args[n] for n in wanted))

        kernel = lambda *a: op.on("tpu", *a, interpret=True, **case.options)  # noqa: E731
        reference = lambda *a: op.reference(*a, **case.options)  # noqa: E731
        for got, want in zip(gradients(kernel), gradients(reference), strict=True):
            near(got, want, 1e-4)

    def test_decoding_from_an_empty_cache(self):
        q, k, v = arrays(1, 64, batch=2)
        got = OPS["decode_attention"].on(
            "tpu", q[:, 0], k, v, jnp.array([0, 64]), interpret=True
        )
        assert not got[0].any()
        near(got[1], FLASH(q, k, v)[1, 0])

    @pytest.mark.parametrize("platform", ["tpu", "gpu"])
    @pytest.mark.parametrize("window", [None, 8])
    def test_decoding_past_the_end_of_a_cache(self, platform, window):
        """A window may hold the last slots of it, or none; lengths are any integers."""
        op, (q, k, v) = OPS["decode_attention"], arrays(1, 96, batch=4)
        lengths = jnp.array([100, 104, 255, 3], jnp.uint8)
        args, options = (q[:, 0], k, v, lengths), dict(window=window, sums=True)
        if reason := op.missing(platform, *args, interpret=True, **options):
            pytest.skip(reason)
        got, sums = op.on(platform, *args, interpret=True, **options)
        want, counted = DECODE(*args, **options)
        if window:
            assert not want[1:3].any()
            assert counted.sum((1, 2)).tolist()[1:3] == [0, 0]
        near(got, want, 1e-3)
        near(sums, counted, 1e-3)


def held(layout, shape):
    """For each thread of a warpgroup, the elements in its registers, in their order."""
    layout = layout.to_mgpu()
    tiled = numbered(layout, shape)
    dims = (*layout.warp_dims, *layout.lane_dims)
    sizes = [tiled.shape[d] if isinstance(d, int) else d.times for d in dims]
    assert np.prod(sizes) == 128
    found = []
    for thread in np.ndindex(*sizes):
        at = [slice(None)] * tiled.ndim
        for dim, index in zip(dims, thread, strict=True):
            if isinstance(dim, int):
                at[dim] = index
        found.append(tiled[tuple(at)].ravel())
    return np.stack(found)


class TestCodesOnHopper:
    """What the interpreter does not see: registers, and zero points of other kinds."""

    @pytest.mark.parametrize("bits", [1, 2, 4, 8])
    def test_codes_become_floats(self, bits):
        magic = Word(gpu_codes.HALF_1024 * 0x00010001)
        for word in [*np.random.default_rng(bits).integers(2**32, size=99), 2**32 - 1]:
            for j, low in enumerate(gpu_codes.lows(bits)):
                pair = gpu_codes.halves_of(Word(int(word)), magic, bits, j).value
                got = np.array([pair], "<u4").view(np.float16)
                codes = [int(word) >> s + bits * j & (2**bits - 1) for s in (0, 16)]
                assert got.tolist() == [1024 + 2**low * code for code in codes]

    @pytest.mark.parametrize("bits", [2, 4, 8])
    @pytest.mark.parametrize("width", [64, 128, 192, 256])
    def test_scales_meet_their_channels(self, bits, width):
        """The registers of a head's scales, cut by place, are those of the queries."""
        if width * bits % 256:
            pytest.skip("refused: fewer than 16 words")
        own = gpu_codes.Channels.of(bits, width)
        loaded = held(own.whole, (width,)).reshape(128, -1, 2, own.places)
        words = held(own.row, (own.words,)).reshape(128, -1, 2)
        queries = held(own.pair, (8, own.words)).reshape(128, -1, 2)
        assert (queries % own.words == words).all()
        for j in range(own.places):
            assert (loaded[..., j] == own.places * words + j).all()

    def test_zero_points_may_be_fractions(self):
        """As of the models' one bit, whose codes stand for -1/2 and 1/2."""
        bits = 1
        keys = jax.random.split(jax.random.key(2), 8)
        shape = (1, 128, 1, 256 // bits)
        q = jax.random.normal(keys[0], (1, 2, shape[3]))

        def cache(codes, scale, zero):
            return QuantizedCache(
                (jax.random.bits(codes, (*shape[:3], 32), jnp.uint8),),
                jax.random.uniform(scale, (*shape[:3], 1), minval=0.1, maxval=0.2),
                jax.random.uniform(zero, (*shape[:3], 1), maxval=2.0**bits),
                bits,
            )

        args = q, cache(*keys[1:4]), cache(*keys[4:7]), jnp.array([100])
        try:
            got = gpu.decode_attention(
                *args, interpret=True, tuning=gpu.Tuning(stages=2, splits=2)
            )
        except NotImplementedError as reason:
            pytest.skip(str(reason))
        want = DECODE(*args)
        assert jnp.linalg.norm(got - want) < 2e-3 * jnp.linalg.norm(want)


IDS, LONG = np.ones((1, 16), np.int32), np.array([16], np.int32)


def on_tpu(name: str, *args):
    return OPS[name].on("tpu", *args, interpret=True)


def twice(a):
    return jnp.concatenate((a, a))


def third(cache):
    """Codes of eight bits, with five scales for sixteen slots."""
    return QuantizedCache((cache.astype(jnp.uint8),), cache[:, :5, :, :1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k, v: FLASH(q, k, v, window=0), "window 0"),
        (lambda q, k, v: FLASH(q, k, v, first=4), "first 4"),
        (lambda q, k, v: FLASH(q[:, :, :3], k, v), "multiple of groups"),
        (lambda q, k, v: on_tpu("flash_attention", q, k, v, (IDS, IDS[:, 1:])),
         r"segments \(\(1, 16\), \(1, 15\)\)"),
        (lambda q, k, v: on_tpu("flash_attention", *map(twice, (q, k, v)), (IDS, IDS)),
         r"accepted: \(\(2, 16\), \(2, 16\)\)"),
        (lambda q, k, v: on_tpu("flash_attention", q, k, v, None, jnp.ones(2)),
         r"sinks \(2,\); accepted: \(4,\)"),
        (lambda q, k, v: on_tpu("decode_attention", q[:, 0], k, v, LONG, None,
                                jnp.ones(2)), r"sinks \(2,\)"),
        (lambda q, k, v: on_tpu("decode_attention", q[:, 0], k, v, LONG * 1.0),
         r"lengths float32\[1\]; accepted: integers"),
        (lambda q, k, v: on_tpu("decode_attention", q[:, 0], k, v, LONG, LONG),
         r"pages int32\[1\]"),
        (lambda q, k, v: on_tpu("decode_attention", q[:, 0], third(k), v, LONG),
         r"scale or zero \(1, 5, 2, 1\)"),
        (lambda q, k, v: top_blocks(q, k, block_q=8, block_k=8, keep=1), "keep 1"),
        (lambda q, k, v: block_index(jnp.ones((1, 1, 2, 2), bool), 3), "width 3"),
    ],
)  # fmt: skip
def test_refusals_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call(*arrays(16, 16))
