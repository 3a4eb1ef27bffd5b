"""Every method at every setting on three models, at measured size: the spine's table.

    python experiments/spine/run.py [--models stories,twin,builtin] [--limit 24]

Writes ``results.json`` (one row per model and spec, with command, commit, device,
versions, protocol) and ``results.md`` beside this file. Rows that are there already
are kept, so that an interrupted run goes on. ``stories`` and its ``twin`` need the
stories260K files (``JAXLLM_DATA`` or ../shared/data beside the repository).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import jax

from jaxllm import methods
from jaxllm.core import weights
from jaxllm.core.model import weight
from jaxllm.core.walk import Monitor
from jaxllm.data.calibration import calibrate
from jaxllm.data.corpora import documents
from jaxllm.data.tokenizers import load_tokenizer
from jaxllm.evaluate import perplexity
from jaxllm.evaluate.environment import environment
from jaxllm.evaluate.twin import outlier_twin
from jaxllm.models import hub

HERE = Path(__file__).resolve().parent
GROUP = 32

WEIGHT_ONLY = [
    spec.format(bits=bits, group=group)
    for bits in (8, 4, 3, 2)
    for group in ("None", GROUP)
    for spec in (
        "rtn(bits={bits}, group_size={group})",
        "gptq(bits={bits}, group_size={group})",
        "awq(bits={bits}, group_size={group})",
        "hqq(bits={bits}, group_size={group})",
    )
    if not (bits == 8 and group == GROUP)
]
OTHER = [
    "nf4(group_size=32)",
    "rtn(format='e2m1', group_size=32)",
    *(
        f"{name}({sparsity})"
        for sparsity in ("0.3", "0.5", "'2:4'")
        for name in ("magnitude", "wanda", "sparsegpt")
    ),
    *(f"{name}({ratio})" for ratio in (0.8, 0.6) for name in ("svd", "svd_llm")),
    "smoothquant(None, bits=8)",
    "smoothquant(0.5, bits=8)",
    "quarot(rotate=False, solver='rtn')",
    "quarot(solver='rtn')",
    "quarot(rotate=False)",
    "quarot()",
    "lora(8)",
    "compose(sparsegpt('2:4'), gptq(bits=4, group_size=32, correct=low_rank(8)))",
]
# What the papers say, as (better, worse, models).
EXPECTED = [
    *(
        (f"gptq(bits={b}, group_size={g})", f"rtn(bits={b}, group_size={g})", m)
        for b in (4, 3)
        for g in ("None", GROUP)
        for m in ("stories", "builtin")
    ),
    *(
        pair
        for s in ("0.5", "'2:4'")
        for m in ("stories", "builtin")
        for pair in (
            (f"sparsegpt({s})", f"wanda({s})", m),
            (f"wanda({s})", f"magnitude({s})", m),
        )
    ),
    *(
        (f"svd_llm({r})", f"svd({r})", m)
        for r in (0.8, 0.6)
        for m in ("stories", "builtin")
    ),
    ("awq(bits=4, group_size=32)", "rtn(bits=4, group_size=32)", "twin"),
    ("awq(bits=3, group_size=32)", "rtn(bits=3, group_size=32)", "twin"),
    ("smoothquant(0.5, bits=8)", "smoothquant(None, bits=8)", "twin"),
    ("quarot()", "quarot(rotate=False)", "twin"),
    ("quarot(solver='rtn')", "quarot(rotate=False, solver='rtn')", "twin"),
]


def data_folder() -> Path:
    """Where the stories260K files and texts are."""
    return Path(os.environ.get("JAXLLM_DATA", HERE.parents[2] / "shared/data"))


def ground(name: str):
    """(model, tokenizer, calibration, held-out texts) of a test model."""
    if name == "builtin":
        model, tokenizer = hub.load_builtin(), load_tokenizer("builtin:tiny")
        source = "builtin:"
    else:
        data = data_folder()
        folder = data / "models/stories260K"
        model = hub.load_llama2c(folder / "stories260K.bin")
        tokenizer = load_tokenizer(folder / "tok512.bin")
        source = str(data / "text/tinystories.txt")
    calibration = calibrate(source, tokenizer, samples=32, length=256)
    if name == "twin":
        model = outlier_twin(model, next(iter(calibration)))
    return model, tokenizer, calibration, documents(source, "eval")


def row(name: str, spec: str, limit: int, found) -> dict:
    """One measurement; an empty spec is the float32 model."""
    model, tokenizer, calibration, texts = found
    monitor, start = Monitor(progress=False), time.perf_counter()
    small = methods.parse(spec)(model, calibration, monitor=monitor) if spec else model
    jax.block_until_ready(small.params)
    seconds = time.perf_counter() - start
    values = dict(limit=limit, progress=False)
    score = perplexity(small, tokenizer, list(texts), "documents", **values)
    paths = model.config.linears()
    entries = sum(weights.size(weight(model, p)) for p in paths)
    size = sum(weights.nbytes(weight(small, p)) for p in paths)
    return dict(
        model=name,
        spec=spec or "float32",
        **score.to_json(),
        linear_bytes=size,
        bits_per_weight=8 * size / entries,
        seconds=round(seconds, 2),
        walk=monitor.events,
        calibration=calibration.spec,
        commit=environment()["commit"],
    )


def without_folder(made: dict) -> dict:
    """The row with the data folder's name in place of its path on this machine."""
    return json.loads(json.dumps(made).replace(str(data_folder()), "JAXLLM_DATA"))


