"""How the vectors of a one-sided reduction are cut, and how each rank's operand is read."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any, Final, Protocol

import numpy as np

from sparkle_mesh import limits
from sparkle_mesh.collectives.reduction import Array
from sparkle_mesh.transport.arena import PeerArena
from sparkle_mesh.transport.shared_memory import PeerMemory

_ALIGN_BYTES: Final = 64


class Place(IntEnum):
    """Where an operand lies, as its rank says on its board."""

    #: At an offset of its arena.
    ARENA = 1
    #: At an address.
    MEMORY = 2


@dataclass(frozen=True, slots=True)
class SharedLane:
    """One vector of this rank: flat, contiguous. ``place`` and ``where`` tell the other ranks how to find it."""

    data: Array
    place: Place
    where: int


# --- How operands are read -----------------------------------------------------------------------


class Operand(Protocol):
    """A rank's vector."""

    def read(self, start: int, stop: int, into: Array) -> Array:
        """Return elements ``[start, stop)``: as they lie, or copied to the start of ``into``."""
        ...


class MappedOperand:
    """One that is this rank's own, or mapped."""

    __slots__ = ("_array",)

    def __init__(self, array: Array) -> None:
        self._array = array

    def read(self, start: int, stop: int, into: Array) -> Array:
        return self._array[start:stop]


class RemoteOperand:
    """One in the ordinary memory of another process."""

    __slots__ = ("_address", "_memory")

    def __init__(self, memory: PeerMemory, address: int) -> None:
        self._memory = memory
        self._address = address

    def read(self, start: int, stop: int, into: Array) -> Array:
        out = into[: stop - start]
        self._memory.read(self._address + start * into.itemsize, out)
        return out


def mapped(arena: PeerArena, offset: int, count: int, dtype: np.dtype[Any]) -> Array:
    """Return a vector in a peer's arena, read-only. Raises ProtocolError if it is not all in it, or not aligned."""
    return np.frombuffer(arena.view(offset, count * dtype.itemsize), dtype)


# --- How vectors are cut -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Chunk:
    """Elements ``[start, stop)`` of a lane, ``part`` of them or fewer per rank; a reduced part goes to ``work_at``.

    ``work_at`` is in bytes of every rank's memory for reduced parts.
    """

    lane: int
    start: int
    stop: int
    part: int
    work_at: int

    def part_of(self, rank: int) -> tuple[int, int]:
        """Return the elements that ``rank`` reduces."""
        low = min(self.start + rank * self.part, self.stop)
        return low, min(low + self.part, self.stop)


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """How the vectors are cut: the same on every rank.

    Attributes
    ----------
    ahead
        How many chunks a rank may have reduced that others have not taken.
    commit_at
        How many chunks all must have reduced before anything is taken.
    """

    chunks: tuple[Chunk, ...]
    ahead: int
    commit_at: int


@lru_cache(maxsize=limits.COLLECTIVE_PLANS_CACHED_MAX_COUNT)
def work_bytes(counts: tuple[int, ...], item_bytes: tuple[int, ...], size: int) -> int:
    """Return the memory that a rank needs for its reduced parts, whichever way the vectors are cut."""
    whole = sum(_part(count, nbytes, size) * nbytes for count, nbytes in zip(counts, item_bytes, strict=True))
    return max(whole, limits.SHARED_CHUNKS_AHEAD_COUNT * _slot_bytes(size))


def _part(count: int, item_bytes: int, size: int) -> int:
    """Return the elements of one rank's part, such that parts begin aligned."""
    align = max(_ALIGN_BYTES // item_bytes, 1)
    return -(-count // (size * align)) * align


def _chunk_bytes(size: int) -> int:
    return min(limits.SHARED_CHUNK_BYTES, limits.SHARED_CHUNK_PART_BYTES * size)


def _slot_bytes(size: int) -> int:
    return (-(-_chunk_bytes(size) // size) // _ALIGN_BYTES + 2) * _ALIGN_BYTES


@lru_cache(maxsize=limits.COLLECTIVE_PLANS_CACHED_MAX_COUNT)
def plan_chunks(counts: tuple[int, ...], item_bytes: tuple[int, ...], size: int, *, whole: bool) -> ChunkPlan:
    """Cut vectors of ``counts`` elements of ``item_bytes`` bytes each among ``size`` ranks.

    If ``whole``, each vector is one chunk; else it is cut into small ones. There is always a chunk, be it empty, so
    that there is always something to commit.
    """
    ahead = limits.SHARED_CHUNKS_AHEAD_COUNT
    chunks: list[Chunk] = []
    work_at = 0
    for lane, (count, nbytes) in enumerate(zip(counts, item_bytes, strict=True)):
        length = max(count if whole else _chunk_bytes(size) // nbytes, 1)
        for start in range(0, count, length):
            stop = min(start + length, count)
            part = _part(stop - start, nbytes, size)
            chunks.append(Chunk(lane, start, stop, part, work_at))
            work_at = work_at + part * nbytes if whole else len(chunks) % ahead * _slot_bytes(size)
    chunks = chunks or [Chunk(0, 0, 0, 0, 0)]
    return ChunkPlan(tuple(chunks), *((len(chunks), len(chunks)) if whole else (ahead, 1)))
