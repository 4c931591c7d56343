"""Contexts whose devices were "measured" beforehand: nothing depends on how busy the machine is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from sparkle_mesh.context import Context
from sparkle_mesh.devices.cpu import CpuBackend
from sparkle_mesh.devices.device import Backend, Device
from sparkle_mesh.devices.kept_profiles import DeviceProfile
from sparkle_mesh.devices.profiles import ProfileStore, hardware_id
from sparkle_mesh.devices.registry import Registry


class SecondCpu(Backend):
    """Another device whose memory is NumPy's, of a kind of its own: kernels are run for it on the CPU."""

    kind = "second"

    def __init__(self) -> None:
        (self._device,) = CpuBackend().devices()
        self._device.info = msgspec.structs.replace(self._device.info, kind="second")
        # As if it did not compute with the first one's cores.
        self._device.capabilities = dataclasses.replace(self._device.capabilities, host_cores=0)

    def devices(self) -> tuple[Device, ...]:
        return (self._device,)


def profile_of(device: Device, *, memory: float = 10e9, link: float = 5e9, gflops: float = 50.0) -> DeviceProfile:
    return DeviceProfile(
        hardware=hardware_id(device),
        gflops={"float32": gflops, "float64": gflops / 2},
        memory_bytes_per_s=memory,
        to_device_bytes_per_s=link,
        from_device_bytes_per_s=link,
        launch_s=2e-6,
        measured_at=0.0,
    )


@pytest.fixture
def open_context(tmp_path: Path) -> Iterator[Callable[..., Context]]:
    """Return a function that opens a context with two devices; ``memory`` tells the second one's speed."""
    opened: list[Context] = []

    def open_one(*, second: bool = True, memory: float = 10e9, link: float = 5e9) -> Context:
        registry = Registry(extra=[SecondCpu()] if second else [], entry_points=list)
        store = ProfileStore(tmp_path)
        for device in registry.devices():
            if device.kind in ("cpu", "second"):
                speed = {"memory": memory, "link": link} if device.kind == "second" else {}
                store.save(profile_of(device, **speed))
        names = ["second"] if second else []
        opened.append(Context(names, data_dir=tmp_path, threads=2, registry=registry))
        return opened[-1]

    yield open_one
    for context in opened:
        context.close()


@pytest.fixture
def context(open_context: Callable[..., Context]) -> Context:
    return open_context(second=False)


@pytest.fixture
def two_devices(open_context: Callable[..., Context]) -> Context:
    return open_context()
