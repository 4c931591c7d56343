"""What a kernel's function computes with while it is traced: values that stand for nodes of a graph being built.

Plain Python numbers are weak: they take the dtype of what they are combined with. So are those that a kernel is called
with; they are inputs nevertheless, so that a new learning rate is no new trace.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from sparkle_mesh.errors import KernelError, TraceError
from sparkle_mesh.kernels.graph import GraphBuilder, WeakScalar, weak_dtype
from sparkle_mesh.kernels.ops import FLOATS, Shape, TensorType, as_dtype, python_scalar, scalar_fits

if TYPE_CHECKING:
    from sparkle_mesh.kernels.tracer import Tracer

# Operations whose result with Python's numbers is a bool, or stays one.
_COMPARISONS = frozenset({"equal", "not_equal", "less", "less_equal", "greater", "greater_equal"})
# Those with a result of bool that plain integers of any size take part in.
_ROOMY = _COMPARISONS | {"logical_and", "logical_or", "logical_xor"}
_LOGICAL = _COMPARISONS | {
    "logical_not",
    "logical_and",
    "logical_or",
    "logical_xor",
    "bitwise_and",
    "bitwise_or",
    "bitwise_xor",
}


class Trace:
    """A kernel's function while it runs to be traced.

    Parameters
    ----------
    name
        The kernel's, for messages.
    inputs
        The types of its operands.
    make
        Returns a tracer for a node.
    """

    def __init__(
        self, name: str, inputs: Sequence[TensorType], make: Callable[[Trace, int, bool], Tracer] | None = None
    ) -> None:
        self.name = name
        self.builder = GraphBuilder(inputs)
        self.is_open = True
        # Weak inputs that were converted by the user, and keep their type for it.
        self.pinned: set[int] = set()
        self._make = make

    def value(self, number: int, *, weak: bool = False) -> Tracer:
        """Return a tracer for node ``number``."""
        assert self._make is not None
        return self._make(self, number, weak)


class Value:
    """A node of a trace; the base of :class:`.tracer.Tracer`."""

    __slots__ = ("_number", "_trace", "_weak")

    def __init__(self, trace: Trace, number: int, weak: bool = False) -> None:
        self._trace = trace
        self._number = number
        self._weak = weak

    @property
    def shape(self) -> Shape:
        """The lengths of all axes."""
        return self._trace.builder.type_of(self._number).shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype, as NumPy's."""
        return np.dtype(self._trace.builder.type_of(self._number).dtype)

    @property
    def ndim(self) -> int:
        """How many axes there are."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many elements there are."""
        return self._trace.builder.type_of(self._number).size


# --- Where an error is ------------------------------------------------------------------------


def _is_ours(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).split(".")[0] in ("sparkle_mesh", "numpy")


def fail(reason: str) -> NoReturn:
    """Raise TraceError for the line of the user's code that is being run."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_ours(frame):
        frame = frame.f_back
    place = "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}: "
    raise TraceError(f"{place}{reason}")


def located(error: KernelError, place: str) -> TraceError:
    """Return ``error`` with the innermost line of the user's code that it came through, or else ``place``."""
    step: TracebackType | None = error.__traceback__
    while step is not None:
        if not _is_ours(step.tb_frame):
            place = f"{step.tb_frame.f_code.co_filename}:{step.tb_lineno}: "
        step = step.tb_next
    return TraceError(f"{place}{error}")


# --- The current trace ------------------------------------------------------------------------

_CURRENT: ContextVar[Trace | None] = ContextVar("sparkle_trace", default=None)


@contextmanager
def tracing(trace: Trace) -> Iterator[None]:
    """Have values without operands (``zeros``, ``arange``) belong to ``trace`` within the block; then it is over."""
    token = _CURRENT.set(trace)
    try:
        yield
    finally:
        _CURRENT.reset(token)
        trace.is_open = False


def is_tracing() -> bool:
    """Whether a kernel is being traced in this thread."""
    return _CURRENT.get() is not None


def current_trace() -> Trace:
    """Return the trace that is being made; raises TraceError if there is none."""
    trace = _CURRENT.get()
    if trace is None:
        fail("no kernel is being traced here; use NumPy's function of that name outside of kernels")
    return trace


def owner(values: Sequence[object]) -> Trace:
    """Return the trace that ``values`` belong to: the current one, which none may be foreign to."""
    current = _CURRENT.get()
    for value in values:
        if isinstance(value, Value) and (value._trace is not current or not value._trace.is_open):
            fail(
                f"a value of the trace of kernel {value._trace.name!r} is used outside of it; "
                f"pass it to this kernel as an argument, or return it from that one"
            )
    return current if current is not None else current_trace()


