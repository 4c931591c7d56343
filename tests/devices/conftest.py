"""Stand-ins for NVIDIA's management library, compiled from C, so that the real ctypes calls are tested."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

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
