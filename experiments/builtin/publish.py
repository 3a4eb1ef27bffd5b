"""Publish a training run of the built-in model as the package's asset.

    jaxllm run configs/pretrain/builtin.yaml
    python experiments/builtin/publish.py runs/builtin/train

Converts the newest resume point to bfloat16, evaluates that rounded model on the
committed evaluation slice, and writes model.safetensors, config.json, training.jsonl,
training.json and loss.png to jaxllm/assets/builtin (or --out).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import math
import platform
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import yaml

from jaxllm.core.model import Model
from jaxllm.core.spec import encode
from jaxllm.data.corpora import documents
from jaxllm.data.loader import batches
from jaxllm.data.tokenizers import load_tokenizer
from jaxllm.evaluate.render import rewrite
from jaxllm.models.builtin import ASSETS, save_builtin
from jaxllm.models.transformer import parameter_count
from jaxllm.train.config import TrainConfig, train_config
from jaxllm.train.losses import next_token
from jaxllm.train.state import split_model
from jaxllm.train.step import make_evaluation
from jaxllm.train.tasks import newest_model

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "pretrain" / "builtin.yaml"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
PROTOCOL = (
    "evaluation slice in rows of 512 tokens, documents packed and masked; every token "
    "but the first of a row or document is predicted; bits per byte are nats per token "
    "times tokens of the slice per byte of the slice"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--commit", help="of the code that trained (default: HEAD)")
    parser.add_argument("--note", default="", help="for training.json")
    arguments = parser.parse_args()
    config = train_config(yaml.safe_load(arguments.config.read_text())["train"])
    model, step = newest_model(config, arguments.run)
    rows = read_rows(arguments.run / "metrics.jsonl", step)
    record = describe(config, model, rows)
    record |= {"commit": arguments.commit or head(), "note": arguments.note}
    save_builtin(model, arguments.out)
    rewrite(arguments.out / "training.json", json.dumps(record, indent=1) + "\n")
    lines = (json.dumps(row) + "\n" for row in thinned(rows))
    rewrite(arguments.out / "training.jsonl", "".join(lines))
    plot(rows, arguments.out / "loss.png")
    print(json.dumps(record["evaluation"], indent=1))


def read_rows(path: Path, step: int) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if row["step"] <= step]


def thinned(rows: list[dict], every: int = 10) -> list[dict]:
    """Means over ``every`` steps, evaluations kept."""
    kept = []
    for start in range(0, len(rows), every):
        group = rows[start : start + every]
        losses = [row["loss"] for row in group if row["loss"] is not None]
        row = {"step": group[-1]["step"]}
        row["loss"] = round(sum(losses) / len(losses), 4) if losses else None
        row["lr"] = round(group[-1]["lr"], 7)
        row["norm"] = round(max(r["norm"] or 0.0 for r in group), 3)
        row["skipped"] = sum(r["skipped"] for r in group)
        seen = [r["eval_loss"] for r in group if "eval_loss" in r]
        kept.append(row | ({"eval_loss": round(seen[-1], 4)} if seen else {}))
    return kept


def describe(config: TrainConfig, model: Model, rows: list[dict]) -> dict:
    speed = [config.batch_size * config.length / r["tokens_per_second"] for r in rows]
    return {
        "command": "jaxllm run configs/pretrain/builtin.yaml",
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}, "
        f"{jax.local_device_count()} device",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "corpus": {"name": "builtin:[train]", "digest": documents("builtin:").digest},
        "config": encode(config),
        "parameters": parameter_count(model),
        "steps": rows[-1]["step"],
        "tokens": rows[-1]["step"] * config.batch_size * config.length,
        "step_seconds": round(sum(speed)),
        "skipped_steps": sum(row["skipped"] for row in rows),
        "evaluation": evaluate(model),
    }


def evaluate(model: Model) -> dict:
    """Loss of the bfloat16-rounded model (float32 arithmetic) on the whole slice."""
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), model)
    tokenizer = load_tokenizer("builtin:tiny")
    corpus = documents("builtin:", "eval")
    data = batches(corpus, tokenizer, 512, 4, shuffle=False)
    whole = itertools.islice(data.steps(), len(data.rows) // 4)
    run, parts = make_evaluation(next_token()), split_model(rounded)
    pairs = [run(*parts, batch) for batch in whole]
    nats, tokens = (sum(map(float, column)) for column in zip(*pairs, strict=True))
    size = sum(len(text.encode()) for text in corpus)
    per_byte = len(data.rows.stream.tokens) / size / math.log(2)
    return {
        "protocol": PROTOCOL,
        "digest": corpus.digest,
        "predicted_tokens": int(tokens),
        "nats_per_token": round(nats / tokens, 4),
        "perplexity": round(math.exp(nats / tokens), 3),
        "bits_per_byte": round(nats / tokens * per_byte, 4),
    }


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    curve = thinned(rows)
    axes.plot(
        [r["step"] for r in curve], [r["loss"] for r in curve], lw=1, label="train"
    )
    seen = [(r["step"], r["eval_loss"]) for r in curve if "eval_loss" in r]
    axes.plot(*zip(*seen, strict=True), "o-", ms=3, label="evaluation slice")
    axes.set(xlabel="step", ylabel="nats per token", title="builtin:tiny")
    axes.legend()
    part = path.with_suffix(".part.png")
    figure.savefig(part, dpi=110)
    part.replace(path)


def head() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
