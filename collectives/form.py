"""In which form numbers travel: as they are added up, or smaller.

Inputs and results of float16 and bfloat16 travel as such, and partial sums of them as the float32 they are added up in.
A codec may make inputs and results smaller still, with a loss; who completes a range then keeps what the others will
have of it, so that all ranks end with the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparkle_mesh.collectives.reduction import Array, is_half, work_dtype
from sparkle_mesh.collectives.schedule import Content


class Form:
    """The form of numbers of ``dtype``.

    Attributes
    ----------
    plain
        Whether all contents travel as they are added up.
    """

    __slots__ = ("_dtype", "_work", "plain")

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._work = work_dtype(dtype)
        self.plain = not is_half(dtype)

    def is_plain(self, content: Content) -> bool:
        """Whether ``content`` travels as it is added up."""
        return self.plain or content is Content.PARTIAL

    def nbytes(self, content: Content, count: int) -> int:
        """Return how many bytes ``count`` numbers are on their way."""
        return count * (self._work if self.is_plain(content) else self._dtype).itemsize

    def encode(self, numbers: Array) -> Array:
        """Return ``numbers``, of either dtype, as they travel."""
        with np.errstate(over="ignore"):
            return numbers.astype(self._dtype, copy=False)

    def decode(self, data: Array, out: Array) -> None:
        """Write what travelled as ``data`` to ``out``. Raises ProtocolError if it cannot be."""
        out[:] = data.view(self._dtype)
