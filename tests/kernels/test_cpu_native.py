"""Loops in C give the bits that NumPy gives, wherever they take over."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkle_mesh import limits
from sparkle_mesh.devices import c_compiler
from sparkle_mesh.devices.c_compiler import CCompiler
from sparkle_mesh.errors import KernelError, KernelStoppedError
from sparkle_mesh.kernels.cpu_executor import CpuExecutor
from sparkle_mesh.kernels.cpu_native import NativeElementwise, in_c
from sparkle_mesh.kernels.cpu_tiles import Access
from sparkle_mesh.kernels.fusion import fuse
from sparkle_mesh.kernels.graph import Graph, GraphBuilder, WeakScalar
from sparkle_mesh.kernels.ops import DTYPES, FLOATS, OPS, TensorType
from sparkle_mesh.kernels.reference import evaluate
from tests.kernels.graphs import bits, graphs, inputs_for, values

Array = np.ndarray[Any, Any]
pytestmark = pytest.mark.skipif(
    all(shutil.which(name) is None for name in ("cc", "gcc", "clang")), reason="there is no C compiler"
)


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch) -> Iterator[CpuExecutor]:
    """An executor that has everything compiled that can be, in small pieces."""
    monkeypatch.setattr(c_compiler._LOADED, "functions", {})
    monkeypatch.setattr(limits, "C_RUN_MIN_COUNT", 1)
    monkeypatch.setattr(limits, "C_COMPILED_MIN_COUNT", 1)
    monkeypatch.setattr(limits, "C_PIECE_MIN_COUNT", 5)
    monkeypatch.setattr(limits, "C_PIECE_MAX_COUNT", 61)
    monkeypatch.setattr(limits, "C_STREAMED_MIN_BYTES", 1000)
    monkeypatch.setattr(limits, "C_STREAMED_COUNT", 7)
    monkeypatch.setattr(limits, "CPU_SHARED_MIN_COUNT", 0)
    monkeypatch.setattr(limits, "C_ROW_MIN_BYTES", 1)
    made = CpuExecutor(3)
    yield made
    made.close()


@pytest.fixture
def native_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects what ran in C."""
    found: list[str] = []
    run = NativeElementwise.run

    def counted(self: NativeElementwise, *arguments: Any) -> bool:
        did = run(self, *arguments)
        found.extend([self._native.source.name] * did)
        return did

    monkeypatch.setattr(NativeElementwise, "run", counted)
    return found


def results_of(executor: CpuExecutor, graph: Graph, inputs: list[Array], runs: int = 3) -> list[list[Array]]:
    """Return the outputs of each run, the last of them with everything compiled."""
    program = fuse(graph)
    prepared = executor.prepare(program)
    found = []
    for number in range(runs):
        if number == runs - 1:
            executor.compiler.wait()
        blocks: list[Array | None] = [np.ascontiguousarray(array).reshape(-1) for array in inputs]
        blocks += [None] * (len(program.blocks) - len(blocks))
        for output in program.outputs:
            blocks[output] = np.empty(program.blocks[output].size, program.blocks[output].dtype)
        prepared.run(blocks)
        found.append([blocks[output] for output in program.outputs])
    return found  # type: ignore[return-value]


def check(executor: CpuExecutor, graph: Graph, inputs: list[Array]) -> None:
    by_numpy, *_, in_c = results_of(executor, graph, inputs)
    for one, other in zip(by_numpy, in_c, strict=True):
        np.testing.assert_array_equal(bits(one), bits(other))


def test_graphs_of_all_kinds(executor: CpuExecutor, native_runs: list[str]) -> None:
    @settings(max_examples=40, deadline=None)
    @given(graphs(), st.integers(0, 5))
    def holds(graph: Graph, seed: int) -> None:
        check(executor, graph, inputs_for(graph, seed))

    holds()
    assert len(set(native_runs)) > 10


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_operation(executor: CpuExecutor, native_runs: list[str], dtype: str) -> None:
    """Also where pieces end: vector loops treat their last elements by themselves."""
    inputs = [values(dtype, 1003, seed) for seed in range(2)]
    builder = GraphBuilder([TensorType((1003,), dtype)] * 2)
    outputs = [] if dtype == "float16" else [_chosen(builder)]
    for name, op in OPS.items():
        alone = GraphBuilder([TensorType((1003,), dtype)] * 2)
        if op.kind != "elementwise" or name in ("cast", "where"):
            continue
        try:
            graph = alone.finish([alone.elementwise(name, *range(op.arity or 0))])
        except KernelError:
            # NumPy has no such loop.
            continue
        (step,) = fuse(graph).steps
        if in_c(step.body, [(slot, Access(block, dtype, 0, (1,))) for slot, block in step.results]) is not None:
            outputs.append(builder.elementwise(name, *range(op.arity or 0)))
    if dtype == "float16":
        assert not outputs
        return
    assert len(outputs) > 15
    for start in range(0, len(outputs), limits.KERNEL_OUTPUTS_MAX_COUNT):
        check(executor, builder.finish(outputs[start : start + limits.KERNEL_OUTPUTS_MAX_COUNT]), inputs)
    assert native_runs


