"""Shared fixtures; the devices are chosen before anything imports jax."""

from __future__ import annotations

import importlib.metadata
import os
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = os.environ.get("JAXLLM_TEST_PLATFORM", "cpu")
_FLAGS = {"--xla_force_host_platform_device_count": "8"}
_VERSION = importlib.metadata.version("jaxlib").split(".")
if tuple(map(int, _VERSION[:2])) < (0, 11):
    # A third less time to compile tiny programs; later versions have no such flag.
    _FLAGS["--xla_cpu_use_fusion_emitters"] = "false"
for _flag, _value in _FLAGS.items():
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        _flags = f"{os.environ.get('XLA_FLAGS', '')} {_flag}={_value}"
        os.environ["XLA_FLAGS"] = _flags.strip()
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def _own_cores() -> None:
    """Parallel test processes do not share cores, nor do those that they start.

    XLA waits for all threads of a product; one that shares its core makes all late.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if not worker or not hasattr(os, "sched_setaffinity"):
        return
    cores, mine = sorted(os.sched_getaffinity(0)), int(worker.removeprefix("gw"))
    count = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    own = cores[mine % len(cores) :: count]
    os.sched_setaffinity(0, own)


_own_cores()


def _cache_folder() -> Path:
    """One compilation cache for all test processes, outside the repository."""
    base = os.environ.get("XDG_CACHE_HOME") or tempfile.gettempdir()
    return Path(base) / f"jaxllm-tests-{os.getuid()}"


os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache_folder()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import pytest  # noqa: E402
from beartype import BeartypeConf, beartype  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float
# Shapes and types of what these are called with, in every test process; subprocesses
# of tests run without it.
if os.environ.get("JAXLLM_TYPECHECK", "1") != "0":
    _CHECKED = ["jaxllm.core", "jaxllm.methods", "pallas_kernels"]
    install_import_hook(_CHECKED, f"{__name__}.checked")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Optional real data: JAXLLM_DATA, or shared/data beside the repository."""
    named = os.environ.get("JAXLLM_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real data: set JAXLLM_DATA or put shared/data beside the clone")
    return folder


@pytest.fixture(scope="session")
def stories(shared_data):
    """The stories260K model: a real pretrained Llama of 260 thousand parameters."""
    from jaxllm.models import hub

    return hub.load_llama2c(shared_data / "models/stories260K/stories260K.bin")


@pytest.fixture(scope="session")
def stories_tokenizer(shared_data):
    from jaxllm.data.tokenizers import load_tokenizer

    return load_tokenizer(shared_data / "models/stories260K/tok512.bin")


@pytest.fixture(scope="session")
def builtin():
    """The built-in model, ``builtin:tiny``."""
    from jaxllm.models import hub

    return hub.load_builtin()


# Files whose programs are small, and run once or twice: less optimization of them saves
# a fifth to two fifths of the time. Claims on real models take longer without it.
RUN_ONCE = {
    *("test_checkpoint", "test_equivalences", "test_experiment", "test_factorize"),
    *("test_generate", "test_kernels_weights", "test_methods", "test_quantize"),
    *("test_ranges", "test_search", "test_structure", "test_tokens", "test_train"),
    "test_weights",
}


@pytest.fixture(scope="module", autouse=True)
def _programs_of_a_module(request):
    """A file's hundreds of programs, gigabytes, leave with it: no other runs them.

    Their optimization level is an option of XLA that jax has no public setting for
    outside ``jit``, and eager operations are programs too.
    """
    import jax
    from jax._src import compiler

    usual = compiler.get_compile_options

    def quick(*args, **kwargs):
        options = usual(*args, **kwargs)
        debug = options.executable_build_options.debug_options
        debug.xla_backend_optimization_level = 0
        return options

    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem in RUN_ONCE:
            patch.setattr(compiler, "get_compile_options", quick)
        yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _few_programs_at_once():
    """Linux allows a process 65,530 mappings, and XLA dies where it gets no more."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > 10_000:
        import jax

        jax.clear_caches()
