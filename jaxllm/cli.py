"""The ``jaxllm`` command. Help and argument errors cost no import of jax."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

# What a user can cause and mend; anything else is a bug and shows its traceback.
USER_ERRORS = (
    ValueError,
    TypeError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    PermissionError,
    ConnectionError,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 2 (a mistake) or 130 (interrupted)."""
    options = _parsed(arguments)
    try:
        options.command(options)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has seen enough (``| head``)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except USER_ERRORS as error:
        if options.traceback:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"jaxllm: {message}", file=sys.stderr)
        return 2
    return 0


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; a key=value may stand behind an option too."""
    known = parser()
    options, rest = known.parse_known_args(arguments)
    late = [a for a in rest if "=" in a and not a.startswith("-")]
    wrong = [a for a in rest if a not in late or "overrides" not in options]
    if wrong:
        known.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    top = argparse.ArgumentParser(
        prog="jaxllm",
        description="Compress, measure and save language models in JAX.",
    )
    top.set_defaults(traceback=False)
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    run = _command(
        commands, run_experiment, "run", "run an experiment, or go on with it"
    )
    run.add_argument("config", metavar="CONFIG.yaml")
    run.add_argument("overrides", nargs="*", metavar="key=value")
    run.add_argument("--dry-run", action="store_true", help="check and print the plan")
    run.add_argument("--restart", action="store_true", help="delete the earlier run")
    run.add_argument("--quiet", action="store_true", help="no progress bars")

    methods = _command(commands, list_methods, "list", "methods, of one family or all")
    methods.add_argument("family", nargs="?")

    show = _command(
        commands, show_method, "show", "one method: paper, arguments, claims"
    )
    show.add_argument("name", metavar="NAME")

    compare = _command(
        commands, compare_runs, "compare", "runs side by side, and a plot"
    )
    compare.add_argument("runs", nargs="+", metavar="RUN")
    folder = "write compare.json, compare.md and the Pareto plot here"
    compare.add_argument("--output", metavar="FOLDER", help=folder)

    text = "the formats of others: Hugging Face, GPTQ, AWQ, GGUF ..."
    export = _command(commands, export_model, "export", text)
    export.add_argument("checkpoint", metavar="CHECKPOINT")
    export.add_argument("path", metavar="PATH", help="a new folder, or name.gguf")
    kinds = "gptq, awq, compressed-tensors or gguf (default: a dense folder)"
    export.add_argument("--format", metavar="FORMAT", help=kinds)
    q4_k = "q4_k: round dense linear maps to it (gguf)"
    export.add_argument("--round-to", metavar="TYPE", help=q4_k)
    expand = "expand compressed weights to dense ones first"
    export.add_argument("--dense", action="store_true", help=expand)

    _command(commands, show_version, "version", "versions of jaxllm and jax")
    return top


def _command(commands, function, name: str, text: str) -> argparse.ArgumentParser:
    made = commands.add_parser(name, help=text, description=function.__doc__)
    made.add_argument("--traceback", action="store_true", help=argparse.SUPPRESS)
    made.set_defaults(command=function)
    return made


def run_experiment(options: argparse.Namespace) -> None:
    """Validate, plan, transform, measure, save and report; resumes where it stopped."""
    from jaxllm import experiment

    config = experiment.load(options.config, tuple(options.overrides))
    values = dict(dry_run=options.dry_run, restart=options.restart)
    experiment.run(config, progress=not options.quiet, **values)


def list_methods(options: argparse.Namespace) -> None:
    """Print the methods by family: name, title, paper."""
    from jaxllm import methods

    entries = sorted(methods.entries().values(), key=lambda e: (e.family, e.name))
    families = sorted({e.family for e in entries})
    if options.family is not None and options.family not in families:
        accepted = ", ".join(families)
        raise ValueError(f"no family {options.family!r}; accepted: {accepted}")
    for family in families:
        if options.family in (None, family):
            print(family)
            for e in (e for e in entries if e.family == family):
                print(f"  {e.name:<16} {e.card.title:<24} {e.card.paper}")


def show_method(options: argparse.Namespace) -> None:
    """Print what a method is, what it takes and what it claims."""
    import inspect

    from jaxllm import methods

    entry = methods.entries().get(options.name)
    make = methods.find(options.name) if entry is None else entry.make
    if entry is not None:
        print(f"{entry.card.title} ({entry.family}), {entry.card.paper}")
        print(inspect.getdoc(entry.module))
    print(f"\n{options.name}{inspect.signature(make)}\n")
    print(inspect.getdoc(make) or "")
    if entry is not None:
        for claim in entry.card.claims:
            over = f"{claim.metric} of {claim.spec} is better than that of {claim.over}"
            print(f"\nclaim, tested on {claim.model}: {over}", end="")
        print(f"\n\ncomposes: {entry.card.composes}" if entry.card.composes else "")


def compare_runs(options: argparse.Namespace) -> None:
    """Print the steps of finished runs, the best at their size marked; plot them."""
    from jaxllm.evaluate import compare

    found = compare(*options.runs)
    print(found.to_markdown())
    if options.output is not None:
        print(f"written: {found.write(options.output)}")


def export_model(options: argparse.Namespace) -> None:
    """Write the model of a checkpoint in a format that other programs read."""
    from jaxllm.experiment.export import export

    how = options.dense, options.format, options.round_to
    export(options.checkpoint, options.path, *how)
    print(f"exported {options.checkpoint} to {options.path}")


def show_version(options: argparse.Namespace) -> None:
    """Print versions."""
    from importlib.metadata import version

    from jaxllm.checkpoint.manifest import package_version

    print(f"jaxllm {package_version()}, jax {version('jax')}, flax {version('flax')}")


if __name__ == "__main__":
    sys.exit(main())
