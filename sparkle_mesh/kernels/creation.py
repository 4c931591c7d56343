"""Arrays that kernels make themselves: of one number, of counted ones, of lists of numbers."""

from __future__ import annotations

import builtins
import operator
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sparkle_mesh.kernels.functions import astype, broadcast_to, stack
from sparkle_mesh.kernels.ops import FLOATS, Scalar, as_dtype
from sparkle_mesh.kernels.values import Value, as_tracer, current_trace, elementwise, fail

if TYPE_CHECKING:
    from sparkle_mesh.kernels.tracer import Tracer


def full(shape: Any, fill_value: object, *, dtype: npt.DTypeLike | None = None) -> Tracer:
    """Return ``fill_value``, a number or an array that is traced, repeated to ``shape``."""
    value = as_tracer(fill_value)
    return broadcast_to(value if dtype is None else astype(value, dtype), shape)


def _filled(shape: Any, value: int, dtype: npt.DTypeLike | None) -> Tracer:
    trace = current_trace()
    name = "float64" if dtype is None else as_dtype(dtype)
    return broadcast_to(trace.value(trace.builder.constant(value, name)), shape)


def zeros(shape: Any, *, dtype: npt.DTypeLike | None = None) -> Tracer:
    """Return zeros, in float64 by default."""
    return _filled(shape, 0, dtype)


def ones(shape: Any, *, dtype: npt.DTypeLike | None = None) -> Tracer:
    """Return ones, in float64 by default."""
    return _filled(shape, 1, dtype)


def zeros_like(x: object, dtype: npt.DTypeLike | None = None) -> Tracer:
    """Return zeros of the shape and dtype of ``x``."""
    x = as_tracer(x)
    return _filled(x.shape, 0, x.dtype if dtype is None else dtype)


def ones_like(x: object, dtype: npt.DTypeLike | None = None) -> Tracer:
    """Return ones of the shape and dtype of ``x``."""
    x = as_tracer(x)
    return _filled(x.shape, 1, x.dtype if dtype is None else dtype)


def full_like(x: object, fill_value: object, dtype: npt.DTypeLike | None = None) -> Tracer:
    """Return ``fill_value`` repeated to the shape of ``x``, in its dtype."""
    x = as_tracer(x)
    return full(x.shape, fill_value, dtype=x.dtype if dtype is None else dtype)


def asarray(value: object, dtype: npt.DTypeLike | None = None, *, copy: bool | None = None) -> Tracer:
    """Return ``value`` as an array that is traced: one already, a number, or lists of these."""
    if isinstance(value, (list, tuple)):
        if not value:
            return zeros((0,), dtype=dtype)
        found = stack([asarray(one) for one in value])
    else:
        found = as_tracer(value)
    return found if dtype is None else astype(found, dtype)


def _iota(count: int, dtype: str) -> Tracer:
    trace = current_trace()
    return trace.value(trace.builder.add("iota", shape=(count,), dtype=dtype, axes=(0,)))


def _known(value: object, what: str) -> Scalar:
    if isinstance(value, Value):
        fail(f"{what} that is traced would make a shape that is not known until the kernel runs; pass it as static")
    if isinstance(value, np.generic):
        value = value.item()
    if not isinstance(value, (int, float)):
        fail(f"{what} is a number, not {value!r}")
    return value


def arange(start: object, stop: object = None, step: object = 1, *, dtype: npt.DTypeLike | None = None) -> Tracer:
    """Return numbers from ``start`` up to ``stop`` in steps of ``step``; from 0 if only one is given."""
    first, last, by = (0, start, step) if stop is None else (start, stop, step)
    begin, end, pace = (_known(value, "an end or step of arange") for value in (first, last, by))
    if pace == 0:
        fail("a step of arange is not 0")
    if dtype is None:
        name = "int64" if builtins.all(isinstance(one, int) for one in (begin, end, pace)) else "float64"
    else:
        name = as_dtype(dtype)
    count = max(ceil((end - begin) / pace), 0)
    if name in FLOATS:
        # NumPy goes on by the difference of the first two, in the dtype of the result.
        origin, second = np.array([begin, begin + pace], name)
        apart = second - origin
        scaled = _iota(count, name) if apart == 1 else elementwise("multiply", _iota(count, name), float(apart))
        return scaled if origin == 0 else elementwise("add", scaled, float(origin))
    whole = _iota(count, name)
    whole = whole if pace == 1 else elementwise("multiply", whole, int(pace))
    return whole if begin == 0 else elementwise("add", whole, int(begin))


def linspace(
    start: object, stop: object, num: int, *, dtype: npt.DTypeLike | None = None, endpoint: bool = True
) -> Tracer:
    """Return ``num`` numbers as far apart from each other, from ``start`` to ``stop``."""
    begin, end = float(_known(start, "an end of linspace")), float(_known(stop, "an end of linspace"))
    count = operator.index(num)
    gaps = max(count - 1 if endpoint else count, 1)
    places = _iota(count, "float64")
    found = elementwise("add", elementwise("multiply", places, (end - begin) / gaps), begin)
    if endpoint and count > 1:
        found = elementwise("where", elementwise("equal", places, float(count - 1)), end, found)
    return found if dtype is None else astype(found, dtype)


def eye(n_rows: int, n_cols: int | None = None, *, k: int = 0, dtype: npt.DTypeLike | None = None) -> Tracer:
    """Return ones on diagonal ``k`` of a matrix of zeros."""
    trace = current_trace()
    shape = (operator.index(n_rows), operator.index(n_rows if n_cols is None else n_cols))
    rows, columns = (
        trace.value(trace.builder.add("iota", shape=shape, dtype="int64", axes=(axis,))) for axis in (0, 1)
    )
    return astype(
        elementwise("equal", elementwise("subtract", columns, rows), k), "float64" if dtype is None else dtype
    )
