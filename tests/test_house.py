"""The checks that hold the house up: order, size, words, and no work at import."""

from __future__ import annotations

import ast
import doctest
import functools
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("pallas_kernels", "jaxllm")
# Each part may import itself and what stands before it, and of its own rank only what
# SIDEWAYS says.
ORDER = (
    {"pallas_kernels"},
    {"core"},
    {"models"},
    {"distributed", "data", "generation", "train", "evaluate"},
    {"methods"},
    {"checkpoint"},
    {"experiment", "cli"},
    {"jaxllm"},
)
SIDEWAYS = {
    ("generation", "data"),
    ("train", "data"),
    ("evaluate", "data"),
    ("evaluate", "generation"),
    ("cli", "experiment"),
}
LIMITS = {"core": 400, "methods": 200, "train": 400, "experiment": 400}
FUNCTION, KERNEL = 80, 150


def sources() -> list[Path]:
    return sorted(f for p in PACKAGES for f in (REPOSITORY / p).rglob("*.py"))


def module_name(file: Path) -> str:
    parts = file.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(f): f for f in sources()}


@functools.cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def part(module: str) -> str:
    """The part of the house: the package below ``jaxllm``, or the top itself."""
    head, _, rest = module.partition(".")
    return head if head != "jaxllm" or not rest else rest.partition(".")[0]


def top_level(node: ast.AST):
    """Statements that run at import: not those of functions or for type checkers."""
    for child in ast.iter_child_nodes(node):
        checking = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
        if checking or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        yield child
        yield from top_level(child)


def imports(module: str, anywhere: bool) -> set[str]:
    """Our modules that a module imports; ``anywhere`` counts functions' bodies too."""
    body = tree(MODULES[module])
    nodes = ast.walk(body) if anywhere else top_level(body)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{module} has a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else node.module)
    return {name for name in found if name in MODULES} - {module}


def rank(module: str) -> int:
    for place, parts in enumerate(ORDER):
        if part(module) in parts:
            return place
    raise AssertionError(f"{module} is of no known part of the house")


def allowed(module: str, other: str) -> bool:
    here, there = part(module), part(other)
    if rank(other) == rank(module):
        return here == there or (here, there) in SIDEWAYS
    return rank(other) < rank(module)


def test_imports_go_to_the_left():
    wrong = [
        f"{module} imports {other}"
        for module in MODULES
        for other in imports(module, anywhere=True)
        if not allowed(module, other)
    ]
    assert not wrong, wrong


def test_nothing_is_imported_sideways_between_methods():
    wrong = [
        f"{module} imports {other}"
        for module in MODULES
        if module.count(".") == 3 and part(module) == "methods"
        for other in imports(module, anywhere=True)
        if part(other) == "methods"
    ]
    assert not wrong, wrong


def test_no_cycle():
    """Depth-first; imports inside functions are the declared way around a cycle."""
    state: dict[str, int] = {}

    def visit(module: str, trail: tuple[str, ...]) -> None:
        if state.get(module) == 2:
            return
        assert module not in trail, " -> ".join((*trail, module))
        for other in imports(module, anywhere=False):
            package = MODULES[other].name == "__init__.py"
            inside = package and module.startswith(f"{other}.")
            if not inside:
                visit(other, (*trail, module))
        state[module] = 2

    for module in MODULES:
        visit(module, ())


def test_files_stay_short():
    long = {
        module: (lines, limit)
        for module, file in MODULES.items()
        if (limit := LIMITS.get(part(module)))
        and (lines := len(file.read_text(encoding="utf-8").splitlines())) > limit
    }
    assert not long, long


def test_functions_stay_short():
    long = {}
    for module, file in MODULES.items():
        limit = KERNEL if part(module) == "pallas_kernels" else FUNCTION
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > limit:
                    long[f"{module}.{node.name}"] = lines
    assert not long, long


def test_every_module_says_what_it_is():
    silent = [m for m, file in MODULES.items() if not ast.get_docstring(tree(file))]
    files = {m: MODULES[m].read_text(encoding="utf-8").strip() for m in silent}
    assert not [m for m, text in files.items() if text], silent


def test_modules_import_without_a_device():
    """In one process: every module, then no backend of jax has been started."""
    code = (
        "import importlib, sys\n"
        "from jax._src import xla_bridge\n"
        f"for name in {sorted(MODULES)!r}:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except ModuleNotFoundError as error:\n"
        "        if error.name.partition('.')[0] in ('jaxllm', 'pallas_kernels'):\n"
        "            raise\n"
        "    if xla_bridge.backends_are_initialized():\n"
        "        sys.exit(f'{name} creates an array or asks for devices at import')\n"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert run.returncode == 0, run.stderr[-2000:]


def has_examples(file: Path) -> bool:
    return ">>> " in file.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [m for m, f in MODULES.items() if has_examples(f)])
def test_examples_in_docstrings(name):
    module = importlib.import_module(name)
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    result = doctest.testmod(module, optionflags=options)
    assert result.attempted and not result.failed, result


def repository_files() -> list[Path]:
    """What is committed or would be: text files that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    if run.returncode:
        pytest.skip("not a git work tree")
    files = (REPOSITORY / line for line in run.stdout.splitlines())
    return [f for f in files if f.is_file() and is_text(f)]


def is_text(file: Path) -> bool:
    return b"\0" not in file.read_bytes()[:4096]


def test_no_machine_is_named():
    """Paths of one machine and hosts of registries do not belong in a repository."""
    roots = "|".join(("work", "root", "opt", "home", "Users"))
    hosts = "|".join(("pypi", "files.pythonhosted", "registry.npmjs"))
    bad = re.compile(rf"(?<![\w.~}}/])/(?:{roots})/\w+|(?:{hosts})\.org")
    assets = REPOSITORY / "jaxllm" / "assets"
    found = {
        str(file.relative_to(REPOSITORY)): match[0]
        for file in repository_files()
        if file.suffix != ".ipynb" and assets not in file.parents
        if (match := bad.search(file.read_text(encoding="utf-8", errors="replace")))
    }
    assert not found, found


def test_code_is_clean():
    ruff = shutil.which("ruff") or str(Path(sys.executable).with_name("ruff"))
    if not Path(ruff).exists():
        pytest.skip("ruff is not installed; the extra [test] brings it")
    run = subprocess.run(
        [ruff, "check", "."], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert run.returncode == 0, run.stdout[-3000:]


def readme() -> list[str]:
    return (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()


def test_readme_comes_to_the_point():
    lines = readme()
    fences = [i for i, line in enumerate(lines) if line.startswith("```")]
    python = [i for i, line in enumerate(lines) if line.startswith("```python")]
    assert len(lines) <= 150
    assert fences and fences[0] < 20, "the first command stands in the first 20 lines"
    assert python and python[0] < 40, "the first Python stands in the first 40 lines"


def test_readme_commands_name_what_exists():
    text = "\n".join(readme())
    assert "jaxllm run configs/quickstart.yaml" in text
    assert "pytest -n 2" in text or ".ci/run" in text
    for path in re.findall(r"(?:configs|docs|colab|experiments)/[\w./-]+\w", text):
        assert (REPOSITORY / path).exists(), path
