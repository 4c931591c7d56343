"""Graphs at the bounds, made to be slow to look at: each within what is accepted, none of them useful."""

from __future__ import annotations

from collections.abc import Callable

from sparkle_mesh import limits
from sparkle_mesh.kernels.graph import Graph, Node

COUNT = limits.KERNEL_NODES_MAX_COUNT
OPERANDS = limits.KERNEL_OPERANDS_MAX_COUNT
OPERANDS_IN_ALL = limits.KERNEL_OPERANDS_IN_ALL_MAX_COUNT
SHAPE = (4, 4)
INPUT = Node("input", shape=SHAPE)


def _square(operand: int, shape: tuple[int, ...] = SHAPE) -> Node:
    return Node("square", (operand,), shape)


def lazy_chain(op: str) -> Graph:
    """Transposes, reshapes, slices or broadcasts of each other."""
    change = {
        "transpose": Node("transpose", axes=(1, 0)),
        "reshape": Node("reshape"),
        "slice": Node("slice", starts=(3, 3), steps=(-1, -1)),
        "broadcast": Node("broadcast"),
    }[op]
    nodes = [INPUT]
    while len(nodes) < COUNT:
        number = len(nodes) - 1
        nodes.append(Node(op, (number,), SHAPE, axes=change.axes, starts=change.starts, steps=change.steps))
    return Graph(tuple(nodes), (COUNT - 1,) * limits.KERNEL_OUTPUTS_MAX_COUNT)


def mixed_lazy_chain() -> Graph:
    """Transposes and reshapes by turns: each of the latter needs a copy."""
    nodes = [INPUT]
    while len(nodes) < COUNT:
        number = len(nodes) - 1
        nodes.append(
            Node("transpose", (number,), SHAPE, axes=(1, 0)) if number % 2 else Node("reshape", (number,), SHAPE)
        )
    return Graph(tuple(nodes), (COUNT - 1,))


def lazy_chain_of_a_constant() -> Graph:
    """Broadcasts of a number, each read by one sum or one square."""
    nodes = [Node("constant", value=1.5), Node("broadcast", (0,), SHAPE)]
    while len(nodes) < COUNT - 3:
        nodes.append(Node("transpose", (len(nodes) - 1,), SHAPE, axes=(1, 0)))
    last = len(nodes) - 1
    nodes += [Node("add", (last, 1), SHAPE), Node("concatenate", (last, last + 1), (8, 4), axes=(0,))]
    return Graph(tuple(nodes), (last + 2,))


