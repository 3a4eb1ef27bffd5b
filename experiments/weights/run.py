"""Every weight method at every size on three models, at measured bytes.

    python experiments/weights/run.py [--only PATTERN] [--model NAME] [--minutes N]

Each row has perplexity, two scores (which word comes next; which of two stretches comes
first), measured bits per weight of the linear maps and of the whole model, and the wall
time of the method. Writes ``results.json`` (rows with the commit that made them) after
each row, so that it can be interrupted, ``results.md`` and ``pareto.png`` now and then.
A row that is there is not made again unless the source of its method or of what that
imports from ``jaxllm.core`` changed, or with ``--fresh``; ``--tables`` only rewrites
the tables. ``stories`` and ``twin`` need the stories260K files
(``JAXLLM_DATA`` or ../shared/data beside the repository).
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import settings
import sources
import tables

from jaxllm import methods
from jaxllm.evaluate import choose, cloze
from jaxllm.evaluate.choice import Question, encode_pair
from jaxllm.evaluate.environment import environment
from jaxllm.evaluate.ground import NAMES, Ground, expanded, ground
from jaxllm.evaluate.render import rewrite

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"
QUESTIONS = {"stories": 200, "twin": 200, "builtin": 100}
TOKENS = range(49, 65)  # of a question: one compiled shape serves all
CLEAR = 20  # rows after which compiled programs are dropped and tables written


def data_folder() -> Path:
    """Where the stories260K files and texts are."""
    return Path(os.environ.get("JAXLLM_DATA", HERE.parents[2] / "shared/data"))


def questions(found: Ground) -> dict[str, list[Question]]:
    """The two tasks of a test model: next words, and sentences or lines in order."""
    if found.name == "builtin":
        made = (
            cloze.next_words(found.texts, 180),
            cloze.orders(found.texts, 80, cloze.LINE, "\n"),
        )
    else:
        made = cloze.next_words(found.texts, 110), cloze.orders(found.texts, 30)

    def fits(question: Question) -> bool:
        """Of the one length, and no choice is swallowed by a token of the context."""
        ids = [encode_pair(found.tokenizer, *pair) for pair in question.pairs]
        return all(b and len(a) + len(b) in TOKENS for a, b in ids)

    count = QUESTIONS[found.name]
    return {
        name: list(itertools.islice(filter(fits, drawn), count))
        for name, drawn in zip(("words", "order"), made, strict=True)
    }


def measure(found: Ground, asked: dict, spec: str) -> dict:
    """One row; an empty spec is the model as it is. A refusal is a row too."""
    row = dict(model=found.name, spec=spec, source=sources.digest(spec) if spec else "")
    row["commit"] = environment()["commit"]
    start = time.perf_counter()
    try:
        step = methods.parse(spec) if spec else lambda model, data: model
        small = step(found.model, found.calibration)
    except Exception as error:  # whatever a method does, the others go on
        return row | dict(error=f"{type(error).__name__}: {error}"[:200])
    jax.block_until_ready(small.params)
    row["seconds"] = round(time.perf_counter() - start, 2)
    row["bytes"], row["all_bytes"] = found.bytes(small)
    row["bits"], row["all_bits"] = (round(b, 4) for b in found.bits(small))
    small = expanded(small)
    nll = found.perplexity(small)
    row |= dict(nll=round(nll.nll, 5), perplexity=round(nll.perplexity, 4))
    for name, items in asked.items():
        score = choose(small, found.tokenizer, items, batch_size=32, progress=False)
        row[name] = round(score.accuracy["sum"], 4)
        row[f"{name}_error"] = round(score.stderr["sum"], 4)
    return row


def protocol(found: Ground, asked: dict) -> dict:
    """What the numbers of a test model mean."""
    return dict(
        perplexity=found.perplexity(found.model).protocol,
        questions={name: len(items) for name, items in asked.items()},
        calibration=found.calibration.spec,
    )


def waiting(rows: dict, options) -> Iterator[tuple[str, str]]:
    """(model, spec) still to measure: what is missing first, then what is stale."""
    models = tuple(options.model or NAMES)
    chosen = [
        (model, spec)
        for model, spec in settings.plan(models)
        if any(fnmatch.fnmatchcase(spec, p) for p in options.only or ("*",))
    ]
    yield from (key for key in chosen if key not in rows)
    for key in chosen:
        mine = sources.digest(key[1]) if key[1] else ""
        if key in rows and (options.fresh or rows[key]["source"] != mine):
            yield key


def load() -> dict:
    if not RESULTS.exists():
        return dict(protocols={}, rows=[])
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def save(data: dict, rows: dict, options) -> None:
    """``results.json``, rows in the plan's order."""
    order = places()
    kept = sorted((k for k in rows if k in order), key=lambda k: order[k])
    here = environment(seed=0)
    here["command"] = " ".join(["python experiments/weights/run.py", *sys.argv[1:]])
    if not options.tables:
        data["environment"] = here
    data["rows"] = [rows[key] for key in kept]
    text = json.dumps(data | dict(rows=[]), indent=1)
    lines = ",\n".join(f"  {json.dumps(row)}" for row in data["rows"])
    text = text.replace('"rows": []', f'"rows": [\n{lines}\n ]')
    text = text.replace(str(data_folder()), "JAXLLM_DATA")
    rewrite(RESULTS, text + "\n")


@functools.cache
def places() -> dict[tuple[str, str], int]:
    """Where in the plan a row is."""
    return {key: i for i, key in enumerate(settings.plan(NAMES))}


def show(data: dict) -> None:
    """``results.md`` and ``pareto.png``."""
    rewrite(HERE / "results.md", tables.markdown(data))
    tables.plot(data["rows"], HERE / "pareto.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", help="specs of this pattern")
    parser.add_argument("--model", action="append", choices=NAMES)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--fresh", action="store_true", help="measure again")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    options = parser.parse_args()
    data, start = load(), time.monotonic()
    rows = {(r["model"], r["spec"]): r for r in data["rows"]}
    left = [] if options.tables else list(waiting(rows, options))
    grounds: dict[str, tuple] = {}
    try:
        for done, (model, spec) in enumerate(left):
            if time.monotonic() - start > 60 * options.minutes:
                print(f"time is up: {len(left) - done} rows left", flush=True)
                break
            if model not in grounds:
                found = ground(model, data_folder())
                grounds[model] = found, questions(found)
                data["protocols"][model] = protocol(*grounds[model])
            row = rows[model, spec] = measure(*grounds[model], spec)
            shown = row.get("error") or f"{row['bits']:.3f} bits, {row['nll']:.4f} nats"
            at = f"[{done + 1}/{len(left)}, {time.monotonic() - start:.0f} s]"
            print(at, model, spec or "as it is", shown, flush=True)
            save(data, rows, options)
            if done % CLEAR == CLEAR - 1:
                jax.clear_caches()
                show(data)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
    save(data, rows, options)
    show(data)


if __name__ == "__main__":
    main()
