"""Calls that one rank alone cannot make: they count on all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import trio

from sparkle_mesh.errors import CollectiveAbortedError, UsageError


async def works(world: Any) -> None:
    """One more collective on every rank, to show that the group is in step."""
    data = [np.full(30_000, rank + 1.0, np.float32) for rank in range(world.size)]
    results = await world.each(lambda r, g: g.all_reduce(data[r], timeout_s=60))
    assert all(results[rank] is data[rank] for rank in range(world.size)), results
    assert all((part == sum(range(1, world.size + 1))).all() for part in data)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
async def test_a_call_refused_on_one_rank_counts_on_all(order: tuple[int, ...], make_world: Any) -> None:
    """Otherwise the next call of that rank would meet this one of the others, and pass for it."""
    fixed = np.ones(1000, np.float32)
    fixed.flags.writeable = False
    async with make_world(3).running() as world:
        results: dict[int, BaseException] = {}

        async def call(rank: int) -> None:
            try:
                data = fixed if rank == 0 else np.ones(1000, np.float32)
                await world.groups[rank].all_reduce(data, timeout_s=5)
            except (UsageError, CollectiveAbortedError) as error:
                results[rank] = error

        async with trio.open_nursery() as nursery:
            for rank in order:
                nursery.start_soon(call, rank)
                await trio.testing.wait_all_tasks_blocked()
        assert isinstance(results[0], UsageError)
        for rank in (1, 2):
            assert isinstance(results[rank], CollectiveAbortedError)
            assert "rank 0" in str(results[rank])
            assert "its all_reduce was refused: the array is read-only" in str(results[rank])
        await works(world)


@pytest.mark.parametrize("bad", [{"timeout_s": -1}, {"op": "median"}, {"algorithm": "star"}, {"algorithm": ["ring"]}])
async def test_a_call_refused_on_every_rank_leaves_them_in_step(bad: dict[str, Any], make_world: Any) -> None:
    async with make_world(3).running() as world:
        for _ in range(2):
            for group in world.groups:
                with pytest.raises(UsageError):
                    await group.all_reduce(np.ones(3), **bad)
        await works(world)
        for group in world.groups:
            with pytest.raises(UsageError):
                await group.broadcast(np.ones(3), root=3)
            with pytest.raises(UsageError):
                await group.barrier(timeout_s=0)
        await works(world)


async def test_memory_that_one_rank_lacks_ends_the_call_for_all(
    make_world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make_world(2).running() as world:
        monkeypatch.setattr(world.groups[1]._pool, "take", raises_memory_error)
        with pytest.raises(MemoryError):
            await world.groups[1].all_reduce(np.ones(3))
        monkeypatch.undo()
        with pytest.raises(CollectiveAbortedError, match="its call failed with MemoryError: none left"):
            await world.groups[0].all_reduce(np.ones(3))
        await works(world)


def raises_memory_error(*_: object) -> None:
    raise MemoryError("none left")


class Moody(Mapping[str, Any]):
    """A mapping that does not give what it says it has."""

    def __getitem__(self, key: str) -> Any:
        raise RuntimeError("not today")

    def __iter__(self) -> Iterator[str]:
        return iter(("a",))

    def __len__(self) -> int:
        return 1


async def test_whatever_goes_wrong_before_a_call_counts_on_all(make_world: Any) -> None:
    async with make_world(2).running() as world:
        with pytest.raises(RuntimeError, match="not today"):
            await world.groups[1].all_reduce(Moody())
        with pytest.raises(CollectiveAbortedError, match="was refused: not today"):
            await world.groups[0].all_reduce(np.ones(3))
        await works(world)
