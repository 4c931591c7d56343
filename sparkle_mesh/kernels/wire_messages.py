"""What a graph is on the wire: one message for each form that a node has, with what operations of that form need."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, ClassVar, TypeAlias

import msgspec

from sparkle_mesh import limits, wire
from sparkle_mesh.kernels.graph import Node
from sparkle_mesh.kernels.ops import Scalar

# The codes of dtypes and operations are their places here: names are added at the end, and none is taken away.
DTYPE_CODES: tuple[str, ...] = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
DTYPE_CODES += ("float16", "float32", "float64")
REDUCTION_CODES: tuple[str, ...] = ("sum", "prod", "max", "min")
ELEMENTWISE_CODES: tuple[str, ...] = (
    *("where", "negative", "absolute", "sign", "floor", "ceil", "rint", "trunc", "square"),
    *("logical_not", "invert", "isnan", "isinf", "isfinite", "signbit", "sqrt", "reciprocal"),
    *("exp", "exp2", "expm1", "log", "log1p", "log2", "log10", "sin", "cos", "tan", "arcsin", "arccos", "arctan"),
    *("sinh", "cosh", "tanh", "arcsinh", "arccosh", "arctanh"),
    *("add", "subtract", "multiply", "maximum", "minimum", "divide", "floor_divide", "remainder", "hypot"),
    *("equal", "not_equal", "less", "less_equal", "greater", "greater_equal"),
    *("logical_and", "logical_or", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor"),
    *("left_shift", "right_shift", "copysign", "power", "arctan2"),
)


_Number = Annotated[int, msgspec.Meta(ge=0, lt=limits.KERNEL_NODES_MAX_COUNT)]
_Numbers = Annotated[tuple[_Number, ...], msgspec.Meta(max_length=limits.KERNEL_OPERANDS_MAX_COUNT)]
_Axis = Annotated[int, msgspec.Meta(ge=0, lt=limits.KERNEL_RANK_MAX_COUNT)]
_Axes = Annotated[tuple[_Axis, ...], msgspec.Meta(max_length=limits.KERNEL_RANK_MAX_COUNT)]
_Length = Annotated[int, msgspec.Meta(ge=0, le=limits.KERNEL_ELEMENTS_MAX_COUNT)]
_Shape = Annotated[tuple[_Length, ...], msgspec.Meta(max_length=limits.KERNEL_RANK_MAX_COUNT)]
_Place = Annotated[int, msgspec.Meta(ge=-limits.KERNEL_ELEMENTS_MAX_COUNT, le=limits.KERNEL_ELEMENTS_MAX_COUNT)]
_Places = Annotated[tuple[_Place, ...], msgspec.Meta(max_length=limits.KERNEL_RANK_MAX_COUNT)]
_Dtype = Annotated[int, msgspec.Meta(ge=0, lt=len(DTYPE_CODES))]


class Versioned(wire.Message, array_like=True, frozen=True):
    """What every version of an encoded graph begins with."""

    version: wire.Count


class InputForm(wire.Message, array_like=True, tag=0, frozen=True):
    """An operand of the kernel."""

    dtype: _Dtype
    shape: _Shape

    def node(self) -> Node:
        """Return the node, its type open where that follows from its operands."""
        return Node("input", shape=self.shape, dtype=DTYPE_CODES[self.dtype])


class ConstantForm(wire.Message, array_like=True, tag=1, frozen=True):
    """A number."""

    dtype: _Dtype
    value: bool | int | float

    def node(self) -> Node:
        """See :meth:`InputForm.node`."""
        return Node("constant", dtype=DTYPE_CODES[self.dtype], value=self.value)


class IotaForm(wire.Message, array_like=True, tag=2, frozen=True):
    """Counts along an axis."""

    dtype: _Dtype
    shape: _Shape
    axis: _Axis

    def node(self) -> Node:
        """See :meth:`InputForm.node`."""
        return Node("iota", shape=self.shape, dtype=DTYPE_CODES[self.dtype], axes=(self.axis,))


class ElementwiseForm(wire.Message, array_like=True, tag=3, frozen=True):
    """An elementwise operation; ``cast`` has a form of its own."""

    op: Annotated[int, msgspec.Meta(ge=0, lt=len(ELEMENTWISE_CODES))]
    operands: _Numbers

    def node(self) -> Node:
        """See :meth:`InputForm.node`."""
        return Node(ELEMENTWISE_CODES[self.op], self.operands)


class CastForm(wire.Message, array_like=True, tag=4, frozen=True):
    """A conversion."""

    dtype: _Dtype
    operand: _Number

    def node(self) -> Node:
        """See :meth:`InputForm.node`."""
        return Node("cast", (self.operand,), dtype=DTYPE_CODES[self.dtype])


class ReductionForm(wire.Message, array_like=True, tag=5, frozen=True):
    """A reduction."""

    op: Annotated[int, msgspec.Meta(ge=0, lt=len(REDUCTION_CODES))]
    operand: _Number
    axes: _Axes

    def node(self) -> Node:
        """See :meth:`InputForm.node`."""
        return Node(REDUCTION_CODES[self.op], (self.operand,), axes=self.axes)


class MatmulForm(wire.Message, array_like=True, tag=6, frozen=True):
    """A product of matrices."""

    a: _Number
    b: _Number

    def node(self) -> Node:
        """See :meth:`InputForm.node`."""
        return Node("matmul", (self.a, self.b))


class ReshapeForm(wire.Message, array_like=True, tag=7, frozen=True):
    """Another shape of the same elements."""

    op_name: ClassVar[str] = "reshape"

    operand: _Number
    shape: _Shape

    def node(self) -> Node:
        """See :meth:`InputForm.node`."""
        return Node(self.op_name, (self.operand,), self.shape)


class BroadcastForm(ReshapeForm, array_like=True, tag=8, frozen=True):
    """Elements repeated."""

    op_name: ClassVar[str] = "broadcast"


class TransposeForm(wire.Message, array_like=True, tag=9, frozen=True):
    """Axes in another order."""

    operand: _Number
    axes: _Axes

    def node(self) -> Node:
        """See :meth:`InputForm.node`."""
        return Node("transpose", (self.operand,), axes=self.axes)


class SliceForm(wire.Message, array_like=True, tag=10, frozen=True):
    """A part of the operand."""

    op_name: ClassVar[str] = "slice"

    operand: _Number
    shape: _Shape
    starts: _Places
    steps: _Places

    def node(self) -> Node:
        """See :meth:`InputForm.node`."""
        return Node(self.op_name, (self.operand,), self.shape, starts=self.starts, steps=self.steps)


class PlaceForm(SliceForm, array_like=True, tag=11, frozen=True):
    """The operand among zeros."""

    op_name: ClassVar[str] = "place"


class ConcatenateForm(wire.Message, array_like=True, tag=12, frozen=True):
    """Operands one after the other."""

    axis: _Axis
    operands: _Numbers

    def node(self) -> Node:
        """See :meth:`InputForm.node`."""
        return Node("concatenate", self.operands, axes=(self.axis,))


Form: TypeAlias = (
    InputForm
    | ConstantForm
    | IotaForm
    | ElementwiseForm
    | CastForm
    | ReductionForm
    | MatmulForm
    | ReshapeForm
    | BroadcastForm
    | TransposeForm
    | SliceForm
    | PlaceForm
    | ConcatenateForm
)


class EncodedGraph(wire.Message, array_like=True, frozen=True):
    """A graph: each node after its operands."""

    version: wire.Count
    nodes: Annotated[tuple[Form, ...], msgspec.Meta(min_length=1, max_length=limits.KERNEL_NODES_MAX_COUNT)]
    outputs: Annotated[tuple[_Number, ...], msgspec.Meta(min_length=1, max_length=limits.KERNEL_OUTPUTS_MAX_COUNT)]


class EncodedKernel(wire.Message, frozen=True):
    """A graph as bytes, and what it takes at most, as whoever sends it says.

    Attributes
    ----------
    flops, moved_bytes, memory_bytes
        As in :class:`.accounting.Demand`.
    graph
        A whole :class:`EncodedGraph`.
    """

    version: wire.Count
    flops: wire.Count
    moved_bytes: wire.Count
    memory_bytes: wire.Count
    graph: bytes


def form_of(node: Node) -> Form:
    """Return what ``node``, which is valid, is on the wire; what its operation does not need is not looked at."""
    node = _plain(node)
    if node.op in REDUCTION_CODES:
        return ReductionForm(op=REDUCTION_CODES.index(node.op), operand=node.operands[0], axes=node.axes)
    if node.op in _ELEMENTWISE:
        return ElementwiseForm(op=_ELEMENTWISE[node.op], operands=node.operands)
    return _FORMS[node.op](node)


def _plain(node: Node) -> Node:
    """Return ``node`` with Python's integers, where others that are equal to them (NumPy's, bools) may be."""
    operands, shape, axes, starts, steps = (
        tuple(map(int, numbers)) for numbers in (node.operands, node.shape, node.axes, node.starts, node.steps)
    )
    return Node(node.op, operands, shape, node.dtype, node.value, axes, starts, steps)


def _number(value: Scalar | None) -> Scalar:
    """Return ``value`` as a number of Python's own, with the one NaN that there is on the wire."""
    assert value is not None
    if isinstance(value, float):
        return math.nan if math.isnan(value) else float(value)
    return value


