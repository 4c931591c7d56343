"""Digests notice what they are for."""

from __future__ import annotations

import numpy as np
import pytest

from sparkle_mesh import limits
from sparkle_mesh.collectives.digest import SegmentDigest, digest_key, segment_digest, whole_digest

KEY = digest_key(b"L" * 32)


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 16384, 20001, 262144])
def test_any_changed_byte_shows(nbytes: int) -> None:
    data = np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)
    before = segment_digest(KEY, data)
    assert len(before) == 16
    assert segment_digest(KEY, data.copy()) == before
    for position in {0, nbytes // 2, nbytes - 1} if nbytes else ():
        data[position] ^= 1
        assert segment_digest(KEY, data) != before
        data[position] ^= 1


def test_equal_changes_in_two_segments_do_not_cancel() -> None:
    zeros, ones = np.zeros(65536, np.uint8), np.ones(65536, np.uint8)
    a, b = segment_digest(KEY, zeros), segment_digest(KEY, ones)
    assert whole_digest(KEY, [a, a]) != whole_digest(KEY, [b, b])
    assert whole_digest(KEY, [a, b]) != whole_digest(KEY, [b, a])


def test_parts_that_change_places_show() -> None:
    data = np.arange(3 * limits.COLLECTIVE_PART_BYTES, dtype=np.uint64).view(np.uint8)
    one, two, three = (data[n * limits.COLLECTIVE_PART_BYTES :][: limits.COLLECTIVE_PART_BYTES] for n in range(3))
    whole = np.concatenate([one, two, three])
    assert segment_digest(KEY, whole) != segment_digest(KEY, np.concatenate([two, one, three]))
    digest = SegmentDigest(KEY)
    for part in (one, two, three):
        digest.update(part)
    assert digest.digest() == segment_digest(KEY, whole)


def test_lengths_and_lineages_differ() -> None:
    assert segment_digest(KEY, np.zeros(8192, np.uint8)) != segment_digest(KEY, np.zeros(16384, np.uint8))
    data = np.zeros(20000, np.uint8)
    assert segment_digest(KEY, data) != segment_digest(digest_key(b"M" * 32), data)


def test_any_dtype_and_offset_can_be_digested() -> None:
    data = np.arange(10000, dtype=np.float32)
    assert segment_digest(KEY, data[3:9003]) == segment_digest(KEY, data[3:9003].copy())
    data = np.arange(10000, dtype=np.int8)
    assert segment_digest(KEY, data[1:]) == segment_digest(KEY, data[1:].copy())
