"""What a kernel takes: arithmetic, bytes that are moved, memory. For limits that are declared, and for cost models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparkle_mesh.kernels.accounting import peak_bytes, step_bytes_read, step_bytes_written, step_flops
from sparkle_mesh.kernels.fusion import fuse
from sparkle_mesh.kernels.graph import Graph, Node
from sparkle_mesh.kernels.ops import OPS
from sparkle_mesh.kernels.tracing import Kernel


@dataclass(frozen=True, slots=True)
class Workload:
    """What computing a graph once takes.

    Attributes
    ----------
    flops
        Operations on numbers: :attr:`.ops.Op.flops` for each element, two for each product of a ``matmul``.
    bytes_read, bytes_written
        Of the inputs, each read once, and of the outputs, each written once: what no way to compute it goes below.
    program_flops
        As ``flops``, of the fused program: what two of its steps need is computed by each, if that moves less.
    program_bytes_read, program_bytes_written
        What its steps read and write; a step reads an element once, however often it needs it.
    peak_bytes
        The most memory that blocks take at one time while the program runs, inputs and outputs included.
    steps
        How many the program has.
    """

    flops: int
    bytes_read: int
    bytes_written: int
    program_flops: int
    program_bytes_read: int
    program_bytes_written: int
    peak_bytes: int
    steps: int

    @property
    def bytes_moved(self) -> int:
        """What the program reads and writes."""
        return self.program_bytes_read + self.program_bytes_written

    @property
    def arithmetic_intensity(self) -> float:
        """Operations of the program for each byte that it moves; 0 if it moves none."""
        return self.program_flops / self.bytes_moved if self.bytes_moved else 0.0


def analyze_workload(kernel: Graph | Kernel, *arguments: Any, **keywords: Any) -> Workload:
    """Return what computing ``kernel`` takes.

    Parameters
    ----------
    kernel
        A graph, or a kernel, which is traced for ``arguments`` and ``keywords``: arrays, numbers, or
        :class:`.ops.TensorType` in their place.

    Raises
    ------
    KernelError
        As from :meth:`.tracing.Kernel.trace`.
    """
    graph = kernel.trace(*arguments, **keywords) if isinstance(kernel, Kernel) else kernel
    program = fuse(graph)
    return Workload(
        flops=sum(_node_flops(graph, node) for node in graph.nodes),
        bytes_read=sum(tensor.nbytes for tensor in graph.inputs),
        bytes_written=sum(tensor.nbytes for tensor in graph.output_types),
        program_flops=sum(step_flops(step, moves=False) for step in program.steps),
        program_bytes_read=sum(step_bytes_read(step, program) for step in program.steps),
        program_bytes_written=sum(step_bytes_written(step, program) for step in program.steps),
        peak_bytes=peak_bytes(program),
        steps=len(program.steps),
    )


def _node_flops(graph: Graph, node: Node) -> int:
    op = OPS[node.op]
    if op.kind == "matmul":
        return 2 * node.type.size * graph.nodes[node.operands[0]].shape[-1]
    if op.kind == "reduction":
        return op.flops * graph.nodes[node.operands[0]].type.size
    return op.flops * node.type.size
