"""What programs cost: every place that is gone to counts, every time, and memory is what blocks hold."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings

from sparkle_mesh.kernels.accounting import (
    Demand,
    measure,
    peak_bytes,
    program_demand,
    reference_bytes,
    scratch_bytes,
    step_bytes,
    step_flops,
)
from sparkle_mesh.kernels.fusion import fuse
from sparkle_mesh.kernels.graph import Graph, GraphBuilder, Node, WeakScalar
from sparkle_mesh.kernels.ops import TensorType
from sparkle_mesh.kernels.program import MatmulStep, Program, blocks_read, blocks_written
from sparkle_mesh.kernels.reference import evaluate
from tests.kernels.graphs import graphs, inputs_for

# What Python's own objects take beside arrays: frames, array headers, tuples.
PYTHON_BYTES_PER_NODE = 4096
PYTHON_BYTES = 64 * 1024
HUGE = 1 << 40


def f32(*shape: int) -> TensorType:
    return TensorType(shape, "float32")


def test_an_elementwise_step_counts_what_it_computes_reads_and_writes() -> None:
    builder = GraphBuilder([f32(8, 5), f32(5)])
    total = builder.elementwise("add", builder.elementwise("multiply", 0, WeakScalar(2)), 1)
    program = fuse(builder.finish([builder.elementwise("tanh", total)]))
    (step,) = program.steps
    assert step_flops(step) == 40 * (1 + 1 + 15)
    assert step_bytes(step, program) == 4 * (40 + 5 + 40)
    assert program_demand(program) == Demand(40 * 17, 4 * 85, 4 * 85)


def test_matrix_products_count_twice_their_inner_length() -> None:
    builder = GraphBuilder([f32(2, 4, 3), f32(2, 3, 7)])
    assert measure(builder.finish([builder.matmul(0, 1)])) == Demand(2 * 2 * 4 * 3 * 7, 4 * 122, 4 * 122)


def test_writes_count_what_they_copy_and_what_they_fill() -> None:
    builder = GraphBuilder([f32(4)])
    joined = builder.finish([builder.add("concatenate", 0, 0, axes=(0,))])
    assert measure(joined) == Demand(0, 4 * (8 + 8), 4 * (4 + 8))
    builder = GraphBuilder([f32(4)])
    placed = builder.finish([builder.add("place", 0, shape=(9,), starts=(0,), steps=(2,))])
    assert measure(placed) == Demand(0, 4 * (4 + 9 + 4), 4 * (4 + 9))


def test_a_number_repeated_and_reduced_costs_each_of_its_places() -> None:
    builder = GraphBuilder([f32()])
    graph = builder.finish([builder.reduce("sum", builder.broadcast(0, (HUGE,)))])
    demand = measure(graph)
    assert demand.flops >= HUGE
    assert demand.memory_bytes == 8
    builder = GraphBuilder([])
    counted = builder.add("iota", shape=(HUGE,), dtype="float32", axes=(0,))
    assert measure(builder.finish([builder.reduce("max", counted)])).flops >= 2 * HUGE


def test_what_is_computed_again_counts_again() -> None:
    builder = GraphBuilder([f32(100)])
    body = builder.elementwise("exp", 0)
    once = measure(builder.finish([builder.reduce("sum", body)]))
    twice = measure(builder.finish([builder.reduce("sum", body), builder.reduce("max", body)]))
    assert (once.flops, twice.flops) == (1100, 2200)


def test_lengths_of_zero_hide_nothing() -> None:
    builder = GraphBuilder([f32(0, HUGE), f32(1000, 0), f32(0, 1000)])
    assert measure(builder.finish([builder.reduce("sum", 0, [0])])) == Demand(HUGE, 4 * HUGE, 4 * HUGE)
    assert measure(builder.finish([builder.matmul(1, 2)])) == Demand(10**6, 4 * 10**6, 4 * 10**6)
    assert measure(builder.finish([builder.elementwise("exp", 0)])) == Demand(0, 0, 0)


def test_numbers_of_float16_are_reduced_in_larger_ones() -> None:
    builder = GraphBuilder([TensorType((1, 1000), "float16")])
    program = fuse(builder.finish([builder.add("sum", 0, axes=(0,))]))
    assert scratch_bytes(program.steps[0]) == 4000
    assert peak_bytes(program) == 2000 + 2000 + 4000


def test_doubling_doubles() -> None:
    builder = GraphBuilder([f32(1)])
    value = 0
    for _ in range(30):
        value = builder.add("concatenate", value, value, axes=(0,))
    demand = measure(builder.finish([value]))
    assert demand.memory_bytes == 4 * (1 + (1 << 29) + (1 << 30))
    assert demand.moved_bytes > 4 * (1 << 31)


def test_what_nobody_needs_counts_while_it_is_there() -> None:
    nodes = (Node("input", shape=(64, 64)), Node("matmul", (0, 0), (64, 64)), Node("square", (0,), (64, 64)))
    demand = measure(Graph(nodes, (2,)))
    assert demand.flops == 2 * 64**3 + 64**2
    assert demand.memory_bytes == 3 * 64 * 64 * 4 - 64 * 64 * 4


def held_bytes(program: Program) -> int:
    """Return the most that is held at one time, by going through what lives."""
    alive = set(range(program.input_count))
    sizes = [sum(program.blocks[block].nbytes for block in alive)]
    for step, freed in zip(program.steps, program.frees, strict=True):
        assert blocks_read(step) <= alive
        alive |= blocks_written(step)
        sizes.append(sum(program.blocks[block].nbytes for block in alive) + scratch_bytes(step))
        alive -= set(freed)
    assert alive == {*range(program.input_count), *program.outputs}
    return max(sizes)


@settings(max_examples=200)
@given(graphs())
def test_programs_hold_what_is_said(graph: Graph) -> None:
    program = fuse(graph)
    assert peak_bytes(program) == held_bytes(program)
    demand = program_demand(program)
    assert demand.memory_bytes >= sum(tensor.nbytes for tensor in (*graph.inputs, *graph.output_types))
    written = sum(program.blocks[block].nbytes for step in program.steps for block in blocks_written(step))
    assert demand.moved_bytes >= written
    assert demand.flops >= sum(step_flops(step) for step in program.steps if isinstance(step, MatmulStep))


def reference_peak_bytes(graph: Graph) -> int:
    """Return what the reference allocates at most, inputs included."""
    inputs = inputs_for(graph)
    tracemalloc.start()
    try:
        evaluate(graph, inputs)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return peak + sum(array.nbytes for array in inputs)


def python_bytes(graph: Graph) -> int:
    return PYTHON_BYTES + PYTHON_BYTES_PER_NODE * len(graph.nodes)


@settings(max_examples=100, deadline=None)
@given(graphs())
def test_the_reference_takes_no_more_than_is_said(graph: Graph) -> None:
    assert reference_peak_bytes(graph) <= reference_bytes(graph) + python_bytes(graph)


@pytest.mark.parametrize(
    "op", ["exp", "negative", "isnan", "add", "sum", "max", "matmul", "where", "cast", "reshape", "place", "iota"]
)
def test_the_reference_takes_no_more_than_is_said_for_large_operands(op: str) -> None:
    builder = GraphBuilder([f32(1, 700)])
    wide = builder.broadcast(0, (700, 700))
    tall = builder.transpose(wide)
    match op:
        case "sum" | "max":
            last = builder.reduce(op, builder.elementwise("square", tall), [1])
        case "matmul":
            last = builder.matmul(wide, tall)
        case "where":
            last = builder.elementwise("where", builder.elementwise("less", tall, WeakScalar(1)), wide, tall)
        case "cast":
            last = builder.cast(tall, "float64")
        case "reshape":
            last = builder.reshape(tall, (490000,))
        case "place":
            last = builder.add("place", tall, shape=(1400, 700), starts=(1, 0), steps=(2, 1))
        case "iota":
            last = builder.add("iota", shape=(3, 500_000), dtype="float16", axes=(1,))
        case "add":
            last = builder.elementwise("add", wide, tall)
        case _:
            last = builder.elementwise(op, tall)
    graph = builder.finish([last])
    assert reference_peak_bytes(graph) <= reference_bytes(graph) + python_bytes(graph)


def test_the_reference_counts_along_no_axis_of_nothing() -> None:
    graph = Graph((Node("iota", (), (HUGE, 0), "float32", axes=(0,)),), (0,))
    (found,) = evaluate(graph, [])
    assert found.shape == (HUGE, 0)
    assert reference_bytes(graph) == 0
    assert np.asarray(found).nbytes == 0
