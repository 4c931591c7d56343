"""Parts of a kernel make up the whole."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkle_mesh.kernels.graph import Graph, GraphBuilder, WeakScalar
from sparkle_mesh.kernels.ops import TensorType
from sparkle_mesh.kernels.reference import evaluate
from sparkle_mesh.kernels.splitting import Split, split
from tests.kernels.graphs import graphs, inputs_for

Array = np.ndarray[Any, Any]
COMBINE = {"sum": np.add, "prod": np.multiply, "max": np.maximum, "min": np.minimum}


def in_parts(found: Split, inputs: list[Array], counts: list[int]) -> list[Array]:
    assert sum(counts) == found.length
    parts: list[list[Array]] = [[] for _ in found.output_axes]
    start = 0
    for count in counts:
        taken = [
            array if axis is None else np.take(array, range(start, start + count), axis=axis)
            for array, axis in zip(inputs, found.input_axes, strict=True)
        ]
        start += count
        for some, one in zip(parts, evaluate(found.part(count), taken), strict=True):
            some.append(one)
    whole = []
    for some, axis, op in zip(parts, found.output_axes, found.output_ops, strict=True):
        assert (axis is None) != (op is None)
        whole.append(np.concatenate(some, axis=axis) if op is None else COMBINE[op].reduce(np.stack(some)))
    return whole


@settings(max_examples=600)
@given(graphs(), st.integers(0, 3))
def test_parts_make_up_the_whole(graph: Graph, cut: int) -> None:
    found = split(graph)
    if found is None:
        return
    inputs = inputs_for(graph)
    first = min(max(cut, 1), found.length - 1)
    together = in_parts(found, inputs, [first, found.length - first])
    for one, other in zip(together, evaluate(graph, inputs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
        assert one.dtype == other.dtype


def f32(*shape: int) -> TensorType:
    return TensorType(shape, "float32")


def test_elementwise_work_is_split_and_what_is_smaller_is_taken_whole():
    builder = GraphBuilder([f32(8, 5), f32(5), f32()])
    scaled = builder.elementwise("multiply", builder.elementwise("add", 0, 1), 2)
    found = split(builder.finish([builder.elementwise("multiply", scaled, WeakScalar(3.0))]))
    assert found is not None
    assert (found.length, found.input_axes, found.output_axes, found.output_ops) == (8, (0, None, None), (0,), (None,))
    assert found.part(3).inputs == (f32(3, 5), f32(5), f32())


def test_sums_over_the_axis_are_partial_and_end_there():
    builder = GraphBuilder([f32(8, 5)])
    total = builder.reduce("sum", builder.elementwise("square", 0))
    found = split(builder.finish([total, builder.reduce("max", 0, [1])]))
    assert found is not None
    assert (found.output_axes, found.output_ops) == ((None, 0), ("sum", None))
    # What is done with a sum is done once it is whole.
    assert split(builder.finish([builder.elementwise("sqrt", total)])) is None


def test_rows_of_a_matrix_product_are_parts_though_the_other_has_as_many():
    builder = GraphBuilder([f32(6, 6), f32(6, 6)])
    found = split(builder.finish([builder.matmul(0, 1)]))
    assert found is not None
    assert found.input_axes == (0, None)
    builder = GraphBuilder([f32(6, 4), f32(6, 3)])
    found = split(builder.finish([builder.matmul(builder.transpose(0), 1)]))
    assert found is not None
    assert (found.input_axes, found.output_ops) == ((0, 0), ("sum",))


def test_what_is_repeated_for_one_and_summed_for_another_is_split_for_both_or_not_at_all():
    builder = GraphBuilder([f32(8), f32()])
    repeated = builder.broadcast(1, (8,))
    both = builder.elementwise("add", 0, repeated)
    total = builder.reduce("sum", repeated)
    assert split(builder.finish([builder.elementwise("multiply", both, total)])) is None
    graph = builder.finish([both, total])
    found = split(graph)
    assert found is not None
    assert found.output_ops == (None, "sum")
    inputs = inputs_for(graph)
    np.testing.assert_allclose(in_parts(found, inputs, [3, 5])[1], 8 * inputs[1], rtol=1e-5)


def test_what_mixes_parts_is_not_split():
    builder = GraphBuilder([f32(6)])
    backwards = builder.add("slice", 0, shape=(6,), starts=(5,), steps=(-1,))
    assert split(builder.finish([builder.elementwise("add", 0, backwards)])) is None
    builder = GraphBuilder([f32(6)])
    place = builder.add("iota", shape=(6,), dtype="float32", axes=(0,))
    assert split(builder.finish([builder.elementwise("add", 0, place)])) is None
    builder = GraphBuilder([f32(6, 2)])
    assert split(builder.finish([builder.add("concatenate", 0, 0, axes=(0,))])) is None
    assert split(builder.finish([builder.reshape(0, (12,))])) is None
    assert split(GraphBuilder([f32()]).finish([0])) is None
