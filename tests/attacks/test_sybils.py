"""Crowds of identities that hold a mesh's name, over a control plane in memory: there, addresses can be public."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio

from sparkle_mesh import limits
from sparkle_mesh.capabilities.labels import index_labels
from sparkle_mesh.capabilities.messages import Done, Find, Found, Store
from sparkle_mesh.capabilities.records import CapabilityRecord, sign_record
from sparkle_mesh.capabilities.search import DeviceQuery
from sparkle_mesh.capabilities.service import CapabilityService
from sparkle_mesh.capabilities.streams import Asker
from sparkle_mesh.clock import SYSTEM_ENTROPY
from sparkle_mesh.devices.detect import DeviceInfo
from sparkle_mesh.errors import SparkleError
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.fabric.memory import MemoryFabric, MemoryFabricNetwork
from sparkle_mesh.fabric.networks import network_of
from sparkle_mesh.membership.events import PeerAdmitted
from sparkle_mesh.membership.keys import MeshSecrets
from sparkle_mesh.membership.messages import PeerExchange
from sparkle_mesh.membership.service import MembershipService
from sparkle_mesh.node import MeshNode
from sparkle_mesh.wire import PeerAddress

QUERY = DeviceQuery.of("cpu")
GPU = DeviceInfo(kind="cuda", index=0, name="a made-up GPU", memory_bytes=80 << 30)
SECRETS = MeshSecrets("run", None)
# In virtual time, over paths of 10 ms: what a search may take at most is that long already.
DEADLINE_S = limits.LOOKUP_TIMEOUT_S


class Sybil:
    """An identity that proves the mesh's name, and answers with what it is told to."""

    def __init__(self, fabric: MemoryFabric, identity: Identity) -> None:
        self.fabric, self.identity = fabric, identity
        self.membership = MembershipService(
            fabric, SECRETS, role="node", host_id=b"h" * 16, incarnation=b"i" * 16, public=True, heard=lambda *_: None
        )
        self.capabilities = CapabilityService(
            fabric, identity, SECRETS, host_id=b"h" * 16, role="node", software="sybil"
        )
        self.asker = Asker(fabric, SECRETS, SYSTEM_ENTROPY)

    def named(self, number: int) -> PeerAddress:
        """Return what the crowd says of it: that it listens in a network where there is nobody else."""
        return PeerAddress(self.fabric.peer_id, (f"/ip4/20.{number}.1.1/tcp/45654",))

    async def store_junk(self, target: MeshNode) -> bool:
        """Have ``target`` hold a record that is true to the letter; return whether it answers."""
        record = CapabilityRecord(
            host_id=self.fabric.peer_id[-16:].encode(), role="node", software="s", addresses=(), devices=(GPU,)
        )
        signed = sign_record(record, self.identity, SECRETS, sequence=2**60)
        keys = tuple(map(SECRETS.locate, index_labels(record.role, record.devices)))
        try:
            await self.asker.ask(PeerAddress(target.peer_id, target.fabric.addresses), Store(record=signed, keys=keys))
        except SparkleError:
            return False
        return True


@asynccontextmanager
async def crowd_of(network: MemoryFabricNetwork, ips: Sequence[str]) -> AsyncIterator[list[Sybil]]:
    """Open one Sybil per address."""
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        crowd = []
        for ip in ips:
            identity = Identity.generate()
            fabric = await stack.enter_async_context(network.open(identity, addresses=(f"/ip4/{ip}/tcp/45654",)))
            sybil = Sybil(fabric, identity)
            await nursery.start(sybil.membership.run)
            sybil.capabilities._answerer.start()
            crowd.append(sybil)
        yield crowd
        nursery.cancel_scope.cancel()


@pytest.fixture
def open_public_node(open_memory_node) -> Callable[..., Any]:
    """Return what opens a node of a mesh without a key that is open to the world."""
    return partial(open_memory_node, key=None, public=True)


async def test_a_flood_of_identities_from_one_network(make_pair, open_public_node, autojump_clock):
    network = MemoryFabricNetwork(delay_s=0.01)
    async with (
        open_public_node(network, "9.9.1.1") as one,
        open_public_node(network, "9.9.2.2", one) as other,
        crowd_of(network, [f"8.8.4.{number % 250}" for number in range(300)]) as crowd,
    ):
        pair = make_pair(one, other)
        await pair.meet()
        answered = []

        async def attack(sybil: Sybil) -> None:
            await sybil.fabric.connect(one.peer_id, one.fabric.addresses)
            await trio.sleep(1.0)
            answered.append(await sybil.store_junk(one))

        async with pair.working(DEADLINE_S):
            async with trio.open_nursery() as nursery:
                for sybil in crowd:
                    nursery.start_soon(attack, sybil)
            admitted = set(one.membership.channels) - {other.peer_id}
            assert 0 < len(admitted) <= limits.MESH_PEERS_PER_NETWORK_MAX_COUNT
            # On both sides of the id that decides who opens the stream.
            assert len({sybil.fabric.peer_id < one.peer_id for sybil in crowd}) == 2
            assert 0 < sum(answered) <= limits.MESH_PEERS_PER_NETWORK_MAX_COUNT
            # With those of the pair.
            assert len(one.capabilities.store) <= limits.MESH_PEERS_PER_NETWORK_MAX_COUNT + 2
            table = one.capabilities.table
            assert sum(sybil.fabric.peer_id in table for sybil in crowd) <= limits.ROUTING_NETWORK_MAX_COUNT
            # Somebody else gets in meanwhile, and finds the pair.
            async with open_public_node(network, "7.7.7.7", one) as newcomer:
                await trio.sleep(2.0)
                found = {each.peer_id for each in await newcomer.find_devices(QUERY)}
                assert found == {one.peer_id, other.peer_id, newcomer.peer_id}
        # Those that were refused do not hold their connections.
        await trio.sleep(limits.STRANGER_STAY_MAX_S)
        assert len(one.fabric.connected_peers()) <= limits.MESH_PEERS_PER_NETWORK_MAX_COUNT + 1
        assert len(one.membership.strangers) == 0


