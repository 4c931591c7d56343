"""Indices that are known when a kernel is traced: integers, slices, ``...`` and None."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sparkle_mesh.kernels.values import Value, fail, owner

if TYPE_CHECKING:
    from sparkle_mesh.kernels.tracer import Tracer


def index(x: Value, key: object) -> Tracer:
    """Return ``x[key]``."""
    trace = owner((x,))
    keys = list(key) if isinstance(key, tuple) else [key]
    for one in keys:
        _check(one)
    taken = sum(one is not None and one is not Ellipsis for one in keys)
    if taken > x.ndim:
        fail(f"{taken} indices are too many for an array of shape {x.shape}")
    ellipses = [place for place, one in enumerate(keys) if one is Ellipsis]
    if len(ellipses) > 1:
        fail("an index has one '...' at most")
    place = ellipses[0] if ellipses else len(keys)
    keys[place : place + 1] = [slice(None)] * (x.ndim - taken)
    starts, steps, counts, shape = _places(x.shape, keys)
    whole = all(
        (start, step, count) == (0, 1, length)
        for start, step, count, length in zip(starts, steps, counts, x.shape, strict=True)
    )
    number = x._number
    if not whole:
        number = trace.builder.add("slice", number, shape=tuple(counts), starts=tuple(starts), steps=tuple(steps))
    return trace.value(trace.builder.reshape(number, tuple(shape)))


def _check(key: object) -> None:
    if isinstance(key, Value):
        what = "a mask" if key.dtype == np.bool_ else "an index"
        fail(
            f"x[…] with {what} that is traced takes elements that are not known until the kernel runs; "
            f"use np.where(mask, x, 0), or x.__array_namespace__().arange(n) == i as a mask to multiply with"
        )
    if isinstance(key, (bool, np.bool_, list, np.ndarray)):
        fail("x[…] with a list, an array or a bool is not part of kernels; use slices, np.stack and np.where")
    if key is not None and key is not Ellipsis and not isinstance(key, slice) and not hasattr(key, "__index__"):
        fail(f"x[…] with {type(key).__name__} is not part of kernels; use integers, slices, '...' and None")


def _places(lengths: Sequence[int], keys: Sequence[object]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Return starts, steps and counts for each axis of an array, and the shape of the result."""
    starts: list[int] = []
    steps: list[int] = []
    counts: list[int] = []
    shape: list[int] = []
    for key in keys:
        if key is None:
            shape.append(1)
            continue
        length = lengths[len(starts)]
        if isinstance(key, slice):
            start, stop, step = key.indices(length)
            count = len(range(start, stop, step))
            shape.append(count)
        else:
            step, count = 1, 1
            start = wanted = operator.index(key)  # type: ignore[arg-type]
            if not -length <= wanted < length:
                fail(f"index {wanted} is out of bounds for axis {len(starts)} of {length} elements")
            start %= length
        starts.append(start if count else 0)
        steps.append(step if count > 1 else 1)
        counts.append(count)
    return starts, steps, counts, shape
