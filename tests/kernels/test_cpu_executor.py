"""The processors' executor computes what graphs mean, however the work is cut and shared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkle_mesh import limits
from sparkle_mesh.kernels.cpu_executor import CpuExecutor
from sparkle_mesh.kernels.fusion import fuse
from sparkle_mesh.kernels.graph import Graph
from sparkle_mesh.kernels.reference import evaluate
from tests.kernels.graphs import graphs, inputs_for

Array = np.ndarray[Any, Any]
#: What memory holds that nobody has written to.
POISON = 0xA5


@pytest.fixture
def executors() -> Iterator[list[CpuExecutor]]:
    made = [CpuExecutor(1), CpuExecutor(3)]
    yield made
    for executor in made:
        executor.close()


@pytest.fixture(autouse=True)
def _small_pieces() -> Iterator[None]:
    """Cut everything into pieces of few elements, and share whatever can be shared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "CPU_TILE_MAX_COUNT", 7)
        patch.setattr(limits, "CPU_TILE_MIN_COUNT", 2)
        patch.setattr(limits, "CPU_TILE_SIDE_COUNT", 2)
        patch.setattr(limits, "CPU_SHORT_ROW_MAX_COUNT", 3)
        patch.setattr(limits, "CPU_KEPT_MAX_COUNT", 3)
        patch.setattr(limits, "CPU_REDUCTION_PARTS_COUNT", 5)
        patch.setattr(limits, "CPU_DIRECT_TILE_MAX_COUNT", 11)
        patch.setattr(limits, "CPU_ROWS_IN_TURN_COUNT", 2)
        patch.setattr(limits, "CPU_LONG_ROW_MIN_COUNT", 3)
        patch.setattr(limits, "CPU_SHARED_MIN_COUNT", 0)
        patch.setattr(limits, "CPU_PORTIONS_PER_THREAD_COUNT", 2)
        patch.setattr(limits, "CPU_HALF_TILE_SIDE_COUNT", 3)
        patch.setattr(limits, "CPU_SMALL_PRODUCT_MAX_COUNT", 20)
        patch.setattr("sparkle_mesh.kernels.cpu_memory.aligned", poisoned)
        yield


def poisoned(nbytes: int) -> Array:
    return np.full(nbytes, POISON, np.uint8)


def run(executor: CpuExecutor, graph: Graph, inputs: list[Array]) -> list[Array]:
    program = fuse(graph)
    blocks: list[Array | None] = [np.ascontiguousarray(array).reshape(-1) for array in inputs]
    for block in blocks:
        assert block is not None
        block.flags.writeable = False
    blocks += [None] * (len(program.blocks) - len(blocks))
    for output in program.outputs:
        tensor = program.blocks[output]
        memory = np.full(tensor.nbytes, POISON, np.uint8)
        blocks[output] = memory.view(tensor.dtype)
    prepared = executor.prepare(program)
    prepared.run(blocks)
    prepared.run(blocks)
    found = [blocks[output] for output in program.outputs]
    return [one.reshape(tensor.shape) for one, tensor in zip(found, graph.output_types, strict=True)]  # type: ignore[union-attr]


def is_exact(graph: Graph) -> bool:
    """Whether every correct way to compute it gives the same bits."""
    return not any(node.op in ("sum", "prod", "matmul") for node in graph.nodes)


def test_it_computes_what_graphs_mean(executors: list[CpuExecutor]) -> None:
    @settings(max_examples=800, deadline=None)
    @given(graphs(), st.integers(0, 5))
    def holds(graph: Graph, seed: int) -> None:
        inputs = inputs_for(graph, seed)
        wanted = evaluate(graph, inputs)
        one, three = (run(executor, graph, inputs) for executor in executors)
        for alone, shared, other in zip(one, three, wanted, strict=True):
            assert alone.dtype == other.dtype
            np.testing.assert_array_equal(alone, shared)
            if is_exact(graph):
                np.testing.assert_array_equal(alone, other)
            else:
                np.testing.assert_allclose(alone, other, rtol=1e-5, atol=1e-6)

    holds()
