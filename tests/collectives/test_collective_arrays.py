"""What callers may pass, what is refused and what it is told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparkle_mesh import limits
from sparkle_mesh.collectives.arrays import Arrays, check_arrays
from sparkle_mesh.collectives.calls import Call
from sparkle_mesh.collectives.reduction import Reduction, check_dtype, check_op
from sparkle_mesh.errors import UsageError


def checked(data: Any, *, written: bool = True) -> Arrays:
    return check_arrays(data, check_dtype, written=written)


def fresh(count: int, dtype: np.dtype[Any]) -> np.ndarray:
    return np.empty(count, dtype)


def double(data: Any) -> None:
    """Write twice the contents back, as a collective of two equal ranks would."""
    for bucket in checked(data).buckets(fresh):
        bucket.commit(bucket.data * 2)


def layouts() -> dict[str, np.ndarray]:
    grid = np.arange(24, dtype=np.float32).reshape(4, 6)
    return {
        "plain": grid.copy(),
        "0-d": np.array(3.0),
        "empty": np.empty((0, 3), np.float32),
        "strided": grid[::2, ::3],
        "negative strides": grid.copy()[::-1, ::-1],
        "fortran": np.asfortranarray(grid),
        "transposed": grid.copy().T,
        "big-endian": np.arange(5, dtype=">f8"),
        "column": np.arange(10, dtype=np.int64).reshape(5, 2)[:, 1],
        "one element, odd strides": np.lib.stride_tricks.as_strided(np.ones(1), (1, 1), (0, 0)),
    }


@pytest.mark.parametrize("name", list(layouts()))
@pytest.mark.parametrize("form", ["array", "list", "dict"])
def test_every_layout_is_written_in_place(name: str, form: str) -> None:
    array = layouts()[name]
    expected = array * 2
    other = np.ones(3, np.float32)
    double({"array": array, "list": [array, other], "dict": {"a": array, "b": other}}[form])
    np.testing.assert_array_equal(array, expected)
    assert form == "array" or (other == 2).all()


def test_elements_between_the_strides_are_left_alone() -> None:
    grid = np.arange(10)
    double(grid[::3])
    assert grid.tolist() == [0, 1, 2, 6, 4, 5, 12, 7, 8, 18]


def test_a_plain_array_is_used_as_it_lies() -> None:
    array = np.zeros((3, 4), np.float32)
    (bucket,) = checked(array).buckets(fresh)
    assert not bucket.staged
    assert np.shares_memory(bucket.data, array)
    (staged,) = checked(array.T).buckets(fresh)
    assert staged.staged
    assert not np.shares_memory(staged.data, array)


def test_elements_meet_by_index_whatever_the_layout() -> None:
    c_order = np.arange(6, dtype=np.float32).reshape(2, 3)
    fortran = np.asfortranarray(c_order)
    big = c_order.astype(">f4")
    flat = [checked(array).buckets(fresh)[0].data.tolist() for array in (c_order, fortran, big)]
    assert flat == [[0, 1, 2, 3, 4, 5]] * 3
    signatures = {checked(array).look.signature() for array in (c_order, fortran, big)}
    assert len(signatures) == 1


def test_containers_become_one_vector_per_dtype() -> None:
    data = {"b": np.ones(2, np.float32), "a": np.zeros(3, np.float32), "n": np.ones(4, np.int8)}
    first, second = checked(data).buckets(fresh)
    assert (first.data.dtype, first.data.tolist()) == (np.float32, [0, 0, 0, 1, 1])
    assert (second.data.dtype, second.staged) == (np.int8, False)


def test_a_dict_is_the_same_in_any_order_of_insertion() -> None:
    one, two = np.ones(2), np.ones(3)
    assert checked({"x": one, "y": two}).look.signature() == checked({"y": two, "x": one}).look.signature()
    assert checked({"x": one, "y": two}).look.signature() != checked({"x": one, "z": two}).look.signature()
    assert checked([one, two]).look.signature() == checked((one, two)).look.signature()
    assert checked([one]).look.signature() != checked(one).look.signature()


def test_staging_need_not_be_filled() -> None:
    array = np.ones((2, 2)).T
    bucket = checked([array, np.ones(1)]).buckets(lambda count, dtype: np.full(count, 7, dtype), fill=False)[0]
    assert bucket.data.tolist() == [7] * 5


def test_subclasses_are_taken_as_plain_arrays() -> None:
    class Reversed(np.ndarray):
        def reshape(self, *_: Any, **__: Any) -> Any:
            raise NotImplementedError

    array = np.array([[1.0, 2.0]]).view(Reversed)
    double(array)
    assert array.tolist() == [[2.0, 4.0]]


def test_nothing_at_all_may_be_passed_in_a_container() -> None:
    assert checked([]).buckets(fresh) == []
    assert checked({}).nbytes == 0


class Foreign:
    pass


READ_ONLY = np.ones(3)
READ_ONLY.flags.writeable = False
BASE = np.zeros(100)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (3.0, r"the data is the number 3\.0.*np\.array\(3\.0\)"),
        (True, "the data is the number True"),
        (np.float32(2), "is the number"),
        ([np.ones(2), 5], "item 1 is the number 5"),
        ({"bias": 5}, "the value of 'bias' is the number 5"),
        ([[np.ones(2)]], "item 0 is a list inside a container"),
        ({"layer": {"w": np.ones(2)}}, "the value of 'layer' is a dict inside"),
        ({1: np.ones(2)}, "key 1 is not text"),
        ({"w": np.ones(2), "\ud800": np.ones(2)}, "half a character"),
        (Foreign(), r"is a .*Foreign; pass a NumPy array"),
        ("text", "is a builtins.str"),
        (None, "is a builtins.NoneType"),
        (np.ma.masked_array([1.0], [True]), "masked array"),
        (READ_ONLY, "the array is read-only.*copy"),
        ([np.ones(1), READ_ONLY], "array 1 is read-only"),
        (np.lib.stride_tricks.as_strided(np.zeros(4), (3, 2), (8, 8)), "elements share memory"),
        ([BASE, BASE], "array 0 and array 1 share memory|array 1 and array 0 share memory"),
        ({"a": BASE[:60], "b": BASE[50:]}, "array a and array b share memory"),
        ([BASE[::2], BASE[::4]], "share memory"),
        (np.ones(2, bool), "dtype bool.*convert it to an integer"),
        (np.ones(2, np.longdouble), "dtype float128.*float64"),
        (np.ones(2, np.clongdouble), "dtype complex256.*complex128"),
        (np.ones(2, [("a", "f4")]), "can be reduced: convert it"),
        (np.array([None]), "dtype object"),
        (np.array(["a"]), "dtype <U1"),
        ([np.ones(1), np.ones(1, "M8[s]")], "array 1 is of dtype datetime64"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason(data: Any, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        checked(data)


def test_neighbours_that_only_interleave_are_accepted() -> None:
    grid = np.zeros((10, 3))
    checked([grid[:, 0], grid[:, 1], grid[:, 2]])
    checked([BASE[:50], BASE[50:]])
    checked([BASE[::2], BASE[1::2]])


def test_sharing_that_is_too_hard_to_rule_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_hard(*_: object, **__: object) -> bool:
        raise np.exceptions.TooHardError

    monkeypatch.setattr(np, "shares_memory", too_hard)
    with pytest.raises(UsageError, match="share memory"):
        checked([BASE[::2], BASE[1::2]])


def test_read_only_arrays_may_be_read() -> None:
    assert checked(READ_ONLY, written=False).nbytes == 24


def test_too_many_arrays_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "COLLECTIVE_ARRAYS_MAX_COUNT", 2)
    with pytest.raises(UsageError, match="3 arrays in one call are over the limit of 2"):
        checked([np.ones(1), np.ones(1), np.ones(1)])


def test_descriptions_are_readable_and_bounded() -> None:
    assert checked(np.ones((3, 4), np.float32)).look.describe() == "float32[3, 4]"
    assert checked([np.ones(1), np.ones((), ">i4")]).look.describe() == "[float64[1], int32[]]"
    assert checked({"w": np.ones(1)}).look.describe() == "{'w': float64[1]}"
    many = checked([np.ones(1) for _ in range(100)])
    assert "84 more" in many.look.describe()
    wide = checked({f"{i:02d}" + "k" * 500: np.ones((1,) * 32) for i in range(40)})
    assert "…" in wide.look.describe()
    assert len(Call("all_reduce", "ring", wide).describe()) <= limits.COLLECTIVE_DESCRIPTION_MAX_CHARS
    huge = checked({f"{i:02d}" + "k" * 500: np.ones((1,) * 60, np.float32) for i in range(16)})
    assert len(Call("all_reduce", "ring", huge).describe()) == limits.COLLECTIVE_DESCRIPTION_MAX_CHARS


def test_ops_are_known_and_means_are_of_floats() -> None:
    with pytest.raises(UsageError, match="op 'median' is not one of 'sum', 'mean', 'min', 'max', 'prod'"):
        check_op("median", np.dtype(np.float32), "the array")
    with pytest.raises(UsageError, match=r"mean.*int64.*convert"):
        check_op("mean", np.dtype(np.int64), "the array")
    check_op("mean", np.dtype(np.float64), "the array")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_mean_divides_once_when_it_is_complete(dtype: type) -> None:
    out = np.empty(2, dtype)
    mean = Reduction("mean", 3)
    mean.combine(np.array([1, 2], dtype), np.array([3, 4], dtype), out)
    assert out.tolist() == [4, 6]
    mean.combine(np.array([2, 3], dtype), out, out)
    mean.finish(out)
    assert out.tolist() == [2, 3]


@pytest.mark.filterwarnings("error")
def test_overflow_is_the_numbers_own_affair() -> None:
    big = np.full(1, 3e38, np.float32)
    out = np.empty_like(big)
    Reduction("sum", 2).combine(big, big, out)
    assert np.isinf(out[0])
    wrapped = np.full(1, 200, np.uint8)
    Reduction("sum", 2).combine(wrapped, wrapped, wrapped)
    assert wrapped[0] == 144
