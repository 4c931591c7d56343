"""Members are brought to one state, and newcomers are taken in."""

from __future__ import annotations

import re
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

import sparkle_mesh as sparkle
from sparkle_mesh import limits
from sparkle_mesh.async_mesh import AsyncMesh
from sparkle_mesh.collectives.group import CollectiveGroup
from sparkle_mesh.errors import (
    CollectiveAbortedError,
    CollectiveTimeoutError,
    DivergenceError,
    MismatchError,
    QuorumLostError,
    UsageError,
)
from sparkle_mesh.state_chunks import StateChunks
from sparkle_mesh.synchronization import _Run as Synchronization

Vanish = Callable[[AsyncMesh], Awaitable[None]]
Program = Callable[[AsyncMesh], Awaitable[Any]]


def options(tmp_path: Path, min_peers: int) -> dict[str, Any]:
    return {
        "timeout_s": 30,
        "lan": False,
        "listen": ["/ip4/127.0.0.1/tcp/0"],
        "data_dir": tmp_path,
        "min_peers": min_peers,
        "links": ["tcp"],
    }


async def run_members(tmp_path: Path, count: int, program: Program) -> list[Any]:
    """Run ``program`` on ``count`` members; return what they return, by rank."""
    results: dict[int, Any] = {}

    async def member() -> None:
        async with sparkle.open_mesh("run", **options(tmp_path, count)) as mesh:
            rank = mesh.rank
            results[rank] = await program(mesh)

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(member)
    return [results[rank] for rank in range(count)]


@pytest.mark.parametrize("steps", [(5, 5, 5), (5, 7, 7), (0, 0, 9)])
async def test_the_first_time_all_get_the_state_of_the_first_that_is_furthest(
    tmp_path: Path, steps: tuple[int, ...]
) -> None:
    """A mesh that forms anew, of one that has trained and others that have not, loses nothing."""

    async def program(mesh: AsyncMesh) -> Any:
        state = {"w": np.full(1000, float(mesh.rank)), "b": np.zeros(0)}
        done = await mesh.synchronize(state, steps[mesh.rank])
        again = await mesh.synchronize(state, done.step)
        return done, again, state["w"].max()

    for rank, (done, again, largest) in enumerate(await run_members(tmp_path, 3, program)):
        first = steps.index(max(steps))
        assert (done.step, done.sources, largest) == (max(steps), (first,), float(first))
        assert done.bytes_received == (8000 if rank != first else 0)
        # Where all are alike it is one round.
        assert (again.sources, again.bytes_received, again.largest_difference) == ((0, 1, 2), 0, 0.0)


async def test_drift_is_found_where_it_is_looked_for(tmp_path: Path) -> None:
    async def program(mesh: AsyncMesh) -> Any:
        state = np.zeros(100)
        await mesh.synchronize(state, 0)
        state[50] += 0.25 * (mesh.rank == 0)
        unseen = await mesh.synchronize(state, 1)
        with pytest.raises(DivergenceError, match=r"rank 0 by 0\.25"):
            await mesh.synchronize(state, 1, check=True, on_drift="raise")
        kept = state[50]
        repaired = await mesh.synchronize(state, 1, check=True)
        return unseen, kept, repaired, state[50]

    results = await run_members(tmp_path, 3, program)
    assert [kept for _, kept, _, _ in results] == [0.25, 0, 0]
    # The majority is right, even against the first.
    assert [last for *_, last in results] == [0, 0, 0]
    assert [repaired.largest_difference for _, _, repaired, _ in results] == [0.25, 0, 0]
    assert results[0][2].sources == (1, 2)


async def test_what_cannot_be_synchronised_is_refused(tmp_path: Path) -> None:
    done = trio.Event()

    async def program(mesh: AsyncMesh) -> None:
        with pytest.raises(UsageError, match="step"):
            await mesh.synchronize(None, -1)
        with pytest.raises(UsageError, match="on_drift"):
            await mesh.synchronize(None, 0, on_drift="ignore")
        with pytest.raises(MismatchError, match=r"float64\[3\]" if mesh.rank == 0 else r"float64\[4\]"):
            await mesh.synchronize(np.zeros(3 + mesh.rank), 0)
        if mesh.rank == 0:
            with pytest.raises(CollectiveTimeoutError, match="can be called again"):
                await mesh.synchronize(None, 0, timeout_s=0.2)
            done.set()
        await done.wait()

    await run_members(tmp_path, 2, program)


