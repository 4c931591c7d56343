"""In which form numbers travel: as they are added up, or smaller.

Inputs and results of float16 and bfloat16 travel as such, and partial sums of them as the float32 they are added up in.
A codec may make inputs and results smaller still, with a loss; who completes a range then keeps what the others will
have of it, so that all ranks end with the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparkle_mesh.collectives.codec import Codec
from sparkle_mesh.collectives.reduction import FLOAT32, Array, is_half, work_dtype
from sparkle_mesh.collectives.schedule import Content


class Form:
    """The form of numbers of ``dtype``; inputs and results encoded by ``codec``, if there is one.

    Attributes
    ----------
    plain
        Whether all contents travel as they are added up.
    """

    __slots__ = ("_codec", "_dtype", "_work", "plain")

    def __init__(self, dtype: np.dtype[Any], codec: Codec | None = None) -> None:
        self._dtype = dtype
        self._work = work_dtype(dtype)
        self._codec = codec
        self.plain = codec is None and not is_half(dtype)

    def is_plain(self, content: Content) -> bool:
        """Whether ``content`` travels as it is added up."""
        return self.plain or content is Content.PARTIAL

    def nbytes(self, content: Content, count: int) -> int:
        """Return how many bytes ``count`` numbers are on their way."""
        if self.is_plain(content):
            return count * self._work.itemsize
        return count * self._dtype.itemsize if self._codec is None else self._codec.encoded_bytes(count)

    def encode(self, numbers: Array) -> Array:
        """Return ``numbers``, of either dtype, as they travel."""
        with np.errstate(over="ignore"):
            if self._codec is None:
                return numbers.astype(self._dtype, copy=False)
            encoded = np.empty(self._codec.encoded_bytes(numbers.size), np.uint8)
            self._codec.encode(numbers.astype(FLOAT32, copy=False), encoded)
            return encoded

    def decode(self, data: Array, out: Array) -> None:
        """Write what travelled as ``data`` to ``out``. Raises ProtocolError if it cannot be."""
        if self._codec is None:
            out[:] = data.view(self._dtype)
        else:
            self._codec.decode(data, out)
