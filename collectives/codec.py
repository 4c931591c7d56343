"""What every codec of array data is: float32 in, fewer bytes out, and back.

A codec is stateless and hashable, so that ranks can compare theirs and threads can share one. What it writes depends on
the input's bits alone, not on the machine: integer arithmetic where denormals or NaN are at stake (processors differ in
flushing the former and in the sign of the latter), single IEEE operations elsewhere, little-endian fields.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Final

import numpy as np

from sparkle_mesh import limits
from sparkle_mesh.collectives.reduction import FLOAT32, Array
from sparkle_mesh.errors import ProtocolError, UsageError

UINT8: Final = np.dtype(np.uint8)
# Of a float32: all but the sign. As integers, magnitudes are in the order of the numbers, NaN above infinity.
MAGNITUDE: Final = np.uint32(0x7FFFFFFF)
INFINITY: Final = np.uint32(0x7F800000)


class Codec(ABC):
    """One way to send float32 numbers in fewer bytes.

    Attributes
    ----------
    name
        What :func:`~sparkle_mesh.collectives.codecs.make_codec` knows it by.
    block_elements
        Ranges that are encoded begin at multiples of so many elements of the vector that they are ranges of, so that
        a number is encoded in the same block whichever way the vector is cut.
    """

    __slots__ = ()
    name: ClassVar[str]
    block_elements: ClassVar[int]

    @abstractmethod
    def encoded_bytes(self, count: int) -> int:
        """Return how many bytes ``count`` elements are encoded in: given by ``count`` alone, so receivers know it."""

    @abstractmethod
    def error_bound(self, values: Array) -> Array:
        """Return, per element, what ``abs(decode(encode(values)) - values)`` does not exceed.

        Exact as a number of float64, for tests and diagnosis; takes several times the memory of ``values``.

        Parameters
        ----------
        values
            float32, shape ``(count,)``.

        Returns
        -------
        Array
            float64, shape ``(count,)``, in the unit of ``values``; ``inf`` where nothing can be promised.
        """

    @abstractmethod
    def describe(self) -> str:
        """Return one line for people: the codec with its options, the same on all ranks that use the same one."""

    def encode(self, values: Array, out: Array) -> None:
        """Write ``values`` to ``out``, every byte of it. May be called by several threads at once.

        Parameters
        ----------
        values
            float32, shape ``(count,)``, contiguous; must not share memory with ``out``. Any bits are allowed.
        out
            uint8, shape ``(encoded_bytes(count),)``, contiguous, of any alignment.

        Raises
        ------
        UsageError
            An array is not as said above.
        """
        _check(values, FLOAT32, "values to encode")
        _check(out, UINT8, "the array to encode into")
        if out.size != self.encoded_bytes(values.size):
            raise UsageError(
                f"{values.size} elements are encoded by {self.describe()} in {self.encoded_bytes(values.size)} bytes;"
                f" the array to encode into has {out.size}"
            )
        # Overflow and invalid are the numbers' own affair; each codec says what becomes of them.
        with np.errstate(all="ignore"):
            self._encode(values, out)

    def decode(self, data: Array, out: Array) -> None:
        """Write what ``data`` stands for to ``out``, every element. May be called by several threads at once.

        ``data`` may come from anybody: whatever it is, nothing but ``out`` is written. If ProtocolError is raised,
        ``out`` is as it was.

        Parameters
        ----------
        data
            uint8, shape ``(encoded_bytes(count),)``, contiguous, of any alignment; must not share memory with ``out``.
        out
            float32, shape ``(count,)``, contiguous.

        Raises
        ------
        ProtocolError
            ``data`` is of another length, or cannot have been encoded.
        UsageError
            An array is not as said above.
        """
        _check(data, UINT8, "data to decode")
        _check(out, FLOAT32, "the array to decode into")
        if data.size != self.encoded_bytes(out.size):
            raise ProtocolError(
                f"{out.size} elements are encoded by {self.describe()} in {self.encoded_bytes(out.size)} bytes;"
                f" {data.size} came"
            )
        with np.errstate(all="ignore"):
            self._decode(data, out)

    @abstractmethod
    def _encode(self, values: Array, out: Array) -> None: ...

    @abstractmethod
    def _decode(self, data: Array, out: Array) -> None: ...


def pieces(count: int) -> Iterator[slice]:
    """Cut ``count`` elements into ranges whose temporaries stay in a core's cache."""
    step = limits.CODEC_PIECE_COUNT
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def scratch(count: int, dtype: type[np.generic] = np.uint32) -> Array:
    """Return room for a piece of ``count`` elements: allocated once per call, as new memory costs page faults."""
    return np.empty(min(count, limits.CODEC_PIECE_COUNT), dtype)


def magnitudes(values: Array) -> Array:
    """Return the float32 ``values`` as float64 without their signs."""
    # A signalling NaN is invalid to convert, and becomes one.
    with np.errstate(invalid="ignore"):
        result: Array = np.abs(values.astype(np.float64))
    return result


def _check(array: Array, dtype: np.dtype[Any], what: str) -> None:
    if array.dtype != dtype or array.ndim != 1 or not array.flags.c_contiguous:
        layout = "contiguous" if array.flags.c_contiguous else "not contiguous"
        raise UsageError(
            f"{what} must be {dtype}, flat and contiguous, not {array.dtype} of shape {array.shape}, {layout}"
        )