async def surround(victim: MeshNode, sybil: Sybil, crowd: Sequence[Sybil], made_up: Sequence[PeerAddress]) -> None:
    """Be admitted by ``victim``, name nobody to it but the crowd and those that are made up, and hide all records."""
    named = [each.named(number) for number, each in enumerate(crowd)]

    def answer(question: Any, *_: Any) -> Any:
        # Of the crowd those that are the closest to what is asked for, as an honest peer would.
        return Found(peers=tuple(named[: limits.LOOKUP_NAMED_MAX_COUNT])) if isinstance(question, Find) else Done()

    sybil.capabilities._answers.answer = answer  # type: ignore[method-assign]
    with sybil.membership.events() as events:
        await sybil.fabric.connect(victim.peer_id, victim.fabric.addresses)
        async for event in events:
            if isinstance(event, PeerAdmitted):
                channel = sybil.membership.channels[event.peer_id]
                for start in range(0, len(made_up), limits.PEER_EXCHANGE_MAX_COUNT):
                    channel.send(PeerExchange(peers=tuple(made_up[start : start + limits.PEER_EXCHANGE_MAX_COUNT])))
                channel.send(PeerExchange(peers=tuple(named[: limits.PEER_EXCHANGE_MAX_COUNT])))


async def test_a_crowd_around_a_newcomer_that_knows_one_honest_peer(make_pair, open_public_node, autojump_clock):
    network = MemoryFabricNetwork(delay_s=0.01)
    # Two networks full of them; a hole that swallows every dial, at which they say that thousands listen.
    crowd_ips = [f"8.8.{4 + number % 2}.{number}" for number in range(40)]
    newcomer_identity = Identity.generate()
    async with (
        crowd_of(network, crowd_ips) as crowd,
        network.open(addresses=("/ip4/6.6.6.6/tcp/45654",)) as hole,
        trio.open_nursery() as nursery,
        AsyncExitStack() as stack,
    ):
        honest: list[MeshNode] = []
        for number in range(4):
            node = open_public_node(network, f"9.9.{number}.9", *honest[:1])
            honest.append(await stack.enter_async_context(node))
        network.partition([newcomer_identity.peer_id, *(node.peer_id for node in honest)], [hole.peer_id])
        pair = make_pair(honest[0], honest[1])
        await pair.meet()
        made_up = [PeerAddress(Identity.generate().peer_id, tuple(hole.addresses)) for _ in range(2200)]
        async with (
            pair.working(DEADLINE_S),
            open_public_node(network, "7.7.7.7", honest[0], identity=newcomer_identity) as newcomer,
        ):
            for number, sybil in enumerate(crowd):
                # Together they name thousands; each for itself some.
                some = made_up[number * 55 :][:55]
                nursery.start_soon(surround, newcomer, sybil, crowd[number:] + crowd[:number], some)
            everyone = {node.peer_id for node in honest}
            with trio.fail_after(10.0):
                while True:
                    found = {each.peer_id for each in await newcomer.find_devices(QUERY)}
                    if everyone <= found and everyone <= set(newcomer.membership.channels):
                        break
                    await trio.sleep(0.1)
            # And it stays so.
            await trio.sleep(2.0)
            assert everyone <= {each.peer_id for each in await newcomer.find_devices(QUERY)}
            of_the_crowd = set(newcomer.membership.channels) & {sybil.fabric.peer_id for sybil in crowd}
            assert 20 < len(of_the_crowd) <= 2 * limits.MESH_PEERS_PER_NETWORK_MAX_COUNT
            assert len(newcomer.discovery.directory) <= limits.DISCOVERY_CONTACTS_MAX_COUNT
            in_table = [sybil for sybil in crowd if sybil.fabric.peer_id in newcomer.capabilities.table]
            assert len(in_table) <= 2 * limits.ROUTING_NETWORK_MAX_COUNT
            assert {network_of(sybil.fabric.addresses[0]) for sybil in in_table} == {"8.8.4.0/24", "8.8.5.0/24"}
        nursery.cancel_scope.cancel()
