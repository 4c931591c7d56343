"""Meshes of one name that meet, and forks that those who lost their quorum go on in."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import trio

import sparkle_mesh as sparkle
from sparkle_mesh import limits, mesh_life
from sparkle_mesh.async_mesh import AsyncMesh
from sparkle_mesh.errors import CollectiveTimeoutError, MeshMergedError, QuorumLostError, UsageError
from sparkle_mesh.membership.formation import Formation

Options = Callable[..., dict[str, Any]]
Vanish = Callable[[AsyncMesh], Awaitable[None]]


class Trainer:
    """Trains until all three are in one mesh and at the last step."""

    def __init__(self, begins_with: float) -> None:
        self.weights = np.full(3, begins_with)
        self.step = 0
        self.merged: list[str] = []
        self.advanced = trio.Event()
        self.sizes: list[int] = []
        self.stepped = trio.Event()

    async def run(self, mesh: AsyncMesh) -> None:
        together = 0
        while together < 10:
            try:
                self.step = (await mesh.synchronize(self.weights, self.step)).step
                self.weights += await mesh.all_reduce(np.ones(3), op="mean")
            except MeshMergedError as error:
                self.merged.append(str(error))
                continue
            self.step += 1
            self.sizes.append(mesh.size)
            self.stepped.set()
            if self.step >= 50:
                self.advanced.set()
            together += mesh.size == 3
            await trio.sleep(0.01)


async def dissolve(mesh: AsyncMesh) -> None:
    """Let ``mesh`` know that it has met another one, and end for it."""
    follower = mesh._follower
    mesh._node.membership.succession.dissolve()
    while follower.failure is None:
        await follower.until_changed()


async def test_of_two_meshes_that_meet_the_one_that_has_done_less_joins_the_other(options: Options) -> None:
    older, younger, newcomer = Trainer(1000.0), Trainer(0.0), Trainer(-5.0)
    with trio.fail_after(50):
        async with (
            sparkle.open_mesh("run", **options("older", min_peers=1)) as first,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(older.run, first)
            await older.advanced.wait()
            async with sparkle.open_mesh("run", **options("younger", min_peers=1)) as second:
                lineages = {first.view.lineage, second.view.lineage}
                assert len(lineages) == 2
                async with trio.open_nursery() as others:
                    others.start_soon(younger.run, second)
                    await younger.stepped.wait()
                    # Whoever knows both makes them know each other.
                    invites = [first.invite(), second.invite()]
                    async with sparkle.open_mesh("run", **options("newcomer", join=invites, min_peers=3)) as third:
                        await newcomer.run(third)
                        lineage = third.view.lineage
                        lives = (first._lives.count, second._lives.count)
                        assert second.view.lineage == first.view.lineage == lineage
                        others.cancel_scope.cancel()
                nursery.cancel_scope.cancel()
    # Those who were in the younger came back by themselves, if nothing but synchronize had to tell them.
    assert older.merged == []
    assert lives == (1, 2)
    assert lineage in lineages
    # One state, which is that of the older: all have what it began with, and its steps.
    assert older.step >= 60
    assert older.weights.tolist() == [1000.0 + older.step] * 3
    for trainer in (younger, newcomer):
        assert abs(trainer.step - older.step) <= 1
        assert trainer.weights.tolist() == [1000.0 + trainer.step] * 3
        assert trainer.sizes[-1] == 3


async def test_calls_say_that_the_mesh_has_dissolved_until_synchronize_brings_it_back(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "REJOIN_SETTLE_S", 0.2)
    views: list[int] = []

    async def member(met: trio.Event) -> None:
        async with sparkle.open_mesh("run", **options(min_peers=2)) as mesh:
            mesh.on_view_change(lambda view: views.append(view.size))
            before = mesh.rank, mesh.view
            waits = trio.Event()

            async def meet() -> None:
                await waits.wait()
                await dissolve(mesh)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(meet)
                if mesh.rank == 0:
                    # Its call is told, and so are all that follow; ranks stay as they were.
                    waits.set()
                    for _ in range(2):
                        with pytest.raises(MeshMergedError, match="call synchronize"):
                            await mesh.all_reduce(np.ones(2), tag="apart")
                    assert (mesh.rank, mesh.view) == before
                    met.set()
                else:
                    await met.wait()
                    waits.set()
                assert (await mesh.synchronize(np.ones(2), 5)).step == 5
            assert mesh.view.lineage != before[1].lineage
            assert (await mesh.all_reduce(np.ones(2))).tolist() == [2, 2]

    with trio.fail_after(40):
        async with trio.open_nursery() as nursery:
            met = trio.Event()
            for _ in range(2):
                nursery.start_soon(member, met)
    assert views == [2, 2]


def test_all_calls_of_a_thread_say_so_and_the_next_ones_too(options: Options) -> None:
    """Over shared memory as well, whether anything was reduced there before or not."""
    met = threading.Barrier(2)
    raised: list[str] = []

    def member(reduces: bool) -> None:
        with sparkle.join("run", **options(min_peers=2, links=None)) as mesh:
            mesh.barrier() if reduces else mesh.all_gather(np.ones(2))
            met.wait(30)

            async def meet() -> None:
                await dissolve(mesh._mesh)

            mesh._call(meet)
            ended = mesh._mesh._lives.current._ended
            mesh._portal.call(ended.wait)
            calls: list[Callable[[], object]] = [
                lambda: mesh.all_reduce(np.ones(2)),
                lambda: mesh.all_reduce_async(np.ones(2)).wait(),
                lambda: mesh.all_reduce_async(np.ones(2), tag="apart").wait(),
                lambda: mesh.all_gather(np.ones(2)),
                lambda: mesh.broadcast(np.ones(2)),
                mesh.barrier,
                lambda: mesh.send(np.ones(2), 1 - mesh.rank),
            ]
            for call in calls:
                with pytest.raises(MeshMergedError):
                    call()
                raised.append(type(call).__name__)
            assert mesh.allocate(3).tolist() == [0, 0, 0]

    for reduces in (False, True):
        threads = [threading.Thread(target=member, args=(reduces,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(40)
    assert len(raised) == 28


async def test_who_does_not_come_back_in_time_is_told(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    with trio.fail_after(40):
        async with sparkle.open_mesh("run", **options(min_peers=1, timeout_s=2)) as mesh:
            monkeypatch.setattr(mesh._lives, "config", replace(mesh._lives.config, min_peers=2))
            await dissolve(mesh)
            # It is coming back, which takes longer than that.
            with pytest.raises(CollectiveTimeoutError, match="waits to be taken in"):
                await mesh.synchronize(timeout_s=0.3)
            # It has not come back, and does not any more.
            with pytest.raises(MeshMergedError):
                await mesh.synchronize(timeout_s=20)
            await mesh.rejoin(min_peers=1, timeout_s=20)
            assert (await mesh.all_reduce(np.ones(2))).tolist() == [1, 1]


async def test_joining_again_on_other_terms_goes_before_coming_back(options: Options) -> None:
    with trio.fail_after(40):
        async with sparkle.open_mesh("run", **options(min_peers=1)) as mesh:
            await dissolve(mesh)
            await mesh.rejoin(min_peers=1)
            assert not mesh._lives.is_coming_back
            await dissolve(mesh)
            # Without other terms it is that which comes back.
            await mesh.rejoin()
            assert mesh._lives.count == 3
            # And who leaves while it comes back leaves both lives.
            await dissolve(mesh)
            back = mesh._lives._back
            assert back is not None
            await back.wait()


async def test_who_loses_its_quorum_goes_on_in_a_fork_if_it_is_to(
    vanish: Vanish, options: Options, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(limits, "QUORUM_MISSING_S", 0.2)
    monkeypatch.setattr(limits, "REJOIN_SETTLE_S", 0.5)
    both, forked = trio.Event(), []

    async def member(kill: trio.CancelScope, *, task_status: trio.TaskStatus[AsyncMesh]) -> None:
        with kill:
            settings = options(min_peers=2, on_quorum_loss="continue")
            async with sparkle.open_mesh("run", **settings) as mesh:
                task_status.started(mesh)
                await both.wait()
                if mesh.rank == 0:
                    await vanish(mesh)
                    kill.cancel()
                before = mesh.view
                with pytest.raises(QuorumLostError):
                    await mesh.all_reduce(np.ones(2))
                # It waits until there is a mesh.
                done = await mesh.synchronize(np.ones(2), 7)
                assert done.step == 7
                assert (mesh.size, mesh._lives.count) == (1, 2)
                assert mesh.view.lineage != before.lineage
                forked.append((await mesh.all_reduce(np.ones(2))).tolist())

    with trio.fail_after(40):
        async with trio.open_nursery() as nursery:
            scopes = [trio.CancelScope(), trio.CancelScope()]
            async with trio.open_nursery() as starting:
                for scope in scopes:
                    starting.start_soon(nursery.start, member, scope)
            both.set()
    assert forked == [[1.0, 1.0]]
    assert "in a fork of the mesh" in caplog.text


async def test_a_fork_that_does_not_come_about_is_the_end(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    with trio.fail_after(40):
        async with sparkle.open_mesh("run", **options(min_peers=1, on_quorum_loss="continue", timeout_s=2)) as mesh:
            monkeypatch.setattr(Formation, "_eligible", lambda self: [])
            mesh._follower._fail(QuorumLostError("lost"))
            with pytest.raises(QuorumLostError):
                await mesh.all_reduce(np.ones(2))
            with pytest.raises(QuorumLostError):
                await mesh.synchronize()


def test_threads_are_told_of_the_fork(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REJOIN_SETTLE_S", 0.2)
    views: list[bytes] = []
    with sparkle.join("run", **options(min_peers=1, on_quorum_loss="continue", max_silence_s=2)) as mesh:
        mesh.on_view_change(lambda view: views.append(view.lineage))
        before = mesh.view.lineage
        failed = threading.Event()

        async def fail() -> None:
            mesh._mesh._follower._fail(QuorumLostError("lost"))
            failed.set()

        mesh._call(fail)
        assert failed.is_set()
        with pytest.raises(QuorumLostError):
            mesh.all_reduce(np.ones(2))
        mesh.synchronize()
        assert views == [mesh.view.lineage] != [before]


@pytest.mark.parametrize(
    "wrong",
    [
        {"on_quorum_loss": "fork"},
        {"on_quorum_loss": None},
        {"max_silence_s": 0.5},
        {"max_silence_s": 61},
        {"max_silence_s": "5"},
        {"max_silence_s": True},
        {"min_peers": True},
        {"timeout_s": True},
    ],
)
def test_wrong_terms_are_refused(options: Options, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        sparkle.join("run", **options(**wrong))


async def test_a_mesh_that_dissolves_while_it_is_joined_is_joined_once_more(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = mesh_life._await_view
    attempts = 0

    async def dissolves_first(*arguments: Any) -> None:
        nonlocal attempts
        attempts += 1
        if attempts <= dissolves:
            raise MeshMergedError("met another")
        await waits(*arguments)

    monkeypatch.setattr(mesh_life, "_await_view", dissolves_first)
    with trio.fail_after(40):
        dissolves = 2
        async with sparkle.open_mesh("run", **options(min_peers=1)) as mesh:
            assert (attempts, mesh.size) == (3, 1)
        # But not for ever.
        dissolves = 1_000
        with pytest.raises(MeshMergedError):
            async with sparkle.open_mesh("run", **options(min_peers=1, timeout_s=1)):
                pass


async def test_who_is_a_member_no_more_is_in_nobodys_way(
    vanish: Vanish, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was told, and does nothing about it, neither keeps others from a mesh of their own, nor is in it."""
    monkeypatch.setattr(limits, "QUORUM_MISSING_S", 0.2)
    monkeypatch.setattr(limits, "REJOIN_SETTLE_S", 0.5)
    all_in, told, done = trio.Event(), trio.Event(), trio.Event()
    sizes: list[int] = []

    async def member(kill: trio.CancelScope, *, task_status: trio.TaskStatus[AsyncMesh]) -> None:
        with kill:
            async with sparkle.open_mesh("run", **options(min_peers=4)) as mesh:
                task_status.started(mesh)
                await all_in.wait()
                if mesh.rank < 2:
                    await vanish(mesh)
                    kill.cancel()
                with pytest.raises(QuorumLostError):
                    await mesh.all_reduce(np.ones(2))
                if mesh.rank == 2:
                    told.set()
                    await done.wait()
                    return
                await told.wait()
                await mesh.rejoin(min_peers=1, timeout_s=20)
                sizes.append(mesh.size)
                done.set()

    with trio.fail_after(50):
        async with trio.open_nursery() as nursery:
            scopes = [trio.CancelScope() for _ in range(4)]
            async with trio.open_nursery() as starting:
                for scope in scopes:
                    starting.start_soon(nursery.start, member, scope)
            all_in.set()
    assert sizes == [1]
