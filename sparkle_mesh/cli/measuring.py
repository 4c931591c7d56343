"""Measures this machine's devices for ``sparkle-node measure``."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from sparkle_mesh.devices.device import Device
from sparkle_mesh.devices.kept_profiles import DeviceProfile
from sparkle_mesh.devices.profiles import ProfileStore, measure_profile
from sparkle_mesh.devices.registry import Registry
from sparkle_mesh.errors import UsageError


def measure(data_dir: Path, *, told: TextIO | None = None) -> dict[str, DeviceProfile]:
    """Measure all devices of this machine, one after the other, and keep what was found in ``data_dir``.

    Parameters
    ----------
    told
        Where to say which device is being measured.

    Returns
    -------
    dict
        Profiles by the names of devices, as ``"cuda:0"``.

    Raises
    ------
    DeviceError
        If a device fails while it is measured.
    UsageError
        If what was found cannot be kept.
    """
    store, registry = ProfileStore(data_dir), Registry()
    profiles: dict[str, DeviceProfile] = {}
    try:
        devices: tuple[Device, ...] = registry.devices()
        for device in devices:
            if told is not None:
                print(f"measuring {device} ({device.name}) ...", file=told, flush=True)
            profiles[str(device)] = measure_profile(device)
            if not store.save(profiles[str(device)]):
                raise UsageError(f"what {device} was measured to do cannot be kept in {data_dir}; make it writable")
    finally:
        registry.close()
    return profiles