def views_of_each_link() -> Graph:
    """A chain of transposes, and a step that reads each."""
    nodes, reads = [INPUT], []
    while len(nodes) + 2 <= COUNT - 2 * (COUNT // OPERANDS):
        number = reads[-1] - 1 if reads else 0
        nodes.append(Node("transpose", (number,), SHAPE, axes=(1, 0)))
        nodes.append(_square(len(nodes) - 1))
        reads.append(len(nodes) - 1)
    return _closed(nodes, reads)


def _closed(nodes: list[Node], loose: list[int]) -> Graph:
    """Return a graph with ``loose`` joined along their first axis, OPERANDS at a time, whatever that takes."""
    shape = nodes[loose[0]].shape
    outputs = []
    for start in range(0, len(loose), OPERANDS):
        part = loose[start : start + OPERANDS]
        nodes.append(Node("concatenate", tuple(part), (shape[0] * len(part), *shape[1:]), axes=(0,)))
        outputs.append(len(nodes) - 1)
    assert len(nodes) <= COUNT
    return Graph(tuple(nodes), tuple(outputs))


def elementwise_chain() -> Graph:
    """One step of as many instructions as there can be."""
    nodes = [INPUT]
    while len(nodes) < COUNT:
        nodes.append(_square(len(nodes) - 1))
    return Graph(tuple(nodes), (COUNT - 1,))


def many_reductions_of_a_chain() -> Graph:
    """Half of the nodes reduce what the other half computes: taken in, it would be computed each time."""
    nodes = [INPUT]
    while len(nodes) < COUNT // 2:
        nodes.append(_square(len(nodes) - 1))
    last = len(nodes) - 1
    sums = []
    while len(nodes) + 1 < COUNT - COUNT // OPERANDS:
        nodes.append(Node("sum", (last,), (4,), axes=(len(sums) % 2,)))
        sums.append(len(nodes) - 1)
    return _closed(nodes, sums)


def reductions_along_a_chain() -> Graph:
    """Each link of a chain has a reduction, of something that nobody else needs."""
    nodes, link, sums = [INPUT], 0, []
    while len(nodes) + 3 < COUNT - COUNT // OPERANDS:
        nodes.append(_square(link))
        link = len(nodes) - 1
        nodes.append(Node("negative", (link,), SHAPE))
        nodes.append(Node("sum", (link + 1,), (4,), axes=(0,)))
        sums.append(len(nodes) - 1)
    return _closed(nodes, sums)


def concatenations() -> Graph:
    """As many operands in all as there can be, of nodes that have as many."""
    nodes = [Node("input", shape=(0,))]
    while len(nodes) < COUNT:
        operands = tuple(max(0, len(nodes) - 1 - place) for place in range(OPERANDS_IN_ALL // COUNT))
        nodes.append(Node("concatenate", operands, (0,), axes=(0,)))
    return Graph(tuple(nodes), (COUNT - 1,))


def products_of_views() -> Graph:
    """Each product needs copies of both its operands."""
    nodes = [INPUT, Node("slice", (0,), SHAPE, starts=(3, 3), steps=(-1, -1))]
    last = 1
    while len(nodes) + 2 <= COUNT:
        nodes.append(Node("matmul", (last, 1), SHAPE))
        nodes.append(Node("slice", (len(nodes) - 1,), SHAPE, starts=(3, 3), steps=(-1, -1)))
        last = len(nodes) - 1
    return Graph(tuple(nodes), (last,))


def stages() -> Graph:
    """Elementwise work and sums by turns: as many steps as nodes."""
    nodes = [INPUT]
    while len(nodes) + 3 <= COUNT:
        link = len(nodes) - 1
        nodes += [Node("sum", (link,), (), axes=(0, 1)), Node("broadcast", (link + 1,), SHAPE)]
        nodes.append(Node("add", (link, link + 2), SHAPE))
    return Graph(tuple(nodes), (len(nodes) - 1,))


def fan_out() -> Graph:
    """One value, and as many that need it."""
    nodes, loose = [INPUT, _square(0)], []
    while len(nodes) + 1 < COUNT - COUNT // OPERANDS:
        nodes.append(Node("matmul", (1, 1), SHAPE) if len(nodes) % 2 else Node("negative", (1,), SHAPE))
        loose.append(len(nodes) - 1)
    return _closed(nodes, loose)


def wide_body() -> Graph:
    """A step that reads two thousand views, each another."""
    nodes = [Node("input", shape=(COUNT,)), Node("slice", (0,), (8,), starts=(0,), steps=(1,))]
    while len(nodes) + 2 <= COUNT:
        total, place = len(nodes) - 1, len(nodes) % (COUNT - 8)
        nodes.append(Node("slice", (0,), (8,), starts=(place,), steps=(1,)))
        nodes.append(Node("add", (total, total + 1), (8,)))
    return Graph(tuple(nodes), (len(nodes) - 1,))


def pyramid() -> Graph:
    """Each adds the two before it: as many ways through it as there are Fibonacci numbers."""
    nodes = [INPUT, _square(0)]
    while len(nodes) + 1 < COUNT:
        nodes.append(Node("add", (len(nodes) - 1, len(nodes) - 2), SHAPE))
    nodes.append(Node("sum", (len(nodes) - 1,), (), axes=(0, 1)))
    return Graph(tuple(nodes), (COUNT - 1,))


def every_link_returned() -> Graph:
    """As many outputs as there can be, all ways to read one block through one long chain."""
    graph = lazy_chain("reshape")
    return Graph(graph.nodes, tuple(range(COUNT - limits.KERNEL_OUTPUTS_MAX_COUNT, COUNT)))


GRAPHS: dict[str, Callable[[], Graph]] = {
    **{f"chain of {op}": (lambda op=op: lazy_chain(op)) for op in ("transpose", "reshape", "slice", "broadcast")},  # type: ignore[misc]
    "transposes and reshapes": mixed_lazy_chain,
    "views of a constant": lazy_chain_of_a_constant,
    "a view of each link": views_of_each_link,
    "elementwise chain": elementwise_chain,
    "many reductions of a chain": many_reductions_of_a_chain,
    "reductions along a chain": reductions_along_a_chain,
    "concatenations": concatenations,
    "products of views": products_of_views,
    "stages": stages,
    "fan out": fan_out,
    "wide body": wide_body,
    "pyramid": pyramid,
    "every link returned": every_link_returned,
}
