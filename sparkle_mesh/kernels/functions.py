"""What arrays can be done with besides arithmetic, for traced ones: with NumPy's semantics, rounding included."""

from __future__ import annotations

import builtins
import operator
from collections.abc import Sequence
from math import prod as product
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sparkle_mesh.kernels.indexing import index as index
from sparkle_mesh.kernels.ops import FLOATS, Shape, as_dtype
from sparkle_mesh.kernels.values import as_number, as_tracer, elementwise, fail, owner, typed_operands

if TYPE_CHECKING:
    from sparkle_mesh.kernels.tracer import Tracer


def _chosen(axis: Any, rank: int) -> tuple[int, ...]:
    """Return the axes that ``axis`` means, none of them negative."""
    if axis is None:
        return tuple(range(rank))
    axes = tuple(map(operator.index, axis)) if isinstance(axis, (tuple, list)) else (operator.index(axis),)
    for one in axes:
        if not -rank <= one < rank:
            fail(f"axis {one} is out of bounds for an array of {rank} dimensions")
    found = tuple(one % rank for one in axes)
    if len(set(found)) != len(found):
        fail(f"axes {axes} name one twice")
    return found


def _as_shape(shape: Any) -> Shape:
    return tuple(map(operator.index, shape)) if isinstance(shape, (tuple, list)) else (operator.index(shape),)


# --- Conversion and shape ---------------------------------------------------------------------


def astype(x: object, dtype: npt.DTypeLike, copy: bool = True) -> Tracer:
    """Return the elements converted to ``dtype``."""
    x = as_tracer(x)
    x._trace.pinned.add(x._number)
    return x._trace.value(x._trace.builder.cast(x._number, as_dtype(dtype)))


