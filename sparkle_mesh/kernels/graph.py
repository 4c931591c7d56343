"""A kernel as data: a graph of operations whose types are known, and how one is built.

Nodes stand in an order in which each follows its operands. The first are the inputs. :class:`GraphBuilder` puts in what
NumPy does silently: conversions, broadcasting, the types of plain numbers (NEP 50: a Python number takes the dtype of
what it is combined with).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from sparkle_mesh import limits
from sparkle_mesh.errors import KernelError
from sparkle_mesh.kernels.ops import FLOATS, OPS, Scalar, Shape, TensorType, infer, loop_dtypes, scalar_fits


@dataclass(frozen=True, slots=True)
class Node:
    """One operation in a graph.

    Attributes
    ----------
    op
        Its name in :data:`.ops.OPS`.
    operands
        Numbers of earlier nodes.
    shape, dtype
        Of the result.
    value
        Of a constant.
    axes
        That a reduction drops; the order of a transpose; the one axis of ``iota`` and ``concatenate``.
    starts, steps
        Of a slice of the operand, or of where ``place`` puts the operand among zeros.
    """

    op: str
    operands: tuple[int, ...] = ()
    shape: Shape = ()
    dtype: str = "float32"
    value: Scalar | None = field(default=None, compare=False)
    axes: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()
    # What makes constants the same: 0.0 and -0.0 are two, as are 1, 1.0 and True; NaN is itself.
    _value_key: str = field(init=False, repr=False, default="")

    def __post_init__(self) -> None:
        if self.value is not None:
            text = self.value.hex() if isinstance(self.value, float) else str(self.value)
            object.__setattr__(self, "_value_key", f"{type(self.value).__name__} {text}")

    @property
    def type(self) -> TensorType:
        """Of the result."""
        return TensorType(self.shape, self.dtype)


@dataclass(frozen=True)
class Graph:
    """A kernel for operands of certain types. Made by :class:`GraphBuilder`, or decoded and checked.

    Attributes
    ----------
    nodes
        The inputs, then the rest.
    outputs
        Numbers of the nodes whose values are returned.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]

    @cached_property
    def inputs(self) -> tuple[TensorType, ...]:
        """The types of the operands."""
        return tuple(node.type for node in self.nodes if node.op == "input")

    @cached_property
    def output_types(self) -> tuple[TensorType, ...]:
        """The types of the results."""
        return tuple(self.nodes[output].type for output in self.outputs)

    @cached_property
    def form(self) -> int:
        """A number for what it does, whatever the lengths of its axes and the values of its constants."""
        nodes = tuple((node.op, node.operands, len(node.shape), node.dtype, node.axes) for node in self.nodes)
        return hash((nodes, self.outputs))

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.nodes, self.outputs))


_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "equal": operator.eq,
    "not_equal": operator.ne,
    "less": operator.lt,
    "less_equal": operator.le,
    "greater": operator.gt,
    "greater_equal": operator.ge,
}


@dataclass(frozen=True, slots=True)
class WeakScalar:
    """A plain Python number among operands: it takes the dtype of what it is combined with."""

    value: Scalar


def weak_dtype(kind: str, others: Sequence[str]) -> str:
    """Return the dtype that a plain number of ``kind`` ("bool", "int" or "float") takes beside ``others`` (NEP 50)."""
    if kind == "bool" or not others:
        return {"bool": "bool", "int": "int64", "float": "float64"}[kind]
    found = np.result_type(*others).name
    if kind == "int":
        return "int64" if found == "bool" else found
    return found if found in FLOATS else "float64"


