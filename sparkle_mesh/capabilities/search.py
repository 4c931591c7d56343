"""What is searched for among the devices of a mesh, and what was found."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from sparkle_mesh import limits, wire
from sparkle_mesh.capabilities.labels import MEMORY_RANGES_COUNT, device_label, memory_range
from sparkle_mesh.devices.detect import DeviceInfo
from sparkle_mesh.errors import UsageError

if TYPE_CHECKING:
    from sparkle_mesh.capabilities.records import CapabilityRecord
    from sparkle_mesh.fabric.interface import PeerId

#: The kinds of devices that there are. A search for any kind asks for each of them.
DEVICE_KINDS = ("cpu", "cuda", "rocm", "opencl")

_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<prefix>[kmgtp]?)(?P<binary>i?)b?", re.IGNORECASE)
_PREFIXES = " kmgtp"

MemorySize: TypeAlias = int | float | str


def parse_memory(memory: MemorySize) -> int:
    """Return ``memory`` in bytes: a number of them, or text such as ``"16GB"``, ``"1.5 TiB"`` (binary), ``"800M"``.

    Raises
    ------
    UsageError
        If it is neither, or negative.
    """
    match = _SIZE.fullmatch(memory.strip()) if isinstance(memory, str) else None
    if match is not None:
        power = _PREFIXES.index(match["prefix"].lower() or " ")
        size = float(match["number"]) * (1024.0 if match["binary"] else 1000.0) ** power
    elif isinstance(memory, (int, float)) and not isinstance(memory, bool):
        size = float(memory)
    else:
        raise UsageError(f"{memory!r} is no amount of memory; one looks like 16GB, 16GiB, or a number of bytes")
    if not 0 <= size < 2**63:
        raise UsageError(f"{memory!r} is no amount of memory that a device can have")
    return round(size)


class DeviceQuery(wire.Message, frozen=True, kw_only=True):
    """What a device must have. Made by :meth:`of`, which checks.

    Attributes
    ----------
    kind
        ``"cpu"``, ``"cuda"``, …; None for any.
    min_memory_bytes, min_gflops
        At least; devices that were not measured have no GFLOP/s.
    dtype
        What ``min_gflops`` is about, and what is ranked by.
    limit
        How many at most.
    """

    kind: str | None
    min_memory_bytes: int
    min_gflops: float
    dtype: str
    limit: int

    @classmethod
    def of(
        cls,
        kind: str | None = None,
        *,
        min_memory: MemorySize = 0,
        min_gflops: float = 0.0,
        dtype: str = "float32",
        limit: int = 100,
    ) -> DeviceQuery:
        """Return the query.

        Raises
        ------
        UsageError
            If an argument is not of those that there are; the message says which.
        """
        query = cls(
            kind=kind, min_memory_bytes=parse_memory(min_memory), min_gflops=min_gflops, dtype=dtype, limit=limit
        )
        return query.checked()

    def checked(self) -> DeviceQuery:
        """Return this query, which may come from elsewhere; raises UsageError as :meth:`of`."""
        if self.kind is not None and self.kind not in DEVICE_KINDS:
            raise UsageError(f"kind {self.kind!r} is not one of {', '.join(DEVICE_KINDS)}")
        if not 1 <= self.limit <= limits.FOUND_DEVICES_MAX_COUNT:
            raise UsageError(f"limit {self.limit} must be 1 to {limits.FOUND_DEVICES_MAX_COUNT}")
        if not self.min_gflops >= 0:
            raise UsageError(f"min_gflops {self.min_gflops} must not be negative")
        if not self.dtype or len(self.dtype) > limits.NAME_MAX_CHARS:
            raise UsageError(f"dtype {self.dtype!r} is no name of one; they are called as in NumPy: float32")
        return self

    def labels(self) -> tuple[str, ...]:
        """Return the labels under which such devices are stored."""
        kinds = DEVICE_KINDS if self.kind is None else (self.kind,)
        ranges = range(memory_range(self.min_memory_bytes), MEMORY_RANGES_COUNT)
        return tuple(device_label(kind, number) for kind in kinds for number in ranges)

    def fits(self, device: DeviceInfo) -> bool:
        """Whether ``device`` has all that is asked for."""
        if self.kind is not None and device.kind != self.kind:
            return False
        if device.memory_bytes < self.min_memory_bytes:
            return False
        return not self.min_gflops or device.gflops.get(self.dtype, 0.0) >= self.min_gflops


class FoundDevice(wire.Message, frozen=True, kw_only=True):
    """A device of the mesh, and who offers it.

    Attributes
    ----------
    peer_id
        The process that told of it; its key has signed what it told.
    host_id
        Stands for the machine, in hexadecimal digits.
    role, software, addresses
        Of that process: ``"node"`` or ``"trainer"``, its version, where it listens.
    device
        What it is.
    age_s
        How long ago its holders heard that it is still there, in seconds.
    """

    peer_id: wire.PeerIdText
    host_id: wire.NameText
    role: wire.NameText
    software: wire.NameText
    addresses: wire.AddressList
    device: DeviceInfo
    age_s: float


@dataclass(frozen=True, slots=True)
class FoundRecord:
    """A verified record, who published it, and its least age at those who hold it."""

    publisher: str
    sequence: int
    record: CapabilityRecord
    age_s: float


def choose_devices(records: Collection[FoundRecord], query: DeviceQuery) -> list[FoundDevice]:
    """Return the devices that fit, the fastest first, then the largest, then those heard of last.

    What the trainers of a machine tell is left out where a node of it tells the same, or another trainer. Several nodes
    of one machine (in containers, say) are several offers.
    """
    offers: dict[bytes | PeerId, FoundRecord] = {}
    hosts_with_node = {found.record.host_id for found in records if found.record.role == "node"}
    for found in sorted(records, key=lambda found: (found.age_s, found.publisher)):
        if found.record.role == "node":
            offers[found.publisher] = found
        elif found.record.host_id not in hosts_with_node:
            offers.setdefault(found.record.host_id, found)
    devices = [
        FoundDevice(
            peer_id=found.publisher,
            host_id=found.record.host_id.hex(),
            role=found.record.role,
            software=found.record.software,
            addresses=found.record.addresses,
            device=device,
            age_s=round(found.age_s, 3),
        )
        for found in offers.values()
        for device in found.record.devices
        if query.fits(device)
    ]
    devices.sort(
        key=lambda one: (
            -one.device.gflops.get(query.dtype, 0.0),
            -one.device.memory_bytes,
            one.age_s,
            one.peer_id,
            one.device.kind,
            one.device.index,
        )
    )
    return devices[: query.limit]
