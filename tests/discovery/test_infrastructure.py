"""Keeping bootstrap peers connected: ones that are away, that let go at once, and names that cannot be resolved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import trio

from sparkle_mesh import limits
from sparkle_mesh.clock import SYSTEM_ENTROPY
from sparkle_mesh.discovery.infrastructure import Infrastructure
from sparkle_mesh.discovery.public_peers import PublicPeers
from sparkle_mesh.errors import UnreachableError
from sparkle_mesh.fabric.identity import Identity

PEERS = [Identity(bytes([number]) * 32).peer_id for number in range(8)]
ADDRESSES = [f"/ip4/44.0.0.{number}/tcp/4001/p2p/{peer_id}" for number, peer_id in enumerate(PEERS)]


class World:
    """A fabric that reaches whom it is told to, and what resolves names."""

    peer_id = "me"

    def __init__(self) -> None:
        self.reachable = set(PEERS)
        self.lets_go: set[str] = set()
        self.present: set[str] = set()
        self.dials: Counter[str] = Counter()
        self.asked_dns = 0
        self.told: list[str] = []
        self.public_peers = PublicPeers()

    def connected_peers(self) -> frozenset[str]:
        return frozenset(self.present)

    async def connect(self, peer_id: str, addresses: Any, *, timeout_s: float = 1.0, from_port: bool = False) -> None:
        assert from_port
        assert peer_id in self.public_peers
        self.dials[peer_id] += 1
        await trio.sleep(0.1)
        if peer_id not in self.reachable:
            raise UnreachableError(f"{peer_id} is away")
        if peer_id not in self.lets_go:
            self.present.add(peer_id)

    async def resolve(self, name: str) -> Sequence[str]:
        self.asked_dns += 1
        raise UnreachableError("no DNS")

    def infrastructure(self, bootstrap: Sequence[str]) -> Infrastructure:
        fabric: Any = self
        return Infrastructure(
            fabric,
            bootstrap,
            public_peers=self.public_peers,
            connected=self.told.append,
            resolve=self.resolve,
            entropy=SYSTEM_ENTROPY,
        )

    async def run(self, bootstrap: Sequence[str], seconds: float) -> Infrastructure:
        infrastructure = self.infrastructure(bootstrap)
        with trio.move_on_after(seconds):
            await infrastructure.run()
        return infrastructure


async def test_some_are_kept_connected_and_replaced(autojump_clock) -> None:
    world = World()
    infrastructure = world.infrastructure(ADDRESSES)
    assert infrastructure.status() == "no addresses known yet"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(infrastructure.run)
        await trio.sleep(1)
        first = set(world.present)
        assert len(first) == limits.BOOTSTRAP_CONNECTED_COUNT
        assert set(world.told) == first == {peer.peer_id for peer in infrastructure.connected()}
        assert infrastructure.status() == "3 of 8 connected"
        gone = world.present.pop()
        world.reachable.discard(gone)
        await trio.sleep(2 * limits.BOOTSTRAP_LOOK_S)
        assert len(world.present) == limits.BOOTSTRAP_CONNECTED_COUNT
        assert gone not in world.present
        nursery.cancel_scope.cancel()


async def test_those_that_are_away_or_let_go_at_once_are_tried_more_and_more_seldom(autojump_clock) -> None:
    world = World()
    world.reachable, world.lets_go = set(PEERS[1:]), set(PEERS[1:])
    infrastructure = await world.run(ADDRESSES[:3], 3600.0)
    for peer_id in PEERS[:3]:
        assert 4 <= world.dials[peer_id] <= 20
    assert "0 of 3 connected; last error: " in infrastructure.status()


async def test_a_machine_that_is_not_online_does_not_ask_dns_all_the_time(autojump_clock) -> None:
    world = World()
    infrastructure = await world.run(["/dnsaddr/bootstrap.example.org"], 3600.0)
    assert 30 <= world.asked_dns <= 100
    assert infrastructure.status() == "no addresses known (is this machine online?)"


async def test_none_is_none(autojump_clock) -> None:
    world = World()
    infrastructure = world.infrastructure([])
    with trio.fail_after(1):
        await infrastructure.run()
    assert infrastructure.status() == "off"
