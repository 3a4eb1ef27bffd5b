"""The Hopper kernels beyond values: bits, tiles, what the compiler keeps in memory."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import compat, hopper, tuning
from pallas_kernels.gated_matmul import gpu as gated
from pallas_kernels.gated_matmul.reference import gated_matmul
from pallas_kernels.hadamard_quantize import gpu as hadamard
from pallas_kernels.hadamard_quantize.cases import make as hadamard_inputs
from pallas_kernels.hadamard_quantize.reference import hadamard_quantize
from pallas_kernels.nm_matmul import fragments as expansion
from pallas_kernels.plane_matmul import fragments as ternary
from pallas_kernels.plane_matmul import gpu as plane_gpu
from pallas_kernels.plane_matmul import gpu_trits
from pallas_kernels.plane_matmul.cases import make as plane_inputs
from pallas_kernels.plane_matmul.reference import plane_matmul
from pallas_kernels.plane_product import fragments as integers
from pallas_kernels.planes import parts
from pallas_kernels.quantized_matmul import fragments, gpu_plan
from pallas_kernels.quantized_matmul.cases import NF4
from pallas_kernels.shapes import Linear

REPOSITORY = Path(__file__).resolve().parent.parent
BENCHMARK = REPOSITORY / "experiments" / "kernels"


class Word:
    """What the GPU's instructions do to a register, on an integer."""

    def __init__(self, value: int):
        self.value = value & 0xFFFFFFFF

    @classmethod
    def constant(cls, value: int) -> Word:
        return cls(value)

    def __and__(self, other: int | Word) -> Word:
        return Word(self.value & (other if isinstance(other, int) else other.value))

    def __mul__(self, factor: int) -> Word:
        return Word(self.value * factor)

    def __or__(self, other: int | Word) -> Word:
        return Word(self.value | (other if isinstance(other, int) else other.value))

    def __xor__(self, mask: int) -> Word:
        return Word(self.value ^ mask)

    def __lshift__(self, count: int) -> Word:
        return Word(self.value << count)

    def __rshift__(self, count: int) -> Word:
        return Word(self.value >> count)

    def permuted(self, other: Word, select) -> Word:
        """PTX ISA, prmt, default mode without sign replication."""
        select = select if isinstance(select, int) else select.value
        source = self.value.to_bytes(4, "little") + other.value.to_bytes(4, "little")
        nibbles = [select >> 4 * i & 15 for i in range(4)]
        assert max(nibbles) < 8, "the fourth bit would replicate the sign"
        return Word(int.from_bytes(bytes(source[n] for n in nibbles), "little"))

    def minus(self, other: Word) -> Word:
        difference = (self.floats() - other.floats()).astype(ml_dtypes.bfloat16)
        return Word(int(difference.view("<u4")[0]))

    def floats(self) -> np.ndarray:
        pair = np.array([self.value], "<u4").view(ml_dtypes.bfloat16)
        return pair.astype(np.float32)


def four_bytes(*values: int) -> Word:
    return Word(int.from_bytes(bytes(v & 255 for v in values), "little"))


def floats(pairs) -> list[float]:
    return [float(value) for word in pairs for value in word.floats()]


