"""Kernels as bytes: one form for each graph, checked on the way in as what comes from strangers.

A graph is ``[version, nodes, outputs]``, and a node ``[form, …]`` with what its operation needs and nothing else: types
that follow from operands are worked out anew, so they cannot be wrong. Two equal graphs have equal bytes, and only
these are taken: whatever else would decode to the same graph (longer integers, other NaNs, fields too many) is refused.
So the SHA-256 of the bytes is the graph's identity.

Numbers are Python's: 64-bit integers with or without sign, bools, and floats of 64 bits, exact to the last one; of NaN
there is one, whatever its sign and payload.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from sparkle_mesh import limits, wire
from sparkle_mesh.errors import KernelError, ProtocolError, VersionError
from sparkle_mesh.kernels.accounting import Demand, measure
from sparkle_mesh.kernels.graph import Graph, Node, check_graph
from sparkle_mesh.kernels.ops import TensorType, infer
from sparkle_mesh.kernels.wire_messages import EncodedGraph, EncodedKernel, Versioned, form_of

GRAPH_VERSION = 1
KERNEL_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelBounds:
    """What a kernel from elsewhere may be, and may take, to be accepted.

    Attributes
    ----------
    max_encoded_bytes
        Of the graph as bytes.
    max_nodes, max_operands
        In all; the operands are those of all nodes together.
    max_rank, max_elements
        Of each value, those that are only read in another way among them.
    max_flops, max_bytes, max_memory_bytes
        Of its :class:`.accounting.Demand`.
    """

    max_encoded_bytes: int = limits.KERNEL_ENCODED_MAX_BYTES
    max_nodes: int = limits.KERNEL_NODES_MAX_COUNT
    max_operands: int = limits.KERNEL_OPERANDS_IN_ALL_MAX_COUNT
    max_rank: int = limits.KERNEL_RANK_MAX_COUNT
    max_elements: int = limits.KERNEL_ELEMENTS_MAX_COUNT
    max_flops: int = limits.KERNEL_FLOPS_MAX_COUNT
    max_bytes: int = limits.KERNEL_MOVED_MAX_BYTES
    max_memory_bytes: int = limits.KERNEL_MEMORY_MAX_BYTES


DEFAULT_BOUNDS = KernelBounds()


@dataclass(frozen=True, slots=True)
class DeclaredKernel:
    """A kernel, and what running it once takes at most, as whoever sends it says."""

    graph: Graph
    demand: Demand


def declare(graph: Graph) -> DeclaredKernel:
    """Return ``graph`` with what it takes, measured."""
    return DeclaredKernel(graph, measure(graph))


# --- Graphs ---------------------------------------------------------------------------------------


def encode_graph(graph: Graph) -> bytes:
    """Return ``graph`` as bytes, the same for equal graphs.

    Raises
    ------
    KernelError
        If it is no valid graph, has nodes that no output needs or that carry what their operation does not use, or
        takes more than ``limits.KERNEL_ENCODED_MAX_BYTES`` bytes.
    """
    check_graph(graph)
    encoded = _encoded(graph)
    try:
        decoded = _opened(encoded, DEFAULT_BOUNDS)
    except ProtocolError as error:
        raise KernelError(f"this kernel cannot be sent: {error}") from error
    for number, (node, found) in enumerate(zip(graph.nodes, decoded.nodes, strict=True)):
        if node != found:
            raise KernelError(f"node {number} says more than can be sent: {node}, where {found} would do")
    return encoded


def decode_graph(data: bytes, *, bounds: KernelBounds = DEFAULT_BOUNDS) -> Graph:
    """Return the graph that :func:`encode_graph` made ``data`` of, checked in all that can be wrong with it.

    Raises
    ------
    VersionError
        If it is of a version that is not known here.
    ProtocolError
        If it is anything else than such bytes, or of a graph that is beyond ``bounds``.
    """
    graph = _opened(data, bounds)
    _check_demand(measure(graph), bounds)
    return graph


def graph_digest(graph: Graph) -> bytes:
    """Return the 32 bytes that stand for ``graph`` and no other; raises KernelError as :func:`encode_graph`."""
    return hashlib.sha256(encode_graph(graph)).digest()


def _encoded(graph: Graph) -> bytes:
    nodes = tuple(map(form_of, graph.nodes))
    return wire.encode(EncodedGraph(version=GRAPH_VERSION, nodes=nodes, outputs=tuple(map(int, graph.outputs))))


def _opened(data: bytes, bounds: KernelBounds) -> Graph:
    """Decode ``data`` and check all but what the graph takes to run."""
    max_bytes = min(bounds.max_encoded_bytes, limits.KERNEL_ENCODED_MAX_BYTES)
    version = wire.decode(data, Versioned, max_bytes=max_bytes).version
    if version != GRAPH_VERSION:
        raise VersionError(f"this kernel is of version {version}; only {GRAPH_VERSION} is known here")
    message = wire.decode(data, EncodedGraph, max_bytes=max_bytes)
    if len(message.nodes) > bounds.max_nodes:
        raise ProtocolError(f"a kernel of {len(message.nodes)} nodes is over the limit of {bounds.max_nodes}")
    try:
        graph = Graph(_typed([form.node() for form in message.nodes], bounds), message.outputs)
        check_graph(graph)
    except KernelError as error:
        text = str(error)[: limits.REASON_MAX_CHARS]
        raise ProtocolError(f"these bytes are no valid kernel: {text}") from error
    _check_need(graph)
    if _encoded(graph) != data:
        raise ProtocolError("this kernel is encoded in another way than the one that there is for it")
    return graph


def _typed(nodes: list[Node], bounds: KernelBounds) -> tuple[Node, ...]:
    """Return ``nodes`` with the types that follow from their operands."""
    operand_count = sum(len(node.operands) for node in nodes)
    if operand_count > bounds.max_operands:
        raise KernelError(f"all nodes together have {operand_count} operands, over the limit of {bounds.max_operands}")
    typed: list[Node] = []
    types: list[TensorType] = []
    for number, node in enumerate(nodes):
        if any(operand >= number for operand in node.operands):
            raise KernelError(f"node {number} has operands {node.operands}, not all before it")
        found = infer(node.op, [types[operand] for operand in node.operands], node)
        if len(found.shape) > bounds.max_rank:
            raise KernelError(f"node {number} has {len(found.shape)} dimensions, over the limit of {bounds.max_rank}")
        if found.size > bounds.max_elements:
            raise KernelError(f"node {number} has {found.size} elements, over the limit of {bounds.max_elements}")
        typed.append(replace(node, shape=found.shape, dtype=found.dtype))
        types.append(found)
    return tuple(typed)


def _check_need(graph: Graph) -> None:
    """Raise ProtocolError if there are nodes, other than inputs, that no output needs."""
    needed = set(graph.outputs) | set(range(len(graph.inputs)))
    for number in range(len(graph.nodes) - 1, -1, -1):
        if number not in needed:
            raise ProtocolError(f"node {number} of this kernel is needed by no output; leave it out")
        needed.update(graph.nodes[number].operands)


# --- Kernels with what they take ------------------------------------------------------------------


def encode_kernel(kernel: DeclaredKernel) -> bytes:
    """Return a kernel and what it takes as bytes.

    Raises
    ------
    KernelError
        As :func:`encode_graph`; or if it declares less than :func:`.accounting.measure` finds, or more than 2^63.
    """
    try:
        _check_declared(measure(kernel.graph), kernel.demand)
        _check_demand(kernel.demand, _SAYABLE)
    except ProtocolError as error:
        raise KernelError(f"this kernel cannot be sent: {error}") from error
    message = EncodedKernel(
        version=KERNEL_VERSION,
        flops=kernel.demand.flops,
        moved_bytes=kernel.demand.moved_bytes,
        memory_bytes=kernel.demand.memory_bytes,
        graph=encode_graph(kernel.graph),
    )
    return wire.encode(message)


def decode_kernel(data: bytes, *, bounds: KernelBounds = DEFAULT_BOUNDS) -> DeclaredKernel:
    """Return the kernel that ``data`` holds: what it declares is within ``bounds``, and what it takes within that.

    Raises
    ------
    VersionError
        If it is of a version that is not known here.
    ProtocolError
        If it is anything else than a valid kernel, or is beyond ``bounds``, or takes more than it declares.
    """
    max_bytes = bounds.max_encoded_bytes + limits.KERNEL_DECLARATION_MAX_BYTES
    version = wire.decode(data, wire.Versioned, max_bytes=max_bytes).version
    if version != KERNEL_VERSION:
        raise VersionError(f"this declared kernel is of version {version}; only {KERNEL_VERSION} is known here")
    message = wire.decode(data, EncodedKernel, max_bytes=max_bytes)
    declared = Demand(message.flops, message.moved_bytes, message.memory_bytes)
    # Before the graph is looked at: who declares too much has it refused at once.
    _check_demand(declared, bounds)
    graph = _opened(message.graph, bounds)
    _check_declared(measure(graph), declared)
    return DeclaredKernel(graph, declared)


def _check_demand(demand: Demand, bounds: KernelBounds) -> None:
    for what, found, limit in (
        ("operations", demand.flops, bounds.max_flops),
        ("bytes moved", demand.moved_bytes, bounds.max_bytes),
        ("bytes of memory", demand.memory_bytes, bounds.max_memory_bytes),
    ):
        if found > limit:
            raise ProtocolError(f"a kernel that takes {found} {what} is over the limit of {limit}")


def _check_declared(measured: Demand, declared: Demand) -> None:
    for what, found, said in (
        ("operations", measured.flops, declared.flops),
        ("bytes moved", measured.moved_bytes, declared.moved_bytes),
        ("bytes of memory", measured.memory_bytes, declared.memory_bytes),
    ):
        if found > said:
            raise ProtocolError(f"a kernel takes {found} {what}, and declares {said}")


_SAYABLE = KernelBounds(max_flops=2**63 - 1, max_bytes=2**63 - 1, max_memory_bytes=2**63 - 1)
