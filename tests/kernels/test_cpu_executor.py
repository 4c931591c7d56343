"""The processors' executor computes what graphs mean, however the work is cut and shared."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkle_mesh import limits
from sparkle_mesh.errors import KernelError, KernelStoppedError
from sparkle_mesh.kernels.cpu_body import compile_body
from sparkle_mesh.kernels.cpu_executor import CpuExecutor
from sparkle_mesh.kernels.cpu_memory import BlockPool
from sparkle_mesh.kernels.fusion import fuse
from sparkle_mesh.kernels.graph import Graph, GraphBuilder, WeakScalar
from sparkle_mesh.kernels.ops import DTYPES, FLOATS, OPS, TensorType
from sparkle_mesh.kernels.program import ElementwiseStep, Program
from sparkle_mesh.kernels.reference import evaluate
from tests.kernels.graphs import bits, graphs, inputs_for, values

Array = np.ndarray[Any, Any]
#: What memory holds that nobody has written to.
POISON = 0xA5


@pytest.fixture
def executors() -> Iterator[list[CpuExecutor]]:
    made = [CpuExecutor(1), CpuExecutor(3)]
    yield made
    for executor in made:
        executor.close()


@pytest.fixture
def small_pieces() -> Iterator[None]:
    """Cut everything into pieces of few elements, and share whatever can be shared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "CPU_TILE_MAX_COUNT", 7)
        patch.setattr(limits, "CPU_TILE_MIN_COUNT", 2)
        patch.setattr(limits, "CPU_TILE_SIDE_COUNT", 2)
        patch.setattr(limits, "CPU_SHORT_ROW_MAX_COUNT", 3)
        patch.setattr(limits, "CPU_KEPT_MAX_COUNT", 3)
        patch.setattr(limits, "CPU_REDUCTION_PARTS_COUNT", 5)
        patch.setattr(limits, "CPU_DIRECT_TILE_MAX_COUNT", 11)
        patch.setattr(limits, "CPU_DIRECT_TILES_COUNT", 2)
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


def check(executors: list[CpuExecutor], graph: Graph, inputs: list[Array]) -> None:
    """All executors find the same bits: those of the reference, if every correct way to compute them gives the same."""
    wanted = evaluate(graph, inputs)
    results = [run(executor, graph, inputs) for executor in executors]
    exact = not any(node.op in ("sum", "prod", "matmul") for node in graph.nodes)
    for found in results:
        for one, other, first in zip(found, wanted, results[0], strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(bits(one), bits(first))
            if exact:
                np.testing.assert_array_equal(bits(one), bits(other))
            else:
                rtol = 1e-3 if one.dtype == np.float16 else 1e-5
                np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol / 10)