def check_graph(graph: Graph) -> None:
    """Raise KernelError unless each node has the type that follows from its operands, and all bounds hold."""
    if not 1 <= len(graph.nodes) <= limits.KERNEL_NODES_MAX_COUNT:
        raise KernelError(f"a kernel has 1 to {limits.KERNEL_NODES_MAX_COUNT} nodes, not {len(graph.nodes)}")
    if len(graph.inputs) > limits.KERNEL_INPUTS_MAX_COUNT:
        raise KernelError(f"a kernel takes {limits.KERNEL_INPUTS_MAX_COUNT} operands at most, not {len(graph.inputs)}")
    if not 1 <= len(graph.outputs) <= limits.KERNEL_OUTPUTS_MAX_COUNT:
        raise KernelError(f"a kernel returns 1 to {limits.KERNEL_OUTPUTS_MAX_COUNT} values, not {len(graph.outputs)}")
    for number, node in enumerate(graph.nodes):
        if node.op == "input" and number >= len(graph.inputs):
            raise KernelError(f"node {number} is an input, and follows what is none")
        if len(node.operands) > limits.KERNEL_OPERANDS_MAX_COUNT:
            raise KernelError(f"node {number} has more than {limits.KERNEL_OPERANDS_MAX_COUNT} operands")
        if any(not 0 <= operand < number for operand in node.operands):
            raise KernelError(f"node {number} has operands {node.operands}, not all before it")
        found = infer(node.op, [graph.nodes[operand].type for operand in node.operands], node)
        if found != node.type:
            raise KernelError(f"node {number}, {node.op}, is {node.type}, and would be {found}")
    if any(not 0 <= output < len(graph.nodes) for output in graph.outputs):
        raise KernelError(f"outputs {graph.outputs} are not all nodes")


