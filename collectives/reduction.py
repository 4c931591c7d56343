"""The operations a reduction can do, over the number types it can do them on.

Sums and products of integers wrap around, as NumPy's do; NaN and infinity are what NumPy makes of them. float16 and
bfloat16 are added up in float32 and rounded once, where their last contribution comes in. So is a mean divided, by the
number of ranks. All ranks receive that very number, so all hold the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from sparkle_mesh.errors import UsageError

Array = np.ndarray[Any, np.dtype[Any]]

_UFUNCS: Final[dict[str, np.ufunc]] = {
    "sum": np.add,
    "mean": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "prod": np.multiply,
}
OPS: Final = tuple(_UFUNCS)
FLOAT32: Final = np.dtype(np.float32)
# By kind: the sizes of an element that are the same numbers on every machine.
_ITEM_BYTES: Final = {"i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "f": (2, 4, 8), "c": (8, 16)}
_HINTS: Final = {
    "b": "convert it to an integer type first, for example with astype('uint8')",
    "f": "convert it to float64 first, which is the same on every machine",
    "c": "convert it to complex128 first, which is the same on every machine",
    "O": "object arrays cannot be sent; convert it to a number type",
}


def is_half(dtype: np.dtype[Any]) -> bool:
    """Whether ``dtype`` is float16 or (of the package ml_dtypes) bfloat16."""
    return dtype.itemsize == 2 and (dtype.kind == "f" or is_bfloat16(dtype))


def is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Whether ``dtype`` is bfloat16, which NumPy itself does not know."""
    return dtype.kind == "V" and dtype.name == "bfloat16"


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether numbers of ``dtype`` are real and not whole."""
    return dtype.kind == "f" or is_bfloat16(dtype)


def work_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type that numbers of ``dtype`` are added up in."""
    return FLOAT32 if is_half(dtype) else dtype


def check_dtype(dtype: np.dtype[Any], what: str) -> None:
    """Refuse what cannot be reduced: anything but integers, floats of up to 64 bits, complex of two such, bfloat16.

    Raises
    ------
    UsageError
        Naming ``what`` has the dtype, and what to convert it to.
    """
    if dtype.itemsize in _ITEM_BYTES.get(dtype.kind, ()) or is_bfloat16(dtype):
        return
    hint = _HINTS.get(dtype.kind, "convert it to one of these first")
    raise UsageError(
        f"{what} is of dtype {dtype}; integers, float16, bfloat16, float32, float64, complex64 and complex128 can be"
        f" reduced: {hint}"
    )


def check_op(op: str, dtype: np.dtype[Any], what: str) -> None:
    """Refuse an unknown ``op``, and a mean of integers.

    Raises
    ------
    UsageError
    """
    if op not in OPS:
        raise UsageError(f"op {op!r} is not one of {', '.join(map(repr, OPS))}")
    if op == "mean" and dtype.kind in "iu":
        raise UsageError(
            f"op 'mean' of {what} of dtype {dtype} would be rounded; convert it to float32 or float64 first"
        )


@dataclass(frozen=True, slots=True)
class Reduction:
    """One operation among ``size`` ranks. Works on flat arrays of equal length."""

    op: str
    size: int

    @property
    def share(self) -> float:
        """By how much a rank's number must differ so that the result differs by one: for sums and means."""
        return float(self.size) if self.op == "mean" else 1.0

    def combine(self, first: Array, second: Array, out: Array) -> None:
        """``out = first + second``; the order counts where both are NaN. ``out`` may be either."""
        # Overflow and invalid are the numbers' own affair: they come out as inf and nan on every rank.
        with np.errstate(all="ignore"):
            _UFUNCS[self.op](first, second, out=out)

    def finish(self, total: Array) -> None:
        """Do what is left when all contributions are in ``total``: divide, for a mean."""
        if self.op == "mean":
            with np.errstate(all="ignore"):
                np.divide(total, total.dtype.type(self.size), out=total)
