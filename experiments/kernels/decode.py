"""Decoding one sequence: tokens a second of an 8B-shaped model, beside torch's.

    python experiments/kernels/decode.py [--only jaxllm] [--out decode.json]

Weights are random, each side has a process of its own, and all sides decode the same
numbers of tokens greedily: this library in 4 bits (groups of 128; the head stays as it
is) and bfloat16, ``transformers`` with its static cache, which it compiles into CUDA
graphs, and the same with torch's packed int4 product in place of all linear layers but
the head. On a CPU a tiny model in float32 stands in, so that the program itself can be
tested; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs some

import jax
import peers

from jaxllm import methods
from jaxllm.evaluate.efficiency import speed
from jaxllm.evaluate.environment import environment
from jaxllm.evaluate.render import rewrite
from jaxllm.models import Policy, Transformer, init
from jaxllm.models.hub.configs import write_config_data
from jaxllm.train.config import Uniform
from pallas_kernels import tuning

HERE = Path(__file__).resolve().parent
PROMPT, NEW, REPEATS = 128, 256, 5
SIDES = ("jaxllm w4", "jaxllm dense", "transformers dense", "transformers int4")


@dataclasses.dataclass(frozen=True)
class Size:
    """The shape of a model, its vocabulary, group size and data type."""

    shape: Uniform
    vocabulary: int
    group: int
    dtype: str

    @property
    def config(self) -> Transformer:
        made, policy = self.shape.build(self.vocabulary), Policy(self.dtype, self.dtype)
        return dataclasses.replace(made, policy=policy)


LARGE = Size(
    Uniform(4096, 32, 32, 8, 128, 14336, 500_000.0, tied=False, max_length=1024),
    vocabulary=128_256,
    group=128,
    dtype="bfloat16",
)
SMALL = Size(
    Uniform(64, 2, 4, 2, 16, 128, tied=False), vocabulary=512, group=32, dtype="float32"
)


def measure(side: str) -> dict:
    """The row of one side, measured in this process."""
    size = SMALL if jax.default_backend() == "cpu" else LARGE
    library, kind = side.split()
    run = ours if library == "jaxllm" else theirs
    try:
        return {"side": side} | run(size, kind != "dense")
    except (ImportError, NotImplementedError) as reason:
        return {"side": side, "status": "not run", "reason": str(reason)}


def ours(size: Size, packed: bool) -> dict:
    model = jax.jit(lambda key: init(size.config, key))(jax.random.key(0))
    if packed:
        model = methods.rtn(4, size.group)(model)
    found = speed(model, prompt_tokens=PROMPT, new_tokens=NEW, repeats=REPEATS)
    rate = {"tokens_per_second": found.decode, "spread": found.spread}
    return rate | {"status": "measured", "plain": found.plain}


def theirs(size: Size, packed: bool) -> dict:
    """The prompt cancels between a long and a short run of ``generate``."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = dict(bos_token_id=None, eos_token_id=None, pad_token_id=0)
    config = transformers.LlamaConfig(**write_config_data(size.config) | plain)
    torch.set_default_dtype(getattr(torch, size.dtype))
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).eval()
        ids = torch.randint(1, size.vocabulary, (1, PROMPT))
    if packed:
        pack_linears(torch, model, size.group)

    def took(count: int) -> float:
        start = time.perf_counter()
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            cache_implementation="static",
        )
        assert made.shape[1] == PROMPT + count, made.shape
        made.cpu()
        return time.perf_counter() - start

    lengths = 2, NEW
    for count in lengths * 3:  # compiles, then records graphs
        took(count)
    pairs = [[took(count) for count in lengths] for _ in range(REPEATS)]
    times = [long - short for short, long in pairs]
    middle = statistics.median(times)
    return {
        "status": "measured",
        "tokens_per_second": (NEW - lengths[0]) / middle,
        "spread": (max(times) - min(times)) / middle,
    }


def pack_linears(torch, model, group: int) -> None:
    """Random packed weights in place of every linear layer below the blocks."""
    if not torch.cuda.is_available():
        raise NotImplementedError("torch's packed int4 product is measured on CUDA")

    class Packed(torch.nn.Module):
        def __init__(self, dense):
            super().__init__()
            n, k = dense.out_features, dense.in_features
            packed, scales = peers.packed_int4(torch, n, k, group)
            self.register_buffer("packed", packed)
            self.register_buffer("scales", scales)

        def forward(self, x):
            rows = x.reshape(-1, x.shape[-1])
            product = torch.ops.aten._weight_int4pack_mm
            y = product(rows, self.packed, group, self.scales)
            return y.reshape(*x.shape[:-1], -1)

    for block in model.model.layers:
        for parent in list(block.modules()):
            for name, child in parent.named_children():
                if isinstance(child, torch.nn.Linear):
                    setattr(parent, name, Packed(child))


def apart(side: str) -> dict:
    """``measure`` in a process of its own: the last line that it prints."""
    command = [sys.executable, __file__, "--side", side]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        return {"side": side, "status": "failed", "reason": run.stderr[-800:]}
    return json.loads(run.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of a side's name")
    parser.add_argument("--out", type=Path, help="default: decode-<device>.json here")
    parser.add_argument("--side", choices=SIDES, help="measure one and print its row")
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side)))
        return 0
    rows = []
    for side in (side for side in SIDES if options.only in side):
        rows.append(apart(side))
        print(json.dumps(rows[-1]), flush=True)
    rates = {row["side"]: row.get("tokens_per_second") for row in rows}
    first = rates.pop(SIDES[0], None)
    ratios = {side: first / rate for side, rate in rates.items() if first and rate}
    head = {
        "environment": environment(seed=0),
        "peers": peers.versions(),
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
    }
    slug = tuning.slug(jax.devices()[0].device_kind)
    path = options.out or HERE / f"decode-{slug}.json"
    found = head | {"rows": rows, f"{SIDES[0]} over": ratios}
    rewrite(path, json.dumps(found, indent=1) + "\n")
    return any(row["status"] == "failed" for row in rows)


if __name__ == "__main__":
    raise SystemExit(main())
