"""Memory of processors for values that no one else sees: kept, so that the next run finds its pages in place."""

from __future__ import annotations

import threading
from collections import defaultdict

import numpy as np

from sparkle_mesh import limits
from sparkle_mesh.errors import OutOfMemoryError
from sparkle_mesh.kernels.cpu_tiles import Array

_LINE_BYTES = 64


def aligned(nbytes: int) -> Array:
    """Return fresh memory of ``nbytes`` that begins with a line of the cache."""
    memory = np.empty(nbytes + _LINE_BYTES, np.uint8)
    start = -memory.ctypes.data % _LINE_BYTES
    return memory[start : start + nbytes]


class BlockPool:
    """Hands out blocks, and keeps up to ``kept_max_bytes`` of those that were given back. For any thread."""

    def __init__(self, kept_max_bytes: int = limits.CPU_POOL_MAX_BYTES) -> None:
        self._kept_max_bytes = kept_max_bytes
        self.kept_bytes = 0
        self._kept: defaultdict[int, list[Array]] = defaultdict(list)
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> Array:
        """Return ``nbytes`` or some more, of any content."""
        capacity = _capacity(nbytes)
        with self._lock:
            kept = self._kept[capacity]
            if kept:
                self.kept_bytes -= capacity
                return kept.pop()
        try:
            return aligned(capacity)
        except MemoryError as error:
            self.clear()
            raise OutOfMemoryError(
                f"this machine has no {capacity} bytes for what a kernel computes on the way; use smaller arrays, or"
                " release some"
            ) from error

    def give_back(self, memory: Array) -> None:
        """Take back what :meth:`take` returned; nobody uses it any more."""
        with self._lock:
            if self.kept_bytes + memory.nbytes <= self._kept_max_bytes:
                self._kept[memory.nbytes].append(memory)
                self.kept_bytes += memory.nbytes

    def clear(self) -> None:
        """Let go of all that is kept."""
        with self._lock:
            self._kept.clear()
            self.kept_bytes = 0


def _capacity(nbytes: int) -> int:
    """Return the size that memory for ``nbytes`` has: one of eight between powers of two."""
    nbytes = max(1, nbytes)
    step = max(_LINE_BYTES, 1 << max(0, nbytes.bit_length() - 4))
    return -(-nbytes // step) * step
