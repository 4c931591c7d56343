"""The Array API of kernels: what ``x.__array_namespace__()`` is of an array that is traced.

Names and semantics follow the standard of 2024.12 where they do not need elements; dtypes are NumPy's.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from math import e, inf, nan, pi
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from numpy import (
    bool_ as bool,
)
from numpy import (
    finfo,
    float16,
    float32,
    float64,
    iinfo,
    int8,
    int16,
    int32,
    int64,
    newaxis,
    uint8,
    uint16,
    uint32,
    uint64,
)

from sparkle_mesh.kernels import functions
from sparkle_mesh.kernels.creation import (
    arange,
    asarray,
    eye,
    full,
    full_like,
    linspace,
    ones,
    ones_like,
    zeros,
    zeros_like,
)
from sparkle_mesh.kernels.functions import (
    all,
    any,
    astype,
    broadcast_arrays,
    broadcast_to,
    clip,
    diff,
    expand_dims,
    flip,
    logaddexp,
    matmul,
    matrix_transpose,
    max,
    mean,
    min,
    moveaxis,
    positive,
    prod,
    repeat,
    reshape,
    roll,
    round,
    squeeze,
    stack,
    sum,
    tile,
    tril,
    triu,
    unstack,
    vecdot,
)
from sparkle_mesh.kernels.functions import concatenate as concat
from sparkle_mesh.kernels.functions import transpose as permute_dims
from sparkle_mesh.kernels.ops import OPS
from sparkle_mesh.kernels.values import Value, elementwise, fail

if TYPE_CHECKING:
    from sparkle_mesh.kernels.tracer import Tracer

__all__ = [
    "all",
    "any",
    "arange",
    "asarray",
    "astype",
    "bool",
    "broadcast_arrays",
    "broadcast_to",
    "can_cast",
    "clip",
    "concat",
    "conj",
    "diff",
    "e",
    "expand_dims",
    "eye",
    "finfo",
    "flip",
    "float16",
    "float32",
    "float64",
    "full",
    "full_like",
    "iinfo",
    "inf",
    "int8",
    "int16",
    "int32",
    "int64",
    "isdtype",
    "linspace",
    "logaddexp",
    "matmul",
    "matrix_transpose",
    "max",
    "mean",
    "min",
    "moveaxis",
    "nan",
    "newaxis",
    "ones",
    "ones_like",
    "permute_dims",
    "pi",
    "positive",
    "prod",
    "real",
    "repeat",
    "reshape",
    "result_type",
    "roll",
    "round",
    "squeeze",
    "stack",
    "std",
    "sum",
    "tile",
    "tril",
    "triu",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "unstack",
    "var",
    "vecdot",
    "zeros",
    "zeros_like",
]
__array_api_version__ = "2024.12"

# The standard's names for NumPy's operations, where they differ.
_RENAMED = {
    "abs": "absolute",
    "acos": "arccos",
    "acosh": "arccosh",
    "asin": "arcsin",
    "asinh": "arcsinh",
    "atan": "arctan",
    "atan2": "arctan2",
    "atanh": "arctanh",
    "bitwise_invert": "invert",
    "bitwise_left_shift": "left_shift",
    "bitwise_right_shift": "right_shift",
    "pow": "power",
}
_REFUSED = {
    "argmax",
    "argmin",
    "argsort",
    "sort",
    "searchsorted",
    "nonzero",
    "count_nonzero",
    "take",
    "take_along_axis",
}
_REFUSED |= {"unique_all", "unique_counts", "unique_inverse", "unique_values", "isin", "cumulative_sum"}
_REFUSED |= {"cumulative_prod", "meshgrid", "tensordot", "nextafter", "imag", "from_dlpack", "empty", "empty_like"}
_REFUSED |= {"complex64", "complex128", "linalg", "fft"}
_KINDS = {"bool": "b", "signed integer": "i", "unsigned integer": "u", "integral": "iu", "real floating": "f"}
_KINDS |= {"complex floating": "", "numeric": "iuf"}


def _named(op: str) -> Callable[..., Tracer]:
    def function(*operands: object) -> Tracer:
        return elementwise(op, *operands)

    function.__name__ = function.__qualname__ = op
    function.__doc__ = f"Return ``numpy.{op}`` of arrays that are traced."
    return function


# NumPy's own names are here as well; those that differ mislead nobody.
_ELEMENTWISE = {
    name: _named(name) for name, op in OPS.items() if op.kind == "elementwise" and (op.ufunc or name == "where")
}
_ELEMENTWISE |= {name: _named(op) for name, op in _RENAMED.items()}
conj = real = positive


def __getattr__(name: str) -> Any:
    if name in _ELEMENTWISE:
        return _ELEMENTWISE[name]
    if name in _REFUSED:
        fail(f"{name} of the Array API is not part of kernels; write it with what is, or apply it outside")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_ELEMENTWISE})


def std(x: object, axis: Any = None, *, correction: float = 0, keepdims: builtins.bool = False) -> Tracer:
    """Return the standard deviation over ``axis``."""
    return functions.std(x, axis, ddof=correction, keepdims=keepdims)


def var(x: object, axis: Any = None, *, correction: float = 0, keepdims: builtins.bool = False) -> Tracer:
    """Return the variance over ``axis``."""
    return functions.var(x, axis, ddof=correction, keepdims=keepdims)


def isdtype(dtype: npt.DTypeLike, kind: Any) -> builtins.bool:
    """Return whether ``dtype`` is of a kind of the standard's ("real floating", say), is one, or is any of several."""
    if isinstance(kind, tuple):
        return builtins.any(isdtype(dtype, one) for one in kind)
    if isinstance(kind, str):
        if kind not in _KINDS:
            fail(f"{kind!r} is no kind of dtypes; they are {', '.join(_KINDS)}")
        return np.dtype(dtype).kind in _KINDS[kind]
    return builtins.bool(np.dtype(dtype) == np.dtype(kind))


def result_type(*operands: Any) -> np.dtype[Any]:
    """Return the dtype that operations with ``operands``, arrays, dtypes and numbers, are computed in."""
    return np.result_type(*(one.dtype if isinstance(one, Value) else one for one in operands))


def can_cast(source: Any, target: npt.DTypeLike) -> builtins.bool:
    """Return whether every value of ``source``, an array or a dtype, is one of ``target``."""
    return np.can_cast(source.dtype if isinstance(source, Value) else source, target)
