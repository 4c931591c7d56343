"""Products of matrices in batches, for libraries that multiply one pair at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np


def batch_starts(shape_a: Sequence[int], shape_b: Sequence[int], shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield where the matrices of each product begin in a, b and out, in elements; batches broadcast."""
    batch = tuple(shape[:-2])
    starts = [
        np.broadcast_to((np.arange(prod(dims[:-2])) * prod(dims[-2:])).reshape(dims[:-2]), batch).reshape(-1)
        for dims in (tuple(shape_a), tuple(shape_b), tuple(shape))
    ]
    yield from zip(*(column.tolist() for column in starts), strict=True)
