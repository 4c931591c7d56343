"""Arrays with copies that they could do without, for devices that are short of memory."""

from __future__ import annotations

import threading
import weakref

from sparkle_mesh.devices.device import Device
from sparkle_mesh.kernels.array import Array


class SpareCopies:
    """Knows the arrays of a context that are on several devices; a :class:`~sparkle_mesh.devices.pool.Reclaimer`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By identity: arrays compare by element.
        self._arrays: weakref.WeakValueDictionary[int, Array] = weakref.WeakValueDictionary()

    def add(self, array: Array) -> None:
        """Remember ``array`` for as long as it lives."""
        with self._lock:
            self._arrays[id(array)] = array

    def _known(self) -> list[Array]:
        with self._lock:
            return list(self._arrays.values())

    def reclaimable_bytes(self, device: Device) -> int:
        """Return what copies on ``device`` take that are elsewhere as well."""
        return sum(array.spare_copy_bytes(device) for array in self._known())

    def reclaim(self, device: Device, nbytes: int) -> int:
        """Give such copies back until it is ``nbytes`` or more, or there are none; return how much it was."""
        freed = 0
        for array in self._known():
            if freed >= nbytes:
                break
            freed += array.drop_copy(device)
        return freed