@pytest.mark.parametrize("state", [None, {}, [], np.zeros(0), {"a": np.zeros((3, 0))}])
async def test_nothing_to_synchronise_is_brought_to_one_step(tmp_path: Path, state: Any) -> None:
    async def program(mesh: AsyncMesh) -> Any:
        return await mesh.synchronize(state, mesh.rank)

    for done in await run_members(tmp_path, 3, program):
        assert (done.step, done.bytes_received, done.largest_difference) == (2, 0, 0.0)


async def test_what_one_cannot_synchronise_ends_it_on_all(tmp_path: Path) -> None:
    frozen = np.zeros(3)
    frozen.flags.writeable = False
    wrong: list[tuple[Any, int, str]] = [
        (frozen, 0, "read-only"),
        (np.zeros(3, [("a", "<f4"), ("b", "<i2")]), 0, "numbers alone"),
        (np.zeros(3, object), 0, "numbers alone"),
        (np.zeros(3), -5, "step is -5"),
    ]

    async def program(mesh: AsyncMesh) -> Any:
        for state, step, why in wrong:
            expected = pytest.raises(UsageError, match=why)
            if mesh.rank != 1:
                expected = pytest.raises(CollectiveAbortedError, match=f"given up by rank 1 .*UsageError: .*{why}")
                state, step = np.zeros(3), 0
            with expected:
                await mesh.synchronize(state, step, timeout_s=20)
        # The next calls are the same on all.
        await mesh.synchronize(np.zeros(3), 0, timeout_s=20)
        return (await mesh.all_reduce(np.ones(1), timeout_s=20))[0]

    assert await run_members(tmp_path, 3, program) == [3.0] * 3


@pytest.mark.parametrize(
    ("mine", "others", "by"),
    [
        (np.uint64(2**63 + 1), np.uint64(2**63), "by 1 at most"),
        (np.int64(-(2**60) - 1), np.int64(2**60), "by 2.31e+18 at most"),
        (np.float32(-0.0), np.float32(0.0), "in bits alone"),
        (np.uint32(0x7FC00001).view(np.float32), np.float32(np.nan), "in bits alone"),
    ],
)
async def test_every_bit_that_differs_is_drift(tmp_path: Path, mine: Any, others: Any, by: str) -> None:
    async def program(mesh: AsyncMesh) -> Any:
        state = np.full(5, others)
        await mesh.synchronize(state, 0)
        if mesh.rank == 2:
            state[3] = mine
        before = state.tobytes()
        with pytest.raises(DivergenceError, match=f"rank 2 {re.escape(by)}"):
            await mesh.synchronize(state, 1, check=True, on_drift="raise")
        assert state.tobytes() == before
        await mesh.synchronize(state, 1, check=True)
        return state.tobytes()

    assert await run_members(tmp_path, 3, program) == [np.full(5, others).tobytes()] * 3


