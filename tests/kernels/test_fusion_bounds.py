"""Fusing takes time and room in proportion to a graph, whatever the graph is; views stay within their blocks."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkle_mesh import limits
from sparkle_mesh.kernels.accounting import program_demand
from sparkle_mesh.kernels.fusion import fuse
from sparkle_mesh.kernels.graph import Graph, GraphBuilder, Node, check_graph
from sparkle_mesh.kernels.ops import TensorType
from sparkle_mesh.kernels.program import ElementwiseStep, Program, ReduceStep, View, WriteStep, blocks_read
from sparkle_mesh.kernels.reference import evaluate
from tests.kernels.adversarial import GRAPHS
from tests.kernels.graphs import graphs, inputs_for
from tests.kernels.test_fusion import run

# What takes a tenth of this, where nothing is measured beside; what is quadratic takes more.
LIMIT_S = 4.0


def views(program: Program) -> list[View]:
    found: list[View] = []
    for step in program.steps:
        match step:
            case ElementwiseStep(body=body) | ReduceStep(body=body):
                found += body.reads
            case WriteStep(parts=parts):
                found += [view for pair in parts for view in pair]
    return found


def instruction_count(program: Program) -> int:
    steps = [step for step in program.steps if isinstance(step, ElementwiseStep | ReduceStep)]
    return sum(len(step.body.instructions) for step in steps)


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_at_the_bounds_are_fused_soon(name: str) -> None:
    graph = GRAPHS[name]()
    start = time.process_time()
    check_graph(graph)
    program = fuse(graph)
    program_demand(program)
    assert time.process_time() - start < LIMIT_S
    # Copies beside the nodes of the graph; each computed once in its group, and again for some reductions.
    assert instruction_count(program) <= (limits.KERNEL_RECOMPUTED_MAX_COUNT + 1) * 3 * len(graph.nodes)
    found, wanted = run(program, inputs_for(graph)), evaluate(graph, inputs_for(graph))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one.reshape(other.shape), other, rtol=1e-3)


@pytest.mark.parametrize("sharing", range(1, 8))
def test_what_many_reductions_need_is_stored_for_them(sharing: int) -> None:
    builder = GraphBuilder([TensorType((6, 5, 4), "float32")])
    body = builder.elementwise("exp", 0)
    axes = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
    program = fuse(builder.finish([builder.reduce("sum", body, axes[place]) for place in range(sharing)]))
    is_stored = sharing > limits.KERNEL_RECOMPUTED_MAX_COUNT
    assert len(program.steps) == sharing + is_stored
    assert instruction_count(program) == (1 if is_stored else sharing)


def test_no_expression_is_computed_again_and_again_below_others() -> None:
    """Ten expressions over one, each reduced alone: some take it in, and the others read what is stored."""
    builder = GraphBuilder([TensorType((6, 5), "float32")])
    shared = builder.elementwise("exp", 0)
    unary = ("negative", "sqrt", "log", "sin", "cos", "tan", "tanh", "floor", "ceil", "square")
    outputs = [builder.reduce("sum", builder.elementwise(op, shared)) for op in unary]
    program = fuse(builder.finish(outputs))
    computed = sum(one.op == "exp" for step in program.steps for one in getattr(step, "body").instructions)  # noqa: B009
    assert computed == limits.KERNEL_RECOMPUTED_MAX_COUNT + 1


@st.composite
def sliced(draw: st.DrawFn) -> Graph:
    """Slices of slices, with any starts and steps where they do not matter."""
    shape = draw(st.sampled_from([(3, 4), (1, 5), (2, 0), (4, 1)]))
    builder = GraphBuilder([TensorType(shape, "float32")])
    value = 0
    for _ in range(draw(st.integers(1, 5))):
        whole = builder.type_of(value).shape
        starts, steps, counts = [], [], []
        for length in whole:
            count = draw(st.integers(0, min(length, 2)))
            far = st.integers(-(2**62), 2**62)
            step = draw(far.filter(bool)) if count < 2 else 1
            starts.append(draw(st.integers(0, length - count)) if count else draw(far))
            steps.append(step)
            counts.append(count)
        if draw(st.booleans()):
            value = builder.add("slice", value, shape=tuple(counts), starts=tuple(starts), steps=tuple(steps))
        elif all(count == length for count, length in zip(counts, whole, strict=True)):
            value = builder.add("place", value, shape=(5, 5), starts=tuple(starts), steps=tuple(steps))
    return builder.finish([builder.elementwise("square", value)])


@settings(max_examples=200)
@given(st.one_of(graphs(), sliced()))
def test_views_stay_within_their_blocks(graph: Graph) -> None:
    program = fuse(graph)
    for view in views(program):
        numbers = (view.offset, *view.strides)
        if 0 in view.shape:
            # Nothing is there; the numbers are such as processors count with.
            assert max(map(abs, numbers)) <= limits.KERNEL_ELEMENTS_MAX_COUNT
            continue
        size = program.blocks[view.block].size
        assert max(map(abs, numbers)) <= size
        pairs = [(stride, length - 1) for stride, length in zip(view.strides, view.shape, strict=True)]
        assert view.offset + sum(min(0, stride * steps) for stride, steps in pairs) >= 0
        assert view.offset + sum(max(0, stride * steps) for stride, steps in pairs) < size
    inputs = inputs_for(graph)
    for one, other in zip(run(program, inputs), evaluate(graph, inputs), strict=True):
        np.testing.assert_allclose(one.reshape(other.shape), other, rtol=1e-5)


def test_what_nobody_needs_is_not_computed() -> None:
    nodes = (Node("input", shape=(4,)), Node("exp", (0,), (4,)), Node("square", (0,), (4,)))
    (step,) = fuse(Graph(nodes, (2,))).steps
    assert isinstance(step, ElementwiseStep)
    assert [one.op for one in step.body.instructions] == ["square"]
    assert blocks_read(step) == {0}