def test_it_computes_what_graphs_mean(executors: list[CpuExecutor], small_pieces: None) -> None:
    @settings(max_examples=400, deadline=None)
    @given(graphs(), st.integers(0, 5))
    def holds(graph: Graph, seed: int) -> None:
        check(executors, graph, inputs_for(graph, seed))

    holds()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_operation_gives_the_bits_of_numpy(executors: list[CpuExecutor], dtype: str, monkeypatch: Any) -> None:
    """Also where pieces end: vector loops treat their last elements by themselves."""
    monkeypatch.setattr(limits, "CPU_TILE_MAX_COUNT", 61)
    monkeypatch.setattr(limits, "CPU_TILE_MIN_COUNT", 61)
    monkeypatch.setattr(limits, "CPU_SHARED_MIN_COUNT", 0)
    inputs = [values(dtype, 1003, seed) for seed in range(2)]
    builder = GraphBuilder([TensorType((1003,), dtype)] * 2)
    outputs = []
    for name, op in OPS.items():
        if op.kind != "elementwise" or name in ("cast", "where"):
            continue
        if name == "power" and dtype not in FLOATS:
            continue
        if name in ("left_shift", "right_shift"):
            continue
        try:
            outputs.append(builder.elementwise(name, *range(op.arity or 0)))
        except KernelError:
            # NumPy has no such loop.
            continue
    assert len(outputs) > 20
    for start in range(0, len(outputs), limits.KERNEL_OUTPUTS_MAX_COUNT):
        check(executors, builder.finish(outputs[start : start + limits.KERNEL_OUTPUTS_MAX_COUNT]), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_conversions_and_choices_give_the_bits_of_numpy(executors: list[CpuExecutor], dtype: str) -> None:
    inputs = [values(dtype, 1003, seed) for seed in range(2)]
    builder = GraphBuilder([TensorType((1003,), dtype)] * 2)
    chosen = builder.elementwise("where", builder.elementwise("less", 0, 1), 1, 0)
    # What does not fit whole numbers is undefined, in C and in NumPy.
    outputs = [
        builder.cast(0, wanted) for wanted in DTYPES if dtype not in FLOATS or wanted in FLOATS or wanted == "bool"
    ]
    outputs = [one for one in outputs if one != 0]
    same = [builder.elementwise("where", builder.constant(value), 0, 1) for value in (True, False)]
    check(executors, builder.finish([chosen, *outputs, *same]), inputs)


def test_real_pieces_give_the_bits_of_numpy(executors: list[CpuExecutor]) -> None:
    count = 3 * limits.CPU_TILE_MAX_COUNT + 5
    builder = GraphBuilder([TensorType((count,), "float32")] * 2)
    total = builder.elementwise(
        "add", builder.elementwise("multiply", 0, WeakScalar(2)), builder.elementwise("square", 1)
    )
    kept = builder.elementwise("multiply", builder.elementwise("tanh", total), 0)
    check(
        executors,
        builder.finish([kept, builder.elementwise("exp", total)]),
        [values("float32", count, n) for n in (0, 1)],
    )


def test_buffers_are_used_again(executors: list[CpuExecutor]) -> None:
    builder = GraphBuilder([TensorType((1000,), "float32")])
    value = 0
    for _ in range(200):
        value = builder.elementwise("add", builder.elementwise("sin", value), 0)
    graph = builder.finish([value])
    (step,) = fuse(graph).steps
    assert isinstance(step, ElementwiseStep)
    assert compile_body(step.body, []).buffer_bytes <= 8
    check(executors, graph, [values("float32", 1000)])


def test_bodies_of_any_form(executors: list[CpuExecutor], small_pieces: None) -> None:
    """Every value is needed again at random times, and in buffers of several sizes."""

    @settings(max_examples=100, deadline=None)
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        shape = data.draw(st.sampled_from([(23,), (4, 3), (2, 3, 5)]))
        builder = GraphBuilder([TensorType(shape, "float32"), TensorType(shape[-1:], "float64")])
        made = [0, 1, builder.constant(2.0, "float32"), builder.add("iota", shape=shape, dtype="int32", axes=(0,))]
        for _ in range(data.draw(st.integers(1, 40))):
            one, other = data.draw(st.sampled_from(made)), data.draw(st.sampled_from(made))
            name = data.draw(st.sampled_from(("add", "less", "maximum", "absolute", "cast", "where", "isfinite")))
            if name == "cast":
                made.append(builder.cast(one, data.draw(st.sampled_from(("float32", "float64", "float16")))))
            elif name == "where":
                made.append(builder.elementwise(name, builder.elementwise("less_equal", one, other), other, one))
            else:
                made.append(builder.elementwise(name, *(one, other)[: OPS[name].arity]))
        outputs = data.draw(st.lists(st.sampled_from(made), min_size=1, max_size=4))
        check(executors, builder.finish(outputs), inputs_for(builder.finish([0])))

    holds()


# --- Reductions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(100_003,), (1001, 130), (130, 1001), (3, 70_001), (70_001, 3), (31, 40, 50), (140, 2048)]
)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int32"])
def test_reductions_over_any_axes(executors: list[CpuExecutor], shape: tuple[int, ...], dtype: str) -> None:
    array = np.random.default_rng(0).standard_normal(shape).astype("float32")
    # Of a size whose sums float16 holds.
    array = (array * (100 if dtype == "int32" else 0.25)).astype(dtype)
    builder = GraphBuilder([TensorType(shape, dtype)])
    square = builder.elementwise("square", 0)
    outputs = []
    for axes in ([0], [len(shape) - 1], None, sorted({0, len(shape) - 1})):
        outputs += [builder.reduce("sum", square, axes), builder.reduce("max", 0, axes), builder.reduce("sum", 0, axes)]
    check_close(executors, builder.finish(outputs), array)


