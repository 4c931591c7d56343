"""What records are stored under: each kind of device with its range of memory; those of trainers also as such.

Under one label only so many records are held. When it is full the rest lies under two labels below it, by the first bit
of a hash of the publisher's id; when these are full, by the next bit, and so on: a tree that grows with the mesh (after
Ramabhadran, Ratnasamy, Hellerstein and Shenker, "Prefix Hash Tree: An Indexing Data Structure over Distributed Hash
Tables", 2004, which splits what is stored; here what comes later goes deeper).
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # The command line reads what was found without the network stack.
    from sparkle_mesh.devices.detect import DeviceInfo

#: Under which trainers are found.
TRAINERS_LABEL = "trainers"
_MEMORY_STEP_BITS = 2
_MEMORY_UNIT_BITS = 30
#: Of memory: below 1 GiB, below 4, 16, 64, 256 GiB, below 1 TiB, below 4 TiB, and all above.
MEMORY_RANGES_COUNT = 8


def memory_range(memory_bytes: int) -> int:
    """Return which of the ``MEMORY_RANGES_COUNT`` ranges an amount of memory is in."""
    above_unit = max(memory_bytes, 0) >> _MEMORY_UNIT_BITS
    return min(-(-above_unit.bit_length() // _MEMORY_STEP_BITS), MEMORY_RANGES_COUNT - 1)


def device_label(kind: str, range_number: int) -> str:
    """Return the label that devices of a kind with memory in that range are stored under."""
    return f"device {range_number} {kind}"


def label_below(label: str, bits: str) -> str:
    """Return the label for publishers whose hash begins with ``bits``, of ``"0"`` and ``"1"``; ``label`` for none."""
    return f"{label} / {bits}" if bits else label


def bits_of(publisher: str, depth: int) -> str:
    """Return the first ``depth`` bits of a publisher's hash, as ``"0"`` and ``"1"``."""
    return format(int.from_bytes(sha256(publisher.encode()).digest()[:2], "big"), "016b")[:depth]


def index_labels(role: str, devices: Iterable[DeviceInfo]) -> frozenset[str]:
    """Return the labels under which a record is stored: no other is right for it."""
    labels = {device_label(device.kind, memory_range(device.memory_bytes)) for device in devices}
    return frozenset({TRAINERS_LABEL, *labels} if role == "trainer" else labels)
