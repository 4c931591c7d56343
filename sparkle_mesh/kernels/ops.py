"""What a kernel can be made of: every operation, its kind, and the type of its result.

A graph has no implicit conversions. The operands of an elementwise operation are all of the result's shape, and of the
dtypes that NumPy's ufunc of that name computes with; whoever builds a graph puts ``cast`` and ``broadcast`` where they
are needed (:mod:`.graph`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from sparkle_mesh import limits
from sparkle_mesh.errors import KernelError

Kind: TypeAlias = Literal["source", "elementwise", "reduction", "matmul", "movement"]
Shape: TypeAlias = tuple[int, ...]
Scalar: TypeAlias = bool | int | float

#: The dtypes of kernels, by NumPy's names.
DTYPES: tuple[str, ...] = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
DTYPES += ("float16", "float32", "float64")
FLOATS = frozenset({"float16", "float32", "float64"})


@dataclass(frozen=True, slots=True)
class Op:
    """One operation.

    Attributes
    ----------
    name
        NumPy's name of it, where there is one.
    kind
        ``"source"`` has no operands; ``"elementwise"`` maps elements; ``"reduction"`` drops axes; ``"movement"`` puts
        elements elsewhere.
    arity
        Operands; None for any number of them, one at least.
    flops
        What one element of the result counts for (of the operand for reductions; ``matmul`` is counted otherwise).
    ufunc
        NumPy's, for elementwise operations and reductions.
    """

    name: str
    kind: Kind
    arity: int | None
    flops: int = 0
    ufunc: np.ufunc | None = None


# What transcendental functions count for: about what they take on processors, with an addition as one.
_UNARY: dict[str, int] = {
    **dict.fromkeys(("negative", "absolute", "sign", "floor", "ceil", "rint", "trunc", "square"), 1),
    **dict.fromkeys(("logical_not", "invert", "isnan", "isinf", "isfinite", "signbit"), 1),
    **dict.fromkeys(("sqrt", "reciprocal"), 4),
    **dict.fromkeys(("exp", "exp2", "expm1", "log", "log1p", "log2", "log10"), 10),
    **dict.fromkeys(("sin", "cos", "tan", "arcsin", "arccos", "arctan"), 15),
    **dict.fromkeys(("sinh", "cosh", "tanh", "arcsinh", "arccosh", "arctanh"), 15),
}
_BINARY: dict[str, int] = {
    **dict.fromkeys(("add", "subtract", "multiply", "maximum", "minimum"), 1),
    **dict.fromkeys(("equal", "not_equal", "less", "less_equal", "greater", "greater_equal"), 1),
    **dict.fromkeys(("logical_and", "logical_or", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor"), 1),
    **dict.fromkeys(("left_shift", "right_shift", "copysign"), 1),
    **dict.fromkeys(("divide", "floor_divide", "remainder", "hypot"), 4),
    **dict.fromkeys(("power", "arctan2"), 20),
}
_REDUCTIONS = {"sum": np.add, "prod": np.multiply, "max": np.maximum, "min": np.minimum}

OPS: dict[str, Op] = {
    **{name: Op(name, "source", 0) for name in ("input", "constant", "iota")},
    **{name: Op(name, "elementwise", 1, flops, getattr(np, name)) for name, flops in _UNARY.items()},
    **{name: Op(name, "elementwise", 2, flops, getattr(np, name)) for name, flops in _BINARY.items()},
    "cast": Op("cast", "elementwise", 1, 1),
    "where": Op("where", "elementwise", 3, 1),
    **{name: Op(name, "reduction", 1, 1, ufunc) for name, ufunc in _REDUCTIONS.items()},
    "matmul": Op("matmul", "matmul", 2),
    **{name: Op(name, "movement", 1) for name in ("reshape", "transpose", "broadcast", "slice", "place")},
    "concatenate": Op("concatenate", "movement", None),
}


@dataclass(frozen=True, slots=True)
class TensorType:
    """The shape and dtype of a value."""

    shape: Shape
    dtype: str

    @property
    def size(self) -> int:
        """How many elements there are."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """What they take in memory."""
        return self.size * np.dtype(self.dtype).itemsize

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


def check_type(tensor: TensorType) -> None:
    """Raise KernelError unless there are such values."""
    if tensor.dtype not in DTYPES:
        raise KernelError(f"dtype {tensor.dtype!r} is not one of {', '.join(DTYPES)}")
    if len(tensor.shape) > limits.KERNEL_RANK_MAX_COUNT:
        raise KernelError(f"shape {tensor.shape} has more than {limits.KERNEL_RANK_MAX_COUNT} dimensions")
    if any(length < 0 for length in tensor.shape):
        raise KernelError(f"shape {tensor.shape} has a negative length")
    # Lengths of zero hide others that could overflow in strides.
    if prod(max(length, 1) for length in tensor.shape) > limits.KERNEL_ELEMENTS_MAX_COUNT:
        raise KernelError(f"shape {tensor.shape} has more than {limits.KERNEL_ELEMENTS_MAX_COUNT} elements")


@cache
def loop_dtypes(name: str, dtypes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the dtypes that NumPy's ufunc ``name`` converts ``dtypes`` to, then that of the result.

    Raises
    ------
    KernelError
        If there is no such loop.
    """
    op = OPS[name]
    if op.ufunc is None:
        raise KernelError(f"{name} converts nothing")
    try:
        resolved = op.ufunc.resolve_dtypes((*map(np.dtype, dtypes), None))
    except TypeError as error:
        raise KernelError(f"{name} does not take {', '.join(dtypes)}; cast the operands") from error
    names = tuple(dtype.name for dtype in resolved)
    if not set(names) <= set(DTYPES):
        raise KernelError(f"{name} of {', '.join(dtypes)} is {names[-1]}, which kernels do not compute with")
    return names


