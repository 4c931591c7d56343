"""The mesh as programs hold it: for trio, for threads, alone and in pairs within one process."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

import sparkle_mesh as sparkle
from sparkle_mesh import async_mesh, limits
from sparkle_mesh.clock import SYSTEM_CLOCK
from sparkle_mesh.errors import (
    ForkedProcessError,
    JoinTimeoutError,
    MeshClosedError,
    PeerLostError,
    UsageError,
)
from sparkle_mesh.membership.invite import Invite
from sparkle_mesh.membership.keys import MeshKey

KEY = MeshKey(b"k" * 32)


def options(data_dir: Path, **changes: Any) -> dict[str, Any]:
    settings = {"min_peers": 2, "timeout_s": 30, "data_dir": data_dir, "lan": False, "listen": ["/ip4/127.0.0.1/tcp/0"]}
    return settings | changes


async def test_trio_programs_open_meshes_of_their_own(tmp_path: Path) -> None:
    results: dict[int, np.ndarray[Any, Any]] = {}
    texts: list[str] = []

    async def member() -> None:
        async with sparkle.open_mesh("run", **options(tmp_path)) as mesh:
            data = np.full(1000, float(mesh.rank + 1))
            await mesh.all_reduce(data, op="mean")
            results[mesh.rank] = data
            shared = np.array([float(mesh.rank)])
            await mesh.broadcast(shared, root=1)
            assert shared[0] == 1.0
            await mesh.barrier()
            assert mesh.size == len(mesh.members) == mesh.view.size == 2
            assert mesh.members[mesh.rank].peer_id == mesh.peer_id
            assert mesh.last_outcome is not None
            assert mesh.stats.bytes_sent > 0
            assert mesh.stats.bytes_received > 0
            assert [peer.rank for peer in mesh.peers()] == [1 - mesh.rank]
            assert Invite.decode(mesh.invite()).name == "run"
            texts.append(repr(mesh))
            await mesh.barrier()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(member)
        nursery.start_soon(member)
    assert results.keys() == {0, 1}
    assert all(np.array_equal(result, np.full(1000, 1.5)) for result in results.values())
    assert sorted(texts) == ["<AsyncMesh 'run' rank 0 of 2>", "<AsyncMesh 'run' rank 1 of 2>"]


async def test_an_error_in_the_block_comes_out_as_it_is(tmp_path: Path) -> None:
    async def fail() -> None:
        async with sparkle.open_mesh("run", **options(tmp_path, min_peers=1)):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await fail()


@pytest.mark.parametrize("leaves", [0, 1])
async def test_who_stays_goes_on_alone_when_the_other_leaves(tmp_path: Path, leaves: int) -> None:
    """Leaving is agreed on, so that even the second of two goes on."""
    left, told = trio.Event(), []

    async def member() -> None:
        async with sparkle.open_mesh("run", **options(tmp_path)) as mesh:
            await mesh.barrier()
            if mesh.rank == leaves:
                return
            await left.wait()
            with pytest.raises(PeerLostError, match=r"is lost|left"):
                await mesh.broadcast(np.ones(3), root=leaves, timeout_s=20)
            told.append(((await mesh.all_reduce(np.ones(3), timeout_s=20))[0], mesh.rank, mesh.size))

    async def run() -> None:
        await member()
        left.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        nursery.start_soon(run)
    assert told == [(1.0, 0, 1)]


def test_a_mesh_for_threads(tmp_path: Path) -> None:
    results: list[tuple[int, float]] = []

    def member() -> None:
        with sparkle.join("run", **options(tmp_path)) as mesh:
            data = {"b": np.ones(3), "a": np.full((2, 2), mesh.rank, np.float32)}
            assert mesh.all_reduce(data, timeout_s=20) is data
            assert mesh.broadcast(np.array([mesh.rank]), root=0)[0] == 0
            assert mesh.stats.bytes_sent > 0
            assert len(mesh.peers()) == 1
            assert (mesh.size, len(mesh.members), mesh.view.size) == (2, 2, 2)
            assert mesh.peer_id in {member.peer_id for member in mesh.members}
            assert mesh.last_outcome is not None
            assert Invite.decode(mesh.invite()).name == "run"
            assert repr(mesh) == f"<Mesh 'run' rank {mesh.rank} of 2>"
            results.append((mesh.rank, float(data["a"][0, 0])))
            mesh.barrier(timeout_s=20)

    threads = [threading.Thread(target=member) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [(0, 1.0), (1, 1.0)]


def test_a_closed_mesh_says_so(tmp_path: Path) -> None:
    mesh = sparkle.join("run", **options(tmp_path, min_peers=1))
    assert mesh.all_reduce(np.ones(2))[0] == 1.0
    mesh.close()
    mesh.close()
    with pytest.raises(MeshClosedError, match="join again"):
        mesh.barrier()


def test_a_closed_mesh_does_not_keep_its_callers(tmp_path: Path) -> None:
    mesh = sparkle.join("run", **options(tmp_path, min_peers=1))
    mesh.close()
    started = SYSTEM_CLOCK.now()
    with pytest.raises(MeshClosedError):
        mesh.all_reduce(np.ones(3))
    assert SYSTEM_CLOCK.now() - started < limits.CLOSE_TIMEOUT_S / 2


def test_arrays_are_allocated_as_numpy_does(tmp_path: Path) -> None:
    with sparkle.join("run", **options(tmp_path, min_peers=1)) as mesh:
        for shape in ((), 0, 3, (2, 3), (4, 0)):
            array = mesh.allocate(shape, np.float64)
            like = np.zeros(shape)
            assert (array.shape, array.dtype) == (like.shape, like.dtype)
            assert not array.any()
            array[...] = 1
        assert mesh.allocate(2).dtype == np.float32
        for shape, dtype in ((-1, "f4"), ("five", "f4"), (3, object), (3, "U5"), (3, "nothing")):
            with pytest.raises(UsageError):
                mesh.allocate(shape, dtype)  # type: ignore[arg-type]
        kept = mesh.allocate((2, 2))
    kept[:] = 1  # it outlives the mesh


def test_another_process_cannot_use_or_close_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with sparkle.join("run", **options(tmp_path, min_peers=1)) as mesh:
        with monkeypatch.context() as patched:
            patched.setattr(os, "getpid", lambda: 1)
            with pytest.raises(ForkedProcessError, match="forked process 1 cannot use it"):
                mesh.barrier()
            mesh.close()
        mesh.barrier()


def test_too_few_peers_time_out_with_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(JoinTimeoutError, match=r"did not form in 1 s: 1 of 3 peers.*lower min_peers"):
        sparkle.join("run", **options(tmp_path, min_peers=3, timeout_s=1))


def test_a_latecomer_is_told_that_the_mesh_runs_without_it(tmp_path: Path) -> None:
    with (
        sparkle.join("run", **options(tmp_path, min_peers=1)),
        pytest.raises(JoinTimeoutError, match="formed without this process"),
    ):
        sparkle.join("run", **options(tmp_path, min_peers=2, timeout_s=4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_peers": 0}, "min_peers is 0"),
        ({"timeout_s": 0}, "timeout_s is 0"),
        ({"allow": []}, "allow is empty, so nobody could come in"),
        ({"allow": "12D3KooW"}, "allow is a str; give a list"),
        ({"allow": ["12D3KooW"]}, "allow: '12D3KooW' is not an Ed25519 peer id"),
        ({"key": "a passphrase"}, "passphrases are refused"),
        ({"join": "/ip4/127.0.0.1/tcp/1"}, "join is a str; give a list"),
        ({"join": 5}, "join is a int; give a list"),
        ({"join": [5]}, "join is a list; give a list of texts"),
        ({"listen": "/ip4/127.0.0.1/tcp/0"}, "listen is a str; give a list"),
        ({"join": ["/ip4/127.0.0.1/tcp/1"]}, "p2p"),
        ({"join": [Invite(name="other", key=None, addresses=()).encode()]}, "'other', not 'run'"),
        ({"key": KEY, "join": [Invite(name="run", key=MeshKey(b"x" * 32), addresses=()).encode()]}, "another key"),
        ({"listen": ["nonsense"]}, "nonsense"),
        ({"listen": []}, "listen is empty"),
    ],
)
def test_what_cannot_be_is_refused_at_once(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sparkle.join("run", **options(tmp_path, **changes))


def test_a_timeout_must_be_positive(tmp_path: Path) -> None:
    with (
        sparkle.join("run", **options(tmp_path, min_peers=1)) as mesh,
        pytest.raises(UsageError, match="timeout_s is -1"),
    ):
        mesh.barrier(timeout_s=-1)


def test_an_invite_stands_for_name_and_key() -> None:
    text = Invite(name="run", key=KEY, addresses=("/ip4/127.0.0.1/tcp/1/p2p/x",)).encode()
    name, key, join = async_mesh._resolve_invites(text, None, ())
    assert (name, key, list(join)) == ("run", KEY, [text])
    assert async_mesh._resolve_invites("run", None, [text])[:2] == ("run", KEY)
