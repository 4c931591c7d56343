"""A training state as chunks of bytes that have digests: to compare it with others', and to take parts of theirs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b
from typing import Any, Final

import numpy as np

from sparkle_mesh import limits
from sparkle_mesh.collectives.arrays import NO_ARRAYS, Arrays, ArraysLook, check_arrays
from sparkle_mesh.collectives.foreign import lend
from sparkle_mesh.errors import UsageError

Array = np.ndarray[Any, np.dtype[Any]]
DIGEST_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes ``[start, stop)`` of one array."""

    array: int
    start: int
    stop: int


class StateChunks:
    """The arrays of a state, cut alike on every rank into chunks of up to ``limits.STATE_CHUNK_BYTES``.

    Parameters
    ----------
    state
        One array, or a list, tuple or dict of arrays, as for collectives, that can be written to where they lie: on the
        CPU. None for a state of nothing.

    Raises
    ------
    UsageError
        If it holds something else, or arrays that cannot be written to.
    """

    def __init__(self, state: object) -> None:
        self._arrays: Arrays = NO_ARRAYS
        if state is not None:
            self._arrays = check_arrays(lend(state, in_place=True).arrays, _check_dtype)

    # Nothing of this is needed where all members are alike, at every step.

    @cached_property
    def _flat(self) -> list[Array]:
        """Arrays that are no plain memory are copied, and written back chunk by chunk."""
        return [np.ascontiguousarray(array).reshape(-1) for array in self._arrays.values]

    @cached_property
    def _bytes(self) -> list[Array]:
        return [flat.view(np.uint8) for flat in self._flat]

    @cached_property
    def _chunks(self) -> list[list[_Piece]]:
        return list(self._cut())

    def _cut(self) -> Iterator[list[_Piece]]:
        chunk: list[_Piece] = []
        room = limits.STATE_CHUNK_BYTES
        for number, data in enumerate(self._bytes):
            start = 0
            while start < data.size:
                stop = min(start + room, data.size)
                chunk.append(_Piece(number, start, stop))
                room -= stop - start
                start = stop
                if not room:
                    yield chunk
                    chunk, room = [], limits.STATE_CHUNK_BYTES
        if chunk:
            yield chunk

    def __len__(self) -> int:
        return len(self._chunks)

    @property
    def nbytes(self) -> int:
        """Of all arrays together."""
        return self._arrays.look.nbytes

    @property
    def layout(self) -> bytes:
        """A digest of names, dtypes and shapes: what all ranks must have in common."""
        return _layout(self._arrays.look)

    def describe(self) -> str:
        """Return names, dtypes and shapes for people."""
        return self._arrays.look.describe() if self._arrays.values else "nothing"

    def chunk_bytes(self, chunk: int) -> int:
        """Return the size of a chunk."""
        return sum(piece.stop - piece.start for piece in self._chunks[chunk])

    def digests(self, chunks: Sequence[int] | None = None) -> Array:
        """Return the digests of all chunks, or these: uint8, of shape ``(chunks, DIGEST_BYTES)``."""
        wanted = range(len(self)) if chunks is None else chunks
        out = np.empty((len(wanted), DIGEST_BYTES), np.uint8)
        for row, chunk in enumerate(wanted):
            digest = blake2b(digest_size=DIGEST_BYTES)
            for piece in self._chunks[chunk]:
                digest.update(self._bytes[piece.array][piece.start : piece.stop].data)
            out[row] = np.frombuffer(digest.digest(), np.uint8)
        return out

    def read(self, chunk: int) -> Array:
        """Return the bytes of a chunk: a new array."""
        return np.concatenate([self._bytes[piece.array][piece.start : piece.stop] for piece in self._chunks[chunk]])

    def difference(self, chunk: int, other: Array) -> float:
        """Return the largest difference between a chunk here and ``other``, which holds another's bytes of it.

        Numbers that are cut in two by a chunk's end do not count; NaN against a number is infinite.
        """
        largest, at = 0.0, 0
        for piece in self._chunks[chunk]:
            size = piece.stop - piece.start
            dtype = self._flat[piece.array].dtype
            skip = -piece.start % dtype.itemsize
            count = max((size - skip) // dtype.itemsize, 0) * dtype.itemsize
            mine = self._bytes[piece.array][piece.start + skip : piece.start + skip + count].view(dtype)
            theirs = other[at + skip : at + skip + count].view(dtype)
            largest = max(largest, _largest_difference(mine, theirs))
            at += size
        return largest

    def write(self, chunk: int, data: Array) -> None:
        """Put ``data`` in the place of a chunk's bytes."""
        at = 0
        for piece in self._chunks[chunk]:
            size = piece.stop - piece.start
            self._bytes[piece.array][piece.start : piece.stop] = data[at : at + size]
            at += size
            given = self._arrays.values[piece.array]
            if not np.may_share_memory(given, self._flat[piece.array]):
                given[...] = self._flat[piece.array].reshape(given.shape)


@lru_cache(maxsize=4)
def _layout(look: ArraysLook) -> bytes:
    # Training synchronises the same arrays over and over.
    return blake2b(repr(look.signature()).encode(), digest_size=DIGEST_BYTES).digest()


def _largest_difference(mine: Array, theirs: Array) -> float:
    if not mine.size or np.array_equal(mine.view(np.uint8), theirs.view(np.uint8)):
        return 0.0
    if mine.dtype.kind in "biu":
        # Modulo 2^64 the difference of the larger and the smaller is exact, whatever their signs.
        larger, smaller = np.maximum(mine, theirs), np.minimum(mine, theirs)
        return float(np.max(larger.astype(np.uint64) - smaller.astype(np.uint64)))
    wide = np.complex128 if mine.dtype.kind == "c" else np.float64
    with np.errstate(all="ignore"):
        gaps = np.abs(mine.astype(wide) - theirs.astype(wide))
    nan = np.isnan(gaps)
    both = np.isnan(mine.astype(wide)) & np.isnan(theirs.astype(wide))
    gaps[nan] = np.where(both[nan], 0.0, np.inf)
    return float(gaps.max())


def _check_dtype(dtype: np.dtype[Any], what: str) -> None:
    if dtype.hasobject or dtype.kind not in "biufcV" or dtype.type is np.void:
        raise UsageError(f"{what} is of dtype {dtype}; a state to synchronise holds numbers alone")
