"""NVIDIA GPUs as the driver's management library (NVML) tells of them.

NVML comes with the driver, is plain C, and creates no CUDA context. It is loaded by ctypes when first asked
for, so that no package is needed. Reference: NVIDIA, "NVML API Reference Guide", sections 5.11 and 5.15.
"""

from __future__ import annotations

import ctypes
import queue
import sys
import threading
from dataclasses import dataclass
from typing import Any

from sparkle_mesh import limits

LIBRARY = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"
_TEXT_BYTES = 96


@dataclass(frozen=True, slots=True)
class Gpu:
    """What NVML says of one GPU; ``compute_capability`` is ``"90"`` for 9.0, empty if it does not tell."""

    index: int
    name: str
    memory_bytes: int
    cores: int
    compute_capability: str
    driver: str


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class _NvmlError(Exception):
    """NVML lacks a function or answered with an error."""


def read_gpus(*, timeout_s: float, library: str = LIBRARY) -> tuple[Gpu, ...]:
    """Return the GPUs, or none if there is no driver, it is broken, or it does not answer in ``timeout_s``.

    A driver that hangs cannot be interrupted: it is asked on a daemon thread, which is left to it.
    """
    answer: queue.SimpleQueue[tuple[Gpu, ...]] = queue.SimpleQueue()
    thread = threading.Thread(target=lambda: answer.put(_read(library)), name="sparkle nvml", daemon=True)
    thread.start()
    try:
        gpus = answer.get(timeout=timeout_s)
    except queue.Empty:
        return ()
    thread.join()
    return gpus


def _read(library: str) -> tuple[Gpu, ...]:
    try:
        nvml = ctypes.CDLL(library)
    except OSError:
        return ()
    try:
        _call(nvml, "nvmlInit_v2")
    except _NvmlError:
        return ()
    try:
        driver = _text(nvml, "nvmlSystemGetDriverVersion")
        count = ctypes.c_uint()
        _call(nvml, "nvmlDeviceGetCount_v2", ctypes.byref(count))
        indices = range(min(count.value, limits.DEVICES_MAX_COUNT))
        return tuple(gpu for index in indices if (gpu := _read_gpu(nvml, index, driver)) is not None)
    except _NvmlError:
        return ()
    finally:
        nvml.nvmlShutdown()


def _read_gpu(nvml: Any, index: int, driver: str) -> Gpu | None:
    """Return one GPU; None for one that is lost or not this user's, which the others need not suffer for."""
    handle, memory = ctypes.c_void_p(), _Memory()
    try:
        _call(nvml, "nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
        name = _text(nvml, "nvmlDeviceGetName", handle)
        _call(nvml, "nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
    except _NvmlError:
        return None
    cores, major, minor = ctypes.c_uint(), ctypes.c_int(), ctypes.c_int()
    return Gpu(
        index=index,
        name=name,
        memory_bytes=memory.total,
        cores=cores.value if _answers(nvml, "nvmlDeviceGetNumGpuCores", handle, ctypes.byref(cores)) else 0,
        compute_capability=f"{major.value}{minor.value}"
        if _answers(nvml, "nvmlDeviceGetCudaComputeCapability", handle, ctypes.byref(major), ctypes.byref(minor))
        else "",
        driver=driver,
    )


def _call(nvml: Any, name: str, *arguments: Any) -> None:
    try:
        function = getattr(nvml, name)
    except AttributeError as error:
        raise _NvmlError(f"this NVML has no {name}") from error
    status = function(*arguments)
    if status != 0:
        raise _NvmlError(f"{name} answered {status}")


def _answers(nvml: Any, name: str, *arguments: Any) -> bool:
    """Call what older drivers lack; whether it worked."""
    try:
        _call(nvml, name, *arguments)
    except _NvmlError:
        return False
    return True


def _text(nvml: Any, name: str, *arguments: Any) -> str:
    buffer = ctypes.create_string_buffer(_TEXT_BYTES)
    _call(nvml, name, *arguments, buffer, ctypes.c_uint(_TEXT_BYTES))
    return buffer.value.decode(errors="replace")
