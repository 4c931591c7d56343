"""A peer that is let go because there are others enough: it is told of them, and is of the mesh still."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from sparkle_mesh import limits
from sparkle_mesh.fabric.memory import MemoryFabricNetwork
from sparkle_mesh.membership.events import MembershipEvent, PeerAdmitted, PeerGone
from sparkle_mesh.membership.keys import MeshSecrets
from sparkle_mesh.membership.messages import Role
from sparkle_mesh.membership.service import MembershipService


class Peer:
    def __init__(self, service: MembershipService) -> None:
        self.service = service
        self.heard: dict[str, str] = {}
        self.events: list[MembershipEvent] = []

    def gone(self) -> list[PeerGone]:
        return [event for event in self.events if isinstance(event, PeerGone)]

    async def watch(self, events: trio.MemoryReceiveChannel[MembershipEvent]) -> None:
        async for event in events:
            self.events.append(event)


@asynccontextmanager
async def opened(nursery: trio.Nursery, network: MemoryFabricNetwork, name: str, role: Role) -> AsyncIterator[Peer]:
    async with network.open(name) as fabric:
        peer: Peer

        def hear(peer_id: str, addresses: object, source: str, told: str) -> None:
            if source == "exchange":
                peer.heard[peer_id] = told

        service = MembershipService(
            fabric,
            MeshSecrets("run", None),
            role=role,
            host_id=bytes(16),
            incarnation=name.encode().ljust(16)[:16],
            min_peers=100,
            public=True,
            heard=hear,
        )
        peer = Peer(service)
        with service.events() as events:
            nursery.start_soon(peer.watch, events)
            await nursery.start(service.run)
            yield peer


@pytest.mark.parametrize("role", ["node", "trainer"])
@pytest.mark.parametrize("was_told", ["just now", "long ago"])
async def test_it_is_told_of_others_and_goes_as_one_that_stays(
    autojump_clock: trio.testing.MockClock, role: Role, was_told: str
) -> None:
    network = MemoryFabricNetwork(delay_s=0.01)
    count = limits.PEER_EXCHANGE_SAMPLE_COUNT + 10
    async with trio.open_nursery() as nursery, opened(nursery, network, "a", "node") as middle:
        hub = network._fabrics["a"]
        for number in range(count):
            other: Role = "trainer" if number < 5 else "node"
            await nursery.start(_stay, network, f"n{number:02}", other)
            await hub.connect(f"n{number:02}", network._fabrics[f"n{number:02}"].addresses)
        async with opened(nursery, network, "z", role) as peer:
            await hub.connect("z", network._fabrics["z"].addresses)
            await trio.sleep(1.0)
            assert any(isinstance(event, PeerAdmitted) for event in peer.events)
            trainers = {name for name, told in peer.heard.items() if told == "trainer"}
            if role == "trainer":
                # It needs all trainers, and is told of some nodes beside.
                assert len(trainers) == 5
                assert len(peer.heard) == limits.PEER_EXCHANGE_SAMPLE_COUNT + 5
            else:
                assert len(peer.heard) == limits.PEER_EXCHANGE_SAMPLE_COUNT
            peer.heard.clear()
            if was_told == "long ago":
                await trio.sleep(limits.PEER_EXCHANGE_STALE_S)
            middle.service.spare("z")
            middle.service.spare("z")
            middle.service.spare("nobody")
            await trio.sleep(1.0)
            assert len(peer.heard) >= limits.PEER_EXCHANGE_SAMPLE_COUNT if was_told == "long ago" else not peer.heard
            (theirs,), ours = peer.gone(), middle.gone()
            assert (theirs.graceful, theirs.stays) == (True, True)
            assert theirs.reason == "it let this connection go: it has enough peers"
            assert [(one.peer_id, one.graceful, one.stays) for one in ours] == [("z", True, True)]
            assert "z" not in hub.connected_peers()
            # It may come again at once: nobody holds it against it.
            await network._fabrics["z"].connect("a", hub.addresses)
            await trio.sleep(1.0)
            assert peer.service.is_admitted("a")
            nursery.cancel_scope.cancel()


async def _stay(network: MemoryFabricNetwork, name: str, role: Role, *, task_status: trio.TaskStatus[None]) -> None:
    async with trio.open_nursery() as nursery, opened(nursery, network, name, role):
        task_status.started()
        await trio.sleep_forever()
