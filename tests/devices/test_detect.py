"""Device detection: the real machine, and texts and drivers of others."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable

import psutil
import pytest

from sparkle_mesh import limits, wire
from sparkle_mesh.devices import detect, nvml

X86 = """processor\t: 0
model name\t: AMD EPYC  9454 48-Core Processor
flags\t\t: fpu sse4_2 aes avx avx2 made_up
power management:

processor\t: 1
model name\t: something else
"""
ARM = "processor : 0\nFeatures : fp asimd aes sve2\nHardware : BCM2835\n"


def test_this_machine_has_one_cpu_first() -> None:
    cpu, *rest = detect.detect_devices()
    assert (cpu.kind, cpu.index) == ("cpu", 0)
    assert cpu.name
    assert 0 < cpu.logical_cores <= (os.cpu_count() or 0)
    assert cpu.memory_bytes > 2**20
    assert all(device.kind == "cuda" for device in rest)


def test_device_infos_survive_the_wire() -> None:
    for device in detect.detect_devices():
        assert wire.decode(wire.encode(device), detect.DeviceInfo) == device


def test_logical_cores_are_those_this_process_may_use() -> None:
    program = (
        "import os; cpu = sorted(os.sched_getaffinity(0))[0]; os.sched_setaffinity(0, {cpu});"
        "from sparkle_mesh.devices.detect import detect_cpu; print(detect_cpu().logical_cores)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "1"


def test_names_and_features_of_an_x86_processor() -> None:
    cpuinfo = detect.parse_cpuinfo(X86)
    assert detect.cpu_name(cpuinfo) == "AMD EPYC 9454 48-Core Processor"
    assert detect.cpu_features(cpuinfo) == ("sse4_2", "avx", "avx2", "aes")


def test_names_and_features_of_an_arm_processor() -> None:
    cpuinfo = detect.parse_cpuinfo(ARM)
    assert detect.cpu_name(cpuinfo) == "BCM2835"
    assert detect.cpu_features(cpuinfo) == ("aes", "asimd", "sve2")


def test_a_machine_that_tells_nothing_still_has_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(detect, "_CPUINFO", detect.Path(str(tmp_path)) / "absent")
    cpu = detect.detect_cpu()
    assert cpu.name
    assert cpu.features == ()


def test_long_names_fit_the_wire() -> None:
    assert len(detect._bounded("x" * 1000)) == limits.NAME_MAX_CHARS


@pytest.mark.parametrize(
    ("total", "stated", "usable"),
    [(100, [], 100), (100, ["60\n"], 60), (100, ["max", ""], 100), (100, ["9223372036854771712"], 100)],
)
def test_a_containers_memory_limit_counts(total: int, stated: list[str], usable: int) -> None:
    assert detect.usable_memory_bytes(total, stated) == usable


def test_gpus_are_read_from_the_driver(build_nvml: Callable[..., str]) -> None:
    library = build_nvml()
    first, second = nvml.read_gpus(timeout_s=30, library=library)
    assert first == nvml.Gpu(0, "NVIDIA Alpha", 150754820096, 16896, "90", "580.12")
    assert second.name == "NVIDIA \ufffd"
    assert ctypes.c_int.in_dll(ctypes.CDLL(library), "shutdowns").value == 1


def test_gpus_become_devices(build_nvml: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    library = build_nvml()
    read_gpus = nvml.read_gpus
    monkeypatch.setattr(nvml, "read_gpus", lambda timeout_s: read_gpus(timeout_s=timeout_s, library=library))
    _, first, second = detect.detect_devices(timeout_s=30)
    assert (first.kind, first.index, first.features, first.driver) == ("cuda", 0, ("sm_90",), "580.12")
    assert (second.kind, second.index, second.memory_bytes) == ("cuda", 1, 4096)


def test_an_old_driver_tells_less(build_nvml: Callable[..., str]) -> None:
    first, _ = nvml.read_gpus(timeout_s=30, library=build_nvml("OLD"))
    assert (first.cores, first.compute_capability, first.memory_bytes) == (0, "", 150754820096)


def test_a_lost_gpu_does_not_hide_the_others(build_nvml: Callable[..., str]) -> None:
    (gpu,) = nvml.read_gpus(timeout_s=30, library=build_nvml("LOST_FIRST"))
    assert gpu.index == 1


@pytest.mark.parametrize("macro", ["NO_INIT", "NO_COUNT"])
def test_a_broken_driver_counts_as_none(build_nvml: Callable[..., str], macro: str) -> None:
    assert nvml.read_gpus(timeout_s=30, library=build_nvml(macro)) == ()


@pytest.mark.parametrize("library", ["libthere-is-no-such-library.so", "/dev/null"])
def test_no_driver_is_no_error(library: str) -> None:
    assert nvml.read_gpus(timeout_s=30, library=library) == ()


def test_a_library_that_is_not_nvml_is_no_error() -> None:
    assert nvml.read_gpus(timeout_s=30, library="libc.so.6") == ()


def test_a_driver_that_hangs_is_given_up(build_nvml: Callable[..., str]) -> None:
    library = build_nvml("HANG")
    before = set(threading.enumerate())
    assert nvml.read_gpus(timeout_s=0.05, library=library) == ()
    (left,) = set(threading.enumerate()) - before
    assert left.daemon
    ctypes.CDLL(library).stand_in_release()
    left.join(timeout=30)
    assert not left.is_alive()


def test_importing_detection_loads_no_driver_and_no_package() -> None:
    program = (
        "import sys, sparkle_mesh.devices.detect;"
        "print(sorted({'torch', 'cupy', 'libp2p', 'trio', 'psutil', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("limit", "used", "statistics", "free"),
    [
        ("1000\n", "400\n", "anon 300\ninactive_file 100\n", 700),
        ("1000\n", "400\n", "inactive_file 1\ntotal_inactive_file 150\n", 750),
        ("1000\n", "400\n", "", 600),
        ("1000\n", "4000\n", "inactive_file none\n", 0),
        ("max\n", "400\n", "inactive_file 100\n", None),
        ("", "", "", None),
    ],
)
def test_what_is_left_of_a_containers_memory(limit: str, used: str, statistics: str, free: int | None) -> None:
    assert detect.container_free_bytes(limit, used, statistics) == free


def test_free_memory_is_within_the_machines() -> None:
    assert 0 < detect.free_memory_bytes() <= psutil.virtual_memory().total
