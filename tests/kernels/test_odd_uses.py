"""What people do with contexts and arrays that is not in the introduction: it works, or says what is wrong."""

from __future__ import annotations

import copy
import pickle
import threading

import numpy as np
import pytest

import sparkle_mesh as sparkle
from sparkle_mesh.context import Context
from sparkle_mesh.errors import ClosedError, SparkleError, TraceError, UsageError
from sparkle_mesh.kernels.tracing import Kernel


@pytest.fixture
def ctx(tmp_path):
    with Context("cpu", data_dir=tmp_path, threads=2) as context:
        yield context


@pytest.mark.parametrize(
    ("shape", "found"),
    [(3, (3,)), (np.int64(3), (3,)), ([3, 4], (3, 4)), (np.array([3, 4]), (3, 4)), ((), ()), ((0, 3), (0, 3))],
)
def test_shapes_are_numbers_or_sequences_of_them(ctx, shape, found):
    array = ctx.array(shape)
    assert array.shape == found
    np.testing.assert_array_equal(array.to_numpy(), np.zeros(found))


@pytest.mark.parametrize("shape", [True, 3.5, (3.0, 4), -3, (-3, -4), "34", None, (2, None), (2, "x"), (True, 2)])
def test_what_is_no_shape_is_refused(ctx, shape):
    with pytest.raises(UsageError, match="give a whole number, or a sequence of them"):
        ctx.array(shape)


def test_too_many_dimensions_are_told_at_once(ctx):
    with pytest.raises(SparkleError, match="dimensions"):
        ctx.array((1,) * 40)


@pytest.mark.parametrize("size", [-10, 1.5, (3, 4), None, "8", True])
def test_what_is_no_size_is_refused(ctx, size):
    with pytest.raises(UsageError, match="give a number of elements"):
        ctx.allocate(size)


def test_elements_of_other_byte_orders_and_layouts(ctx):
    np.testing.assert_array_equal(ctx.asarray(np.arange(3, dtype=">i4")).to_numpy(), [0, 1, 2])
    fortran = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    np.testing.assert_array_equal(ctx.asarray(fortran).to_numpy(), fortran)
    np.testing.assert_array_equal(ctx.asarray(np.arange(10)[::-2]).to_numpy(), [9, 7, 5, 3, 1])


def test_gemm_takes_what_numpy_takes(ctx):
    assert ctx.gemm([[1.0, 2.0]], [[3.0], [4.0]]).tolist() == [[11.0]]
    assert ctx.gemm(ctx.asarray(np.eye(2)), [[1.0], [2.0]]).tolist() == [[1.0], [2.0]]


def test_arrays_are_printed_as_their_elements(ctx):
    array = ctx.asarray(np.arange(6.0).reshape(2, 3))
    assert str(array) == str(array.to_numpy())
    assert repr(array) == "<Array float64[2, 3] on cpu:0>"
    assert f"{array.sum():.2f} {array.sum()}" == "15.00 15.0"
    assert round(array.sum() / 7, 2) == 2.14
    assert round(array.mean()) == 2


def test_copies_are_arrays_of_their_own(ctx):
    array = ctx.array(5).fill_random(seed=1)
    before = array.tolist()
    for other in (array.copy(), copy.copy(array), copy.deepcopy({"a": array})["a"]):
        assert other.tolist() == before
        other.fill_random(seed=2)
        assert array.tolist() == before


def test_arrays_are_not_pickled_and_say_what_is(ctx):
    with pytest.raises(TypeError, match="to_numpy"):
        pickle.dumps(ctx.array(3))


def test_python_asks_arrays_what_it_asks_numpys(ctx):
    array = ctx.asarray([[1.0, 2.0], [3.0, 4.5]])
    assert 4.5 in array
    assert 5.0 not in array
    quotient, rest = divmod(array, 2)
    assert (quotient.tolist(), rest.tolist()) == ([[0.0, 1.0], [1.0, 2.0]], [[1.0, 0.0], [1.0, 0.5]])
    quotient, rest = divmod(9, array)
    assert (quotient.tolist(), rest.tolist()) == ([[9.0, 4.0], [3.0, 2.0]], [[0.0, 1.0], [0.0, 0.0]])
    assert array.sum(axis=[0, 1]).item() == 10.5
    assert array.sum([0]).tolist() == [4.0, 6.5]
    assert array.reshape([4]).shape == (4,)


