"""Programs compute what their graphs mean, in few steps."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from sparkle_mesh.kernels.fusion import fuse
from sparkle_mesh.kernels.graph import Graph, GraphBuilder, Node, WeakScalar
from sparkle_mesh.kernels.ops import TensorType, element_strides
from sparkle_mesh.kernels.program import (
    Body,
    ElementwiseStep,
    MatmulStep,
    Program,
    ReduceStep,
    View,
    WriteStep,
    blocks_read,
    blocks_written,
    collapse,
)
from sparkle_mesh.kernels.reference import evaluate, evaluate_node
from tests.kernels.graphs import graphs, inputs_for

Array = np.ndarray[Any, Any]


def viewed(blocks: list[Array | None], view: View) -> Array:
    block = blocks[view.block]
    assert block is not None, f"block {view.block} is read after it was freed, or before it was written"
    itemsize = block.dtype.itemsize
    assert block.ndim == 1
    strides = tuple(stride * itemsize for stride in view.strides)
    if 0 in view.shape:
        return np.empty(view.shape, block.dtype)
    ends = [view.offset + sum(min(0, (n - 1) * s) for n, s in zip(view.shape, view.strides, strict=True))]
    ends.append(view.offset + sum(max(0, (n - 1) * s) for n, s in zip(view.shape, view.strides, strict=True)))
    assert 0 <= ends[0] <= ends[1] < block.size
    return as_strided(block[view.offset :], view.shape, strides)


def computed(blocks: list[Array | None], body: Body) -> list[Array]:
    slots = [viewed(blocks, view) for view in body.reads]
    for read, dtype in zip(slots, body.read_dtypes, strict=True):
        assert (read.shape, read.dtype.name) == (body.shape, dtype)
    for one in body.instructions:
        operands = [slots[operand] for operand in one.operands]
        assert not one.operand_dtype or operands[-1].dtype.name == one.operand_dtype
        if one.op == "copy":
            result = operands[0]
        elif one.op == "constant":
            result = np.full(body.shape, one.value, one.dtype)
        else:
            result = evaluate_node(Node(one.op, (), body.shape, one.dtype, axes=(one.axis,)), operands)
        assert result.dtype.name == one.dtype
        slots.append(result)
    return slots


def run(program: Program, inputs: list[Array]) -> list[Array]:
    """Run ``program`` step by step; freed blocks are gone."""
    blocks: list[Array | None] = [np.ascontiguousarray(array).reshape(-1) for array in inputs]
    blocks += [None] * (len(program.blocks) - len(blocks))
    with np.errstate(all="ignore"):
        for step, freed in zip(program.steps, program.frees, strict=True):
            for block in blocks_written(step):
                assert block >= program.input_count
                assert blocks[block] is None
            match step:
                case ElementwiseStep(body, results):
                    slots = computed(blocks, body)
                    for slot, block in results:
                        assert program.blocks[block].size == slots[slot].size
                        blocks[block] = slots[slot].reshape(-1).copy()
                case ReduceStep(body, slot, op, axes, dtype, result):
                    value = evaluate_node(Node(op, (), dtype=dtype, axes=axes), [computed(blocks, body)[slot]])
                    blocks[result] = value.reshape(-1)
                case MatmulStep():
                    blocks[step.result] = product(blocks, step).reshape(-1)
                case WriteStep(parts, fill, dtype, result):
                    # What is not written shows.
                    blocks[result] = np.full(program.blocks[result].size, 0 if fill else 77).astype(dtype)
                    for source, target in parts:
                        viewed(blocks, target)[...] = viewed(blocks, source)
            for block in freed:
                blocks[block] = None
    found = []
    for output in program.outputs:
        assert output >= program.input_count
        found.append(blocks[output])
        assert found[-1] is not None
    assert len(set(program.outputs)) == len(program.outputs)
    return found  # type: ignore[return-value]


def product(blocks: list[Array | None], step: MatmulStep) -> Array:
    operands = []
    for block, exchanged, rows, columns in (
        (step.a, step.transpose_a, step.rows, step.inner),
        (step.b, step.transpose_b, step.inner, step.columns),
    ):
        shape = (*step.batch, columns, rows) if exchanged else (*step.batch, rows, columns)
        array = viewed(blocks, View(block, shape, 0, element_strides(shape)))
        operands.append(np.swapaxes(array, -1, -2) if exchanged else array)
    return np.matmul(*operands)


@settings(max_examples=600)
@given(graphs(), st.integers(0, 5))
def test_a_program_computes_what_its_graph_means(graph: Graph, seed: int) -> None:
    inputs = inputs_for(graph, seed)
    wanted = evaluate(graph, inputs)
    found = run(fuse(graph), inputs)
    for one, other, tensor in zip(found, wanted, graph.output_types, strict=True):
        np.testing.assert_allclose(one.reshape(tensor.shape), other, rtol=1e-5, atol=1e-6)


def f32(*shape: int) -> TensorType:
    return TensorType(shape, "float32")


def test_elementwise_work_is_one_step():
    builder = GraphBuilder([f32(8, 5), f32(5)])
    total = builder.elementwise("add", builder.elementwise("multiply", 0, WeakScalar(2)), 1)
    graph = builder.finish([builder.elementwise("multiply", builder.elementwise("tanh", total), 0)])
    (step,) = fuse(graph).steps
    assert isinstance(step, ElementwiseStep)
    # Each operand is read once, however often it is needed; the smaller one with a stride of nothing.
    assert [view.strides for view in step.body.reads] == [(5, 1), (0, 1)]
    assert len(fuse(graph).blocks) == 3


def test_a_reduction_takes_in_what_only_it_needs():
    builder = GraphBuilder([f32(8, 5)])
    square = builder.elementwise("square", 0)
    graph = builder.finish([builder.reduce("sum", square, [1]), builder.reduce("max", square, [0])])
    steps = fuse(graph).steps
    assert [type(step) for step in steps] == [ReduceStep, ReduceStep]
    assert all(blocks_read(step) == {0} for step in steps)


def test_softmax_takes_four_steps_and_frees_what_it_needs_no_more():
    builder = GraphBuilder([f32(8, 5)])
    top = builder.reduce("max", 0, [1], keepdims=True)
    weight = builder.elementwise("exp", builder.elementwise("subtract", 0, top))
    total = builder.reduce("sum", weight, [1], keepdims=True)
    program = fuse(builder.finish([builder.elementwise("divide", weight, total)]))
    assert [type(step).__name__ for step in program.steps] == [
        "ReduceStep",
        "ElementwiseStep",
        "ReduceStep",
        "ElementwiseStep",
    ]
    assert sum(map(len, program.frees)) == len(program.blocks) - 2


def test_matrix_products_take_transposed_operands_as_they_are():
    builder = GraphBuilder([f32(4, 3), f32(5, 3)])
    graph = builder.finish([builder.matmul(0, builder.transpose(1))])
    (step,) = fuse(graph).steps
    assert isinstance(step, MatmulStep)
    assert (step.transpose_a, step.transpose_b) == (False, True)
    assert (step.rows, step.inner, step.columns) == (4, 3, 5)


def test_outputs_are_blocks_of_their_own():
    builder = GraphBuilder([f32(4)])
    total = builder.reduce("sum", 0, keepdims=True)
    program = fuse(builder.finish([0, 0, total, builder.reshape(total, ())]))
    assert len(set(program.outputs)) == 4
    assert 0 not in program.outputs


def test_axes_that_follow_each_other_are_one():
    shape = (2, 1, 3, 4)
    assert collapse(shape, [element_strides(shape), (12, 7, 4, 1)]) == ((24,), ((1,), (1,)))
    assert collapse(shape, [element_strides(shape), (0, 0, 4, 1)]) == ((2, 12), ((12, 1), (0, 1)))
    assert collapse((), [()]) == ((), ((),))
    assert collapse((1, 1), [(1, 1)]) == ((), ((),))
