"""What devices were measured to do, as it is kept on disk: read without NumPy, by nodes that tell others.

One file per hardware in ``<data_dir>/devices/``; :mod:`.profiles` measures and writes them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import msgspec

from sparkle_mesh import limits, wire
from sparkle_mesh.devices.detect import DeviceInfo, GflopsByDtype
from sparkle_mesh.errors import ProtocolError, VersionError
from sparkle_mesh.files import read_bounded, set_aside

logger = logging.getLogger(__name__)

VERSION = 1
FOLDER = "devices"
SUFFIX = ".profile"


class DeviceProfile(wire.Message, frozen=True):
    """What one device was measured to do; 0 where that was not possible.

    Attributes
    ----------
    hardware
        What tells this hardware, its driver and its library apart from others.
    gflops
        Products of matrices, in 10^9 floating-point operations a second, by dtype.
    memory_bytes_per_s
        Its memory, bytes read and bytes written counted both, in a copy.
    to_device_bytes_per_s, from_device_bytes_per_s
        Between ordinary host memory and its own.
    launch_s
        From one small kernel to the next, in seconds.
    measured_at
        In seconds since the Unix epoch.
    """

    hardware: str
    gflops: GflopsByDtype
    memory_bytes_per_s: float
    to_device_bytes_per_s: float
    from_device_bytes_per_s: float
    launch_s: float
    measured_at: float


class ProfileFile(wire.Message, frozen=True):
    """The whole file."""

    version: wire.Count
    profile: DeviceProfile


def hardware_words(info: DeviceInfo) -> list[str]:
    """Return what a profile's ``hardware`` begins with: kind, name, cores and threads, without spaces."""
    return [str(part).replace(" ", "_") for part in (info.kind, info.name, info.cores, info.logical_cores)]


def read_profile(path: Path, hardware: str | None = None) -> DeviceProfile | None:
    """Return the profile in a file, or None; what is damaged, or of other ``hardware``, is set aside. Never raises."""
    try:
        data = read_bounded(path, limits.PROFILE_FILE_MAX_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("profile %s cannot be read: %s; going on without", path, error)
        return None
    try:
        content = wire.decode(data, ProfileFile, max_bytes=limits.PROFILE_FILE_MAX_BYTES)
        if content.version != VERSION or hardware not in (None, content.profile.hardware):
            raise VersionError(f"it is of version {content.version} or of other hardware")
    except ProtocolError as error:
        set_aside(path, str(error))
        return None
    return content.profile


def with_gflops(devices: Sequence[DeviceInfo], data_dir: Path) -> tuple[DeviceInfo, ...]:
    """Return ``devices`` with what the newest profiles in ``data_dir`` tell of them. Never raises.

    A GPU is known by its kind and name, since drivers and libraries tell different things of it; a CPU also by how many
    of its cores this process may use.
    """
    paths = sorted(islice((data_dir / FOLDER).glob(f"*{SUFFIX}"), limits.PROFILES_READ_MAX_COUNT))
    known = [profile for path in paths if (profile := read_profile(path)) is not None]
    known.sort(key=lambda profile: profile.measured_at)
    found = []
    for info in devices:
        words = hardware_words(info)[: 4 if info.kind == "cpu" else 2]
        gflops: GflopsByDtype = {}
        for profile in known:
            if profile.hardware.split(" ")[: len(words)] == words:
                gflops = profile.gflops
        found.append(msgspec.structs.replace(info, gflops=gflops) if gflops else info)
    return tuple(found)
