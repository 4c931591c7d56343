"""Functions become graphs once for each combination of types; structures are kept; plain numbers are operands."""

from __future__ import annotations

import enum
import threading
from typing import Any, NamedTuple

import numpy as np
import pytest

import sparkle_mesh as sparkle
from sparkle_mesh import limits
from sparkle_mesh.errors import KernelError, TraceError
from sparkle_mesh.kernels import tracing
from sparkle_mesh.kernels.graph import Graph
from sparkle_mesh.kernels.ops import TensorType
from sparkle_mesh.kernels.tracing import Static, as_kernel, kernel


def f32(*shape: int) -> TensorType:
    return TensorType(shape, "float32")


class Pair(NamedTuple):
    left: Any
    right: Any


class Mode(enum.Enum):
    SUM = 1
    MEAN = 2


def counted(function: Any) -> tuple[Any, list[int]]:
    """Return ``function`` and a list that grows with each time it is run."""
    runs: list[int] = []

    def run(*arguments: Any, **keywords: Any) -> Any:
        runs.append(1)
        return function(*arguments, **keywords)

    return run, runs


# --- Traces -------------------------------------------------------------------------------------


def test_one_trace_for_one_combination_of_types():
    function, runs = counted(lambda x, y: x + y)
    add = kernel(function)
    one = np.ones((2, 3), "float32")
    np.testing.assert_array_equal(add(one, one), one + one)
    add(one * 5, one)
    assert len(runs) == 1
    add(one, np.ones(3, "float32"))
    add(one, np.ones(3, "float64"))
    assert len(runs) == 3
    assert add.trace(one, one) is add.trace(f32(2, 3), f32(2, 3))
    assert len(runs) == 3


def test_plain_numbers_are_operands():
    function, runs = counted(lambda x, rate: x - rate * x)
    step = kernel(function)
    x = np.linspace(0, 1, 7, dtype="float32")
    for rate in (0.1, 0.05, 1e-30):
        found = step(x, rate)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, x - rate * x)
    assert len(runs) == 1
    # Beside float32 it is float32 when it is handed over: devices have no doubles to convert.
    assert step.trace(x, 0.1).inputs == (f32(7), f32())
    # Numbers of another kind, and NumPy's, have types of their own.
    assert step(x, np.float64(0.1)).dtype == np.float64
    assert step(x.astype("int32"), 2).dtype == np.int32
    assert len(runs) == 3


@pytest.mark.parametrize("number", [2, 0.5, True, -1])
@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "int64", "bool"])
@pytest.mark.parametrize(
    "function",
    [
        lambda x, n: x * n,
        lambda x, n: x + (n * 2 + 1),
        lambda x, n: (n / 2) + x,
        lambda x, n: (x > n, n == 1),
        lambda x, n: np.where(x, n, x),
        lambda x, n: np.multiply(n, 2.0) * x,
        lambda x, n: n * n,
        lambda x, n: np.exp(n) + x,
        lambda x, n: [+n, abs(n), n - True],
    ],
)
def test_plain_numbers_are_weak(function, dtype, number):
    x = np.arange(4).astype(dtype)
    wanted, found = function(x, number), kernel(function)(x, number)
    for one, other in zip(found, wanted, strict=True) if isinstance(wanted, (tuple, list)) else [(found, wanted)]:
        np.testing.assert_array_equal(one, other, strict=not np.isscalar(other))
        assert one.dtype == np.asarray(other).dtype


def test_numbers_that_are_used_in_two_dtypes_are_converted_in_the_graph():
    mixed = kernel(lambda x, y, n: (x * n, y * n, n))
    x, y = np.ones(2, "float32"), np.ones(2, "float64")
    assert mixed.trace(x, y, 0.1).inputs[2] == TensorType((), "float64")
    found = mixed(x, y, 0.1)
    np.testing.assert_array_equal(found[0], x * 0.1)
    assert found[2] == 0.1


def test_numbers_that_the_user_converts_keep_their_type():
    odd = kernel(lambda x, n: x + n.astype("int8"))
    np.testing.assert_array_equal(odd(np.zeros(2, "int8"), 300), [44, 44])


def test_numbers_beyond_their_dtype_are_refused():
    with pytest.raises(KernelError, match="n is 300, which is out of bounds for uint8"):
        kernel(lambda x, n: x + n)(np.zeros(2, "uint8"), 300)
    with pytest.raises(KernelError, match="out of bounds for int64"):
        kernel(lambda n: n + 1)(2**70)


