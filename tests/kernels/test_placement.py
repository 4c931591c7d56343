"""Devices that compute with the same cores are not expected to be faster together."""

from __future__ import annotations

import dataclasses

import pytest

from sparkle_mesh.devices.detect import usable_logical_cores
from sparkle_mesh.devices.device import Device
from sparkle_mesh.devices.null import NullDevice
from sparkle_mesh.kernels.estimate import Corrections, Speed
from sparkle_mesh.kernels.graph import Graph, GraphBuilder
from sparkle_mesh.kernels.ops import TensorType
from sparkle_mesh.kernels.placement import Choice, Gathering, Placement

ALL = max(usable_logical_cores(), 1)
AT_HAND = Gathering(
    all_s=lambda device: 0.0,
    one_s=lambda device, number: 0.0,
    to_s=lambda device, nbytes: 0.0,
    from_s=lambda device, nbytes: 0.0,
)


def on_cores(index: int, cores: int) -> Device:
    device = NullDevice(index)
    device.capabilities = dataclasses.replace(device.capabilities, keeps_nothing=False, host_cores=cores)
    return device


def placement(*devices: Device) -> Placement:
    # Each one slower by a tenth than that before it.
    speeds = {device: 1e9 / (1 + device.index / 10) for device in devices}

    def speed(device: Device) -> Speed:
        rate = speeds[device]
        return Speed(
            gflops={"float32": rate / 1e9},
            memory_bytes_per_s=rate,
            to_device_bytes_per_s=1e12,
            from_device_bytes_per_s=1e12,
            launch_s=0.0,
        )

    return Placement(devices, speed, Corrections(), host_threads=ALL)


def doubled() -> Graph:
    builder = GraphBuilder([TensorType((4_000_000,), "float32")])
    return builder.finish([builder.elementwise("add", 0, 0)])


def shared(choices: list[Choice]) -> Choice | None:
    return next((choice for choice in choices if choice.parts), None)


def test_rivals_for_cores_do_not_share_by_themselves() -> None:
    devices = [on_cores(0, ALL), on_cores(1, ALL)]
    assert shared(placement(*devices).choices(doubled(), AT_HAND)) is None


def test_one_with_cores_of_its_own_does() -> None:
    devices = [on_cores(0, ALL), on_cores(1, ALL), on_cores(2, 0)]
    found = shared(placement(*devices).choices(doubled(), AT_HAND))
    assert found is not None
    assert found.devices == (devices[0], devices[2])


def test_rivals_that_are_told_to_share_are_not_expected_to_gain() -> None:
    rivals, others = [on_cores(0, ALL), on_cores(1, ALL)], [on_cores(0, 0), on_cores(1, 0)]
    slow, fast = (shared(placement(*some).choices(doubled(), AT_HAND, some)) for some in (rivals, others))
    assert slow is not None
    assert fast is not None
    assert slow.seconds == pytest.approx(2 * fast.seconds, rel=0.01)
