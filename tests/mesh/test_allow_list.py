"""Lists of those who may come in, on the real control plane: both sides say why somebody may not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing

import sparkle_mesh as sparkle
from sparkle_mesh.environment import IDENTITY_NAME
from sparkle_mesh.errors import JoinTimeoutError
from sparkle_mesh.fabric.identity import load_or_create_identity
from sparkle_mesh.membership.events import PeerRefused
from sparkle_mesh.node import MeshNode, open_node
from tests.mesh.nodes import KEY, address_of, config, until, until_joined

Options = Callable[..., dict[str, Any]]


async def until_refused(node: MeshNode, peer_id: str, reason: str) -> None:
    await until(node, lambda e: isinstance(e, PeerRefused) and e.peer_id == peer_id and reason in e.reason)


async def test_only_listed_machines_come_in_and_both_sides_say_so(tmp_path: Path) -> None:
    listed = load_or_create_identity(tmp_path / "listed" / IDENTITY_NAME).peer_id
    async with AsyncExitStack() as stack:

        async def start(folder: str, **changes: Any) -> MeshNode:
            return await stack.enter_async_context(open_node(config(tmp_path / folder, **changes)))

        node = await start("guarded", allow=(listed,))
        join = (address_of(node),)
        assert node.status().allowed_count == 1
        ours = await start("guarded", role="trainer", join=join)
        other = await start("listed", join=join)
        theirs = await start("listed", role="trainer", join=join)
        await until_joined(node, ours, other, theirs)
        # Ones that hold the key and are of another machine, or of none.
        for folder, role in (("other", "trainer"), ("other-node", "node")):
            data_dir = tmp_path / folder
            stranger = await start(folder, role=role)
            told = f"{stranger.peer_id} is not on the list of peers that are allowed here"
            async with trio.open_nursery() as nursery:
                nursery.start_soon(until_refused, node, stranger.peer_id, told)
                nursery.start_soon(until_refused, stranger, node.peer_id, told)
                await trio.testing.wait_all_tasks_blocked()
                stranger.discovery.heard(node.peer_id, node.fabric.addresses, "exchange")
            await until_joined(stranger)  # nobody: of two the one that answers has let the other in for a moment
            assert (data_dir / IDENTITY_NAME).exists()
        assert {peer.peer_id for peer in node.peers()} == {ours.peer_id, other.peer_id, theirs.peer_id}


async def test_members_with_a_list_train_with_those_on_it_alone(tmp_path: Path, options: Options) -> None:
    machines = {name: load_or_create_identity(tmp_path / name / IDENTITY_NAME).peer_id for name in "ab"}
    allow = list(machines.values())
    sums: list[float] = []
    address = trio.Event()
    join: list[str] = []

    async def train(folder: str) -> None:
        if folder == "b":
            await address.wait()
        options_here = options(folder, key=KEY, allow=allow, join=list(join), min_peers=1 if folder == "a" else 2)
        async with sparkle.open_mesh("run", **options_here) as mesh:
            if folder == "a":
                join.extend(mesh._node.fabric.addresses[:1])
                join[0] += f"/p2p/{mesh.peer_id}"
                address.set()
                with trio.fail_after(30):
                    while mesh.size < 2:
                        await mesh.synchronize()
            else:
                await mesh.synchronize()
            data = np.ones(3)
            await mesh.all_reduce(data)
            sums.append(float(data[0]))
            assert [peer.machine for peer in mesh.peers()] == [machines["b" if folder == "a" else "a"]]
            await mesh.barrier()

    async with trio.open_nursery() as nursery:
        for folder in "ab":
            nursery.start_soon(train, folder)
    assert sums == [2.0, 2.0]


async def test_who_is_not_on_the_list_is_told_so_when_it_cannot_join(tmp_path: Path, options: Options) -> None:
    listed = load_or_create_identity(tmp_path / "listed" / IDENTITY_NAME).peer_id
    async with open_node(config(tmp_path / "listed", allow=(listed,))) as node:
        joining = partial(sparkle.open_mesh, "run", key=KEY, join=[address_of(node)])
        with pytest.raises(JoinTimeoutError, match=r"refused: .* is not on the list of peers that are allowed here"):
            async with joining(**options("other", timeout_s=3)):
                pytest.fail("joined")
