"""A process becomes a member again: of the mesh that there is, or of another."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import trio

import sparkle_mesh as sparkle
from sparkle_mesh import limits
from sparkle_mesh.async_mesh import AsyncMesh
from sparkle_mesh.errors import JoinTimeoutError, MeshClosedError, PeerLostError, QuorumLostError, UsageError

Options = Callable[..., dict[str, Any]]
Vanish = Callable[[AsyncMesh], Awaitable[None]]


async def test_who_joins_again_is_a_newcomer_of_the_others(options: Options) -> None:
    views: list[list[int]] = [[], [], []]

    async def member(number: int) -> tuple[Any, ...]:
        async with sparkle.open_mesh("run", **options(min_peers=3)) as mesh:
            mesh.on_view_change(lambda view: views[number].append(view.size))
            weights, step, first = np.zeros(3), 0, mesh.peer_id
            leaver = mesh.rank == 2
            while step < 40:
                done = await mesh.synchronize(weights, step)
                step = done.step
                if leaver and step == 5 and mesh.peer_id == first:
                    await mesh.rejoin(min_peers=3)
                    step, weights[:] = 0, 0.0
                    continue
                weights += await mesh.all_reduce(np.ones(3), op="mean")
                step += 1
                if step == 39 and mesh.size < 3:
                    step = 38  # until it is back
                    weights -= 1
            return leaver, mesh.peer_id == first, mesh.size, weights.tolist()

    results: list[Any] = [None] * 3

    async def run(number: int) -> None:
        results[number] = await member(number)

    with trio.fail_after(50):
        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(run, number)
    assert sorted(results) == [(False, True, 3, [40.0] * 3)] * 2 + [(True, False, 3, [40.0] * 3)]
    for number, (leaver, *_) in enumerate(results):
        assert views[number][-1] == 3
        assert leaver or 2 in views[number]


async def test_who_is_left_without_a_quorum_may_go_on_in_a_mesh_of_its_own(
    vanish: Vanish, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "QUORUM_MISSING_S", 0.2)
    both = trio.Event()
    ended: dict[int, Any] = {}

    async def member(kill: trio.CancelScope, *, task_status: trio.TaskStatus[AsyncMesh]) -> None:
        with kill:
            async with sparkle.open_mesh("run", **options()) as mesh:
                task_status.started(mesh)
                await both.wait()
                if mesh.rank == 0:
                    await vanish(mesh)
                    kill.cancel()
                with pytest.raises(QuorumLostError, match="join again"):
                    await mesh.all_reduce(np.ones(2))
                with pytest.raises(QuorumLostError):
                    await mesh.barrier()
                before = mesh.view
                await mesh.rejoin(min_peers=1)
                assert (mesh.rank, mesh.size) == (0, 1)
                assert mesh.view.lineage != before.lineage
                ended[1] = (await mesh.all_reduce(np.ones(2))).tolist()

    with trio.fail_after(40):
        async with trio.open_nursery() as nursery:
            scopes = [trio.CancelScope(), trio.CancelScope()]
            async with trio.open_nursery() as starting:
                for scope in scopes:
                    starting.start_soon(nursery.start, member, scope)
            both.set()
    assert ended == {1: [1.0, 1.0]}


async def test_joining_again_that_fails_can_be_tried_again(options: Options) -> None:
    with trio.fail_after(40):
        async with sparkle.open_mesh("run", **options(min_peers=1)) as mesh:
            pending = mesh.all_reduce_async(np.ones(3), tag="first")
            for wrong in ({"min_peers": 0}, {"min_peers": "2"}, {"timeout_s": 0}):
                with pytest.raises(UsageError):
                    await mesh.rejoin(**wrong)  # type: ignore[arg-type]
            assert (await pending.wait()).tolist() == [1, 1, 1]
            with pytest.raises(JoinTimeoutError, match="did not form"):
                await mesh.rejoin(min_peers=2, timeout_s=0.2)
            with pytest.raises(MeshClosedError):
                await mesh.all_reduce(np.ones(3))
            await mesh.rejoin()
            assert (await mesh.all_reduce(np.ones(3))).tolist() == [1, 1, 1]
            # Whom it knew last is added to where it began, and not to all that it ever knew.
            assert mesh._lives.current.config.join == mesh._lives.config.join == ()
            assert (mesh._lives.config.min_peers, mesh._lives.current.config.min_peers) == (1, 1)


def test_threads_join_again(options: Options) -> None:
    views: list[int] = []
    done = threading.Barrier(2)

    def run(results: list[Any]) -> None:
        with sparkle.join("run", **options()) as mesh:
            mesh.on_view_change(lambda view: views.append(view.size))
            shared = mesh.allocate(3)
            mesh.all_reduce(shared)
            done.wait(20)
            mesh.rejoin()
            shared[:] = mesh.rank
            results.append(mesh.all_reduce(shared).tolist())

    results: list[Any] = []
    threads = [threading.Thread(target=run, args=(results,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    assert results == [[1.0] * 3] * 2
    assert views == [2, 2]


def test_a_peer_that_leaves_to_join_again_is_lost_to_calls_that_do_not_repeat(options: Options) -> None:
    begun = threading.Event()
    seen: list[str] = []

    def stays() -> None:
        with sparkle.join("run", **options()) as mesh:
            pending = mesh.all_reduce_async(np.ones(3), on_failure="raise")
            begun.set()
            try:
                pending.wait(30)
            except PeerLostError:
                seen.append("lost")
            except QuorumLostError:
                seen.append("quorum")

    def goes() -> None:
        with sparkle.join("run", **options()) as mesh:
            begun.wait(30)
            mesh.rejoin(min_peers=1)
            seen.append(f"{mesh.size} in its own")

    threads = [threading.Thread(target=target) for target in (stays, goes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    assert "lost" in seen


def test_closing_ends_a_rejoin_and_asking_twice_is_one(options: Options) -> None:
    raised: list[BaseException | None] = []

    def rejoin(mesh: Any, **terms: Any) -> None:
        try:
            mesh.rejoin(**terms)
            raised.append(None)
        except BaseException as error:
            raised.append(error)

    mesh = sparkle.join("run", **options(min_peers=1))
    for count, terms in ((2, {}), (3, {"min_peers": 1})):
        both = [threading.Thread(target=rejoin, args=(mesh,), kwargs=terms) for _ in range(2)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join(30)
        assert mesh._mesh._lives.count == count
    assert raised == [None] * 4
    waits = threading.Thread(target=rejoin, args=(mesh,), kwargs={"min_peers": 2})
    waits.start()
    while not mesh._mesh._lives.current.is_over:
        waits.join(0.01)
    # Meanwhile an allocated array is an ordinary one.
    assert mesh.allocate(3).tolist() == [0, 0, 0]
    mesh.close()
    waits.join(30)
    assert isinstance(raised[4], MeshClosedError)


async def test_leaving_ends_a_rejoin(options: Options) -> None:
    with trio.fail_after(40):
        async with trio.open_nursery() as nursery:
            opened = sparkle.open_mesh("run", **options(min_peers=1))
            mesh = await opened.__aenter__()

            async def rejoin() -> None:
                with pytest.raises(MeshClosedError, match="left"):
                    await mesh.rejoin(min_peers=2)

            nursery.start_soon(rejoin)
            await mesh._lives.current._ended.wait()
            await opened.__aexit__(None, None, None)
