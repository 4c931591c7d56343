"""Freed blocks of a device's memory, kept for the next one who asks.

Asking a driver for memory is slow (a millisecond on a GPU; on the CPU every fresh page is a fault), and training asks
for the same sizes again and again. Sizes are rounded up to one of eight per power of two, so that a block fits again
at the price of at most an eighth of it. Beyond a bound the blocks that were freed longest ago go back to the driver.

Blocks come back from finalizers too, which the garbage collector may run in the middle of anything, this pool's own
methods included. So a block that comes back is put into a queue that needs no lock, and whoever has the lock next
sorts it in.
"""

from __future__ import annotations

import operator
import threading
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Protocol, SupportsIndex

from sparkle_mesh import limits
from sparkle_mesh.errors import OutOfMemoryError, UsageError

if TYPE_CHECKING:
    from sparkle_mesh.devices.device import Device, Memory


class Reclaimer(Protocol):
    """Holds memory of a device that it could do without: copies of what is also elsewhere."""

    def reclaimable_bytes(self, device: Device) -> int:
        """Return how much of the device's memory it could give back."""
        ...

    def reclaim(self, device: Device, nbytes: int) -> int:
        """Give back ``nbytes`` or more, if there is as much; return how much it was."""
        ...


class MemoryPool:
    """The pool of one device; safe to use from any thread, and from finalizers."""

    def __init__(self, device: Device, *, kept_max_bytes: int | None = None) -> None:
        self._device = device
        if kept_max_bytes is None:
            kept_max_bytes = int(device.info.memory_bytes * limits.POOL_KEPT_RATIO)
            if device.capabilities.unified:
                kept_max_bytes = min(kept_max_bytes, limits.POOL_KEPT_HOST_MAX_BYTES)
        self._kept_max_bytes = kept_max_bytes
        self._lock = threading.Lock()
        self._returned: deque[Memory] = deque()
        # By age; and the ages of the blocks of one size, the youngest last: it may still be in the cache.
        self._blocks: OrderedDict[int, Memory] = OrderedDict()
        self._ages: dict[int, list[int]] = {}
        self._next_age = 0
        self._kept_bytes = 0
        self._reclaimers: list[Reclaimer] = []

    @property
    def kept_bytes(self) -> int:
        """What freed blocks are kept, in bytes."""
        self._sort_in()
        return self._kept_bytes

    @property
    def in_use_bytes(self) -> int:
        """What is handed out, in bytes (of whole blocks)."""
        return self._device.allocated_bytes - self.kept_bytes

    def allocate(self, nbytes: int) -> Memory:
        """Return a block of ``nbytes`` bytes or somewhat more, which hold anything.

        Raises
        ------
        OutOfMemoryError
            If there is none even after this pool was emptied and whoever could do without has given back.
        UsageError
            If ``nbytes`` is no size.
        """
        size = block_bytes(nbytes)
        self._sort_in()
        with self._lock:
            ages = self._ages.get(size)
            if ages:
                memory = self._blocks.pop(ages.pop())
                self._kept_bytes -= size
                return memory
        for tries_left in reversed(range(limits.POOL_ROOM_TRIES_COUNT)):
            try:
                return self._device.allocate(size)
            except OutOfMemoryError:
                if not tries_left or (not self.empty() and not self._reclaim(size)):
                    break
        # The rest of a rounded block may be what the device lacks.
        return self._device.allocate(whole_bytes(nbytes))

    def free(self, memory: Memory) -> None:
        """Take a block back. Nobody may use it after that."""
        self._returned.append(memory)
        self._sort_in()

    def empty(self) -> int:
        """Give all kept blocks back to the device; return how many bytes they were."""
        self._sort_in()
        with self._lock:
            blocks = list(self._blocks.values())
            self._blocks.clear()
            self._ages.clear()
            self._kept_bytes = 0
        for memory in blocks:
            self._device.free(memory)
        return sum(memory.nbytes for memory in blocks)

    def add_reclaimer(self, reclaimer: Reclaimer) -> None:
        """Ask ``reclaimer`` to give back memory when the device has none left."""
        with self._lock:
            self._reclaimers.append(reclaimer)

    def remove_reclaimer(self, reclaimer: Reclaimer) -> None:
        """Do not ask it any more."""
        with self._lock:
            self._reclaimers.remove(reclaimer)

    def out_of_memory(self, nbytes: int, why: str = "") -> OutOfMemoryError:
        """Return the error for ``nbytes`` that the device could not give."""
        device = self._device
        copies = sum(reclaimer.reclaimable_bytes(device) for reclaimer in self._known_reclaimers())
        return OutOfMemoryError(
            f"{device} ({device.name}) has no block of {nbytes} bytes{f': {why}' if why else ''}; about"
            f" {device.free_memory_bytes()} are free, {self.in_use_bytes} in use here, {self.kept_bytes} freed and kept"
            f" for the next use, {copies} in copies of what is elsewhere too. Release arrays, use smaller ones,"
            " or another device."
        )

    def _reclaim(self, nbytes: int) -> int:
        """Ask whoever could do without; return what came back."""
        given = 0
        for reclaimer in self._known_reclaimers():
            if given >= nbytes:
                break
            given += reclaimer.reclaim(self._device, nbytes - given)
        if given:
            self.empty()
        return given

    def _known_reclaimers(self) -> list[Reclaimer]:
        with self._lock:
            return list(self._reclaimers)

    def _sort_in(self) -> None:
        # Whoever cannot have the lock leaves it to who has it, or to the next call.
        while self._returned and self._lock.acquire(blocking=False):
            surplus = []
            try:
                while self._returned:
                    memory = self._returned.popleft()
                    if memory.nbytes != block_bytes(memory.nbytes) or memory.nbytes > self._kept_max_bytes:
                        surplus.append(memory)
                        continue
                    self._blocks[self._next_age] = memory
                    self._ages.setdefault(memory.nbytes, []).append(self._next_age)
                    self._next_age += 1
                    self._kept_bytes += memory.nbytes
                while self._kept_bytes > self._kept_max_bytes:
                    age, memory = self._blocks.popitem(last=False)
                    self._ages[memory.nbytes].remove(age)
                    self._kept_bytes -= memory.nbytes
                    surplus.append(memory)
            finally:
                self._lock.release()
            for memory in surplus:
                self._device.free(memory)


def block_bytes(nbytes: int) -> int:
    """Return the size of the block that holds ``nbytes``: rounded up by an eighth of it at most, 0 stays 0.

    Raises
    ------
    UsageError
        If it is no size.
    """
    size = whole_bytes(nbytes)
    if size == 0:
        return 0
    step = (1 << max((size - 1).bit_length() - 1, 0)) // limits.POOL_SIZES_PER_OCTAVE_COUNT
    step = max(step, limits.POOL_BLOCK_MIN_BYTES)
    return -(-size // step) * step


def whole_bytes(nbytes: SupportsIndex) -> int:
    """Return ``nbytes`` as a Python integer.

    Raises
    ------
    UsageError
        If it is no size.
    """
    try:
        size = operator.index(nbytes)
    except TypeError as error:
        raise UsageError(f"nbytes is {nbytes!r}; give a size in bytes, a whole number") from error
    if size < 0:
        raise UsageError(f"nbytes is {size}; give a size in bytes, 0 or more")
    return size
