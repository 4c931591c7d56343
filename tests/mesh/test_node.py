"""Nodes on the real control plane, in one process: they meet, tell of each other, and leave."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trio

from sparkle_mesh.capabilities.search import DeviceQuery
from sparkle_mesh.environment import IDENTITY_NAME
from sparkle_mesh.errors import UsageError
from sparkle_mesh.fabric.identity import Identity, load_or_create_identity
from sparkle_mesh.membership.events import PeerRefused, ViewChanged
from sparkle_mesh.membership.invite import Invite
from sparkle_mesh.membership.keys import MeshKey
from sparkle_mesh.node import MeshNode, NodeConfig, PeerJoined, PeerLeft, open_node

KEY = MeshKey.generate()


def config(data_dir: Path, **changes: Any) -> NodeConfig:
    settings: dict[str, Any] = {
        "mesh": "run",
        "key": KEY,
        "identity": Identity.generate(),
        "listen": ("/ip4/127.0.0.1/tcp/0",),
        "data_dir": data_dir,
        "lan": False,
    }
    return NodeConfig(**(settings | changes))


async def first(node: MeshNode, kind: type) -> Any:
    """Return the node's next event of ``kind``."""
    with trio.fail_after(30), node.events() as events:
        async for event in events:
            if isinstance(event, kind):
                return event
    pytest.fail("the events ended")


async def until_joined(node: MeshNode, count: int) -> None:
    with trio.fail_after(30), node.events() as events:
        joined = len(node.peers())
        while joined < count:
            await anext(events)
            joined = len(node.peers())


