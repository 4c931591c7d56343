"""The codecs that share one scale among a block of numbers: int8, int4.

A number x of a block whose largest magnitude is m becomes the whole number q nearest to x / s, where the scale s is
m / 127 (int8) or m / 7 (int4); decoded it is q * s. Rounding is to nearest, ties to even. Source: T. Dettmers et al.,
"8-bit optimizers via block-wise quantization", ICLR 2022, section 2, with evenly spaced levels.

The scale is rounded up to so few significant bits that q * s is exact in float32. So decoding a block and encoding it
again gives the same bytes: its largest magnitude is then 127 * s exactly, whose scale is s, and every q * s / s is
within 2**-16 of q. (With all 24 bits of s, the product would be rounded, and so at times lead to another scale.)

A block with NaN or infinity in it has the scale NaN: all of it is decoded to NaN, which no rank can overlook. A block
whose scale would be denormal (magnitudes below 1.5e-36 for int8, 8.3e-38 for int4) becomes zero, because processors are
set up to take denormals for zero or not, and because their reciprocals overflow. The sign of zero is lost.

Encoded are first all scales, then all q. The last block may be shorter.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from sparkle_mesh.collectives.codec import INFINITY, MAGNITUDE, Codec, magnitudes, pieces, scratch
from sparkle_mesh.collectives.reduction import Array

_NORMAL: Final = 2.0**-126
_FLOAT32_TOP: Final = np.finfo(np.float32).max


class Blockwise(Codec):
    """What int8 and int4 have in common.

    ``_levels`` is the largest q; ``_dropped_bits`` are the bits of a float32's fraction that scales do not have;
    ``_scale_bytes`` are their upper bytes, the only ones sent.
    """

    __slots__ = ()
    _levels: ClassVar[int]
    _dropped_bits: ClassVar[int]
    _scale_bytes: ClassVar[int]

    def encoded_bytes(self, count: int) -> int:
        """Return the bytes of the scales, one per block begun, and of the numbers."""
        return self._blocks(count) * self._scale_bytes + self._code_bytes(count)

    def error_bound(self, values: Array) -> Array:
        """Return ``s * (1/2 + 2**-16)`` for the block's scale s.

        Rounding to a whole number adds at most 1/2. The quotient is computed as ``x * (1 / s)``, two roundings of
        2**-24 each, of at most 127.01: at most 2**-16. The product q * s is exact. With s at most
        ``m / 127 * (1 + 2**-15)`` (int8) or ``m / 7 * (1 + 2**-7)`` (int4) for a block's largest magnitude m, and
        2**-24 more for the division, that is less than m / 253.9 and m / 13.8. (For m next to float32's largest number
        s is a little less than m / levels, so that levels * s is finite; the quotient then exceeds levels by less than
        1/16.) In a block that becomes zero: ``abs(values)``; in one that becomes NaN: ``inf``. float32 in, float64 out,
        both of shape ``(count,)``.
        """
        bound = magnitudes(values)
        with np.errstate(all="ignore"):
            scale = np.repeat(self._scales(values.view(np.uint32) & MAGNITUDE), self.block_elements)[: values.size]
        bound = np.where(scale == 0, bound, scale.astype(np.float64) * (0.5 + 2.0**-16))
        return np.where(np.isnan(scale), np.inf, bound)

    def _encode(self, values: Array, out: Array) -> None:
        scale_bytes = self._blocks(values.size) * self._scale_bytes
        scales = out[:scale_bytes].view(f"<u{self._scale_bytes}")
        room = scratch(values.size)
        for piece in pieces(values.size):
            part = values[piece]
            work = room[: part.size]
            np.bitwise_and(part.view(np.uint32), MAGNITUDE, out=work)
            scale = self._scales(work)
            first = piece.start // self.block_elements
            scales[first : first + scale.size] = scale.view(np.uint32) >> np.uint32(32 - 8 * self._scale_bytes)
            # NaN is no whole number; what casts make of it is up to the processor.
            lost = np.flatnonzero(np.isnan(scale))
            inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
            quotient = work.view(np.float32)
            self._multiply(part, inverse, quotient)
            for block in lost:
                quotient[block * self.block_elements :][: self.block_elements] = 0
            np.rint(quotient, out=quotient)
            start = scale_bytes + self._code_bytes(piece.start)
            self._pack(quotient, out[start : scale_bytes + self._code_bytes(piece.stop)])

    def _decode(self, data: Array, out: Array) -> None:
        scale_bytes = self._blocks(out.size) * self._scale_bytes
        scales = data[:scale_bytes].view(f"<u{self._scale_bytes}")
        for piece in pieces(out.size):
            part = out[piece]
            first = piece.start // self.block_elements
            scale = scales[first : first + self._blocks(part.size)].astype(np.uint32)
            np.left_shift(scale, np.uint32(32 - 8 * self._scale_bytes), out=scale)
            start = scale_bytes + self._code_bytes(piece.start)
            self._unpack(data[start : scale_bytes + self._code_bytes(piece.stop)], part)
            self._multiply(part, scale.view(np.float32), part)

    def _blocks(self, count: int) -> int:
        return -(-count // self.block_elements)

    def _scales(self, magnitude: Array) -> Array:
        """Return the float32 scales of the blocks of ``magnitude``, uint32 bits of float32 without the signs."""
        starts = np.arange(0, magnitude.size, self.block_elements)
        # Of integers, the maximum of a block is 4 times as fast as of float32, which has to look for NaN; and
        # "reduceat" goes on to the next block with less ado than a reduction over the rows of a matrix.
        top = np.maximum.reduceat(magnitude, starts) if starts.size else np.zeros(0, np.uint32)
        scale: Array = top.view(np.float32) / np.float32(self._levels)
        dropped = np.uint32((1 << self._dropped_bits) - 1)
        bits = scale.view(np.uint32)
        np.add(bits, dropped, out=bits)
        np.bitwise_and(bits, ~dropped, out=bits)
        ceiling = np.array(_FLOAT32_TOP / np.float32(self._levels), np.float32).view(np.uint32) & ~dropped
        np.minimum(bits, ceiling, out=bits)
        scale[top < np.array(self._levels * _NORMAL, np.float32).view(np.uint32)] = 0
        # With its sign: processors differ in that of a NaN that they made themselves.
        bits[top >= INFINITY] = 0x7FC00000
        return scale

    def _multiply(self, numbers: Array, factors: Array, out: Array) -> None:
        """``out = numbers * factors``, one factor per block; ``out`` may be ``numbers``."""
        whole = numbers.size - numbers.size % self.block_elements
        shape = (-1, self.block_elements)
        rows = factors[: whole // self.block_elements, np.newaxis]
        np.multiply(numbers[:whole].reshape(shape), rows, out=out[:whole].reshape(shape))
        if whole < numbers.size:
            np.multiply(numbers[whole:], factors[-1], out=out[whole:])

    @abstractmethod
    def _code_bytes(self, count: int) -> int: ...

    @abstractmethod
    def _pack(self, codes: Array, out: Array) -> None:
        """Write the whole numbers ``codes``, float32, to the bytes ``out``."""

    @abstractmethod
    def _unpack(self, data: Array, out: Array) -> None:
        """Write the whole numbers that the bytes ``data`` hold to the float32 ``out``."""


@dataclass(frozen=True, slots=True)
class Int8(Blockwise):
    """Whole numbers from -127 to 127, and per 256 of them a float32 scale of 16 significant bits: 1.016 bytes each."""

    name: ClassVar[str] = "int8"
    block_elements: ClassVar[int] = 256
    _levels: ClassVar[int] = 127
    _dropped_bits: ClassVar[int] = 8
    _scale_bytes: ClassVar[int] = 4

    def describe(self) -> str:
        """Return its name and block."""
        return f"{self.name} (blocks of {self.block_elements})"

    def _code_bytes(self, count: int) -> int:
        return count

    def _pack(self, codes: Array, out: Array) -> None:
        np.copyto(out.view(np.int8), codes, casting="unsafe")

    def _unpack(self, data: Array, out: Array) -> None:
        np.copyto(out, data.view(np.int8))


@dataclass(frozen=True, slots=True)
class Int4(Blockwise):
    """Whole numbers from -7 to 7, two per byte, and per 64 of them a bfloat16 scale: 0.531 bytes each.

    The first of two is in the lower bits, in two's complement; a last byte of one number has zero in the upper bits.
    The scale has float32's range: a float16 one would lose blocks below 4e-7 and above 4.6e5. That it has only 8
    significant bits makes the bound 1/128 larger at most; a float32 one would make the whole 6 % larger.
    """

    name: ClassVar[str] = "int4"
    block_elements: ClassVar[int] = 64
    _levels: ClassVar[int] = 7
    _dropped_bits: ClassVar[int] = 16
    _scale_bytes: ClassVar[int] = 2

    def describe(self) -> str:
        """Return its name and block."""
        return f"{self.name} (blocks of {self.block_elements})"

    def _code_bytes(self, count: int) -> int:
        return -(-count // 2)

    def _pack(self, codes: Array, out: Array) -> None:
        numbers = np.zeros(2 * out.size, np.int8)
        np.copyto(numbers[: codes.size], codes, casting="unsafe")
        # Two at a time: the first in the lower byte.
        pairs = numbers.view("<u2")
        upper = pairs >> np.uint16(4)
        np.bitwise_and(upper, np.uint16(0xF0), out=upper)
        np.bitwise_and(pairs, np.uint16(0x0F), out=pairs)
        np.bitwise_or(pairs, upper, out=pairs)
        np.copyto(out, pairs, casting="unsafe")

    def _unpack(self, data: Array, out: Array) -> None:
        pairs = data.astype("<u2")
        np.bitwise_or(pairs, pairs << np.uint16(4), out=pairs)
        np.bitwise_and(pairs, np.uint16(0x0F0F), out=pairs)
        # From four bits of two's complement to eight: the sign bit counts -8 instead of 8.
        np.bitwise_xor(pairs, np.uint16(0x0808), out=pairs)
        numbers = pairs.view(np.int8)
        np.subtract(numbers, np.int8(8), out=numbers)
        np.copyto(out, numbers[: out.size])
