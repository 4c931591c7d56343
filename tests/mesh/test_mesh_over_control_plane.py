"""Meshes whose members have no direct connections, at first or at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

import sparkle_mesh as sparkle
from sparkle_mesh import limits
from sparkle_mesh.async_mesh import AsyncMesh
from sparkle_mesh.errors import UnreachableError
from sparkle_mesh.transport.data_connections import DataConnections

OPTIONS: dict[str, Any] = {"timeout_s": 30, "lan": False, "listen": ["/ip4/127.0.0.1/tcp/0"]}


def kinds(mesh: AsyncMesh) -> set[str]:
    return {link.kind for link in mesh._follower.links.values()}


async def reduce(mesh: AsyncMesh, count: int, round_number: int) -> None:
    """Reduce integers, so that the result is known to the bit."""
    data = np.arange(count, dtype=np.int64) * (mesh.rank + 1) + round_number
    await mesh.all_reduce(data)
    ranks = mesh.size
    expected = np.arange(count, dtype=np.int64) * (ranks * (ranks + 1) // 2) + round_number * ranks
    assert np.array_equal(data, expected)


@pytest.mark.parametrize("count", [10, 300_000])
async def test_all_reduce_over_the_control_plane_alone(count: int, tmp_path: Path) -> None:
    done = []

    async def member() -> None:
        async with sparkle.open_mesh("run", min_peers=3, data_dir=tmp_path, links=["libp2p_stream"], **OPTIONS) as mesh:
            for number in range(3):
                await reduce(mesh, count, number)
            assert kinds(mesh) == {"libp2p_stream"}
            assert mesh.stats.bytes_received > count
            await mesh.barrier()
            done.append(mesh.rank)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(member)
    assert sorted(done) == [0, 1, 2]


async def test_links_move_between_and_during_collectives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No way but the control plane when the mesh forms; then there is one, while arrays are reduced."""
    reach = DataConnections._reach_tcp
    open_way = False

    async def reach_if_open(self: DataConnections, *arguments: Any) -> Any:
        if not open_way:
            raise UnreachableError("no route to host")
        return await reach(self, *arguments)

    monkeypatch.setattr(DataConnections, "_reach_tcp", reach_if_open)
    monkeypatch.setattr(limits, "LINK_UPGRADE_PAUSE_MIN_S", 0.05)
    monkeypatch.setattr(limits, "LINK_UPGRADE_PAUSE_MAX_S", 0.2)
    before: list[set[str]] = []
    after: list[set[str]] = []

    async def member() -> None:
        nonlocal open_way
        async with sparkle.open_mesh(
            "run", min_peers=3, data_dir=tmp_path, links=["tcp", "libp2p_stream"], **OPTIONS
        ) as mesh:
            await reduce(mesh, 1000, 0)
            before.append(kinds(mesh))
            await mesh.barrier()
            open_way = True
            number, moved = 0, np.zeros(1, np.int64)
            # All go on until all links of all have moved, and a little longer.
            while moved[0] < mesh.size:
                number += 1
                await reduce(mesh, 30_000, number)
                moved[0] = kinds(mesh) == {"tcp"}
                await mesh.all_reduce(moved)
            for _ in range(3):
                await reduce(mesh, 300_000, number)
            after.append(kinds(mesh))
            await mesh.barrier()

    with trio.fail_after(50):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(member)
    assert before == [{"libp2p_stream"}] * 3
    assert after == [{"tcp"}] * 3
