"""Means to which ranks contribute with weights of their own: ``sum(weight * array) / sum(weight)``.

What is added up are vectors of ``weight * array`` with the weight itself behind them, or beside them where vectors are
compressed, which weights are not; so every way to add up can be taken, and the division is by the same bits on every
rank. A weight of 0 is for a rank that has no data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from sparkle_mesh.collectives.arrays import ArraysLook, Bucket, check_arrays
from sparkle_mesh.collectives.compression import Compression, check_compressible
from sparkle_mesh.collectives.reduction import Array, check_dtype, check_op, work_dtype
from sparkle_mesh.errors import UsageError

# Products with other weights might leave the range of a codec.
_COMPRESSED_MOST = 2**20


@dataclass(slots=True)
class Weighted:
    """One rank's part of a weighted mean: ``summed`` are to be summed over all ranks, then :meth:`commit` writes."""

    summed: list[Array]
    buckets: list[Bucket]
    #: How many of the last of ``summed`` are weights alone.
    beside: int
    #: How the caller's arrays look: what all ranks must have in common.
    look: ArraysLook
    label: str = "weighted mean"

    def commit(self) -> None:
        """Write the means into the caller's arrays.

        Raises
        ------
        UsageError
            On every rank, if all weights are 0, or their sum is infinite; the arrays are as they were.
        """
        if not all(np.isfinite(vector[-1]) for vector in self.summed[-self.beside :]):
            raise UsageError(
                "the weights of all ranks add up to more than a number holds; scale them; no array was changed"
            )
        if any(not vector[-1] for vector in self.summed[-self.beside :]):
            raise UsageError(
                "the weights of all ranks are 0: there is nothing to take the mean of; no array was changed"
            )
        for vector, bucket in zip(self.summed, self.buckets, strict=False):
            weight = self.summed[-1][-1] if self.beside else vector[-1]
            mean = vector[: bucket.data.size]
            with np.errstate(all="ignore"):
                np.divide(mean, mean.dtype.type(weight), out=mean)
                bucket.commit(mean)


def weigh(data: object, op: str, weight: object, compression: object) -> Weighted:
    """Return this rank's part of a mean with ``weight``. Raises UsageError."""
    if isinstance(weight, bool) or not isinstance(weight, int | float | np.integer | np.floating):
        raise UsageError(f"weight is {weight!r}; give a number, such as the size of this rank's batch")
    if not 0 <= weight < math.inf:
        raise UsageError(f"weight is {weight!r}; it must be 0 or more, and finite")
    if isinstance(compression, Compression) and compression.feedback is not None:
        raise UsageError(
            "weight, which uneven() gives too, does not go with error feedback: what was lost of a large batch would be"
            " added to a small one"
        )
    codec = compression.codec.name if isinstance(compression, Compression) else compression
    if codec == "float16":
        raise UsageError(
            "weight, which uneven() gives too, does not go with 'float16', which does not hold large ones; use"
            " 'bfloat16' or 'int8'"
        )
    if compression is not None and weight and not 1 / _COMPRESSED_MOST <= weight <= _COMPRESSED_MOST:
        shown = f"{weight!r}"[:40]
        raise UsageError(
            f"weight is {shown}; with compression it must be 0, or from 1/{_COMPRESSED_MOST} to {_COMPRESSED_MOST}:"
            " scale all ranks' weights"
        )
    if op != "mean":
        raise UsageError(f"op {op!r} does not go with weight, only 'mean' does")

    def check(dtype: np.dtype[Any], label: str) -> None:
        check_dtype(dtype, label)
        check_op("mean", dtype, label)
        if compression not in (None, "auto"):
            check_compressible(dtype, label)
        _check_fits(cast(float, weight), work_dtype(dtype), label)

    arrays = check_arrays(data, check)
    buckets = arrays.buckets(np.empty)
    beside = 0 if compression is None else 1
    summed = []
    for bucket in buckets:
        count = bucket.data.size
        vector = np.empty(count + 1 - beside, work_dtype(bucket.data.dtype))
        with np.errstate(all="ignore"):
            # Not 0 times what may be NaN: who has no data contributes nothing.
            np.multiply(bucket.data, vector.dtype.type(weight), out=vector[:count]) if weight else vector.fill(0)
        vector[count:] = weight
        summed.append(vector)
    if beside:
        summed.append(np.array([weight], np.float64))
    return Weighted(summed, buckets, beside, arrays.look)


def _check_fits(weight: float, dtype: np.dtype[Any], label: str) -> None:
    """Raises UsageError for a weight that numbers of ``dtype`` cannot be multiplied by."""
    span = np.finfo(dtype)
    if weight and not float(span.tiny) <= weight <= float(span.max):
        shown = f"{weight!r}"[:40]
        raise UsageError(f"weight is {shown}, which is beyond what {dtype} of {label} holds; scale all ranks' weights")
