"""What a graph means: each operation by NumPy, one after the other. The measure for every faster way to run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from sparkle_mesh.errors import KernelError
from sparkle_mesh.kernels.graph import Graph, Node
from sparkle_mesh.kernels.ops import FLOATS, OPS, TensorType

Array: TypeAlias = npt.NDArray[Any]


def evaluate(graph: Graph, inputs: Sequence[Array]) -> list[Array]:
    """Return the outputs of ``graph`` for ``inputs``.

    Raises
    ------
    KernelError
        If the inputs are not of the graph's types, or an integer is raised to a negative power.
    """
    found = tuple(TensorType(array.shape, array.dtype.name) for array in inputs)
    if found != graph.inputs:
        wanted, got = (", ".join(map(str, types)) for types in (graph.inputs, found))
        raise KernelError(f"this kernel takes {wanted}; not {got}")
    values: list[Array] = []
    with np.errstate(all="ignore"):
        for number, node in enumerate(graph.nodes):
            operands = [values[operand] for operand in node.operands]
            values.append(inputs[number] if node.op == "input" else evaluate_node(node, operands))
    return [values[output] for output in graph.outputs]


def evaluate_node(node: Node, operands: Sequence[Array]) -> Array:
    """Return the value of one node that is no input."""
    special = _SPECIAL.get(node.op)
    if special is not None:
        return special(node, operands)
    op = OPS[node.op]
    assert op.ufunc is not None, node.op
    if node.op == "power" and node.dtype not in FLOATS and np.any(operands[1] < 0):
        raise KernelError(f"power of {node.dtype} with a negative exponent has no value; cast the operands to a float")
    if op.kind == "reduction":
        return np.asarray(op.ufunc.reduce(operands[0], axis=node.axes, dtype=node.dtype))
    return np.asarray(op.ufunc(*operands))


def slices(node: Node, part: Sequence[int]) -> tuple[slice, ...]:
    """Return where ``part`` lies, for a ``slice`` or ``place`` node."""
    found = []
    for start, step, count in zip(node.starts, node.steps, part, strict=True):
        stop: int | None = start + count * step
        # Going down to the first element has no end that could be written as a number.
        found.append(slice(start, stop if stop is not None and stop >= 0 else None, step) if count else slice(0, 0, 1))
    return tuple(found)


def _iota(node: Node, operands: Sequence[Array]) -> Array:
    (axis,) = node.axes
    if 0 in node.shape:
        # The other lengths may be such as no memory holds.
        return np.empty(node.shape, node.dtype)
    shape = [1] * len(node.shape)
    shape[axis] = node.shape[axis]
    return np.broadcast_to(np.arange(node.shape[axis]).astype(node.dtype).reshape(shape), node.shape)


def _place(node: Node, operands: Sequence[Array]) -> Array:
    result = np.zeros(node.shape, node.dtype)
    result[slices(node, operands[0].shape)] = operands[0]
    return result


_SPECIAL: dict[str, Callable[[Node, Sequence[Array]], Array]] = {
    "constant": lambda node, operands: np.asarray(node.value, node.dtype),
    "iota": _iota,
    "cast": lambda node, operands: operands[0].astype(node.dtype),
    "where": lambda node, operands: np.asarray(np.where(*operands)),
    "matmul": lambda node, operands: np.matmul(operands[0], operands[1]),
    "reshape": lambda node, operands: operands[0].reshape(node.shape),
    "transpose": lambda node, operands: operands[0].transpose(node.axes),
    "broadcast": lambda node, operands: np.broadcast_to(operands[0], node.shape),
    "slice": lambda node, operands: operands[0][slices(node, node.shape)],
    "place": _place,
    "concatenate": lambda node, operands: np.concatenate(operands, axis=node.axes[0]),
}
