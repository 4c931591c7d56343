"""Groups whose ranks share memory, all in one process: results, refusals, failures."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from sparkle_mesh.clock import SYSTEM_ENTROPY
from sparkle_mesh.collectives.board import Boards, Sharing, Word
from sparkle_mesh.collectives.host_path import group_number
from sparkle_mesh.collectives.shared import SharedReduction
from sparkle_mesh.errors import (
    CollectiveAbortedError,
    CollectiveTimeoutError,
    MeshClosedError,
    MismatchError,
    OutcomeUnknownError,
    PeerLostError,
    UsageError,
)
from sparkle_mesh.transport.arena import has_sealed_files
from sparkle_mesh.transport.shared_memory import SharedMemory

pytestmark = pytest.mark.skipif(not has_sealed_files(), reason="memory files are Linux's own")


@pytest.mark.parametrize("size", [2, 3, 4, 7])
@pytest.mark.parametrize("count", [0, 1, 3, 300, 10000])
@pytest.mark.parametrize("where", ["arena", "ordinary", "both"])
async def test_results(host: Any, size: int, count: int, where: str, small: None) -> None:
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
async def test_dtypes_and_layouts(host: Any, dtype: str, small: None) -> None:
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


async def test_many_calls_of_changing_sizes(host: Any, small: None) -> None:
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


async def test_other_algorithms_go_over_the_links(host: Any) -> None:
    async with host(3) as on:
        for algorithm in ("ring", "tree", "shared"):
            arrays = [np.full(50, float(rank)) for rank in range(3)]
            await on.all(lambda rank, a=arrays, how=algorithm: on.groups[rank].all_reduce(a[rank], algorithm=how))
            assert all((array == 3).all() for array in arrays)
            outcome = on.groups[2].last_outcome
            assert outcome is not None
            assert outcome.algorithm == algorithm


async def test_a_group_that_does_not_all_share_memory_uses_the_links(host: Any) -> None:
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


async def test_ranks_that_read_no_foreign_memory_copy_it(
    host: Any, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparkle_mesh.transport.shared_memory.can_read", lambda *_: False)
    async with host(2) as on:
        arrays = [np.full(5000, float(rank + 1)) for rank in range(2)]
        await on.all(lambda rank: on.groups[rank].all_reduce(arrays[rank]))
        assert all((array == 3).all() for array in arrays)


@pytest.mark.parametrize("how", ["shapes", "kinds", "skipped"])
async def test_calls_that_differ(host: Any, how: str) -> None:
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


async def test_a_deadline_names_the_absent_and_the_next_call_works(host: Any) -> None:
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


async def test_a_cancelled_call_is_given_up_everywhere(host: Any) -> None:
    async with host(2) as on:
        arrays = [np.ones(100) for _ in range(2)]
        await on.all(lambda rank: on.groups[rank].barrier())
        with trio.move_on_after(0.05):
            await on.groups[0].all_reduce(arrays[0])
        with pytest.raises(CollectiveAbortedError, match="was cancelled"):
            await on.groups[1].all_reduce(arrays[1])
        await on.all(lambda rank: on.groups[rank].all_reduce(arrays[rank]))
        assert all((array == 2).all() for array in arrays)


async def test_a_lost_rank_ends_the_call_and_the_group(host: Any) -> None:
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


async def test_closing_ends_the_call(host: Any) -> None:
    async with host(2) as on:
        await on.all(lambda rank: on.groups[rank].barrier())

        async def call() -> None:
            with pytest.raises(MeshClosedError):
                await on.groups[0].all_reduce(np.ones(3))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await wait_all_tasks_blocked(0.05)
            on.groups[0].close()


async def test_an_operand_that_is_nowhere_is_the_fault_of_its_rank(host: Any, small: None) -> None:
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
async def test_what_boards_say_is_checked(host: Any, lanes: list[tuple[int, int]]) -> None:
    async with host(2) as on:
        arrays = [np.ones(500) for _ in range(2)]
        await on.all(lambda rank: on.groups[rank].barrier())
        begin = on.groups[1]._host._boards.begin  # type: ignore[union-attr]
        on.groups[1]._host._boards.begin = lambda n, d, w, _, t: begin(n, d, w, lanes, t)  # type: ignore[union-attr,method-assign]
        errors = await on.all(lambda rank: on.groups[rank].all_reduce(arrays[rank]))
        assert isinstance(errors[0], PeerLostError), errors
        assert (arrays[0] == 1).all()


async def test_what_the_others_finished_without_this_rank_is_unknown_to_it(host: Any) -> None:
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
    host: Any, how: str, where: str, monkeypatch: pytest.MonkeyPatch
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


async def test_what_is_cancelled_ends_though_nobody_else_calls(host: Any) -> None:
    async with host(2) as on:
        await on.all(lambda rank: on.groups[rank].barrier())
        pending = on.groups[0].all_reduce_async(np.ones(3))
        await wait_all_tasks_blocked()
        pending.cancel()
        with pytest.raises(CollectiveAbortedError, match="was cancelled"):
            await pending.wait(5)


async def test_what_others_may_still_take_is_kept_through_calls_that_are_given_up(host: Any, small: None) -> None:
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


async def test_boards_of_other_groups_are_not_read() -> None:
    assert group_number(b"a" * 32, 0) != group_number(b"a" * 32, 1)
    assert group_number(b"\0" * 32, 0) != 0
    memory = SharedMemory(SYSTEM_ENTROPY)
    Boards.refuse(memory, [], 5)
    words = memory.arena.board.cast("Q")
    assert (words[Word.GROUP], words[Word.SHARING]) == (5, Sharing.NOT)
    words.release()
    memory.close()