def check_close(executors: list[CpuExecutor], graph: Graph, array: Array) -> None:
    is_float = array.dtype.kind == "f"
    exact = evaluate(cast_graph(graph), [array.astype("float64")]) if is_float else evaluate(graph, [array])
    first: list[Array] = []
    for executor in executors:
        found = run(executor, graph, [array])
        first = first or found
        for one, other, same in zip(found, exact, first, strict=True):
            np.testing.assert_array_equal(one, same)
            rtol = {"float16": 2e-3, "float32": 2e-6}.get(one.dtype.name, 1e-12)
            scale = np.sqrt(array.size) * float(np.abs(array).max()) if is_float else 0
            np.testing.assert_allclose(one.astype(other.dtype), other, rtol=rtol, atol=rtol * scale)


def cast_graph(graph: Graph) -> Graph:
    """Return the same graph in float64."""
    return Graph(tuple(replace(node, dtype="float64") for node in graph.nodes), graph.outputs)


@pytest.mark.parametrize("shape", [(1 << 20,), (1 << 18, 4), (1 << 10, 1 << 10)])
def test_sums_are_as_accurate_as_pairwise_ones(executors: list[CpuExecutor], shape: tuple[int, ...]) -> None:
    array = np.full(shape, 0.1, "float32")
    builder = GraphBuilder([TensorType(shape, "float32")])
    graph = builder.finish([builder.reduce("sum", 0, [0]), builder.reduce("sum", 0)])
    for found, axis in zip(run(executors[1], graph, [array]), (0, None), strict=True):
        exact = array.astype("float64").sum(axis)
        assert np.abs(found / exact - 1).max() < 5e-7


def test_extremes_keep_nan(executors: list[CpuExecutor]) -> None:
    array = np.zeros((300, 7), "float32")
    array[123, 4] = np.nan
    builder = GraphBuilder([TensorType(array.shape, "float32")])
    graph = builder.finish([builder.reduce(op, 0, axes) for op in ("max", "min") for axes in ([0], [1], None)])
    check(executors, graph, [array])


def test_nothing_reduced_is_the_identity(executors: list[CpuExecutor]) -> None:
    builder = GraphBuilder([TensorType((3, 0), "float32")])
    one = builder.elementwise("exp", 0)
    graph = builder.finish(
        [builder.reduce("sum", one, [1]), builder.reduce("prod", one), builder.reduce("max", 0, [0])]
    )
    check(executors, graph, [np.zeros((3, 0), "float32")])


def test_numbers_that_are_the_same_everywhere_are_reduced_too(executors: list[CpuExecutor], small_pieces: None) -> None:
    builder = GraphBuilder([TensorType((), "float32")])
    spread = builder.broadcast(builder.elementwise("exp", 0), (40, 3))
    count = builder.add("iota", shape=(40, 3), dtype="float32", axes=(0,))
    outputs = [
        builder.reduce(op, one, axes) for op in ("sum", "max") for one in (spread, count) for axes in ([0], None)
    ]
    check(executors, builder.finish(outputs), [np.float32(0.5).reshape(())])


