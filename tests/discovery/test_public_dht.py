"""Meeting in the public DHT: a network of made-up peers, some of whom are silent, lie or have nothing to say."""

from __future__ import annotations

from hashlib import sha256
from typing import Any, NamedTuple

import pytest
import trio

from sparkle_mesh import limits
from sparkle_mesh.discovery.public_dht import PublicDht
from sparkle_mesh.discovery.public_peers import PublicPeers
from sparkle_mesh.errors import UnreachableError
from sparkle_mesh.wire import PeerAddress

KEY = b"the mesh"
ADDRESS = "/ip4/44.{0}.{1}.1/tcp/4001"


def peer(number: int) -> PeerAddress:
    return PeerAddress(peer_id=f"p{number}", addresses=(ADDRESS.format(number // 200, number % 200),))


class Answer(NamedTuple):
    providers: list[PeerAddress]
    closer: list[PeerAddress]


class FakeNetwork:
    """A DHT of ``count`` peers, each of which knows all; as the fabric and as the client that asks."""

    peer_id = "me"

    def __init__(self, count: int) -> None:
        self.peers = [peer(number) for number in range(count)]
        self.silent: set[str] = set()
        self.unreachable: set[str] = set()
        self.connected: set[str] = {"p0"}
        self.let_go: list[str] = []
        self.told: dict[str, tuple[str, ...]] = {}
        self.providers: list[PeerAddress] = []
        self.public_peers = PublicPeers()

    def place_of_key(self, key: bytes) -> bytes:
        return sha256(key).digest()

    def place_of_peer(self, peer_id: str) -> bytes:
        return sha256(peer_id.encode()).digest()

    def connected_peers(self) -> frozenset[str]:
        return frozenset(self.connected)

    async def connect(self, peer_id: str, addresses: Any, *, timeout_s: float) -> None:
        assert peer_id in self.public_peers, "whoever is connected to may be of the mesh, as far as others know"
        await trio.sleep(0.05)
        if peer_id in self.unreachable:
            raise UnreachableError("gone")
        self.connected.add(peer_id)

    async def disconnect(self, peer_id: str) -> None:
        self.let_go.append(peer_id)
        self.connected.discard(peer_id)

    def closest(self, count: int) -> list[PeerAddress]:
        key = int.from_bytes(self.place_of_key(KEY), "big")
        return sorted(self.peers, key=lambda p: key ^ int.from_bytes(self.place_of_peer(p.peer_id), "big"))[:count]

    async def ask(self, peer_id: str, key: bytes) -> Answer:
        await trio.sleep(0.05)
        if peer_id in self.silent:
            await trio.sleep(limits.PROTOBUF_ANSWER_TIMEOUT_S)
            raise UnreachableError("silent")
        return Answer(self.providers, self.closest(20))

    async def tell(self, peer_id: str, key: bytes, addresses: Any) -> None:
        await trio.sleep(0.05)
        if peer_id in self.silent:
            raise UnreachableError("silent")
        self.told[peer_id] = tuple(addresses)

    async def meet(self, addresses: tuple[str, ...] = ("/ip4/44.9.9.9/tcp/1",)) -> tuple[tuple[int, int], list[str]]:
        fabric: Any = self
        found: list[PeerAddress] = []
        dht = PublicDht(fabric, self, roots=lambda: [peer(0)], public_peers=self.public_peers)
        counts = await dht.meet(KEY, addresses, found.append)
        return counts, [one.peer_id for one in found]


@pytest.fixture
def network(autojump_clock) -> FakeNetwork:
    return FakeNetwork(120)


async def test_the_closest_are_told_and_all_that_were_asked_are_let_go(network: FakeNetwork) -> None:
    network.providers = [peer(1000), PeerAddress(peer_id="me", addresses=())]
    counts, found = await network.meet()
    assert counts == (limits.PUBLIC_DHT_HOLDERS_COUNT, limits.PUBLIC_DHT_HOLDERS_COUNT)
    assert set(found) == {"p1000"}
    assert set(network.told) == {one.peer_id for one in network.closest(limits.PUBLIC_DHT_HOLDERS_COUNT)}
    # The root was connected before; it stays.
    assert network.connected == {"p0"}
    assert not any(one.peer_id in network.public_peers for one in network.peers)


async def test_who_has_no_address_says_nothing_and_still_finds_others(network: FakeNetwork) -> None:
    network.providers = [peer(1000)]
    counts, found = await network.meet(())
    assert counts == (limits.PUBLIC_DHT_HOLDERS_COUNT, 0)
    assert "p1000" in found
    assert network.told == {}


async def test_silent_and_dead_peers_are_passed_over(network: FakeNetwork) -> None:
    closest = [one.peer_id for one in network.closest(20)]
    network.silent, network.unreachable = set(closest[:5]), set(closest[5:10])
    started_at = trio.current_time()
    counts, _ = await network.meet()
    # Others have taken their places.
    assert 10 <= counts[1] <= limits.PUBLIC_DHT_HOLDERS_COUNT
    assert not set(network.told) & (network.silent | network.unreachable)
    assert trio.current_time() - started_at < limits.PUBLIC_DHT_TIMEOUT_S
    assert network.connected == {"p0"}


async def test_it_takes_no_longer_than_allowed(network: FakeNetwork) -> None:
    network.silent = {one.peer_id for one in network.peers}
    with trio.fail_after(limits.PUBLIC_DHT_TIMEOUT_S + 1):
        assert await network.meet() == ((0, 0), [])


async def test_whom_somebody_else_needs_stays_connected(network: FakeNetwork) -> None:
    needed = network.closest(1)[0].peer_id
    network.public_peers.hold(needed)
    await network.meet()
    assert network.connected == {"p0", needed}
    assert network.public_peers.held_count(needed) == 1
