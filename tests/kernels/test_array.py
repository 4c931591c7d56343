"""Arrays compute as NumPy's do, and know where they are."""

from __future__ import annotations

import operator
import threading

import numpy as np
import pytest

from sparkle_mesh.errors import TraceError, UsageError
from sparkle_mesh.kernels.array import Array

VALUES = np.arange(12, dtype="float32").reshape(3, 4) + 1


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x + 1,
        lambda x: 1 - x,
        lambda x: x * x,
        lambda x: 2.0 / x,
        lambda x: x**2,
        lambda x: 2**x,
        lambda x: x // 2,
        lambda x: x % 5,
        lambda x: -x,
        lambda x: abs(-x),
        lambda x: x @ x.T,
        lambda x: x.T,
        lambda x: x.mT,
        lambda x: x > 3,
        lambda x: x == x,
        lambda x: x != 2,
        lambda x: (x > 3) & (x < 9),
        lambda x: ~(x > 3),
        lambda x: x[1],
        lambda x: x[1, 2],
        lambda x: x[::-1, 1:3],
        lambda x: x[..., None],
        lambda x: x.sum(),
        lambda x: x.sum(axis=0),
        lambda x: x.sum(1, keepdims=True),
        lambda x: x.max(axis=1),
        lambda x: x.min(),
        lambda x: x.prod(axis=0),
        lambda x: x.mean(axis=1),
        lambda x: x.std(),
        lambda x: x.var(axis=0, ddof=1),
        lambda x: (x > 3).any(axis=0),
        lambda x: (x > 3).all(),
        lambda x: x.reshape(4, 3),
        lambda x: x.reshape((2, -1)),
        lambda x: x.ravel(),
        lambda x: x.transpose(1, 0),
        lambda x: x.swapaxes(0, 1),
        lambda x: x[:1].squeeze(),
        lambda x: x.astype("int32"),
        lambda x: x.clip(2, 5),
        lambda x: x.clip(max=5),
        lambda x: x.round(),
        lambda x: np.tanh(x),
        lambda x: np.add(x, 1),
        lambda x: np.maximum(x, 4),
        lambda x: np.where(x > 3, x, 0.5),
        lambda x: np.concatenate([x, x[:1]]),
        lambda x: np.stack([x, x], axis=1),
        lambda x: np.sum(x, axis=1),
        lambda x: np.broadcast_to(x, (2, 3, 4)),
        # What kernels do not know NumPy does.
        lambda x: np.sort(x, axis=0),
        lambda x: np.add.reduce(x),
        lambda x: np.cumsum(x),
    ],
)
def test_computes_as_numpy(context, compute):
    wanted = compute(VALUES)
    found = compute(context.asarray(VALUES))
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=1e-6)


def test_the_array_api_of_arrays(context):
    array = context.asarray(VALUES)
    xp = array.__array_namespace__()
    np.testing.assert_allclose(np.asarray(xp.exp(array)), np.exp(VALUES), rtol=1e-6)
    assert xp.concat([array, array], axis=1).shape == (3, 8)
    assert xp.permute_dims(array, (1, 0)).shape == (4, 3)
    assert xp.zeros((2, 3), dtype=xp.float32).dtype == np.float32
    assert xp.arange(3).tolist() == [0, 1, 2]
    assert xp.asarray([1, 2], dtype=xp.int32).tolist() == [1, 2]
    assert xp.isdtype(array.dtype, "real floating")
    assert xp.pi == np.pi
    assert "tanh" in dir(xp)
    with pytest.raises(AttributeError, match="no attribute 'teleport'"):
        _ = xp.teleport


def test_numpy_on_the_left_is_the_same(context):
    array = context.asarray(VALUES)
    for op in (operator.add, operator.sub, operator.mul, operator.truediv, operator.matmul):
        other = VALUES if op is not operator.matmul else VALUES.T
        found = op(other, array)
        assert isinstance(found, Array)
        np.testing.assert_allclose(np.asarray(found), op(other, VALUES), rtol=1e-6)


def test_numbers_and_lists(context):
    array = context.asarray([[1.5, 2.5]])
    assert (array.dtype, array.shape, array.ndim, array.size, array.nbytes, len(array)) == (
        np.dtype("float64"),
        (1, 2),
        2,
        2,
        16,
        1,
    )
    assert array.tolist() == [[1.5, 2.5]]
    assert [row.tolist() for row in array] == [[1.5, 2.5]]
    one = array.sum()
    assert (one.item(), float(one), int(one), bool(one)) == (4.0, 4.0, 4, True)
    assert list(range(4))[context.asarray(3)] == 3
    with pytest.raises(TypeError, match="unsized"):
        len(one)
    with pytest.raises(ValueError, match="size 1"):
        array.item()
    with pytest.raises(TypeError):
        hash(array)
    assert repr(array) == "<Array float64[1, 2] on cpu:0>"


def test_zeros_are_zeros_and_random_ones_follow_from_a_seed(two_devices):
    zeros = two_devices.array((3, 2), "int32", device="second")
    assert zeros.to_numpy().tolist() == [[0, 0]] * 3
    one, other = (two_devices.array((1000,), device=device).fill_random(7) for device in ("cpu", "second"))
    assert np.array_equal(one.to_numpy(), other.to_numpy())
    assert not np.array_equal(one.to_numpy(), one.fill_random(8).to_numpy())
    assert 0 <= one.to_numpy().min() < 0.1 < 0.9 < one.to_numpy().max() < 1


