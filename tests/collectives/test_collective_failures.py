"""Collectives that go wrong: every rank raises a named error, nobody hangs, no array is touched."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import trio

from sparkle_mesh import limits, wire
from sparkle_mesh.collectives import group as group_module
from sparkle_mesh.collectives.group import CollectiveGroup
from sparkle_mesh.collectives.messages import Abort, is_data
from sparkle_mesh.errors import (
    CollectiveAbortedError,
    CollectiveTimeoutError,
    DivergenceError,
    MeshClosedError,
    MismatchError,
    OutcomeUnknownError,
    PeerLostError,
    SparkleError,
)

F4 = np.float32


async def works(world: Any) -> None:
    """One more collective on every rank, to show that the group is in step."""
    data = [np.full(30_000, rank + 1.0, F4) for rank in range(world.size)]
    results = await world.each(lambda r, g: g.all_reduce(data[r], timeout_s=60))
    assert all(results[rank] is data[rank] for rank in range(world.size)), results
    assert all((part == sum(range(1, world.size + 1))).all() for part in data)


# --- Mismatch --------------------------------------------------------------------------------------

Call = Callable[[CollectiveGroup], Any]


def reduce(data: Any, op: str = "sum", algorithm: str = "ring") -> Call:
    return lambda group: group.all_reduce(data(), op, algorithm=algorithm, timeout_s=60)


MISMATCHES: dict[str, tuple[Call, Call, list[str]]] = {
    "shape": (reduce(lambda: np.ones((3, 4), F4)), reduce(lambda: np.ones((4, 3), F4)), ["[3, 4]", "[4, 3]"]),
    "count": (reduce(lambda: np.ones(300_000, F4)), reduce(lambda: np.ones(5, F4)), ["[300000]", "[5]"]),
    "dtype": (reduce(lambda: np.ones(3, F4)), reduce(lambda: np.ones(3)), ["float32[3]", "float64[3]"]),
    "op": (reduce(lambda: np.ones(3)), reduce(lambda: np.ones(3), "mean"), ["op='sum'", "op='mean'"]),
    "algorithm": (reduce(lambda: np.ones(3)), reduce(lambda: np.ones(3), "sum", "tree"), ["'ring'", "'tree'"]),
    "keys": (
        reduce(lambda: {"a": np.ones(3)}),
        reduce(lambda: {"b": np.ones(3)}),
        ["{'a': float64[3]}", "{'b': float64[3]}"],
    ),
    "form": (reduce(lambda: np.ones(3)), reduce(lambda: [np.ones(3)]), ["float64[3]", "[float64[3]]"]),
    "root": (
        lambda group: group.broadcast(np.ones(50_000), 0, timeout_s=60),
        lambda group: group.broadcast(np.ones(50_000), 1, timeout_s=60),
        ["root=0", "root=1"],
    ),
    "kind": (
        lambda group: group.barrier(timeout_s=60),
        reduce(lambda: np.ones(300_000, F4)),
        ["barrier()", "all_reduce(float32[300000]"],
    ),
    "many arrays": (
        reduce(lambda: [np.ones(1) for _ in range(50)]),
        reduce(lambda: [np.ones(1) for _ in range(51)]),
        ["34 more", "35 more"],
    ),
}


@pytest.mark.parametrize("name", list(MISMATCHES))
@pytest.mark.parametrize("size", [2, 3, 5])
async def test_calls_that_differ_are_told_alike_to_every_rank(
    name: str, size: int, make_world: Any, autojump_clock: trio.testing.MockClock
) -> None:
    usual, other, expected = MISMATCHES[name]
    async with make_world(size, delay_s=0.01).running() as world:
        for deviant in range(size):
            results = await world.each(lambda r, g, d=deviant: (other if r == d else usual)(g))
            assert {type(result) for result in results} == {MismatchError}
            assert len({str(result) for result in results}) == 1
            text = str(results[0])
            assert all(part in text for part in expected), text
            if size > 2:
                assert f"rank {deviant} called" in text
                assert text.index(expected[0]) < text.index(expected[1])
            await works(world)


async def test_three_different_calls_are_all_named(make_world: Any) -> None:
    async with make_world(3).running() as world:
        results = await world.each(lambda r, g: g.all_reduce(np.ones(r + 1), timeout_s=5))
        assert "float64[1]" in str(results[2])
        assert "float64[2]" in str(results[2])
        assert "float64[3]" in str(results[2])


async def test_a_mismatch_waits_for_all_to_have_called(make_world: Any, autojump_clock: trio.testing.MockClock) -> None:
    async with make_world(3, delay_s=0.01).running() as world:
        for seconds in ([5, 5], [5, 7]):
            started = trio.current_time()
            results = await world.each(
                lambda r, g, s=seconds: g.all_reduce(np.ones(r + 1), timeout_s=s[r]), ranks=[0, 1]
            )
            assert trio.current_time() - started >= 5
            for result in results[:2]:
                assert isinstance(result, MismatchError)
                assert "rank 0 called all_reduce(float64[1]" in str(result)
                assert "rank 1 called all_reduce(float64[2]" in str(result)
                assert "rank 2 called nothing yet" in str(result)


# --- Loss ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["ring", "tree"])
@pytest.mark.parametrize(("size", "victim"), [(2, 0), (3, 1), (4, 3)])
async def test_a_link_cut_at_any_message_ends_in_a_named_error_everywhere(
    size: int, victim: int, algorithm: str, make_world: Any, autojump_clock: trio.testing.MockClock
) -> None:
    cut_at = 0
    while True:
        world = make_world(size, delay_s=0.01)
        peer = (victim + 1) % size
        world.links[victim][peer].cut_at = cut_at
        before = [np.full(40_000, rank + 1.0, F4) for rank in range(size)]
        data = [part.copy() for part in before]
        async with world.running():
            started = trio.current_time()
            results = await world.each(lambda r, g, d=data: g.all_reduce(d[r], algorithm=algorithm, timeout_s=300))
            assert trio.current_time() - started < 10
            done = [not isinstance(result, SparkleError) for result in results]
            for rank in range(size):
                if done[rank]:
                    assert (data[rank] == sum(range(1, size + 1))).all()
                else:
                    assert isinstance(results[rank], PeerLostError), repr(results[rank])
                    assert "lost rank" in str(results[rank])
                    np.testing.assert_array_equal(data[rank], before[rank])
            if all(done):
                break
            results = await world.each(lambda r, g, d=data: g.all_reduce(d[r], timeout_s=300))
            assert {type(result) for result in results} == {PeerLostError}
            assert trio.current_time() - started < 10
        cut_at += 1
    assert cut_at >= 2


async def test_a_rank_that_dies_is_named_to_all(make_world: Any, autojump_clock: trio.testing.MockClock) -> None:
    async with make_world(4, kind="memory", delay_s=0.01).running() as world, trio.open_nursery() as nursery:

        async def others() -> None:
            results = await world.each(
                lambda r, g: g.all_reduce(np.ones(500_000), algorithm="ring", timeout_s=300), ranks=[0, 1, 3]
            )
            for rank in (0, 1, 3):
                assert isinstance(results[rank], PeerLostError)
                assert "rank 2" in str(results[rank])
            assert trio.current_time() < 10

        nursery.start_soon(others)
        await trio.sleep(1)
        await world.kill(2)


async def test_membership_can_tell_of_a_loss(make_world: Any) -> None:
    world = make_world(3)
    async with world.running():
        async with trio.open_nursery() as nursery:

            async def first() -> None:
                results = await world.each(lambda r, g: g.barrier(timeout_s=5), ranks=[0, 1])
                assert {type(result) for result in results[:2]} == {PeerLostError}
                assert "rank 2: stopped answering" in str(results[0])
                assert "rank 2: stopped answering (as rank 0 tells)" in str(results[1])

            nursery.start_soon(first)
            nursery.start_soon(world.groups[0].wait_peer_lost, 2)
            await trio.testing.wait_all_tasks_blocked()
            world.groups[0].peer_lost(2, "stopped answering")
            world.groups[0].peer_lost(2, "said twice")
            world.groups[0].peer_lost(0, "oneself cannot be lost")
        with pytest.raises(PeerLostError, match="rank 2: stopped answering"):
            await world.groups[0].barrier()
    # After the run has ended too.
    world.groups[1].peer_lost(0, "all over")


async def test_a_loss_between_calls_reaches_those_who_did_not_notice(make_world: Any) -> None:
    async with make_world(3).running() as world:
        await works(world)
        world.groups[0].peer_lost(2, "stopped answering")
        results = await world.each(lambda r, g: g.barrier(timeout_s=5), ranks=[1, 0])
        assert "rank 2" in str(results[0])
        assert isinstance(results[1], PeerLostError)
        assert "rank 2: stopped answering (as rank 0 tells)" in str(results[1])


async def test_the_one_who_is_said_to_be_lost_is_told_by_whom(make_world: Any) -> None:
    async with make_world(2).running() as world, trio.open_nursery() as nursery:

        async def accused() -> None:
            with pytest.raises(PeerLostError, match="lost rank 0: it has lost its link to this rank: silence"):
                await world.groups[1].barrier(timeout_s=5)

        nursery.start_soon(accused)
        await trio.testing.wait_all_tasks_blocked()
        abort = Abort(epoch=3, operation=1, cause="lost", origin=0, lost=1, reason="silence")
        world.groups[0]._exchanges[1].post(wire.encode(abort))


async def test_leaving_right_after_the_last_collective_harms_nobody(
    make_world: Any, autojump_clock: trio.testing.MockClock
) -> None:
    for size in (2, 3, 5):
        for kind in ("pair", "memory"):
            async with make_world(size, kind=kind, delay_s=0.01).running() as world:
                for other in range(1, size):
                    if kind == "pair":
                        world.links[other][(other + 1) % size]._delay_s = 0.2
                data = [np.ones(100_000) for _ in range(size)]

                async def call(rank: int, group: CollectiveGroup, world: Any = world, data: Any = data) -> None:
                    await group.all_reduce(data[rank], timeout_s=60)
                    await world.kill(rank)

                assert await world.each(call) == [None] * size
                assert all((part == size).all() for part in data)


async def test_a_peer_that_takes_nothing_is_lost_in_the_end(make_world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "COLLECTIVE_OUTBOX_MAX_COUNT", 4)
    world = make_world(2)
    async with world.running(only=[0]):
        for _ in range(3):
            with trio.move_on_after(0.001):
                await world.groups[0].barrier(timeout_s=60)
        with pytest.raises(PeerLostError, match="rank 1: it has not taken 4 messages"):
            await world.groups[0].barrier(timeout_s=60)


# --- Time and cancellation ---------------------------------------------------------------------------


async def test_a_timeout_names_the_absent_and_what_they_did_last(
    make_world: Any, autojump_clock: trio.testing.MockClock
) -> None:
    async with make_world(4, delay_s=0.01).running() as world:
        await works(world)
        call = functools.partial(np.ones, 200_000)
        results = await world.each(lambda r, g: g.all_reduce(call(), timeout_s=3 + r), ranks=[0, 2])
        assert isinstance(results[0], CollectiveTimeoutError)
        text = str(results[0])
        assert "call number 2, did not finish in 3 s" in text
        assert "rank 1 has not called it (last heard of: call 1, all_reduce(float32[30000], op='sum'" in text
        assert "rank 3 has not called it" in text
        assert "rank 2 has not" not in text
        assert isinstance(results[2], CollectiveAbortedError)
        assert "given up by rank 0: did not finish in 3 s: rank 1 has not" in str(results[2])
        # The absent ranks come to that call later, are told, and all go on together.
        late = await world.each(lambda r, g: g.all_reduce(call(), timeout_s=3), ranks=[1, 3])
        assert {type(result) for result in (late[1], late[3])} == {CollectiveAbortedError}
        await works(world)


async def test_a_timeout_names_those_who_did_not_finish(
    make_world: Any, autojump_clock: trio.testing.MockClock
) -> None:
    async with make_world(3, delay_s=0.01).running() as world:
        link = world.links[0][1]

        def stall(header: bytes) -> None:
            if is_data(memoryview(header)):
                link._delay_s = 100.0

        link.spy = stall
        results = await world.each(lambda r, g: g.all_reduce(np.ones(300), algorithm="ring", timeout_s=4 + r))
        assert isinstance(results[0], CollectiveTimeoutError)
        assert "all ranks have called it, but rank 1 and rank 2 did not finish" in str(results[0])
        assert isinstance(results[1], CollectiveTimeoutError | CollectiveAbortedError)


async def test_words_for_a_peer_that_takes_no_more_are_dropped(make_world: Any) -> None:
    async with make_world(2).running() as world:
        # The other way still works: what the peer has said is read first.
        world.links[0][1].cut_at = 0
        world.links[0][1].aclose = world.links[0][1]._outgoing.aclose
        results = await world.each(lambda r, g: g.barrier(timeout_s=5))
        assert {type(result) for result in results} == {PeerLostError}


async def test_a_rank_far_behind_catches_up(
    make_world: Any, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "COLLECTIVE_OPERATIONS_AHEAD_MAX_COUNT", 3)
    async with make_world(2, delay_s=0.001).running() as world:
        for _ in range(10):
            with pytest.raises(CollectiveTimeoutError):
                await world.groups[0].all_reduce(np.ones(10), timeout_s=1)
        assert len(world.groups[1]._exchanges[0].ahead) == 3
        for _ in range(10):
            with pytest.raises(CollectiveAbortedError):
                await world.groups[1].all_reduce(np.ones(10), timeout_s=1)
        await works(world)


async def test_a_call_that_waits_for_its_turn_times_out_by_itself(
    make_world: Any, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "COLLECTIVE_IN_FLIGHT_MAX_COUNT", 1)
    async with make_world(2, delay_s=0.01).running() as world:

        async def impatient() -> None:
            with pytest.raises(CollectiveTimeoutError, match="did not start in 1 s: calls take turns, and an earlier"):
                await world.groups[0].barrier(timeout_s=1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: world.groups[0].all_reduce(np.ones(3), timeout_s=60))
            await trio.sleep(0.1)
            nursery.start_soon(impatient)
            await trio.sleep(5)
            await world.groups[1].all_reduce(np.ones(3))
            # It counts all the same.
            with pytest.raises(CollectiveAbortedError, match="given up before it began"):
                await world.groups[1].barrier()
            nursery.start_soon(lambda: world.groups[0].barrier(timeout_s=60))
            await world.groups[1].barrier(timeout_s=60)


@pytest.mark.parametrize("delay", [0.0, 0.005, 0.015, 0.025, 0.035, 0.045, 0.055, 0.065])
async def test_cancellation_at_any_moment_ends_it_for_all(
    delay: float, make_world: Any, autojump_clock: trio.testing.MockClock
) -> None:
    async with make_world(3, delay_s=0.01).running() as world:
        data = [np.ones(100_000) for _ in range(3)]
        scope = trio.CancelScope()

        async def call(rank: int, group: CollectiveGroup) -> Any:
            if rank == 1:
                with scope:
                    return await group.all_reduce(data[rank], timeout_s=300)
                return "cancelled"
            return await group.all_reduce(data[rank], timeout_s=300)

        async def cancel() -> None:
            await trio.sleep(delay)
            scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancel)
            results = await world.each(call)
        assert trio.current_time() < 5
        if isinstance(results[0], CollectiveAbortedError):
            assert results[1] == "cancelled"
            assert "given up by rank 1: its call was cancelled" in str(results[0])
            assert isinstance(results[2], CollectiveAbortedError)
            assert all((part == 1).all() for part in data)
            await works(world)
        else:
            # It held its result, and a moment later knew that all have it: that is what it returns, and nobody leaves.
            assert not isinstance(results[1], str)
            assert all((part == 3).all() for part in data)
            await works(world)


async def test_a_deadline_after_the_result_is_there_means_leaving(
    make_world: Any, autojump_clock: trio.testing.MockClock
) -> None:
    world = make_world(3)
    # Rank 0's last word to rank 2 never arrives in time.
    link = world.links[0][2]

    async with world.running():

        def hold(header: bytes) -> None:
            if not is_data(memoryview(header)) and b"prepared" in header:
                link._delay_s = 100.0

        link.spy = hold
        data = [np.ones(10) for _ in range(3)]
        results = await world.each(lambda r, g: g.all_reduce(data[r], timeout_s=5 if r == 2 else 300))
        assert isinstance(results[2], OutcomeUnknownError)
        assert "others may have returned" in str(results[2])
        assert (data[2] == 1).all()
        assert (data[0] == 3).all()
        with pytest.raises(OutcomeUnknownError):
            await world.groups[2].barrier()
        # The others find it gone.
        results = await world.each(lambda r, g: g.barrier(timeout_s=300), ranks=[0, 1])
        assert {type(result) for result in results[:2]} == {PeerLostError}


async def test_cancelling_a_finished_call_still_delivers_it(make_world: Any) -> None:
    async with make_world(2).running() as world:
        data = [np.ones(3), np.ones(3)]
        with trio.CancelScope() as scope:
            group = world.groups[0]

            def finish_and_cancel(operation: Any) -> None:
                group_module.CollectiveGroup.progress(group, operation)
                if operation.finished.is_set():
                    scope.cancel()

            group.progress = finish_and_cancel
            async with trio.open_nursery() as nursery:
                nursery.start_soon(world.groups[1].all_reduce, data[1])
                await group.all_reduce(data[0])
        assert data[0].tolist() == [2, 2, 2]


# --- Ends ------------------------------------------------------------------------------------------


async def test_closing_ends_what_is_in_flight_and_all_later_calls(make_world: Any) -> None:
    async with make_world(2).running() as world:

        async def waiting() -> None:
            with pytest.raises(MeshClosedError, match="closed"):
                await world.groups[0].barrier()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(waiting)
            await trio.testing.wait_all_tasks_blocked()
            world.groups[0].close()
        with pytest.raises(MeshClosedError):
            await world.groups[0].all_reduce(np.ones(3))


async def test_cancelling_run_ends_what_is_in_flight(make_world: Any) -> None:
    async with make_world(2).running() as world:

        async def waiting() -> None:
            with pytest.raises(MeshClosedError, match="left while"):
                await world.groups[0].barrier()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(waiting)
            await trio.testing.wait_all_tasks_blocked()
            world.scopes[0].cancel()


async def test_results_that_differ_are_never_delivered(make_world: Any) -> None:
    async with make_world(3).running() as world:
        # What rank 0 passes on to rank 1 in the all-gather is changed on its way, as faulty memory might.
        def flip(header: bytes, payload: bytes) -> bytes:
            if is_data(memoryview(header)) and header[2] >= 2:
                return payload[:-1] + bytes([payload[-1] ^ 1])
            return payload

        world.links[0][1].tamper = flip
        data = [np.ones(99, F4) for _ in range(3)]
        results = await world.each(lambda r, g: g.all_reduce(data[r], algorithm="ring", timeout_s=5))
        assert {type(result) for result in results} == {DivergenceError}
        assert len({str(result) for result in results}) == 1
        assert "differ by their digests" in str(results[0])
        assert all((part == 1).all() for part in data)
        world.links[0][1].tamper = None
        await works(world)