def test_errors_of_operators_name_no_line_of_the_library(ctx):
    array = ctx.array((3, 4))
    for work, why in [
        (lambda: array + ctx.array(5), r"^add of shapes \(3, 4\), \(5,\)"),
        (lambda: array @ array, r"^matmul of shapes"),
        (lambda: array.reshape(5), r"^12 elements"),
        (lambda: array.astype("nonsense"), r"^'nonsense' is no dtype"),
        (lambda: ctx.gemm([[1]], [[2]]), r"^matmul takes"),
    ]:
        with pytest.raises(TraceError, match=why):
            work()


def test_explanation_is_a_table_wherever_it_is_shown(ctx):
    found = ctx.explain(lambda x: x + 1, np.ones(4))
    assert repr(found) == str(found)
    assert str(found).startswith("kernel <lambda>: float64[4] -> float64[4]\n-> cpu:0")


def test_submitting_what_cannot_run_fails_at_once(ctx):
    with pytest.raises(UsageError, match="no device 'x'"):
        ctx.submit(lambda x: x, np.ones(3), device="x")
    with pytest.raises(TraceError, match="str is not an operand"):
        ctx.submit(lambda x, y: x + y, np.ones(3), "text")


def test_nothing_is_asked_of_a_closed_context(tmp_path):
    context = Context("cpu", data_dir=tmp_path)
    array = context.asarray([1.0, 2.0])
    context.close()
    context.close()
    kernel = Kernel(lambda x: x * 2)
    for ask in (
        lambda: context.array(3),
        lambda: context.allocate(3),
        lambda: context.asarray([1]),
        lambda: context.gemm([[1.0]], [[1.0]]),
        lambda: context.run(kernel, array),
        lambda: context.submit(kernel, array),
        lambda: context.explain(kernel, array),
        lambda: context.estimate_performance(kernel, array, device="cpu"),
        lambda: context.device_profile("cpu"),
        lambda: context.profile().__enter__(),
        lambda: array + 1,
    ):
        with pytest.raises(ClosedError):
            ask()
    # What there is can be read.
    assert array.tolist() == [1.0, 2.0]


def test_one_name_of_a_device_is_as_good_as_a_list(tmp_path):
    with sparkle.init("cpu", data_dir=tmp_path) as context:
        assert [str(device) for device in context.devices] == ["cpu:0"]


def test_contexts_within_each_other(tmp_path):
    kernel = Kernel(lambda x: x + 1)
    with sparkle.init("cpu", data_dir=tmp_path) as outer:
        with sparkle.init("cpu", data_dir=tmp_path) as inner:
            with inner.profile() as seen:
                kernel(np.ones(3))
            assert len(seen.events) == 1
        with outer.profile() as seen:
            kernel(np.ones(3))
        assert len(seen.events) == 1
    assert type(kernel(np.ones(3))) is np.ndarray


def test_contexts_closed_in_any_order(tmp_path):
    kernel = Kernel(lambda x: x + 1)
    first = sparkle.init("cpu", data_dir=tmp_path)
    second = sparkle.init("cpu", data_dir=tmp_path)
    first.close()
    with second.profile() as seen:
        kernel(np.ones(3))
    assert len(seen.events) == 1
    second.close()
    assert kernel(np.ones(3)).tolist() == [2.0, 2.0, 2.0]


def test_arrays_of_two_contexts_meet(ctx, tmp_path):
    with Context("cpu", data_dir=tmp_path) as other:
        theirs = other.asarray([10.0, 20.0])
        ours = ctx.asarray([1.0, 2.0])
        assert (ours + theirs).tolist() == [11.0, 22.0]
        assert ctx.run(lambda x, y: x * y, theirs, ours).tolist() == [10.0, 40.0]
    assert (ours + theirs).tolist() == [11.0, 22.0]


def test_threads_share_a_context(ctx):
    values = np.random.default_rng(0).random((300, 200))
    array, kernel = ctx.asarray(values), Kernel(lambda x, y: (x * y).sum(axis=0))
    wrong: list[object] = []

    def work(factor: int) -> None:
        for _ in range(20):
            found = ctx.run(kernel, array, factor).to_numpy()
            if not np.allclose(found, (values * factor).sum(axis=0)):
                wrong.append(found)

    threads = [threading.Thread(target=work, args=(factor,)) for factor in range(1, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