def test_traces_that_were_not_used_for_long_are_forgotten():
    function, runs = counted(lambda x: x + 1)
    increment = kernel(function)
    for length in range(limits.KERNEL_TRACES_MAX_COUNT + 1):
        increment.trace(f32(length))
        increment.trace(f32(0))
    assert len(runs) == limits.KERNEL_TRACES_MAX_COUNT + 1
    increment.trace(f32(0))
    assert len(runs) == limits.KERNEL_TRACES_MAX_COUNT + 1
    increment.trace(f32(1))
    assert len(runs) == limits.KERNEL_TRACES_MAX_COUNT + 2


def test_threads_trace_at_once():
    function, _ = counted(lambda x, n: (np.tanh(x) * n).sum())
    total = kernel(function)
    arrays = [np.full(length, 0.5) for length in range(1, 9)]
    found: list[Any] = [None] * 8
    barrier = threading.Barrier(8)

    def run(place: int) -> None:
        barrier.wait()
        graphs = [total.trace(array, 2.0) for array in arrays]
        found[place] = ([float(total(array, 2.0)) for array in arrays], graphs)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = [float((np.tanh(array) * 2.0).sum()) for array in arrays]
    for values, graphs in found:
        assert values == wanted
        # Whoever was first: all have the same.
        assert all(one is other for one, other in zip(graphs, found[0][1], strict=True))


# --- Structures -----------------------------------------------------------------------------------


def test_structures_of_arguments_and_results():
    @kernel
    def work(model, pairs, *rest, scale=1.0, **named):
        """Does this and that."""
        return {
            "z": model["b"] * scale,
            "a": [model["a"][0] + pairs.left, (pairs.right, None, "text")],
            "pair": Pair(rest[0], named["extra"]),
            "number": 3,
        }

    one, two = np.ones(2), np.full(2, 2.0)
    found = work({"b": two, "a": [one]}, Pair(one, two), two, extra=one, scale=3.0)
    assert list(found) == ["z", "a", "pair", "number"]
    np.testing.assert_array_equal(found["z"], [6, 6])
    np.testing.assert_array_equal(found["a"][0], [2, 2])
    assert found["a"][1][1:] == (None, "text")
    assert isinstance(found["pair"], Pair)
    assert found["number"] == 3
    assert (work.__name__, work.__doc__) == ("work", "Does this and that.")
    assert "kernel work(model" in repr(work)


def test_dicts_are_flattened_by_sorted_keys():
    function, runs = counted(lambda p: p["a"] - p["b"])
    subtract = kernel(function)
    a, b = np.full(2, 5.0), np.full(3, 1.0)[:2]
    assert subtract({"a": a, "b": b})[0] == subtract({"b": b, "a": a})[0] == 4
    assert len(runs) == 1
    assert subtract.prepare({"b": b, "a": a}).operands[0][0] == 5


def test_results_are_the_callers_own():
    x = np.ones((2, 3))
    same, wide, part = kernel(lambda x: (x, np.broadcast_to(x, (4, 2, 3)), x[0]))(x)
    for result in (same, wide, part):
        assert not np.shares_memory(result, x)
        result[...] = 7
    assert x.sum() == 6


def test_static_arguments():
    @kernel(static=("axis",), name="total")
    def total(x, axis, keep: Static[bool] = False, mode=Mode.SUM, label="x", dtype=None):
        found = x.sum(axis=axis, keepdims=keep)
        return found / 2 if mode is Mode.MEAN else found

    x = np.ones((2, 3))
    assert total.name == "total"
    assert total(x, 0).shape == (3,)
    assert total(x, (0, 1), keep=True).shape == (1, 1)
    assert total(x, 1, mode=Mode.MEAN, dtype=np.float32)[0] == 1.5
    assert len(total._traces) == 3
    total(x, 0)
    assert len(total._traces) == 3
    with pytest.raises(KernelError, match="axis is static and of type list"):
        total(x, [0])


@pytest.mark.parametrize(("one", "other"), [(1, True), (1, 1.0), (0.0, -0.0), ((1,), (True,)), ((0.0,), (-0.0,))])
def test_static_values_that_are_equal_and_not_the_same_are_two(one, other):
    seen = []
    choose = kernel(lambda x, value: seen.append(value) or x, static="value")
    choose(np.ones(1), one)
    choose(np.ones(1), other)
    assert list(map(repr, seen)) == [repr(one), repr(other)]


def test_annotations_that_cannot_be_read_are_none():
    def double(x: NoSuchName) -> Any:  # noqa: F821
        return x * 2

    assert kernel(double)(np.ones(1))[0] == 2


