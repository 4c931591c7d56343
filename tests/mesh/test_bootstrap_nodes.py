"""A node of ours as a bootstrap peer: of the same mesh, and of another."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from sparkle_mesh.discovery.reach import ReachConfig
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.membership.events import PeerRefused
from sparkle_mesh.membership.keys import MeshKey
from sparkle_mesh.node import MeshNode, NodeConfig, PeerJoined, open_node
from tests.mesh.nodes import address_of

KEY = MeshKey(bytes(32))
SMALL, LARGE = sorted((Identity(bytes([1]) * 32), Identity(bytes([2]) * 32)), key=lambda identity: identity.peer_id)


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Any]:
    @asynccontextmanager
    async def started(identity: Identity, *bootstrap: str, mesh: str = "m") -> AsyncIterator[MeshNode]:
        config = NodeConfig(
            mesh=mesh,
            key=KEY,
            identity=identity,
            listen=("/ip4/127.0.0.1/tcp/0",),
            data_dir=tmp_path / identity.peer_id,
            lan=False,
            reach=ReachConfig(bootstrap=bootstrap),
        )
        (tmp_path / identity.peer_id).mkdir(mode=0o700)
        async with open_node(config) as node:
            yield node

    return started


@pytest.mark.parametrize("first", [SMALL, LARGE], ids=["small", "large"])
async def test_one_of_the_same_mesh_is_a_peer_of_it_too(start, first: Identity) -> None:
    second = LARGE if first is SMALL else SMALL
    with trio.fail_after(20):
        async with start(first) as one, start(second, address_of(one)) as other:
            with other.events() as events:
                while one.peer_id not in {peer.peer_id for peer in other.peers()}:
                    async for event in events:
                        if isinstance(event, PeerJoined):
                            break
            assert any("bootstrap peers: 1 of 1 connected" in line for line in other.status().discovery)


@pytest.mark.parametrize("first", [SMALL, LARGE], ids=["small", "large"])
async def test_one_of_another_mesh_is_refused_and_left_alone(start, first: Identity) -> None:
    second = LARGE if first is SMALL else SMALL
    with trio.fail_after(20):
        async with (
            start(first, mesh="another") as one,
            one_event(one) as refusals,
            start(second, address_of(one)) as other,
        ):
            refused = await refusals.receive()
            assert refused.peer_id == other.peer_id
            assert "the key is wrong, or the name is" in refused.reason
            assert other.peers() == one.peers() == []
            async with one.fabric.events() as connections:
                while other.peer_id in one.fabric.connected_peers():
                    await connections.receive()


@asynccontextmanager
async def one_event(node: MeshNode) -> AsyncIterator[trio.MemoryReceiveChannel[PeerRefused]]:
    send, receive = trio.open_memory_channel[PeerRefused](8)
    with node.events() as events:

        async def follow() -> None:
            async for event in events:
                if isinstance(event, PeerRefused):
                    await send.send(event)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(follow)
            yield receive
            nursery.cancel_scope.cancel()
