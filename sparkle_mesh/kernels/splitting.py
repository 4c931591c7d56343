"""Which kernels can be done in parts along one axis, and the graph of a part.

A value of a part is either whole, a range of the whole value along one axis, or partial: to be combined with those of
the other parts by a reduction. What cannot be told so makes the kernel one that is not split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from sparkle_mesh import limits
from sparkle_mesh.errors import KernelError
from sparkle_mesh.kernels.graph import Graph, Node, check_graph
from sparkle_mesh.kernels.ops import OPS


@dataclass(frozen=True, slots=True)
class _Whole:
    """The same for every part."""


@dataclass(frozen=True, slots=True)
class _Repeated:
    """One number, or a whole value repeated along some axes: a part has as much of it along these as it needs."""

    axes: frozenset[int]


@dataclass(frozen=True, slots=True)
class _Range:
    """A range along ``axis``."""

    axis: int


@dataclass(frozen=True, slots=True)
class _Partial:
    """To be combined by ``op``."""

    op: str


_State = _Whole | _Repeated | _Range | _Partial


class _CannotSplitError(Exception):
    """A node mixes what lies in different parts."""


@dataclass(frozen=True)
class Split:
    """How a graph is done in parts.

    Attributes
    ----------
    length
        Of the axis that is split.
    input_axes
        For each input the axis that a part takes a range of; None if every part takes all of it.
    output_axes
        For each output the axis along which those of the parts follow each other; None if ``output_ops`` combines them.
    output_ops
        ``"sum"``, ``"prod"``, ``"max"`` or ``"min"`` for each output that is combined, None for others.
    """

    graph: Graph
    length: int
    input_axes: tuple[int | None, ...]
    output_axes: tuple[int | None, ...]
    output_ops: tuple[str | None, ...]
    _states: tuple[_State, ...]
    _parts: dict[int, Graph] = field(default_factory=dict, compare=False, repr=False)

    def part(self, count: int) -> Graph:
        """Return the graph of a part with ``count`` of ``length``."""
        found = self._parts.get(count)
        if found is None:
            if len(self._parts) >= limits.SHARED_GRAINS_COUNT:
                self._parts.clear()
            found = self._parts[count] = self._make_part(count)
        return found

    def _make_part(self, count: int) -> Graph:
        nodes = []
        for node, state in zip(self.graph.nodes, self._states, strict=True):
            if isinstance(state, _Range):
                shape = (*node.shape[: state.axis], count, *node.shape[state.axis + 1 :])
                node = replace(node, shape=shape)
            nodes.append(node)
        graph = Graph(tuple(nodes), self.graph.outputs)
        check_graph(graph)
        return graph


@lru_cache(limits.PREPARED_PROGRAMS_MAX_COUNT)
def split(graph: Graph) -> Split | None:
    """Return how ``graph`` can be done in parts along the first axis of its inputs; None if it cannot.

    Of the lengths that inputs have there, the one with most elements is tried first.
    """
    sizes: dict[int, int] = {}
    for tensor in graph.inputs:
        if tensor.shape and tensor.shape[0] > 1:
            sizes[tensor.shape[0]] = sizes.get(tensor.shape[0], 0) + tensor.size
    for length in sorted(sizes, key=lambda one: (-sizes[one], -one)):
        found = _split_along(graph, length)
        if found is not None:
            return found
    return None


def _split_along(graph: Graph, length: int) -> Split | None:
    """Try with all inputs of that first length in parts, then with fewer: weights may have it by chance."""
    candidates = [number for number, tensor in enumerate(graph.inputs) if tensor.shape[:1] == (length,)]
    largest = max(candidates, key=lambda number: (graph.inputs[number].size, -number))
    for chosen in (candidates, [largest]):
        try:
            states = _propagate(graph, dict.fromkeys(chosen, 0))
        except _CannotSplitError:
            continue
        found = _result(graph, length, states)
        if found is not None:
            return found
    return None


def _result(graph: Graph, length: int, states: Sequence[_State]) -> Split | None:
    outputs = [states[output] for output in graph.outputs]
    if not all(isinstance(state, (_Range, _Partial)) for state in outputs):
        # An output that every part has whole would be computed by all of them.
        return None
    axes = tuple(state.axis if isinstance(state, _Range) else None for state in outputs)
    ops = tuple(state.op if isinstance(state, _Partial) else None for state in outputs)
    inputs = tuple(state.axis if isinstance(state, _Range) else None for state in states[: len(graph.inputs)])
    found = Split(graph, length, inputs, axes, ops, tuple(states))
    try:
        found.part(1)
    except KernelError:
        return None
    return found


def _propagate(graph: Graph, input_axes: Mapping[int, int]) -> list[_State]:
    """Return the state of each node, or raise _CannotSplitError."""
    settled: dict[int, _State] = {}
    while True:
        count = len(settled)
        states = _pass(graph, input_axes, settled)
        if len(settled) == count:
            return states


def _pass(graph: Graph, input_axes: Mapping[int, int], settled: dict[int, _State]) -> list[_State]:
    """Go through the nodes once; what is repeated and turns out to be a range is put into ``settled``."""
    states: list[_State] = []
    for number, node in enumerate(graph.nodes):
        operands = [states[operand] for operand in node.operands]
        if node.op == "input":
            states.append(_Range(input_axes[number]) if number in input_axes else _Whole())
        elif any(isinstance(operand, _Partial) for operand in operands):
            raise _CannotSplitError
        else:
            state = settled.get(number) or _state(node, operands, [graph.nodes[one] for one in node.operands])
            if isinstance(state, _Range) and OPS[node.op].kind == "elementwise":
                settled.update((one, state) for one in node.operands if _is_open(states[one], graph.nodes[one]))
            states.append(state)
    return states


def _is_open(state: _State, node: Node) -> bool:
    """Whether a part may have any range of what is repeated there."""
    return isinstance(state, _Repeated) and node.op != "constant"


def _state(node: Node, operands: Sequence[_State], types: Sequence[Node]) -> _State:
    """Return what a part has of ``node``; raises _CannotSplitError."""
    kind = OPS[node.op].kind
    if kind == "source":
        return _Repeated(frozenset()) if node.op == "constant" else _Whole()
    if kind == "elementwise":
        return _elementwise(operands)
    if not any(isinstance(operand, _Range) for operand in operands):
        if node.op == "broadcast":
            return _broadcast(node, operands[0], types[0])
        return _Whole()
    if kind == "reduction":
        return _reduction(node, operands[0])
    if kind == "matmul":
        return _matmul(node, operands)
    return _movement(node, operands, types)


def _elementwise(operands: Sequence[_State]) -> _State:
    ranges = {operand for operand in operands if isinstance(operand, _Range)}
    if len(ranges) > 1:
        raise _CannotSplitError
    repeated = [operand.axes for operand in operands if isinstance(operand, _Repeated)]
    whole = any(isinstance(operand, _Whole) for operand in operands)
    if ranges:
        (found,) = ranges
        if whole or any(found.axis not in axes for axes in repeated):
            raise _CannotSplitError
        return found
    return _Whole() if whole or not repeated else _Repeated(frozenset.intersection(*repeated))


def _broadcast(node: Node, operand: _State, source: Node) -> _State:
    missing = len(node.shape) - len(source.shape)
    axes = {axis for axis in range(len(node.shape)) if axis < missing or source.shape[axis - missing] == 1}
    if isinstance(operand, _Repeated):
        axes |= {axis + missing for axis in operand.axes}
    return _Repeated(frozenset(axes))


def _reduction(node: Node, operand: _State) -> _State:
    assert isinstance(operand, _Range)
    if operand.axis in node.axes:
        return _Partial(node.op)
    return _Range(operand.axis - sum(axis < operand.axis for axis in node.axes))


def _matmul(node: Node, operands: Sequence[_State]) -> _State:
    a, b = operands
    rank = len(node.shape)
    if isinstance(a, _Range) and isinstance(b, _Range):
        if a.axis == b.axis < rank - 2:
            return a
        if (a.axis, b.axis) == (rank - 1, rank - 2):
            return _Partial("sum")
    elif isinstance(a, _Range) and isinstance(b, _Whole) and a.axis == rank - 2:
        return a
    elif isinstance(b, _Range) and isinstance(a, _Whole) and b.axis == rank - 1:
        return b
    raise _CannotSplitError


def _movement(node: Node, operands: Sequence[_State], types: Sequence[Node]) -> _State:
    first = operands[0]
    assert isinstance(first, _Range) or node.op == "concatenate"
    match node.op:
        case "transpose" if isinstance(first, _Range):
            return _Range(node.axes.index(first.axis))
        case "broadcast" if isinstance(first, _Range):
            return _Range(first.axis + len(node.shape) - len(types[0].shape))
        case "reshape" if isinstance(first, _Range):
            return _reshape(node, first, types[0])
        case "slice" | "place" if isinstance(first, _Range):
            axis = first.axis
            if (node.starts[axis], node.steps[axis]) == (0, 1) and node.shape[axis] == types[0].shape[axis]:
                return first
        case "concatenate":
            if len(set(operands)) == 1 and isinstance(first, _Range) and first.axis != node.axes[0]:
                return first
    raise _CannotSplitError


def _reshape(node: Node, state: _Range, source: Node) -> _State:
    """The axis stays one axis, with as many elements before it."""
    before = 1
    for length in source.shape[: state.axis]:
        before *= length
    reached = 1
    for axis, length in enumerate(node.shape):
        if reached == before and length == source.shape[state.axis]:
            return _Range(axis)
        reached *= length
    raise _CannotSplitError
