"""A digest of a result, taken segment by segment while each is in cache.

It is there to notice that ranks do not hold the same bytes: a schedule or executor that went wrong, a
buffer reused too early, a flipped bit. It does not defend against a member that lies (such a one can send wrong
numbers to begin with), so it need not be a cryptographic hash of every byte, which would cost as much
as the whole reduction (measured: GMAC 5 GB/s, the fastest of the cryptographic ones at hand; this, about 20).

Per part of a segment (``limits.COLLECTIVE_PART_BYTES``): the sums, modulo 2**64, of every column of the part laid
out in rows of 4 KiB. Any change within one column shows unless its words' changes cancel to exactly zero, and a
single changed word always shows. The sums are hashed (SHA-256 over key, and of each part length, sums and tail), and
the digest of the whole hashes the segments' hashes in the order of their ranges, not of their arrival. (Merely
XOR-ing the segments' hashes would be cheaper to keep, but with linear ones such as GMAC's equal changes in two
segments cancel, and constant arrays have just those.)
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import numpy as np

from sparkle_mesh import limits

_ROW_BYTES = 4096
DIGEST_BYTES = 16

Array = np.ndarray[Any, np.dtype[Any]]


class SegmentDigest:
    """The digest of one segment, taken part by part in order."""

    __slots__ = ("_state",)

    def __init__(self, key: bytes) -> None:
        self._state = sha256(key)

    def update(self, part: Array) -> None:
        """Take the next part, a contiguous flat array: ``limits.COLLECTIVE_PART_BYTES``, the last one shorter."""
        data = part.view(np.uint8)
        rows = data.size // _ROW_BYTES
        state = self._state
        state.update(data.size.to_bytes(8, "little"))
        # Few rows are hashed faster than summed.
        if rows >= 4:
            whole = rows * _ROW_BYTES
            state.update(np.add.reduce(data[:whole].view(np.uint64).reshape(rows, -1), axis=0).data)
            state.update(data[whole:].data)
        else:
            state.update(data.data)

    def digest(self) -> bytes:
        """Return ``DIGEST_BYTES`` bytes."""
        return self._state.digest()[:DIGEST_BYTES]


def segment_digest(key: bytes, segment: Array) -> bytes:
    """Return the digest of a contiguous flat array as a whole."""
    digest = SegmentDigest(key)
    for start, stop in parts(segment.size, segment.itemsize):
        digest.update(segment[start:stop])
    return digest.digest()


def parts(count: int, item_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut ``count`` elements of ``item_bytes`` each into the ranges that are digested at a time."""
    step = limits.COLLECTIVE_PART_BYTES // item_bytes
    for start in range(0, count, step):
        yield start, min(start + step, count)


def whole_digest(key: bytes, segments: list[bytes]) -> bytes:
    """Return the digest of a result from its segments' digests, in the order of their ranges."""
    return sha256(key + b"".join(segments)).digest()[:DIGEST_BYTES]


def digest_key(lineage: bytes) -> bytes:
    """Return the key of a lineage's digests, so that those of different meshes do not compare."""
    return sha256(b"sparkle digest 1\0" + lineage).digest()
