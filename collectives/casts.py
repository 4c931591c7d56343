"""The codecs that round every number by itself to a shorter floating-point type: float16, bfloat16.

Both round to nearest, ties to even. NaN becomes the type's quiet NaN without sign. Encoding what was decoded gives the
same bytes again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Final

import numpy as np

from sparkle_mesh.collectives.codec import INFINITY, MAGNITUDE, Codec, magnitudes, pieces, scratch
from sparkle_mesh.collectives.reduction import Array

_WORD: Final = np.dtype("<u2")
_EXPONENT: Final = np.uint32(0x7F800000)
_SIGN_SHIFT: Final = np.uint32(16)
_NAN16: Final = 0x7E00
_NANB16: Final = 0x7FC0
# Beyond float16: what rounds to infinity, and a number that does.
_HALF_OVERFLOW: Final = 65520.0
_HALF_TOP: Final = np.uint32(0x47800000)  # 65536.0
# Where float32 has the exponents of float16's smallest normal number, and of 2**13: its fraction is 13 bits longer.
_HALF_NORMAL: Final = np.uint32((127 - 14) << 23)
_HALF_SHIFT: Final = np.uint32(13)
_HALF_STEP: Final = np.uint32(13 << 23)
# What (e + 13 + 127) * 2**10 is more than (e + 14) * 2**10.
_HALF_BIAS: Final = np.uint32(126 << 10)
_HALF_SIGN: Final = np.uint32(0x8000)


@dataclass(frozen=True, slots=True)
class Float16(Codec):
    """IEEE 754 half precision: 2 bytes per element, magnitudes from 6e-8 to 65504.

    Magnitudes of 65520 and more, infinity among them, become infinity; those of 2**-25 and less become zero.
    """

    name: ClassVar[str] = "float16"
    block_elements: ClassVar[int] = 1

    def encoded_bytes(self, count: int) -> int:
        """Return 2 bytes per element."""
        return 2 * count

    def error_bound(self, values: Array) -> Array:
        """Return half the distance of neighbours: ``max(2**-11 * abs(values), 2**-25)``.

        A number of exponent e lies between neighbours that are 2**(e - 10) apart, but no closer than the denormals'
        2**-24. From 65520 on, for infinity and NaN: ``inf``. float32 in, float64 out, both of shape ``(count,)``.
        """
        bound = magnitudes(values)
        finite = bound < _HALF_OVERFLOW
        return np.where(finite, np.maximum(bound * 2.0**-11, 2.0**-25), np.inf)

    def describe(self) -> str:
        """Return its name."""
        return self.name

    def _encode(self, values: Array, out: Array) -> None:
        """Round by an addition: NumPy's own cast goes number by number (1.5 GB/s; 0.05 where results are denormal).

        For a magnitude x of exponent e (at least -14, where float16's denormals begin), x + 2**(e + 13) is x rounded to
        a multiple of 2**(e - 10), float16's spacing, and the sum's bits less those of 2**(e + 13) say to which one.
        That, plus (e + 14) * 2**10, is float16: a fraction that rounds up to 2**11 carries into the exponent.
        Source: F. Giesen, "float->half variants", 2012 (its addition for denormals, here for every exponent).
        """
        target = out.view(_WORD)
        sums, powers, least = scratch(values.size), scratch(values.size), scratch(values.size)
        # The maximum of two arrays is vectorised, that of an array and a number is not.
        least.fill(_HALF_NORMAL)
        for piece in pieces(values.size):
            bits = values[piece].view(np.uint32)
            total, power = sums[: bits.size], powers[: bits.size]
            np.bitwise_and(bits, MAGNITUDE, out=total)
            top = total.max()
            if top > _HALF_TOP:
                np.minimum(total, _HALF_TOP, out=total)
            np.bitwise_and(total, _EXPONENT, out=power)
            np.maximum(power, least[: bits.size], out=power)
            np.add(power, _HALF_STEP, out=power)
            np.add(total.view(np.float32), power.view(np.float32), out=total.view(np.float32))
            np.subtract(total, power, out=total)
            np.right_shift(power, _HALF_SHIFT, out=power)
            np.add(total, power, out=total)
            np.subtract(total, _HALF_BIAS, out=total)
            np.right_shift(bits, _SIGN_SHIFT, out=power)
            np.bitwise_and(power, _HALF_SIGN, out=power)
            np.add(total, power, out=total)
            np.copyto(target[piece], total, casting="unsafe")
            if top > INFINITY:
                target[piece][np.isnan(values[piece])] = _NAN16

    def _decode(self, data: Array, out: Array) -> None:
        source = data.view(_WORD)
        table = _float16_table()
        for piece in pieces(out.size):
            # No index can be out of range; "wrap" is the mode that NumPy is quickest at.
            np.take(table, source[piece], out=out[piece], mode="wrap")


@cache
def _float16_table() -> Array:
    """Return all float16 numbers as float32: a look-up takes half the time of NumPy's cast, for denormals 1/16."""
    table = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    table[np.isnan(table)] = np.nan
    table.flags.writeable = False
    return table


@dataclass(frozen=True, slots=True)
class BFloat16(Codec):
    """The upper half of a float32: 2 bytes per element, float32's range, 8 significant bits.

    Magnitudes from ``(2 - 2**-8) * 2**127`` (3.396e38) on, infinity among them, become infinity.
    """

    name: ClassVar[str] = "bfloat16"
    block_elements: ClassVar[int] = 1

    def encoded_bytes(self, count: int) -> int:
        """Return 2 bytes per element."""
        return 2 * count

    def error_bound(self, values: Array) -> Array:
        """Return half the distance of neighbours: ``max(2**-8 * abs(values), 2**-134)``.

        A number of exponent e lies between neighbours that are 2**(e - 7) apart, but no closer than the denormals'
        2**-133. What becomes infinity, and NaN: ``inf``. float32 in, float64 out, both of shape ``(count,)``.
        """
        bound = magnitudes(values)
        finite = bound < (2 - 2.0**-8) * 2.0**127
        return np.where(finite, np.maximum(bound * 2.0**-8, 2.0**-134), np.inf)

    def describe(self) -> str:
        """Return its name."""
        return self.name

    def _encode(self, values: Array, out: Array) -> None:
        """Add just under half of the last bit kept, and that bit: what is above, or at half and odd, carries."""
        target = out.view(_WORD)
        room = scratch(values.size)
        for piece in pieces(values.size):
            bits = values[piece].view(np.uint32)
            rounded = room[: bits.size]
            np.right_shift(bits, _SIGN_SHIFT, out=rounded)
            np.bitwise_and(rounded, np.uint32(1), out=rounded)
            np.add(rounded, np.uint32(0x7FFF), out=rounded)
            np.add(rounded, bits, out=rounded)
            np.right_shift(rounded, _SIGN_SHIFT, out=rounded)
            np.copyto(target[piece], rounded, casting="unsafe")
            # A carry may have made infinity or zero of a NaN.
            nan = np.isnan(values[piece])
            if nan.any():
                target[piece][nan] = _NANB16

    def _decode(self, data: Array, out: Array) -> None:
        source = data.view(_WORD)
        bits = out.view(np.uint32)
        for piece in pieces(out.size):
            part = bits[piece]
            part[...] = source[piece]
            np.left_shift(part, _SIGN_SHIFT, out=part)