# --- Products and copies --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("lengths", [(5, 7, 3), (1, 9, 1), (4, 0, 3), (0, 2, 2), (33, 20, 17)])
@pytest.mark.parametrize("batch", [(), (6,), (2, 3), (0,)])
def test_products(
    executors: list[CpuExecutor], small_pieces: None, dtype: str, lengths: tuple[int, int, int], batch: tuple[int, ...]
) -> None:
    rows, inner, columns = lengths
    builder = GraphBuilder([TensorType((*batch, rows, inner), dtype), TensorType((*batch, columns, inner), dtype)])
    order = (*range(len(batch)), len(batch) + 1, len(batch))
    graph = builder.finish([builder.matmul(0, builder.transpose(1, order))])
    source = np.random.default_rng(0)
    arrays = [source.random(tensor.shape).astype(dtype) for tensor in graph.inputs]
    (wanted,) = evaluate(graph, arrays)
    for executor in executors:
        (found,) = run(executor, graph, arrays)
        np.testing.assert_allclose(found, wanted, rtol=2e-3 if dtype == "float16" else 1e-5)


def test_transposes_and_strides(executors: list[CpuExecutor]) -> None:
    shape = (130, 70, 3)
    builder = GraphBuilder([TensorType(shape, "float32"), TensorType(shape[::-1], "float32")])
    turned = builder.elementwise("add", 0, builder.transpose(1))
    back = builder.add("slice", 0, shape=(65, 70, 3), starts=(129, 69, 0), steps=(-2, -1, 1))
    joined = builder.add("concatenate", back, builder.elementwise("exp", back), axes=(1,))
    graph = builder.finish([turned, builder.transpose(0), joined, builder.reduce("max", builder.transpose(1), [0])])
    check(executors, graph, inputs_for(graph))


# --- Use ------------------------------------------------------------------------------------------


def simple(count: int = 1000, dtype: str = "float32") -> Program:
    builder = GraphBuilder([TensorType((count,), dtype)])
    return fuse(builder.finish([builder.reduce("max", builder.elementwise("exp", builder.elementwise("exp", 0)))]))


def test_many_threads_take_longer_pieces_and_give_the_same_bits() -> None:
    builder = GraphBuilder([TensorType((60_000, 100), "float32")])
    squares = builder.elementwise("multiply", 0, builder.elementwise("add", 0, 0))
    program = fuse(builder.finish([builder.reduce("sum", squares, [1]), builder.elementwise("sqrt", squares)]))
    given = np.random.default_rng(0).standard_normal(6_000_000).astype("float32")
    found = []
    for threads in (1, limits.CPU_MANY_THREADS_COUNT):
        executor = CpuExecutor(threads)
        prepared = executor.prepare(program)
        blocks: list[Any] = [None] * len(program.blocks)
        blocks[0] = given
        for output in program.outputs:
            blocks[output] = np.empty(program.blocks[output].size, "float32")
        prepared.run(blocks)
        executor.close()
        pieces = [step._tiles.count for step in prepared._steps if hasattr(step, "_tiles")]
        found.append((pieces, [blocks[output] for output in program.outputs]))
    (few, alone), (many, together) = found
    assert all(count > other for count, other in zip(few, many, strict=True))
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))


