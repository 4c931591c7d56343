"""NumPy's own functions on what is traced: which of them kernels have, and what is said of the others."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sparkle_mesh.kernels import creation, functions
from sparkle_mesh.kernels.ops import OPS
from sparkle_mesh.kernels.values import Value, as_tracer, elementwise, fail

if TYPE_CHECKING:
    from sparkle_mesh.kernels.tracer import Tracer

_UFUNCS: dict[np.ufunc, str] = {
    op.ufunc: op.name for op in OPS.values() if op.ufunc is not None and op.kind == "elementwise"
}
# Those that are made of others.
_COMPOSED: dict[np.ufunc, Callable[..., Tracer]] = {
    np.matmul: functions.matmul,
    np.positive: functions.positive,
    np.conjugate: functions.positive,
    np.logaddexp: functions.logaddexp,
}
if hasattr(np, "vecdot"):
    _COMPOSED[np.vecdot] = functions.vecdot
_REDUCTIONS: dict[np.ufunc, Callable[..., Tracer]] = {
    np.add: functions.sum,
    np.multiply: functions.prod,
    np.maximum: functions.max,
    np.minimum: functions.min,
}


def apply_ufunc(ufunc: np.ufunc, method: str, inputs: Sequence[object], keywords: Mapping[str, object]) -> Any:
    """Return what ``numpy.<ufunc>`` of traced operands is."""
    if keywords.get("out") is not None:
        fail(
            f"numpy.{ufunc.__name__} into an array that is there (out=, or a NumPy array with += and its like) changes "
            f"it in place, which kernels cannot; use the result"
        )
    if method == "reduce" and ufunc in _REDUCTIONS:
        return _checked(_REDUCTIONS[ufunc], f"{ufunc.__name__}.reduce", inputs, {"axis": 0, **keywords})
    if method != "__call__" or (ufunc not in _UFUNCS and ufunc not in _COMPOSED):
        name = ufunc.__name__ if method == "__call__" else f"{ufunc.__name__}.{method}"
        fail(f"numpy.{name} is not part of kernels; write it with what is, or apply it outside of the kernel")
    if ufunc in _COMPOSED:
        return _checked(_COMPOSED[ufunc], ufunc.__name__, inputs, keywords)
    if keywords:
        fail(f"numpy.{ufunc.__name__}({next(iter(keywords))}=…) is not part of kernels; use astype, or np.where")
    return elementwise(_UFUNCS[ufunc], *inputs)


def apply_function(function: Callable[..., Any], arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
    """Return what ``function``, one of NumPy's that is no ufunc, is of traced arguments."""
    name = f"{function.__module__}.{function.__name__}".removeprefix("numpy.")
    known = _FUNCTIONS.get(function)
    if known is None:
        fail(f"numpy.{name} is not part of kernels; write it with what is, or apply it outside of the kernel")
    return _checked(known, name, arguments, keywords)


def _checked(known: Callable[..., Any], name: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
    """Call ``known``; say what it takes if these arguments are not of those."""
    signature = inspect.signature(known)
    try:
        signature.bind(*arguments, **keywords)
    except TypeError as error:
        takes = ", ".join(signature.parameters)
        fail(f"numpy.{name}: {error}; kernels have it with {takes}")
    return known(*arguments, **keywords)


# --- Those whose arguments are called otherwise than in the Array API ----------------------------


def _where(condition: object, *branches: object) -> Tracer:
    if len(branches) != 2:
        fail("numpy.where without two branches finds places, whose count is not known until the kernel runs")
    return elementwise("where", condition, *branches)


def _clip(x: object, a_min: object = None, a_max: object = None, *, min: object = None, max: object = None) -> Tracer:
    return functions.clip(x, min if a_min is None else a_min, max if a_max is None else a_max)


def _size(x: object, axis: int | None = None) -> int:
    traced = as_tracer(x)
    return traced.size if axis is None else traced.shape[axis]


def _result_type(*operands: Any) -> np.dtype[Any]:
    return np.result_type(*(one.dtype if isinstance(one, Value) else one for one in operands))


def _joined(axis: int, rank: int) -> Callable[[Sequence[object]], Tracer]:
    def join(tup: Sequence[object]) -> Tracer:
        arrays = [as_tracer(array) for array in tup]
        if rank == 2:
            arrays = [array if array.ndim > 1 else functions.reshape(array, (1, -1)) for array in arrays]
            return functions.concatenate(arrays, axis)
        arrays = [array if array.ndim else functions.reshape(array, (1,)) for array in arrays]
        return functions.concatenate(arrays, axis if arrays and arrays[0].ndim > 1 else 0)

    return join


# By their names, because not every version of NumPy has them all.
_BY_NAME: dict[str, Callable[..., Any]] = {
    **{name: getattr(functions, name) for name in ("sum", "prod", "max", "min", "any", "all", "mean", "var", "std")},
    **{name: getattr(functions, name) for name in ("reshape", "transpose", "swapaxes", "moveaxis", "squeeze", "stack")},
    **{name: getattr(functions, name) for name in ("expand_dims", "broadcast_to", "concatenate", "flip", "roll")},
    **{name: getattr(functions, name) for name in ("repeat", "tile", "dot", "outer", "round", "diff", "tril", "triu")},
    **{name: getattr(functions, name) for name in ("astype", "matrix_transpose", "unstack", "broadcast_arrays")},
    **{name: getattr(creation, name) for name in ("zeros_like", "ones_like", "full_like")},
    "amax": functions.max,
    "amin": functions.min,
    "around": functions.round,
    "linalg.norm": functions.norm,
    "empty_like": creation.zeros_like,
    "ravel": lambda x: functions.reshape(x, (-1,)),
    "copy": functions.positive,
    "real": functions.positive,
    "vstack": _joined(0, 2),
    "hstack": _joined(1, 1),
    "where": _where,
    "clip": _clip,
    "shape": lambda x: as_tracer(x).shape,
    "ndim": lambda x: as_tracer(x).ndim,
    "size": _size,
    "result_type": _result_type,
    "iscomplexobj": lambda x: False,
    "isrealobj": lambda x: True,
}


def _find(name: str) -> Any:
    found: Any = np
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    _find(name): known for name, known in _BY_NAME.items() if _find(name) is not None
}
