"""News of who was met, and of addresses that change."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio
import trio.testing

from sparkle_mesh import limits
from sparkle_mesh.errors import ProtocolError
from sparkle_mesh.fabric.memory import MemoryFabricNetwork
from sparkle_mesh.membership.keys import MeshKey, MeshSecrets
from sparkle_mesh.membership.presence import PresenceService

KEY = MeshKey(b"k" * 32)


async def test_news_are_sealed_and_told_once(autojump_clock: trio.testing.MockClock) -> None:
    network = MemoryFabricNetwork()
    heard: dict[str, list[tuple[str, Sequence[str], str]]] = {"a": [], "b": []}
    async with network.open("a") as a, network.open("b") as b, trio.open_nursery() as nursery:
        await a.connect("b", b.addresses)
        ours = MeshSecrets("run", KEY)
        services = [
            PresenceService(
                fabric,
                ours,
                role="trainer",
                incarnation=b"i" * 16,
                heard=lambda *told, name=fabric.peer_id: heard[name].append(told),
            )
            for fabric in (a, b)
        ]
        async with a.subscribe(ours.topic) as raw:
            for service in services:
                await nursery.start(service.run)
            await trio.sleep(10 * limits.PRESENCE_LOOK_S)
            with pytest.raises(trio.WouldBlock):
                raw.receive_nowait()  # nothing has changed
            # Whoever meets a peer tells of it, once; the one who was told does not tell it again.
            services[1].met("c", ("/ip4/10.0.0.3/tcp/1",), "node")
            published = await raw.receive()
            await trio.sleep(0.1)
            assert b"10.0.0.3" not in published.data
            assert heard == {"a": [("c", ("/ip4/10.0.0.3/tcp/1",), "exchange", "node")], "b": []}
            for service in services:
                service.met("c", ("/ip4/10.0.0.3/tcp/1",), "node")
            services[0].met("nowhere", (), "node")
            await trio.sleep(10.0)
            with pytest.raises(trio.WouldBlock):
                raw.receive_nowait()
            # Should it go and come, or move, that is news.
            services[1].gone("c")
            services[1].met("c", ("/ip4/10.0.0.3/tcp/1",), "node")
            services[1].met("d", ("/ip4/10.0.0.4/tcp/1",), "node")
            await raw.receive()
            await trio.sleep(0.1)
            services[1].met("c", ("/ip4/10.0.0.33/tcp/1",), "node")
            await raw.receive()
            await trio.sleep(0.1)
            assert heard["a"][1:] == [
                ("c", ("/ip4/10.0.0.3/tcp/1",), "exchange", "node"),
                ("d", ("/ip4/10.0.0.4/tcp/1",), "exchange", "node"),
                ("c", ("/ip4/10.0.0.33/tcp/1",), "exchange", "node"),
            ]
            b._addresses = ("/ip4/10.9.9.9/tcp/1",)
            await raw.receive()
            await trio.sleep(0.1)
            assert heard["a"][-1] == ("b", ("/ip4/10.9.9.9/tcp/1",), "gossip", "trainer")
        await b.publish(ours.topic, b"junk" * 10)
        await b.publish(ours.topic, ours.seal(b"junk"))
        await trio.sleep(1)
        assert services[0].refused_count == 2
        nursery.cancel_scope.cancel()


async def test_a_list_of_revoked_peers_is_told_to_all(autojump_clock: trio.testing.MockClock) -> None:
    network, ours = MemoryFabricNetwork(), MeshSecrets("run", KEY)
    told: list[bytes] = []

    def take(encoded: bytes) -> None:
        if encoded == b"forged":
            raise ProtocolError("it is forged")
        told.append(encoded)

    async with network.open("a") as a, network.open("b") as b, trio.open_nursery() as nursery:
        await a.connect("b", b.addresses)
        services = [
            PresenceService(fabric, ours, role="node", incarnation=bytes(16), heard=lambda *told: None, revoked=take)
            for fabric in (a, b)
        ]
        async with a.subscribe(ours.topic) as raw:
            for service in services:
                await nursery.start(service.run)
            services[1].revoke(b"first")
            services[1].revoke(b"second")
            published = await raw.receive()
            assert b"second" not in published.data
            services[1].revoke(b"forged")
            await raw.receive()
            await trio.sleep(1)
        assert told == [b"second"]
        assert services[0].refused_count == 1
        nursery.cancel_scope.cancel()
