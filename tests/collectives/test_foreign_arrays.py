"""Arrays of other libraries in collectives: the same bits as NumPy's, in place where they can be written to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sparkle_mesh import async_collectives, mesh_collectives
from sparkle_mesh.collectives.arrays import check_arrays
from sparkle_mesh.collectives.foreign import Lent, lend, lend_for
from sparkle_mesh.collectives.reduction import check_dtype
from sparkle_mesh.errors import CollectiveAbortedError, DeviceError, MismatchError, UsageError
from tests.mesh.test_mesh_collectives import on_both

DTYPES = ["i1", "u2", "i4", "i8", "f2", "f4", "f8", "c8", "c16"]
SHAPES: list[tuple[int, ...]] = [(), (0,), (3, 0), (1,), (5,), (40, 50)]


def numbers(rank: int, shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    random = np.random.default_rng([rank, len(shape)])
    return np.asarray(random.normal(size=shape) * 20).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
async def test_the_same_bits_as_numpy(on_ranks: Any, lender: Any, dtype: str, shape: tuple[int, ...]) -> None:
    async def call(rank: int, mesh: Any) -> bytes:
        plain, lent = numbers(rank, shape, dtype), lender(numbers(rank, shape, dtype))
        assert await mesh.all_reduce(plain) is plain
        assert await mesh.all_reduce(lent) is lent
        assert lent.array.tobytes() == plain.tobytes()
        return plain.tobytes()

    results = await on_ranks(call)
    assert len(set(results)) == 1
    assert isinstance(results[0], bytes)


async def test_every_collective_gives_what_numpy_gives(on_ranks: Any, lender: Any, immutable: Any) -> None:
    async def call(rank: int, mesh: Any) -> None:
        def both(shape: tuple[int, ...], kind: Any) -> tuple[Any, Any]:
            return numbers(rank, shape, "f4"), kind(numbers(rank, shape, "f4"))

        def contents(value: Any) -> Any:
            return getattr(value, "array", value)

        for kind in (lender, immutable):
            for name, shape, arguments in (
                ("all_reduce", (4, 3), ("mean",)),
                ("broadcast", (4, 3), (1,)),
                ("reduce", (4, 3), ("sum", 2)),
                ("reduce_scatter", (4, 3), ("max",)),
                ("all_gather", (4, 3), ()),
                ("gather", (4, 3), (1,)),
                ("all_to_all", (3, 2), ()),
                ("scatter", (3, 2) if rank == 1 else (2,), (1,)),
            ):
                plain, lent = both(shape, kind)
                expected = await getattr(mesh, name)(plain, *arguments)
                got = await getattr(mesh, name)(lent, *arguments)
                np.testing.assert_array_equal(contents(got), expected)
                if kind is lender and expected is plain:
                    assert got is lent
                if kind is immutable and got is not None:
                    assert isinstance(got, immutable)
                    # Arrays that cannot be written to are as they were.
                    np.testing.assert_array_equal(lent.array, numbers(rank, shape, "f4"))
            plain, lent = both((7,), kind)
            if rank == 0:
                assert await mesh.send(lent, 1) is lent
            elif rank == 1:
                got = await mesh.receive(lent, 0)
                np.testing.assert_array_equal(got.array, numbers(0, (7,), "f4"))
            pending = mesh.all_reduce_async([lent])
            await mesh.all_reduce(plain)
            (got,) = await pending.wait()
            if rank > 1:
                assert pending.result() is await pending.wait()
            assert got.array.shape == (7,)

    results = await on_ranks(call)
    assert results == [None] * 3


async def test_containers_keep_their_form_and_may_be_mixed(on_ranks: Any, lender: Any, immutable: Any) -> None:
    async def call(rank: int, mesh: Any) -> None:
        plain, lent, fixed = np.ones(2), lender(np.ones(3)), immutable(np.ones(4))
        data = {"plain": plain, "lent": lent}
        assert await mesh.all_reduce(data) is data
        assert (plain == 3).all()
        assert (lent.array == 3).all()
        everything = {"plain": plain, "fixed": fixed, "lent": lent}
        got = await mesh.all_reduce(everything)
        assert list(got) == list(everything)
        assert got["plain"] is plain
        assert got["lent"] is lent
        assert got["fixed"].array.tolist() == [3] * 4
        assert fixed.array.tolist() == [1] * 4
        assert everything["fixed"] is fixed
        assert isinstance(await mesh.all_reduce((fixed, plain)), tuple)
        assert isinstance(await mesh.all_reduce([fixed, plain]), list)
        gathered = await mesh.all_gather({"b": lent, "a": plain})
        assert list(gathered) == ["a", "b"]
        rows = await mesh.all_gather([fixed, plain, lent])
        assert [type(row) for row in rows] == [immutable, np.ndarray, np.ndarray]
        # One rank's tensor is another's array.
        await mesh.all_reduce(lent if rank else lent.array)
        await mesh.reduce([fixed], root=1)

    assert await on_ranks(call) == [None] * 3


async def test_weights_and_compression_take_them_too(on_ranks: Any, lender: Any) -> None:
    async def call(rank: int, mesh: Any) -> None:
        for options in ({"weight": 1.0 + rank}, {"compression": "int8"}, {"weight": 2.0, "compression": "bfloat16"}):
            plain, lent = numbers(rank, (300,), "f4"), lender(numbers(rank, (300,), "f4"))
            await mesh.all_reduce(plain, "mean", **options)
            await mesh.all_reduce(lent, "mean", **options)
            assert plain.tobytes() == lent.array.tobytes()

    assert await on_ranks(call) == [None] * 3


async def test_uneven_batches_stand_in_for_them(on_ranks: Any, lender: Any, immutable: Any) -> None:
    async def call(rank: int, mesh: Any) -> list[float]:
        got = []
        async for batch in mesh.uneven([1.0] * (1 + rank)):
            one = await mesh.all_reduce({"w": lender(np.full(2, batch * (rank + 1)))}, "mean")
            two = await mesh.all_reduce(immutable(np.full(2, batch)), "sum")
            got.append((float(one["w"].array[0]), float(two.array[0])))
        return got

    assert await on_ranks(call) == [[(2.0, 3.0)], [(2.0, 3.0), (2.5, 2.0)], [(2.0, 3.0), (2.5, 2.0), (3.0, 1.0)]]


async def test_what_cannot_be_lent_is_refused_in_its_turn(on_ranks: Any, lender: Any) -> None:
    async def call(rank: int, mesh: Any) -> list[str]:
        fixed = np.ones(2)
        fixed.flags.writeable = False
        said = []
        for broken in (lender(fixed), lender(np.ones(2), version=0), [lender(np.ones(2)), lender(fixed)]):
            fine = [lender(np.ones(2)) for _ in range(2)] if isinstance(broken, list) else lender(np.ones(2))
            try:
                await mesh.all_reduce(broken if rank == 1 else fine)
            except (UsageError, CollectiveAbortedError) as error:
                said.append(f"{type(error).__name__} {error}")
        # The next call is the same one everywhere.
        after = lender(np.ones(2))
        await mesh.all_reduce(after)
        assert after.array.tolist() == [3, 3]
        return said

    results = await on_ranks(call)
    assert [said.split()[0] for said in results[0]] == ["CollectiveAbortedError"] * 3
    assert [said.split()[0] for said in results[1]] == ["UsageError"] * 3
    assert "the data, a " in results[1][0]
    assert "read-only" in results[1][1]
    assert "item 1, a " in results[1][2]


async def test_they_are_untouched_where_the_call_raises(make_world: Any, on_ranks: Any, lender: Any) -> None:
    async def call(rank: int, mesh: Any) -> str:
        data = {"a": lender(np.full(100, float(rank))), "b": lender(np.arange(9.0).reshape(3, 3).T)}
        kept = {name: value.array.copy() for name, value in data.items()}
        try:
            await mesh.all_reduce(data, "sum" if rank else "max")
        except MismatchError:
            for name, value in data.items():
                np.testing.assert_array_equal(value.array, kept[name])
            return "raised"
        return "returned"

    assert await on_ranks(call) == ["raised"] * 3

    async with make_world(2).running() as world:
        lent = [lender(np.full(5000, 1.0 + rank)) for rank in range(2)]
        for link in world.links[0].values():
            link.cut_at = link.stats.messages_sent + 3
        lends = [lend(value) for value in lent]
        errors = await world.each(lambda rank, group: group.all_reduce(lends[rank].arrays))
        assert all(isinstance(error, Exception) for error in errors)
        assert [set(value.array) for value in lent] == [{1.0}, {2.0}]


async def test_tasks_of_one_rank_may_settle_at_once(on_ranks: Any, immutable: Any) -> None:
    async def call(rank: int, mesh: Any) -> int:
        pending = mesh.all_reduce_async(immutable(np.ones(3)))
        made: list[Any] = []

        async def wait() -> None:
            made.append(await pending.wait())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            nursery.start_soon(wait)
        return len(set(map(id, made)))

    assert await on_ranks(call) == [1, 1, 1]


def test_memory_is_shared_and_never_copied(lender: Any) -> None:
    array = np.arange(12.0).reshape(3, 4)
    for each in (array, array.T, array[::2, 1::2], array[:0], array[1, 1:2].reshape(())):
        lent = lend(lender(each))
        assert lent.arrays.ctypes.data == each.ctypes.data or not each.size
        assert lent.arrays.shape == each.shape
        lent.arrays[...] += 1
        assert lent.settle() is not lent.arrays


def test_arrays_that_share_memory_are_refused(lender: Any) -> None:
    base = np.zeros(10)
    with pytest.raises(UsageError, match="share memory"):
        check_arrays(lend([lender(base), lender(base)]).arrays, check_dtype)
    with pytest.raises(UsageError, match="elements share memory"):
        check_arrays(lend(lender(np.lib.stride_tricks.as_strided(base, (3, 2), (8, 8)))).arrays, check_dtype)
    assert check_arrays(lend([lender(base[::2]), lender(base[1::2])]).arrays, check_dtype).nbytes == 80


def test_what_is_only_read_may_be_read_only(lender: Any, immutable: Any) -> None:
    array = np.ones(3)
    array.flags.writeable = False
    for kind, at_root in (("send", False), ("broadcast", True), ("reduce", False), ("all_gather", False)):
        lent = lend_for(kind, lender(array), at_root=at_root)
        assert np.shares_memory(lent.arrays, array)
        assert not lent.arrays.flags.writeable
    fixed = immutable(np.ones(2))
    assert lend_for("broadcast", fixed, at_root=True).settle() is fixed
    assert lend_for("broadcast", fixed, at_root=False).settle() is not fixed


def test_new_arrays_that_cannot_be_made_are_told_every_time(immutable: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(array: Any, *, device: Any) -> Any:
        raise RuntimeError(f"{device} is full")

    fixed = immutable(np.ones(2))
    lent = lend([fixed])
    monkeypatch.setattr(immutable, "asarray", refuse)
    for _ in range(2):
        with pytest.raises(DeviceError, match=r"the result cannot be made a .*Immutable on here: here is full"):
            lent.settle()
    monkeypatch.undo()
    assert lent.settle()[0].array.tolist() == [1, 1]


def test_arrays_of_numpy_lend_nothing() -> None:
    for data in (np.ones(2), [np.ones(2)] * 3, (np.ones(2),), {"a": np.ones(2)}):
        lent = lend_for("all_reduce", data)
        assert type(lent) is Lent
        assert lent.arrays is lent.settle() is data


@pytest.mark.parametrize("links", [["tcp"], ["shared_memory", "tcp"]])
def test_threads_lend_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lender: Any, links: list[str]) -> None:
    lent: list[str] = []

    def counted(kind: str, data: Any, **options: Any) -> Lent[Any]:
        lent.append(kind)
        return lend_for(kind, data, **options)

    def call(mesh: Any) -> None:
        mesh.all_reduce(np.ones(2))
        mesh.all_reduce(lender(np.ones(2)), tag="tagged")
        mesh.all_reduce_async(np.ones(2)).wait()
        mesh.broadcast([lender(np.ones(2))])

    monkeypatch.setattr(mesh_collectives, "lend_for", counted)
    monkeypatch.setattr(async_collectives, "lend_for", counted)
    assert on_both(tmp_path, call, links=links) == [None, None]
    assert sorted(lent) == ["all_reduce"] * 6 + ["broadcast"] * 2


def test_what_is_no_array_stays_as_it_is(lender: Any) -> None:
    for data in (None, 3, "text", {1: np.ones(1)}, [np.ones(1), None], [], {}, np.ones(2)):
        assert lend(data).arrays is data
        assert lend(data).settle() is data
    mixed = lend([lender(np.ones(1)), None])
    assert mixed.arrays[1] is None
    with pytest.raises(UsageError, match=r"item 1 is a builtins\.NoneType"):
        check_arrays(mixed.arrays, check_dtype)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    array=hnp.arrays(
        st.sampled_from([np.dtype(name) for name in DTYPES]), hnp.array_shapes(min_dims=0, max_dims=5, min_side=0)
    ),
    steps=st.lists(st.sampled_from([1, 2, -1, -3]), min_size=5, max_size=5),
    version=st.sampled_from([0, 1]),
)
def test_every_layout_is_read_as_it_is(lender: Any, array: Any, steps: list[int], version: int) -> None:
    view = array[tuple(slice(None, None, step) for step in steps[: array.ndim])] if array.ndim else array
    lent = lend_for("send", lender(view, version)).arrays
    assert lent.dtype == view.dtype
    assert lent.shape == view.shape
    assert lent.tobytes() == view.tobytes()
