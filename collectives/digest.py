"""A digest of a result, taken segment by segment while each is in cache.

It is there to notice that ranks do not hold the same bytes: a schedule or executor that went wrong, a
buffer reused too early, a flipped bit. It does not defend against a member that lies (such a one can send wrong
numbers to begin with), so it need not be a cryptographic hash of every byte, which would cost as much
as the whole reduction (measured: GMAC 5 GB/s, the fastest of the cryptographic ones at hand; this, about 20).

Per segment: the sums, modulo 2**64, of every column of the segment laid out in rows of 4 KiB. Any change
within one column shows unless its words' changes cancel to exactly zero, and a single changed word always
shows. The sums are hashed (SHA-256 over key, length, sums and tail), and the digest of the whole hashes the segments'
hashes in the order of their ranges, not of their arrival. (Merely XOR-ing the segments' hashes would be cheaper to
keep, but with linear ones such as GMAC's equal changes in two segments cancel, and constant arrays have just those.)
"""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import numpy as np

_ROW_BYTES = 4096
DIGEST_BYTES = 16

Array = np.ndarray[Any, np.dtype[Any]]


def segment_digest(key: bytes, segment: Array) -> bytes:
    """Return 16 bytes for a contiguous flat array."""
    data = segment.view(np.uint8)
    rows = data.size // _ROW_BYTES
    state = sha256(key + data.size.to_bytes(8, "little"))
    # Few rows are hashed faster than summed.
    if rows >= 4:
        whole = rows * _ROW_BYTES
        sums = np.add.reduce(data[:whole].view(np.uint64).reshape(rows, -1), axis=0)
        state.update(sums.data)
        state.update(data[whole:].data)
    else:
        state.update(data.data)
    return state.digest()[:DIGEST_BYTES]


def whole_digest(key: bytes, segments: list[bytes]) -> bytes:
    """Return the digest of a result from its segments' digests, in the order of their ranges."""
    return sha256(key + b"".join(segments)).digest()[:DIGEST_BYTES]


def digest_key(lineage: bytes) -> bytes:
    """Return the key of a lineage's digests, so that those of different meshes do not compare."""
    return sha256(b"sparkle digest 1\0" + lineage).digest()