def numbered(layout, shape):
    """The elements of an array, numbered, in the order of a layout's axes."""
    tiled = np.arange(np.prod(shape)).reshape(shape)
    for tile in layout.tiling.tiles:
        lead, last = tiled.shape[: -len(tile)], tiled.shape[-len(tile) :]
        split = [n for size, t in zip(last, tile, strict=True) for n in (size // t, t)]
        k, axes = len(lead), range(len(lead), len(lead) + 2 * len(tile))
        order = (*range(k), *axes[::2], *axes[1::2])
        tiled = tiled.reshape(*lead, *split).transpose(order)
    return tiled


def held(layout, columns: int):
    """For each lane, the elements of 64 rows in its registers, in their order."""
    tiled = numbered(layout, (64, columns))
    lanes = (*layout.warp_dims, *layout.lane_dims)
    tiled = np.moveaxis(tiled, lanes, range(len(lanes)))
    return tiled.reshape(128, -1, tiled.shape[-1])


class TestFragments:
    """Every byte value, through the instructions that the kernel emits."""

    @pytest.mark.parametrize("part", (1, 2, 4, 8))
    def test_digits(self, part):
        rng = np.random.default_rng(part)
        for value in range(256):
            four = [value, *map(int, rng.integers(0, 256, 3))]
            word = Word(int.from_bytes(bytes(four), "little"))
            for place in range(8 // part):
                digits = [byte >> part * place & (2**part - 1) for byte in four]
                base = -128 if part == 8 else 128
                want = [digit + base for digit in digits]
                assert floats(fragments.digit_pairs(word, part, place)) == want

    def test_levels(self):
        table = np.asarray(NF4, ml_dtypes.bfloat16)
        bits = table.view(np.uint16)
        for value in range(256):
            four = [value, 255 - value, value ^ 0x5A, 7 * value % 256]
            word = Word(int.from_bytes(bytes(four), "little"))
            low, high = fragments.level_pairs(word, bits)
            assert floats(low) == [float(table[byte & 15]) for byte in four]
            assert floats(high) == [float(table[byte >> 4]) for byte in four]

    @pytest.mark.parametrize("bits", (1, 2, 3, 4))
    def test_entries(self, bits):
        """A table of any floats, in words that a kernel splits into their bytes."""
        part = parts(bits)[0]
        rng = np.random.default_rng(bits)
        table = rng.normal(size=2**bits).astype(ml_dtypes.bfloat16)
        stored = [Word(int(word)) for word in table.view("<u4")]
        low, high = fragments.bytes_of(stored)
        for value in range(256):
            four = [value, 255 - value, value ^ 0x5A, 7 * value % 256]
            extra = int(rng.integers(2**16))
            below = Word(extra) if bits == 3 else None
            found = fragments.entry_pairs(four_bytes(*four), below, low, high, part)
            assert len(found) == 8 // part
            for place, pairs in enumerate(found):
                codes = [byte >> part * place & (2**part - 1) for byte in four]
                if bits == 3:
                    ones = [extra >> 4 * k + place & 1 for k in range(4)]
                    codes = [2 * c + o for c, o in zip(codes, ones, strict=True)]
                assert floats(pairs) == [float(table[code]) for code in codes]

    def test_halves(self):
        """Threads hold the same inputs of a plane of one bit as of one of two."""
        whole, half = fragments.WORDS.to_mgpu(), fragments.HALVES.to_mgpu()
        for wide, narrow in zip(held(whole, 32), held(half, 16), strict=True):
            assert (wide[..., ::2] // 2 == narrow).all()
            assert (np.diff(wide, axis=-1) == 1).all()

    @pytest.mark.parametrize("m", (4, 8))
    def test_kept_values(self, m):
        """Every mask that a group can have, beside another's."""
        rng = np.random.default_rng(m)
        kept = rng.normal(size=8).astype(ml_dtypes.bfloat16)
        words = [Word(int(word)) for word in kept.view("<u4")]
        groups = [g for g in range(2**m) if g.bit_count() == m // 2]
        for one, other in zip(groups, groups[1:] + groups[:1], strict=True):
            flags = one | other << m
            flags |= flags << 8 if m == 4 else 0
            bits = np.array([flags >> i & 1 for i in range(16)], bool)
            want = np.zeros(16, np.float32)
            want[bits] = kept
            assert floats(expansion.placed(words, Word(flags), m)) == want.tolist()

    def test_pairs_of_codes(self):
        for value in range(256):
            four = [value, 255 - value, value ^ 0x5A, 7 * value % 256]
            nibbles = [n for byte in four for n in (byte & 15, byte >> 4)]
            for zero in (8, 3):
                less = [Word(expansion.doubled(128.0 + zero))]
                pairs = expansion.code_pairs(four_bytes(*four), less)
                assert floats(pairs) == [n - zero for n in nibbles]

    @pytest.mark.parametrize("itemsize", (2, 4))
    def test_flags_and_values_meet(self, itemsize):
        """A thread's two bytes of flags are of the inputs that its values belong to."""
        values = held(expansion.value_layout(itemsize).to_mgpu(), 128)
        flags = held(fragments.HALVES.to_mgpu(), 32)
        owned = values.reshape(*flags.shape[:2], 8)
        assert (owned[..., ::4] // 4 == flags).all()
        assert (np.diff(owned, axis=-1) == 1).all()
        order = np.asarray(fragments.permute(jnp.arange(64), 4)).reshape(4, 16)
        for q, start in enumerate((0, 32, 16, 48)):
            own = order[:, [2 * q, 2 * q + 1, 2 * q + 8, 2 * q + 9]]
            assert own.ravel().tolist() == list(range(start, start + 16))

    def test_columns(self):
        """Thread q loads bytes 4b..4b+3 and wgmma takes them as 2q, 2q+1, 2q+8, 2q+9.

        b is read off the load's layout (lanes run over rows, halves, blocks), as in
        the library's own exchange of registers for 8-bit operands.
        """
        order = np.asarray(fragments.permute(jnp.arange(32)))
        for q, start in enumerate((0, 8, 4, 12)):
            held = order[[2 * q, 2 * q + 1, 2 * q + 8, 2 * q + 9]]
            assert held.tolist() == [start, start + 1, start + 2, start + 3]
        assert sorted(order.tolist()) == list(range(32))
        assert (order[16:] == order[:16] + 16).all()


class TestIntegers:
    """Int8 operands of packed codes, through the instructions that the kernel emits."""

    @pytest.fixture(autouse=True)
    def add_integers(self, monkeypatch):
        def affine(word, factor, term):
            return Word(word.value * (factor.value if factor else 1) + term.value)

        monkeypatch.setattr(integers, "affine", affine)

    @staticmethod
    def signed(word) -> list[int]:
        return list(np.array([word.value], "<u4").view(np.int8))

    @pytest.mark.parametrize("bits", range(1, 9))
    def test_codes_of_several_planes(self, bits):
        rng, widths = np.random.default_rng(bits), parts(bits)
        places = 8 // widths[0]
        for _ in range(100):
            codes = rng.integers(0, 2**bits, 4 * places)
            words, above = [], bits
            for part in widths:
                above -= part
                fields = codes >> above & (2**part - 1)
                packed = sum(int(f) << part * i for i, f in enumerate(fields))
                words.append(Word(packed))
            made = integers.centred_words(words, bits)
            want = (codes - 2 ** (bits - 1)) * 2 ** (8 - bits)
            got = np.array([self.signed(word) for word in made])
            assert (got.T.ravel() == want).all()

    @pytest.mark.parametrize("zero", (0, 1, 8, 15))
    def test_scaled_codes(self, zero):
        """Every code and scale whose product is an int8, beside any others."""
        for scale in (*range(1, 20), 63, 127, 0, -1, -8):
            term = Word((-(zero * scale) & 255) * 0x00010001)
            for code in range(16):
                other = 15 - code
                word = four_bytes(*(code | other << 4, other | code << 4) * 2)
                low, high = integers.scaled_words(word, Word(scale & 255), term)
                one, two = ((c - zero) * scale for c in (code, other))
                for value, found in ((one, 0), (two, 1)):
                    if -128 <= value <= 127:
                        assert self.signed(low)[found::2] == [value] * 2
                        assert self.signed(high)[1 - found :: 2] == [value] * 2

    def test_codes_less_zero_points(self):
        for zero in (*range(16), 127):
            term = Word(-zero * 0x01010101)
            for value in range(256):
                four = [value, 255 - value, value ^ 0x5A, 7 * value % 256]
                low, high = integers.shifted_words(four_bytes(*four), term)
                assert self.signed(low) == [(byte & 15) - zero for byte in four]
                assert self.signed(high) == [(byte >> 4) - zero for byte in four]

    @pytest.mark.parametrize("count", (1, 2))
    def test_planes_meet(self, count):
        """A thread's bytes of a narrow plane are of the inputs that it has anyway."""
        whole, narrow = (integers.layout(n).to_mgpu() for n in (4, count))
        assert whole == integers.OUT.to_mgpu()
        ratio = 4 // count
        for wide, few in zip(held(whole, 64), held(narrow, 64 // ratio), strict=True):
            assert (wide[..., ::ratio] // ratio == few).all()

    def test_order_of_x(self):
        """Operand columns: the first code of every byte, then the second, ..."""
        order = np.asarray(integers.by_field(jnp.arange(256), 2)).reshape(2, 2, 64)
        assert (order[0, 0] == np.arange(0, 128, 2)).all()
        assert (order[1, 1] == np.arange(129, 256, 2)).all()


class TestTrits:
    """Five trits of a byte, through the instructions that the kernel emits."""

    @pytest.fixture(autouse=True)
    def fuse_floats(self, monkeypatch):
        def fused(kind, value, factor, term):
            dtype = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}[kind]
            a, b, c = (
                np.array([word.value], "<u4").view(dtype).astype(np.float64)
                for word in (
                    word if isinstance(word, Word) else Word(word or 0)
                    for word in (value, factor, term)
                )
            )
            made = (a * (1 if factor is None else b) + c).astype(dtype)
            return Word(int(made.view("<u4")[0]))

        monkeypatch.setattr(ternary, "fused", fused)

    @staticmethod
    def digits(bytes, place: int) -> list[int]:
        return [byte // 3**place % 3 - 1 for byte in bytes]

    def test_every_byte(self):
        for value in range(243):
            four = [value, 242 - value, 7 * value % 243, 100]
            for place, pairs in enumerate(ternary.trit_pairs(four_bytes(*four))):
                found = [128 * trit for trit in floats(pairs)]
                assert found == self.digits(four, place)

    @pytest.mark.parametrize("block", (None, 128, 100))
    def test_sums_of_scaled_planes(self, block):
        """Each input of a thread meets the scale of its own region."""
        rng, count = np.random.default_rng(3), ternary.regions(block)
        size = ternary.OWN // count
        bytes = rng.integers(0, 243, (2, 16))
        scales = rng.integers(1, 16, (2, count)).astype(np.float32)
        doubled = np.repeat(128 * scales, 2, 1).astype(ml_dtypes.bfloat16)
        words = [[Word(int(word)) for word in row] for row in doubled.view("<u4")]
        for tile in range(4):
            four = bytes[:, 4 * tile : 4 * tile + 4]
            packed = [four_bytes(*map(int, row)) for row in four]
            for place, pairs in enumerate(ternary.scaled_pairs(packed, words, tile)):
                inputs = (4 * tile + np.arange(4)) * 5 + place
                by = scales[:, inputs // size]
                want = (by * np.array([self.digits(row, place) for row in four])).sum(0)
                assert floats(pairs) == want.tolist()

    def test_order_of_x(self):
        """The bytes that a thread reads are of its columns in wgmma's order."""
        order = np.asarray(ternary.in_order(jnp.arange(320)[None]))[0]
        columns = held(fragments.OUT.to_mgpu(), 320) % 320
        for thread, own in enumerate(columns):
            inputs, first = np.unique(order[own]), 80 * (thread % 4)
            assert inputs.tolist() == list(range(first, first + 80))
        for place, tile, q, byte in np.ndindex(5, 4, 4, 4):
            column = 64 * place + 16 * tile + 8 * (byte // 2) + 2 * q + byte % 2
            assert order[column] == 5 * (16 * q + 4 * tile + byte) + place

    def test_default_tuning(self):
        """It fits, whole tiles are of whole rows of x, and few rows fill the chip."""
        sizes = (1, 2, 6, 16, 100, 2048), (256, 4096, 14336), (64, 4096), (1, 2, 3)
        blocks = None, 16, 64, 100, 128, 512
        for rows, inputs, outputs, count in itertools.product(*sizes):
            for block, exact in itertools.product(blocks, (False, True)):
                shape = rows, inputs, outputs, block, count, exact
                made = gpu_trits.default_tuning(*shape)
                stage = gpu_trits._stage(made.rows, made.warpgroups, count)
                lanes = 64 * made.warpgroups
                result = lanes * made.rows * (2 if made.splits == 1 else 4)
                assert made.stages * stage + result <= hopper.SHARED - 2048
                steps = -(-inputs // gpu_trits.STEP)
                assert made.stages > 1 or steps <= made.splits
                if made.sums:
                    assert made.rows % gpu_trits._columns(block, made.inputs) == 0


class TestTuning:
    """Default rules stay inside the machine; tables are checked when read."""

    @pytest.mark.parametrize(
        "name",
        (
            "nm_matmul",
            "plane_product",
            "quantized_matmul",
            "scaled_matmul",
            "table_matmul",
            "two_level_matmul",
        ),
    )
    def test_default_fits(self, name):
        op = pallas_kernels.ops()[name]
        module = sys.modules[f"pallas_kernels.{name}.gpu"]
        seen = 0
        for case in op.cases:
            if case.tiny:
                continue
            x, outputs = case.shapes[0], jax.tree.leaves(case.shapes[1])[0].shape[0]
            block = case.options.get("block") or x.shape[1]
            if name == "nm_matmul":
                stored = jax.tree.leaves(case.shapes[2])[0]
                size = stored.dtype.itemsize * stored.shape[1] / x.shape[1]
                last = block, size
            elif name == "scaled_matmul":
                last = block, x.dtype
            elif name == "two_level_matmul":
                last = (block,)
            elif name == "plane_product":
                last = (case.options["bits"],)
            else:
                last = case.options["bits"], block
            made = module.default_tuning(*x.shape, outputs, *last)
            steps = x.shape[1] // made.inputs
            assert steps * made.inputs == x.shape[1]
            assert steps % made.splits == 0
            assert 1 <= made.stages <= steps // made.splits
            assert outputs % (64 * made.warpgroups) == 0
            blocks = -(-x.shape[0] // made.rows) * outputs // (64 * made.warpgroups)
            if x.shape[0] <= 16:
                busy = blocks * made.splits / hopper.PROCESSORS
                assert busy >= 1 or steps // made.splits < 8, f"{case}: {busy:.2f}"
            seen += 1
        assert seen > 10

    def test_refusals_say_why(self):
        plane = np.zeros((64, 128), np.uint8)
        with pytest.raises(NotImplementedError, match="100 outputs"):
            gpu_plan.refuse(256, 100, 4, None, None, (plane,))
        with pytest.raises(NotImplementedError, match="8 bytes of the 4-bit plane"):
            gpu_plan.refuse(256, 64, 4, 16, None, (plane,))
        with pytest.raises(NotImplementedError, match="only 4 bits"):
            gpu_plan.refuse(256, 64, 2, None, (0.0, 1.0), (plane,))
        with pytest.raises(NotImplementedError, match="16n"):
            gpu_plan.refuse(172, 64, 4, None, None, (plane[:, :86],))

    def test_table(self):
        good = {"quantized_matmul": {"1x4096x4096x4x128": {"rows": 8, "stages": 4}}}
        assert tuning.validate(good, "t.json") is good
        assert tuning.slug("NVIDIA H200") == "nvidia-h200"
        assert tuning.key((1, 4096)) == "1x4096"
        for bad in ([], {"op": 3}, {"op": {"1x": {"a": 1}}}, {"op": {"1": {"a": -1}}}):
            with pytest.raises(ValueError, match=r"t\.json"):
                tuning.validate(bad, "t.json")

    def test_committed_tables_name_real_fields(self):
        folder = Path(tuning.__file__).parent / "tuning"
        for file in folder.glob("*.json"):
            for op, entries in tuning.table(file.stem).items():
                module = sys.modules[f"pallas_kernels.{op.partition('-')[0]}.gpu"]
                for fields in entries.values():
                    assert module.Tuning(**fields).rows > 0
        assert tuning.table("no-such-device") == {}


DENSE = """
import jax, jax.numpy as jnp
from pallas_kernels import aot, ops
op = ops()[{op!r}]
device = aot.target("cuda", "h200")
for case in op.cases:
    if case.name in {cases!r}:
        run = lambda *a: op.on("gpu", *a, **case.options)
        print("CASE", case.name)
        print(aot.compile_for(device, run, *case.shapes).as_text())
"""


def compiled_text(op: str, cases: tuple[str, ...]) -> dict[str, str]:
    """The programs of these cases."""
    parts = output_of(DENSE.format(op=op, cases=cases)).split("CASE ")[1:]
    return {part.partition("\n")[0]: part for part in parts}


def output_of(code: str) -> str:
    """What ``code``, which compiles for CUDA, prints in a process of its own."""
    pytest.importorskip("jax_cuda13_plugin", reason="no CUDA plugin (extra cuda-aot)")
    return run_apart("-c", code, XLA_FLAGS="")


def run_apart(*command: str | Path, **variables: str) -> str:
    """What another Python process, with these in its environment, prints."""
    run = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **variables},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


PACKED = {
    "quantized_matmul": (
        "llama3-8b/o/w4-g128-asym/m16",
        "llama3-8b/gate_up/w3-g128-sym/m1",
    ),
    "nm_matmul": ("llama3-8b/o/2of4-float/m1", "llama3-8b/o/2of4-w4-g128/m1"),
    "table_matmul": ("llama3-8b/o/table4-channel/m1", "llama3-8b/o/table4-g128/m256"),
    "two_level_matmul": (
        "llama3-8b/o/w4a8-g128-asym/m16",
        "llama3-8b/gate_up/w4a8-g128-asym/m1",
    ),
    "plane_product": ("llama3-8b/gate_up/w3a8/m1", "llama3-8b/gate_up/w4a8/m16"),
    "plane_matmul": ("llama3-8b/o/trits2-g128/m1", "llama3-8b/o/trits2-g128/m256"),
    "scattered_matmul": ("llama3-8b/o/1.00%/m1", "llama3-8b/gate_up/1.00%/m1"),
}


@pytest.mark.parametrize("op", PACKED)
def test_no_dense_weight_and_no_copy_of_planes(op):
    """Nothing as large as W in floats exists, and what is stored is not copied."""
    found = compiled_text(op, PACKED[op])
    assert sorted(found) == sorted(PACKED[op])
    for name, text in found.items():
        outputs = 4096 if "/o/" in name else 28672
        weight = outputs * 4096
        for line in text.splitlines():
            made = re.search(r"= (bf16|f16|f32|s8|s32|u8|u32)\[([\d,]+)\]", line)
            if made is None or re.search(r"\b(parameter|bitcast)\(", line):
                continue
            size = np.prod([int(n) for n in made[2].split(",")])
            most = weight / 8 if made[1][0] != "u" else 4096
            assert size <= most, f"{name}: {line}"
        assert "mosaic" in text


def test_timed_calls_stay_in_the_loop():
    """The compiler may not take the measured kernel out of the timing loop."""
    code = f"""
import sys
sys.path.insert(0, {str(BENCHMARK)!r})
import jax, jax.numpy as jnp, timing
from pallas_kernels import aot, ops
op = ops()["quantized_matmul"]
case = next(c for c in op.cases if c.name == "llama3-8b/o/w4-g128-asym/m16")
run = timing.repeated(lambda *a: op.on("gpu", *a, **case.options))
numbers = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
device = aot.target("cuda", "h200")
print(aot.compile_for(device, run, [case.shapes] * 2, *numbers).as_text())
"""
    text = output_of(code)
    entry = text.partition("\nENTRY ")[2]
    target = 'custom_call_target="mosaic'
    assert text.count(target) == 2
    assert target not in entry


OUTLIERS = """
from pallas_kernels import aot, ops
kinds = ("quantized_matmul", "llama3-8b/{w}/w4-g128-asym/m{m}"), (
    "scattered_matmul", "llama3-8b/{w}/1.00%/m{m}")
picked = [(ops()[op], next(c for c in ops()[op].cases if c.name == name))
          for op, name in kinds]
(packed, first), (few, second) = picked
x, rest, listed = first.shapes[0], first.shapes[1:], second.shapes[1]
main = lambda x, rest, _: packed.on("gpu", x, *rest, **first.options)
outliers = lambda x, _, listed: few.on("gpu", x, listed, **second.options)
both = lambda *a: main(*a) + outliers(*a)
device = aot.target("cuda", "h200")
for run in (main, both):
    print("CASE", aot.compile_for(device, run, x, rest, listed).as_text())
"""


@pytest.mark.parametrize(("rows", "steps"), [(1, 1), (16, 2)])
def test_outliers_are_added_where_the_packed_product_is_summed(rows, steps):
    """XLA adds them in the step that sums the parts of the packed product anyway.

    Before their own kernel one step finds the groups of each stripe, and where x has
    several rows one turns it.
    """
    texts = output_of(OUTLIERS.format(w="down", m=rows)).split("CASE ")[1:]
    entries = [text.partition("\nENTRY ")[2] for text in texts]
    alone, both = ([*re.findall(r" (fusion|custom-call)\(", e)] for e in entries)
    assert both.count("custom-call") == alone.count("custom-call") + 1 == 2
    assert both.count("fusion") == alone.count("fusion") + steps
    (last,) = (line for line in entries[1].splitlines() if "ROOT" in line)
    made = re.findall(r"%([\w.]+) = .* custom-call\(", entries[1])
    assert "fusion(" in last and all(f"%{name}" in last for name in made), last


def benchmark(program: str, *options: str, out: Path) -> dict:
    """What a program of ``experiments/kernels`` writes, run on the CPU."""
    command = BENCHMARK / program, *options, "--out", out
    run_apart(*command, PYTHONPATH=str(REPOSITORY))
    return json.loads(out.read_text())


def test_benchmark_runs_here(tmp_path):
    """The program measures the tiny cases of one op on a CPU, against float64."""
    out = tmp_path / "results.json"
    only = "quantized_matmul/tiny/square/w4-g128-sym/m1"
    data = benchmark("run.py", "--only", only, "--seed", "5", out=out)
    assert data["environment"]["seed"] == 5
    assert data["ceilings"]["bytes_per_second"] > 0
    (row,) = data["rows"]
    assert f"{row['op']}/{row['case']}" == only
    assert row["status"] == "measured"
    assert row["against"].startswith("float64")
    assert 0 < row["error"] <= 1e-2
    assert row["seconds"] > 0 and row["input_sets"] >= 4
    assert row["bytes_per_second"] == row["bytes"] / row["seconds"]


def test_decoding_is_measured_side_by_side(tmp_path):
    """Both of ours on a CPU, with the ratio; a side that cannot run says why."""
    out = tmp_path / "decode.json"
    data = benchmark("decode.py", "--only", "jaxllm", out=out)
    four, dense = (row["tokens_per_second"] for row in data["rows"])
    assert data["jaxllm w4 over"] == {"jaxllm dense": four / dense}
    data = benchmark("decode.py", "--only", "int4", out=out)
    assert [row["status"] for row in data["rows"]] == ["not run"]


def test_tuner_offers_possible_tiles():
    """Candidates contain the default and keep to whole steps."""
    code = f"""
import sys
sys.path.insert(0, {str(BENCHMARK)!r})
import tune, pallas_kernels
names = "plane_product", "quantized_matmul", "scaled_matmul", "table_matmul"
for name in (*names, "two_level_matmul"):
    op = pallas_kernels.ops()[name]
    for case in op.cases:
        of = None if case.tiny else tune.subject(op, case)
        if of is None or "8b/down" not in case.name:
            continue
        found = tune.candidates(of)
        assert of.default in found, (case.name, of.default)
        assert len(found) > 8, (case.name, len(found))
        for t in found:
            assert of.shape[1] % (t.inputs * t.splits) == 0
print("done")
"""
    assert "done" in run_apart("-c", code)


@pytest.mark.skipif(compat.VERSION < (0, 11), reason="jax 0.10 has no interpreter")
class TestBfloat16:
    """What tiny cases, all of float32, leave out: exact operands, rings that wrap."""

    @pytest.mark.parametrize(
        ("a", "b", "bits", "clip", "unit", "tuned"),
        [
            (72, 64, 8, 1.0, 1.0, hadamard.Tuning(2, blocks=1)),
            (16, 128, 4, 0.9, 1e-20, hadamard.Tuning(1, terms=2, blocks=1)),
        ],
        ids=["int8", "int4"],
    )
    def test_codes(self, a, b, bits, clip, unit, tuned):
        """Several tokens a team, one of zeros; a factor beyond float16's range."""
        sizes = dict(rows=5, width=a * b, a=a, b=b, dtype=jnp.bfloat16)
        x, left, right = hadamard_inputs(jax.random.key(3), **sizes)
        x, right = x.at[1].set(0), (right * unit).astype(jnp.bfloat16)
        options = dict(bits=bits, clip=clip)
        codes, scale = hadamard.hadamard_quantize(
            x, left, right, interpret=True, tuning=tuned, **options
        )
        wanted, by = hadamard_quantize(x, left, right, **options)
        exact = tuned.terms > 1
        np.testing.assert_allclose(scale, by, rtol=1e-5 if exact else 1e-3)
        assert codes.dtype == wanted.dtype
        codes, wanted = (np.asarray(c).astype(int) for c in (codes, wanted))
        if bits == 4:
            codes, wanted = (np.stack((c & 15, c >> 4)) for c in (codes, wanted))
        gap = np.abs(codes - wanted)
        assert gap.max() <= 1
        assert (gap > 0).mean() <= (1e-3 if exact else 0.01)

    @pytest.mark.parametrize(
        ("rows", "inputs", "count", "block", "tuned"),
        [
            (2, 660, 2, 44, plane_gpu.Tuning(16, 320, 2, splits=2, warpgroups=1)),
            (9, 800, 2, 80, plane_gpu.Tuning(8, 320, 3, sums=False)),
            (3, 645, 1, None, plane_gpu.Tuning(8, 640, 2, sums=False)),
        ],
        ids=["blocks apart", "planes added", "channel"],
    )
    def test_trits(self, rows, inputs, count, block, tuned):
        """Steps, splits and tiles; rows of bytes that 4, 1 and 16 make a whole of."""
        shape = dict(rows=rows, linear=Linear("tiny", "t", inputs, 128), kind="trits")
        more = dict(count=count, block=block, bias=False, dtype=jnp.bfloat16)
        x, *rest = plane_inputs(jax.random.key(4), **shape, **more)
        options = dict(kind="trits", block=block)
        got = plane_gpu.plane_matmul(x, *rest, interpret=True, tuning=tuned, **options)
        want = plane_matmul(x.astype(jnp.float32), *rest, **options)
        assert got.dtype == jnp.bfloat16
        error = np.linalg.norm(got.astype(jnp.float32) - want)
        assert error <= 5e-3 * np.linalg.norm(want)

    @pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float32))
    def test_listed_blocks(self, dtype):
        keys, block = jax.random.split(jax.random.key(5), 3), 128
        x = jax.random.normal(keys[0], (3, 8 * block), jnp.bfloat16)
        w = jax.random.normal(keys[1], (8 * block, 128)).astype(dtype)
        index = jax.random.permutation(keys[2], 8).astype(jnp.int32)
        args, options = (x, w, index, jnp.int32(5)), dict(block=block)
        tuned = gated.Tuning(8, 64, stages=2, splits=3)
        got = gated.gated_matmul(*args, interpret=True, tuning=tuned, **options)
        want = gated_matmul(x.astype(jnp.float32), *args[1:], **options)
        assert got.dtype == jnp.bfloat16
        error = np.linalg.norm(got.astype(jnp.float32) - want)
        assert error <= 5e-3 * np.linalg.norm(want)


def test_rings_fit_in_shared_memory():
    """Whatever the sizes, and with two tiles on their way where that is possible."""
    sizes = (1, 20, 40, 100, 256, 512), (64, 4096, 28672), (0, 1, 2), (64, 128, 192)
    for rows, outputs, terms, block in itertools.product(*sizes):
        made = gated.default_tuning(rows, 32, outputs, block, terms)
        lanes = 64 * made.warpgroups
        stage = made.inputs * (2 * made.rows + (4 if terms else 2) * lanes)
        rest = 2 * terms * made.inputs * lanes + 4 * lanes * made.rows
        assert made.stages * stage + rest <= hopper.SHARED - 2048
        assert block % made.inputs == 0
        assert made.stages > 1
    for a in (16, 32, 112, 128, 160, 192):
        for rows in (1, 16, 2048):
            plan = hadamard.Plan(rows, a, a, 128, 8, 1.0, False, hadamard.Tuning(1))
            made = hadamard.default_tuning(plan, 1, hopper.PROCESSORS)
            full = plan._replace(tuning=made)
            assert full.bytes <= hopper.SHARED - hopper.RESERVED
            assert full.warpgroups <= 4, "128 registers a thread hold T and Y"
            assert rows > 132 or made.teams == 1
