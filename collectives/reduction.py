"""The operations a reduction can do, over the number types it can do them on.

Sums of integers wrap around, as NumPy's do. A mean is a sum, divided once by the number of ranks where its last
contribution comes in; all ranks receive that very quotient, so all hold the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sparkle_mesh.errors import UsageError

Array = np.ndarray[Any, np.dtype[Any]]

OPS = ("sum", "mean")
_FLOAT_ITEM_BYTES = (4, 8)


def check_dtype(dtype: np.dtype[Any], what: str) -> None:
    """Refuse what cannot be reduced: anything but float32, float64 and the integers.

    Raises
    ------
    UsageError
        Naming ``what`` has the dtype, and what to convert it to.
    """
    if dtype.kind in "iu" or (dtype.kind == "f" and dtype.itemsize in _FLOAT_ITEM_BYTES):
        return
    hints = {
        "b": "convert it to an integer type first, for example with astype('uint8')",
        "f": "convert it to float32 first",
        "c": "pass its real and imaginary parts",
        "O": "object arrays cannot be sent; convert it to a number type",
    }
    hint = hints.get(dtype.kind, "convert it to one of these first")
    raise UsageError(f"{what} is of dtype {dtype}; float32, float64 and integers can be reduced: {hint}")


def check_op(op: str, dtype: np.dtype[Any], what: str) -> None:
    """Refuse an unknown ``op``, and a mean of integers.

    Raises
    ------
    UsageError
    """
    if op not in OPS:
        raise UsageError(f"op {op!r} is not one of {', '.join(map(repr, OPS))}")
    if op == "mean" and dtype.kind != "f":
        raise UsageError(
            f"op 'mean' of {what} of dtype {dtype} would be rounded; convert it to float32 or float64 first"
        )


@dataclass(frozen=True, slots=True)
class Reduction:
    """One operation among ``size`` ranks. Works on flat arrays of one dtype and equal length."""

    op: str
    size: int

    def combine(self, received: Array, operand: Array, out: Array, finish: bool) -> None:
        """``out = received + operand``, and the mean's division if ``finish``. ``out`` may be ``operand``."""
        # Overflow and invalid are the numbers' own affair: they come out as inf and nan on every rank.
        with np.errstate(all="ignore"):
            np.add(received, operand, out=out)
            if finish and self.op == "mean":
                np.divide(out, out.dtype.type(self.size), out=out)