class GraphBuilder:
    """Builds a graph; each method returns the number of the node with its result, one and the same for the same.

    Parameters
    ----------
    inputs
        The types of the kernel's operands: nodes 0, 1, …

    Raises
    ------
    KernelError
        From every method, if the operation cannot be done so.
    """

    def __init__(self, inputs: Sequence[TensorType]) -> None:
        self._nodes: list[Node] = []
        self._numbers: dict[Node, int] = {}
        self._input_count = len(inputs)
        for tensor in inputs:
            infer("input", (), Node("input", shape=tensor.shape, dtype=tensor.dtype))
            self._nodes.append(Node("input", shape=tensor.shape, dtype=tensor.dtype))

    def type_of(self, number: int) -> TensorType:
        """Return the type of a node's result."""
        return self._nodes[number].type

    def node(self, number: int) -> Node:
        """Return a node."""
        return self._nodes[number]

    def add(
        self,
        op: str,
        *operands: int,
        shape: Shape = (),
        dtype: str = "",
        value: Scalar | None = None,
        axes: tuple[int, ...] = (),
        starts: tuple[int, ...] = (),
        steps: tuple[int, ...] = (),
    ) -> int:
        """Add one operation as it is: no operand is converted. See :class:`Node`."""
        wanted = Node(op, operands, shape, dtype, value, axes, starts, steps)
        found = infer(op, [self.type_of(operand) for operand in operands], wanted)
        node = Node(op, operands, found.shape, found.dtype, value, axes, starts, steps)
        number = self._numbers.get(node)
        if number is None:
            if len(self._nodes) >= limits.KERNEL_NODES_MAX_COUNT:
                raise KernelError(f"a kernel has {limits.KERNEL_NODES_MAX_COUNT} nodes at most; make it of several")
            number = self._numbers[node] = len(self._nodes)
            self._nodes.append(node)
        return number

    def copy(self, node: Node, operands: Sequence[int]) -> int:
        """Add a node of another graph, with ``operands`` in place of its own."""
        return self.add(
            node.op,
            *operands,
            shape=node.shape,
            dtype=node.dtype,
            value=node.value,
            axes=node.axes,
            starts=node.starts,
            steps=node.steps,
        )

    def inline(self, graph: Graph, operands: Sequence[int]) -> list[int]:
        """Add all of ``graph`` but its inputs, in whose place ``operands`` stand; return the numbers of its nodes."""
        found = tuple(self.type_of(operand) for operand in operands)
        if found != graph.inputs:
            wanted, got = (", ".join(map(str, types)) for types in (graph.inputs, found))
            raise KernelError(f"the kernel within takes {wanted}; not {got}")
        numbers = list(operands)
        for node in graph.nodes[len(operands) :]:
            numbers.append(self.copy(node, [numbers[operand] for operand in node.operands]))
        return numbers

    # --- With NumPy's conversions -----------------------------------------------------------------

    def constant(self, value: Scalar, dtype: str | None = None) -> int:
        """Return ``value`` in ``dtype``; by default bool, int64 or float64, as NumPy has it."""
        if dtype is None:
            dtype = "bool" if isinstance(value, bool) else "int64" if isinstance(value, int) else "float64"
        if dtype in FLOATS:
            value = float(value)
        elif dtype == "bool":
            value = bool(value)
        return self.add("constant", dtype=dtype, value=value)

    def cast(self, operand: int, dtype: str) -> int:
        """Return ``operand`` in ``dtype``; itself if it is."""
        return operand if self.type_of(operand).dtype == dtype else self.add("cast", operand, dtype=dtype)

    def broadcast(self, operand: int, shape: Shape) -> int:
        """Return ``operand`` repeated to ``shape``; itself if it has it."""
        return operand if self.type_of(operand).shape == shape else self.add("broadcast", operand, shape=shape)

    def reshape(self, operand: int, shape: Shape) -> int:
        """Return ``operand`` in another shape; itself if it has it."""
        return operand if self.type_of(operand).shape == shape else self.add("reshape", operand, shape=shape)

    def elementwise(self, op: str, *operands: int | WeakScalar) -> int:
        """Apply a ufunc as NumPy would: operands are broadcast and converted; plain numbers are weak."""
        if OPS[op].arity != len(operands):
            raise KernelError(f"{op} takes {OPS[op].arity} operands, not {len(operands)}")
        dtypes = (*self._dtypes(operands[:1]), *self._dtypes(operands[1:])) if op == "where" else self._dtypes(operands)
        if op == "where":
            common = np.result_type(*dtypes[1:]).name
            wanted: tuple[str, ...] = ("bool", common, common)
        else:
            *most, _ = loop_dtypes(op, dtypes)
            wanted = tuple(most)
        if op in _COMPARISONS and (known := self._beyond(op, operands, wanted)) is not None:
            return known
        numbers = [
            one if isinstance(one, int) else self._weak(one.value, dtype)
            for one, dtype in zip(operands, wanted, strict=True)
        ]
        shape = self._common_shape(op, numbers)
        pairs = zip(numbers, wanted, strict=True)
        return self.add(op, *(self.broadcast(self.cast(number, dtype), shape) for number, dtype in pairs))

    def _beyond(self, op: str, operands: Sequence[int | WeakScalar], dtypes: Sequence[str]) -> int | None:
        """Return how integers compare with a number that their dtype does not have, as NumPy does; None otherwise."""
        for operand, other, dtype in zip(operands, reversed(operands), dtypes, strict=True):
            if not isinstance(operand, WeakScalar) or not isinstance(other, int) or dtype in ("bool", *FLOATS):
                continue
            value = int(operand.value)
            if not scalar_fits(value, dtype):
                # All of them are on one side of it.
                one, two = (value, 0) if operand is operands[0] else (0, value)
                return self.broadcast(self.constant(_COMPARISONS[op](one, two)), self.type_of(other).shape)
        return None

    def _dtypes(self, operands: Sequence[int | WeakScalar]) -> tuple[str, ...]:
        """Return the dtypes of ``operands``, plain numbers beside the others."""
        strong = [self.type_of(one).dtype for one in operands if isinstance(one, int)]
        return tuple(
            self.type_of(one).dtype if isinstance(one, int) else weak_dtype(type(one.value).__name__, strong)
            for one in operands
        )

    def _weak(self, value: Scalar, dtype: str) -> int:
        if isinstance(value, int) and dtype not in ("bool", *FLOATS) and not scalar_fits(int(value), dtype):
            raise KernelError(f"{value} is out of bounds for {dtype}")
        return self.constant(int(value) if dtype not in ("bool", *FLOATS) else value, dtype)

    def _common_shape(self, op: str, numbers: Sequence[int]) -> Shape:
        shapes = [self.type_of(number).shape for number in numbers]
        try:
            return np.broadcast_shapes(*shapes)
        except ValueError as error:
            raise KernelError(f"{op} of shapes {', '.join(map(str, shapes))}: they do not fit each other") from error

    def reduce(self, op: str, operand: int, axes: Sequence[int] | None = None, *, keepdims: bool = False) -> int:
        """Return ``sum``, ``prod``, ``max`` or ``min`` over ``axes`` (all by default; negative ones from the end).

        Sums and products of integers smaller than 64 bits, and of bools, are of 64 bits, as NumPy's.
        """
        tensor = self.type_of(operand)
        rank = len(tensor.shape)
        chosen = tuple(range(rank)) if axes is None else tuple(sorted(self._axis(axis, rank) for axis in axes))
        if op in ("sum", "prod") and tensor.dtype not in FLOATS:
            operand = self.cast(operand, "uint64" if tensor.dtype.startswith("uint") else "int64")
        result = operand if not chosen else self.add(op, operand, axes=chosen)
        if keepdims:
            result = self.reshape(
                result, tuple(1 if axis in chosen else length for axis, length in enumerate(tensor.shape))
            )
        return result

    @staticmethod
    def _axis(axis: int, rank: int) -> int:
        if not -rank <= axis < rank:
            raise KernelError(f"axis {axis} is none of {rank} dimensions")
        return axis % rank

    def transpose(self, operand: int, axes: Sequence[int] | None = None) -> int:
        """Return ``operand`` with its axes in another order, reversed by default."""
        rank = len(self.type_of(operand).shape)
        order = tuple(reversed(range(rank))) if axes is None else tuple(self._axis(axis, rank) for axis in axes)
        return operand if order == tuple(range(rank)) else self.add("transpose", operand, axes=order)

    def matmul(self, a: int, b: int) -> int:
        """Return the matrix product, with NumPy's rules for vectors and for more than two dimensions."""
        shape_a, shape_b = self.type_of(a).shape, self.type_of(b).shape
        if not shape_a or not shape_b:
            raise KernelError(f"matmul of shapes {shape_a} and {shape_b}: a number has no axis to sum over")
        dtype = np.result_type(self.type_of(a).dtype, self.type_of(b).dtype).name
        a, b = self.cast(a, dtype), self.cast(b, dtype)
        if len(shape_a) == 1:
            a = self.reshape(a, (1, *shape_a))
        if len(shape_b) == 1:
            b = self.reshape(b, (*shape_b, 1))
        full_a, full_b = self.type_of(a).shape, self.type_of(b).shape
        try:
            batch = np.broadcast_shapes(full_a[:-2], full_b[:-2])
        except ValueError as error:
            raise KernelError(f"matmul of shapes {shape_a} and {shape_b}: they do not fit each other") from error
        result = self.add(
            "matmul", self.broadcast(a, (*batch, *full_a[-2:])), self.broadcast(b, (*batch, *full_b[-2:]))
        )
        kept = self.type_of(result).shape
        if len(shape_b) == 1:
            kept = kept[:-1]
        if len(shape_a) == 1:
            kept = (*kept[: len(batch)], *kept[len(batch) + 1 :])
        return self.reshape(result, kept)

    # --- The whole --------------------------------------------------------------------------------

    def finish(self, outputs: Sequence[int]) -> Graph:
        """Return the graph that computes ``outputs``, without what they do not need; all inputs stay."""
        needed = set(outputs) | set(range(self._input_count))
        for number in range(len(self._nodes) - 1, -1, -1):
            if number in needed:
                needed.update(self._nodes[number].operands)
        order = {number: place for place, number in enumerate(sorted(needed))}
        nodes = []
        for number in sorted(needed):
            node = self._nodes[number]
            operands = tuple(order[operand] for operand in node.operands)
            nodes.append(
                Node(node.op, operands, node.shape, node.dtype, node.value, node.axes, node.starts, node.steps)
            )
        graph = Graph(tuple(nodes), tuple(order[output] for output in outputs))
        check_graph(graph)
        return graph
