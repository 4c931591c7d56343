"""Which compute devices this machine has, told without touching any of them.

Nothing here creates a CUDA context, imports an optional package or starts a program: processors are read from
the operating system, NVIDIA GPUs from the driver's management library (:mod:`sparkle_mesh.devices.nvml`).
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import msgspec

from sparkle_mesh import limits, wire
from sparkle_mesh.devices import nvml

_CPUINFO = Path("/proc/cpuinfo")
# Where Linux tells a container's memory limit: cgroup v2, then v1.
_CGROUP_MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
# Limit, use and statistics of a container's memory, in the same order.
_CGROUP_MEMORY_USES = (
    tuple(Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current", "memory.stat")),
    tuple(
        Path("/sys/fs/cgroup/memory") / name
        for name in ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    ),
)

# What numerical code chooses its instructions by, in the order shown.
_X86_FEATURES: tuple[str, ...] = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl")
_X86_FEATURES += (
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "aes",
    "vaes",
    "sha_ni",
)
_ARM_FEATURES = ("asimd", "asimdhp", "asimddp", "fphp", "sve", "sve2", "bf16", "i8mm", "sha2")

FeatureList = Annotated[tuple[wire.NameText, ...], msgspec.Meta(max_length=limits.DEVICE_FEATURES_MAX_COUNT)]

Gflops = Annotated[float, msgspec.Meta(ge=0)]
GflopsByDtype = Annotated[dict[wire.NameText, Gflops], msgspec.Meta(max_length=limits.DEVICE_DTYPES_MAX_COUNT)]


class DeviceInfo(wire.Message, frozen=True, kw_only=True):
    """One compute device.

    Attributes
    ----------
    kind
        ``"cpu"``, ``"cuda"``, ``"rocm"``, ``"opencl"``, or what another package's backend calls its devices.
    index
        Counts the devices of one kind from 0 (for GPUs: the driver's order, by PCI bus).
    name
        What its maker calls it.
    memory_bytes
        All of its memory, in use or not; for the CPU no more than this container may use. 0 if unknown.
    cores
        Physical cores of a CPU, CUDA cores of a GPU; 0 if unknown.
    logical_cores
        Hardware threads that this process may run on (CPU); 0 for a GPU.
    features
        Instruction sets (``"avx2"``) or the compute capability (``"sm_90"``).
    driver
        Version of the driver; empty for a CPU.
    gflops
        What it was measured to do, by the name of the dtype (``"float32"``), in 10^9 floating-point operations a
        second; empty where nothing was measured.
    """

    kind: wire.NameText
    index: wire.Count
    name: wire.NameText
    memory_bytes: wire.Count
    cores: wire.Count = 0
    logical_cores: wire.Count = 0
    features: FeatureList = ()
    driver: wire.NameText = ""
    gflops: GflopsByDtype = msgspec.field(default_factory=dict)


def detect_devices(*, timeout_s: float = limits.DEVICE_DETECTION_TIMEOUT_S) -> tuple[DeviceInfo, ...]:
    """Return this machine's devices: the CPU, then NVIDIA GPUs.

    Never raises for a device that is broken or absent; a driver that does not answer within ``timeout_s``
    counts as absent. Blocks: call it from a worker thread.
    """
    gpus = (
        DeviceInfo(
            kind="cuda",
            index=gpu.index,
            name=_bounded(gpu.name),
            memory_bytes=gpu.memory_bytes,
            cores=gpu.cores,
            features=(f"sm_{gpu.compute_capability}",) if gpu.compute_capability else (),
            driver=_bounded(gpu.driver),
        )
        for gpu in nvml.read_gpus(timeout_s=timeout_s)
    )
    return (detect_cpu(), *gpus)


def detect_cpu() -> DeviceInfo:
    """Return the machine's processors as one device."""
    # Only when asked: the command line reads DeviceInfo in its answers and should start at once.
    import psutil

    cpuinfo = parse_cpuinfo(_read(_CPUINFO))
    return DeviceInfo(
        kind="cpu",
        index=0,
        name=_bounded(cpu_name(cpuinfo) or platform.processor() or platform.machine() or "unknown processor"),
        memory_bytes=usable_memory_bytes(psutil.virtual_memory().total, map(_read, _CGROUP_MEMORY_LIMITS)),
        cores=psutil.cpu_count(logical=False) or 0,
        logical_cores=usable_logical_cores(),
        features=cpu_features(cpuinfo),
    )


def parse_cpuinfo(text: str) -> dict[str, str]:
    """Return the first value of each field of ``/proc/cpuinfo``, names in lower case."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, separator, value = line.partition(":")
        if separator and value.strip():
            fields.setdefault(name.strip().lower(), value.strip())
    return fields


def cpu_name(cpuinfo: dict[str, str]) -> str:
    """Return the processor's name, from ``/proc/cpuinfo`` or macOS's sysctl; empty if neither tells."""
    for field in ("model name", "hardware", "cpu model"):
        if name := cpuinfo.get(field):
            return " ".join(name.split())
    if platform.system() == "Darwin":  # pragma: no cover (macOS)
        return _sysctl_text(b"machdep.cpu.brand_string")
    return ""


def cpu_features(cpuinfo: dict[str, str]) -> tuple[str, ...]:
    """Return the instruction sets that numerical code cares about."""
    flags = set((cpuinfo.get("flags") or cpuinfo.get("features") or "").split())
    return tuple(feature for feature in _X86_FEATURES + _ARM_FEATURES if feature in flags)


def usable_memory_bytes(total_bytes: int, cgroup_limits: Iterable[str]) -> int:
    """Return the machine's memory, or this container's limit where that is lower."""
    stated = (int(text) for text in map(str.strip, cgroup_limits) if text.isdecimal())
    return min([total_bytes, *stated])


def free_memory_bytes() -> int:
    """Return how much memory this process may still take: what the system has, within the container's limit."""
    import psutil

    stated = (container_free_bytes(*map(_read, paths)) for paths in _CGROUP_MEMORY_USES)
    return min([int(psutil.virtual_memory().available), *(free for free in stated if free is not None)])


def container_free_bytes(limit: str, used: str, statistics: str) -> int | None:
    """Return what is left of a container's memory, by three files of its cgroup; None if it has no limit.

    Files that the system keeps in memory and can drop count as free.
    """
    if not (limit.strip().isdecimal() and used.strip().isdecimal()):
        return None
    lines = (line.split() for line in statistics.splitlines())
    droppable = {line[0]: int(line[1]) for line in lines if len(line) == 2 and line[1].isdecimal()}
    cached = droppable.get("total_inactive_file", droppable.get("inactive_file", 0))
    return max(int(limit) - max(int(used) - cached, 0), 0)


def usable_logical_cores() -> int:
    """Return how many hardware threads this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 0  # pragma: no cover (macOS, Windows)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _bounded(text: str) -> str:
    return text[: limits.NAME_MAX_CHARS]


def _sysctl_text(name: bytes) -> str:  # pragma: no cover (macOS)
    library = ctypes.CDLL(None)
    buffer = ctypes.create_string_buffer(limits.NAME_MAX_CHARS)
    size = ctypes.c_size_t(len(buffer))
    if library.sysctlbyname(name, buffer, ctypes.byref(size), None, 0) != 0:
        return ""
    return buffer.value.decode(errors="replace")