def test_threads_are_bounded() -> None:
    for wrong in (0, -1, limits.CPU_THREADS_MAX_COUNT + 1):
        with pytest.raises(KernelError, match="threads is"):
            CpuExecutor(wrong)
    assert CpuExecutor().threads >= 1


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ([np.zeros(4, "float32")], "has 2 blocks"),
        ([None, np.zeros(4, "float32")], "missing"),
        ([np.zeros(4, "float64"), np.zeros(4, "float32")], "block 0 must be 4 float32s"),
        ([np.zeros(8, "float32")[::2], np.zeros(4, "float32")], "strides"),
        ([np.zeros((2, 2), "float32"), np.zeros(4, "float32")], "shape"),
        ([np.zeros(4, "float32"), np.zeros(5, "float32")], "block 1 must be 4"),
        ([np.zeros(4, "float32"), np.frombuffer(bytes(16), "float32")], "may not be written"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(blocks: list[Array | None], said: str) -> None:
    builder = GraphBuilder([TensorType((4,), "float32")])
    prepared = CpuExecutor(1).prepare(fuse(builder.finish([builder.elementwise("exp", 0)])))
    with pytest.raises(KernelError, match=said):
        prepared.run(blocks)


def test_what_numpy_refuses_comes_out_in_the_caller(executors: list[CpuExecutor], small_pieces: None) -> None:
    builder = GraphBuilder([TensorType((100,), "int64")] * 2)
    program = fuse(builder.finish([builder.elementwise("power", 0, 1)]))
    exponents = np.ones(100, "int64")
    exponents[77] = -1
    for executor in executors:
        prepared = executor.prepare(program)
        for _ in range(5):
            with pytest.raises(KernelError, match="negative integer powers"):
                prepared.run([np.full(100, 2), exponents, np.zeros(100, "int64")])


def test_a_run_can_be_given_up(executors: list[CpuExecutor], small_pieces: None) -> None:
    program = simple()
    # Helpers may be so fast that the caller has little left to do, and asks once.
    for executor, at in zip(executors, (3, 1), strict=True):
        prepared = executor.prepare(program)
        blocks = [np.zeros(1000, "float32"), np.zeros(1, "float32")]
        answers = iter([False] * (at - 1) + [True])
        with pytest.raises(KernelStoppedError, match="stopped"):
            prepared.run(blocks, lambda answers=answers: next(answers))  # type: ignore[misc]
        # All is as it was for those that come after.
        prepared.run(blocks, lambda: False)
        assert blocks[1][0] == np.exp(np.float32(1))


def test_threads_run_one_program_at_once(executors: list[CpuExecutor], small_pieces: None) -> None:
    prepared = executors[1].prepare(simple())

    def one(number: int) -> bool:
        blocks = [np.full(1000, number / 10, "float32"), np.zeros(1, "float32")]
        prepared.run(blocks)
        return bool(blocks[1][0] == np.exp(np.exp(np.float32(number / 10))))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(one, range(40)))


def test_warnings_are_silent_and_settings_stay(executors: list[CpuExecutor], small_pieces: None) -> None:
    before = np.geterr()
    for executor in executors:
        blocks = [np.full(1000, 1e30, "float32"), np.zeros(1, "float32")]
        executor.prepare(simple()).run(blocks)
        assert np.isinf(blocks[1][0])
    assert np.geterr() == before


def test_memory_between_steps_is_kept_and_bounded() -> None:
    executor = CpuExecutor(1)
    builder = GraphBuilder([TensorType((50_000,), "float32")])
    weight = builder.elementwise("exp", 0)
    graph = builder.finish([builder.elementwise("divide", weight, builder.reduce("sum", weight, [0], keepdims=True))])
    pool = executor._pool
    for _ in range(3):
        check([executor], graph, [np.linspace(0, 1, 50_000, dtype="float32")])
        kept = pool.kept_bytes
        assert 0 < kept < 4 * 10**6
    executor.close()
    assert pool.kept_bytes == 0
    full = BlockPool(kept_max_bytes=1000)
    full.give_back(full.take(2000))
    assert full.kept_bytes == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_starts_threads_of_its_own(executors: list[CpuExecutor], small_pieces: None) -> None:
    prepared = executors[1].prepare(simple())
    blocks = [np.zeros(1000, "float32"), np.zeros(1, "float32")]
    prepared.run(blocks)
    child = os.fork()
    if not child:
        try:
            blocks[1][0] = 0
            prepared.run(blocks)
            os._exit(0 if blocks[1][0] == np.exp(np.float32(1)) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    prepared.run(blocks)