def _chosen(builder: GraphBuilder) -> int:
    return builder.elementwise("where", builder.elementwise("less", 0, 1), 0, 1)


@pytest.mark.parametrize("source", DTYPES)
def test_every_cast(executor: CpuExecutor, source: str) -> None:
    targets = [one for one in DTYPES if one != source and (source not in FLOATS or one in FLOATS)]
    builder = GraphBuilder([TensorType((1003,), source)])
    graph = builder.finish([builder.cast(0, target) for target in targets])
    check(executor, graph, [values(source, 1003)])


def test_rows_columns_and_counts(executor: CpuExecutor, native_runs: list[str]) -> None:
    """What is repeated along either axis, and counted; outputs of several dtypes at once."""
    builder = GraphBuilder([TensorType((9, 40), "float32"), TensorType((40,), "float32"), TensorType((9, 1), "int32")])
    rows = builder.elementwise("multiply", builder.elementwise("add", 0, 1), 2)
    counted = builder.elementwise("add", rows, builder.add("iota", shape=(9, 40), dtype="float32", axes=(1,)))
    graph = builder.finish([counted, builder.elementwise("less", counted, WeakScalar(3))])
    source = np.random.default_rng(0)
    inputs = [
        source.standard_normal((9, 40)).astype("float32"),
        source.standard_normal(40).astype("float32"),
        source.integers(-5, 5, (9, 1)).astype("int32"),
    ]
    check(executor, graph, inputs)
    assert native_runs
    for found, wanted in zip(results_of(executor, graph, inputs)[-1], evaluate(graph, inputs), strict=True):
        np.testing.assert_array_equal(bits(found.reshape(wanted.shape)), bits(wanted))


def test_what_numpy_does_better_stays_with_it(executor: CpuExecutor, native_runs: list[str]) -> None:
    builder = GraphBuilder([TensorType((64, 48), "float32")])
    across = builder.elementwise("add", builder.transpose(0), WeakScalar(1))
    graph = builder.finish([across, builder.elementwise("tanh", 0)])
    check(executor, graph, [values("float32", 64 * 48).reshape(64, 48)])
    assert not native_runs


def _doubled(count: int) -> Graph:
    builder = GraphBuilder([TensorType((count,), "float32")])
    return builder.finish([builder.elementwise("multiply", 0, WeakScalar(2))])


def test_it_takes_over_at_a_later_run(executor: CpuExecutor, native_runs: list[str]) -> None:
    """The first run is enough for what runs once; other lengths find what is compiled."""
    results_of(executor, _doubled(211), [values("float32", 211)], runs=1)
    assert executor.compiler._thread is None
    results_of(executor, _doubled(211), [values("float32", 211)])
    assert len(native_runs) == 1
    results_of(executor, _doubled(230), [values("float32", 230)], runs=1)
    assert len(native_runs) == 2


def test_short_runs_are_compiled_for_after_many(
    executor: CpuExecutor, native_runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "C_COMPILED_MIN_COUNT", 2000)
    results_of(executor, _doubled(211), [values("float32", 211)], runs=9)
    assert executor.compiler._thread is None
    results_of(executor, _doubled(211), [values("float32", 211)], runs=12)
    assert native_runs


def test_memory_that_is_not_aligned_stays_with_numpy(executor: CpuExecutor, native_runs: list[str]) -> None:
    graph, memory = _doubled(211), np.zeros(4 * 211 + 1, np.uint8)[1:].view("float32")
    memory[:] = np.arange(211)
    assert not memory.flags.aligned
    found = results_of(executor, graph, [memory])[-1]
    np.testing.assert_array_equal(found[0], 2 * memory)
    assert not native_runs


def test_it_stops_between_pieces(executor: CpuExecutor, native_runs: list[str]) -> None:
    graph = _doubled(100_000)
    results_of(executor, graph, [values("float32", 100_000)])
    assert native_runs
    prepared, asked = CpuExecutor(1).prepare(fuse(graph)), iter([False] * 5)
    with pytest.raises(KernelStoppedError):
        prepared.run([np.zeros(100_000, "float32"), np.zeros(100_000, "float32")], lambda: next(asked, True))


def test_without_a_compiler_nothing_is_different(monkeypatch: pytest.MonkeyPatch, native_runs: list[str]) -> None:
    monkeypatch.setattr(limits, "C_RUN_MIN_COUNT", 1)
    monkeypatch.setattr(c_compiler._LOADED, "functions", {})
    executor = CpuExecutor(1, compiler=CCompiler(()))
    found = results_of(executor, _doubled(7), [np.arange(7, dtype="float32")])[-1]
    assert found[0].tolist() == [0, 2, 4, 6, 8, 10, 12]
    assert not native_runs
    executor.close()
