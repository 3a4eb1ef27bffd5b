"""Peak memory and wall time of quantizing a 1B-shaped Llama, against plain PyTorch.

    python experiments/weights/large.py [--layers 2] [--only gptq]

Random weights of Llama-3.2-1B's shape (layers of 2048 / 8192, 32 heads, 8 key-value
heads; few layers and a small vocabulary, stated in the JSON) go to a Hugging Face
folder; each method reads it in a process of its own, quantizes it (4 bits, groups of
128) with the same calibration tokens and reports seconds, resident memory before and at
its peak, and how far the logits moved. ``torch`` is GPTQ as published, in
``torch_gptq.py``. Writes ``large.json`` and ``large.md`` beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
METHODS = ("rtn", "awq", "gptq", "torch")
WIDTH, HIDDEN, HEADS, KV_HEADS, VOCABULARY = 2048, 8192, 32, 8, 4096
BITS, GROUP = 4, 128
SEED = 0


def make(folder: Path, options) -> None:
    """The model's folder and the calibration tokens [samples, length]."""
    import jax

    from jaxllm.models import MLP, Attention, Layer, Transformer, init
    from jaxllm.models.hub import save_pretrained

    layer = Layer(Attention(HEADS, KV_HEADS, WIDTH // HEADS), MLP(HIDDEN))
    config = Transformer(VOCABULARY, WIDTH, (layer,) * options.layers)
    save_pretrained(init(config, jax.random.key(SEED)), folder / "model")
    shape = options.samples, options.length
    tokens = np.random.default_rng(SEED).integers(3, VOCABULARY, shape)
    np.save(folder / "tokens.npy", tokens.astype(np.int32))


def with_jax(folder: Path, method: str) -> dict:
    """One of our methods: timed twice, since the first time compiles."""
    import jax

    from jaxllm import load, methods
    from jaxllm.core.batch import Batch
    from jaxllm.core.walk import Monitor

    model = load(str(folder / "model"))
    jax.block_until_ready(model.params)
    tokens = np.load(folder / "tokens.npy")
    batches = [Batch(tokens[i : i + 2]) for i in range(0, len(tokens), 2)]
    step = methods.parse(f"{method}(bits={BITS}, group_size={GROUP})")
    found = dict(spec=repr(step), loaded=resident())
    monitor = Monitor(progress=False)
    start = time.perf_counter()
    small = step(model, batches, monitor=monitor)
    jax.block_until_ready(small.params)
    found["seconds"] = time.perf_counter() - start
    found["blocks"] = [event["seconds"] for event in monitor.events]
    found["peak"] = peak()
    forward = jax.jit(lambda model, tokens: model(tokens))
    before, after = (np.asarray(forward(m, tokens[:1])) for m in (model, small))
    return found | dict(drift=drift(before, after))


def with_torch(folder: Path) -> dict:
    """Plain PyTorch."""
    import torch
    import torch_gptq
    import transformers

    torch.manual_seed(SEED)
    torch.set_num_threads(os.cpu_count() or 1)
    path, kind = folder / "model", torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=kind)
    tokens = torch.from_numpy(np.load(folder / "tokens.npy").astype(np.int64))
    with torch.no_grad():
        before = model(tokens[:1]).logits.numpy()
        found = dict(spec=f"PyTorch {torch.__version__}, GPTQ", loaded=resident())
        start = time.perf_counter()
        found["blocks"] = torch_gptq.quantize(model, tokens, BITS, GROUP)
        found["seconds"] = time.perf_counter() - start
        found["peak"] = peak()
        after = model(tokens[:1]).logits.numpy()
    return found | dict(drift=drift(before, after))


def resident() -> int:
    """Bytes of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak() -> int:
    """The most bytes that this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def drift(before: np.ndarray, after: np.ndarray) -> float:
    """|changed - original| / |original| of the logits."""
    return float(np.linalg.norm(after - before) / np.linalg.norm(before))


def worker(options) -> None:
    """What a child process does; its last line is its result."""
    folder = Path(options.folder)
    if options.worker == "make":
        return make(folder, options)
    jax_method = options.worker != "torch"
    found = with_jax(folder, options.worker) if jax_method else with_torch(folder)
    print(json.dumps(found | dict(cpu_seconds=time.process_time())))
    return None


def child(name: str, folder: str, options) -> dict:
    """The result of one child process."""
    command = [sys.executable, __file__, "--worker", name, "--folder", folder]
    for key in ("layers", "samples", "length"):
        command += [f"--{key}", str(getattr(options, key))]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{name} failed:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1]) if name != "make" else {}


def markdown(data: dict) -> str:
    rows = data["rows"]
    lines = [
        "# Quantizing a 1B-shaped Llama on a CPU",
        "",
        f"{data['layers']} layers of Llama-3.2-1B's shape ({WIDTH} / {HIDDEN}; random "
        f"weights, float32, vocabulary {VOCABULARY}), {data['samples']} x "
        f"{data['length']} calibration tokens, {BITS} bits in groups of {GROUP}; "
        f"{data['cores']} cores (load {data['load']:.0f} before the run). Every method "
        "has a process of its own; memory is resident. A pass is one layer's share of "
        "one walk over the model (AWQ has two); the first one compiles. The drift is "
        "that of the logits. Generated by `python experiments/weights/large.py`.",
        "",
        "| method | wall s | passes: first, median, last s | processor s | loaded GB "
        "| peak GB | drift |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        blocks, middle = r["blocks"], float(np.median(r["blocks"]))
        blocks = f"{blocks[0]:.1f}, {middle:.1f}, {blocks[-1]:.1f}"
        lines.append(
            f"| `{r['spec']}` | {r['seconds']:.1f} | {blocks} | {r['cpu_seconds']:.0f} "
            f"| {r['loaded'] / 1e9:.2f} | {r['peak'] / 1e9:.2f} | {r['drift']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--only", choices=METHODS)
    parser.add_argument("--worker", choices=("make", *METHODS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options)
    data = dict(vars(options), width=WIDTH, hidden=HIDDEN, vocabulary=VOCABULARY)
    data |= dict(cores=os.cpu_count(), load=os.getloadavg()[0], rows=[])
    data = {k: v for k, v in data.items() if k not in ("worker", "folder", "only")}
    from jaxllm.evaluate.environment import environment  # jax: not in every worker
    from jaxllm.evaluate.render import rewrite

    command = " ".join(["python experiments/weights/large.py", *sys.argv[1:]])
    data["environment"] = environment(SEED) | dict(command=command)
    with tempfile.TemporaryDirectory() as folder:
        child("make", folder, options)
        for name in (options.only,) if options.only else METHODS:
            data["rows"].append(child(name, folder, options))
            row = data["rows"][-1]
            seconds, most = row["seconds"], row["peak"] / 1e9
            print(f"{name}: {seconds:.1f} s, {most:.2f} GB", flush=True)
    if not options.only:
        rewrite(HERE / "large.json", json.dumps(data, indent=1) + "\n")
        rewrite(HERE / "large.md", markdown(data))
    return None


if __name__ == "__main__":
    main()
