"""What was measured is told by nodes, of the devices that it was measured on."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from sparkle_mesh.devices.cpu import CpuDevice
from sparkle_mesh.devices.detect import DeviceInfo, detect_cpu
from sparkle_mesh.devices.kept_profiles import FOLDER, DeviceProfile, with_gflops
from sparkle_mesh.devices.profiles import ProfileStore, hardware_id

GPU = DeviceInfo(kind="cuda", index=0, name="NVIDIA Made Up", memory_bytes=1 << 30, cores=1024, driver="580.1")


def keep(data_dir: Path, hardware: str, gflops: float, measured_at: float = 1.0) -> Path:
    store = ProfileStore(data_dir)
    store.save(
        DeviceProfile(
            hardware=hardware,
            gflops={"float32": gflops},
            memory_bytes_per_s=1e9,
            to_device_bytes_per_s=1e9,
            from_device_bytes_per_s=1e9,
            launch_s=1e-6,
            measured_at=measured_at,
        )
    )
    return store.path(hardware)


def test_devices_are_told_with_what_they_were_measured_to_do(tmp_path: Path) -> None:
    cpu = detect_cpu()
    assert with_gflops([cpu, GPU], tmp_path) == (cpu, GPU)
    keep(tmp_path, hardware_id(CpuDevice()), 50.0)
    # CuPy tells other things of a GPU than the driver's own library does.
    keep(tmp_path, "cuda NVIDIA_Made_Up 0 0 sm_90 13000 2.3.1", 900.0, 1.0)
    keep(tmp_path, "cuda NVIDIA_Made_Up 0 0 sm_90 13000 2.4.0", 1000.0, 2.0)
    keep(tmp_path, "cuda NVIDIA_Made_Up_Too 0 0 sm_90 13000 2.4.0", 5.0, 3.0)
    found = with_gflops([cpu, GPU], tmp_path)
    assert [info.gflops for info in found] == [{"float32": 50.0}, {"float32": 1000.0}]
    assert msgspec.structs.replace(found[1], gflops={}) == GPU


def test_a_cpu_of_which_another_part_was_measured_has_no_figures(tmp_path: Path) -> None:
    keep(tmp_path, hardware_id(CpuDevice()), 50.0)
    few = msgspec.structs.replace(detect_cpu(), logical_cores=1000)
    assert with_gflops([few], tmp_path) == (few,)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80"])
def test_a_damaged_profile_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes) -> None:
    path = keep(tmp_path, hardware_id(CpuDevice()), 50.0)
    path.write_bytes(content)
    assert with_gflops([detect_cpu()], tmp_path) == (detect_cpu(),)
    assert path.with_suffix(".damaged").exists()
    assert "is damaged" in caplog.text


def test_a_folder_that_cannot_be_read_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / FOLDER / "a.profile"
    path.mkdir(parents=True)
    assert with_gflops([GPU], tmp_path) == (GPU,)
    assert "cannot be read" in caplog.text
