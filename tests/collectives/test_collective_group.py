"""Collectives that go well: right numbers, the same bits everywhere, arrays of all kinds."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import trio

from sparkle_mesh import limits
from sparkle_mesh.collectives.executor import BufferPool, Execution, Lane
from sparkle_mesh.collectives.group import CollectiveGroup
from sparkle_mesh.collectives.plan import make_plan
from sparkle_mesh.collectives.reduction import Reduction
from sparkle_mesh.collectives.ring import ring_all_reduce
from sparkle_mesh.collectives.schedule import Content, Copy, Receive, Reduce, Schedule, Send, Space
from sparkle_mesh.errors import CollectiveAbortedError, UsageError

SIZES = [1, 2, 3, 4, 7]
DTYPES = ["f4", "f8", "i1", "u2", "i4", "u8"]


def numbers(dtype: str, count: int, rank: int) -> np.ndarray:
    generator = np.random.default_rng([rank, count])
    if dtype.startswith("f"):
        return generator.standard_normal(count).astype(dtype)
    return generator.integers(0, 100, count).astype(dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("algorithm", "kind"), [("auto", "memory"), ("ring", "pair"), ("tree", "pair")])
async def test_all_reduce_of_everything(
    size: int, algorithm: str, kind: str, make_world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small segments, so that ten thousand elements are many.
    monkeypatch.setattr(limits, "COLLECTIVE_SEGMENT_MIN_BYTES", 1024)
    monkeypatch.setattr(limits, "COLLECTIVE_SEGMENT_BYTES", 4096)
    async with make_world(size, kind=kind).running() as world:
        for dtype in DTYPES:
            for op in ("sum", "mean") if dtype.startswith("f") else ("sum",):
                for count in (0, 1, 3, 10000):
                    data = [numbers(dtype, count, rank) for rank in range(size)]
                    total = sum(part.astype("f8") for part in data) / (size if op == "mean" else 1)

                    async def call(rank: int, group: CollectiveGroup, data: Any = data, op: str = op) -> Any:
                        return await group.all_reduce(data[rank], op, algorithm=algorithm, timeout_s=5)

                    results = await world.each(call)
                    for rank in range(size):
                        assert results[rank] is data[rank]
                        assert data[rank].tobytes() == data[0].tobytes()
                    if dtype.startswith("f"):
                        np.testing.assert_allclose(data[0], total, rtol=2e-5, atol=1e-5)
                    else:
                        expected = total.astype("i8").astype(dtype)
                        np.testing.assert_array_equal(data[0], expected)


@pytest.mark.parametrize("slots", [0, 3])
@pytest.mark.parametrize("algorithm", ["ring", "tree"])
async def test_the_bits_do_not_depend_on_timing(
    algorithm: str, slots: int, make_world: Any, autojump_clock: trio.testing.MockClock
) -> None:
    seen = set()
    for slow in range(4):
        async with make_world(4, slots=slots, delay_s=0.001).running() as world:
            for link in world.links[slow].values():
                link._delay_s = 0.05
            data = [numbers("f4", 50_000, rank) for rank in range(4)]
            await world.each(lambda r, g, d=data: g.all_reduce(d[r], "mean", algorithm=algorithm, timeout_s=60))
            seen.update(part.tobytes() for part in data)
    assert len(seen) == 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [0, 1, 3, 10000, 100_000])
async def test_broadcast_from_every_root(size: int, count: int, make_world: Any) -> None:
    async with make_world(size).running() as world:
        for root in range(size):
            data = [numbers("f4", count, rank) for rank in range(size)]
            expected = data[root].copy()
            data[root].flags.writeable = False
            results = await world.each(lambda r, g, d=data, x=root: g.broadcast(d[r], x, timeout_s=5))
            assert all(results[rank] is data[rank] for rank in range(size))
            for part in data:
                np.testing.assert_array_equal(part, expected)


async def test_a_long_broadcast_down_the_tree(make_world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparkle_mesh.collectives.calls.choose_algorithm", lambda *_, **__: "binary_tree")
    async with make_world(7).running() as world:
        data = [{"a": numbers("f4", 300_000, rank), "b": numbers("f4", 5, rank)[::2]} for rank in range(7)]
        expected = {name: array.copy() for name, array in data[3].items()}
        await world.each(lambda r, g: g.broadcast(data[r], 3, timeout_s=5))
        for part in data:
            np.testing.assert_array_equal(part["a"], expected["a"])
            np.testing.assert_array_equal(part["b"], expected["b"])


async def test_a_barrier_waits_for_the_last(make_world: Any) -> None:
    async with make_world(3).running() as world:
        arrived: list[int] = []
        last = trio.Event()

        async def call(rank: int, group: CollectiveGroup) -> None:
            if rank == 2:
                await last.wait()
            arrived.append(rank)
            await group.barrier(timeout_s=5)
            assert len(arrived) == 3

        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.each, call)
            await trio.testing.wait_all_tasks_blocked()
            assert sorted(arrived) == [0, 1]
            last.set()


async def test_containers_are_reduced_in_place(make_world: Any) -> None:
    async with make_world(3).running() as world:

        def model() -> dict[str, np.ndarray]:
            return {
                "w": np.ones((3, 4), np.float32),
                "b": np.array(2.0, np.float32),
                "view": np.arange(10.0)[::3],
                "empty": np.empty((0, 2), np.float32),
                "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
                "big": np.arange(3, dtype=">i8"),
            }

        data = [model(), dict(reversed(model().items())), model()]
        results = await world.each(lambda r, g: g.all_reduce(data[r], timeout_s=5))
        for rank in range(3):
            assert results[rank] is data[rank]
            for name, array in model().items():
                np.testing.assert_array_equal(data[rank][name], array * 3)
        lists = [[np.ones(2), np.ones(70_000, np.int32)] for _ in range(3)]
        await world.each(lambda r, g: g.all_reduce(lists[r], timeout_s=5))
        assert all((array == 3).all() for row in lists for array in row)
        assert (await world.each(lambda r, g: g.all_reduce((), timeout_s=5))) == [(), (), ()]


async def test_calls_of_one_rank_take_turns(make_world: Any) -> None:
    async with make_world(2).running() as world:
        data = [[np.full(3, i, "f8") for i in range(5)] for _ in range(2)]

        async def call(rank: int, group: CollectiveGroup) -> None:
            async with trio.open_nursery() as nursery:
                for array in data[rank]:
                    nursery.start_soon(lambda a=array: group.all_reduce(a, timeout_s=5))
                    # Tasks start in no particular order: let each make its call before the next.
                    await trio.testing.wait_all_tasks_blocked()

        results = await world.each(call)
        assert results == [None, None]
        assert [array[0] for array in data[0]] == [0, 2, 4, 6, 8]


async def test_the_outcome_is_told(make_world: Any, autojump_clock: trio.testing.MockClock) -> None:
    async with make_world(4, delay_s=0.01).running() as world:
        assert world.groups[1].last_outcome is None
        data = [np.ones(4000, np.float32) for _ in range(4)]
        await world.each(lambda r, g: g.all_reduce(data[r], algorithm="ring", timeout_s=5))
        outcome = world.groups[1].last_outcome
        assert (outcome.kind, outcome.algorithm, outcome.contributors) == ("all_reduce", "ring", (0, 1, 2, 3))
        assert (outcome.epoch, outcome.operation, outcome.bytes) == (3, 1, 16000)
        assert 0 < outcome.seconds < 1
        assert abs(outcome.bytes_sent - 24000) < 1000
        await world.each(lambda r, g: g.broadcast(data[r], 2, timeout_s=5))
        assert world.groups[1].last_outcome.contributors == (2,)


async def test_a_group_of_one_needs_no_links() -> None:
    group = CollectiveGroup(rank=0, size=1, links={}, lineage=b"", epoch=0)
    data = np.arange(4.0)
    assert (await group.all_reduce(data, "mean")) is data
    assert data.tolist() == [0, 1, 2, 3]
    staged = np.arange(8.0)[::2]
    assert (await group.all_reduce([staged, data]))[0] is staged
    await group.broadcast(data)
    await group.barrier()
    assert group.last_outcome is not None
    assert group.last_outcome.kind == "barrier"


async def test_data_ahead_of_a_rank_is_held_or_held_back(make_world: Any) -> None:
    """Two ranks run ahead into a small and a large operation while the third has not called; then it does."""
    for count in (10, 5000, 400_000):
        async with make_world(3).running() as world:
            data = [np.full(count, rank + 1.0, np.float32) for rank in range(3)]
            late = trio.Event()

            async def call(rank: int, group: CollectiveGroup, late: Any = late, data: Any = data) -> None:
                if rank == 1:
                    await late.wait()
                await group.all_reduce(data[rank], algorithm="ring", timeout_s=5)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(world.each, call)
                await trio.testing.wait_all_tasks_blocked()
                held = [
                    ahead.held_bytes
                    for exchange in world.groups[1]._exchanges.values()
                    for ahead in exchange.ahead.values()
                ]
                assert max(held) <= limits.COLLECTIVE_EAGER_MAX_BYTES
                assert (max(held) > 0) == (count < 400_000)
                late.set()
            assert all((part == 6).all() for part in data)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda g: g.all_reduce(np.ones(2), "median"), "op 'median'"),
        (lambda g: g.all_reduce(np.ones(2), algorithm="star"), "algorithm 'star'"),
        (lambda g: g.all_reduce(np.ones(2, int), "mean"), "mean"),
        (lambda g: g.all_reduce([], "median"), "op 'median'"),
        (lambda g: g.all_reduce(5), "number 5"),
        (lambda g: g.broadcast(np.ones(2), 2), "root 2 is not a rank: there are ranks 0 to 1"),
        (lambda g: g.broadcast(np.ones(2), True), "root True"),
        (lambda g: g.broadcast(np.ones(2), "0"), "root '0'"),
        (lambda g: g.barrier(timeout_s=0), "timeout_s is 0"),
        (lambda g: g.barrier(timeout_s=float("nan")), "timeout_s is nan"),
        (lambda g: g.barrier(), "run.. of the collective group must be running"),
    ],
)
async def test_misuse_is_told_at_once(
    call: Callable[[CollectiveGroup], Awaitable[Any]], complaint: str, make_world: Any
) -> None:
    world = make_world(2)
    with pytest.raises(UsageError, match=complaint):
        await call(world.groups[0])
    assert world.groups[0].number == 0


async def test_misused_groups_are_refused(make_pair: Any) -> None:
    one, other = make_pair(0, 1)
    with pytest.raises(UsageError, match="rank 2 of 2"):
        CollectiveGroup(rank=2, size=2, links={}, lineage=b"", epoch=0)
    with pytest.raises(UsageError, match=r"needs links to \[1\], not to \[\]"):
        CollectiveGroup(rank=0, size=2, links={}, lineage=b"", epoch=0)
    with pytest.raises(UsageError, match="not to"):
        CollectiveGroup(rank=0, size=2, links={0: one, 1: other}, lineage=b"", epoch=0)
    group = CollectiveGroup(rank=0, size=1, links={}, lineage=b"", epoch=0)
    async with trio.open_nursery() as nursery:
        await nursery.start(group.run)
        with pytest.raises(UsageError, match="called once"):
            await group.run()
        nursery.cancel_scope.cancel()


def test_buffers_are_reused_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = BufferPool()
    first = pool.take(1000, np.dtype("f4"))
    address = first.ctypes.data
    pool.give(first)
    again = pool.take(600, np.dtype("f8"))
    assert again.ctypes.data != address
    fits = pool.take(999, np.dtype("f4"))
    assert fits.ctypes.data == address
    assert len(fits) == 999
    pool.give(fits)
    pool.give(again)
    small = pool.take(1, np.dtype("f4"))
    assert small.nbytes == 4
    monkeypatch.setattr(limits, "COLLECTIVE_BUFFERS_POOLED_MAX_COUNT", 2)
    monkeypatch.setattr(limits, "COLLECTIVE_BUFFERS_POOLED_MAX_BYTES", 5000)
    pool.give(small)
    assert pool.nbytes == 4 + 4800
    pool.give(np.empty(10_000, np.uint8))
    assert pool.nbytes == 0
    pool.give(pool.take(0, np.dtype("f4")))
    assert pool.nbytes == 0


async def hold_up(world: Any, count: int, data: list[np.ndarray], *, give_up: bool) -> list[Any]:
    """Rank 2 calls a tree reduction first, then rank 1, its parent, which can only go on once rank 0 has called."""
    results: list[Any] = [None] * 3
    scope = trio.CancelScope()

    async def call(rank: int) -> None:
        with scope if rank == 1 else trio.CancelScope():
            try:
                results[rank] = await world.groups[rank].all_reduce(data[rank], algorithm="tree", timeout_s=60)
            except CollectiveAbortedError as error:
                results[rank] = error

    async with trio.open_nursery() as nursery:
        for rank in (2, 1):
            nursery.start_soon(call, rank)
            await trio.testing.wait_all_tasks_blocked()
        if give_up:
            scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(call, 0)
    return results


@pytest.mark.parametrize("count", [100, 50_000])
async def test_one_child_waits_for_the_other(count: int, make_world: Any) -> None:
    async with make_world(3).running() as world:
        data = [np.full(count, rank + 1.0, np.float32) for rank in range(3)]
        results = await hold_up(world, count, data, give_up=False)
        assert all(results[rank] is data[rank] for rank in range(3))
        assert all((part == 6).all() for part in data)


@pytest.mark.parametrize("count", [100, 50_000])
async def test_giving_up_while_one_child_waits_for_the_other(count: int, make_world: Any) -> None:
    async with make_world(3).running() as world:
        data = [np.full(count, rank + 1.0, np.float32) for rank in range(3)]
        results = await hold_up(world, count, data, give_up=True)
        assert results[1] is None
        assert isinstance(results[0], CollectiveAbortedError)
        assert isinstance(results[2], CollectiveAbortedError)
        assert [part[0] for part in data] == [1, 2, 3]
        again = await world.each(lambda r, g: g.all_reduce(data[r], algorithm="tree", timeout_s=5))
        assert all(again[rank] is data[rank] for rank in range(3))


@pytest.mark.parametrize("cancel_after", [None, 15.0])
async def test_elements_are_not_overwritten_while_they_are_being_sent(
    cancel_after: float | None, make_world: Any, autojump_clock: trio.testing.MockClock
) -> None:
    async with make_world(3).running() as world:
        # Rank 0's sum has long arrived and come back finished before its send returns.
        world.links[0][1].linger_s = 10.0
        data = [np.full(3000, rank + 1.0, np.float32) for rank in range(3)]

        async def call(rank: int, group: CollectiveGroup) -> Any:
            with trio.move_on_after(float("inf") if cancel_after is None or rank else cancel_after):
                return await group.all_reduce(data[rank], algorithm="ring", timeout_s=300)
            return "cancelled"

        results = await world.each(call)
        if cancel_after is None:
            assert trio.current_time() > 20
            assert all((part == 6).all() for part in data)
        else:
            assert results[0] == "cancelled"
            assert isinstance(results[1], CollectiveAbortedError)
            world.links[0][1].linger_s = 0.0
            again = await world.each(lambda r, g: g.all_reduce(data[r], timeout_s=300))
            assert all(again[rank] is data[rank] for rank in range(3))


def test_the_executor_runs_every_instruction() -> None:
    """Copies too, which no algorithm here needs: rank 1's input goes to rank 0, and the sum comes back."""
    count = 4
    steps: list[tuple[Any, ...]] = [
        (
            Copy(0, count),
            Receive(1, 0, count, Space.SCRATCH, 0, 0, Content.INPUT),
            Reduce(1, 0, count, Space.WORK, finish=True),
            Send(1, 0, count, Space.WORK, 1, 0, Content.RESULT),
        ),
        (
            Copy(0, count),
            Send(0, 0, count, Space.WORK, 0, 0, Content.INPUT),
            Copy(0, count),
            Receive(0, 0, count, Space.WORK, 1, 0, Content.RESULT),
        ),
    ]
    sums = [np.empty(count), np.empty(count)]
    runs = []
    for rank in range(2):
        plan = make_plan(Schedule("copies", rank, 2, count, steps[rank]))
        lane = Lane(plan, np.full(count, rank + 1.0), sums[rank], Reduction("mean", 2), b"key")
        runs.append(Execution([lane], 0, 1))
    assert runs[0].next_send(1, True, lambda: None) is None
    for sender, receiver in ((1, 0), (0, 1)):
        message = runs[sender].next_send(receiver, True, lambda: None)
        assert message is not None
        expected = runs[receiver].next_receive(sender)
        assert expected is not None
        assert expected.header == message.header
        arrived = message.data.copy()
        runs[sender].sent(receiver, message)
        if expected.reduction is None:
            sums[receiver][:] = arrived
        expected.lane.done(expected.index)
        if expected.reduction is not None:
            expected.lane.reduce_part(expected.reduction, 0, arrived)
            expected.lane.done(expected.reduction)
        runs[receiver].received(sender, expected)
    assert runs[0].complete
    assert runs[1].complete
    assert runs[0].next_receive(1) is None
    assert [part.tolist() for part in sums] == [[1.5] * 4] * 2
    assert runs[0].digest(b"key") == runs[1].digest(b"key")


def test_what_a_departed_peer_was_being_sent_is_forgotten() -> None:
    plan = make_plan(ring_all_reduce(0, 2, 8, 2))
    execution = Execution([Lane(plan, np.ones(8), np.ones(8), Reduction("sum", 2), b"key")], 0, 1)
    message = execution.next_send(1, True, lambda: None)
    assert message is not None
    assert execution.sends_left == 4
    execution.forget_sends(1)
    assert execution.sends_left == 0
    execution.sent(1, message)
    assert execution.sends_left == 0
    assert execution.next_send(1, True, lambda: None) is None