_ELEMENTWISE = {name: code for code, name in enumerate(ELEMENTWISE_CODES)}
_FORMS: dict[str, Callable[[Node], Form]] = {
    "input": lambda node: InputForm(dtype=DTYPE_CODES.index(node.dtype), shape=node.shape),
    "constant": lambda node: ConstantForm(dtype=DTYPE_CODES.index(node.dtype), value=_number(node.value)),
    "iota": lambda node: IotaForm(dtype=DTYPE_CODES.index(node.dtype), shape=node.shape, axis=node.axes[0]),
    "cast": lambda node: CastForm(dtype=DTYPE_CODES.index(node.dtype), operand=node.operands[0]),
    "matmul": lambda node: MatmulForm(a=node.operands[0], b=node.operands[1]),
    "reshape": lambda node: ReshapeForm(operand=node.operands[0], shape=node.shape),
    "broadcast": lambda node: BroadcastForm(operand=node.operands[0], shape=node.shape),
    "transpose": lambda node: TransposeForm(operand=node.operands[0], axes=node.axes),
    "slice": lambda node: SliceForm(operand=node.operands[0], shape=node.shape, starts=node.starts, steps=node.steps),
    "place": lambda node: PlaceForm(operand=node.operands[0], shape=node.shape, starts=node.starts, steps=node.steps),
    "concatenate": lambda node: ConcatenateForm(axis=node.axes[0], operands=node.operands),
}