def test_elements_cannot_be_assigned_to_but_all_can_be_replaced(context):
    array = context.asarray(VALUES)
    with pytest.raises(UsageError, match="cannot be assigned"):
        array[0] = 1
    with pytest.raises(UsageError, match="indexed by whole numbers and slices, not by ndarray"):
        array[np.array([True, False, True])]
    assert array.copy_from(VALUES.astype("float64") + 1) is array
    assert np.array_equal(array.to_numpy(), VALUES + 1)
    with pytest.raises(UsageError, match=r"of shape \(4, 3\), this array of \(3, 4\)"):
        array.copy_from(VALUES.T)
    with pytest.raises(UsageError, match="holds float32, this array int32"):
        context.array((3, 4), "int32").copy_from(VALUES)


def test_what_numpy_sees_is_for_reading_or_a_copy(context):
    array = context.asarray(VALUES)
    view = np.asarray(array)
    with pytest.raises(ValueError, match="read-only"):
        view[0, 0] = 9
    copy = array.to_numpy()
    copy[0, 0] = 9
    assert array.to_numpy()[0, 0] == 1
    assert np.asarray(array, dtype="float64").dtype == np.float64
    with pytest.raises(ValueError, match="cannot share memory"):
        array.__array__("float64", copy=False)


def test_copies_are_made_when_they_are_needed_and_stay_valid(two_devices):
    array = two_devices.asarray(VALUES)
    assert array.devices == ("cpu:0",)
    assert array.to_device("second") is array
    assert array.devices == ("cpu:0", "second:0")
    first = array.buffer_on(two_devices.device("second"))
    assert array.buffer_on(two_devices.device("second")) is first
    # Writing leaves one.
    array.copy_from(VALUES * 2)
    assert array.devices == ("cpu:0",)
    result = two_devices.run(lambda x: x + 1, array, device="second")
    assert result.devices == ("second:0",)
    assert np.array_equal(result.to_numpy(), VALUES * 2 + 1)
    assert result.drop_copies() == VALUES.nbytes
    assert result.devices == ("second:0",)


def test_whoever_is_shown_the_memory_may_write_to_it(two_devices):
    array = two_devices.asarray(VALUES).to_device("second")
    shown = np.from_dlpack(array)
    assert array.devices == ("cpu:0",)
    assert np.shares_memory(shown, np.asarray(array))
    shown[0, 0] = 77
    assert two_devices.run(lambda x: x + 0, array, device="second").to_numpy()[0, 0] == 77
    shown[0, 0] = 78
    # No copy is kept, for it would not show that.
    assert two_devices.run(lambda x: x + 0, array, device="second").to_numpy()[0, 0] == 78
    assert two_devices.asarray(shown).to_numpy()[0, 0] == 78


def test_ufuncs_do_not_write_into_arrays(context):
    array = context.asarray(VALUES)
    with pytest.raises(UsageError, match=r"numpy\.add cannot write into an Array"):
        np.add(VALUES, 1, out=array)
    target = np.zeros_like(VALUES)
    np.add(array, 1, out=target)
    assert np.array_equal(target, VALUES + 1)


def test_many_threads_may_need_one_copy(two_devices):
    array = two_devices.array((1 << 16,)).fill_random(1)
    device = two_devices.device("second")
    found = []
    threads = [threading.Thread(target=lambda: found.append(array.buffer_on(device))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == 1


def test_numbers_that_are_equal_and_of_different_types_are_different(context):
    ints = context.asarray(np.arange(3, dtype="int32"))
    for fill in (1, 1.0, np.float32(1), np.float64(1), True):
        wanted = np.where(np.arange(3) > 1, np.arange(3, dtype="int32"), fill)
        assert np.where(ints > 1, ints, fill).dtype == wanted.dtype, fill
    xp = ints.__array_namespace__()
    assert [str(xp.full((2,), one).dtype) for one in (1, 1.0, True)] == ["int64", "float64", "bool"]
    zero, minus = np.where(ints > 9, 1.0, 0.0), np.where(ints > 9, 1.0, -0.0)
    assert [bool(np.signbit(np.asarray(one)[0])) for one in (zero, minus)] == [False, True]
    assert np.array_equal(ints[1].to_numpy(), np.int32(1))
    with pytest.raises((TraceError, UsageError)):
        ints[True]


def test_what_cannot_be_kept_by_is_numpys_to_do(context):
    array = context.asarray(VALUES)
    # No hash, so no kernel of it is kept.
    assert np.allclose(array, VALUES)
    assert np.add(array, 1j).dtype == np.complex64
    rows = list(array)
    assert [row.tolist() for row in rows] == VALUES.tolist()


def test_spare_copies_make_room(two_devices):
    array = two_devices.asarray(VALUES)
    second = two_devices.device("second")
    assert two_devices._copies.reclaimable_bytes(second) == 0
    array.to_device("second")
    assert two_devices._copies.reclaimable_bytes(second) == VALUES.nbytes
    assert two_devices._copies.reclaim(second, 1) == VALUES.nbytes
    assert array.devices == ("cpu:0",)
    assert two_devices._copies.reclaim(second, 1) == 0
    # The last copy stays, wherever it is.
    only = two_devices.run(lambda x: x + 1, array, device="second")
    assert two_devices._copies.reclaim(second, 1) == array.nbytes
    assert only.devices == ("second:0",)
    del only


def test_copies_that_somebody_is_at_are_not_waited_for(two_devices):
    array = two_devices.asarray(VALUES).to_device("second")
    found = []
    with array._lock:
        thread = threading.Thread(target=lambda: found.append(array.drop_copy(two_devices.device("second"))))
        thread.start()
        thread.join()
    assert found == [0]
