"""What a program costs, counted step by step: arithmetic, bytes moved, and memory held at one time.

Counted is what executors go through, not what the graph says: a step that reduces a number repeated to 2^40 places goes
to each of them, and an expression that three reductions take in is computed three times. What a processor adds to that
(cache lines of which one element is used, what an executor keeps for blocks of a body) is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from sparkle_mesh.kernels.fusion import fuse
from sparkle_mesh.kernels.graph import Graph, Node
from sparkle_mesh.kernels.ops import OPS, TensorType
from sparkle_mesh.kernels.program import (
    Body,
    ElementwiseStep,
    MatmulStep,
    Program,
    ReduceStep,
    Step,
    View,
    WriteStep,
    blocks_written,
)

# What these count for in a body: a constant is there once, the others are made for each place.
_FLOPS_BESIDE_OPS = {"constant": 0, "iota": 1, "copy": 1}


@dataclass(frozen=True, slots=True)
class Demand:
    """What running a kernel once takes.

    Attributes
    ----------
    flops
        Operations on elements, those that move integers and bools included; transcendental functions count for several.
    moved_bytes
        Read from memory and written to it: by each step, each element that it needs once.
    memory_bytes
        Held at one time, inputs and outputs included.
    """

    flops: int
    moved_bytes: int
    memory_bytes: int


def measure(graph: Graph) -> Demand:
    """Return what running ``graph`` takes, fused; at most, in the terms of its steps."""
    return program_demand(fuse(graph))


def program_demand(program: Program) -> Demand:
    """Return what running ``program`` takes."""
    flops = sum(map(step_flops, program.steps))
    moved = sum(step_bytes(step, program) for step in program.steps)
    return Demand(flops, moved, peak_bytes(program))


def step_flops(step: Step, *, moves: bool = True) -> int:
    """Return the operations on elements of one step; none where a block is only copied into another.

    Parameters
    ----------
    moves
        Whether every place that is gone to counts, also where nothing is computed: one at least for each element of a
        body, and of the result. Otherwise it is arithmetic alone.
    """
    match step:
        case ElementwiseStep(body=body):
            return prod(body.shape) * max(int(moves), _flops_per_place(body, moves))
        case ReduceStep(body=body):
            count = prod(body.shape) * (1 + _flops_per_place(body, moves))
            # Sums over no element still are to be written.
            return max(count, _kept_size(step)) if moves else count
        case MatmulStep(batch=batch, rows=rows, inner=inner, columns=columns):
            return prod(batch) * rows * columns * max(int(moves), 2 * inner)
    return 0


def _flops_per_place(body: Body, moves: bool) -> int:
    ops = [instruction.op for instruction in body.instructions]
    return sum(moves * _FLOPS_BESIDE_OPS[op] if op in _FLOPS_BESIDE_OPS else OPS[op].flops for op in ops)


def step_bytes(step: Step, program: Program) -> int:
    """Return the bytes that one step reads and writes, each element that it needs once."""
    return step_bytes_read(step, program) + step_bytes_written(step, program)


def step_bytes_read(step: Step, program: Program) -> int:
    """Return the bytes that one step reads."""
    match step:
        case ElementwiseStep(body=body) | ReduceStep(body=body):
            return sum(_view_bytes(view, program) for view in body.reads)
        case MatmulStep(a=a, b=b):
            return sum(program.blocks[block].nbytes for block in {a, b})
        case WriteStep(parts=parts):
            return sum(_view_bytes(source, program) for source, _ in parts)


def step_bytes_written(step: Step, program: Program) -> int:
    """Return the bytes that one step writes; what is filled first is written twice where something is put."""
    written = sum(program.blocks[block].nbytes for block in blocks_written(step))
    if not isinstance(step, WriteStep):
        return written
    placed = sum(prod(target.shape) for _, target in step.parts) * np.dtype(step.dtype).itemsize
    return written * step.fill + placed


def _view_bytes(view: View, program: Program) -> int:
    """Return the bytes of the different elements that a view shows, at most."""
    if 0 in view.shape:
        return 0
    block = program.blocks[view.block]
    shown = prod(length for length, stride in zip(view.shape, view.strides, strict=True) if stride)
    return min(shown, block.size) * np.dtype(block.dtype).itemsize


def peak_bytes(program: Program) -> int:
    """Return what is held at one time: inputs always, other blocks from their step until they are freed."""
    held = peak = sum(block.nbytes for block in program.blocks[: program.input_count])
    for step, freed in zip(program.steps, program.frees, strict=True):
        held += sum(program.blocks[block].nbytes for block in blocks_written(step))
        peak = max(peak, held + scratch_bytes(step))
        held -= sum(program.blocks[block].nbytes for block in freed)
    return peak


def scratch_bytes(step: Step) -> int:
    """Return what a step holds beside its blocks, in proportion to them: numbers of float16 are reduced as float32."""
    if isinstance(step, ReduceStep) and step.dtype == "float16":
        return 4 * _kept_size(step)
    return 0


def _kept_size(step: ReduceStep) -> int:
    """Return how many elements the result has."""
    return prod(length for axis, length in enumerate(step.body.shape) if axis not in step.axes)


def reference_bytes(graph: Graph) -> int:
    """Return how much memory :func:`.reference.evaluate` takes at most: it keeps all values, and fuses nothing."""
    types = [node.type for node in graph.nodes]
    kept = sum(0 if node.op in _VIEWS_OF_NUMPY else node.type.nbytes for node in graph.nodes)
    return kept + max(_temporary_bytes(node, types) for node in graph.nodes)


_VIEWS_OF_NUMPY = frozenset({"transpose", "broadcast", "slice", "constant"})


def _temporary_bytes(node: Node, types: list[TensorType]) -> int:
    """Return what NumPy takes beside operands and result while it computes ``node``."""
    if node.op == "iota" and 0 not in node.shape:
        return 8 * node.shape[node.axes[0]]
    if node.op == "matmul":
        # Operands that BLAS does not take as they lie are copied.
        return sum(types[operand].nbytes for operand in node.operands)
    return 0
