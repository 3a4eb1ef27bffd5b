"""The one place that knows how Pallas differs between jax 0.10 and 0.12."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
from jax.experimental.mosaic.gpu import FragmentedArray
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh

VERSION = jax.__version_info__
HOPPER = ("NVIDIA H200", 132)  # device kind and number of multiprocessors


def load(ref, layout, optimized: bool = True):
    """A Mosaic GPU load in a register layout (an index came first before 0.11).

    ``optimized=False`` allows one element at a time, as loads from device memory need.
    """
    if VERSION < (0, 11):
        return plgpu.load(ref, (), layout=layout, optimized=optimized)
    return plgpu.load(ref, layout=layout, optimized=optimized)


def in_registers(registers, layout, signed: bool | None = None):
    """A Mosaic GPU array of ``registers`` (an object array of MLIR values)."""
    return FragmentedArray(_registers=registers, _layout=layout, _is_signed=signed)


def transposed(ref):
    """The view of a two-dimensional reference with its axes exchanged."""
    if hasattr(ref, "T"):
        return ref.T
    return plgpu.transpose_ref(ref, (1, 0))


@contextlib.contextmanager
def pretend_gpu() -> Iterator[None]:
    """Trace Mosaic GPU kernels for a Hopper GPU on a machine that has none."""
    device = AbstractDevice(HOPPER[0], HOPPER[1], "gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        yield


@contextlib.contextmanager
def pretend_tpu(device) -> Iterator[None]:
    """Trace Pallas TPU kernels for a compile-only TPU ``device`` on any machine."""
    described = AbstractDevice(device.device_kind, 1, "tpu")
    mesh = AbstractMesh((), (), abstract_device=described)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


@contextlib.contextmanager
def interpret_gpu(detect_races: bool = True) -> Iterator[None]:
    """Run Mosaic GPU kernels in the interpreter, on the CPU."""
    module = plgpu
    if not hasattr(module, "force_gpu_interpret_mode"):
        from jax._src.pallas.mosaic_gpu.interpret import params as module
    mode = module.InterpretGPUParams(detect_races=detect_races)
    with pretend_gpu(), module.force_gpu_interpret_mode(mode):
        yield


def require_hopper(interpret: bool = False) -> None:
    """NotImplementedError where the default device is a GPU without Hopper's wgmma."""
    if interpret or jax.default_backend() != "gpu":
        return  # the interpreter, or compiling ahead of time
    capability = str(jax.devices()[0].compute_capability)
    if capability != "9.0":
        raise NotImplementedError(
            f"compute capability {capability}; the kernel is written for Hopper (9.0)"
        )
