"""The codec that sends only the largest numbers: top-k.

Source: A. F. Aji, K. Heafield, "Sparse communication for distributed gradient descent", EMNLP 2017. It needs error
feedback (:mod:`~sparkle_mesh.collectives.feedback`), without which small numbers are never sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

import numpy as np

from sparkle_mesh import limits
from sparkle_mesh.collectives.codec import MAGNITUDE, Codec, magnitudes, pieces
from sparkle_mesh.collectives.reduction import Array
from sparkle_mesh.errors import ProtocolError, UsageError


@dataclass(frozen=True, slots=True)
class TopK(Codec):
    """The numbers of the largest magnitudes as they are, bit by bit, and where they were; all others become zero.

    Encoded are first the indices, uint32 and increasing, then as many float32. Of equal magnitudes those of the lowest
    indices are sent. NaN counts as larger than infinity, so that a range with either is decoded to one with either.
    Encoding what was decoded gives the same bytes again.

    Parameters
    ----------
    fraction
        How many numbers of a range are sent, rounded down, but at least one: more than 0, at most 1. Above 1/2 it
        saves nothing.

    Raises
    ------
    UsageError
        ``fraction`` is not such a number.
    """

    fraction: float = 1 / 32
    name: ClassVar[str] = "topk"
    block_elements: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not isinstance(self.fraction, Real) or not 0 < self.fraction <= 1:
            raise UsageError(f"fraction {self.fraction!r} is not a number above 0 and up to 1")

    def kept_count(self, count: int) -> int:
        """Return how many of ``count`` elements are sent."""
        return min(count, max(1, int(count * float(self.fraction))))

    def encoded_bytes(self, count: int) -> int:
        """Return 8 bytes per element that is sent.

        Raises
        ------
        UsageError
            An index of ``count`` elements does not fit its 4 bytes.
        """
        if count > limits.CODEC_INDEXED_MAX_COUNT:
            raise UsageError(
                f"{count} elements are too many for {self.name}, which can tell {limits.CODEC_INDEXED_MAX_COUNT} apart;"
                " encode them in several ranges"
            )
        return 8 * self.kept_count(count)

    def error_bound(self, values: Array) -> Array:
        """Return 0 for what is sent, ``abs(values)`` for what is not: it is the error.

        For NaN and infinity: ``inf``. float32 in, float64 out, both of shape ``(count,)``.
        """
        data = np.empty(self.encoded_bytes(values.size), np.uint8)
        self.encode(values, data)
        bound = magnitudes(values)
        bound[data[: data.size // 2].view("<u4")] = 0
        return np.where(np.isfinite(values), bound, np.inf)

    def describe(self) -> str:
        """Return its name and fraction."""
        return f"{self.name} (fraction {float(self.fraction)!r})"

    def _encode(self, values: Array, out: Array) -> None:
        """Find the smallest magnitude sent, which is the same whichever way it is found, then send what is above.

        Selecting indices (``np.argpartition``) instead would leave the choice among equals to NumPy and the processor,
        and takes longer by itself than this as a whole.
        """
        kept = self.kept_count(values.size)
        if not kept:
            return
        bits = values.view(np.uint32)
        indices, numbers = out[: 4 * kept].view("<u4"), out[4 * kept :].view("<u4")
        threshold, ties = _threshold(bits, kept)
        filled = 0
        for piece in pieces(values.size):
            magnitude = bits[piece] & MAGNITUDE
            found = np.flatnonzero(magnitude >= threshold)
            tied = magnitude[found] == threshold
            tied_count = int(np.count_nonzero(tied))
            if tied_count > ties:
                found = found[~tied | (np.cumsum(tied) <= ties)]
            ties -= min(ties, tied_count)
            numbers[filled : filled + found.size] = bits[piece][found]
            indices[filled : filled + found.size] = found + piece.start
            filled += found.size

    def _decode(self, data: Array, out: Array) -> None:
        half = data.size // 2
        indices = data[:half].view("<u4")
        if not indices.size:
            return
        if not np.all(indices[1:] > indices[:-1]):
            raise ProtocolError(f"indices of {self.describe()} that do not increase")
        if indices[-1] >= out.size:
            raise ProtocolError(f"index {indices[-1]} of {self.describe()} among {out.size} elements")
        out[...] = 0
        out.view(np.uint32)[indices] = data[half:].view("<u4")


def _threshold(bits: Array, kept: int) -> tuple[np.uint32, int]:
    """Return the smallest magnitude sent, and how many of it are."""
    magnitude = bits & MAGNITUDE
    magnitude.partition(bits.size - kept)
    sent = magnitude[bits.size - kept :]
    threshold: np.uint32 = sent[0]
    return threshold, kept - int(np.count_nonzero(sent > threshold))