def reshape(x: object, shape: Any) -> Tracer:
    """Return the elements in another shape, in C order; one length may be -1."""
    x = as_tracer(x)
    wanted = _as_shape(shape)
    if wanted.count(-1) == 1:
        known = -product(wanted)
        if known == 0 or x.size % known:
            fail(f"{x.size} elements of shape {x.shape} do not make {wanted}")
        wanted = tuple(x.size // known if length == -1 else length for length in wanted)
    return x._trace.value(x._trace.builder.reshape(x._number, wanted))


def transpose(x: object, axes: Any = None) -> Tracer:
    """Return the array with its axes in another order, reversed by default."""
    x = as_tracer(x)
    order = None if axes is None else _chosen(axes, x.ndim)
    return x._trace.value(x._trace.builder.transpose(x._number, order))


def matrix_transpose(x: object) -> Tracer:
    """Return the array with its last two axes exchanged."""
    return swapaxes(x, -1, -2)


def swapaxes(x: object, axis1: int, axis2: int) -> Tracer:
    """Return the array with two axes exchanged."""
    x = as_tracer(x)
    order = list(range(x.ndim))
    (one,), (other,) = _chosen(axis1, x.ndim), _chosen(axis2, x.ndim)
    order[one], order[other] = order[other], order[one]
    return transpose(x, order)


def moveaxis(x: object, source: Any, destination: Any) -> Tracer:
    """Return the array with axes moved to other places; the rest keep their order."""
    x = as_tracer(x)
    taken, places = _chosen(source, x.ndim), _chosen(destination, x.ndim)
    if len(taken) != len(places):
        fail(f"moveaxis from {source} to {destination}: as many axes must be told on both sides")
    order = [axis for axis in range(x.ndim) if axis not in taken]
    for place, axis in sorted(zip(places, taken, strict=True)):
        order.insert(place, axis)
    return transpose(x, order)


def squeeze(x: object, axis: Any = None) -> Tracer:
    """Return the array without ``axis``, which must be of length 1; without all such axes by default."""
    x = as_tracer(x)
    if axis is None:
        return reshape(x, tuple(length for length in x.shape if length != 1))
    chosen = _chosen(axis, x.ndim)
    if any_long := [one for one in chosen if x.shape[one] != 1]:
        fail(f"axis {any_long[0]} of shape {x.shape} is not of length 1")
    return reshape(x, tuple(length for one, length in enumerate(x.shape) if one not in chosen))


def expand_dims(x: object, axis: Any) -> Tracer:
    """Return the array with new axes of length 1, which are ``axis`` in the result."""
    x = as_tracer(x)
    count = len(axis) if isinstance(axis, (tuple, list)) else 1
    chosen = _chosen(axis, x.ndim + count)
    lengths = iter(x.shape)
    return reshape(x, tuple(1 if one in chosen else next(lengths) for one in range(x.ndim + count)))


def broadcast_to(x: object, shape: Any) -> Tracer:
    """Return the array repeated to ``shape``."""
    x = as_tracer(x)
    return x._trace.value(x._trace.builder.broadcast(x._number, _as_shape(shape)))


def broadcast_arrays(*arrays: object) -> tuple[Tracer, ...]:
    """Return the arrays repeated to the one shape that fits all."""
    traced = [as_tracer(array) for array in arrays]
    try:
        shape = np.broadcast_shapes(*(array.shape for array in traced))
    except ValueError:
        fail(f"shapes {', '.join(str(array.shape) for array in traced)} do not fit each other")
    return tuple(broadcast_to(array, shape) for array in traced)


def concatenate(arrays: Sequence[object], axis: int | None = 0) -> Tracer:
    """Return the arrays one after the other along ``axis``; flattened if it is None."""
    arrays = list(arrays)
    if not arrays:
        fail("there is nothing to concatenate")
    trace = owner(arrays)
    numbers = [
        one if isinstance(one, int) else trace.builder.constant(one.value) for one in typed_operands(trace, arrays)
    ]
    common = np.result_type(*(trace.builder.type_of(number).dtype for number in numbers)).name
    parts = [trace.value(trace.builder.cast(number, common)) for number in numbers]
    if axis is None:
        parts, axis = [part.ravel() for part in parts], 0
    if not parts[0].ndim:
        fail("arrays without dimensions cannot be concatenated; use stack")
    (place,) = _chosen(axis, parts[0].ndim)
    joined = trace.builder.add("concatenate", *(part._number for part in parts), axes=(place,))
    return trace.value(joined)


def stack(arrays: Sequence[object], axis: int = 0) -> Tracer:
    """Return the arrays joined along a new axis."""
    traced = [as_tracer(array) for array in arrays]
    if len({array.shape for array in traced}) > 1:
        fail(f"stack takes arrays of one shape, not {', '.join(str(array.shape) for array in traced)}")
    return concatenate([expand_dims(array, axis) for array in traced], axis)


def unstack(x: object, axis: int = 0) -> tuple[Tracer, ...]:
    """Return the array's parts along ``axis``, without it."""
    return tuple(moveaxis(x, axis, 0))


def flip(x: object, axis: Any = None) -> Tracer:
    """Return the array with the order along ``axis`` reversed; along all by default."""
    x = as_tracer(x)
    chosen = _chosen(axis, x.ndim)
    return index(x, tuple(slice(None, None, -1 if one in chosen else 1) for one in range(x.ndim)))


def roll(x: object, shift: Any, axis: Any = None) -> Tracer:
    """Return the array with elements moved on along ``axis``; those beyond the end come in again."""
    x = as_tracer(x)
    if axis is None:
        return reshape(roll(x.ravel(), shift, 0), x.shape)
    axes = _chosen(axis, x.ndim)
    shifts = _as_shape(shift) if isinstance(shift, (tuple, list)) else _as_shape(shift) * len(axes)
    for one, by in zip(axes, shifts, strict=True):
        if x.shape[one] and by % x.shape[one]:
            before = (slice(None),) * one
            cut = x.shape[one] - by % x.shape[one]
            x = concatenate([x[(*before, slice(cut, None))], x[(*before, slice(None, cut))]], one)
    return x


def repeat(x: object, repeats: int, axis: int | None = None) -> Tracer:
    """Return the array with each element along ``axis`` ``repeats`` times."""
    x = as_tracer(x)
    if axis is None:
        x, axis = x.ravel(), 0
    (one,) = _chosen(axis, x.ndim)
    count = operator.index(repeats)
    wide = broadcast_to(expand_dims(x, one + 1), (*x.shape[: one + 1], count, *x.shape[one + 1 :]))
    return reshape(wide, (*x.shape[:one], x.shape[one] * count, *x.shape[one + 1 :]))


def tile(x: object, repetitions: Any) -> Tracer:
    """Return the array put beside itself ``repetitions`` times along each axis."""
    x = as_tracer(x)
    counts = _as_shape(repetitions)
    rank = builtins.max(x.ndim, len(counts))
    counts = (1,) * (rank - len(counts)) + counts
    shape = (1,) * (rank - x.ndim) + x.shape
    single = [length for one in shape for length in (1, one)]
    wide = [length for count, one in zip(counts, shape, strict=True) for length in (count, one)]
    if len(wide) > rank and 2 * rank > 8:
        # One axis after the other, for the sake of the bound on ranks.
        x = reshape(x, shape)
        for axis, count in enumerate(counts):
            x = concatenate([x] * count, axis) if count else index(x, (slice(None),) * axis + (slice(0, 0),))
        return x
    repeated = broadcast_to(reshape(x, single), wide)
    return reshape(repeated, tuple(count * one for count, one in zip(counts, shape, strict=True)))


# --- Products ---------------------------------------------------------------------------------


def matmul(a: object, b: object) -> Tracer:
    """Return the matrix product of floats."""
    trace = owner((a, b))
    return trace.value(trace.builder.matmul(as_number(trace, a), as_number(trace, b)))


def dot(a: object, b: object) -> Tracer:
    """Return ``numpy.dot`` of at most two dimensions."""
    a, b = as_tracer(a), as_tracer(b)
    if not a.ndim or not b.ndim:
        return elementwise("multiply", a, b)
    if b.ndim > 2:
        fail(f"dot of shapes {a.shape} and {b.shape}: kernels have it for two dimensions at most; use matmul")
    return matmul(a, b)


def vecdot(a: object, b: object, axis: int = -1) -> Tracer:
    """Return the sum of products along ``axis``."""
    return sum(elementwise("multiply", a, b), axis)


def outer(a: object, b: object) -> Tracer:
    """Return the product of each element of ``a`` with each of ``b``."""
    return elementwise("multiply", reshape(a, (-1, 1)), reshape(b, (1, -1)))


def norm(x: object, ord: object = None, axis: Any = None, keepdims: bool = False) -> Tracer:
    """Return the Euclidean norm of all elements, or along one axis."""
    x = as_tracer(x)
    if not (ord is None or (ord == 2 and (x.ndim == 1 or isinstance(axis, int))) or (ord == "fro" and x.ndim == 2)):
        fail(f"norm with ord={ord!r} is not part of kernels; only the Euclidean norm is")
    if x.dtype.kind != "f":
        x = astype(x, "float64")
    return elementwise("sqrt", sum(elementwise("square", x), axis, keepdims=keepdims))


# --- Reductions -------------------------------------------------------------------------------


def _reduce(op: str, x: Tracer, axis: Any, keepdims: bool) -> Tracer:
    chosen = _chosen(axis, x.ndim)
    return x._trace.value(x._trace.builder.reduce(op, x._number, chosen, keepdims=keepdims))


def sum(x: object, axis: Any = None, dtype: npt.DTypeLike | None = None, *, keepdims: bool = False) -> Tracer:
    """Return the sum over ``axis``; of small integers in 64 bits."""
    x = as_tracer(x) if dtype is None else astype(x, dtype)
    return _reduce("sum", x, axis, keepdims)


def prod(x: object, axis: Any = None, dtype: npt.DTypeLike | None = None, *, keepdims: bool = False) -> Tracer:
    """Return the product over ``axis``; of small integers in 64 bits."""
    x = as_tracer(x) if dtype is None else astype(x, dtype)
    return _reduce("prod", x, axis, keepdims)


def max(x: object, axis: Any = None, *, keepdims: bool = False) -> Tracer:
    """Return the greatest element along ``axis``."""
    return _reduce("max", as_tracer(x), axis, keepdims)


def min(x: object, axis: Any = None, *, keepdims: bool = False) -> Tracer:
    """Return the least element along ``axis``."""
    return _reduce("min", as_tracer(x), axis, keepdims)


def _truth(op: str, empty: bool, x: object, axis: Any, keepdims: bool) -> Tracer:
    x = as_tracer(x)
    if x.dtype != np.bool_:
        x = elementwise("not_equal", x, 0)
    chosen = _chosen(axis, x.ndim)
    if builtins.any(x.shape[one] == 0 for one in chosen):
        x = index(x, tuple(slice(0, 0) if one in chosen else slice(None) for one in range(x.ndim)))
        total = sum(x, axis, keepdims=keepdims)
        return elementwise("equal" if empty else "not_equal", total, 0)
    return _reduce(op, x, axis, keepdims)


def any(x: object, axis: Any = None, *, keepdims: bool = False) -> Tracer:
    """Return whether any element along ``axis`` is true."""
    return _truth("max", False, x, axis, keepdims)


def all(x: object, axis: Any = None, *, keepdims: bool = False) -> Tracer:
    """Return whether all elements along ``axis`` are true."""
    return _truth("min", True, x, axis, keepdims)


def mean(x: object, axis: Any = None, dtype: npt.DTypeLike | None = None, *, keepdims: bool = False) -> Tracer:
    """Return the mean over ``axis``; of float16 computed in float32, of integers in float64."""
    x = as_tracer(x)
    result = as_dtype(dtype) if dtype is not None else x.dtype.name if x.dtype.kind == "f" else "float64"
    if result not in FLOATS:
        fail(f"a mean in {result} is not part of kernels; use a floating dtype")
    x = astype(x, "float32" if result == "float16" and dtype is None else result)
    count = product(x.shape[one] for one in _chosen(axis, x.ndim))
    return astype(_divided(sum(x, axis, keepdims=keepdims), count), result)


def var(x: object, axis: Any = None, *, ddof: float = 0, keepdims: bool = False) -> Tracer:
    """Return the variance over ``axis``: squares of what differs from the mean, over the count less ``ddof``."""
    x = as_tracer(x)
    result = x.dtype.name if x.dtype.kind == "f" else "float64"
    count = product(x.shape[one] for one in _chosen(axis, x.ndim))
    center = _divided(sum(astype(x, result), axis, keepdims=True), count)
    total = sum(elementwise("square", elementwise("subtract", x, center)), axis, keepdims=keepdims)
    return _divided(total, builtins.max(count - ddof, 0))


def _divided(total: Tracer, count: float) -> Tracer:
    """Return ``total / count`` in the dtype of ``total``; float16 has no counts above 65504."""
    dtype = total.dtype
    wide = astype(total, "float32") if dtype == np.float16 else total
    return astype(elementwise("divide", wide, count), dtype)


def std(x: object, axis: Any = None, *, ddof: float = 0, keepdims: bool = False) -> Tracer:
    """Return the standard deviation over ``axis``."""
    return elementwise("sqrt", var(x, axis, ddof=ddof, keepdims=keepdims))


# --- Elements ---------------------------------------------------------------------------------


def clip(x: object, min: object = None, max: object = None) -> Tracer:
    """Return the elements within ``min`` and ``max``."""
    x = as_tracer(x)
    bounds = np.iinfo(x.dtype) if x.dtype.kind in "iu" else None
    # A plain number beyond the dtype bounds nothing.
    if min is not None and not (bounds and type(min) is int and min < bounds.min):
        x = elementwise("maximum", x, min)
    if max is not None and not (bounds and type(max) is int and max > bounds.max):
        x = elementwise("minimum", x, max)
    return x


def round(x: object, decimals: int = 0) -> Tracer:
    """Return the elements rounded to integers, halves to even ones."""
    if decimals:
        fail(f"rounding to {decimals} decimals is not part of kernels; scale, round and scale back")
    x = as_tracer(x)
    return elementwise("rint", x) if x.dtype.kind == "f" else x


def positive(x: object) -> Tracer:
    """Return the elements as they are."""
    return as_tracer(x)


def logaddexp(a: object, b: object) -> Tracer:
    """Return ``log(exp(a) + exp(b))`` without overflow."""
    apart = elementwise("subtract", a, b)
    # Of infinities of one sign the difference is none, and the sum as large.
    apart = elementwise("where", elementwise("equal", a, b), 0.0, apart)
    grown = elementwise("log1p", elementwise("exp", elementwise("negative", elementwise("absolute", apart))))
    return elementwise("add", elementwise("maximum", a, b), grown)


def diff(x: object, n: int = 1, axis: int = -1) -> Tracer:
    """Return how much each element along ``axis`` is above the one before, ``n`` times over."""
    x = as_tracer(x)
    (one,) = _chosen(axis, x.ndim)
    before = (slice(None),) * one
    for _ in range(n):
        op = "not_equal" if x.dtype == np.bool_ else "subtract"
        x = elementwise(op, index(x, (*before, slice(1, None))), index(x, (*before, slice(None, -1))))
    return x


def tril(x: object, k: int = 0) -> Tracer:
    """Return the matrices with zeros above diagonal ``k``."""
    return _triangle(as_tracer(x), "less_equal", k)


def triu(x: object, k: int = 0) -> Tracer:
    """Return the matrices with zeros below diagonal ``k``."""
    return _triangle(as_tracer(x), "greater_equal", k)


def _triangle(x: Tracer, op: str, k: int) -> Tracer:
    if x.ndim < 2:
        fail(f"triangles are of two dimensions at least, not of shape {x.shape}")
    builder = x._trace.builder
    rows, columns = (builder.add("iota", shape=x.shape[-2:], dtype="int64", axes=(axis,)) for axis in (0, 1))
    apart = elementwise("subtract", x._trace.value(columns), x._trace.value(rows))
    return elementwise("where", elementwise(op, apart, k), x, x._trace.value(builder.constant(0, x.dtype.name)))
