"""Members that die while nobody calls: whose calls depend on how many ranks there are, they are told of it first."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

import sparkle_mesh as sparkle
from sparkle_mesh.async_mesh import AsyncMesh
from sparkle_mesh.errors import PeerLostError

Call = Callable[[AsyncMesh], Awaitable[Any]]

DEPENDING: dict[str, Call] = {
    "all_to_all": lambda mesh: mesh.all_to_all(np.ones((mesh.size, 3))),
    "scatter": lambda mesh: mesh.scatter(np.ones((mesh.size, 3)) if mesh.rank == 0 else np.ones(3)),
    "all_gather": lambda mesh: mesh.all_gather(np.ones(3)),
    "reduce_scatter": lambda mesh: mesh.reduce_scatter(np.ones((mesh.size, 3))),
    "gather": lambda mesh: mesh.gather(np.ones(3)),
    "all_reduce": lambda mesh: mesh.all_reduce(np.ones(3), on_failure="raise"),
    "broadcast": lambda mesh: mesh.broadcast(np.ones(3), mesh.size - 1),
    "min_contributors": lambda mesh: mesh.all_reduce(np.ones(3), min_contributors=mesh.size),
}


@pytest.mark.parametrize("name", DEPENDING)
async def test_the_call_raises_on_all_and_the_next_is_among_those_left(
    tmp_path: Path, vanish: Callable[[AsyncMesh], Awaitable[None]], name: str
) -> None:
    call = DEPENDING[name]
    gone = trio.Event()

    async def member() -> None:
        async with sparkle.open_mesh(
            "run",
            min_peers=3,
            timeout_s=30,
            lan=False,
            listen=["/ip4/127.0.0.1/tcp/0"],
            data_dir=tmp_path,
            links=["tcp"],
        ) as mesh:
            await mesh.barrier()
            if mesh.rank == 2:
                await vanish(mesh)
                gone.set()
                return
            await gone.wait()
            while mesh._follower.opened_epoch < 1:
                await mesh._follower.until_changed()
            # Ranks change at the end of a call alone.
            assert mesh.size == 3
            with pytest.raises(PeerLostError):
                await call(mesh)
            assert mesh.size == len(mesh.members) == 2
            await call(mesh)
            assert (await mesh.all_reduce(np.ones(1)))[0] == 2

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(member)
