"""Several operations in flight: over every algorithm, with tags in other orders on other ranks, and when some fail."""

from __future__ import annotations

import gc
import random
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing

from sparkle_mesh import limits
from sparkle_mesh.collectives.compression import Compression
from sparkle_mesh.collectives.cost import ALL_REDUCE_ALGORITHMS
from sparkle_mesh.collectives.group import CollectiveGroup
from sparkle_mesh.collectives.messages import Stream
from sparkle_mesh.collectives.tickets import Queue
from sparkle_mesh.collectives.topology import Topology
from sparkle_mesh.errors import (
    CollectiveAbortedError,
    CollectiveTimeoutError,
    MeshClosedError,
    MismatchError,
    PeerLostError,
    UsageError,
)


def numbers(rank: int, call: int, count: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng([rank, call]).integers(-1000, 1000, count).astype(np.float32)


@pytest.mark.parametrize("seed", range(25))
async def test_tags_in_any_order_over_any_algorithms(
    seed: int, make_world: Any, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """Links hand over one message at a time and hold none: the hardest case for readers that wait for each other."""
    choose = random.Random(seed)
    monkeypatch.setattr(limits, "COLLECTIVE_SEGMENT_MIN_BYTES", 4096)
    monkeypatch.setattr(limits, "COLLECTIVE_EAGER_MAX_BYTES", 1024)
    size = choose.choice([2, 3, 4, 5, 6])
    counts = [10, 300, 9000, 40_000]
    calls = [
        (f"tag {n}" if choose.random() < 0.8 else None, choose.choice(ALL_REDUCE_ALGORITHMS), choose.choice(counts))
        for n in range(12)
    ]
    async with make_world(size, slots=choose.choice([0, 0, 2]), delay_s=choose.choice([0.0, 0.01])).running() as world:
        for group in world.groups:
            group.topology = Topology(size, tuple(rank % 2 for rank in range(size)))
        data = [[numbers(rank, call, count) for call, (_, _, count) in enumerate(calls)] for rank in range(size)]
        sums = [sum(data[rank][call].astype(np.float64) for rank in range(size)) for call in range(len(calls))]

        async def one(rank: int, group: Any) -> None:
            order = list(range(len(calls)))
            if rank:
                # Calls without a tag stay in their order, the others come in any.
                tagged = [call for call in order if calls[call][0] is not None]
                random.Random(f"{seed} {rank}").shuffle(tagged)
                order = [tagged.pop() if calls[call][0] is not None else call for call in order]
            pending = [
                group.all_reduce_async(data[rank][call], algorithm=calls[call][1], tag=calls[call][0], timeout_s=200)
                for call in order
            ]
            for each in pending:
                await each.wait()

        with trio.fail_after(300):
            assert await world.each(one) == [None] * size
        for call, expected in enumerate(sums):
            for rank in range(size):
                np.testing.assert_array_equal(data[rank][call], expected)
        assert not any(group.operations for group in world.groups)
        assert not any(exchange._held for group in world.groups for exchange in group._exchanges.values())


async def test_calls_begin_in_the_order_in_which_they_were_made(make_world: Any) -> None:
    async with make_world(3).running() as world:
        data = [[np.full(20_000, 10.0 * call + rank) for call in range(20)] for rank in range(3)]

        async def one(rank: int, group: Any) -> None:
            pending = []
            for call in range(20):
                if call % 5 == 4:
                    await group.all_reduce(data[rank][call], timeout_s=20)
                else:
                    pending.append(group.all_reduce_async(data[rank][call], timeout_s=20))
            assert [await each.wait() is not None for each in pending]
            assert all(each.done() and each.progress == 1.0 for each in pending)
            assert pending[3].contributors == (0, 1, 2)
            assert pending[3].outcome.bytes == 160_000
            assert "done" in repr(pending[3])

        assert await world.each(one) == [None] * 3
        for rank in range(3):
            for call in range(20):
                assert (data[rank][call] == 30.0 * call + 3).all()


async def test_a_call_that_fails_leaves_the_others_alone(make_world: Any) -> None:
    async with make_world(2).running() as world:
        one, other = world.groups
        good = [np.ones(30_000), np.ones(30_000)]
        first = [
            group.all_reduce_async(good[rank], tag="good", timeout_s=20) for rank, group in enumerate(world.groups)
        ]
        bad = one.all_reduce_async(np.ones(30_000), tag="bad", timeout_s=20)
        worse = other.all_reduce_async(np.ones(30_001), tag="bad", timeout_s=20)
        refused = one.all_reduce_async(np.ones(3, bool), tag="refused")
        left = other.all_reduce_async(np.ones(3, int), tag="refused")
        for pending, error in ((bad, MismatchError), (worse, MismatchError), (refused, UsageError)):
            with pytest.raises(error):
                await pending.wait()
        with pytest.raises(CollectiveAbortedError, match="dtype bool"):
            await left.wait()
        for rank, pending in enumerate(first):
            assert await pending.wait() is good[rank]
            assert (good[rank] == 2).all()


async def test_a_lost_rank_ends_all_that_is_in_flight(make_world: Any) -> None:
    async with make_world(3).running() as world:
        pending = [
            group.all_reduce_async(np.ones(30_000), tag=tag, timeout_s=20)
            for group in world.groups[:2]
            for tag in ("a", "b", "c")
        ]
        await trio.testing.wait_all_tasks_blocked()
        await world.kill(2)
        for each in pending:
            with pytest.raises(PeerLostError):
                await each.wait()


async def test_what_is_cancelled_ends_in_the_same_way_everywhere(
    make_world: Any, autojump_clock: trio.testing.MockClock
) -> None:
    """At any moment: before it begins, in the middle, when some have the result, and when it is over."""
    ended = [await cancelled_at_any_time(make_world, random.Random(seed)) for seed in range(30)]
    assert set(ended) == {"cancelled", "done"}


async def cancelled_at_any_time(make_world: Any, random_: random.Random) -> str:
    async with make_world(3, kind="memory", delay_s=0.01).running() as world:
        data = [np.full(50_000, 1.0 + rank) for rank in range(3)]
        pending: list[Any] = [None] * 3

        async def one(rank: int, group: Any) -> str:
            await trio.sleep(random_.uniform(0, 0.03))
            pending[rank] = group.all_reduce_async(data[rank], timeout_s=20)
            try:
                await pending[rank].wait()
            except CollectiveAbortedError:
                return "cancelled"
            return "done"

        async def cancel() -> None:
            await trio.sleep(random_.uniform(0, 0.1))
            if pending[0] is None:
                return
            pending[0].cancel()
            pending[0].cancel()

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(cancel)
                ended = await world.each(one)
        assert len(set(ended)) == 1
        for rank in range(3):
            assert (data[rank] == (6.0 if ended[0] == "done" else 1.0 + rank)).all()
        # The next call is the same one on all.
        after = [np.ones(3) for _ in range(3)]
        await world.each(lambda rank, group: group.all_reduce(after[rank], timeout_s=20))
        assert all((each == 3).all() for each in after)
        return str(ended[0])


async def test_what_is_cancelled_before_its_turn_is_given_up_in_it(make_world: Any) -> None:
    async with make_world(2).running() as world:
        one, other = world.groups
        first = one.all_reduce_async(np.ones(3), timeout_s=20)
        held = [one.all_reduce_async(np.ones(3), timeout_s=20) for _ in range(40)]
        held[-1].cancel()
        assert not held[-1].done()
        theirs = [other.all_reduce_async(np.ones(3), timeout_s=20) for _ in range(41)]
        with trio.fail_after(20):
            for each in (first, *held[:-1], *theirs[:-1]):
                assert (await each.wait() == 2).all()
            for each in (held[-1], theirs[-1]):
                with pytest.raises(CollectiveAbortedError, match="was cancelled"):
                    await each.wait()


async def test_waiting_may_end_sooner_and_begin_again(
    make_world: Any, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with make_world(2).running() as world:
        pending = world.groups[0].all_reduce_async(np.ones(3))
        with pytest.raises(CollectiveTimeoutError, match=r"has not ended in 1 s; it goes on"):
            await pending.wait(1)
        assert not pending.done()
        assert pending.progress < 1
        assert "% done" in repr(pending)
        await world.groups[1].all_reduce(np.ones(3))
        assert (await pending.wait() == 2).all()
        ends = world.groups[0].all_reduce_async(np.ones(3))
    with pytest.raises(MeshClosedError):
        await ends.wait()
    with pytest.raises(MeshClosedError):
        world.groups[0].all_reduce_async(np.ones(3))
    unheard = CollectiveGroup(rank=0, size=1, links={}, lineage=bytes(32), epoch=0)
    with pytest.raises(UsageError, match="must be running"):
        unheard.all_reduce_async(np.ones(3))


async def test_what_nobody_waited_for_is_logged(make_world: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with make_world(1).running() as world:
        pending = world.groups[0].all_reduce_async(np.ones(3), "median")
        while not pending.done():
            await trio.testing.wait_all_tasks_blocked()
        assert "failed" in repr(pending)
        del pending
        gc.collect()
    assert "nobody waited for all_reduce, which failed: op 'median'" in caplog.text


async def test_tags_are_texts_that_can_be_told_apart(make_world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with make_world(1).running() as world:
        group = world.groups[0]
        for tag in (3, "", "x" * 300, "\ud800"):
            with pytest.raises(UsageError, match="tag"):
                group.all_reduce_async(np.ones(1), tag=tag)
        await group.all_reduce(np.ones(1), tag="plumless")
        assert Stream("plumless").number == Stream("buckeroo").number
        with pytest.raises(UsageError, match="'buckeroo' has the same checksum as calls with tag 'plumless'"):
            group.all_reduce_async(np.ones(1), tag="buckeroo")
        monkeypatch.setattr(limits, "COLLECTIVE_STREAMS_MAX_COUNT", 2)
        with pytest.raises(UsageError, match="one too many"):
            group.all_reduce_async(np.ones(1), tag="another")


async def test_turns_come_in_the_order_of_tickets() -> None:
    queue = Queue()
    first, second, third = queue.take(), queue.take(), queue.take()
    second.leave()
    assert not second.passed.is_set()
    assert queue.busy
    first.leave()
    assert second.passed.is_set()
    await third.wait()
    third.leave()
    assert not queue.busy


# --- Weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "c8"])
async def test_weighted_means(dtype: str, make_world: Any) -> None:
    weights = [3, 0, 1.5]
    async with make_world(3).running() as world:
        arrays = [np.random.default_rng(rank).normal(size=(5, 700)).astype(dtype) for rank in range(3)]
        arrays[1][0] = np.nan  # has no weight
        given = [{"a": array.copy(), "b": array[:, ::2].copy()} for array in arrays]
        await world.each(lambda r, g: g.all_reduce(given[r], "mean", weight=weights[r], timeout_s=20))
        expected = (3 * arrays[0].astype("c16") + 1.5 * arrays[2].astype("c16")) / 4.5
        for part in given:
            np.testing.assert_allclose(part["a"], expected, rtol=2e-3 if dtype == "f2" else 1e-5, atol=1e-3)
            np.testing.assert_array_equal(part["b"], part["a"][:, ::2])
        assert len({part["a"].tobytes() for part in given}) == 1


@pytest.mark.parametrize("compression", ["int8", "bfloat16", "auto"])
async def test_weighted_means_of_what_is_compressed(compression: Any, make_world: Any) -> None:
    """Weights themselves are not: 1/100000 is still right."""
    weights = [1e-5, 0, 2e-5]
    async with make_world(3).running() as world:
        arrays = [[numbers(rank, 1, 5000), numbers(rank, 2, 30).astype("f2")] for rank in range(3)]
        given = [[array.copy() for array in both] for both in arrays]
        results = await world.each(
            lambda r, g: g.all_reduce(given[r], "mean", weight=weights[r], compression=compression, timeout_s=20)
        )
        assert all(result is both for result, both in zip(results, given, strict=True)), results
    for number in range(2):
        mean = (arrays[0][number].astype("f8") + 2 * arrays[2][number]) / 3
        assert len({both[number].tobytes() for both in given}) == 1
        np.testing.assert_allclose(given[0][number], mean, atol=0.02 * np.abs(mean).max())


@pytest.mark.parametrize("compression", [None, "int8"])
@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ({"w": np.ones(2, "f4"), "b": np.ones(2, "f4")}, {"w": np.ones(2, "f4"), "a": np.ones(2, "f4")}),
        (np.ones((2, 3), "f4"), np.ones((3, 2), "f4")),
        ([np.ones(2, "f4"), np.ones(3, "f4")], [np.ones(3, "f4"), np.ones(2, "f4")]),
        ([np.ones(5, "f4")], np.ones(5, "f4")),
        (np.ones(5, "f4"), np.ones(5, "f2")),
    ],
)
async def test_weights_do_not_hide_that_arrays_differ(
    mine: Any, theirs: Any, compression: Any, make_world: Any
) -> None:
    async with make_world(2).running() as world:
        results = await world.each(
            lambda r, g: g.all_reduce(theirs if r else mine, "mean", weight=1, compression=compression)
        )
        assert all(isinstance(result, MismatchError) for result in results), results
        assert "weighted mean" in str(results[0])


async def test_hundreds_of_tags_in_the_opposite_order(make_world: Any, autojump_clock: trio.testing.MockClock) -> None:
    count = 300
    async with make_world(2).running() as world:

        async def call(rank: int, group: Any) -> None:
            order = range(count) if rank else reversed(range(count))
            arrays = {number: np.full(3, float(number)) for number in order}
            pending = [
                group.all_reduce_async(array, tag=f"t{number}", timeout_s=30) for number, array in arrays.items()
            ]
            await group.all_reduce(np.ones(2), timeout_s=30)
            for each in pending:
                await each.wait()
            assert all(set(array) == {2.0 * number} for number, array in arrays.items())

        assert await world.each(call) == [None] * 2


async def test_weights_that_cannot_be(make_world: Any) -> None:
    async with make_world(2).running() as world:
        for weight, text in ((-1, "0 or more"), (np.inf, "finite"), ("1", "give a number"), (True, "give a number")):
            results = await world.each(lambda r, g, w=weight: g.all_reduce(np.ones(3), "mean", weight=w))
            assert all(text in str(result) for result in results), results
        results = await world.each(lambda r, g: g.all_reduce(np.ones(3), weight=1))
        assert all("op 'sum' does not go with weight" in str(result) for result in results)
        results = await world.each(lambda r, g: g.all_reduce(np.ones(3), "mean", weight=1, compression="int8"))
        assert all("the array is of dtype float64" in str(result) for result in results)
        results = await world.each(lambda r, g: g.all_reduce({"w": np.ones(3)}, "mean", weight=1, compression="int8"))
        assert all("array w is of dtype float64" in str(result) for result in results)
        for way, text in (("float16", "hold large ones"), (Compression("int8", error_feedback=True), "error feedback")):
            results = await world.each(
                lambda r, g, w=way: g.all_reduce(np.ones(3, "f4"), "mean", weight=1, compression=w)
            )
            assert all(text in str(result) for result in results)
        results = await world.each(lambda r, g: g.all_reduce(np.ones(3, "f4"), "mean", weight=1e-9, compression="int8"))
        assert all("with compression it must be 0, or from" in str(result) for result in results)
        results = await world.each(lambda r, g: g.all_reduce(np.ones(3, "f4"), "mean", weight=3e38))
        assert all("add up to more than a number holds" in str(result) for result in results)
        for weight in (1e39, 1e-50, 10**400):
            results = await world.each(lambda r, g, w=weight: g.all_reduce(np.ones(3, "f4"), "mean", weight=w))
            assert all("beyond what float32 of the array holds" in str(result) for result in results)
        data = [np.ones(3), np.ones(3)]
        results = await world.each(lambda r, g: g.all_reduce(data[r], "mean", weight=0))
        assert all("weights of all ranks are 0" in str(result) for result in results)
        assert all((part == 1).all() for part in data)
        results = await world.each(lambda r, g: g.all_reduce(np.ones(3), "mean", weight=1 if r else None))
        assert all(isinstance(result, MismatchError) for result in results)
