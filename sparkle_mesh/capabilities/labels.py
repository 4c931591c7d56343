"""What records are stored under: the publisher, and each kind of device with its range of memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # The command line reads what was found without the network stack.
    from sparkle_mesh.devices.detect import DeviceInfo
    from sparkle_mesh.fabric.interface import PeerId

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


def publisher_label(publisher: PeerId) -> str:
    """Return the label that a publisher's own record is stored under."""
    return f"publisher {publisher}"


def index_labels(publisher: PeerId, devices: Iterable[DeviceInfo]) -> frozenset[str]:
    """Return the labels under which a record is stored: no other is right for it."""
    labels = {device_label(device.kind, memory_range(device.memory_bytes)) for device in devices}
    return frozenset({publisher_label(publisher), *labels})