async def test_trainers_and_a_node_of_one_host_meet_by_themselves(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        node = await stack.enter_async_context(open_node(config(tmp_path)))
        trainers = [
            await stack.enter_async_context(open_node(config(tmp_path, role="trainer", min_peers=2))) for _ in range(2)
        ]
        changed = await first(node, ViewChanged)
        await until_joined(node, 2)
        assert not changed.mine
        status = node.status()
        assert status.view is not None
        assert sorted(status.view.members) == sorted(trainer.peer_id for trainer in trainers)
        assert status.peer_count == 2
        assert status.keyed
        assert status.devices[0].kind == "cpu"
        ranks = {peer.peer_id: peer.rank for peer in node.peers()}
        assert sorted(ranks.values()) == [0, 1]
        assert all(peer.role == "trainer" for peer in node.peers())
        assert {peer.role for peer in trainers[0].peers()} == {"trainer", "node"}
        assert any("this host" in line for line in status.discovery)


async def test_trainers_are_of_the_machine_whose_key_lies_in_their_folder(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        identity = load_or_create_identity(tmp_path / IDENTITY_NAME)
        node = await stack.enter_async_context(open_node(config(tmp_path, identity=identity)))
        join = (f"{node.fabric.addresses[0]}/p2p/{node.peer_id}",)
        ours = await stack.enter_async_context(open_node(config(tmp_path, role="trainer", join=join)))
        theirs = await stack.enter_async_context(open_node(config(tmp_path / "b", role="trainer", join=join)))
        for one in (node, ours, theirs):
            await until_joined(one, 2)
        machines = {node.peer_id: node.peer_id, ours.peer_id: node.peer_id, theirs.peer_id: None}
        for one in (node, ours, theirs):
            assert {peer.peer_id: peer.machine for peer in one.peers()}.items() < machines.items()
    assert not (tmp_path / "b" / IDENTITY_NAME).exists()


async def until_found(node: MeshNode, query: DeviceQuery, peer_ids: set[str]) -> None:
    """Look until devices of all these are found: they are published within a second or two."""
    with trio.fail_after(30):
        while True:
            found = {one.peer_id for one in await node.find_devices(query)}
            if found == peer_ids:
                return
            await trio.sleep(0.1)


async def test_devices_of_all_are_found_by_all(tmp_path: Path) -> None:
    query = DeviceQuery.of("cpu")
    async with AsyncExitStack() as stack:
        nodes: list[MeshNode] = []
        for number in range(3):
            join = tuple(f"{address}/p2p/{node.peer_id}" for node in nodes for address in node.fabric.addresses)
            opened = open_node(config(tmp_path / str(number), join=join[:1]))
            nodes.append(await stack.enter_async_context(opened))
        everyone = {node.peer_id for node in nodes}
        for node in nodes:
            await until_found(node, query, everyone)
        assert await nodes[0].find_devices(DeviceQuery.of("opencl")) == []
        # One that leaves is gone at once.
        await nodes[2].leave()
        assert nodes[2].peer_id not in {found.peer_id for found in await nodes[0].find_devices(query)}


async def test_two_groups_are_one_once_one_address_is_known_to_one(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        groups: list[list[MeshNode]] = [[], []]
        for name, group in zip("ab", groups, strict=True):
            for number in range(5):
                join = tuple(f"{address}/p2p/{node.peer_id}" for node in group for address in node.fabric.addresses)
                opened = open_node(config(tmp_path / f"{name}{number}", join=join[:1]))
                group.append(await stack.enter_async_context(opened))
            for node in group:
                await until_joined(node, 4)
        one, other = groups[0][4], groups[1][2]
        started = trio.current_time()
        one.discovery.heard(other.peer_id, other.fabric.addresses, "exchange")
        for node in groups[0] + groups[1]:
            await until_joined(node, 9)
        assert trio.current_time() - started < 15.0


async def test_an_invite_leads_from_one_data_dir_to_another(tmp_path: Path) -> None:
    async with open_node(config(tmp_path / "a")) as inviting:
        invite = Invite.decode(inviting.invite())
        assert (invite.name, invite.key) == ("run", KEY)
        async with open_node(config(tmp_path / "b", join=(inviting.invite(),))) as invited:
            await until_joined(inviting, 1)
            assert inviting.peers()[0].peer_id == invited.peer_id


async def test_joining_and_leaving_are_told(tmp_path: Path) -> None:
    async with open_node(config(tmp_path)) as node, trio.open_nursery() as nursery:
        told: list[PeerJoined | PeerLeft] = []
        done = trio.Event()

        async def listen() -> None:
            with node.events() as events:
                async for event in events:
                    if isinstance(event, (PeerJoined, PeerLeft)):
                        told.append(event)
                    if isinstance(event, PeerLeft):
                        done.set()

        nursery.start_soon(listen)
        async with open_node(config(tmp_path)) as other:
            await until_joined(node, 1)
            await until_joined(other, 1)
        with trio.fail_after(10):
            await done.wait()
        nursery.cancel_scope.cancel()
    joined, left = told
    assert isinstance(joined, PeerJoined)
    assert joined.peer.peer_id == other.peer_id
    assert isinstance(left, PeerLeft)
    assert left.reason == "it left the mesh"


async def test_a_wrong_key_is_told_on_both_sides(tmp_path: Path) -> None:
    async with open_node(config(tmp_path / "a")) as ours:
        address = f"{ours.fabric.addresses[0]}/p2p/{ours.peer_id}"
        async with trio.open_nursery() as nursery:
            told: list[Any] = []

            async def listen() -> None:
                told.append(await first(ours, PeerRefused))

            nursery.start_soon(listen)
            wrong = config(tmp_path / "b", key=MeshKey.generate(), join=(address,))
            async with open_node(wrong) as theirs:
                refused = await first(theirs, PeerRefused)
                assert refused.wrong_key
                assert refused.peer_id == ours.peer_id
                assert theirs.peers() == []
        assert told[0].wrong_key
        assert ours.peers() == []


async def test_an_address_to_join_without_a_peer_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="p2p"):
        async with open_node(config(tmp_path, join=("/ip4/127.0.0.1/tcp/4000",))):
            pytest.fail("opened")
