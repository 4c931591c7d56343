"""Which devices are found, and what happens to backends that do not load."""

from __future__ import annotations

import logging
import sys
from importlib import metadata

import pytest

from sparkle_mesh.devices import registry as registry_module
from sparkle_mesh.devices.cpu import CpuBackend, CpuDevice
from sparkle_mesh.devices.device import Backend, Device
from sparkle_mesh.devices.null import NullBackend, NullDevice
from sparkle_mesh.devices.registry import ENTRY_POINT_GROUP, Registry, is_installed
from sparkle_mesh.errors import DeviceError, UsageError

HERE = __name__


class Abacus(NullBackend):
    """A backend of another package."""

    kind = "abacus"


class Broken(Backend):
    """A backend whose driver is."""

    kind = "broken"

    def devices(self):
        raise DeviceError("the beads are stuck")


class Unfinished(NullBackend):
    """A backend that is wrong about itself."""

    def devices(self):
        raise AssertionError("never reached")


def nonsense():
    return "no backend"


def entry(name, value):
    return metadata.EntryPoint(name, value, ENTRY_POINT_GROUP)


def nothing_else():
    return ()


@pytest.fixture
def only_builtin(monkeypatch):
    """Let nothing optional be installed."""
    monkeypatch.setattr(registry_module, "is_installed", lambda package: False)


@pytest.fixture
def importable(monkeypatch):
    """Let entry points name this file."""
    monkeypatch.setitem(sys.modules, "backends_of_tests", sys.modules[HERE])


def test_the_cpu_is_first_and_always_there():
    found = Registry(entry_points=nothing_else).devices()
    assert isinstance(found[0], CpuDevice)


def test_what_is_not_installed_is_absent(only_builtin, caplog):
    registry = Registry(entry_points=nothing_else)
    assert [backend.kind for backend in registry.backends()] == ["cpu"]
    assert [str(device) for device in registry.devices()] == ["cpu:0"]
    assert not caplog.records


def test_it_looks_once():
    registry = Registry(entry_points=nothing_else)
    assert registry.devices()[0] is registry.devices("cpu")[0] is registry.device() is registry.device("cpu:0")


def test_opencl_devices_are_found(device_of):
    device_of("opencl")
    assert Registry(entry_points=nothing_else).devices("opencl")


def test_devices_are_called_by_name(only_builtin):
    registry = Registry(extra=[NullBackend([NullDevice(0), NullDevice(1)])], entry_points=nothing_else)
    assert str(registry.device("null")) == "null:0"
    assert str(registry.device("null:1")) == "null:1"
    device = registry.device("null:1")
    assert registry.device(device) is device
    for name in ("null:2", "cuda", "null:x", ""):
        with pytest.raises(UsageError, match=f"no device {name!r} here; there are cpu:0, null:0, null:1"):
            registry.device(name)
    with pytest.raises(UsageError, match="device is 3"):
        registry.device(3)


def test_backends_of_other_packages_are_found(only_builtin, importable):
    registry = Registry(entry_points=lambda: [entry("beads", "backends_of_tests:Abacus")])
    assert [backend.kind for backend in registry.backends()] == ["cpu", "abacus"]
    assert len(registry.devices()) == 2


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("no_such_module_anywhere:Backend", "No module named"),
        ("backends_of_tests:NoSuchBackend", "NoSuchBackend"),
        ("backends_of_tests:nonsense", "no Backend"),
        ("backends_of_tests:Unfinished", "never reached"),
        ("backends_of_tests:Broken", "the beads are stuck"),
        ("sparkle_mesh.devices.cpu:CpuBackend", "kind 'cpu' already"),
    ],
)
def test_what_does_not_load_is_one_warning(only_builtin, importable, caplog, value, why):
    registry = Registry(entry_points=lambda: [entry("beads", value), entry("good", "backends_of_tests:Abacus")])
    with caplog.at_level(logging.WARNING):
        assert [backend.kind for backend in registry.backends()] == ["cpu", "abacus"]
        registry.devices()
    (record,) = caplog.records
    assert "backend beads" in record.getMessage()
    assert why in record.getMessage()


def test_gpus_that_cuda_serves_are_left_out_of_opencl_unless_asked(monkeypatch):
    asked = []

    class Recorder(NullBackend):
        kind = "opencl"

    class Gpu(NullDevice):
        kind = "cuda"

    class Cuda(NullBackend):
        kind = "cuda"

    monkeypatch.setattr(registry_module, "is_installed", lambda package: True)
    monkeypatch.setattr(registry_module, "_make_cupy", lambda: Cuda([Gpu()]))
    monkeypatch.setattr(registry_module, "_make_opencl", lambda kinds: asked.append(set(kinds)) or Recorder())
    Registry(entry_points=nothing_else).devices()
    Registry(entry_points=nothing_else, duplicates=True).devices()
    assert asked == [{"cpu", "cuda"}, set()]


def test_a_closed_registry_looks_again():
    registry = Registry(extra=[NullBackend()], entry_points=nothing_else)
    device = registry.device("null")
    device.pool.free(device.pool.allocate(1000))
    registry.close()
    assert device.allocated_bytes == 0
    assert registry.devices("null") == (device,)


def test_looking_for_a_package_does_not_import_it():
    assert is_installed("antigravity")
    assert "antigravity" not in sys.modules
    assert not is_installed("no_such_package_anywhere")


def test_backends_give_the_same_devices_each_time():
    for backend in (CpuBackend(), NullBackend()):
        (first,) = backend.devices()
        assert isinstance(first, Device)
        assert first.kind == backend.kind
        assert backend.devices() == (first,)
