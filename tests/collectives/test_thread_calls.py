"""Collectives over shared memory that threads carry out by themselves, in groups within one process."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from sparkle_mesh import limits
from sparkle_mesh.collectives.board import Word
from sparkle_mesh.collectives.group import CollectiveGroup
from sparkle_mesh.errors import (
    CollectiveAbortedError,
    CollectiveTimeoutError,
    MeshMergedError,
    MismatchError,
    PeerLostError,
)
from sparkle_mesh.transport.arena import has_sealed_files

pytestmark = pytest.mark.skipif(not has_sealed_files(), reason="memory files are Linux's own")


class Caller:
    """A thread that makes quick calls of one rank, as a mesh does."""

    def __init__(self, group: CollectiveGroup) -> None:
        self.group = group
        self.quick = 0

    def all_reduce(self, array: np.ndarray[Any, Any], timeout_s: float | None = None) -> None:
        call = self.group.quick_all_reduce(array, "sum", "auto", timeout_s)
        if call is None:
            trio.from_thread.run(lambda: self.group.all_reduce(array, timeout_s=timeout_s))
        elif call.run():
            self.quick += 1
        else:
            trio.from_thread.run(call.finish)


async def test_threads_and_tasks_make_calls_side_by_side(host: Any) -> None:
    async with host(2) as on:
        await on.all(lambda rank: on.groups[rank].barrier())
        callers = [Caller(group) for group in on.groups]
        done = threading.Event()

        def in_thread(rank: int) -> None:
            for number in range(200):
                array = np.full(1000, float(number + rank))
                callers[rank].all_reduce(array)
                assert (array == 2 * number + 1).all()
            done.set()

        async with trio.open_nursery() as nursery:
            for rank in range(2):
                nursery.start_soon(trio.to_thread.run_sync, in_thread, rank)
        assert done.is_set()
        assert all(caller.quick > 50 for caller in callers)
        # And tasks again, over the same boards.
        arrays = [np.ones(10) for _ in range(2)]
        await on.all(lambda rank: on.groups[rank].all_reduce(arrays[rank]))
        assert all((array == 2).all() for array in arrays)


async def test_what_goes_wrong_in_a_threads_call_is_told_as_ever(host: Any) -> None:
    async with host(2) as on:
        await on.all(lambda rank: on.groups[rank].barrier())
        caller = Caller(on.groups[0])

        def late() -> None:
            with pytest.raises(CollectiveTimeoutError, match="rank 1 has not called it"):
                caller.all_reduce(np.ones(3), 0.05)

        await trio.to_thread.run_sync(late)
        with pytest.raises(CollectiveAbortedError):
            await on.groups[1].all_reduce(np.ones(3))

        def different() -> None:
            with pytest.raises(MismatchError):
                caller.all_reduce(np.ones(4))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, different)
            with pytest.raises(MismatchError):
                await on.groups[1].all_reduce(np.ones(3))

        def lost() -> None:
            with pytest.raises(PeerLostError):
                caller.all_reduce(np.ones(4), 10)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, lost)
            await trio.sleep(0.05)
            on.scopes[1].cancel()
            for link in on.links[1].values():
                await link.aclose()


async def test_a_threads_call_that_is_interrupted_is_given_up(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with host(2) as on:
        await on.all(lambda rank: on.groups[rank].barrier())
        group = on.groups[0]
        interrupted = threading.Event()

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        def call() -> None:
            quick = group.quick_all_reduce(np.ones(3), "sum", "auto", None)
            assert quick is not None
            with pytest.raises(KeyboardInterrupt):
                quick.run()
            interrupted.set()
            monkeypatch.undo()
            trio.from_thread.run(quick.finish)

        monkeypatch.setattr(group._host._boards, "_rest", interrupt)  # type: ignore[union-attr]
        await trio.to_thread.run_sync(call)
        assert interrupted.is_set()
        with pytest.raises(CollectiveAbortedError, match="was cancelled"):
            await on.groups[1].all_reduce(np.ones(3))
        arrays = [np.ones(10) for _ in range(2)]
        await on.all(lambda rank: on.groups[rank].all_reduce(arrays[rank]))
        assert all((array == 2).all() for array in arrays)


async def test_memory_that_a_threads_rank_lacks_ends_the_call_for_all(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with host(2) as on:
        await on.all(lambda rank: on.groups[rank].barrier())

        def no_memory(*_: object) -> None:
            raise MemoryError("no more")

        quick = on.groups[0].quick_all_reduce(np.ones(3), "sum", "auto", None)
        assert quick is not None
        monkeypatch.setattr(on.groups[0]._host, "stage", no_memory)
        assert not quick.run()

        async def call(rank: int) -> Any:
            return await (quick.finish() if rank == 0 else on.groups[1].all_reduce(np.ones(3)))

        errors = await on.all(call)
        assert [type(error) for error in errors] == [MemoryError, CollectiveAbortedError]
        monkeypatch.undo()
        arrays = [np.ones(10) for _ in range(2)]
        await on.all(lambda rank: on.groups[rank].all_reduce(arrays[rank]))
        assert all((array == 2).all() for array in arrays)


async def test_a_thread_is_out_before_what_it_reads_is_closed(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mesh ends, and is left, while a thread looks at the boards: it gets to know how that has ended."""
    async with host(2) as on:
        await on.all(lambda rank: on.groups[rank].barrier())
        group = on.groups[0]
        assert group._host is not None
        boards, looks, go_on = group._host._boards, threading.Event(), threading.Event()
        rest = boards._rest

        async def slow_rest() -> None:
            looks.set()
            assert go_on.wait(10)
            boards.get(1, Word.BEGUN)  # ValueError if they were closed
            await rest()

        monkeypatch.setattr(boards, "_rest", slow_rest)
        ended: list[str] = []

        def call() -> None:
            with pytest.raises(MeshMergedError, match="met another"):
                Caller(group).all_reduce(np.ones(3))
            ended.append("call")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, call)
            await trio.to_thread.run_sync(looks.wait)
            group.end(MeshMergedError("this mesh has met another"))
            on.scopes[0].cancel()
            await trio.sleep(0.05)
            assert ended == []
            go_on.set()
        assert ended == ["call"]
        # Nobody comes in any more.
        with pytest.raises(MeshMergedError):
            await trio.to_thread.run_sync(Caller(group).all_reduce, np.ones(3))