def scalar_fits(value: object, dtype: str) -> bool:
    """Whether ``value`` is a number of ``dtype``: bools for bool, integers within its range, any float for floats."""
    if dtype == "bool":
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False
    if dtype in FLOATS:
        return isinstance(value, (int, float)) and (not isinstance(value, int) or abs(value) <= 2**63)
    bounds = np.iinfo(dtype)
    return isinstance(value, int) and int(bounds.min) <= value <= int(bounds.max)


def element_strides(shape: Shape) -> Shape:
    """Return by how many elements one step along each axis of a dense array goes on."""
    strides: list[int] = []
    stride = 1
    for length in reversed(shape):
        strides.append(stride)
        stride *= length
    return tuple(reversed(strides))


def python_scalar(value: object) -> Scalar | None:
    """Return ``value`` as a Python number if it is one, or NumPy's; None otherwise."""
    if isinstance(value, np.generic):
        value = value.item()
    return value if isinstance(value, (bool, int, float)) else None


def as_dtype(dtype: npt.DTypeLike) -> str:
    """Return the name of ``dtype``; raises KernelError if kernels do not compute with it."""
    try:
        name = np.dtype(dtype).name
    except TypeError as error:
        raise KernelError(f"{dtype!r} is no dtype") from error
    if name not in DTYPES:
        raise KernelError(f"dtype {name} is not one of {', '.join(DTYPES)}")
    return name


def infer(name: str, operands: Sequence[TensorType], attributes: Any) -> TensorType:
    """Return the type of an operation's result.

    Parameters
    ----------
    attributes
        Has ``shape``, ``dtype``, ``axes``, ``starts``, ``steps`` and ``value`` as in :class:`.graph.Node`; the shape
        and dtype are taken where the operation leaves them open (sources, ``cast``, ``reshape``, …).

    Raises
    ------
    KernelError
        If the operation cannot be done so.
    """
    op = OPS.get(name)
    if op is None:
        raise KernelError(f"there is no operation {name!r}")
    if op.arity is not None and len(operands) != op.arity:
        raise KernelError(f"{name} takes {op.arity} operands, not {len(operands)}")
    if op.arity is None and not operands:
        raise KernelError(f"{name} takes one operand at least")
    result = _RULES[op.kind](op, operands, attributes)
    check_type(result)
    return result


def _infer_source(op: Op, operands: Sequence[TensorType], attributes: Any) -> TensorType:
    result = TensorType(attributes.shape, attributes.dtype)
    check_type(result)
    if op.name == "constant":
        if result.shape:
            raise KernelError(f"a constant is one number, not of shape {result.shape}")
        if not scalar_fits(attributes.value, result.dtype):
            raise KernelError(f"{attributes.value!r} is no {result.dtype}")
    if op.name == "iota":
        _check_axes(attributes.axes, result.shape)
        if len(attributes.axes) != 1 or result.dtype == "bool":
            raise KernelError(f"iota counts along one axis, in numbers; not along {attributes.axes} in {result.dtype}")
    return result


def _infer_elementwise(op: Op, operands: Sequence[TensorType], attributes: Any) -> TensorType:
    shape = operands[0].shape
    if any(operand.shape != shape for operand in operands):
        raise KernelError(f"{op.name} of shapes {', '.join(str(o.shape) for o in operands)}: broadcast them first")
    dtypes = tuple(operand.dtype for operand in operands)
    if op.name == "cast":
        return TensorType(shape, attributes.dtype)
    if op.name == "where":
        if dtypes[0] != "bool" or dtypes[1] != dtypes[2]:
            raise KernelError(f"where takes a bool and two of one dtype, not {', '.join(dtypes)}")
        return TensorType(shape, dtypes[1])
    *wanted, result = loop_dtypes(op.name, dtypes)
    if tuple(wanted) != dtypes:
        raise KernelError(f"{op.name} computes with {', '.join(wanted)}, not {', '.join(dtypes)}: cast the operands")
    return TensorType(shape, result)


