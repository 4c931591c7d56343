"""What kernels take is what can be counted by hand, and no program moves less than it must."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from sparkle_mesh.kernels.accounting import peak_bytes
from sparkle_mesh.kernels.fusion import fuse
from sparkle_mesh.kernels.graph import Graph, GraphBuilder, WeakScalar
from sparkle_mesh.kernels.ops import OPS, TensorType
from sparkle_mesh.kernels.tracing import kernel
from sparkle_mesh.kernels.workload import analyze_workload
from tests.kernels.graphs import graphs


def f32(*shape: int) -> TensorType:
    return TensorType(shape, "float32")


def test_elementwise_work():
    found = analyze_workload(kernel(lambda x, y: np.tanh(x * 2 + y)), f32(100, 10), f32(10))
    assert found.flops == found.program_flops == 1000 * (1 + 1 + OPS["tanh"].flops)
    assert found.bytes_read == found.program_bytes_read == 4 * (1000 + 10)
    assert found.bytes_written == found.program_bytes_written == 4000
    assert found.peak_bytes == 4 * (1000 + 10 + 1000)
    assert found.steps == 1
    assert found.arithmetic_intensity == pytest.approx(17 * 1000 / 8040)


def test_products_of_matrices():
    found = analyze_workload(kernel(lambda a, b: a @ b), f32(7, 3, 4), f32(4, 5))
    # The second is repeated, which is copied.
    assert found.flops == found.program_flops == 2 * 7 * 3 * 4 * 5
    assert found.bytes_read == 4 * (84 + 20)
    assert found.bytes_written == 4 * 105
    assert found.program_bytes_read == 4 * (20 + 84 + 140)
    square = analyze_workload(kernel(lambda a: a @ a), f32(4, 4))
    assert square.program_bytes_read == 64


def test_reductions():
    found = analyze_workload(kernel(lambda x: np.square(x).sum(axis=1)), f32(8, 5))
    assert (found.flops, found.steps) == (80, 1)
    assert (found.bytes_written, found.program_bytes_read) == (32, 160)
    shared = GraphBuilder([f32(8, 5)])
    square = shared.elementwise("square", 0)
    graph = shared.finish([shared.reduce("sum", square, [1]), shared.reduce("max", square, [0])])
    found = analyze_workload(graph)
    # Each reduction squares for itself: cheaper than memory.
    assert (found.flops, found.program_flops) == (3 * 40, 4 * 40)


def test_moves():
    found = analyze_workload(kernel(lambda x, y: np.concatenate([x, y[::2]])), f32(4), f32(6))
    assert (found.flops, found.program_flops) == (0, 0)
    assert (found.program_bytes_read, found.program_bytes_written) == (4 * 7, 4 * 7)
    builder = GraphBuilder([f32(3)])
    placed = analyze_workload(builder.finish([builder.add("place", 0, shape=(9,), starts=(0,), steps=(3,))]))
    # Zeros, then the elements.
    assert placed.program_bytes_written == 4 * (9 + 3)
    assert placed.arithmetic_intensity == 0


def test_memory_that_is_freed_is_taken_again():
    builder = GraphBuilder([f32(100, 100)])
    value = 0
    for _ in range(6):
        value = builder.matmul(value, value)
    graph = builder.finish([value])
    assert peak_bytes(fuse(graph)) == 3 * 40000
    assert analyze_workload(graph).peak_bytes == 3 * 40000


def test_nothing_to_do():
    found = analyze_workload(kernel(lambda x: x), f32(0, 3))
    assert (found.flops, found.bytes_moved, found.arithmetic_intensity) == (0, 0, 0.0)
    builder = GraphBuilder([])
    found = analyze_workload(builder.finish([builder.broadcast(builder.constant(1.0), (4,))]))
    assert (found.bytes_read, found.bytes_written, found.program_bytes_written) == (0, 32, 32)


def test_repeated_elements_are_read_once():
    builder = GraphBuilder([f32(4)])
    wide = builder.broadcast(0, (1000, 4))
    found = analyze_workload(builder.finish([builder.elementwise("add", wide, WeakScalar(1.0))]))
    assert found.program_bytes_read == 16


@settings(max_examples=200)
@given(graphs())
def test_programs_do_no_less_than_they_must(graph: Graph):
    found = analyze_workload(graph)
    assert found.program_bytes_written >= found.bytes_written
    assert found.peak_bytes >= found.bytes_read + found.bytes_written
    assert found.steps == len(fuse(graph).steps)
    # Inputs that no output needs are not read; nothing else costs less than it is counted for.
    assert found.flops >= 0
    assert found.program_flops >= 0
