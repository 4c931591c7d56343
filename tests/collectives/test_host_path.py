"""Groups whose ranks share memory, all in one process: results, refusals, failures, and calls made by threads."""

from __future__ import annotations

import gc
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from sparkle_mesh import limits
from sparkle_mesh.clock import SYSTEM_ENTROPY
from sparkle_mesh.collectives.board import Boards, Sharing, Word
from sparkle_mesh.collectives.group import CollectiveGroup
from sparkle_mesh.collectives.host_path import group_number
from sparkle_mesh.collectives.shared import SharedReduction
from sparkle_mesh.collectives.shared_plan import plan_chunks, work_bytes
from sparkle_mesh.errors import (
    CollectiveAbortedError,
    CollectiveTimeoutError,
    MeshClosedError,
    MeshMergedError,
    MismatchError,
    OutcomeUnknownError,
    PeerLostError,
    UsageError,
)
from sparkle_mesh.transport.arena import has_sealed_files
from sparkle_mesh.transport.link import Link
from sparkle_mesh.transport.memory import memory_link_pair
from sparkle_mesh.transport.shared_memory import SharedMemory

pytestmark = pytest.mark.skipif(not has_sealed_files(), reason="memory files are Linux's own")

LINEAGE = b"H" * 32


class Host:
    """The ranks of one group on this host."""

    def __init__(self, size: int) -> None:
        self.memories = [SharedMemory(SYSTEM_ENTROPY) for _ in range(size)]
        self.links: list[dict[int, Link]] = [{} for _ in range(size)]
        self.groups: list[CollectiveGroup] = []
        self.scopes = [trio.CancelScope() for _ in range(size)]

    def allocate(self, rank: int, values: Any, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
        values = np.asarray(values, dtype)
        array = self.memories[rank].arena.allocate(max(values.nbytes, 1))[: values.nbytes].view(dtype)
        array[:] = values
        return array

    async def all(self, call: Callable[[int], Any]) -> list[Any]:
        """Await ``call(rank)`` on all ranks; return results, or errors, in their order."""
        results: list[Any] = [None] * len(self.groups)

        async def one(rank: int) -> None:
            try:
                results[rank] = await call(rank)
            except Exception as error:  # what a rank raises is what tests look at
                results[rank] = error

        async with trio.open_nursery() as nursery:
            for rank in range(len(self.groups)):
                nursery.start_soon(one, rank)
        return results


@asynccontextmanager
async def host(size: int, *, unshared: tuple[int, int] | None = None) -> AsyncIterator[Host]:
    """``size`` ranks that share memory; the pair ``unshared`` does not."""
    made = Host(size)

    async def share(rank: int, other: int, sock: trio.socket.SocketType) -> None:
        made.links[rank][other] = await made.memories[rank].share(trio.SocketStream(sock), f"rank {other}")

    async with trio.open_nursery() as nursery:
        for a in range(size):
            for b in range(a + 1, size):
                if (a, b) == unshared:
                    made.links[a][b], made.links[b][a] = memory_link_pair(f"{a}", f"{b}")
                    continue
                one, other = trio.socket.socketpair()
                nursery.start_soon(share, a, b, one)
                nursery.start_soon(share, b, a, other)
    for rank in range(size):
        memory = made.memories[rank]
        made.groups.append(
            CollectiveGroup(rank=rank, size=size, links=made.links[rank], lineage=LINEAGE, epoch=0, memory=memory)
        )

    async def run(rank: int, *, task_status: trio.TaskStatus[None]) -> None:
        with made.scopes[rank]:
            await made.groups[rank].run(task_status=task_status)

    try:
        async with trio.open_nursery() as nursery:
            for rank in range(size):
                await nursery.start(run, rank)
            yield made
            nursery.cancel_scope.cancel()
    finally:
        for links in made.links:
            for link in links.values():
                await link.aclose()
        for memory in made.memories:
            memory.close()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Many chunks and blocks, and operands that are read where they are."""
    plan_chunks.cache_clear()
    work_bytes.cache_clear()
    monkeypatch.setattr(limits, "SHARED_CHUNK_BYTES", 4096)
    monkeypatch.setattr(limits, "SHARED_BLOCK_BYTES", 1024)
    monkeypatch.setattr(limits, "SHARED_STAGED_MAX_BYTES", 1024)
    monkeypatch.setattr(limits, "LINK_TURN_BYTES", 8192)
    yield
    plan_chunks.cache_clear()
    work_bytes.cache_clear()


@pytest.mark.parametrize("size", [2, 3, 4, 7])
@pytest.mark.parametrize("count", [0, 1, 3, 300, 10000])
@pytest.mark.parametrize("where", ["arena", "ordinary", "both"])
async def test_results(size: int, count: int, where: str, small: None) -> None:
    async with host(size) as on:
        for op in ("sum", "mean"):
            arrays = []
            for rank in range(size):
                values = np.arange(count, dtype=np.float32) * (rank + 1)
                shared = where == "arena" or (where == "both" and rank % 2)
                arrays.append(on.allocate(rank, values) if shared else values)
            expected = np.sum([array.copy() for array in arrays], axis=0, dtype=np.float32)
            if op == "mean":
                expected /= np.float32(size)
            results = await on.all(lambda rank, a=arrays, op=op: on.groups[rank].all_reduce(a[rank], op))
            for array, result in zip(arrays, results, strict=True):
                assert result is array
                np.testing.assert_allclose(array, expected, rtol=1e-6)
                assert array.tobytes() == arrays[0].tobytes()
            outcome = on.groups[0].last_outcome
            assert outcome is not None
            assert (outcome.algorithm, outcome.bytes_sent) == ("shared", 0)


@pytest.mark.parametrize("dtype", ["int8", "uint16", "int64", "float64", ">f4"])
async def test_dtypes_and_layouts(dtype: str, small: None) -> None:
    async with host(3) as on:
        plain = [np.arange(600).astype(dtype) % 5 + rank for rank in range(3)]
        strided = [np.repeat(array, 2)[::2] for array in plain]
        square = [np.asfortranarray(array.reshape(20, 30)) for array in plain]
        data = [{"a": plain[r], "b": strided[r], "c": square[r], "d": np.float32([r]) * np.ones(7)} for r in range(3)]
        expected = {key: sum(each[key].copy() for each in data) for key in data[0]}
        await on.all(lambda rank: on.groups[rank].all_reduce(data[rank]))
        for each in data:
            for key, value in expected.items():
                np.testing.assert_array_equal(each[key], value)


async def test_many_calls_of_changing_sizes(small: None) -> None:
    async with host(3) as on:

        async def calls(rank: int) -> list[float]:
            seen = []
            for number in range(60):
                count = [1, 2000, 17, 90000, 5, 256][number % 6]
                array = (
                    np.full(count, float(rank + number)) if number % 2 else on.allocate(rank, [rank + number] * count)
                )
                await on.groups[rank].all_reduce(array)
                seen.append(float(array[-1]))
                if number % 7 == 0:
                    await on.groups[rank].barrier()
                if number % 11 == 0:
                    await on.groups[rank].broadcast(array, root=1)
            return seen

        results = await on.all(calls)
        assert results == [[3.0 * number + 3 for number in range(60)]] * 3


async def test_other_algorithms_go_over_the_links() -> None:
    async with host(3) as on:
        for algorithm in ("ring", "tree", "shared"):
            arrays = [np.full(50, float(rank)) for rank in range(3)]
            await on.all(lambda rank, a=arrays, how=algorithm: on.groups[rank].all_reduce(a[rank], algorithm=how))
            assert all((array == 3).all() for array in arrays)
            outcome = on.groups[2].last_outcome
            assert outcome is not None
            assert outcome.algorithm == algorithm


async def test_a_group_that_does_not_all_share_memory_uses_the_links() -> None:
    async with host(3, unshared=(0, 2)) as on:
        arrays = [np.full(50, float(rank)) for rank in range(3)]
        await on.all(lambda rank: on.groups[rank].all_reduce(arrays[rank]))
        assert all((array == 3).all() for array in arrays)
        outcome = on.groups[1].last_outcome
        assert outcome is not None
        assert outcome.algorithm == "direct"
        errors = await on.all(lambda rank: on.groups[rank].all_reduce(arrays[rank], algorithm="shared"))
        assert all(isinstance(error, (UsageError, CollectiveAbortedError)) for error in errors), errors
        await on.all(lambda rank: on.groups[rank].all_reduce(arrays[rank]))
        assert all((array == 9).all() for array in arrays)


async def test_ranks_that_read_no_foreign_memory_copy_it(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparkle_mesh.transport.shared_memory.can_read", lambda *_: False)
    async with host(2) as on:
        arrays = [np.full(5000, float(rank + 1)) for rank in range(2)]
        await on.all(lambda rank: on.groups[rank].all_reduce(arrays[rank]))
        assert all((array == 3).all() for array in arrays)


@pytest.mark.parametrize("how", ["shapes", "kinds", "skipped"])
async def test_calls_that_differ(how: str) -> None:
    async with host(3) as on:
        arrays = [np.ones(100) for _ in range(3)]

        async def call(rank: int) -> Any:
            group = on.groups[rank]
            if rank != 1:
                return await group.all_reduce(arrays[rank])
            if how == "shapes":
                return await group.all_reduce(np.ones(99))
            if how == "kinds":
                return await group.broadcast(np.ones(100), root=0)
            return await group.all_reduce("nothing")

        errors = await on.all(call)
        if how == "skipped":
            assert [type(error) for error in errors] == [CollectiveAbortedError, UsageError, CollectiveAbortedError]
            assert "was refused" in str(errors[0])
        else:
            assert [type(error) for error in errors] == [MismatchError] * 3
            assert len({str(error) for error in errors}) == 1
        assert all((array == 1).all() for array in arrays)
        await on.all(lambda rank: on.groups[rank].all_reduce(arrays[rank]))
        assert all((array == 3).all() for array in arrays)


async def test_a_deadline_names_the_absent_and_the_next_call_works() -> None:
    async with host(3) as on:
        arrays = [np.ones(100) for _ in range(3)]
        await on.all(lambda rank: on.groups[rank].barrier())

        async def call(rank: int) -> Any:
            if rank == 2:
                await trio.sleep(0.2)
            return await on.groups[rank].all_reduce(arrays[rank], timeout_s=0.05 if rank == 0 else 5)

        errors = await on.all(call)
        assert isinstance(errors[0], CollectiveTimeoutError)
        assert "rank 2 has not called it (last heard of: call 1, barrier())" in str(errors[0])
        assert [type(error) for error in errors[1:]] == [CollectiveAbortedError] * 2
        await on.all(lambda rank: on.groups[rank].all_reduce(arrays[rank]))
        assert all((array == 3).all() for array in arrays)


async def test_a_cancelled_call_is_given_up_everywhere() -> None:
    async with host(2) as on:
        arrays = [np.ones(100) for _ in range(2)]
        await on.all(lambda rank: on.groups[rank].barrier())
        with trio.move_on_after(0.05):
            await on.groups[0].all_reduce(arrays[0])
        with pytest.raises(CollectiveAbortedError, match="was cancelled"):
            await on.groups[1].all_reduce(arrays[1])
        await on.all(lambda rank: on.groups[rank].all_reduce(arrays[rank]))
        assert all((array == 2).all() for array in arrays)


async def test_a_lost_rank_ends_the_call_and_the_group() -> None:
    async with host(3) as on:
        arrays = [np.ones(100) for _ in range(3)]
        await on.all(lambda rank: on.groups[rank].barrier())
        errors: list[Any] = []

        async def call(rank: int) -> None:
            with pytest.raises(PeerLostError) as raised:
                await on.groups[rank].all_reduce(arrays[rank])
            errors.append(raised.value)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call, 0)
            nursery.start_soon(call, 1)
            await wait_all_tasks_blocked(0.05)
            on.scopes[2].cancel()
            for link in on.links[2].values():
                await link.aclose()
        assert len(errors) == 2
        assert all((array == 1).all() for array in arrays)
        with pytest.raises(PeerLostError):
            await on.groups[0].all_reduce(arrays[0])


async def test_closing_ends_the_call() -> None:
    async with host(2) as on:
        await on.all(lambda rank: on.groups[rank].barrier())

        async def call() -> None:
            with pytest.raises(MeshClosedError):
                await on.groups[0].all_reduce(np.ones(3))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await wait_all_tasks_blocked(0.05)
            on.groups[0].close()


async def test_an_operand_that_is_nowhere_is_the_fault_of_its_rank(small: None) -> None:
    async with host(2) as on:
        arrays = [np.ones(5000) for _ in range(2)]
        await on.all(lambda rank: on.groups[rank].barrier())
        begin = on.groups[1]._host._boards.begin  # type: ignore[union-attr]

        def lie(number: int, digest: bytes, work: int, lanes: Any, description: str) -> None:
            begin(number, digest, work, [(2, 8)], description)

        on.groups[1]._host._boards.begin = lie  # type: ignore[union-attr,method-assign]
        errors = await on.all(lambda rank: on.groups[rank].all_reduce(arrays[rank]))
        assert isinstance(errors[0], PeerLostError)
        assert "its operand cannot be read" in str(errors[0])
        assert isinstance(errors[1], PeerLostError)
        assert all((array == 1).all() for array in arrays)


@pytest.mark.parametrize("lanes", [[(9, 0)], [(1, 2**50)], [(1, 2**63)]])
async def test_what_boards_say_is_checked(lanes: list[tuple[int, int]]) -> None:
    async with host(2) as on:
        arrays = [np.ones(500) for _ in range(2)]
        await on.all(lambda rank: on.groups[rank].barrier())
        begin = on.groups[1]._host._boards.begin  # type: ignore[union-attr]
        on.groups[1]._host._boards.begin = lambda n, d, w, _, t: begin(n, d, w, lanes, t)  # type: ignore[union-attr,method-assign]
        errors = await on.all(lambda rank: on.groups[rank].all_reduce(arrays[rank]))
        assert isinstance(errors[0], PeerLostError), errors
        assert (arrays[0] == 1).all()


async def test_what_the_others_finished_without_this_rank_is_unknown_to_it() -> None:
    async with host(2) as on:
        await on.all(lambda rank: on.groups[rank].barrier())
        from sparkle_mesh.collectives import shared

        async def excluded(_self: Any) -> None:
            raise shared.ExcludedError

        original = shared.SharedReduction.run
        shared.SharedReduction.run = excluded  # type: ignore[method-assign]
        try:
            errors = await on.all(lambda rank: on.groups[rank].all_reduce(np.ones(3)))
        finally:
            shared.SharedReduction.run = original  # type: ignore[method-assign]
        assert [type(error) for error in errors] == [OutcomeUnknownError] * 2


@pytest.mark.parametrize("how", ["leaves", "closes"])
@pytest.mark.parametrize("where", ["small", "large", "arena"])
async def test_a_rank_that_is_done_may_leave_before_others_have_taken(
    how: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with host(2) as on:
        count = 10 if where == "small" else 200_000
        arrays = [np.full(count, float(rank + 1)) for rank in range(2)]
        if where == "arena":
            arrays = [on.allocate(rank, array, np.float64) for rank, array in enumerate(arrays)]
        await on.all(lambda rank: on.groups[rank].barrier())
        gone = trio.Event()
        take = SharedReduction._take

        async def take_late(self: SharedReduction, chunks: Any) -> None:
            if self._rank == 1 and self._reduced == len(self._plan.chunks):
                await gone.wait()
            await take(self, chunks)

        monkeypatch.setattr(SharedReduction, "_take", take_late)

        async def call(rank: int) -> None:
            await on.groups[rank].all_reduce(arrays[rank])
            if rank == 0:
                on.groups[0].close()
                if how == "leaves":
                    on.scopes[0].cancel()
                    await wait_all_tasks_blocked()
                    on.memories[0].close()
                gc.collect()
                gone.set()

        assert await on.all(call) == [None, None]
        assert all((array == 3).all() for array in arrays)


async def test_what_is_cancelled_ends_though_nobody_else_calls() -> None:
    async with host(2) as on:
        await on.all(lambda rank: on.groups[rank].barrier())
        pending = on.groups[0].all_reduce_async(np.ones(3))
        await wait_all_tasks_blocked()
        pending.cancel()
        with pytest.raises(CollectiveAbortedError, match="was cancelled"):
            await pending.wait(5)


# --- Calls that threads make -----------------------------------------------------------------------


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


async def test_threads_and_tasks_make_calls_side_by_side() -> None:
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


async def test_what_goes_wrong_in_a_threads_call_is_told_as_ever() -> None:
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


async def test_a_threads_call_that_is_interrupted_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
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


async def test_memory_that_a_threads_rank_lacks_ends_the_call_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
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


async def test_a_thread_is_out_before_what_it_reads_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
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


async def test_a_call_that_begins_as_the_mesh_ends_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
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


async def test_what_others_may_still_take_is_kept_through_calls_that_are_given_up(small: None) -> None:
    async with host(2) as on:
        arrays = [np.ones(100) for _ in range(2)]
        await on.all(lambda rank: on.groups[rank].all_reduce(arrays[rank]))
        path = on.groups[0]._host
        assert path is not None
        taken_from = path._work
        for count in (10_000, 100_000):
            with trio.move_on_after(0.05):
                await on.groups[0].all_reduce(np.ones(count))
            with pytest.raises(CollectiveAbortedError):
                await on.groups[1].all_reduce(np.ones(count))
        assert path._work is not taken_from
        assert path._work_in_use is taken_from
        await on.all(lambda rank: on.groups[rank].all_reduce(arrays[rank]))
        assert path._work_in_use is path._work


async def test_calls_that_cannot_be_quick_are_not() -> None:
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


async def test_boards_of_other_groups_are_not_read() -> None:
    assert group_number(b"a" * 32, 0) != group_number(b"a" * 32, 1)
    assert group_number(b"\0" * 32, 0) != 0
    memory = SharedMemory(SYSTEM_ENTROPY)
    Boards.refuse(memory, [], 5)
    words = memory.arena.board.cast("Q")
    assert (words[Word.GROUP], words[Word.SHARING]) == (5, Sharing.NOT)
    words.release()
    memory.close()
