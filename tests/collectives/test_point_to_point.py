"""Send and receive: matched by who, tag and order alone, agreed by the two, and failing on both."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing

from sparkle_mesh import limits, wire
from sparkle_mesh.collectives.messages import Begin, Stream
from sparkle_mesh.errors import (
    CollectiveAbortedError,
    CollectiveTimeoutError,
    MismatchError,
    OutcomeUnknownError,
    PeerLostError,
    UsageError,
)

KINDS = ["pair", "memory"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (300, 400)])
async def test_arrives_whole_and_in_order(kind: str, shape: tuple[int, ...], make_world: Any) -> None:
    data = [np.random.default_rng(n).standard_normal(shape).astype("f4") for n in range(3)]
    got = [np.zeros(shape, "f4") for _ in data]
    async with make_world(3, kind=kind).running() as world:

        async def call(rank: int, group: Any) -> None:
            for given, place in zip(data, got, strict=True):
                if rank == 2:
                    assert await group.send(given, to=0) is given
                    assert group.last_outcome.contributors == (2,)
                elif rank == 0:
                    assert await group.receive(place, source=2) is place
            await group.barrier()

        assert await world.each(call) == [None] * 3
    for given, place in zip(data, got, strict=True):
        np.testing.assert_array_equal(given, place)


async def test_containers_and_any_layout(make_world: Any) -> None:
    given = {"a": np.arange(12.0).reshape(3, 4), "b": np.arange(5, dtype=">i2")}
    given["a"].setflags(write=False)
    place = {"a": np.zeros((4, 3)).T, "b": np.zeros(10, "<i2")[::2]}
    async with make_world(2).running() as world:
        await world.each(lambda r, g: g.send(given, 1) if not r else g.receive(place, 0))
    np.testing.assert_array_equal(place["a"], given["a"])
    np.testing.assert_array_equal(place["b"], given["b"])


async def test_all_pairs_and_collectives_at_the_same_time(
    make_world: Any, autojump_clock: trio.testing.MockClock
) -> None:
    size = 5
    async with make_world(size, delay_s=0.01).running() as world:

        async def call(rank: int, group: Any) -> None:
            got: dict[tuple[int, int], Any] = {}

            async def send(other: int) -> None:
                for n in range(3):
                    await group.send(np.full(50_000, 100.0 * rank + n), other, tag="x" if n == 1 else None)

            async def receive(other: int) -> None:
                # The one with a tag may be taken before those without.
                for n in (1, 0, 2):
                    place = np.zeros(50_000)
                    got[other, n] = place
                    nursery.start_soon(take, place, other, "x" if n == 1 else None)
                    await trio.lowlevel.checkpoint()

            async def take(place: Any, other: int, tag: str | None) -> None:
                await group.receive(place, other, tag=tag)

            total = np.full(70_000, rank + 1.0)
            async with trio.open_nursery() as nursery:
                for other in range(size):
                    if other != rank:
                        nursery.start_soon(send, other)
                        nursery.start_soon(receive, other)
                await group.all_reduce(total)
            assert set(total) == {15.0}
            for (other, n), place in got.items():
                assert set(place) == {100.0 * other + n}

        assert await world.each(call) == [None] * size


async def test_what_differs_is_refused_on_both_and_the_next_call_works(make_world: Any) -> None:
    async with make_world(3).running() as world:
        place = np.zeros(4)
        sent, received, _ = await world.each(
            lambda r, g: g.send(np.ones(3), 1) if not r else g.receive(place, 0), ranks=[0, 1]
        )
        assert isinstance(sent, MismatchError)
        assert str(sent) == str(received)
        assert "What is received must look like what is sent" in str(sent)
        assert "rank 0 called send(float64[3], to=1); rank 1 called receive(float64[4], source=0)" in str(sent)
        assert not place.any()

        refused, told, _ = await world.each(
            lambda r, g: g.send("text", 1) if not r else g.receive(place, 0), ranks=[0, 1]
        )
        assert isinstance(refused, UsageError)
        assert isinstance(told, CollectiveAbortedError)

        await world.each(lambda r, g: g.send(np.ones(4), 1) if not r else g.receive(place, 0), ranks=[0, 1])
        assert place.all()


@pytest.mark.parametrize(("kind", "wrong"), [("send", 0), ("send", 2), ("receive", -1), ("receive", True)])
async def test_who_is_no_other_rank_is_refused(kind: str, wrong: Any, make_world: Any) -> None:
    async with make_world(2).running() as world:
        with pytest.raises(UsageError, match="this rank" if wrong == 0 and wrong is not True else "not a rank"):
            await getattr(world.groups[0], kind)(np.ones(1), wrong)


async def test_nobody_receives(make_world: Any, autojump_clock: trio.testing.MockClock) -> None:
    async with make_world(3).running() as world:
        with pytest.raises(CollectiveTimeoutError, match="rank 2 has not called it"):
            await world.groups[0].send(np.ones(3), 2, timeout_s=1)
        # It counts for the two; all others and all other calls go on.
        with pytest.raises(CollectiveAbortedError, match="given up by rank 0"):
            await world.groups[2].receive(np.ones(3), 0)
        results = await world.each(lambda r, g: g.all_reduce(np.ones(2)))
        assert all(result[0] == 3 for result in results)


async def test_a_call_that_is_cancelled_ends_the_other(make_world: Any, autojump_clock: trio.testing.MockClock) -> None:
    async with make_world(2, delay_s=0.1).running() as world:

        async def call(rank: int, group: Any) -> None:
            if rank:
                with trio.move_on_after(1):
                    await group.receive(np.ones(3), 0)
                return
            await trio.sleep(2)
            with pytest.raises(CollectiveAbortedError, match="its call was cancelled"):
                await group.send(np.ones(3), 1)

        assert await world.each(call) == [None] * 2


async def test_the_loss_of_a_third_does_not_end_what_two_have_begun(
    make_world: Any, autojump_clock: trio.testing.MockClock
) -> None:
    async with make_world(3, delay_s=0.2).running() as world:
        place = np.zeros(200_000)

        async def call(rank: int, group: Any) -> Any:
            if rank == 2:
                await trio.sleep(0.1)
                await world.kill(2)
                return None
            return await (group.send(np.ones(200_000), 1) if not rank else group.receive(place, 0))

        sent, received, _ = await world.each(call)
        assert received is place, received
        assert not isinstance(sent, Exception)
        assert place.all()
        with pytest.raises(PeerLostError):
            await world.groups[0].send(place, 1)


async def test_the_loss_of_the_other_ends_it(make_world: Any, autojump_clock: trio.testing.MockClock) -> None:
    async with make_world(3).running() as world:

        async def call(rank: int, group: Any) -> Any:
            if rank == 1:
                return await group.receive(np.zeros(3), 2)
            await trio.sleep(1)
            await world.kill(2)
            return None

        results = await world.each(call, ranks=[1, 2])
        assert isinstance(results[1], PeerLostError)


async def test_who_has_no_part_may_not_speak_of_it(make_world: Any, autojump_clock: trio.testing.MockClock) -> None:
    """A third rank that claims to have begun a call between two, while it is on and before it is."""
    for early in (False, True):
        async with make_world(3).running(only=[0, 1]) as world:
            begin = wire.encode(
                Begin(
                    epoch=3,
                    lineage=world.groups[0].lineage,
                    operation=Stream("", (0, 1)).operation(1),
                    kind="send",
                    digest=bytes(32),
                    description="send()",
                )
            )
            async with trio.open_nursery() as nursery:
                if early:
                    await world.links[2][0].send(begin)
                    await trio.sleep(1)
                nursery.start_soon(raises_lost_or_timeout, world.groups[0])
                await trio.sleep(1)
                if not early:
                    await world.links[2][0].send(begin)
            assert world.groups[0].protocol_errors == 1


async def raises_lost_or_timeout(group: Any) -> None:
    with pytest.raises((PeerLostError, CollectiveTimeoutError)):
        await group.send(np.ones(3), 1, timeout_s=5)


async def test_hundreds_that_wait_hold_up_nobody(make_world: Any, autojump_clock: trio.testing.MockClock) -> None:
    count = 200
    async with make_world(2).running() as world:

        async def call(rank: int, group: Any) -> None:
            places = [np.zeros(2) for _ in range(count)]
            async with trio.open_nursery() as nursery:
                for number, place in enumerate(places):
                    act = group.receive if rank == 0 else group.send
                    nursery.start_soon(
                        partial(act, place + number * rank if rank else place, 1 - rank, tag=f"t{number}")
                    )
                await trio.testing.wait_all_tasks_blocked()
                await group.all_reduce(np.ones(2), timeout_s=20)
            if rank == 0:
                assert [place[0] for place in places] == list(range(count))

        assert await world.each(call) == [None] * 2


async def test_thousands_of_arrays_go_as_one(make_world: Any) -> None:
    count = 20_000
    given = [np.full(1, float(number)) if number % 2 else np.full((1, 1), number) for number in range(count)]
    places = [np.zeros_like(array) for array in given]
    async with make_world(2).running() as world:
        with trio.fail_after(20):
            await world.each(lambda r, g: g.send(given, np.int64(1)) if not r else g.receive(places, 0))
    assert all(place.item() == number for number, place in enumerate(places))


async def test_streams_have_a_bound(make_world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "COLLECTIVE_STREAMS_MAX_COUNT", 2)
    async with make_world(2).running() as world:
        await world.each(lambda r, g: g.send(np.ones(1), 1) if not r else g.receive(np.ones(1), 0))
        with pytest.raises(UsageError, match="one too many"):
            await world.groups[0].send(np.ones(1), 1, tag="more")


async def test_a_sender_that_gives_up_when_the_other_may_have_all_does_not_know(
    make_world: Any, autojump_clock: trio.testing.MockClock
) -> None:
    async with make_world(2, delay_s=3.0).running() as world:

        async def call(rank: int, group: Any) -> Any:
            return await (group.send(np.ones(3), 1, timeout_s=4) if not rank else group.receive(np.zeros(3), 0))

        sent, received = await world.each(call)
        assert isinstance(sent, OutcomeUnknownError)
        assert not isinstance(received, CollectiveAbortedError)
