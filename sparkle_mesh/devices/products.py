"""Products of matrices: which shapes and dtypes multiply, found out once for each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from sparkle_mesh import limits
from sparkle_mesh.errors import UsageError


@dataclass(frozen=True, slots=True)
class Product:
    """A product that can be done.

    Attributes
    ----------
    shape_a, shape_b, shape
        Of the factors and the result, with as few dimensions as it takes.
    transposed
        Whether a, and b, lie in memory with their last two axes exchanged.
    nbytes
        Of the factors and the result.
    """

    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    transposed: tuple[bool, bool]
    nbytes: tuple[int, int, int]

    @property
    def is_empty(self) -> bool:
        """Whether there is no element of the result."""
        return 0 in self.shape

    @property
    def is_zero(self) -> bool:
        """Whether each element is a sum over nothing."""
        return self.shape_a[-1] == 0


@lru_cache(limits.CHECKED_PRODUCTS_MAX_COUNT)
def checked_product(
    device: str,
    dtypes: frozenset[str],
    shape_a: tuple[int, ...],
    shape_b: tuple[int, ...],
    dtype: np.dtype[Any],
    transposed: tuple[bool, bool] = (False, False),
) -> Product:
    """Return the product of ``(..., m, k)`` and ``(..., k, n)``, as :func:`numpy.matmul` defines it.

    Parameters
    ----------
    device, dtypes
        Who is to do it, for messages, and what it multiplies.

    Raises
    ------
    UsageError
        If the shapes do not fit each other, or the dtype.
    """
    if not dtype.isnative:
        raise UsageError(f"dtype {dtype} is in the other byte order; convert first: array.astype({dtype.name!r})")
    if dtype.name not in dtypes:
        known = ", ".join(sorted(dtypes)) or "none"
        raise UsageError(f"{device} multiplies no matrices of {dtype}; those that it does: {known}")
    rows, columns = tuple(map(int, shape_a)), tuple(map(int, shape_b))
    if len(rows) < 2 or len(columns) < 2 or rows[-1] != columns[-2]:
        raise UsageError(f"shapes {rows} and {columns} do not multiply: (..., m, k) and (..., k, n) do")
    try:
        batch = np.broadcast_shapes(rows[:-2], columns[:-2])
    except ValueError as error:
        raise UsageError(f"shapes {rows} and {columns} do not multiply: {error}") from error
    shape = (*batch, rows[-2], columns[-1])
    nbytes = prod(rows) * dtype.itemsize, prod(columns) * dtype.itemsize, prod(shape) * dtype.itemsize
    if len(shape) > 2 and prod(columns[:-2]) == 1 and not transposed[0]:
        # One right factor for all: one product of two dimensions, which libraries do best. The rows of left factors
        # that lie transposed do not follow each other.
        rows, columns = (prod(rows[:-1]), rows[-1]), columns[-2:]
        shape = (rows[0], columns[1])
    return Product(rows, columns, shape, dtype, transposed, nbytes)