def test_array_likes_are_arrays():
    class Likes:
        def __array__(self, dtype=None, copy=None):
            return np.arange(3.0)

    double = kernel(lambda x: x * 2)
    np.testing.assert_array_equal(double(Likes()), [0, 2, 4])
    np.testing.assert_array_equal(double(np.arange(6.0)[::2]), [0, 4, 8])
    np.testing.assert_array_equal(double(np.arange(3).astype(">i4")), [0, 2, 4])
    assert double(np.float32(2)).dtype == np.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((object(),), "x is of type object, not an array"),
        (({"w": {1}},), r"x\['w'\] is of type set"),
        (({1: np.ones(1)},), "keys that are not strings"),
        ((np.ones(1, complex),), "x: dtype complex128"),
        (([np.array(["a"])],), r"x\[0\]: dtype"),
        ((2j,), "x is of type complex"),
        ((np.ones((1,) * 9),), "x: .*more than 8 dimensions"),
        ((f32(2),), "x is a type"),
        ((np.ma.array([1.0, 2.0], mask=[True, False]),), "x is a masked array"),
    ],
)
def test_what_is_no_argument(arguments, message):
    with pytest.raises(KernelError, match=message):
        kernel(lambda x: x)(*arguments)


def test_lists_that_hold_themselves_are_refused():
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(KernelError, match="deeper than"):
        kernel(lambda x: x)(endless)


def test_wrong_calls_name_the_kernel():
    with pytest.raises(TypeError, match=r"kernel twice\(x\): missing"):
        kernel(lambda x: x, name="twice")()
    with pytest.raises(KernelError, match="no argument 'axes'"):
        kernel(lambda x: x, static=("axes",))
    with pytest.raises(KernelError, match=r"numpy\.tanh is no function of Python"):
        kernel(np.tanh)


def test_kernels_without_arguments():
    assert kernel(lambda: 3)() == 3


# --- Kernels in kernels ---------------------------------------------------------------------------


def test_kernels_become_part_of_others():
    inner = kernel(lambda p, rate: {"y": np.tanh(p["x"]) * rate})
    outer = kernel(lambda x, rate: inner({"x": x + 1}, rate)["y"] - inner({"x": x}, 2)["y"])
    x = np.linspace(0, 1, 5, dtype="float32")
    np.testing.assert_array_equal(outer(x, 0.5), np.tanh(x + 1) * 0.5 - np.tanh(x) * 2)
    assert isinstance(outer.trace(x, 0.5), Graph)


def test_kernels_are_computed_by_what_was_set():
    calls: list[Graph] = []
    names: list[str] = []

    def execute(graph: Graph, operands: Any, name: str) -> Any:
        calls.append(graph)
        names.append(name)
        return tracing.execute_by_numpy(graph, operands)

    double = sparkle.kernel(lambda x: x * 2)
    before = tracing.set_execute(execute)
    try:
        assert double(np.ones(2)).sum() == 4
    finally:
        assert tracing.set_execute(before) is execute
    assert calls == [double.trace(np.ones(2))]
    assert names == [double.name]
    call = double.prepare(np.ones(2))
    assert call.rebuild([1.0]) == 1.0
    assert as_kernel(double) is double


def test_reference_refuses_what_is_of_another_type():
    graph = kernel(lambda x: x * 2).trace(f32(2))
    with pytest.raises(KernelError, match=r"float32\[2\]"):
        tracing.execute_by_numpy(graph, [np.ones(3, "float32")])
    with pytest.raises(TraceError):
        kernel(lambda x: bool(x))(np.ones(1))


@pytest.mark.parametrize("value", [-1, 300])
@pytest.mark.parametrize("compare", [np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal])
def test_integers_compare_with_numbers_that_they_do_not_have(compare, value):
    x = np.arange(3, dtype="uint8")
    for call in (lambda x: compare(x, value), lambda x: compare(value, x)):
        found = sparkle.kernel(call)(x)
        assert (found.dtype, found.tolist()) == (np.bool_, call(x).tolist())


def test_what_is_advised_instead_of_an_index_that_is_traced_works():
    @sparkle.kernel
    def picked(x, i):
        with pytest.raises(TraceError, match=r"x\.__array_namespace__\(\)\.arange\(n\) == i"):
            x[i]
        return (x * (x.__array_namespace__().arange(len(x)) == i)).sum()

    assert picked(np.array([3.0, 5.0, 7.0]), np.int64(1)) == 5.0
