"""Devices to test on, and stand-ins for what is not there.

``device`` is each of the backends' in turn: the CPU, PoCL's through OpenCL, the null device, a real GPU through CuPy if
there is one, a pretended one below the same code, and the example of a backend that others bring. NVIDIA's management
library is stood in for by compiled C, so that the real ctypes calls are tested.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from sparkle_mesh.devices.device import Device
from sparkle_mesh.devices.null import NullDevice
from sparkle_mesh.devices.registry import Registry, is_installed

KINDS = ("cpu", "opencl", "null", "cuda", "stand-in", "mirror")
# They run no kernels that are compiled.
WITHOUT_COMPILER = ("cpu", "mirror")
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "backend_example" / "sparkle_mirror"


@cache
def registry() -> Registry:
    """Return the real devices, looked for once in this process."""
    return Registry(entry_points=lambda: ())


@cache
def cupy_stand_in() -> ModuleType:
    """Return the CuPy backend over a stand-in for CuPy; its ``cupy`` is the stand-in."""
    import sparkle_mesh.devices as package

    fake = load_file("fake_cupy", Path(__file__).with_name("fake_cupy.py"))
    libraries = ModuleType("cupy_backends.cuda.libs")
    libraries.cublas = fake.cublas  # type: ignore[attr-defined]
    folder = Path(package.__path__[0])
    with pytest.MonkeyPatch.context() as patch:
        for name in ("cupy_backends", "cupy_backends.cuda"):
            patch.setitem(sys.modules, name, ModuleType(name))
        patch.setitem(sys.modules, "cupy_backends.cuda.libs", libraries)
        patch.setitem(sys.modules, "cupy", fake)
        products = load_file("cupy_products_on_stand_in", folder / "cupy_products.py")
        patch.setitem(sys.modules, "sparkle_mesh.devices.cupy_products", products)
        return load_file("cupy_on_stand_in", folder / "cupy_device.py")


def load_file(name: str, path: Path) -> ModuleType:
    """Import a file under a name of its own."""
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@cache
def stand_in_devices() -> tuple[Device, ...]:
    """Return the two pretended GPUs."""
    devices: tuple[Device, ...] = cupy_stand_in().CupyBackend().devices()
    return devices


@cache
def mirrors() -> tuple[Device, ...]:
    """Return the devices of the backend that is an example for others."""
    sys.path.insert(0, str(EXAMPLE.parent))
    try:
        devices: tuple[Device, ...] = importlib.import_module("sparkle_mirror").MirrorBackend().devices()
    finally:
        sys.path.remove(str(EXAMPLE.parent))
    return devices


def find_device(kind: str) -> Device:
    """Return a device to test on; skips the test where there is none."""
    if kind == "null":
        return NullDevice()
    if kind == "stand-in":
        return stand_in_devices()[0]
    if kind == "mirror":
        return mirrors()[0]
    if kind == "cuda" and not is_installed("cupy"):
        pytest.skip("needs an NVIDIA GPU and CuPy: CuPy is not installed")
    if kind == "opencl" and not is_installed("pyopencl"):
        pytest.skip("needs an OpenCL device: PyOpenCL is not installed")
    with warnings.catch_warnings():
        # Of packages that are imported only now.
        warnings.simplefilter("ignore")
        found = registry().devices(kind)
    if not found:
        pytest.skip(f"needs a device of kind {kind}: this machine has none")
    return found[0]


@pytest.fixture(params=KINDS)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """Return each kind of device in turn."""
    chosen = find_device(request.param)
    yield chosen
    chosen.pool.empty()


@pytest.fixture(params=[kind for kind in KINDS if kind != "null"])
def real_device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """Return each kind of device that holds what is written to it."""
    chosen = find_device(request.param)
    yield chosen
    chosen.pool.empty()


@pytest.fixture(params=[kind for kind in KINDS if kind not in WITHOUT_COMPILER])
def compiling_device(request: pytest.FixtureRequest) -> Device:
    """Return each kind of device that takes kernels in turn."""
    return find_device(request.param)


@pytest.fixture(params=[kind for kind in KINDS if kind not in (*WITHOUT_COMPILER, "null")])
def real_compiling_device(request: pytest.FixtureRequest) -> Device:
    """Return each kind of device that runs kernels in turn."""
    return find_device(request.param)


@pytest.fixture
def device_of() -> Callable[[str], Device]:
    """Return a function that returns the device of a kind, or skips the test where there is none."""
    return find_device


@pytest.fixture
def cpu() -> Device:
    """Return the CPU."""
    return find_device("cpu")


@pytest.fixture
def stand_in() -> ModuleType:
    """Return the CuPy backend over the stand-in."""
    return cupy_stand_in()


@pytest.fixture
def gpus() -> Iterator[tuple[Device, ...]]:
    """Return the pretended GPUs, with the stand-in as it was before."""
    yield stand_in_devices()
    state = cupy_stand_in().cupy.state
    state.peers, state.is_pinnable, state.device_count_error = True, True, 0
    for gpu in stand_in_devices():
        gpu.close()


SOURCE = r"""
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory_t;
static char gpus[2];
static volatile int released = 0;
int shutdowns = 0;
void stand_in_release(void) { released = 1; }
int nvmlInit_v2(void) {
#ifdef HANG
  while (!released) { }
#endif
#ifdef NO_INIT
  return 9;
#endif
  return 0;
}
int nvmlShutdown(void) { shutdowns++; return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { strncpy(text, "580.12", size); return 0; }
#ifndef NO_COUNT
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
#endif
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
#ifdef LOST_FIRST
  if (index == 0) return 15;
#endif
  *handle = &gpus[index];
  return 0;
}
int nvmlDeviceGetName(void *handle, char *text, unsigned size) {
  strncpy(text, handle == &gpus[0] ? "NVIDIA Alpha" : "NVIDIA \xff", size);
  return 0;
}
int nvmlDeviceGetMemoryInfo(void *handle, memory_t *memory) {
  memory->total = handle == &gpus[0] ? 150754820096ULL : 4096;
  return 0;
}
#ifndef OLD
int nvmlDeviceGetNumGpuCores(void *handle, unsigned *cores) { *cores = 16896; return 0; }
int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) { *major = 9; *minor = 0; return 0; }
#endif
"""


@pytest.fixture
def build_nvml(tmp_path: Path) -> Callable[..., str]:
    """Return a function that compiles the stand-in with the given macros and returns its path."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "a C compiler is a prerequisite of this project"
    source = tmp_path / "nvml.c"
    source.write_text(SOURCE)

    def build(*macros: str) -> str:
        library = tmp_path / f"{'_'.join(('nvml', *macros))}.so"
        flags = [f"-D{macro}" for macro in macros]
        subprocess.run([compiler, "-shared", "-fPIC", *flags, "-o", str(library), str(source)], check=True, timeout=60)
        return str(library)

    return build
