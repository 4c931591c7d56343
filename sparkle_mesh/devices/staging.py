"""Copies between ordinary host arrays and a GPU through pinned memory.

A GPU reads pages of ordinary memory through one small buffer of its driver's, many times slower than its bus. So
pieces of the array go through blocks of pinned memory: threads copy them there, each with two blocks, one being
filled while the bus carries the other. The blocks are few, made when first needed, and kept.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from sparkle_mesh import limits
from sparkle_mesh.devices.threads import in_threads

Bytes: TypeAlias = npt.NDArray[np.uint8]


class Fence(Protocol):
    """A moment in a device's queue."""

    def synchronize(self) -> object:
        """Wait for it."""
        ...


class Bus(Protocol):
    """What staging needs of a device; called within :meth:`activated`."""

    def activated(self) -> AbstractContextManager[object]:
        """Make the device the calling thread's."""
        ...

    def pin(self, nbytes: int) -> Bytes | None:
        """Return pinned host memory; None if there is none to have."""
        ...

    def start_write(self, native: Any, offset_bytes: int, host: Bytes) -> Fence:
        """Queue a copy to the device; the fence comes after it."""
        ...

    def start_read(self, native: Any, offset_bytes: int, host: Bytes) -> Fence:
        """Queue a copy from the device; the fence comes after it."""
        ...


class Staging:
    """The pinned blocks of one device; safe to use from any thread."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        # Every place for a block, with the block if it was made. Last in, first out: few copies need few blocks.
        self._places: queue.LifoQueue[Bytes | None] = queue.LifoQueue()
        self._fill()

    def write(self, native: Any, array: Bytes, offset_bytes: int) -> None:
        """Copy ``array`` to the device; when this returns it is all on its way, and the array may change."""

        def start(piece: slice, block: Bytes) -> Fence:
            host = block[: piece.stop - piece.start]
            np.copyto(host, array[piece])
            return self._bus.start_write(native, offset_bytes + piece.start, host)

        def direct(piece: slice) -> Fence:
            return self._bus.start_write(native, offset_bytes + piece.start, array[piece])

        self._run(array.size, start, direct, lambda piece, block: None)

    def read(self, native: Any, array: Bytes, offset_bytes: int) -> None:
        """Fill ``array`` from the device."""

        def start(piece: slice, block: Bytes) -> Fence:
            return self._bus.start_read(native, offset_bytes + piece.start, block[: piece.stop - piece.start])

        def direct(piece: slice) -> Fence:
            return self._bus.start_read(native, offset_bytes + piece.start, array[piece])

        def finish(piece: slice, block: Bytes) -> None:
            np.copyto(array[piece], block[: piece.stop - piece.start])

        self._run(array.size, start, direct, finish)

    def close(self) -> None:
        """Give the pinned blocks back. No copy may be under way."""
        while not self._places.empty():
            self._places.get_nowait()
        self._fill()

    def _fill(self) -> None:
        for _ in range(limits.STAGING_BLOCKS_MAX_COUNT):
            self._places.put(None)

    def _run(
        self,
        nbytes: int,
        start: Callable[[slice, Bytes], Fence],
        direct: Callable[[slice], Fence],
        finish: Callable[[slice, Bytes], None],
    ) -> None:
        step = limits.STAGING_BLOCK_BYTES

        def work(pieces: range) -> None:
            with self._bus.activated(), ExitStack() as stack:
                places = self._take_places(2 if len(pieces) > 1 else 1)
                stack.callback(self._put_back, places)
                places[:] = [self._bus.pin(limits.STAGING_BLOCK_BYTES) if place is None else place for place in places]
                blocks = deque(place for place in places if place is not None)
                under_way: deque[tuple[slice, Bytes, Fence]] = deque()
                # After an error: nobody may reuse a block that the bus still reads.
                stack.callback(_wait_for, under_way)
                for index in pieces:
                    piece = slice(index * step, min((index + 1) * step, nbytes))
                    if not blocks and not under_way:
                        direct(piece).synchronize()
                        continue
                    if not blocks:
                        blocks.append(_finished(under_way, finish))
                    block = blocks.popleft()
                    under_way.append((piece, block, start(piece, block)))
                while under_way:
                    _finished(under_way, finish)

        in_threads(-(-nbytes // step), work, workers=limits.STAGING_THREADS_MAX_COUNT)

    def _take_places(self, count: int) -> list[Bytes | None]:
        """Return one place, waiting for it, and more if they are free."""
        places = [self._places.get()]
        while len(places) < count and not self._places.empty():
            try:
                places.append(self._places.get_nowait())
            except queue.Empty:
                break
        return places

    def _put_back(self, places: Sequence[Bytes | None]) -> None:
        for place in places:
            self._places.put(place)


def _wait_for(under_way: deque[tuple[slice, Bytes, Fence]]) -> None:
    """Wait for all pieces, whether or not waiting for one fails."""
    with ExitStack() as stack:
        for _, _, fence in under_way:
            stack.callback(fence.synchronize)


def _finished(under_way: deque[tuple[slice, Bytes, Fence]], finish: Callable[[slice, Bytes], None]) -> Bytes:
    """Wait for the oldest piece, finish it, and return its block."""
    piece, block, fence = under_way[0]
    fence.synchronize()
    under_way.popleft()
    finish(piece, block)
    return block
