"""Host arrays as bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sparkle_mesh.errors import UsageError


def host_bytes(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Return the bytes of a C-contiguous array as one dimension, without a copy.

    Raises
    ------
    UsageError
        If it is none, or holds Python objects.
    """
    if not isinstance(array, np.ndarray) or array.dtype.hasobject:
        kind = getattr(array, "dtype", type(array).__name__)
        raise UsageError(f"cannot copy {kind}; pass a NumPy array of numbers")
    if not array.flags.c_contiguous:
        raise UsageError(f"the array of shape {array.shape} is not C-contiguous; pass numpy.ascontiguousarray(array)")
    if array.nbytes == 0:
        return np.empty(0, dtype=np.uint8)
    return array.reshape(-1).view(np.ndarray).view(np.uint8)