def _infer_reduction(op: Op, operands: Sequence[TensorType], attributes: Any) -> TensorType:
    (operand,) = operands
    _check_axes(attributes.axes, operand.shape)
    if op.name in ("max", "min") and any(operand.shape[axis] == 0 for axis in attributes.axes):
        raise KernelError(f"{op.name} over no element of shape {operand.shape} has no value")
    if op.name in ("sum", "prod") and operand.dtype == "bool":
        raise KernelError(f"{op.name} of bool: cast it to a number first")
    kept = tuple(length for axis, length in enumerate(operand.shape) if axis not in attributes.axes)
    return TensorType(kept, operand.dtype)


def _infer_matmul(op: Op, operands: Sequence[TensorType], attributes: Any) -> TensorType:
    a, b = operands
    if a.dtype != b.dtype or a.dtype not in FLOATS:
        raise KernelError(f"matmul takes two of one floating dtype, not {a.dtype} and {b.dtype}: cast them first")
    if len(a.shape) < 2 or a.shape[:-2] != b.shape[:-2] or len(b.shape) < 2 or a.shape[-1] != b.shape[-2]:
        raise KernelError(f"matmul of shapes {a.shape} and {b.shape}: inner lengths differ, or those before them")
    return TensorType((*a.shape[:-1], b.shape[-1]), a.dtype)


def _infer_movement(op: Op, operands: Sequence[TensorType], attributes: Any) -> TensorType:
    operand = operands[0]
    shape: Shape = attributes.shape
    check_type(TensorType(shape, operand.dtype))
    match op.name:
        case "reshape":
            if prod(shape) != operand.size:
                raise KernelError(f"{operand.size} elements of shape {operand.shape} do not make {shape}")
            return TensorType(shape, operand.dtype)
        case "transpose":
            if sorted(attributes.axes) != list(range(len(operand.shape))):
                raise KernelError(f"axes {attributes.axes} are no order of those of shape {operand.shape}")
            return TensorType(tuple(operand.shape[axis] for axis in attributes.axes), operand.dtype)
        case "broadcast":
            padded = (1,) * (len(shape) - len(operand.shape)) + operand.shape
            if len(padded) != len(shape) or any(a not in (1, b) for a, b in zip(padded, shape, strict=True)):
                raise KernelError(f"shape {operand.shape} cannot be broadcast to {shape}")
            return TensorType(shape, operand.dtype)
        case "slice":
            _check_slice(attributes, shape, operand.shape)
            return TensorType(shape, operand.dtype)
        case "place":
            _check_slice(attributes, operand.shape, shape)
            return TensorType(shape, operand.dtype)
    return _infer_concatenate(operands, attributes)


def _infer_concatenate(operands: Sequence[TensorType], attributes: Any) -> TensorType:
    first = operands[0]
    _check_axes(attributes.axes, first.shape)
    if len(attributes.axes) != 1:
        raise KernelError(f"concatenate goes along one axis, not {attributes.axes}")
    (axis,) = attributes.axes
    for other in operands:
        rest = other.shape[:axis] + other.shape[axis + 1 :]
        # A vector has as much beside its second axis, which it has not, as a matrix has.
        is_alike = len(other.shape) == len(first.shape) and rest == first.shape[:axis] + first.shape[axis + 1 :]
        if other.dtype != first.dtype or not is_alike:
            raise KernelError(f"concatenate along axis {axis} of {', '.join(map(str, operands))}: the rest differs")
    length = sum(other.shape[axis] for other in operands)
    return TensorType((*first.shape[:axis], length, *first.shape[axis + 1 :]), first.dtype)


def _check_axes(axes: Sequence[int], shape: Shape) -> None:
    if list(axes) != sorted(set(axes)) or any(not 0 <= axis < len(shape) for axis in axes):
        raise KernelError(f"axes {tuple(axes)} of shape {shape} must be different ones that it has, in order")


def _check_slice(attributes: Any, part: Shape, whole: Shape) -> None:
    """Check that ``part`` lies within ``whole`` from ``starts`` in ``steps``."""
    if not len(attributes.starts) == len(attributes.steps) == len(part) == len(whole):
        raise KernelError(f"a slice of shape {whole} needs a start, a step and a length for each axis")
    for start, step, count, length in zip(attributes.starts, attributes.steps, part, whole, strict=True):
        last = start + (count - 1) * step
        if step == 0 or (count and not (0 <= start < length and 0 <= last < length)):
            raise KernelError(f"{count} elements from {start} in steps of {step} are not within {length}")


_RULES = {
    "source": _infer_source,
    "elementwise": _infer_elementwise,
    "reduction": _infer_reduction,
    "matmul": _infer_matmul,
    "movement": _infer_movement,
}
