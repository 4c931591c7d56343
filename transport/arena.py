"""Memory of one process that processes of the same host and user map and can only read.

Every process has one *arena*, a sparse file without a name that lives in memory: pages cost nothing before they are
touched. Peers get a descriptor of it over a Unix-domain socket, and map the whole of it once, for reading. It is gone
when the last process that maps it has ended, however it ends. A peer that dies leaves its arena readable to those
who map it: what it had written can still be used.

On Linux it is a memory file whose size is sealed, so that a peer cannot make a reader fault by cutting it short, and
the descriptor that peers get cannot write. Elsewhere it is a segment of the standard library's
:mod:`multiprocessing.shared_memory`, whose name is taken away before anybody could learn it. Nothing that is read from
a peer's arena is trusted beyond its bounds: offsets are checked against its size, and numbers are just numbers.

The first page tells a reader whether it may also read the rest of the owner's memory (:mod:`.cross_memory`).
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
import sys
import threading
import weakref
from bisect import insort
from collections import deque
from contextlib import suppress
from typing import Any, Final

import numpy as np
import psutil

from sparkle_mesh import limits
from sparkle_mesh.clock import Entropy
from sparkle_mesh.errors import ProtocolError, UnreachableError

if sys.platform == "linux":
    import fcntl

_PAGE_BYTES: Final = mmap.PAGESIZE
# The first page and the board.
_HEAD_BYTES: Final = _PAGE_BYTES + limits.ARENA_BOARD_BYTES
_MAGIC: Final = b"SPRKMEM1"
# Magic, the address of the probe in the owner's memory, the probe.
_FIRST_PAGE: Final = struct.Struct("=8sQ32s")
_SEALS: Final = 0x1 | 0x2 | 0x4  # F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW
_SHRINK_SEALED: Final = 0x2

Array = np.ndarray[Any, np.dtype[Any]]


def has_sealed_files() -> bool:
    """Whether this platform has memory files whose size can be sealed."""
    return sys.platform == "linux" and hasattr(os, "memfd_create")


def _make_file(nbytes: int) -> int:
    """Return the descriptor of a new file of zeros in memory that has no name."""
    if not has_sealed_files():
        from multiprocessing.shared_memory import SharedMemory

        segment = SharedMemory(create=True, size=nbytes)
        try:
            return os.dup(segment._fd)  # type: ignore[attr-defined]
        finally:
            segment.close()
            segment.unlink()
    descriptor = os.memfd_create("sparkle", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, nbytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        os.fchmod(descriptor, stat.S_IRUSR)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


class Arena:
    """This process's memory for others to read.

    Parameters
    ----------
    entropy
        Source of the probe.
    nbytes
        How much there can be; as much as the machine has memory if None.

    Raises
    ------
    UnreachableError
        If this system gives none.
    """

    def __init__(self, entropy: Entropy, nbytes: int | None = None) -> None:
        wanted = nbytes or min(psutil.virtual_memory().total, limits.ARENA_MAX_BYTES)
        self.nbytes = -(-wanted // _PAGE_BYTES) * _PAGE_BYTES
        self._fd = -1
        try:
            self._fd = _make_file(self.nbytes)
            self._map = mmap.mmap(self._fd, self.nbytes, mmap.MAP_SHARED)
        except (OSError, ValueError) as error:
            if self._fd >= 0:
                os.close(self._fd)
            raise UnreachableError(f"no memory to share: {error}") from error
        self._view = memoryview(self._map)
        self.address = _address(self._view)
        self._probe = np.frombuffer(entropy.token(32), np.uint8)
        _FIRST_PAGE.pack_into(self._map, 0, _MAGIC, self._probe.ctypes.data, self._probe.tobytes())
        #: What is always there for peers to read, at the same place in every arena.
        self.board = self._view[_PAGE_BYTES:_HEAD_BYTES]
        # Free stretches as (offset, bytes), in order, none touching the next.
        self._free = [(_HEAD_BYTES, self.nbytes - _HEAD_BYTES)]
        self._retired = False
        self._lock = threading.Lock()
        # Arrays end wherever the last thing that refers to them does, perhaps while another is being allocated.
        self._returned: deque[tuple[int, int]] = deque()

    def open_for_reading(self) -> int:
        """Return a new descriptor for a peer, through which, on Linux, the arena can be read and not written."""
        if not has_sealed_files():
            return os.dup(self._fd)
        return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)

    def allocate(self, nbytes: int) -> Array:
        """Return writable bytes, page-aligned; they are taken back once nothing refers to the array any more.

        Raises
        ------
        MemoryError
            If no stretch of the arena is long enough.
        """
        needed = max(-(-nbytes // _PAGE_BYTES), 1) * _PAGE_BYTES
        with self._lock:
            offset = self._take(needed, nbytes)
        array = np.frombuffer(self._map, np.uint8, nbytes, offset)
        # Not at the end of the process: others may still be reading.
        weakref.finalize(array, _give_back, weakref.ref(self), offset, needed).atexit = False
        return array

    def _take(self, needed: int, nbytes: int) -> int:
        while self._returned:
            insort(self._free, self._returned.popleft())
        merged: list[tuple[int, int]] = []
        for start, room in self._free:
            if merged and merged[-1][0] + merged[-1][1] == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + room)
            else:
                merged.append((start, room))
        self._free = merged
        found = next((stretch for stretch in self._free if stretch[1] >= needed), None)
        if found is None:
            raise MemoryError(f"{nbytes} bytes of shared memory are not left of {self.nbytes}")
        offset, room = found
        index = self._free.index(found)
        self._free[index : index + 1] = [(offset + needed, room - needed)] if room > needed else []
        return offset

    def give_back(self, offset: int, nbytes: int) -> None:
        """Take back what :meth:`allocate` gave; whatever calls this, nothing waits.

        Not once it is retired: peers may still be reading what this process has left them.
        """
        if self._retired:
            return
        if has_sealed_files():
            with suppress(OSError):
                # The system gets the pages back; the addresses stay.
                self._map.madvise(mmap.MADV_REMOVE, offset, nbytes)
        else:
            # What is allocated is zeros.
            self._view[offset : offset + nbytes] = bytes(nbytes)
        self._returned.append((offset, nbytes))

    def retire(self) -> None:
        """Leave what is in it as it is from now on, for peers that still read it, whatever is freed here."""
        self._retired = True

    def offset_of(self, array: Array) -> int | None:
        """Return where the contiguous ``array`` lies in the arena; None if it is not in it."""
        offset = int(array.__array_interface__["data"][0]) - self.address
        return offset if 0 <= offset <= offset + array.nbytes <= self.nbytes else None

    def close(self) -> None:
        """Let go of it. Arrays in it stay usable here, and peers keep what they map. Idempotent."""
        self.retire()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            # What arrays do not hold is unmapped now, the rest with the last of them.
            with suppress(BufferError):
                self.board.release()
                self._view.release()
                self._map.close()


def _give_back(arena: weakref.ref[Arena], offset: int, nbytes: int) -> None:
    alive = arena()
    if alive is not None:
        alive.give_back(offset, nbytes)


class PeerArena:
    """Another process's arena, mapped for reading.

    Parameters
    ----------
    descriptor
        As :meth:`Arena.open_for_reading` gave it to the peer, who sent it here; stays the caller's.

    Raises
    ------
    ProtocolError
        If it is no arena.
    UnreachableError
        If it cannot be mapped.
    """

    def __init__(self, descriptor: int) -> None:
        try:
            self.nbytes = os.fstat(descriptor).st_size
            sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) if has_sealed_files() else _SEALS
        except OSError as error:
            raise ProtocolError(f"what a peer sent as its shared memory is none: {error.strerror}") from error
        if not sealed & _SHRINK_SEALED or not _HEAD_BYTES <= self.nbytes <= limits.ARENA_MAX_BYTES:
            raise ProtocolError(f"a peer's shared memory of {self.nbytes} bytes, sealed {sealed:#x}, is not to be used")
        try:
            self._map = mmap.mmap(descriptor, self.nbytes, mmap.MAP_SHARED, mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise UnreachableError(f"a peer's shared memory cannot be mapped: {error}") from error
        magic, self.probe_address, self.probe = _FIRST_PAGE.unpack_from(self._map, 0)
        if magic != _MAGIC:
            self._map.close()
            raise ProtocolError(f"a peer's shared memory begins with {magic!r}, not with {_MAGIC!r}")

    @property
    def board(self) -> memoryview:
        """What is always there to read."""
        return self.view(_PAGE_BYTES, limits.ARENA_BOARD_BYTES)

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Return ``nbytes`` bytes of it at ``offset``, read-only.

        Raises
        ------
        ProtocolError
            If they are not all in it.
        """
        if not 0 <= offset <= offset + nbytes <= self.nbytes:
            raise ProtocolError(f"{nbytes} bytes at {offset} are not in a peer's shared memory of {self.nbytes} bytes")
        return memoryview(self._map)[offset : offset + nbytes]

    def close(self) -> None:
        """Unmap it, unless something still refers to it: then as soon as nothing does. Idempotent."""
        with suppress(BufferError):
            self._map.close()


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view[:1], np.uint8).__array_interface__["data"][0])
