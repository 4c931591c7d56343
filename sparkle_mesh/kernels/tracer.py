"""The array that a kernel's function is given when it is traced: it has types, and no elements."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from sparkle_mesh import limits
from sparkle_mesh.kernels import functions, namespace, numpy_functions
from sparkle_mesh.kernels.operators import Operators
from sparkle_mesh.kernels.values import fail


class Tracer(Operators):
    """An array within a kernel: operators, methods, and NumPy's functions add operations to the kernel's graph.

    It has NumPy's semantics, but for what needs elements: ``if``, ``float()``, masks and indices that are traced, and
    assignment, which raise TraceError.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<traced {self.dtype}[{', '.join(map(str, self.shape))}] in kernel {self._trace.name!r}>"

    # --- As an array ------------------------------------------------------------------------------

    @property
    def T(self) -> Tracer:
        """With all axes reversed."""
        return functions.transpose(self)

    @property
    def mT(self) -> Tracer:
        """With the last two axes exchanged."""
        return functions.matrix_transpose(self)

    @property
    def real(self) -> Tracer:
        """Itself: kernels compute with real numbers."""
        return self

    @property
    def nbytes(self) -> int:
        """What the elements take in memory."""
        return self.size * self.dtype.itemsize

    @property
    def itemsize(self) -> int:
        """What one element takes in memory."""
        return self.dtype.itemsize

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of unsized object")
        return self.shape[0]

    def __iter__(self) -> Iterator[Tracer]:
        length = len(self)
        if length > limits.KERNEL_UNROLL_MAX_COUNT:
            fail(
                f"a loop over {length} elements would be as many operations, more than "
                f"{limits.KERNEL_UNROLL_MAX_COUNT}; compute with the whole array"
            )
        return iter([self[place] for place in range(length)])

    def __getitem__(self, key: Any) -> Tracer:
        return functions.index(self, key)

    def __setitem__(self, key: object, value: object) -> NoReturn:
        fail("x[…] = … changes an array in place, which kernels cannot; use np.where(mask, value, x) or np.concatenate")

    def __delitem__(self, key: object) -> NoReturn:
        fail("del x[…] changes an array in place, which kernels cannot; take slices and np.concatenate")

    def __array_namespace__(self, /, *, api_version: str | None = None) -> ModuleType:
        return namespace

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: object, **keywords: object) -> Any:
        return numpy_functions.apply_ufunc(ufunc, method, inputs, keywords)

    def __array_function__(self, function: Any, types: object, arguments: Any, keywords: dict[str, Any]) -> Any:
        return numpy_functions.apply_function(function, arguments, keywords)

    # --- What needs elements ----------------------------------------------------------------------

    def __array__(self, dtype: object = None, copy: object = None) -> NoReturn:
        fail(
            "a traced array has no elements yet, so NumPy cannot have it as an array (np.asarray, np.array, assignment "
            "into one, or a function that kernels do not know); compute with it as it is, np.stack joins several"
        )

    def __bool__(self) -> NoReturn:
        fail(
            "whether a traced array is true is not known until the kernel runs (if, while, and, or, not, in, assert); "
            "use np.where(condition, a, b), np.logical_and and their like, or pass the argument as static"
        )

    def _number_at_tracing(self, what: str) -> NoReturn:
        fail(
            f"{what} of a traced array is not known until the kernel runs; compute with it as it is (astype converts), "
            f"or pass the argument as static"
        )

    def __float__(self) -> NoReturn:
        self._number_at_tracing("float()")

    def __int__(self) -> NoReturn:
        self._number_at_tracing("int()")

    def __complex__(self) -> NoReturn:
        self._number_at_tracing("complex()")

    def __index__(self) -> NoReturn:
        self._number_at_tracing("an index or a count (range, a slice's end, a shape)")

    def __contains__(self, value: object) -> NoReturn:
        self._number_at_tracing("in")

    def item(self) -> NoReturn:
        """Raise TraceError: there are no elements yet."""
        self._number_at_tracing("item()")

    def tolist(self) -> NoReturn:
        """Raise TraceError: there are no elements yet."""
        self._number_at_tracing("tolist()")

    # --- Methods ----------------------------------------------------------------------------------

    def astype(self, dtype: npt.DTypeLike, copy: bool = True) -> Tracer:
        """Return the elements converted to ``dtype``."""
        return functions.astype(self, dtype)

    def copy(self) -> Tracer:
        """Return itself: nothing changes traced arrays."""
        return self

    def reshape(self, *shape: Any) -> Tracer:
        """Return the elements in another shape; one length may be -1."""
        return functions.reshape(self, shape[0] if len(shape) == 1 else shape)

    def ravel(self) -> Tracer:
        """Return all elements along one axis."""
        return functions.reshape(self, (-1,))

    flatten = ravel

    def transpose(self, *axes: Any) -> Tracer:
        """Return the array with its axes in another order, reversed by default."""
        chosen = axes[0] if len(axes) == 1 and not isinstance(axes[0], int) else axes or None
        return functions.transpose(self, chosen)

    def swapaxes(self, axis1: int, axis2: int) -> Tracer:
        """Return the array with two axes exchanged."""
        return functions.swapaxes(self, axis1, axis2)

    def squeeze(self, axis: Any = None) -> Tracer:
        """Return the array without axes of length 1."""
        return functions.squeeze(self, axis)

    def dot(self, other: object) -> Tracer:
        """Return the product, as ``numpy.dot`` of at most two dimensions."""
        return functions.dot(self, other)

    def sum(self, axis: Any = None, dtype: npt.DTypeLike | None = None, *, keepdims: bool = False) -> Tracer:
        """Return the sum over ``axis``."""
        return functions.sum(self, axis, dtype, keepdims=keepdims)

    def prod(self, axis: Any = None, dtype: npt.DTypeLike | None = None, *, keepdims: bool = False) -> Tracer:
        """Return the product over ``axis``."""
        return functions.prod(self, axis, dtype, keepdims=keepdims)

    def max(self, axis: Any = None, *, keepdims: bool = False) -> Tracer:
        """Return the greatest element along ``axis``."""
        return functions.max(self, axis, keepdims=keepdims)

    def min(self, axis: Any = None, *, keepdims: bool = False) -> Tracer:
        """Return the least element along ``axis``."""
        return functions.min(self, axis, keepdims=keepdims)

    def any(self, axis: Any = None, *, keepdims: bool = False) -> Tracer:
        """Return whether any element along ``axis`` is true."""
        return functions.any(self, axis, keepdims=keepdims)

    def all(self, axis: Any = None, *, keepdims: bool = False) -> Tracer:
        """Return whether all elements along ``axis`` are true."""
        return functions.all(self, axis, keepdims=keepdims)

    def mean(self, axis: Any = None, dtype: npt.DTypeLike | None = None, *, keepdims: bool = False) -> Tracer:
        """Return the mean over ``axis``."""
        return functions.mean(self, axis, dtype, keepdims=keepdims)

    def var(self, axis: Any = None, *, ddof: float = 0, keepdims: bool = False) -> Tracer:
        """Return the variance over ``axis``."""
        return functions.var(self, axis, ddof=ddof, keepdims=keepdims)

    def std(self, axis: Any = None, *, ddof: float = 0, keepdims: bool = False) -> Tracer:
        """Return the standard deviation over ``axis``."""
        return functions.std(self, axis, ddof=ddof, keepdims=keepdims)

    def clip(self, min: object = None, max: object = None) -> Tracer:
        """Return the elements within ``min`` and ``max``."""
        return functions.clip(self, min, max)

    def round(self, decimals: int = 0) -> Tracer:
        """Return the elements rounded to integers, halves to even ones."""
        return functions.round(self, decimals)