class Cancelling:
    """Has one member give up its synchronisation when ``what`` of it is called for the ``count``-th time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, what: str, count: int) -> None:
        self.scope: trio.CancelScope | None = None
        self._left = count
        original = getattr(owner, what)

        async def patched(this: Any, *arguments: Any, **options: Any) -> Any:
            if self.scope is not None and trio.lowlevel.current_task() is self.task:
                self._left -= 1
                if not self._left:
                    self.scope.cancel()
            return await original(this, *arguments, **options)

        monkeypatch.setattr(owner, what, patched)

    async def synchronize(self, mesh: AsyncMesh, state: Any) -> bool:
        """Return whether it was cancelled."""
        with trio.CancelScope() as self.scope:
            self.task = trio.lowlevel.current_task()
            await mesh.synchronize(state, mesh.rank, timeout_s=20)
        return self.scope.cancelled_caught


@pytest.mark.parametrize(
    ("owner", "what", "count"),
    [
        (CollectiveGroup, "all_gather", 1),
        (CollectiveGroup, "all_gather", 2),
        (CollectiveGroup, "broadcast", 1),
        (CollectiveGroup, "all_gather", 3),
        (CollectiveGroup, "until_may_begin", 1),
        (Synchronization, "_transfer", 1),
        (Synchronization, "_report", 1),
    ],
)
async def test_who_gives_it_up_between_two_rounds_ends_it_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, what: str, count: int
) -> None:
    monkeypatch.setattr(limits, "STATE_CHUNK_BYTES", 1000)
    cancelling = Cancelling(monkeypatch, owner, what, count)

    async def program(mesh: AsyncMesh) -> Any:
        state = np.full(1000, float(mesh.rank))
        if mesh.rank == 1:
            ended = "cancelled" if await cancelling.synchronize(mesh, state) else "done"
        else:
            try:
                await mesh.synchronize(state, mesh.rank, timeout_s=20)
                ended = "done"
            except CollectiveAbortedError as error:
                assert "given up by rank" in str(error)  # noqa: PT017
                ended = "aborted"
        # The next calls are the same on all.
        await mesh.synchronize(state, mesh.rank, timeout_s=20)
        return ended, float(state.max()), (await mesh.all_reduce(np.ones(1), timeout_s=20))[0]

    ended = await run_members(tmp_path, 3, program)
    assert [(largest, total) for _, largest, total in ended] == [(2.0, 3.0)] * 3
    assert [how for how, *_ in ended] == ["aborted", "cancelled", "aborted"]


async def test_who_gives_it_up_while_chunks_are_sent_ends_it_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for its chunks, and whoever has all of theirs."""
    monkeypatch.setattr(limits, "STATE_CHUNK_BYTES", 1000)
    scope, took = trio.CancelScope(), 0
    take = Synchronization._take

    async def patched(this: Any, *arguments: Any, **options: Any) -> None:
        nonlocal took
        if this._mesh.rank == 1:
            took += 1
            if took == 3:
                scope.cancel()
        await take(this, *arguments, **options)

    monkeypatch.setattr(Synchronization, "_take", patched)

    async def program(mesh: AsyncMesh) -> Any:
        state = np.full(1000, float(mesh.rank))
        if mesh.rank == 1:
            with scope:
                await mesh.synchronize(state, mesh.rank, timeout_s=20)
            assert scope.cancelled_caught
        else:
            with pytest.raises(CollectiveAbortedError):
                await mesh.synchronize(state, mesh.rank, timeout_s=20)
        await mesh.synchronize(state, mesh.rank, timeout_s=20)
        return float(state.min()), (await mesh.all_reduce(np.ones(1), timeout_s=20))[0]

    assert await run_members(tmp_path, 3, program) == [(2.0, 3.0)] * 3


async def test_a_chunk_that_comes_damaged_is_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = StateChunks.read
    damaged: list[int] = []

    def read_wrongly(self: StateChunks, chunk: int) -> Any:
        data = read(self, chunk)
        if chunk == 1 and len(damaged) < 2:
            damaged.append(chunk)
            data[0] ^= 1
        return data

    monkeypatch.setattr(limits, "STATE_CHUNK_BYTES", 128)
    monkeypatch.setattr(StateChunks, "read", read_wrongly)

    async def program(mesh: AsyncMesh) -> Any:
        state = np.full(100, 1.0 + mesh.rank)
        await mesh.synchronize(state, 0)
        again = np.full(100, 1.0 + mesh.rank)
        monkeypatch.setattr(limits, "STATE_ATTEMPTS_MAX_COUNT", 1)
        await mesh.barrier()
        damaged.clear()
        if mesh.rank:
            again += 1
        with pytest.raises(DivergenceError, match="digests"):
            await mesh.synchronize(again, 0, check=True)
        return state.max()

    assert await run_members(tmp_path, 2, program) == [1.0, 1.0]