async def test_a_thread_that_stays_in_does_not_keep_a_mesh_from_being_left(
    host: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(limits, "CLOSE_TIMEOUT_S", 0.05)
    async with host(2) as on:
        await on.all(lambda rank: on.groups[rank].barrier())
        group = on.groups[0]
        assert group.gate.try_to_enter()
        group.close()
        on.scopes[0].cancel()
        await wait_all_tasks_blocked(0.2)
        assert "a thread is still in a collective" in caplog.text
        assert group._host is not None
        assert group._host._boards.get(1, Word.BEGUN) > 0  # still to be read


async def test_a_call_that_begins_as_the_mesh_ends_does_not(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with host(2) as on:
        await on.all(lambda rank: on.groups[rank].barrier())
        group = on.groups[0]
        path = group._host
        assert path is not None
        stage = path.stage

        def end_meanwhile(arrays: Any) -> Any:
            group.end(MeshMergedError("this mesh has met another"))
            return stage(arrays)

        quick = group.quick_all_reduce(np.ones(3), "sum", "auto", None)
        assert quick is not None
        monkeypatch.setattr(path, "stage", end_meanwhile)
        assert not await trio.to_thread.run_sync(quick.run)
        with pytest.raises(MeshMergedError):
            await quick.finish()
        assert group.operations == {}


async def test_calls_that_cannot_be_quick_are_not(host: Any) -> None:
    async with host(2) as on:
        group = on.groups[0]
        assert group.quick_all_reduce(np.ones(3), "sum", "auto", None) is None  # not agreed on yet
        assert group.quick_barrier(None) is None
        await on.all(lambda rank: on.groups[rank].barrier())
        assert group.quick_all_reduce(np.ones(3), "sum", "ring", None) is None
        assert group.quick_all_reduce("nothing", "sum", "auto", None) is None
        assert group.quick_barrier(-1) is None
        quick = group.quick_barrier(None)
        assert quick is not None
        # Somebody else is in: it takes its turn.
        await group.gate.enter()
        assert not quick.run()
        group.gate.leave()

        async def finish(rank: int) -> None:
            await (quick.finish() if rank == 0 else on.groups[1].barrier())

        assert await on.all(finish) == [None, None]