def checks(rows: list[dict]) -> list[dict]:
    """Which of the expected orders hold at no fewer bytes for the baseline."""
    by = {(r["model"], r["spec"]): r for r in rows}
    found = []
    for better, worse, model in EXPECTED:
        a, b = by.get((model, better)), by.get((model, worse))
        if a and b:
            fair = b["linear_bytes"] >= a["linear_bytes"]
            holds = fair and a["nll"] < b["nll"]
            found.append(
                dict(model=model, better=better, worse=worse, holds=holds)
                | dict(nll=[a["nll"], b["nll"]])
            )
    return found


def markdown(data: dict) -> str:
    lines = [f"Protocol: {data['rows'][0]['protocol']}", ""]
    for name in dict.fromkeys(r["model"] for r in data["rows"]):
        lines += [
            f"## {name}",
            "",
            "| spec | bits per weight | perplexity | nats | s |",
        ]
        lines += ["|---|---|---|---|---|"]
        mine = [r for r in data["rows"] if r["model"] == name]
        for r in mine:
            spec, bits, nll = r["spec"], r["bits_per_weight"], r["nll"]
            lines.append(
                f"| `{spec}` | {bits:.3f} | {r['perplexity']:.3f} | {nll:.4f} "
                f"| {r['seconds']:.1f} |"
            )
        lines.append("")
    lines += ["## Expected orders", "", "| model | better | worse | nats | holds |"]
    lines += ["|---|---|---|---|---|"]
    for c in data["expected"]:
        a, b = c["nll"]
        lines.append(
            f"| {c['model']} | `{c['better']}` | `{c['worse']}` | {a:.4f} / {b:.4f} "
            f"| {'yes' if c['holds'] else 'NO'} |"
        )
    return "\n".join(lines) + "\n"


def write(data: dict) -> None:
    for name, text in (
        ("results.json", json.dumps(data, indent=1) + "\n"),
        ("results.md", markdown(data)),
    ):
        path = HERE / f".{name}.partial"
        path.write_text(text)
        path.replace(HERE / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="stories,twin,builtin")
    parser.add_argument("--limit", type=int, default=24, help="documents to evaluate")
    options = parser.parse_args()
    path = HERE / "results.json"
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = {(r["model"], r["spec"]): r for r in old}
    command = " ".join(["python", "experiments/spine/run.py", *sys.argv[1:]])
    for name in options.models.split(","):
        found = ground(name)
        for spec in ("", *WEIGHT_ONLY, *OTHER):
            if (name, spec or "float32") in rows:
                continue
            made = without_folder(row(name, spec, options.limit, found))
            rows[name, made["spec"]] = made
            print(name, made["spec"], f"{made['nll']:.4f}", made["seconds"], flush=True)
            every = [*rows.values()]
            head = dict(command=command, environment=environment(), seed=0)
            write(head | dict(expected=checks(every), rows=every))


if __name__ == "__main__":
    main()