@pytest.mark.timeout(90)
def test_a_newcomer_comes_in_at_a_step_boundary_and_gets_the_state(tmp_path: Path) -> None:
    """And a program for threads hears how far it is, and of the new view in its own thread."""
    told: dict[str, list[Any]] = {"old": [], "new": []}
    views: list[tuple[int, bool]] = []
    first_step = threading.Event()

    def member(name: str, min_peers: int) -> None:
        with sparkle.join("run", **options(tmp_path, min_peers)) as mesh:
            here = threading.current_thread()
            if name == "old":
                mesh.on_view_change(lambda view: views.append((view.size, threading.current_thread() is here)))
            state, step = np.zeros(2_000_000), 0
            while mesh.size < 2 or step < 3:
                done = mesh.synchronize({"w": state}, step, on_progress=told[name].append)
                step = done.step
                state += mesh.all_reduce(np.ones(1), op="mean")[0]
                step += 1
                first_step.set()
            assert state[0] == state[-1] == step
            mesh.barrier()

    threads = [threading.Thread(target=member, args=("old", 1))]
    threads[0].start()
    assert first_step.wait(40)
    threads.append(threading.Thread(target=member, args=("new", 2)))
    threads[1].start()
    for thread in threads:
        thread.join(60)
    assert views[0] == (2, True)
    assert told["new"]
    assert max(told["new"]) == 1.0


@pytest.mark.parametrize("another_knows", [False, True])
async def test_a_state_of_which_a_part_has_come_is_no_reference(
    vanish: Vanish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, another_knows: bool
) -> None:
    """Whoever held the state dies while it hands it on: those left are told so, unless one of them holds it, too."""
    monkeypatch.setattr(limits, "STATE_CHUNK_BYTES", 800)
    monkeypatch.setattr(limits, "QUORUM_MISSING_S", 0.2)
    send, handed_on = Synchronization._send, trio.Event()
    takers: set[int] = set()

    async def send_some(run: Any, chunks: Any, taker: int) -> None:
        if run._mesh.rank != 3 or handed_on.is_set():
            await send(run, chunks, taker)
            return
        await send(run, chunks[:2], taker)
        takers.add(taker)
        if len(takers) == 2 + (not another_knows):
            handed_on.set()
            await vanish(run._mesh)
        await handed_on.wait()
        await send(run, chunks[2:], taker)

    monkeypatch.setattr(Synchronization, "_send", send_some)

    async def program(mesh: AsyncMesh) -> Any:
        knows = mesh.rank == 3 or (another_knows and mesh.rank == 2)
        state, step = np.full(1000, 9.0 if knows else float(mesh.rank)), 9 if knows else 5
        if mesh.rank == 3:
            with pytest.raises(QuorumLostError):
                await mesh.synchronize(state, step)
            return None
        try:
            done = await mesh.synchronize(state, step)
        except DivergenceError:
            # Part of the state has come, and is there; what was told once is up to the program.
            assert set(state.tolist()) == {9.0, float(mesh.rank)}
            state[:] = 4.0
            done = await mesh.synchronize(state, 6)
        return done.step, set(state.tolist())

    *left, _ = await run_members(tmp_path, 4, program)
    assert left == [(9, {9.0}) if another_knows else (6, {4.0})] * 3


@pytest.mark.parametrize(("trained", "step"), [(True, 1000), (False, 0)])
async def test_who_was_trained_further_in_another_mesh_is_the_reference(
    tmp_path: Path, trained: bool, step: int
) -> None:
    """A process that begins anew may be the first to form a mesh; one that has trained before comes into that."""
    results: list[Any] = []

    async def keep_on(mesh: AsyncMesh, state: Any, mine: int) -> None:
        while True:
            mine = (await mesh.synchronize(state, mine)).step
            if mesh.size == 2:
                results.append((mine, state.tolist()))
                return
            await trio.sleep(0.01)

    with trio.fail_after(40):
        async with (
            sparkle.open_mesh("run", **options(tmp_path / "trained", 1)) as first,
            sparkle.open_mesh("run", **options(tmp_path / "fresh", 1)) as second,
            trio.open_nursery() as nursery,
        ):
            if trained:
                await first.synchronize(np.ones(4), 1000)
            nursery.start_soon(keep_on, second, np.zeros(4), 0)
            first._lives.config = replace(first._lives.config, join=(second.invite(),), min_peers=2)
            await first.rejoin()
            nursery.start_soon(keep_on, first, np.ones(4), 1000)
    assert results == [(step, [float(trained)] * 4)] * 2
