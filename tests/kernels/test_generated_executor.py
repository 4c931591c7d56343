"""Generated kernels compute what graphs mean, on every device that compiles."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparkle_mesh import limits
from sparkle_mesh.devices.device import Device
from sparkle_mesh.devices.null import NullBackend
from sparkle_mesh.devices.registry import Registry
from sparkle_mesh.errors import KernelError, KernelStoppedError
from sparkle_mesh.kernels.fusion import fuse
from sparkle_mesh.kernels.generated_executor import GeneratedExecutor
from sparkle_mesh.kernels.graph import Graph, GraphBuilder, WeakScalar
from sparkle_mesh.kernels.ops import DTYPES, FLOATS, OPS, TensorType, loop_dtypes
from sparkle_mesh.kernels.reference import evaluate
from tests.kernels.generated import KINDS, REASONS, executor, first_device, run_on
from tests.kernels.graphs import graphs, inputs_for

Array = np.ndarray[Any, Any]
# What float operations must give to the bit; the others may differ in the last ones.
EXACT = {"negative", "absolute", "sign", "floor", "ceil", "rint", "trunc", "square", "add", "subtract", "multiply"}
EXACT |= {"maximum", "minimum", "copysign", "where", "cast", "isnan", "isinf", "isfinite", "signbit", "logical_not"}
EXACT |= {name for name in OPS if name.startswith(("logical", "bitwise", "equal", "not_equal", "less", "greater"))}
TOLERANCES = {"float16": (2e-3, 1e-7), "float32": (2e-6, 1e-38), "float64": (1e-14, 1e-300)}


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    found = Registry(entry_points=lambda: (), extra=[NullBackend()])
    yield found
    found.close()


@pytest.fixture(params=KINDS)
def device(request: pytest.FixtureRequest, registry: Registry) -> Device:
    found = first_device(registry, request.param)
    if found is None:
        pytest.skip(REASONS[request.param])
    return found


# --- Every operation of every dtype -----------------------------------------------------------------


def edge_values(dtype: str) -> Array:
    if dtype == "bool":
        return np.array([False, True])
    if dtype in FLOATS:
        info = np.finfo(dtype)
        plain = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, -2.5, 3.0, -7.25, 100.0, np.inf, -np.inf, np.nan]
        return np.array([*plain, info.max, info.min, info.tiny, -info.tiny, info.eps], dtype)
    bounds = np.iinfo(dtype)
    values = {0, 1, 2, 3, 5, 7, 8, 16, 31, 32, 63, 64, 100, int(bounds.max), int(bounds.max) - 1}
    if bounds.min:
        values |= {-1, -2, -3, -7, -100, int(bounds.min), int(bounds.min) + 1}
    return np.array(sorted(values), dtype)


def loops(name: str) -> list[tuple[str, ...]]:
    """Return all dtypes that an operation computes with."""
    arity = OPS[name].arity
    assert arity is not None
    found = set()
    for dtypes in itertools.product(DTYPES, repeat=arity):
        try:
            *wanted, _ = loop_dtypes(name, dtypes)
        except KernelError:
            continue
        found.add(tuple(wanted))
    return sorted(found)


ELEMENTWISE = sorted(name for name, op in OPS.items() if op.kind == "elementwise" and op.ufunc is not None)
# Together in one kernel each, which is what takes the time.
PORTIONS = [
    [(name, dtypes) for name, dtypes in every if OPS[name].arity == arity][start : start + 48]
    for every in [[(name, dtypes) for name in ELEMENTWISE for dtypes in loops(name)]]
    for arity in (1, 2)
    for start in range(0, len([name for name, _ in every if OPS[name].arity == arity]), 48)
]


def defined(name: str, operands: list[Array]) -> Array:
    """Return where NumPy has a result."""
    if name == "power" and operands[0].dtype.name not in FLOATS:
        # NumPy refuses negative powers of integers.
        return operands[1] >= 0
    if name == "reciprocal" and operands[0].dtype.name not in FLOATS:
        # It divides by zero, and converts the infinite result to an integer, which C leaves open.
        return operands[0] != 0
    if name == "hypot":
        # The squares of the largest overflow in some libraries and not in others.
        return np.maximum(*map(np.abs, operands)) < np.sqrt(np.finfo(operands[0].dtype).max)
    return np.ones(operands[0].size, bool)


def flushed(values: Array) -> Array:
    """Return zeros in the place of subnormal numbers, as CuPy has CUDA compute with float32."""
    return np.where(np.abs(values) < np.finfo(values.dtype).tiny, np.zeros_like(values), values)


@pytest.mark.parametrize("portion", PORTIONS, ids=lambda portion: f"{portion[0][0]}-{portion[-1][0]}")
def test_each_operation_computes_what_numpy_does(device: Device, portion: list[tuple[str, tuple[str, ...]]]) -> None:
    arity = len(portion[0][1])
    used = sorted({dtypes for _, dtypes in portion})
    inputs: list[Array] = []
    for dtypes in used:
        columns = np.meshgrid(*map(edge_values, dtypes), indexing="ij")
        inputs += [np.resize(column.reshape(-1), 441) for column in columns]
    builder = GraphBuilder([TensorType(array.shape, array.dtype.name) for array in inputs])
    places = {dtypes: range(arity * number, arity * (number + 1)) for number, dtypes in enumerate(used)}
    graph = builder.finish([builder.add(name, *places[dtypes]) for name, dtypes in portion])
    for found, (name, dtypes) in zip(run_on(device, graph, inputs, merge=True), portion, strict=True):
        operands = [inputs[place] for place in places[dtypes]]
        keep = defined(name, operands)
        ufunc = OPS[name].ufunc
        assert ufunc is not None
        with np.errstate(all="ignore"):
            wanted = ufunc(*(operand[keep] for operand in operands))
        relative, absolute = TOLERANCES.get(wanted.dtype.name, (0, 0)) if name not in EXACT else (0, 0)
        got = found[keep]
        if device.kind in ("cuda", "rocm") and wanted.dtype.name in ("float32", "float64"):
            got, wanted = flushed(got), flushed(wanted)
        np.testing.assert_allclose(got, wanted, relative, absolute, err_msg=f"{name} of {dtypes}")


def test_zeros_keep_their_signs(device: Device) -> None:
    values = np.array([0.0, -0.0, 1.0, -3.0], "float32")
    builder = GraphBuilder([TensorType((4,), "float32")])
    negative = builder.elementwise("negative", 0)
    product = builder.elementwise("multiply", 0, WeakScalar(-0.0))
    whole = builder.elementwise("trunc", builder.elementwise("multiply", 0, WeakScalar(0.25)))
    graph = builder.finish([negative, product, whole])
    for found, wanted in zip(run_on(device, graph, [values]), evaluate(graph, [values]), strict=True):
        np.testing.assert_array_equal(np.signbit(found), np.signbit(wanted))


@pytest.mark.parametrize("sources", [DTYPES[:4], DTYPES[4:8], DTYPES[8:]], ids=str)
def test_casts_are_numpys(device: Device, sources: tuple[str, ...]) -> None:
    inputs = [np.resize(edge_values(source), 40) for source in sources]
    builder = GraphBuilder([TensorType(array.shape, array.dtype.name) for array in inputs])
    pairs = [(number, target) for number, source in enumerate(sources) for target in DTYPES if target != source]
    graph = builder.finish([builder.cast(number, target) for number, target in pairs])
    for found, (number, target) in zip(run_on(device, graph, inputs, merge=True), pairs, strict=True):
        values = inputs[number]
        keep = np.ones(values.size, bool)
        if sources[number] in FLOATS and target not in FLOATS and target != "bool":
            # Beyond the range of integers C leaves the result open.
            bounds = np.iinfo(target)
            exact = values.astype("float64")
            keep = (exact > max(int(bounds.min), -(2**62)) - 1) & (exact < min(int(bounds.max), 2**62))
        with np.errstate(all="ignore"):
            wanted = values[keep].astype(target)
        np.testing.assert_array_equal(found[keep], wanted, err_msg=f"{sources[number]} to {target}")


def test_float64_is_rounded_to_float16_once(device: Device) -> None:
    # Halfway between two numbers of float16, but for what float32 cannot hold.
    halfway = 1 + 2.0**-11
    values = np.array(
        [halfway, halfway + 2.0**-40, halfway - 2.0**-40, -halfway - 2.0**-40, 65519.9999999, 65520.0, 1e300]
    )
    tiny = 2.0**-24 * np.array([0.5, 0.5 + 2.0**-30, 1.5, 1.5 - 2.0**-30, 2.0**-200])
    values = np.concatenate([values, tiny])
    builder = GraphBuilder([TensorType(values.shape, "float64")])
    graph = builder.finish([builder.cast(0, "float16")])
    np.testing.assert_array_equal(run_on(device, graph, [values])[0], evaluate(graph, [values])[0])


def test_float16_is_rounded_after_each_operation(device: Device) -> None:
    values = np.random.default_rng(1).standard_normal(1000).astype("float16")
    builder = GraphBuilder([TensorType(values.shape, "float16")])
    product = builder.elementwise("multiply", 0, 0)
    graph = builder.finish([builder.elementwise("subtract", builder.elementwise("add", product, WeakScalar(100)), 0)])
    (found,), (wanted,) = run_on(device, graph, [values]), evaluate(graph, [values])
    np.testing.assert_array_equal(found, wanted)


def test_products_are_rounded_before_they_are_added(device: Device) -> None:
    a, b, c = np.random.default_rng(2).standard_normal((3, 10_000)).astype("float32")
    builder = GraphBuilder([TensorType(a.shape, "float32")] * 3)
    graph = builder.finish([builder.elementwise("add", builder.elementwise("multiply", 0, 1), 2)])
    np.testing.assert_array_equal(run_on(device, graph, [a, b, c])[0], a * b + c)


@pytest.mark.parametrize("dtypes", [DTYPES[:3], DTYPES[3:6], DTYPES[6:9], DTYPES[9:]], ids=str)
def test_constants_are_exact(device: Device, dtypes: tuple[str, ...]) -> None:
    for dtype in dtypes:
        check_constants(device, dtype)


def check_constants(device: Device, dtype: str) -> None:
    inputs = [np.zeros(3, dtype)]
    builder = GraphBuilder([TensorType((3,), dtype)])
    yes = builder.broadcast(builder.constant(True), (3,))
    outputs = []
    for value in edge_values(dtype):
        constant = builder.broadcast(builder.constant(value.item(), dtype), (3,))
        outputs.append(builder.add("where", yes, constant, 0))
    graph = builder.finish(outputs)
    for found, wanted in zip(run_on(device, graph, inputs, merge=True), evaluate(graph, inputs), strict=True):
        np.testing.assert_array_equal(found, wanted)
        if found.dtype.name in FLOATS:
            np.testing.assert_array_equal(np.signbit(found), np.signbit(wanted))


# --- Graphs -------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(graph=graphs(), seed=st.integers(0, 5))
def test_programs_compute_what_their_graphs_mean(device: Device, graph: Graph, seed: int) -> None:
    inputs = inputs_for(graph, seed)
    for found, wanted in zip(run_on(device, graph, inputs), evaluate(graph, inputs), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-5)


SHAPES = [(), (1,), (4,), (1025,), (70_001,), (0, 3), (17, 64), (3, 5, 7), (2, 3, 4, 8), (1, 2, 1, 3, 1, 2, 1, 5)]
CASES = [*((shape, "float32") for shape in SHAPES), *(((17, 64), dtype) for dtype in ("float16", "uint8", "int64"))]
CASES += [((1025,), "float16"), ((1025,), "uint8"), ((2, 3, 5, 4), "uint8")]


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_elementwise_work_of_every_layout(device: Device, shape: tuple[int, ...], dtype: str) -> None:
    source = np.random.default_rng(3)
    shapes = (shape, shape[1:], (*shape[:-1], *([1] if shape else [])))
    inputs = [source.integers(0, 9, size).astype(dtype) for size in shapes]
    builder = GraphBuilder([TensorType(array.shape, dtype) for array in inputs])
    starts = tuple(max(length - 1, 0) for length in shape)
    backwards = builder.add("slice", 0, shape=shape, starts=starts, steps=(-1,) * len(shape))
    total = builder.elementwise("add", builder.elementwise("multiply", 0, 1), builder.elementwise("add", backwards, 2))
    if shape:
        total = builder.elementwise("add", total, builder.add("iota", shape=shape, dtype=dtype, axes=(len(shape) - 1,)))
    outputs = [total, builder.elementwise("less", 0, 2)]
    if len(shape) > 1:
        turned = builder.transpose(0)
        outputs.append(builder.elementwise("add", turned, turned))
    graph = builder.finish(outputs)
    for found, wanted in zip(run_on(device, graph, inputs), evaluate(graph, inputs), strict=True):
        np.testing.assert_array_equal(found, wanted)


def choices_of(rank: int) -> list[tuple[int, ...]]:
    """Return some choices of axes."""
    if rank <= 3:
        return [axes for count in range(1, rank + 1) for axes in itertools.combinations(range(rank), count)]
    return [(0,), (rank - 1,), (1, rank - 1), (0, 2), tuple(range(rank))]


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_reductions_over_every_choice_of_axes(device: Device, shape: tuple[int, ...], dtype: str) -> None:
    values = np.random.default_rng(4).integers(0, 4, shape).astype(dtype)
    builder = GraphBuilder([TensorType(shape, dtype)])
    outputs = [0]
    for number, axes in enumerate(choices_of(len(shape))):
        if number % 2 or not all(shape[axis] for axis in axes):
            outputs.append(builder.add("sum", 0, axes=axes))
        else:
            outputs.append(builder.reduce("max", builder.elementwise("multiply", 0, 0), axes))
    graph = builder.finish(outputs)
    for found, wanted in zip(run_on(device, graph, [values]), evaluate(graph, [values]), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3 if dtype == "float16" else 0)


@pytest.mark.parametrize("shape", [(300_007,), (300_000, 2), (5, 60_004), (2, 30_000, 4)], ids=str)
def test_large_reductions_are_split_and_give_the_same_bits_each_time(device: Device, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(5).standard_normal(shape).astype("float32")
    builder = GraphBuilder([TensorType(shape, "float32")])
    outputs = [builder.reduce("sum", builder.elementwise("square", 0))]
    outputs += [builder.reduce("sum", 0, [axis]) for axis in range(len(shape))]
    graph = builder.finish(outputs)
    found = run_on(device, graph, [values])
    exact = evaluate(graph_in(graph, "float64"), [values.astype("float64")])
    for one, again, wanted in zip(found, run_on(device, graph, [values]), exact, strict=True):
        np.testing.assert_array_equal(one, again)
        # As good as adding up pairwise.
        np.testing.assert_allclose(one, wanted, rtol=1e-6, atol=1e-6 * np.sqrt(values.size))


def graph_in(graph: Graph, dtype: str) -> Graph:
    """Return ``graph`` with all its values of another dtype."""
    builder = GraphBuilder([TensorType(tensor.shape, dtype) for tensor in graph.inputs])
    for node in graph.nodes[len(graph.inputs) :]:
        builder.add(node.op, *node.operands, shape=node.shape, dtype=dtype, axes=node.axes)
    return builder.finish(graph.outputs)


def test_sums_of_ones_stay_exact_beyond_what_float16_counts(device: Device) -> None:
    builder = GraphBuilder([TensorType((60_000,), "float16")])
    graph = builder.finish([builder.reduce("sum", 0)])
    assert run_on(device, graph, [np.ones(60_000, "float16")])[0] == np.float16(60_000)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reductions_of_every_dtype(device: Device, dtype: str) -> None:
    values = edge_values(dtype)
    many = np.resize(values, (9, 2 * values.size))
    ops = ("max", "min") if dtype == "bool" else ("max", "min", "sum", "prod")
    builder = GraphBuilder([TensorType(many.shape, dtype)])
    choices = [(0, 1), (1,), (0,), (0, 1)]
    graph = builder.finish([builder.add(op, 0, axes=axes) for op, axes in zip(ops, choices, strict=False)])
    for found, wanted in zip(run_on(device, graph, [many]), evaluate(graph, [many]), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3 if dtype == "float16" else 1e-6)


def test_reductions_over_nothing(device: Device) -> None:
    builder = GraphBuilder([TensorType((3, 0), "float32"), TensorType((0, 2), "int64")])
    outputs = [builder.reduce(op, number, [1 - number]) for op in ("sum", "prod") for number in (0, 1)]
    graph = builder.finish([*outputs, builder.reduce("sum", 0, [0]), builder.reduce("max", 0, [0])])
    inputs = [np.zeros((3, 0), "float32"), np.zeros((0, 2), "int64")]
    for found, wanted in zip(run_on(device, graph, inputs), evaluate(graph, inputs), strict=True):
        np.testing.assert_array_equal(found, wanted)


# Batch, rows, inner length, columns.
PRODUCTS = [((), 1, 1, 1), ((), 64, 16, 64), ((), 65, 17, 66), ((2, 3), 5, 33, 70), ((), 3, 0, 2)]


@pytest.mark.parametrize("dtype", sorted(FLOATS))
@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False), (True, True)], ids=str)
@pytest.mark.parametrize(
    "sizes", [((), 1, 1, 1), ((), 64, 16, 64), ((), 65, 17, 66), ((2, 3), 5, 33, 70), ((), 3, 0, 2)]
)
def test_products_of_matrices(
    device: Device,
    dtype: str,
    transposed: tuple[bool, bool],
    sizes: tuple[tuple[int, ...], int, int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch, rows, inner, columns = sizes
    shapes = [(*batch, rows, inner), (*batch, inner, columns)]
    shapes = [(*s[:-2], s[-1], s[-2]) if flag else s for s, flag in zip(shapes, transposed, strict=True)]
    source = np.random.default_rng(6)
    inputs = [source.integers(-4, 5, shape).astype(dtype) for shape in shapes]
    builder = GraphBuilder([TensorType(shape, dtype) for shape in shapes])
    order = (*range(len(batch)), len(batch) + 1, len(batch))
    a, b = (builder.transpose(n, order) if flag else n for n, flag in enumerate(transposed))
    graph = builder.finish([builder.matmul(a, b)])
    # Whole numbers: exact in any order.
    np.testing.assert_array_equal(run_on(device, graph, inputs)[0], evaluate(graph, inputs)[0])
    # Not by the device's own means.
    monkeypatch.setattr(device, "capabilities", dataclasses.replace(device.capabilities, matmul_dtypes=frozenset()))
    np.testing.assert_array_equal(run_on(device, graph, inputs)[0], evaluate(graph, inputs)[0])


def test_places_and_joins_of_every_dtype(device: Device) -> None:
    for dtype in ("bool", "float16", "int32", "float64"):
        values = np.resize(edge_values(dtype), (4, 6))
        builder = GraphBuilder([TensorType(values.shape, dtype)])
        placed = builder.add("place", 0, shape=(9, 13), starts=(8, 1), steps=(-2, 2))
        joined = [builder.add("concatenate", 0, 0, axes=(axis,)) for axis in (0, 1)]
        counted = builder.add("iota", shape=(4, 300), dtype="int32", axes=(1,))
        graph = builder.finish([placed, *joined, counted])
        for found, wanted in zip(run_on(device, graph, [values]), evaluate(graph, [values]), strict=True):
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("bound", "value"),
    [("GENERATED_NARROW_MAX_COUNT", 1), ("GENERATED_GROUP_MAX_COUNT", 8), ("GENERATED_GROUP_MAX_COUNT", 1)],
)
def test_other_widths_of_places_and_smaller_groups(
    device: Device, bound: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, bound, value)
    source = np.random.default_rng(7)
    inputs = [source.integers(0, 5, shape).astype("float32") for shape in ((13, 40), (40, 9))]
    builder = GraphBuilder([TensorType(array.shape, "float32") for array in inputs])
    count = builder.add("iota", shape=(13, 40), dtype="float32", axes=(0,))
    outputs = [builder.elementwise("add", builder.elementwise("add", 0, count), builder.reduce("sum", 0, [0]))]
    outputs += [builder.reduce("sum", 0), builder.reduce("max", 1, [1]), builder.matmul(0, 1)]
    outputs.append(builder.add("concatenate", 1, 1, axes=(1,)))
    graph = builder.finish(outputs)
    for found, wanted in zip(run_on(device, graph, inputs), evaluate(graph, inputs), strict=True):
        np.testing.assert_array_equal(found, wanted)


# --- The executor -------------------------------------------------------------------------------------


def doubled(*shape: int) -> Graph:
    builder = GraphBuilder([TensorType(shape, "float32")])
    return builder.finish([builder.elementwise("multiply", 0, WeakScalar(2))])


def test_one_kernel_serves_all_sizes_of_dense_work(device: Device) -> None:
    names = []
    for size in (2, 5, 4096, 99_999):
        values = np.arange(size, dtype="float32")
        np.testing.assert_array_equal(run_on(device, doubled(size), [values])[0], values * 2)
        (stage,) = executor(device).prepare(fuse(doubled(size)))._stages
        names.append(stage.actions[0].launch.func.__self__)
    assert len(set(map(id, names))) == 1


def test_outputs_go_where_the_caller_says(device: Device) -> None:
    program = fuse(doubled(7))
    prepared = executor(device).prepare(program)
    memories = [device.allocate(28), device.allocate(28)]
    device.copy_from_host(memories[0], np.arange(7, dtype="float32"))
    assert prepared.run(memories) == [memories[1]]
    found = np.empty(7, "float32")
    device.copy_to_host(memories[1], found)
    np.testing.assert_array_equal(found, np.arange(7) * 2)
    for memory in memories:
        device.free(memory)


def test_blocks_that_do_not_fit_are_refused(device: Device) -> None:
    prepared = executor(device).prepare(fuse(doubled(7)))
    small = device.allocate(20)
    with pytest.raises(KernelError, match="28 bytes, and one of"):
        prepared.run([small, None])
    with pytest.raises(KernelError, match="is an input"):
        prepared.run([None, None])
    with pytest.raises(KernelError, match="2 blocks, and 1"):
        prepared.run([small])
    device.free(small)


def test_what_was_taken_is_given_back_when_a_step_fails(device: Device) -> None:
    builder = GraphBuilder([TensorType((100, 10), "float32")])
    graph = builder.finish([builder.elementwise("add", 0, builder.reduce("sum", 0, [1], keepdims=True))])
    prepared = executor(device).prepare(fuse(graph))
    gone = device.allocate(4000)
    device.free(gone)
    before = device.pool.in_use_bytes
    with pytest.raises(Exception, match="was freed"):
        prepared.run([gone, *[None] * (len(prepared.program.blocks) - 1)])
    assert device.pool.in_use_bytes == before


def test_no_step_is_queued_once_it_is_to_stop(device: Device) -> None:
    builder = GraphBuilder([TensorType((64, 64), "float32")])
    y = builder.reduce("sum", builder.elementwise("square", 0), [0])
    program = fuse(builder.finish([builder.reduce("max", y, [0])]))
    prepared = executor(device).prepare(program)
    blocks = [device.pool.allocate(64 * 64 * 4), *[None] * (len(program.blocks) - 1)]
    before = device.pool.in_use_bytes
    answers = iter([False, True])
    with pytest.raises(KernelStoppedError):
        prepared.run(blocks, should_stop=lambda: next(answers))
    assert list(answers) == []
    assert device.pool.in_use_bytes == before


def test_threads_run_one_program_at_once(device: Device) -> None:
    prepared = executor(device).prepare(fuse(doubled(1000)))
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(20):
                values = np.full(1000, number * 100 + turn, "float32")
                source = device.pool.allocate(4000)
                device.copy_from_host(source, values)
                (result,) = prepared.run([source, None])
                found = np.empty(1000, "float32")
                device.copy_to_host(result, found)
                device.pool.free(source)
                device.pool.free(result)
                np.testing.assert_array_equal(found, values * 2)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_a_device_that_compiles_nothing_is_refused(registry: Registry) -> None:
    with pytest.raises(KernelError, match="compiles no kernels"):
        GeneratedExecutor(registry.device("cpu"))


def test_a_step_of_too_many_arrays_is_refused(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "GENERATED_POINTERS_MAX_COUNT", 1)
    with pytest.raises(KernelError, match="reads and writes 2 arrays"):
        executor(device).prepare(fuse(doubled(3)))
