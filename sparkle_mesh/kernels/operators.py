"""Python's operators on what is traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from sparkle_mesh.kernels import functions
from sparkle_mesh.kernels.values import Value, fail, operate

if TYPE_CHECKING:
    from sparkle_mesh.kernels.tracer import Tracer

_Binary: TypeAlias = Callable[[Value, object], "Tracer"]


def _straight(op: str) -> _Binary:
    return lambda self, other: operate(op, self, other)


def _operators(op: str) -> tuple[_Binary, _Binary, _Binary]:
    """Return an operator as it is, reflected, and in place."""
    return (
        _straight(op),
        lambda self, other: operate(op, other, self),
        lambda self, other: _assigned(self, operate(op, self, other), op),
    )


def _assigned(old: Value, new: Tracer, op: str) -> Tracer:
    """Return what ``old`` is after ``x += …``: another value, of the shape and dtype that NumPy's array would keep."""
    if old._weak:
        return new
    if new.shape != old.shape:
        fail(f"x of shape {old.shape} cannot hold the result of {op}, of shape {new.shape}; write x = x + … instead")
    if not np.can_cast(new.dtype, old.dtype, "same_kind"):
        fail(f"x of {old.dtype} cannot hold the result of {op}, which is {new.dtype}; write x = x + …, or use astype")
    return functions.astype(new, old.dtype)


def _power(self: Value, other: object) -> Tracer:
    # As NumPy: what is cheaper than a power is not computed as one.
    if isinstance(other, (int, float)) and (self.dtype.kind == "f" or (other == 2 and isinstance(other, int))):
        cheaper = {2.0: "square", 0.5: "sqrt", -1.0: "reciprocal"}.get(float(other))
        if cheaper is not None:
            return operate(cheaper, self)
    return operate("power", self, other)


class Operators(Value):
    """All of Python's operators that arrays have."""

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]

    __add__, __radd__, __iadd__ = _operators("add")
    __sub__, __rsub__, __isub__ = _operators("subtract")
    __mul__, __rmul__, __imul__ = _operators("multiply")
    __truediv__, __rtruediv__, __itruediv__ = _operators("divide")
    __floordiv__, __rfloordiv__, __ifloordiv__ = _operators("floor_divide")
    __mod__, __rmod__, __imod__ = _operators("remainder")
    __and__, __rand__, __iand__ = _operators("bitwise_and")
    __or__, __ror__, __ior__ = _operators("bitwise_or")
    __xor__, __rxor__, __ixor__ = _operators("bitwise_xor")
    __lshift__, __rlshift__, __ilshift__ = _operators("left_shift")
    __rshift__, __rrshift__, __irshift__ = _operators("right_shift")
    __lt__ = _straight("less")
    __le__ = _straight("less_equal")
    __gt__ = _straight("greater")
    __ge__ = _straight("greater_equal")
    __eq__ = _straight("equal")  # type: ignore[assignment]
    __ne__ = _straight("not_equal")  # type: ignore[assignment]

    def __pow__(self, other: object) -> Tracer:
        return _power(self, other)

    def __rpow__(self, other: object) -> Tracer:
        return operate("power", other, self)

    def __ipow__(self, other: object) -> Tracer:
        return _assigned(self, _power(self, other), "power")

    def __matmul__(self, other: object) -> Tracer:
        return functions.matmul(self, other)

    def __rmatmul__(self, other: object) -> Tracer:
        return functions.matmul(other, self)

    def __imatmul__(self, other: object) -> Tracer:
        return _assigned(self, functions.matmul(self, other), "matmul")

    def __divmod__(self, other: object) -> tuple[Tracer, Tracer]:
        return operate("floor_divide", self, other), operate("remainder", self, other)

    def __rdivmod__(self, other: object) -> tuple[Tracer, Tracer]:
        return operate("floor_divide", other, self), operate("remainder", other, self)

    def __pos__(self) -> Tracer:
        # Python's +True is 1.
        is_number = self._weak and self.dtype == np.bool_
        number = self._trace.builder.cast(self._number, "int64") if is_number else self._number
        return self._trace.value(number, weak=self._weak)

    def __neg__(self) -> Tracer:
        return operate("negative", self)

    def __abs__(self) -> Tracer:
        return operate("absolute", self)

    def __invert__(self) -> Tracer:
        return operate("invert", self)