# --- Operands ---------------------------------------------------------------------------------


def as_operand(trace: Trace, value: object) -> int | WeakScalar:
    """Return ``value`` as an operand of a builder's: a node's number, or a plain number."""
    if isinstance(value, Value):
        return value._number
    if isinstance(value, (int, float)) and not isinstance(value, np.generic):
        # Members of enumerations are numbers, too.
        kind = bool if isinstance(value, bool) else int if isinstance(value, int) else float
        return WeakScalar(kind(value))
    if isinstance(value, (np.generic, np.ndarray)):
        array = np.asarray(value)
        if array.shape:
            fail(
                f"a NumPy array of shape {array.shape} is not part of a kernel; pass it as an argument, or make it "
                f"within with the functions of x.__array_namespace__() (zeros, ones, full, arange, eye)"
            )
        number = python_scalar(array[()])
        if number is None:
            fail(f"{value!r} is {array.dtype}, which kernels do not compute with; convert it to a float or integer")
        return trace.builder.constant(number, as_dtype(array.dtype))
    if isinstance(value, complex):
        fail(f"{value!r} is complex; kernels compute with real numbers: trace real and imaginary parts apart")
    fail(f"{type(value).__name__} is not an operand of kernels; pass arrays as arguments, and numbers as they are")


def as_number(trace: Trace, value: object) -> int:
    """Return the number of a node that is ``value``; a plain number is bool, int64 or float64 there."""
    operand = as_operand(trace, value)
    return operand if isinstance(operand, int) else trace.builder.constant(operand.value)


def as_tracer(value: object) -> Tracer:
    """Return ``value`` as one that is traced."""
    trace = owner((value,))
    if isinstance(value, Value):
        return trace.value(value._number, weak=value._weak)
    return trace.value(as_number(trace, value))


def typed_operands(trace: Trace, values: Sequence[object]) -> list[int | WeakScalar]:
    """Return operands for one operation, with weak values in the dtype that they take beside the others."""
    operands = [as_operand(trace, value) for value in values]
    weak = [isinstance(value, Value) and value._weak for value in values]
    builder = trace.builder
    numbers = [(one, is_weak) for one, is_weak in zip(operands, weak, strict=True) if isinstance(one, int)]
    strong = [builder.type_of(one).dtype for one, is_weak in numbers if not is_weak]
    if not strong:
        return operands
    found: list[int | WeakScalar] = []
    for operand, is_weak in zip(operands, weak, strict=True):
        if isinstance(operand, int) and is_weak:
            operand = builder.cast(operand, weak_dtype(weak_kind(builder.type_of(operand).dtype), strong))
        found.append(operand)
    return found


def weak_kind(dtype: str) -> str:
    """Return the kind of plain number that has ``dtype`` in a graph."""
    return {"bool": "bool", "int64": "int"}.get(dtype, "float")


def elementwise(op: str, *values: object) -> Tracer:
    """Apply a ufunc as NumPy does: the result is strong."""
    trace = owner(values)
    if op == "where":
        condition, *rest = values
        operands = [*typed_operands(trace, [condition]), *typed_operands(trace, rest)]
    else:
        operands = typed_operands(trace, values)
    if op in _ROOMY:
        operands = _with_room(trace, operands)
    return trace.value(trace.builder.elementwise(op, *operands))


def _with_room(trace: Trace, operands: list[int | WeakScalar]) -> list[int | WeakScalar]:
    """Return operands so that a plain integer beyond the other's dtype is compared with it nevertheless."""
    builder = trace.builder
    for place, one in enumerate(operands):
        other = operands[1 - place]
        if isinstance(one, WeakScalar) and isinstance(other, int) and isinstance(one.value, int):
            dtype = builder.type_of(other).dtype
            if dtype not in ("bool", *FLOATS) and not scalar_fits(int(one.value), dtype) and dtype != "uint64":
                operands[1 - place] = builder.cast(other, "int64")
    return operands


def operate(op: str, *values: object) -> Tracer:
    """Apply an operator as Python does: of plain numbers alone the result is one, too."""
    trace = owner(values)
    if not all(value._weak if isinstance(value, Value) else type(value) in (bool, int, float) for value in values):
        return elementwise(op, *values)
    numbers = [as_number(trace, value) for value in values]
    if op not in _LOGICAL:
        # True + True is 2 with Python's.
        builder = trace.builder
        numbers = [builder.cast(one, "int64") if builder.type_of(one).dtype == "bool" else one for one in numbers]
    return trace.value(trace.builder.elementwise(op, *numbers), weak=True)
