"""Profiles: measured in bounded time, kept by hardware, and not believed when they are damaged."""

from __future__ import annotations

import logging
import stat

import pytest

from sparkle_mesh import limits, wire
from sparkle_mesh.clock import SYSTEM_CLOCK
from sparkle_mesh.devices import profiles
from sparkle_mesh.devices.device import DeviceCapabilities
from sparkle_mesh.devices.null import NullDevice
from sparkle_mesh.devices.profiles import ProfileFile, ProfileStore, hardware_id, measure_profile
from sparkle_mesh.errors import OutOfMemoryError

RATES = ("memory_bytes_per_s", "to_device_bytes_per_s", "from_device_bytes_per_s", "launch_s")


class Ticking:
    """A clock that goes on by ``step_s`` each time it is read."""

    def __init__(self, step_s=0.001):
        self.time, self.step_s = 1000.0, step_s

    def now(self):
        self.time += self.step_s
        return self.time

    def wall_time(self):
        return 1.8e9


@pytest.fixture
def small(monkeypatch):
    """Measure with little data and little time."""
    monkeypatch.setattr(limits, "PROFILE_COPY_MAX_BYTES", 1 << 20)
    monkeypatch.setattr(limits, "PROFILE_MATRIX_MAX_COUNT", 128)
    monkeypatch.setattr(limits, "PROFILE_LAUNCHES_COUNT", 5)
    monkeypatch.setattr(limits, "PROFILE_STEP_S", 0.002)


def test_every_device_is_measured(real_device, small):
    profile = measure_profile(real_device, budget_s=20.0)
    assert all(getattr(profile, rate) > 0 for rate in RATES)
    assert profile.gflops["float32"] > 0
    assert set(profile.gflops) == {"float32", "float64", "float16"} & real_device.capabilities.matmul_dtypes
    assert profile.hardware == hardware_id(real_device)
    assert real_device.pool.kept_bytes == 0


def test_it_takes_no_longer_than_it_may():
    clock = Ticking(0.01)
    started = clock.now()
    profile = measure_profile(NullDevice(), clock=clock)
    assert clock.now() - started < limits.PROFILE_BUDGET_S + 0.2
    assert profile.gflops


def test_what_there_is_no_time_for_is_zero(cpu, small):
    profile = measure_profile(cpu, budget_s=0.0)
    assert [getattr(profile, rate) for rate in RATES] == [0.0] * 4
    assert profile.gflops == {}


def test_a_device_without_room_is_not_measured(small):
    profile = measure_profile(NullDevice(memory_bytes=0, language=""), clock=Ticking())
    assert [getattr(profile, rate) for rate in RATES] == [0.0] * 4
    assert profile.gflops == {}


def test_a_device_that_runs_out_of_memory_is_measured_as_far_as_that_goes(small, caplog):
    class Crowded(NullDevice):
        def _allocate(self, nbytes):
            raise OutOfMemoryError("somebody was faster")

    with caplog.at_level(logging.INFO):
        profile = measure_profile(Crowded(language=""), clock=Ticking())
    assert profile.memory_bytes_per_s == 0
    assert "somebody was faster" in caplog.text


def test_a_device_that_multiplies_nothing_has_no_rate(small):
    device = NullDevice(language="")
    device.capabilities = DeviceCapabilities(dtypes=frozenset({"float32"}))
    profile = measure_profile(device, clock=Ticking())
    assert profile.gflops == {}
    assert profile.launch_s == 0


def test_a_profile_is_measured_once(tmp_path, monkeypatch, small):
    store = ProfileStore(tmp_path)
    first = store.profile(NullDevice())
    monkeypatch.setattr(profiles, "measure_profile", None)
    assert store.profile(NullDevice()) == first
    assert ProfileStore(tmp_path).profile(NullDevice(1)) == first
    (path,) = (tmp_path / "devices").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_profile_that_is_not_whole_is_not_kept(tmp_path, small, monkeypatch, caplog):
    monkeypatch.setattr(profiles, "measure_profile", lambda device, clock: measure_profile(device, budget_s=0.0))
    store = ProfileStore(tmp_path)
    with caplog.at_level(logging.INFO):
        assert store.profile(NullDevice()).gflops == {}
    assert store.load(NullDevice()) is None
    assert "tries again" in caplog.text


def test_other_hardware_has_another_profile(tmp_path, cpu, small):
    store = ProfileStore(tmp_path)
    store.profile(NullDevice())
    assert store.load(cpu) is None
    assert hardware_id(cpu) != hardware_id(NullDevice())


def damaged(store, path, content):
    return b"\xc1 nothing of ours"


def too_long(store, path, content):
    return path.read_bytes() + b"\0" * limits.PROFILE_FILE_MAX_BYTES


def cut(store, path, content):
    return path.read_bytes()[:-9]


def newer(store, path, content):
    return wire.encode(ProfileFile(version=2, profile=content.profile))


def foreign(store, path, content):
    other = store.profile(NullDevice(language="")).__class__
    fields = {name: getattr(content.profile, name) for name in content.profile.__struct_fields__}
    return wire.encode(ProfileFile(version=1, profile=other(**(fields | {"hardware": "another machine's"}))))


@pytest.mark.parametrize("harm", [damaged, too_long, cut, newer, foreign])
def test_a_file_that_cannot_be_used_is_set_aside(tmp_path, caplog, small, harm):
    store, device = ProfileStore(tmp_path), NullDevice()
    first = store.profile(device)
    path = store.path(hardware_id(device))
    path.write_bytes(harm(store, path, wire.decode(path.read_bytes(), ProfileFile)))
    assert store.load(device) is None
    assert "moved to" in caplog.text
    assert path.with_suffix(".damaged").exists()
    assert store.profile(device).hardware == first.hardware
    assert store.load(device) is not None


def test_a_file_that_cannot_be_moved_is_told(tmp_path, caplog, small, monkeypatch):
    store, device = ProfileStore(tmp_path), NullDevice()
    store.profile(device)
    path = store.path(hardware_id(device))
    path.write_bytes(b"")
    path.with_suffix(".damaged").mkdir()
    (path.with_suffix(".damaged") / "full").touch()
    assert store.load(device) is None
    assert "cannot be moved" in caplog.text


def test_a_folder_that_is_none_is_told(tmp_path, caplog, small):
    (tmp_path / "devices").touch()
    store = ProfileStore(tmp_path)
    assert store.profile(NullDevice()).gflops
    assert "cannot be read" in caplog.text
    assert "cannot be kept" in caplog.text


def test_the_default_clock_is_the_systems(tmp_path, small):
    before = SYSTEM_CLOCK.wall_time()
    assert before <= ProfileStore(tmp_path).profile(NullDevice()).measured_at <= SYSTEM_CLOCK.wall_time()
